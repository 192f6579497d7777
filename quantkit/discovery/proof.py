"""The proof of a fold: the block, run with the folded parameters, gives what it gave."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from quantkit.discovery.folding import apply_group
from quantkit.discovery.products import product_of
from quantkit.discovery.structure import DiscoveryError, Group
from quantkit.discovery.trace import Trace, own_copy

Run = tuple[tuple[Any, ...], dict[str, Any]]
SCALES = 4.0
"""Scales of a proof lie between 1 / SCALES and SCALES."""


class Prover:
    """Holds the block's own outputs, and compares those of folded parameters to them."""

    def __init__(self, block: nn.Module, runs: Sequence[Run], bound: float, generator: torch.Generator) -> None:
        self.block, self.runs, self.bound, self.generator = block, runs, bound, generator
        self.expected = [self._outputs(run, {}) for run in runs]
        for outputs in self.expected:
            if not outputs or not bool(torch.isfinite(outputs[0]).all()):
                name = type(block).__name__
                raise DiscoveryError(f"{name} gives no finite output; a trace needs weights that make sense")

    def error(self, groups: Iterable[Group]) -> float:
        """The largest relative error of an output row, over all runs, when groups are folded with random scales."""
        values = {name: _once(parameter.detach()) for name, parameter in self.block.named_parameters()}
        changed: dict[str, Tensor] = {}
        for group in groups:
            exponent = torch.rand(group.channels, generator=self.generator) * 2 - 1
            changed |= apply_group(values | changed, group, SCALES**exponent)
        whole = {name: value.expand_as(self.block.get_parameter(name)) for name, value in changed.items()}
        worst = 0.0
        for run, expected in zip(self.runs, self.expected, strict=True):
            for one, other in zip(expected, self._outputs(run, whole), strict=True):
                worst = max(worst, _distance(one, other))
        return worst

    def _outputs(self, run: Run, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        args, kwargs = own_copy(self.block, *run)
        with torch.no_grad():
            output = functional_call(self.block, dict(parameters), args, kwargs)
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def rounding_bound(trace: Trace) -> float:
    """How far a row of the output may move by rounding: 8 eps sqrt(K P), for P products of at most K terms.

    A fold rounds every scaled weight once more, and every sum anew. Errors of one product of K terms add up like a
    random walk of K steps of eps; those of P products in a row like one of P; 8 leaves room for what stands between.
    """
    terms = [product.left.size[-1] for product in map(product_of, trace.ops) if product is not None]
    return float(8 * torch.finfo(torch.float32).eps * (max(terms, default=1) * max(len(terms), 1)) ** 0.5)


def _once(value: Tensor) -> Tensor:
    """The value with size 1 along axes that repeat the same memory (experts that share one weight)."""
    for axis, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        if size > 1 and stride == 0:
            value = value.narrow(axis, 0, 1)
    return value


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest relative distance between rows (last axis) of two tensors; infinite where one isn't finite."""
    if one.shape != other.shape:
        return float("inf")
    finite = torch.isfinite(one)
    if not torch.equal(finite, torch.isfinite(other)):
        return float("inf")
    a, b = torch.where(finite, one, 0.0).double(), torch.where(finite, other, 0.0).double()
    if a.ndim == 0 or a.numel() == 0:
        a, b = a.reshape(1, -1), b.reshape(1, -1)
    distance, length = (a - b).norm(dim=-1), a.norm(dim=-1)
    relative: list[float] = torch.where(distance == 0, 0.0, distance / length).flatten().tolist()
    return max(relative, default=0.0)
