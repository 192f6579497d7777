"""A trace: every operation of a block in order, with the values it took and where they are stored.

Tensors are told apart by storage, so that views need no bookkeeping: a view of a parameter is a window onto the
parameter's storage, and an operation in place changes what every other view of that storage sees.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from quantkit.discovery.structure import DiscoveryError

NONE: frozenset[str] = frozenset()
VALUELESS = ("empty", "new_empty", "zeros_like", "ones_like", "new_zeros", "new_ones", "full_like", "new_full")
"""Operations that take a tensor for its shape alone (by how their names begin)."""


@dataclass(frozen=True, eq=False)
class Slot:
    """A tensor that an operation took or made.

    Attributes:
        tensor: the tensor itself (kept, so that its storage stays the only one of its address).
        value: what it held at that time; a parameter isn't copied.
        storage: the address of its storage.
        size, stride, offset: its window onto the storage, in elements.
        parameter: the parameter that it is a view of, or None.
        active: whether its values depend on the block's inputs, other than by integers or truth values.
        parameters: every parameter that its values depend on, other than through activations.
    """

    tensor: Tensor
    value: Tensor
    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    parameter: str | None
    active: bool
    parameters: frozenset[str]

    @property
    def floating(self) -> bool:
        """Whether it holds real or complex numbers that can be scaled."""
        return self.value.is_floating_point() or self.value.is_complex()

    @property
    def weightlike(self) -> bool:
        """Whether it was made of parameters alone."""
        return self.floating and not self.active and bool(self.parameters)


@dataclass(frozen=True, eq=False)
class Op:
    """One operation.

    Attributes:
        func: the operation, as torch dispatched it.
        name: its bare name: `mm`, `add`.
        leaves: its arguments, flattened; tensors as slots.
        spec: how the arguments were nested.
        written: which leaves it changes in place.
        made: which of its flattened results are new tensors, as (position, slot).
        results: the slots whose values it set: those of `written`, then those of `made`.
        is_view: whether it only gives a new window onto the storage of an argument.
        reinterprets: whether that window counts elements of another size.
    """

    func: Callable[..., Any]
    name: str
    leaves: tuple[Any, ...]
    spec: TreeSpec
    written: tuple[int, ...]
    made: tuple[tuple[int, Slot], ...]
    results: tuple[Slot, ...]
    is_view: bool
    reinterprets: bool

    @cached_property
    def slots(self) -> list[Slot]:
        """The tensors it took."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Slot)]

    def replay(self, values: Mapping[int, Tensor]) -> list[Any]:
        """What it gives in place of `results`, with other values for some leaves (by position).

        Results that are no tensors come last. The recorded values are left alone.
        """
        leaves = [values.get(i, leaf.value) if isinstance(leaf, Slot) else leaf for i, leaf in enumerate(self.leaves)]
        for i in self.written:
            leaves[i] = leaves[i].clone()
        args, kwargs = tree_unflatten(leaves, self.spec)
        results = tree_leaves(self.func(*args, **kwargs))
        numbers = [result for result in results if not isinstance(result, Tensor)]
        return [leaves[i] for i in self.written] + [results[i] for i, _ in self.made] + numbers


@dataclass
class Trace:
    """The operations of one or more runs of a block.

    Attributes:
        parameters: the block's parameters by name.
        ops: all operations in order.
        outputs: storages of what the block returned.
        left: storages that the block left in its arguments (a dictionary that other blocks read).
        kept: what must live on, so that every storage keeps an address of its own.
    """

    parameters: dict[str, Tensor]
    ops: list[Op] = field(default_factory=list)
    outputs: set[int] = field(default_factory=set)
    left: set[int] = field(default_factory=set)
    kept: list[Any] = field(default_factory=list)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operation while it is on."""

    def __init__(self, trace: Trace, inputs: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace
        self._active = {address(t) for t in inputs if t.is_floating_point() or t.is_complex()}
        self._made_of: dict[int, frozenset[str]] = {}
        self._owners: dict[int, list[tuple[int, int, str]]] = {}
        for name, parameter in trace.parameters.items():
            start = int(parameter.storage_offset())
            length = 1 + sum((n - 1) * s for n, s in zip(parameter.shape, parameter.stride(), strict=True))
            self._owners.setdefault(address(parameter), []).append((start, start + length, name))
        self._writes: dict[int, int] = {}
        self._copies: dict[tuple[Any, ...], Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and note it."""
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        leaves = tuple(self._slot(leaf, copied=True) if isinstance(leaf, Tensor) else leaf for leaf in flat)
        changed = {id(t) for t in _written(func, args, kwargs)}
        written = tuple(i for i, leaf in enumerate(flat) if id(leaf) in changed)
        output = func(*args, **kwargs)
        slots = [leaf for leaf in leaves if isinstance(leaf, Slot)]
        sources = [slot for slot in slots if slot.floating]
        name = func._schema.name.rpartition("::")[2].rstrip("_") or str(func)
        if name.startswith(VALUELESS):
            sources = []
        active = any(slot.active for slot in sources) or name == "embedding"  # what is looked up is an activation
        made_of = NONE.union(*(slot.parameters for slot in sources if not slot.active))
        itemsizes = {slot.storage: slot.value.itemsize for slot in slots}
        aliases, reinterprets, made = False, False, []
        for i, result in enumerate(tree_leaves(output)):
            if not isinstance(result, Tensor) or id(result) in changed:
                continue
            home = address(result)
            if home in itemsizes:
                aliases = True
                reinterprets |= itemsizes[home] != result.itemsize
                continue
            derived = made_of if _floats(result) and not active and bool(result.any()) else NONE  # zeros are only zeros
            self._note(home, active and _floats(result), derived)
            made.append((i, self._slot(result, copied=False)))
        for i in written:
            home = address(flat[i])
            self._writes[home] = self._writes.get(home, 0) + 1
            self._note(home, active, NONE if active else made_of)
        rewritten = tuple(self._slot(flat[i], copied=False) for i in written)
        results = (*rewritten, *(slot for _, slot in made))
        is_view = aliases and not results
        self.trace.ops.append(Op(func, name, leaves, spec, written, tuple(made), results, is_view, reinterprets))
        return output

    def _note(self, home: int, active: bool, made_of: frozenset[str]) -> None:
        if active:
            self._active.add(home)
        if made_of:
            self._made_of[home] = self._made_of.get(home, NONE) | made_of

    def _slot(self, tensor: Tensor, copied: bool) -> Slot:
        tensor = tensor.detach()
        home, offset = address(tensor), int(tensor.storage_offset())
        size, stride = tuple(tensor.shape), tuple(tensor.stride())
        owners = self._owners.get(home, ())
        owner = next((name for start, stop, name in owners if start <= offset < stop), None)
        value = tensor
        if copied and owner is None:
            key = (home, offset, size, stride, tensor.dtype, self._writes.get(home, 0))
            if key not in self._copies:
                self._copies[key] = tensor.clone()
            value = self._copies[key]
        made_of = self._made_of.get(home, NONE) if owner is None else frozenset((owner,))
        return Slot(tensor, value, home, size, stride, offset, owner, home in self._active, made_of)


def record(
    block: nn.Module, runs: Iterable[tuple[tuple[Any, ...], dict[str, Any]]], trace: Trace | None = None
) -> Trace:
    """The trace of a block, called with each of some arguments one after another; a trace that is given goes on.

    Raises:
        DiscoveryError: the block is in training mode, or a parameter isn't float32 in memory of its own.
    """
    if trace is None:
        trace = Trace({name: parameter.detach() for name, parameter in block.named_parameters()})
        _check(block, trace.parameters)
    for args, kwargs in runs:
        args, kwargs = own_copy(block, args, kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        before = {address(t) for t in inputs}
        with torch.no_grad(), _Recorder(trace, inputs):
            output = block(*args, **kwargs)
        trace.kept += [args, kwargs, output]
        trace.outputs |= {address(t) for t in tree_leaves(output) if isinstance(t, Tensor)}
        after = {address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        trace.left |= after - before
    return trace


def own_copy(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, copied, so that a run can change them (a cache grows); the block's own tensors stay."""
    own = [*block.parameters(), *block.buffers(), *block.modules()]
    memo: dict[int, Any] = {id(thing): thing for thing in own}
    return copy.deepcopy(args, memo), copy.deepcopy(kwargs, memo)


def address(tensor: Tensor) -> int:
    """The address of a tensor's storage; of one without memory a number of its own."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or -int(storage._cdata)


def _floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation changes in place, by its schema."""
    found: list[Any] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))
    return [value for value in found if isinstance(value, Tensor)]


def _check(block: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    if block.training:
        raise DiscoveryError(f"{type(block).__name__} is in training mode; a trace needs block.eval()")
    for name, parameter in parameters.items():
        if parameter.is_meta or parameter.dtype != torch.float32:
            where = "no memory" if parameter.is_meta else str(parameter.dtype)
            raise DiscoveryError(f"parameter {name} has {where}; a trace needs float32 weights in memory")
