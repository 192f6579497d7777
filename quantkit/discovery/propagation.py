"""One pass of scales through a trace: what carries them, what undoes them, what forbids them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.discovery.labels import (
    ANY,
    UNSCALED,
    Signatures,
    channel_of,
    channels_in,
    collapse,
    encode,
    positions,
    power_of,
)
from quantkit.discovery.probing import Prober
from quantkit.discovery.products import ATTENTION, Product, multiply, product_of
from quantkit.discovery.reasons import Reasons
from quantkit.discovery.trace import VALUELESS, Op, Slot, Trace


@dataclass(frozen=True, eq=False)
class Scaling:
    """The codes along one axis of a scaled parameter (`value / s ** power`), and the offset it is scaled about."""

    axis: int
    codes: Tensor
    offset: float = 0.0

    def without(self, channels: set[int]) -> "Scaling":
        """The same without some channels."""
        gone = torch.isin(self.codes, _codes(channels))
        return Scaling(self.axis, torch.where(gone, UNSCALED, self.codes), self.offset)

    def joined(self, other: "Scaling") -> "Scaling | None":
        """Both together, or None if they contradict each other."""
        clash = (self.codes > 0) & (other.codes > 0) & (self.codes != other.codes)
        if self.axis != other.axis or self.offset or other.offset or bool(clash.any()):
            return None
        return Scaling(self.axis, torch.maximum(self.codes, other.codes))

    @property
    def channels(self) -> set[int]:
        """The channels that are scaled."""
        return channels_in(self.codes)


def _codes(channels: set[int]) -> Tensor:
    number = torch.tensor(sorted(channels), dtype=torch.int64)
    return torch.cat([encode(number, power) for power in range(-4, 5) if power])


class Windows:
    """Labels of tensors, kept by storage and size of an element (a complex view of real numbers is another matter)."""

    def __init__(self, parameters: dict[str, Tensor], scalings: dict[str, Scaling]) -> None:
        self._parameters, self._scalings = parameters, scalings
        self._labels: dict[tuple[int, int], Tensor] = {}

    def of(self, slot: Slot) -> Tensor | None:
        """The label of a tensor, or None if no element carries a scale. Size 1 where it doesn't change, if known."""
        home = (slot.storage, slot.tensor.itemsize)
        if slot.parameter is not None:
            scaling = self._scalings.get(slot.parameter)
            if scaling is None:
                return None
            label = scaling.codes[positions(slot, self._parameters[slot.parameter], scaling.axis)]
        elif home in self._labels:
            label = self._labels[home].as_strided(slot.size, slot.stride, slot.offset)
        else:
            return None
        return label if bool((label > 0).any()) else None

    def put(self, slot: Slot, label: Tensor) -> None:
        """Keep the label of a tensor that was just written."""
        home = (slot.storage, slot.tensor.itemsize)
        if home not in self._labels:
            if not bool((label > 0).any()):
                return
            elements = slot.tensor.untyped_storage().nbytes() // slot.tensor.itemsize
            self._labels[home] = torch.zeros(elements, dtype=torch.int64)
        self._labels[home].as_strided(slot.size, slot.stride, slot.offset).copy_(label)

    def stored(self, storage: int) -> list[Tensor]:
        """The labels of a whole storage, flat."""
        return [label for (home, _), label in self._labels.items() if home == storage]


class Weights:
    """Which position of which parameter each element of a tensor made of parameters comes from."""

    def __init__(self, trace: Trace, generator: torch.Generator) -> None:
        self.trace, self.generator = trace, generator
        self._passes: dict[tuple[str, int], Pass] = {}

    def positions(self, slot: Slot, name: str, axis: int) -> Tensor | None:
        """The positions along a parameter's axis, or None if the tensor isn't that parameter moved about."""
        parameter = self.trace.parameters[name]
        if slot.parameter is not None:
            return positions(slot, parameter, axis) if slot.parameter == name else None
        if (name, axis) not in self._passes:
            scaling = Scaling(axis, encode(torch.arange(parameter.size(axis)), 1))
            made = Pass(self.trace, {name: scaling}, parameter.size(axis), None, self.generator)
            for op in self.trace.ops:
                if any(result.weightlike for result in op.results):
                    made.step(op)
            self._passes[name, axis] = made
        label = self._passes[name, axis].windows.of(slot)
        if label is None or bool((label <= 0).any()) or bool((power_of(label) != 1).any()):
            return None
        return channel_of(label)

    def scaling(self, slot: Slot, wanted: Tensor) -> tuple[str, Scaling] | None:
        """The parameter and axis whose scaling gives a tensor the wanted label, or None.

        `wanted` has the tensor's axes, size 1 where it doesn't change.
        """
        for name in sorted(slot.parameters):
            parameter = self.trace.parameters[name]
            for axis in range(parameter.ndim):
                place = self.positions(slot, name, axis)
                if place is None or any(w > 1 and p == 1 for w, p in zip(wanted.shape, place.shape, strict=True)):
                    continue
                label = wanted.expand(torch.maximum(torch.tensor(place.shape), torch.tensor(wanted.shape)).tolist())
                place = place.expand(label.shape)
                codes = torch.full((parameter.size(axis),), ANY)
                codes.scatter_reduce_(0, place.reshape(-1), label.reshape(-1), "amax")
                if bool(((codes[place] == label) | (label == ANY)).all()):
                    return name, Scaling(axis, codes.clamp(min=UNSCALED))
        return None


class Pass:
    """Follows the scales of some parameters through a trace, operation by operation.

    Attributes:
        blocked: why some channels cannot be scaled, in the order found.
        wanted: scalings of further parameters that would undo the scales, or carry them on.
        offsets: constants that the block adds to a scaled parameter before all else.
        weights: where tensors made of parameters come from; None to ask for no further scaling.
        gain: the operation in which the scaled parameter met an activation, with its position and the result's label.
    """

    def __init__(
        self,
        trace: Trace,
        scalings: dict[str, Scaling],
        channels: int,
        weights: Weights | None,
        generator: torch.Generator,
    ) -> None:
        self.trace, self.scalings, self.weights = trace, scalings, weights
        self.prober = Prober(Signatures.of(channels), generator)
        self.windows = Windows(trace.parameters, scalings)
        self.blocked: dict[int, str] = {}
        self.wanted: dict[str, Scaling] = {}
        self.offsets: dict[str, float] = {}
        self.gain: tuple[Op, int, Tensor] | None = None
        self._reasons = Reasons(trace)
        self._live: set[int] = set().union(*(scaling.channels for scaling in scalings.values()))

    def run(self) -> "Pass":
        """Go through the whole trace, or until every channel is blocked."""
        for op in self.trace.ops:
            self.step(op)
            if self._live <= self.blocked.keys():
                return self
        for storages, reason in (
            (self.trace.outputs, "its output is the block's output"),
            (self.trace.left, "its output is handed on to other blocks"),
        ):
            for storage in sorted(storages):
                self._block(reason, *self.windows.stored(storage))
        return self

    def step(self, op: Op) -> None:
        """What one operation does to the scales."""
        labelled = {}
        for i, leaf in enumerate(op.leaves):
            if isinstance(leaf, Slot) and leaf.floating:
                label = self.windows.of(leaf)
                if label is not None:
                    labelled[i] = label
        if not labelled or _nothing(op) or op.name.startswith(VALUELESS):
            return
        if op.is_view:
            if op.reinterprets:
                self._block(self._reasons.of(op, labelled, bool(self.wanted)), *labelled.values())
            return
        product = product_of(op)
        if self._about_an_offset(op, labelled):
            return
        if product is not None:
            self._multiply(op, product, labelled)
        else:
            self._try(op, labelled)

    def _about_an_offset(self, op: Op, labelled: dict[int, Tensor]) -> bool:
        """Whether the operation takes a parameter that is scaled about an offset: only adding that offset will do."""
        for i, label in labelled.items():
            name = op.leaves[i].parameter
            offset = self.scalings[name].offset if name in self.scalings else 0.0
            if not offset:
                continue
            if len(labelled) == 1 and not op.written and self.prober.added_constant(op, i) == offset:
                self.windows.put(op.results[0], label)
            else:
                self._fail(op, labelled, f"{name} is read by {op.name} without the {offset:g} that is added elsewhere")
            return True
        return False

    def _multiply(self, op: Op, product: Product, labelled: dict[int, Tensor]) -> None:
        """A matrix product."""
        by_slot = {id(op.leaves[i]): label for i, label in labelled.items()}
        outcome = multiply(product, by_slot.get(id(product.left)), by_slot.get(id(product.right)))
        label, added = outcome.label, product.added
        if label is None:
            if outcome.wanted is None:
                return self._fail(op, labelled)
            slot, codes = outcome.wanted
            axis = next(axis for operand, axis in product.operands if operand is slot)
            shape = [codes.numel() if i == axis else 1 for i in range(len(slot.size))]
            if not self._want(op, slot, codes.view(shape)):
                return self._fail(op, labelled)
            label = torch.full([1] * len(op.results[0].size), UNSCALED)
        if added is not None:
            own = by_slot.get(id(added))
            own = torch.full([1] * len(added.size), UNSCALED) if own is None else own
            if bool(((label != own) & (label != ANY) & (own != ANY)).any()):
                active = product.left.active or product.right.active
                if not active or not self._want_added(op, added, label.expand(op.results[0].size)):
                    return self._fail(op, labelled)
        return self.windows.put(op.results[0], label)

    def _try(self, op: Op, labelled: dict[int, Tensor]) -> None:
        """Any other operation: run it with scaled values."""
        if op.name.startswith(ATTENTION):
            labelled = self._without_scores(op, labelled)
            if not labelled:
                return
        found = self.prober.labels(op, labelled)
        if found is None:
            if not self._add_constant(op, labelled) and not self._add_parameter(op, labelled):
                self._fail(op, labelled)
            return
        for slot, label in zip(op.results, found, strict=True):
            self.windows.put(slot, label)
        if any(bool((label == ANY).any()) for label in found):
            gone = channels_in(*labelled.values()) - channels_in(*found)
            for channel in sorted(gone):
                self.blocked.setdefault(channel, f"its channel {channel} was never active in the trace ({op.name})")
        if self.gain is None and len(labelled) == 1 and len(op.results) > 0:
            (i,) = labelled
            if op.leaves[i].weightlike and op.results[0].active:
                self.gain = (op, i, found[0])

    def _without_scores(self, op: Op, labelled: dict[int, Tensor]) -> dict[int, Tensor]:
        """What fused attention takes without its queries and keys, whose channels are blocked: values may go on."""
        scores = {i: label for i, label in labelled.items() if i < 2}
        if not scores:
            return labelled
        self._fail(op, scores)
        return {i: label for i, label in labelled.items() if i not in scores}

    def _add_constant(self, op: Op, labelled: dict[int, Tensor]) -> bool:
        """Whether the operation adds a constant to a scaled parameter that nothing else was done to."""
        if len(labelled) != 1 or op.written:
            return False
        ((i, label),) = labelled.items()
        name = op.leaves[i].parameter
        if name is None or self.trace.parameters[name].ndim != 1:
            return False
        constant = self.prober.added_constant(op, i)
        if not constant:
            return False
        self.offsets[name] = constant
        self.windows.put(op.results[0], label)
        return True

    def _add_parameter(self, op: Op, labelled: dict[int, Tensor]) -> bool:
        """Whether the result carries scales once a parameter that is added to it carries them too."""
        for i, leaf in enumerate(op.leaves):
            if not isinstance(leaf, Slot) or not leaf.weightlike or i in labelled:
                continue
            found = self.prober.labels(op, labelled, zeroed=(i,))
            if not found or not channels_in(found[0]):
                continue
            active = any(op.leaves[j].active for j in labelled) or self.prober.needs_activations(op, (i,), 0)
            if active and self._want_added(op, leaf, found[0]):
                for slot, label in zip(op.results, found, strict=True):
                    self.windows.put(slot, label)
                if self.gain is None and len(labelled) == 1:
                    (j,) = labelled
                    self.gain = (op, j, found[0]) if op.leaves[j].weightlike else None
                return True
        return False

    def _want_added(self, op: Op, added: Slot, label: Tensor) -> bool:
        """Whether a parameter that is broadcast onto a result can be given the result's label."""
        axes = [1] if op.name == "convolution" else list(range(label.ndim - len(added.size), label.ndim))
        others = [axis for axis in range(label.ndim) if axis not in axes or added.size[axes.index(axis)] == 1]
        kept = collapse(label, *others)
        if kept is None or len(axes) != len(added.size) or axes[0] < 0:
            return False
        return self._want(op, added, kept.reshape([kept.size(axis) for axis in axes]))

    def _want(self, op: Op, slot: Slot, label: Tensor) -> bool:
        """Whether a further parameter can be scaled so that a tensor gets a label; notes it."""
        found = None if self.weights is None else self.weights.scaling(slot, label)
        if found is None:
            return False
        name, scaling = found
        for known in (self.scalings.get(name), self.wanted.get(name)):
            joined = scaling if known is None else known.joined(scaling)
            if joined is None:
                return False
            scaling = joined
        self.wanted[name] = scaling
        return True

    def _fail(self, op: Op, labelled: dict[int, Tensor], reason: str | None = None) -> None:
        self._block(reason or self._reasons.of(op, labelled, bool(self.wanted)), *labelled.values())
        for slot in op.results:
            self.windows.put(slot, torch.tensor(UNSCALED))

    def _block(self, reason: str, *labels: Tensor) -> None:
        for channel in sorted(channels_in(*labels)):
            self.blocked.setdefault(channel, reason)


def _nothing(op: Op) -> bool:
    """Whether an operation only made tensors without elements (an expert that no token went to)."""
    return bool(op.results) and not any(slot.value.numel() for slot in op.results)
