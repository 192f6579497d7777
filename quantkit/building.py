"""A model that is built without its weights can't ask for more than its files hold: what a config claims is bounded.

A skeleton's parameters have no storage in the end, but they have for a moment, and its buffers always. So every
operation of a constructor is tried on the meta device first, which gives its size and takes no memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as modules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from quantkit.errors import CheckpointError

PARAMETERS = 1000
"""Parameters that a model may have whatever its files hold."""
PARAMETERS_A_TENSOR = 8
"""Further ones for each stored tensor: files may hold several as one, as of fused projections."""
MODULES_A_PARAMETER = 20
BYTES = 2**29
"""Bytes that a tensor of a constructor may have whatever the files hold: masks and tables of positions."""
BYTES_A_BYTE = 16
"""Further ones for each stored byte: two bits in the file may be a float32 number in the model."""


@contextmanager
def bounded(tensors: int, nbytes: int, name: str) -> Iterator[None]:
    """Within it, a model that is built can't outgrow files of so many tensors and bytes.

    Raises:
        CheckpointError: it asks for more parameters, modules or bytes than such files can fill.
    """
    most, limit = PARAMETERS + PARAMETERS_A_TENSOR * tensors, BYTES + BYTES_A_BYTE * nbytes
    counts = {"parameters": 0, "modules": 0, "buffers": 0}
    mode = _Sized(limit, name)

    def count(kind: str, more: int, allowed: int) -> None:
        counts[kind] += more
        if counts[kind] > allowed:
            unit = "bytes of buffers" if kind == "buffers" else kind
            raise CheckpointError(
                f"config.json of {name} asks for more than {allowed:,} {unit}, and the files hold {tensors:,} tensors "
                f"of {nbytes:,} bytes; config and weights don't belong together: download both again"
            )

    def on_parameter(_: Any, __: str, value: Tensor | None) -> None:
        count("parameters", int(value is not None), most)

    def on_module(_: Any, __: str, value: Any) -> None:
        count("modules", int(value is not None), MODULES_A_PARAMETER * most)

    def on_buffer(_: Any, __: str, value: Tensor | None) -> None:
        count("buffers", value.nbytes if value is not None and not value.is_meta else 0, limit)

    hooks = [
        modules.register_module_parameter_registration_hook(on_parameter),
        modules.register_module_module_registration_hook(on_module),
        modules.register_module_buffer_registration_hook(on_buffer),
    ]
    try:
        with mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Sized(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses an operation whose result would be larger than a limit, before it takes the memory."""

    def __init__(self, limit: int, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit, self.name = limit, name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What the operation gives, if that is small enough."""
        words = dict(kwargs or {})
        size = _size(func, args, words)
        if size > self.limit:
            raise CheckpointError(
                f"config.json of {self.name} asks for a tensor of {size:,} bytes, more than its files can fill; config "
                "and weights don't belong together: download both again"
            )
        return func(*args, **words)


def _size(func: Any, args: Sequence[Any], words: dict[str, Any]) -> int:
    """Bytes of the largest result that an operation would have on a real device; 0 where that can't be told."""
    given = [leaf for leaf in tree_leaves((args, words)) if isinstance(leaf, Tensor)]
    if given and all(leaf.is_meta for leaf in given):
        return 0
    takes_device = any(argument.name == "device" for argument in func._schema.arguments)
    if not given and not takes_device:
        return 0
    place = {"device": torch.device("meta")} if takes_device else {}
    try:
        made = func(*tree_map(_on_meta, tuple(args)), **{**tree_map(_on_meta, words), **place})
    except Exception:  # of operations that need values; the real one says what is wrong
        return 0
    return max((leaf.nbytes for leaf in tree_leaves(made) if isinstance(leaf, Tensor)), default=0)


def _on_meta(value: Any) -> Any:
    """A tensor like the value on the meta device, or the value itself if it is none."""
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
