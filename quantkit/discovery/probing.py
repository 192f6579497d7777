"""One recorded operation, run again with other values: does it keep the scales of what it takes?"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.discovery.labels import ANY, Signatures, collapse
from quantkit.discovery.trace import Op, Slot

ROUNDING = 4
"""Digits of a constant that an operation adds to a parameter."""


class Prober:
    """Tries operations with scaled values.

    Every trial is made with the recorded values and with their negatives, zeros replaced by random numbers: so that a
    ReLU lets each element through once. Where a result stays zero because something else is zero, that something is
    replaced by random numbers too, and only what this adds in labels is taken.
    """

    def __init__(self, signatures: Signatures, generator: torch.Generator) -> None:
        self.signatures, self.generator = signatures, generator

    def labels(self, op: Op, labelled: Mapping[int, Tensor], zeroed: Collection[int] = ()) -> list[Tensor] | None:
        """The labels of the operation's results, or None if some element carries no single scale.

        `labelled` gives labels by position among the operation's leaves; the leaves in `zeroed` are taken as zeros.
        """
        fixed = {i: torch.zeros_like(op.leaves[i].value) for i in zeroed}
        positive = {i: self._alive(op.leaves[i].value, label) for i, label in labelled.items()}
        found = self._trial(op, labelled, fixed | positive)
        if found is None or any(bool(bad.any()) for _, bad in found):
            return None
        mirrored = self._trial(op, labelled, fixed | {i: -value for i, value in positive.items()})
        if mirrored is None:
            return None
        labels = []
        for (one, _), (other, bad) in zip(found, mirrored, strict=True):
            clash = (one != other) & (one != ANY) & (other != ANY)
            if bool((bad | clash).any()):
                return None
            labels.append(torch.where(one == ANY, other, one))
        if any(bool((label == ANY).any()) for label in labels):
            filled = self._trial(op, labelled, fixed | self._filled(op, {*labelled, *zeroed}) | positive)
            for i, (label, bad) in enumerate(filled or ()):
                labels[i] = torch.where((labels[i] == ANY) & (label > 0) & ~bad, label, labels[i])
        return labels

    def added_constant(self, op: Op, leaf: int) -> float | None:
        """The constant that the operation adds to one of its leaves, or None if it does anything else."""
        value = op.leaves[leaf].value
        results = op.replay({})
        if len(results) != 1 or not isinstance(results[0], Tensor) or results[0].shape != value.shape:
            return None
        difference = results[0] - value
        constant = round(float(difference.mean()), ROUNDING)
        near = (difference - constant).abs() <= 8 * torch.finfo(value.dtype).eps * (abs(constant) + value.abs())
        return constant if bool(near.all()) else None

    def needs_activations(self, op: Op, zeroed: Collection[int], result: int) -> bool:
        """Whether one of the results changes with the activations that the operation takes."""
        fixed = {i: torch.zeros_like(op.leaves[i].value) for i in zeroed}
        active = {i: -leaf.value for i, leaf in enumerate(op.leaves) if isinstance(leaf, Slot) and _changes(leaf)}
        return not torch.equal(op.replay(fixed)[result], op.replay(fixed | active)[result])

    def equal_rows(self, op: Op, gain: int, label: Tensor) -> bool:
        """Whether all rows have one root mean square when a gain is one and other parameters are zero: a norm's do."""
        values = {i: torch.zeros_like(s.value) for i, s in enumerate(op.leaves) if isinstance(s, Slot) and s.weightlike}
        result = op.replay(values | {gain: torch.ones_like(op.leaves[gain].value)})[0]
        axes = [axis for axis in range(label.ndim) if collapse(label, axis) is None]
        if not axes or not isinstance(result, Tensor):
            return False
        rows = result.float().square().mean(axes).sqrt()
        return rows.numel() > 1 and bool(rows.max() <= 1.05 * rows.min())

    def _alive(self, value: Tensor, label: Tensor) -> Tensor:
        """The value, with random numbers for zeros that carry a scale."""
        return torch.where((value == 0) & (label > 0), self._noise(value), value)

    def _filled(self, op: Op, known: Collection[int]) -> dict[int, Tensor]:
        """The other floating leaves, with random numbers for zeros."""
        found = {}
        for i, leaf in enumerate(op.leaves):
            if isinstance(leaf, Slot) and leaf.floating and i not in known:
                found[i] = torch.where(leaf.value == 0, self._noise(leaf.value), leaf.value)
        return found

    def _noise(self, value: Tensor) -> Tensor:
        return torch.randn(value.shape, generator=self.generator, device=value.device).to(value.dtype)

    def _trial(
        self, op: Op, labelled: Mapping[int, Tensor], values: dict[int, Tensor]
    ) -> list[tuple[Tensor, Tensor]] | None:
        """For each result its label and where it has none, or None if the results cannot be compared at all."""
        try:
            base = op.replay(values)
            tried = []
            for turn in range(self.signatures.rounds):
                scaled = {i: self.signatures.scaled(values[i], label, turn) for i, label in labelled.items()}
                tried.append(op.replay(values | scaled))
        except (RuntimeError, IndexError):  # an operation that checks its values doesn't keep scales
            return None
        found = []
        for i, result in enumerate(base):
            outcome = self._compare(result, [results[i] for results in tried])
            if outcome is None:
                return None
            if isinstance(result, Tensor):
                found.append(outcome)
        return found

    def _compare(self, base: Any, tried: list[Any]) -> tuple[Tensor, Tensor] | None:
        if not isinstance(base, Tensor):
            return (torch.empty(0), torch.empty(0)) if all(value == base for value in tried) else None
        if any(value.shape != base.shape for value in tried):
            return None
        if base.is_complex():
            label, bad = self.signatures.spell(torch.view_as_real(base), [torch.view_as_real(v) for v in tried])
            joined = collapse(label, -1)
            return None if joined is None else (joined[..., 0], bad.any(-1))
        if base.is_floating_point():
            return self.signatures.spell(base, tried)
        if not all(torch.equal(value, base) for value in tried):
            return None
        return torch.zeros(base.shape, dtype=torch.int64), torch.zeros(base.shape, dtype=torch.bool)


def _changes(slot: Slot) -> bool:
    return slot.floating and slot.active
