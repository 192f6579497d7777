"""What calibration windows show of one block: magnitudes, ranges and outlier columns of what meets its weights."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from quantkit_calibration.observers import TensorRange
from quantkit_calibration.sequential import Calls
from quantkit_kernels.formats import QMAX, dequantize, quantize_per_tensor
from torch import nn
from torch.utils._pytree import tree_leaves

from quantkit.errors import QuantkitError
from quantkit.memory import Excess
from quantkit.ranks import Ranks, current
from quantkit.reducing import Turn, total
from quantkit.reducing import ranges as reduced_ranges
from quantkit.scheme import Scheme
from quantkit.smoothing import Inputs
from quantkit.watching import ForcedRouting, Latest, See, Watch

FEW_TOKENS = 32
"""An expert that fewer calibration tokens were sent to is shown all tokens of the first batch."""


class Statistics(Protocol):
    """Takes in what meets weights, and knows how many tokens met each."""

    tokens: dict[tuple[str, int | None], int]
    turn: Turn | None

    def reduce(self, ranks: Ranks, device: torch.device) -> None:
        """Take in what the other ranks have seen."""

    def see(self, name: str, expert: int | None, x: torch.Tensor) -> None:
        """Take activations [..., K] into the statistics."""


class Observation:
    """Runs one block on the calibration windows and tells what meets its weights.

    Args:
        name: the block's name.
        block: it, with float32 weights.
        calls: the windows, batch by batch.
        excess: gives memory back between batches.
        windows: of each batch, of those of other ranks too; batch j is the call j // count of rank j % count.

    Attributes:
        notes: what a reader should know.
    """

    def __init__(
        self, name: str, block: nn.Module, calls: Calls, excess: Excess, windows: Sequence[int] | None = None
    ) -> None:
        self.name, self.block, self.calls, self.excess = name, block, calls, excess
        self.notes: list[str] = []
        self.ranks = current()
        self.windows = [1] * len(calls) if windows is None else list(windows)
        self._turned = Turn(0, 0, 0)

    def output(self) -> torch.Tensor:
        """What the block gives for the first batch: its first float tensor."""
        output = self.block(*self.calls[0].args, **self.calls[0].kwargs)
        return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())

    def inputs(self, axes: Mapping[str, int], inputs: Statistics, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What the block gives for the first batch; `inputs` has been told what met the parameters of `axes`.

        The batches after the first compute the products in `dtype`. Experts that few tokens were sent to see all of the
        first batches.
        """
        watched = {path: (self.block.get_parameter(path), axis) for path, axis in axes.items()}
        self._turned = Turn(0, 0, 0)
        output = self._watched(watched, inputs.see, dtype, inputs)
        experts = {path: value.shape[0] for path, (value, _) in watched.items() if value.ndim == 3}
        for count in set(experts.values()):
            paths = [path for path, size in experts.items() if size == count]
            rare = _rare(total(inputs.tokens, self.ranks), paths, count)
            if rare:
                shown = self._show(watched, inputs, paths, count, list(rare))
                how = "with all tokens of the first windows" if shown else "with those alone"
                self.notes.append(
                    f"experts {_listed(rare)} of {self.name} were sent fewer than {FEW_TOKENS} calibration tokens, "
                    f"and are calibrated {how}"
                )
        inputs.reduce(self.ranks, next(self.block.parameters()).device)
        return output

    def _turn(self, batch: int) -> Turn:
        """The turn of a batch, which is the next to run."""
        last = self._turned
        self._turned = Turn(last.number + (last.windows > 0), last.first + last.windows, self.windows[batch])
        return self._turned

    def watch(self, axes: Mapping[str, int], see: See) -> None:
        """Return nothing; `see` has been told what met the parameters of `axes` in all batches."""
        self._watched({path: (self.block.get_parameter(path), axis) for path, axis in axes.items()}, see)

    def run(self) -> None:
        """Return nothing; the block has run on all batches."""
        for call in self.calls:
            self.block(*call.args, **call.kwargs)
            self.excess.watch()

    def _show(
        self,
        watched: Mapping[str, tuple[torch.Tensor, int]],
        inputs: Statistics,
        paths: Sequence[str],
        experts: int,
        rare: list[int],
    ) -> bool:
        """Send all tokens of the first batches to these experts until each has met enough (or all there are).

        False when the router doesn't choose in a way that can be overruled.
        """
        while rare:
            for batch in range(len(self.windows)):
                inputs.turn, found = self._turn(batch), -1
                if batch % self.ranks.count == self.ranks.rank:
                    call = self.calls[batch // self.ranks.count]
                    with ForcedRouting(experts, rare) as routing, Watch(watched, inputs.see):
                        self.block(*call.args, **call.kwargs)
                    found = routing.taken
                    call.away()
                taken = max(self.ranks.gather(found))
                if not taken:
                    return False
                left = set(_rare(total(inputs.tokens, self.ranks), paths, experts))
                if not left.intersection(rare[:taken]):
                    break
            rare = rare[taken:]  # they have met enough, or every token there is
        return True

    def _watched(
        self,
        parameters: Mapping[str, tuple[torch.Tensor, int]],
        see: See,
        dtype: torch.dtype | None = None,
        statistics: Statistics | None = None,
    ) -> torch.Tensor:
        """Run the block for all batches and tell what meets its parameters; what it gives for the first batch.

        Each rank runs its own batches, and the first batch is the first rank's: the others' output is empty.

        The first batch is run in full and as it is. Where each parameter met one product there, the others are run as
        far as their last; they compute these products in `dtype`.
        """
        turns = [self._turn(batch) for batch in range(len(self.windows))]
        mine = iter(self.ranks.share(turns))
        first, output = Watch(parameters, see), torch.empty(0)
        if self.ranks.is_first:
            if statistics is not None:
                statistics.turn = next(mine)
            with first:
                output = self.output()
        rest = Watch(parameters, see, stop=self.ranks.told(first.once_each), dtype=dtype)
        for call in self.calls.after(1 if self.ranks.is_first else 0):
            if statistics is not None:
                statistics.turn = next(mine)
            rest.of(partial(self.block, *call.args, **call.kwargs))
            self.excess.watch()
        return output

    def static_scales(self, axes: Mapping[str, int], scheme: Scheme) -> dict[str, torch.Tensor]:
        """The static scale [1] of what meets each weight, by its full name, observed on the block as it now is.

        Raises:
            QuantkitError: a weight met nothing.
        """
        kind, dtype = scheme.activation_range, getattr(torch, str(scheme.activation_dtype))
        ranges = {path: TensorRange(histogram=kind != "absmax") for path in axes}
        watched = {path: (self.block.get_parameter(path), axis) for path, axis in axes.items()}

        def range_of(x: torch.Tensor) -> TensorRange:
            found = TensorRange(histogram=kind != "absmax")
            found.update(x)
            return found

        latest, met = Latest(range_of), set[str]()

        def see(path: str, expert: int | None, x: torch.Tensor) -> None:
            met.add(path)
            ranges[path].merge(latest(x))

        self._watched(watched, see)
        reduced_ranges(ranges, self.ranks)
        met = met.union(*self.ranks.gather(met))
        for path in ranges:
            if path not in met:
                raise QuantkitError(
                    f"{self.name}.{path.removesuffix('.weight')} met no calibration token, so that it has no static "
                    "range; --ignore it, or use activations by token"
                )

        def encode(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            codes, scale = quantize_per_tensor(values, dtype, scale.reshape(1))
            return dequantize(codes[None], scale[None])[0]

        found = {path: each.range(kind, QMAX[dtype], encode) / QMAX[dtype] for path, each in ranges.items()}
        return {f"{self.name}.{path}": torch.tensor([value if value > 0 else 1.0]) for path, value in found.items()}

    def outlier_columns(self, axes: Mapping[str, int], scheme: Scheme, seed: int) -> dict[str, torch.Tensor]:
        """The columns [O] of each weight, by its full name, in which something reaches the scheme's threshold.

        Raises:
            QuantkitError: a weight met nothing.
        """
        inputs = Inputs(keep_rows=False, seed=seed)
        self.inputs(axes, inputs)
        found, threshold = {}, torch.tensor(scheme.threshold, dtype=torch.float32)
        for path in axes:
            largest = inputs.largest(path)
            if largest is None:
                raise QuantkitError(
                    f"{self.name}.{path.removesuffix('.weight')} met no calibration token, so that its outlier columns "
                    "are not known; --ignore it, or use llm-int8 without outlier_weight=float"
                )
            found[f"{self.name}.{path}"] = (largest >= threshold.to(largest.device)).nonzero().flatten()
        return found


def _rare(tokens: Mapping[tuple[str, int | None], int], paths: Sequence[str], experts: int) -> list[int]:
    """Which experts met fewer tokens than FEW_TOKENS."""
    return [e for e in range(experts) if any(tokens.get((path, e), 0) < FEW_TOKENS for path in paths)]


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"
