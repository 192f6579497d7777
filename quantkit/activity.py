"""What a forward pass of a batch holds in memory, counted with tensors that have shapes and no bytes."""

import copy
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantkit.checkpoint import use_plain_implementations
from quantkit.exploration import Findings, without_cache
from quantkit.watching import PRODUCTS


@dataclass(frozen=True)
class Activity:
    """What one batch holds.

    Attributes:
        held: bytes that live between two blocks: hidden states, masks, positions.
        working: the most bytes that a block makes on top while it runs.
        made: all bytes that a block makes, whether they live on or not.
        counted: whether the model's own code ran, so that both are counted; else they are estimated.
        fed_as: weights of the blocks that are fed what another just before them is, to that one's name.
    """

    held: int
    working: int
    made: int
    counted: bool
    fed_as: dict[str, str] = field(default_factory=dict)


def activity(skeleton: nn.Module, findings: Findings, batch: int, length: int) -> Activity:
    """What a batch of `batch` windows of `length` tokens holds, in float32."""
    known: Activity | None = findings.activities.get((batch, length))
    if known is None:
        known = findings.activities[batch, length] = _found(skeleton, findings, batch, length)
    return known


def _found(skeleton: nn.Module, findings: Findings, batch: int, length: int) -> Activity:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch logs whatever fails
    try:
        for plain in (True, False):  # some code for experts in single steps looks at values, which there are none of
            with suppress(Exception):  # whatever the model's own code raises when it sees no values
                return _counted(skeleton, findings, batch, length, plain)
    finally:
        logging.disable(before)
    return _estimated(skeleton, findings, batch * length)


def _counted(skeleton: nn.Module, findings: Findings, batch: int, length: int, plain: bool) -> Activity:
    """By a pass of the model's own code; products of all experts at once exist in bfloat16 only, and count double."""
    live, fake = _Live(), FakeTensorMode(shape_env=ShapeEnv())
    with fake, _default_dtype(torch.float32 if plain else torch.bfloat16):
        model: nn.Module = type(skeleton)(copy.deepcopy(skeleton.config)).eval()
        ids = torch.zeros((batch, length), dtype=torch.int64)
        if plain:
            use_plain_implementations(model, attention=False)
        for index in range(findings.count):
            block = model.get_submodule(f"{findings.blocks}.{index}")
            live.know(f"{findings.blocks}.{index}", block)
            block.forward = live.around(block.forward)  # type: ignore[method-assign, assignment]
        with torch.no_grad(), live:
            model(input_ids=ids, **without_cache(model))
    times = 1 if plain else 2
    return Activity(times * live.held, times * live.working, times * live.made, counted=True, fed_as=live.fed_as)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _estimated(skeleton: nn.Module, findings: Findings, tokens: int) -> Activity:
    """By the sizes of the parameters: a block's inputs and a copy; of its products three of the widest at once."""
    config = skeleton.config.get_text_config()  # type: ignore[union-attr, operator]
    hidden = getattr(config, "hidden_size", None)
    blocks = skeleton.get_submodule(findings.blocks)
    widths = [size for p in blocks.parameters() if p.ndim > 1 for size in p.shape[-2:]]
    hidden = hidden if isinstance(hidden, int) else min(widths, default=0)
    working = 4 * tokens * (4 * hidden + 3 * max(widths, default=0))
    return Activity(8 * tokens * hidden, working, 4 * working, counted=False)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations made and that are still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.total = self.held = self.working = self.made = 0
        self._known: dict[int, int] = {}
        self._weights: dict[int, str] = {}
        self._latest: tuple[tuple[Any, ...], str] | None = None
        self.fed_as: dict[str, str] = {}

    def know(self, name: str, block: nn.Module) -> None:
        """Watch what meets a block's weights."""
        for path, parameter in block.named_parameters():
            if parameter.ndim > 1:
                self._weights[id(parameter.untyped_storage())] = f"{name}.{path}"

    def _meet(self, operands: Iterable[torch.Tensor]) -> None:
        """Note which weight an operand of a product is, and whether the other is what the weight before it met."""
        left, right = operands
        for weight, x in ((left, right), (right, left)):
            name = self._weights.get(id(weight.untyped_storage()))
            if name is None or id(x.untyped_storage()) in self._weights:
                continue
            window = (id(x.untyped_storage()), x.storage_offset(), x.numel())
            if self._latest is not None and self._latest[0] == window:
                self.fed_as.setdefault(name, self._latest[1])
            else:
                self._latest = (window, name)

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and count what it made."""
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self._meet(args[place] for place in PRODUCTS[func])
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and id(leaf.untyped_storage()) not in before:
                self._take(leaf.untyped_storage())
        return output

    def _take(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._known:
            self._known[key] = storage.nbytes()
            weakref.finalize(storage, self._drop, key)
            self.now += storage.nbytes()
            self.total += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward, which tells what lives before it and what it makes on top."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = self.peak = self.now
            total = self.total
            self.held = max(self.held, start)
            output = forward(*args, **kwargs)
            self.working = max(self.working, self.peak - start)
            self.made = max(self.made, self.total - total)
            return output

        return run
