"""Discovery: what a model does with its parameters, seen in one short forward pass that moves no data.

The pass runs on the meta device: shapes flow, values don't, and the model's size doesn't matter.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from quantkit.checkpoint import empty_copy, linears

TOKENS = 4


class _Reads(TorchFunctionMode):
    """Notes every weight that an operation takes while its own layer isn't running."""

    def __init__(self, owners: dict[int, str]) -> None:
        super().__init__()
        self.owners = owners
        self.running: list[str] = []
        self.elsewhere: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, and look at what it takes."""
        for value in tree_leaves((args, kwargs or {})):
            owner = self.owners.get(id(value))
            if owner is not None and owner not in self.running:
                self.elsewhere.add(owner)
        return func(*args, **(kwargs or {}))


def weights_read_elsewhere(model: nn.Module) -> tuple[set[str], str | None]:
    """Names of the linear layers whose weight other code reads, and why the pass ended early, or None.

    A state-space block, say, may multiply by `self.dt_proj.weight` without calling the layer: packed codes would then
    be taken for the weight, so such a layer must stay in float. A pass that ends early (a model that looks at values,
    or needs other inputs than token ids) still tells what was read until then.
    """
    copy = empty_copy(model).to(torch.bfloat16)  # the dtype that every product takes, grouped ones too
    reads = _Reads({id(layer.weight): name for name, layer in linears(copy)})
    for name, layer in linears(copy):
        layer.register_forward_pre_hook(lambda *_, name=name: reads.running.append(name))
        layer.register_forward_hook(lambda *_: reads.running.pop() and None)
    ended = None
    with torch.no_grad(), reads:
        try:
            copy(input_ids=torch.zeros((1, TOKENS), dtype=torch.int64, device="meta"))
        except Exception as error:  # whatever the model's own code raises when it sees no values
            ended = " ".join(str(error).split())[:200] or type(error).__name__
    return reads.elsewhere, ended
