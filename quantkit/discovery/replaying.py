"""Calls of a block's modules while it is traced, and the proof that a relu put there does what was recorded.

With a relu in a module's place (or behind it) the block must give what the recorded operations give when they are fed
with the relu of what was recorded there. Where a router's choice may change with it, recorded operations say nothing:
then the relu is held against a hook's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quantkit.activations import ReLU, adapted
from quantkit.discovery.trace import Slot, Trace, address, own_copy

SHIFT = 0.125
"""What is taken off before the relu that a find is proven with."""
TOLERANCE = 1e-5
"""How far, relative to the largest number, the proof's two ways may be apart: they round in the same places."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: its name, the operations start to end that ran in it, and what it took and gave."""

    name: str
    module: nn.Module
    start: int
    end: int
    taken: Tensor
    given: Tensor
    value: Tensor

    @property
    def home(self) -> int:
        """The address of what it gave."""
        return address(self.given)


@contextmanager
def calls_in(block: nn.Module, trace: Trace) -> Iterator[list[Call]]:
    """While it lasts every call of a module that takes one tensor and gives one is noted."""
    calls: list[Call] = []
    started: list[int] = []

    def before(*_: Any) -> None:
        started.append(len(trace.ops))

    def after(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            start = started.pop()
            given = [leaf for leaf in tree_leaves((args, kwargs)) if is_float(leaf)]
            if len(given) == 1 and isinstance(output, Tensor) and output.is_floating_point():
                value = _value(trace, given[0], start)
                calls.append(Call(name, module, start, len(trace.ops), given[0], output, value))

        return note

    hooks = []
    for name, module in block.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(before))
            hooks.append(module.register_forward_hook(after(name), with_kwargs=True))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def is_float(leaf: Any) -> bool:
    """Whether something is a float tensor."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _value(trace: Trace, tensor: Tensor, start: int) -> Tensor:
    """What a tensor held when a call began: as the first operation in it took it, which may write to it."""
    place = (address(tensor), tuple(tensor.shape), int(tensor.storage_offset()))
    for op in trace.ops[start:]:
        for slot in op.slots:
            if (slot.storage, slot.size, slot.offset) == place and not slot.parameter:
                return slot.value
    return tensor


class Proof:
    """Whether a block with a relu in a place gives what the recorded operations give with it."""

    def __init__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], trace: Trace) -> None:
        self.block, self.args, self.kwargs, self.trace = block, args, kwargs, trace

    def holds(self, name: str, calls: Sequence[Call], *, replaces: bool, routed: bool = False) -> bool:
        """Whether it does, for a relu in place of a module, or behind it; `routed` where choices may change with it."""
        module = self.block.get_submodule(name)
        if replaces:
            self.block.set_submodule(name, ReLU(SHIFT).eval())
        try:
            with adapted(module, None if replaces else SHIFT):
                output = self._run()
        finally:
            self.block.set_submodule(name, module)
        if replaces or not routed:
            given = {call: F.relu((call.value if replaces else call.given) - SHIFT) for call in calls}
            with suppress(RuntimeError):  # a router has sent tokens elsewhere: shapes no longer fit
                if _alike(output, self._replayed(given)):
                    return True
        return routed and _alike(output, self._overruled(module, replaces=replaces))

    def _overruled(self, module: nn.Module, *, replaces: bool) -> Tensor:
        """What the block gives where a hook has the last word on what the module gives."""
        hook = module.register_forward_hook(lambda _, args, output: F.relu((args[0] if replaces else output) - SHIFT))
        try:
            return self._run()
        finally:
            hook.remove()

    @torch.no_grad()
    def _run(self) -> Tensor:
        """What the block gives as it is."""
        args, kwargs = own_copy(self.block, self.args, self.kwargs)
        return _first(self.block(*args, **kwargs))

    def _replayed(self, given: Mapping[Call, Tensor]) -> Tensor:
        """The block's output from the recorded operations, with other numbers for what calls gave."""
        ends = {call.end: call for call in given}
        inside = {number for call in given for number in range(call.start, call.end)}
        changed: dict[int, torch.UntypedStorage] = {}
        for number, op in enumerate(self.trace.ops):
            if number in ends:
                _put(changed, ends[number].given, given[ends[number]])
            if number in inside or op.is_view or not any(slot.storage in changed for slot in op.slots):
                continue
            seen = {i: slot for i, slot in enumerate(op.leaves) if isinstance(slot, Slot) and not slot.parameter}
            values = {
                i: _window(changed[slot.storage], slot.tensor) for i, slot in seen.items() if slot.storage in changed
            }
            for slot, value in zip(op.results, op.replay(values), strict=False):
                _put(changed, slot.tensor, value)
        output = _first(self.trace.kept[-1])
        return output if address(output) not in changed else _window(changed[address(output)], output)


def _put(changed: dict[int, torch.UntypedStorage], tensor: Tensor, value: Tensor) -> None:
    """Hold a value for a tensor's window onto its storage, of which the rest is as it was."""
    home = address(tensor)
    if home not in changed:
        changed[home] = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]
    _window(changed[home], tensor).copy_(value)


def _window(storage: torch.UntypedStorage, tensor: Tensor) -> Tensor:
    """What a tensor would hold if its storage were this one."""
    found = torch.empty(0, dtype=tensor.dtype)
    found.set_(storage, int(tensor.storage_offset()), tensor.shape, tensor.stride())  # type: ignore[call-overload]
    return found


def _first(output: Any) -> Tensor:
    """The first float tensor of what a block returned."""
    found: Tensor = next(leaf for leaf in tree_leaves(output) if is_float(leaf))
    return found


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are the same but for rounding."""
    return bool((one - other).abs().amax() <= TOLERANCE * other.abs().amax())
