"""The error of the package."""


class KernelError(RuntimeError):
    """An op that cannot run as asked: a backend, dtype, device or shape it has no way for."""
