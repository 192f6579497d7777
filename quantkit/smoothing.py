"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): outliers of activations are moved into the weights.

For each group (a producer and the linear weights that its output goes to) a channel of the activations is divided by
s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (equation 4), and the weights' columns are multiplied by it. The division is
folded into the producer: a norm's gain and bias, or the rows of another linear weight. Absolute maxima of X / s are
those of X divided by s, so nothing has to be observed again.

A gain is stored in the model's dtype, so that gain / s would be rounded and the block's function changed. Here s is
chosen so that it isn't: the gain is rounded first, and s is what was really divided by.

Every fold is proven: the float block must give what it gave before, within rounding; else it is undone and said.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from quantkit_calibration.observers import ChannelAbsmax, Reservoir
from quantkit_kernels.formats import (
    dequantize,
    dequantize_weight,
    quantize_per_group,
    quantize_per_tensor,
    quantize_per_token,
)
from torch import nn

from quantkit.discovery import Edit, Group, apply_group, channel_absmax
from quantkit.modules import quantize_linear
from quantkit.outcome import GroupReport
from quantkit.ranks import Ranks
from quantkit.reducing import Turn, absmaxima, sample, total
from quantkit.scheme import Scheme
from quantkit.watching import Latest

ROWS = 512
"""Tokens of a weight's input that are kept for a search."""

ALPHAS = tuple(step / 20 for step in range(21))
LARGEST_SCALE = 1e5
SEARCH_EXPERTS = 8
"""So many experts of a parameter, those that most tokens were sent to, speak for all in a search."""


@dataclass
class Inputs:
    """What was observed of the activations that meet each weight of a block, by parameter and expert (or None).

    Args:
        keep_rows: whether a sample of the tokens is kept, for a search.
        seed: of that sample.
    """

    keep_rows: bool
    seed: int
    absmax: dict[tuple[str, int | None], ChannelAbsmax] = field(default_factory=dict)
    rows: dict[tuple[str, int | None], Reservoir] = field(default_factory=dict)
    tokens: dict[tuple[str, int | None], int] = field(default_factory=dict)
    turn: Turn | None = None
    _latest: Latest[ChannelAbsmax] = field(default_factory=lambda: Latest(_absmax_of), repr=False)

    def see(self, name: str, expert: int | None, x: torch.Tensor) -> None:
        """Take activations [..., K] into the statistics."""
        key = (name, expert)
        flat = x.reshape(-1, x.shape[-1])
        if not flat.shape[0]:
            return
        if key not in self.absmax:
            self.absmax[key] = ChannelAbsmax()
            if self.keep_rows:
                generator = torch.Generator().manual_seed(self.seed)
                self.rows[key] = Reservoir(ROWS, generator)
        self.absmax[key].merge(self._latest(flat))
        if self.keep_rows:
            if self.turn is not None:
                self.turn.begin(self.rows[key], len(flat), self.seed, expert is not None)
            self.rows[key].update(flat)
        self.tokens[key] = self.tokens.get(key, 0) + flat.shape[0]

    def reduce(self, ranks: Ranks, device: torch.device) -> None:
        """Take in what the other ranks have seen."""
        if ranks.is_alone:
            return
        self.absmax, self.tokens = absmaxima(self.absmax, ranks, device), total(self.tokens, ranks)
        for key in self.absmax if self.keep_rows else ():
            if key not in self.rows:
                self.rows[key] = Reservoir(ROWS, torch.Generator().manual_seed(self.seed))
            sample(self.rows[key], ranks, device)

    def largest(self, name: str) -> torch.Tensor | None:
        """The largest magnitudes [K] that met a parameter, over all its experts; None when nothing did."""
        found = [statistic.result() for (other, _), statistic in self.absmax.items() if other == name]
        return torch.stack(found).amax(0) if found else None

    def samples(self, name: str) -> list[tuple[int | None, torch.Tensor]]:
        """Kept tokens [R, K] of a parameter by expert, those of most tokens first."""
        own = (key for key in self.rows if key[0] == name)
        keys = sorted(own, key=lambda key: (-self.tokens[key], -1 if key[1] is None else key[1]))
        return [(expert, self.rows[name, expert].result()) for _, expert in keys[:SEARCH_EXPERTS]]


def _absmax_of(x: torch.Tensor) -> ChannelAbsmax:
    found = ChannelAbsmax()
    found.update(x)
    return found


class Smoother:
    """Folds the groups of one block.

    Args:
        name: the block's name.
        block: the block, with float32 weights.
        alpha: the migration strength, or None to search one for each group.
        scheme: what the consumers will be quantized to; None for plain W8A8.
        quantized: the parameters (names inside the block) that will be quantized.
        dtypes: each parameter's dtype on disk.
        prove: the ratio of the change of the block's output to what rounding explains.
        restore: gives the block the weights back that it has now; None where nothing but a copy could.
    """

    def __init__(
        self,
        name: str,
        block: nn.Module,
        alpha: float | None,
        scheme: Scheme | None,
        quantized: Iterable[str],
        dtypes: Mapping[str, torch.dtype],
        prove: Callable[[], float],
        restore: Callable[[], None] | None = None,
    ) -> None:
        self.name, self.block, self.alpha = name, block, alpha
        self.scheme = scheme or Scheme("int8", activation_dtype="int8")
        self.quantized, self.dtypes, self.prove, self.restore = frozenset(quantized), dtypes, prove, restore
        self.changed: set[str] = set()
        self.folded: list[tuple[Group, torch.Tensor]] = []

    def fold_all(self, groups: Sequence[Group], inputs: Inputs) -> list[GroupReport]:
        """Fold groups one after another, and prove them together; each by itself only where that fails.

        What is folded is the same either way, as the next fold builds on the one before.
        """
        if self.restore is None:
            return [self.fold(group, inputs) for group in groups]
        reports = [self._fold(group, inputs) for group in groups]
        if not self.changed:
            return reports
        error = self.prove()
        if error <= 1.0:
            return [replace(report, error=error) if report.state == "folded" else report for report in reports]
        self.restore()
        self.changed.clear()
        self.folded.clear()
        return [self.fold(group, inputs) for group in groups]

    def fold(self, group: Group, inputs: Inputs) -> GroupReport:
        """Fold and prove one group, or say why not."""
        names = sorted({edit.parameter for edit in (*group.producers, *group.consumers)})
        before, changed = {name: self.block.get_parameter(name).detach() for name in names}, set(self.changed)
        report = self._fold(group, inputs)
        if report.state != "folded":
            return report
        error = self.prove()
        if not error <= 1.0:
            _put(self.block, before)
            self.changed = changed
            self.folded.pop()
            reason = "the float block's output changed by more than rounding"
            return replace(report, state="undone", reason=reason, error=error)
        return replace(report, error=error)

    def _fold(self, group: Group, inputs: Inputs) -> GroupReport:
        """Fold one group unproven, or say why not."""
        consumers = tuple(dict.fromkeys(edit.parameter for edit in group.consumers))

        def report(state: str, reason: str = "", alpha: float | None = None) -> GroupReport:
            return GroupReport(self.name, group.name, group.kind, consumers, state, alpha, reason=reason)

        active = [edit for edit in group.consumers if edit.parameter in self.quantized]
        if not active:
            return report("skipped", "nothing that it feeds is quantized")
        activations = self._activations(group, active, inputs)
        if activations is None:
            return report("skipped", "what it feeds met no calibration token")
        weights = self._weights(group, active)
        alpha, scale = self._choose(group, active, activations, weights, inputs)
        if alpha is None:
            return report("kept", "the search found no scale that helps")
        scale = self._representable(group, scale)
        self.changed |= set(fold_in(self.block, group, scale))
        self.folded.append((group, scale))
        return report("folded", "", alpha)

    @staticmethod
    def _activations(group: Group, active: Sequence[Edit], inputs: Inputs) -> torch.Tensor | None:
        """max|X_j| [channels] over everything that is quantized and fed."""
        found = [(edit, inputs.largest(edit.parameter)) for edit in active]
        seen = [channel_absmax(values, edit, group.channels) for edit, values in found if values is not None]
        return torch.stack(seen).amax(0) if seen else None

    def _weights(self, group: Group, active: Sequence[Edit]) -> torch.Tensor:
        """max|W_j| [channels] over everything that is quantized and fed."""
        found = []
        for edit in active:
            weight = self.block.get_parameter(edit.parameter).detach()
            others = [axis for axis in range(weight.ndim) if axis != edit.axis]
            largest = torch.maximum(weight.amax(others), -weight.amin(others))  # |weight| would be a copy
            found.append(channel_absmax(largest, edit, group.channels))
        return torch.stack(found).amax(0)

    def _choose(
        self,
        group: Group,
        active: Sequence[Edit],
        activations: torch.Tensor,
        weights: torch.Tensor,
        inputs: Inputs,
    ) -> tuple[float | None, torch.Tensor]:
        """The migration strength and its scale; with a search None where no strength beats leaving all as it is."""
        power = max(edit.power for edit in active)  # 2 behind a squared ReLU, which squares what the producer divides
        if self.alpha is not None:
            return self.alpha, smoothing_scale(activations, weights, self.alpha).pow(1 / power)
        best: tuple[float | None, torch.Tensor] = (None, torch.ones_like(activations))
        least = self._loss(group, active, best[1], inputs)
        for alpha in ALPHAS:
            scale = smoothing_scale(activations, weights, alpha).pow(1 / power)
            loss = self._loss(group, active, scale, inputs)
            if loss < least:
                least, best = loss, (alpha, scale)
        return best

    def _loss(self, group: Group, active: Sequence[Edit], scale: torch.Tensor, inputs: Inputs) -> float:
        """The squared error of the quantized consumers' outputs on the kept tokens, for this scale."""
        total = 0.0
        for edit in active:
            parameter = self.block.get_parameter(edit.parameter).detach()
            factors = positions(scale, edit).pow(edit.power)
            for expert, x in inputs.samples(edit.parameter):
                weight = parameter if expert is None else parameter[expert]
                weight = weight.t() if edit.axis == parameter.ndim - 2 else weight
                exact = x @ weight.t()
                rounded = quantized_product(x / factors, weight * factors, self.scheme)
                total += float((exact - rounded).square().sum(dtype=torch.float64))
        return total

    def _representable(self, group: Group, scale: torch.Tensor) -> torch.Tensor:
        """The scale that dividing a norm's gain by it really is, once the quotient is rounded to the gain's dtype."""
        if group.kind != "norm":
            return scale
        for edit in group.producers:
            if edit.parameter != group.name:
                continue
            dtype = self.dtypes.get(edit.parameter, torch.float32)
            gain = self.block.get_parameter(edit.parameter).detach() + edit.offset
            rounded = (gain / positions(scale, edit) - edit.offset).to(dtype).float() + edit.offset
            exact = gain / rounded
            usable = torch.isfinite(exact) & (exact > 0)
            index = torch.tensor(edit.channels)
            chosen = usable & (index >= 0)
            found = torch.ones_like(scale)
            found[index[chosen]] = exact[chosen]
            return found
        return scale


def fold_in(block: nn.Module, group: Group, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parameters of a group as they were, by their names inside the block, which from now on has it folded.

    Args:
        block: with float32 weights.
        group: what is folded.
        scale: its factors [channels].
    """
    names = sorted({edit.parameter for edit in (*group.producers, *group.consumers)})
    before = {name: block.get_parameter(name).detach() for name in names}
    _put(block, apply_group(before, group, scale))
    return before


def _put(block: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    for path, value in values.items():
        owner, _, leaf = path.rpartition(".")
        block.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def smoothing_scale(activations: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """S [channels] of equation 4; 1 where a channel carries nothing, or no weight reads it."""
    alive = (activations > 0) & (weights > 0) & torch.isfinite(activations)
    scale = activations.clamp(min=1e-30).pow(alpha) / weights.clamp(min=1e-30).pow(1 - alpha)
    scale = scale.clamp(1 / LARGEST_SCALE, LARGEST_SCALE)
    return torch.where(alive, scale, torch.ones_like(scale))


def positions(scale: torch.Tensor, edit: Edit) -> torch.Tensor:
    """The factor of each position along an edit's axis: its channel's, or 1 where the edit leaves it alone."""
    index = torch.tensor(edit.channels)
    return torch.where(index >= 0, scale[index.clamp(min=0)], torch.ones(()))


def quantized_product(x: torch.Tensor, weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """X @ W.T [R, N] in float32 with both sides as the scheme rounds them.

    Where one scale serves all activations it is taken from these.
    """
    codes, scale = quantize_linear(weight, scheme)
    decoded = dequantize_weight(codes, scale, scheme.weight_granularity).float()
    if scheme.activation_dtype is None:
        return x @ decoded.t()
    dtype = getattr(torch, scheme.activation_dtype)
    if scheme.activation == "group":
        rounded = dequantize(*quantize_per_group(x, dtype))
    elif scheme.activation == "token":
        rounded = dequantize(*quantize_per_token(x, dtype))
    else:
        found, one = quantize_per_tensor(x, dtype)
        rounded = dequantize(found, one.view(1, 1))
    return rounded @ decoded.t()


class Proof:
    """Whether a block still gives what it gave.

    The bound: a product over K terms in float32 rounds with a relative error of about sqrt(K) * 2**-24 of its terms,
    and a fold leaves every product's terms the same but for a rounding each. So outputs may differ by
    SAFETY * (1 + products) * sqrt(K) * 2**-23 of the size of what is summed: of the largest magnitude of their
    feature, plus the root mean square of all.

    Args:
        run: the block's output as one tensor [..., H].
        weights: the block's weights, for their number and longest row.
        before: what `run()` gives now, where that is known.
    """

    SAFETY = 8.0

    def __init__(
        self, run: Callable[[], torch.Tensor], weights: Iterable[torch.Tensor], before: torch.Tensor | None = None
    ) -> None:
        self._run = run
        sizes = [max(weight.shape[-2:]) for weight in weights if weight.ndim > 1]
        longest, products = max(sizes, default=1), len(sizes)
        self._relative = self.SAFETY * (1 + products) * math.sqrt(longest) * torch.finfo(torch.float32).eps
        self._before = run() if before is None else before
        flat = self._before.reshape(-1, self._before.shape[-1])
        size = flat.abs().amax(0) + flat.square().mean().sqrt()
        self._bound = self._relative * size + torch.finfo(torch.float32).tiny

    def __call__(self) -> float:
        """The largest change over its bound."""
        after = self._run()
        flat = (after - self._before).abs().reshape(-1, after.shape[-1])
        ratio = float((flat / self._bound).amax()) if flat.numel() else 0.0
        return math.inf if math.isnan(ratio) else ratio
