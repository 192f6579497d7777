"""Seeing what makes the host wait for a GPU, without one: at the level of torch's operators."""

from torch.utils._python_dispatch import TorchDispatchMode

WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "is_nonzero",
    "equal",
    "repeat_interleave.Tensor",
)
"""Operators whose result, or its shape, depends on numbers: on a GPU the host waits for them."""


class NothingWaits(TorchDispatchMode):
    """Raise AssertionError where an operator makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        assert not name.startswith(WAITING), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))
