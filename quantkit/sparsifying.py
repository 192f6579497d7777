"""Pruning inside a block: what its linear layers are pruned by, layer by layer, and what that cost.

The arithmetic is `quantkit_calibration.pruning`'s. Here stand the statistics of what meets each weight (those that see
the same activations, as q, k and v do, share them), the way through parameters, experts and layers that are stored in
x out, and the report of each layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from quantkit_calibration import pruning
from quantkit_calibration.observers import ChannelNorm, Gram, Reservoir

from quantkit.errors import CheckpointError, QuantkitError
from quantkit.outcome import PrunedReport
from quantkit.ranks import Ranks
from quantkit.recipe import Step
from quantkit.reducing import Turn, sample, total
from quantkit.sparsity import Pattern, pattern_of
from quantkit.watching import Latest

ROWS = 512
"""Tokens that are kept to measure the error of a layer's output by, where their products' sums aren't."""

Key = tuple[str, int | None]
"""A parameter's name, and the expert's number or None."""


@dataclass
class Stream:
    """What is known of the activations that meet some weights: sums of products, or norms and a sample of tokens."""

    gram: Gram | None
    norm: ChannelNorm | None = None
    sample: Reservoir | None = None

    def update(self, x: torch.Tensor) -> None:
        """Take in x [M, K]."""
        for statistic in (self.gram, self.norm, self.sample):
            if statistic is not None:
                statistic.update(x)

    @property
    def width(self) -> int:
        """K."""
        statistic = self.gram if self.gram is not None else self.norm
        assert statistic is not None
        return len(statistic.result())

    def reduce(self, width: int, ranks: Ranks, device: torch.device) -> None:
        """Take in what the other ranks have seen."""
        for sums in (self.gram, self.norm):
            if sums is not None:
                ranks.sum(sums.sums(width, device))
        if self.sample is not None:
            sample(self.sample, ranks, device)

    def copy(self) -> "Stream":
        """The same, to go on by itself."""
        made = Stream(None if self.gram is None else Gram(), None if self.norm is None else ChannelNorm())
        for ours, theirs in ((self.gram, made.gram), (self.norm, made.norm)):
            for name, value in vars(ours).items() if ours is not None else ():
                setattr(theirs, name, value.clone())
        made.sample = None if self.sample is None else self.sample.copy()
        return made


@dataclass
class Streams:
    """The statistics that a criterion needs, by weight; weights that always met the same activations share one.

    Args:
        criterion: `sparsegpt` or `wanda`.
        seed: of the sample of tokens.
        tokens: how many met each weight.
    """

    criterion: str
    seed: int
    tokens: dict[Key, int] = field(default_factory=dict)
    turn: Turn | None = None
    _found: dict[Key, Stream] = field(default_factory=dict)
    _met: list[tuple[torch.Tensor, set[Key]]] = field(default_factory=list)
    _latest: Latest[set[Key]] | None = None
    _turn: Turn | None = None

    def see(self, name: str, expert: int | None, x: torch.Tensor) -> None:
        """Take activations [..., K] into the statistics."""
        flat = x.reshape(-1, x.shape[-1])
        if not flat.shape[0]:
            return
        if self._latest is None:
            self._latest = Latest(self._next)
        self._latest(flat).add((name, expert))
        self.tokens[name, expert] = self.tokens.get((name, expert), 0) + flat.shape[0]

    def _next(self, x: torch.Tensor) -> set[Key]:
        """Who meets these activations: to be filled until others come."""
        self._settle()
        self._turn = self.turn  # what is settled next is of this one
        self._met.append((x.detach().clone(), set()))
        return self._met[0][1]

    def _settle(self) -> None:
        """Take the latest activations into the statistics of all that met them, apart from those of all others."""
        while self._met:
            x, keys = self._met.pop()
            before = {id(self._found[key]): self._found[key] for key in keys if key in self._found}
            for known in (None, *before.values()):
                members = [key for key in keys if self._found.get(key) is known]
                if not members:
                    continue
                shared = any(other is known and key not in keys for key, other in self._found.items())
                stream = self._made() if known is None else known.copy() if shared else known
                if stream.sample is not None and self._turn is not None:
                    self._turn.begin(stream.sample, len(x), self.seed, any(key[1] is not None for key in members))
                stream.update(x)
                self._found |= dict.fromkeys(members, stream)

    def _made(self) -> Stream:
        if self.criterion == "sparsegpt":
            return Stream(Gram())
        return Stream(None, ChannelNorm(), Reservoir(ROWS, torch.Generator().manual_seed(self.seed)))

    def reduce(self, ranks: Ranks, device: torch.device) -> None:
        """Take in what the other ranks have seen: weights that met the same activations in each share statistics."""
        self._settle()
        if ranks.is_alone:
            return
        numbers: dict[int, int] = {}
        own = {key: numbers.setdefault(id(stream), len(numbers)) for key, stream in self._found.items()}
        every = ranks.gather({key: (number, self._found[key].width) for key, number in own.items()})
        widths = {key: width for each in every for key, (_, width) in each.items()}
        groups: dict[tuple[int, ...], list[Key]] = {}
        for key in sorted(widths, key=lambda key: (key[0], -1 if key[1] is None else key[1])):
            groups.setdefault(tuple(each[key][0] if key in each else -1 for each in every), []).append(key)
        before, used = dict(self._found), set[int]()
        for keys in groups.values():
            known = before.get(keys[0])
            stream = self._made() if known is None else known.copy() if id(known) in used else known
            used.add(id(known))
            stream.reduce(widths[keys[0]], ranks, device)
            self._found |= dict.fromkeys(keys, stream)
        self.tokens = total(self.tokens, ranks)

    def take(self, name: str, expert: int | None) -> Stream | None:
        """The statistics of a weight, which are let go of here; None when it met nothing."""
        self._settle()
        return self._found.pop((name, expert), None)


@dataclass(frozen=True)
class Pruning:
    """How weights are pruned.

    Attributes:
        criterion: `sparsegpt`, `wanda` or `magnitude`.
        pattern: as in the recipe.
        dampening: of SparseGPT.
    """

    criterion: str
    pattern: str
    dampening: float

    @classmethod
    def of(cls, step: Step) -> "Pruning":
        """What a step of a recipe asks for."""
        return cls(step.parameters["criterion"], step.parameters["pattern"], float(step.parameters["dampening"]))


@dataclass
class _Costs:
    """Squares of norms: of weights and outputs, and of what was lost of each."""

    weight: float = 0.0
    weight_lost: float = 0.0
    output: float = 0.0
    output_lost: float = 0.0
    zeros: int = 0
    count: int = 0

    def take(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Count a matrix in."""
        for rows, changed in zip(torch.split(before, ROWS), torch.split(after, ROWS), strict=True):
            self.weight += float(rows.float().square().sum(dtype=torch.float64))
            self.weight_lost += float((rows.float() - changed.float()).square().sum(dtype=torch.float64))
        self.zeros += after.numel() - int(after.count_nonzero())
        self.count += after.numel()

    def take_output(self, whole: float, lost: float) -> None:
        """Count the norms of a matrix' output in."""
        self.output, self.output_lost = self.output + whole**2, self.output_lost + lost**2

    def report(self, module: str, how: Pruning, shape: tuple[int, int], criterion: str) -> PrunedReport:
        """What a layer's report says."""
        weight = math.sqrt(self.weight_lost / self.weight) if self.weight else 0.0
        output = math.sqrt(self.output_lost / self.output) if self.output else None
        return PrunedReport(module, criterion, how.pattern, shape, self.zeros / self.count, weight, output)


class Pruner:
    """Prunes the layers of one block.

    Args:
        how: by what criterion, to which pattern.
        streams: what meets their weights; None for a criterion that doesn't look at it.

    Attributes:
        unmet: the layers (or experts) that met no token, and were pruned by magnitude.
    """

    def __init__(self, how: Pruning, streams: Streams | None) -> None:
        self.how, self.streams = how, streams
        self.pattern: Pattern = pattern_of(how.pattern)
        self.unmet: list[str] = []
        self._factor: tuple[Stream, torch.Tensor] | None = None

    def parameter(
        self, module: str, name: str, parameter: torch.Tensor, in_axis: int
    ) -> tuple[torch.Tensor, PrunedReport]:
        """A pruned copy of a parameter [N, K] or [E, N, K] (or in x out), and its layer's report.

        Args:
            module: the layer's name.
            name: the parameter's, by which its statistics are known.
            parameter: float32.
            in_axis: its axis of the in features.

        Raises:
            QuantkitError: what meets it leaves no way to prune it.
            CheckpointError: it holds NaN or infinity.
        """
        if not bool(torch.isfinite(parameter.sum(dtype=torch.float64))):
            raise CheckpointError(f"{module} holds NaN or infinity; the model is damaged: download or train it again")
        made, costs, unmet = torch.empty_like(parameter), _Costs(), 0
        several = parameter.ndim == 3
        for number, (weight, target) in enumerate(zip(*map(_matrices, (parameter, made)), strict=True)):
            turned = in_axis == parameter.ndim - 2
            matrix, place = (weight.t(), target.t()) if turned else (weight, target)
            expert = number if several else None
            stream = None if self.streams is None else self.streams.take(name, expert)
            if stream is None:
                place.copy_(pruning.pruned(matrix, pruning.magnitude(matrix, self.pattern)))
                if self.streams is not None:
                    unmet += 1
                    self.unmet.append(f"{module}.{number}" if several else module)
            else:
                place.copy_(self._by(stream, matrix, f"{module}.{number}" if several else module))
                costs.take_output(*_output(stream, matrix, place))
            costs.take(matrix, place)
        rows, columns = (matrix.shape[0], matrix.shape[1])
        every = unmet and unmet == (len(parameter) if several else 1)
        criterion = "magnitude" if every else self.how.criterion
        return made, costs.report(module, self.how, (rows, columns), criterion)

    def notes(self, block: str) -> list[str]:
        """What a reader should know of a block: what met no token."""
        if not self.unmet:
            return []
        shown = ", ".join(self.unmet[:3]) + (f" and {len(self.unmet) - 3} more" if len(self.unmet) > 3 else "")
        return [f"{shown} met no calibration token in {block}, and were pruned by magnitude"]

    def _by(self, stream: Stream, matrix: torch.Tensor, module: str) -> torch.Tensor:
        """A matrix [N, K] pruned by what meets it."""
        if stream.norm is not None:
            norms = stream.norm.result()
            if not bool(torch.isfinite(norms).all()):
                raise QuantkitError(f"{module} meets NaN or infinity in calibration; --ignore it, or use other data")
            return pruning.pruned(matrix, pruning.wanda(matrix, norms, self.pattern))
        assert stream.gram is not None
        if self._factor is None or self._factor[0] is not stream:
            self._factor = None  # first, so that its memory is free
            try:
                self._factor = (stream, pruning.inverse_factor(stream.gram.result(), self.how.dampening))
            except ValueError as error:
                raise QuantkitError(
                    f"{module} cannot be pruned by SparseGPT: {error}; give sparse24 a larger dampening, or --ignore "
                    "this layer"
                ) from error
        return pruning.sparsegpt(matrix, self._factor[1], self.pattern)


def _matrices(parameter: torch.Tensor) -> Sequence[torch.Tensor]:
    """A weight by itself, or every expert's."""
    return parameter.unbind(0) if parameter.ndim == 3 else (parameter,)


def _output(stream: Stream, matrix: torch.Tensor, made: torch.Tensor) -> tuple[float, float]:
    """The norms of a layer's output on calibration data, and of what was lost of it."""
    if stream.gram is not None:
        return pruning.output_norms(matrix, made, stream.gram.result())
    assert stream.sample is not None
    return pruning.output_norms_of(matrix, made, stream.sample.result().float())


def prune_stored(
    tensor: torch.Tensor, modules: Sequence[str], how: Pruning, transposed: bool
) -> tuple[torch.Tensor, PrunedReport]:
    """A tensor [N, K] or [E, N, K] of a checkpoint (K before N where `transposed`) pruned by magnitude; its report.

    Shares of a whole weight are taken of each matrix as it is stored.
    """
    name = ", ".join(modules)
    axis = tensor.ndim - (2 if transposed else 1)
    return Pruner(how, None).parameter(name, name, tensor, axis)
