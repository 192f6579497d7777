"""What a block does with its parameters of two or more axes: linear weights, routers, and the rest."""

from dataclasses import dataclass, field

import torch

from quantkit.discovery.labels import collapse
from quantkit.discovery.products import Product, multiplies_activations, product_of
from quantkit.discovery.propagation import Weights
from quantkit.discovery.structure import LinearUse
from quantkit.discovery.trace import Op, Slot, Trace

UNUSED = "not used in this pass"
_LOOKUPS = ("embedding", "index", "index_select", "gather")


@dataclass
class _Seen:
    """What was seen of one parameter: the axes it was contracted along, and operations of other kinds."""

    products: list[tuple[Op, int, int | None]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    on_the_way: list[str] = field(default_factory=list)


def uses(trace: Trace, weights: Weights) -> tuple[dict[str, LinearUse], dict[str, str]]:
    """Linear uses by parameter, and in words how the other parameters of two or more axes are used."""
    seen = {name: _Seen() for name, parameter in trace.parameters.items() if parameter.ndim > 1}
    for op in trace.ops:
        for slot in op.slots:
            for name in slot.parameters & seen.keys() if slot.weightlike and not op.is_view else ():
                _note(trace, weights, op, slot, name, seen[name])
    linears, others = {}, {}
    for name, found in seen.items():
        use = _linear(trace, name, found)
        if use is None:
            others[name] = _words(found)
        else:
            linears[name] = use
    return linears, others


def unused_likes(trace: Trace) -> list[str]:
    """Parameters of two or more axes that weren't used while others of the same kind were: experts without a token."""
    taken = {slot.parameter for op in trace.ops if not op.is_view for slot in op.slots}
    kinds = {kind_of(name) for name in trace.parameters if name in taken}
    many = [name for name, parameter in trace.parameters.items() if parameter.ndim > 1]
    return [name for name in many if name not in taken and kind_of(name) in kinds]


def kind_of(name: str) -> str:
    """A parameter's name without its numbers: members of a list of modules are of one kind."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _note(trace: Trace, weights: Weights, op: Op, slot: Slot, name: str, seen: _Seen) -> None:
    if not any(other.active for other in op.slots):
        seen.on_the_way.append(op.name)
        return
    product = product_of(op)
    axes = None if product is None else _axes(trace, weights, product, slot, name)
    if axes is None:
        seen.others.append(_word(op, product, slot))
    else:
        seen.products.append((op, *axes))


def _axes(trace: Trace, weights: Weights, product: Product, slot: Slot, name: str) -> tuple[int, int | None] | None:
    """The parameter's contracted axis and the one of the output's features (None if it has one feature)."""
    contracted = next((axis for operand, axis in product.operands if operand is slot), None)
    free = product.free_axis(slot)
    if contracted is None:
        return None
    found: dict[int | None, list[int]] = {}
    for axis in range(trace.parameters[name].ndim):
        place = weights.positions(slot, name, axis)
        if place is None:
            return None
        moving = [i for i in range(place.ndim) if collapse(place, i) is None]
        if len(moving) > 1:
            return None
        if moving:
            found.setdefault(moving[0], []).append(axis)
    if len(found.get(contracted, ())) != 1 or len(found.get(free, ())) > 1:
        return None
    return found[contracted][0], found[free][0] if free in found else None


def _linear(trace: Trace, name: str, seen: _Seen) -> LinearUse | None:
    """The parameter as a linear weight, if it is used as one and as nothing else."""
    ins, outs = {use[1] for use in seen.products}, {use[2] for use in seen.products} - {None}
    parameter = trace.parameters[name]
    if seen.others or len(ins) != 1 or len(outs) > 1 or parameter.ndim > 3:
        return None
    (in_axis,) = ins
    rest = [axis for axis in range(parameter.ndim) if axis != in_axis]
    out_axis = next((axis for axis in outs if axis is not None), rest[-1])
    expert_axis = next((axis for axis in rest if axis != out_axis), None)
    for op, _, _ in seen.products:
        chooser = _chooses(trace, op)
        if chooser is not None:
            reason = f"its output chooses experts ({chooser})"
            return LinearUse(name, in_axis, out_axis, expert_axis, "router", reason)
    return LinearUse(name, in_axis, out_axis, expert_axis)


def _chooses(trace: Trace, op: Op) -> str | None:
    """The operation that makes integers of a product's output, before the next product, that are used; or None."""
    reached = {slot.storage for slot in op.results}
    start = trace.ops.index(op)
    chosen: dict[int, str] = {}
    for later in trace.ops[start + 1 :]:
        taken = {slot.storage for slot in later.slots}
        if not later.is_view and taken & chosen.keys():
            return chosen[next(iter(taken & chosen.keys()))]
        if later.is_view or not taken & reached or multiplies_activations(later):
            continue
        for slot in later.results:
            if slot.floating or slot.value.dtype == torch.bool:
                reached.add(slot.storage)
            else:
                chosen[slot.storage] = later.name
    return None


def _words(seen: _Seen) -> str:
    way = seen.on_the_way
    if "embedding" in way:
        return "embedding"
    if "conv" in seen.others:
        return "conv"
    if "exp" in way:
        return "state-space matrix"
    if seen.products and seen.others:
        return f"a linear weight that is used otherwise as well: {seen.others[0]}"
    if seen.products:
        return "multiplied along more than one axis"
    if seen.others:
        return seen.others[0]
    return UNUSED if not way else f"looked up ({way[0]})" if way[0] in _LOOKUPS else f"read by {way[0]} alone"


def _word(op: Op, product: Product | None, slot: Slot) -> str:
    """What an operation that isn't a linear layer does with a parameter."""
    if product is not None:
        return f"added to a product ({op.name})" if slot is product.added else f"a product ({op.name})"
    if op.name == "convolution":
        return "conv"
    if op.name in ("add", "sub", "mul", "div"):
        return f"elementwise ({op.name})"
    return f"read by {op.name.lstrip('_')}"
