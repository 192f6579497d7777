"""Relus and thresholds put into one block while it is calibrated, and how much is zero before linear layers with them.

A shift is read off the distribution of what is given to the activation: the number that a share S of it isn't above, so
that relu(x - b) turns S of the neurons off, and 0 where more than S are off without (arXiv:2310.04564, section 5.3,
chooses it by that distribution, by eye). A threshold is the number that a share of the magnitudes isn't above
(arXiv:2408.14690). Both are of all calibration tokens, in the block as it is at that step.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from quantkit_calibration.activity import Distribution, Zeros
from torch import nn

from quantkit import activations
from quantkit.activating import ACTIVATION, THRESHOLD, Activating, recorded
from quantkit.discovery import LinearUse
from quantkit.observation import Observation
from quantkit.outcome import ChangedActivation, SparsityReport
from quantkit.reducing import merged
from quantkit.watching import Latest

DIGITS = 6
"""Digits of a number that is found: what is read off a histogram isn't known better."""


def restore(block: nn.Module, name: str, changes: Iterable[ChangedActivation]) -> None:
    """Return nothing; the block of that name does what was changed in it before."""
    activations.apply(block, recorded(changes).within(name))


class Rectifier:
    """Changes what happens between the linear layers of one block.

    Args:
        seen: runs the block on the calibration windows.
        here: what is to be changed in it.
        uses: its parameters that are linear layers' weights.
        windows: how many windows there are, and the tokens of each.
        bits: of a stored weight, by the parameter's full name.

    Attributes:
        changes: what was changed.
        notes: what a reader should know.
    """

    def __init__(
        self,
        seen: Observation,
        here: Activating,
        uses: Sequence[LinearUse],
        windows: tuple[int, int],
        bits: Callable[[str], float],
    ) -> None:
        self.seen, self.here, self.windows, self.bits = seen, here, windows, bits
        self.uses = {use.parameter: use for use in uses}
        self.changes: list[ChangedActivation] = []
        self.notes: list[str] = []
        self._before = self._zeros()

    def _inner(self, name: str) -> str:
        """A full name, as it is inside of the block."""
        return name.removeprefix(f"{self.seen.name}.")

    def rectify(self, share: float) -> None:
        """Put relus in their places; shifts that aren't given turn off a share of what the activations are given."""
        instead = [place for place in self.here.places if place.kind == ACTIVATION]
        self._put([place.changed(place.shift or 0.0) for place in self.here.places if place.kind != ACTIVATION])
        wanted = [self._inner(place.module) for place in instead if place.shift is None]
        found = self._distributions(wanted)
        made = []
        for place in instead:
            shift, name = place.shift, self._inner(place.module)
            if shift is None:
                shift = max(0.0, _short(found[name].quantile(share))) if name in found else 0.0
                if name not in found:
                    self.notes.append(f"{place.module} met no calibration token, and has no shift")
            made.append(place.changed(shift))
        self._put(made)

    def limit(self, target: float) -> None:
        """Give linear layers their thresholds, below which a share `target` of their input is."""
        axes = {self._inner(layer.parameter): layer.in_axis for layer in self.here.inputs}
        if not axes:
            return
        found = {path: Distribution() for path in axes}
        latest = Latest(_distribution)
        self.seen.watch(axes, lambda path, _, x: found[path].merge(latest(x)))
        found = merged(found, self.seen.ranks)
        made = []
        for layer in self.here.inputs:
            path = self._inner(layer.parameter)
            if found[path].count:
                made.append(ChangedActivation(layer.name, THRESHOLD, _short(found[path].magnitude(target))))
            else:
                self.notes.append(f"{layer.name} met no calibration token, and has no threshold")
        self._put(made)

    def _put(self, changes: list[ChangedActivation]) -> None:
        restore(self.seen.block, self.seen.name, changes)
        self.changes += changes

    def _distributions(self, names: Sequence[str]) -> dict[str, Distribution]:
        """How what is given to these modules lies, of those that were given anything."""
        found: dict[str, Distribution] = {}

        def note(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
            found.setdefault(name, Distribution()).update(args[0])

        modules = [(name, self.seen.block.get_submodule(name)) for name in names]
        hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in modules]
        try:
            if hooks:
                self.seen.run()
        finally:
            for hook in hooks:
                hook.remove()
        return merged(found, self.seen.ranks)

    def _zeros(self) -> dict[str, Zeros]:
        """How much of what meets each linear layer of the block is zero as it is now."""
        found: dict[str, Zeros] = {}
        length = self.windows[1]

        def see(path: str, expert: int | None, x: torch.Tensor) -> None:
            flat = x.reshape(-1, x.shape[-1])
            if path not in found:
                whole = expert is None and len(flat) % length == 0
                found[path] = Zeros(length if whole else None)
            found[path].update(flat)

        self.seen.watch({path: use.in_axis for path, use in self.uses.items()}, see)
        return merged(found, self.seen.ranks)

    def reports(self) -> list[SparsityReport]:
        """How much is zero before each linear layer of the block, before the changes and now."""
        after, tokens = self._zeros(), self.windows[0] * self.windows[1]
        found = []
        for path, use in self.uses.items():
            if path not in after:
                continue
            shape = self.seen.block.get_parameter(path).shape
            name = f"{self.seen.name}.{path}"
            found.append(
                SparsityReport(
                    name.removesuffix(".weight"),
                    (shape[use.out_axis], shape[use.in_axis]),
                    _by_gamma(self._before.get(path)),
                    _by_gamma(after[path]),
                    after[path].tokens / tokens,
                    self.bits(name),
                )
            )
        return found


def _by_gamma(zeros: Zeros | None) -> dict[str, float]:
    return {} if zeros is None else {str(gamma): share for gamma, share in zeros.result().items()}


def _distribution(x: torch.Tensor) -> Distribution:
    found = Distribution()
    found.update(x)
    return found


def _short(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")
