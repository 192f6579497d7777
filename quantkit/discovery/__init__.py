"""Discovery: what a model does with its parameters, found from its data flow and never from a table of names."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from quantkit.discovery.folding import apply_group, channel_absmax
from quantkit.discovery.groups import Search, search
from quantkit.discovery.proof import Prover, Run, rounding_bound
from quantkit.discovery.propagation import Weights
from quantkit.discovery.randomization import randomize_
from quantkit.discovery.reads import weights_read_elsewhere
from quantkit.discovery.rectifying import rectifiable
from quantkit.discovery.structure import (
    UNTOUCHED,
    Activation,
    DiscoveryError,
    Edit,
    Group,
    LinearUse,
    Norm,
    Refusal,
    Structure,
)
from quantkit.discovery.trace import Trace, record
from quantkit.discovery.uses import UNUSED, kind_of, unused_likes, uses

__all__ = [
    "UNTOUCHED",
    "UNUSED",
    "Activation",
    "DiscoveryError",
    "Edit",
    "Group",
    "LinearUse",
    "Norm",
    "Refusal",
    "Structure",
    "apply_group",
    "channel_absmax",
    "discover",
    "randomize_",
    "rectifiable",
    "weights_read_elsewhere",
]

INPUTS = 6
"""How many inputs are tried, at most, until every parameter was used."""


def discover(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int = 0, groups: bool = True
) -> Structure:
    """What a decoder block does with its parameters: what folds, what doesn't and why, and which are linear weights.

    The block is called as `block(*args, **kwargs)` some times, with these arguments and with other hidden states of the
    same shape; its weights (real float32 ones, random numbers will do: see `randomize_`) and the arguments are left as
    they are. Every group has been folded with random scales on two inputs, and the block's output stayed what it was
    within `proof.rounding_bound`. With `groups` false neither groups nor refusals are looked for.

    Raises:
        DiscoveryError: the block is in training mode, isn't float32 in memory, or gives no finite output.
    """
    generator = torch.Generator().manual_seed(seed)
    runs = [(args, kwargs), _other_hidden_states(args, kwargs, generator)]
    trace = record(block, runs)
    while len(runs) < INPUTS and unused_likes(trace):
        runs.append(_other_hidden_states(args, kwargs, generator))
        trace = record(block, runs[-1:], trace)
    weights = Weights(trace, generator)
    linears, others = uses(trace, weights)
    folds, refusals = _folds(block, runs[:2], trace, weights, linears, generator) if groups else ((), ())
    return Structure(folds, refusals, tuple(linears.values()), others)


def _folds(
    block: nn.Module,
    runs: list[Run],
    trace: Trace,
    weights: Weights,
    linears: Mapping[str, LinearUse],
    generator: torch.Generator,
) -> tuple[tuple[Group, ...], tuple[Refusal, ...]]:
    """What folds, proven, and what doesn't."""
    found: dict[str, Search] = {}
    kinds: dict[str, str] = {}
    for name, axis, kind in _candidates(trace, linears):
        found[name], kinds[name] = search(trace, weights, name, axis, kind, generator), kind
    refused = {
        name: Refusal(name, kinds[name], result.reason)
        for name, result in found.items()
        if result.group is None and (kinds[name] == "linear" or result.normalized)
    }
    groups = [result.group for result in found.values() if result.group is not None]
    groups, hidden = _without_unused(groups, trace)
    prover = Prover(block, runs, rounding_bound(trace), generator)
    groups, failed = _proven(groups, prover)
    for refusal in (*hidden, *failed):
        refused[refusal.parameter] = refusal
    for use in linears.values():
        if use.role == "router":
            refused[use.parameter] = Refusal(use.parameter, "linear", use.reason)
    return tuple(groups), tuple(refused.values())


def _candidates(trace: Trace, linears: Mapping[str, LinearUse]) -> Iterable[tuple[str, int, str]]:
    """Every parameter that may produce channels, with its axis and kind, in the block's order."""
    for name, parameter in trace.parameters.items():
        if parameter.ndim == 1:
            yield name, 0, "norm"
        elif name in linears and linears[name].role != "router":
            yield name, linears[name].out_axis, "linear"


def _without_unused(groups: list[Group], trace: Trace) -> tuple[list[Group], list[Refusal]]:
    """Groups without those whose channels a parameter may take that wasn't used in the trace, and their refusals."""
    kept, refused = [], []
    unused = unused_likes(trace)
    for group in groups:
        reader = next(
            (name for name in unused for edit in group.consumers if _stands_for(edit.parameter, name, group)), None
        )
        if reader is None:
            kept.append(group)
        else:
            reason = f"{reader} wasn't used in the trace, and may take its output as well"
            refused.append(Refusal(group.name, group.kind, reason))
    return kept, refused


def _stands_for(used: str, unused: str, group: Group) -> bool:
    """Whether an unused parameter would take a group's channels as a used one does: not within one expert."""
    if kind_of(used) != kind_of(unused):
        return False
    parts, others = used.split("."), unused.split(".")
    own = next(i for i, (one, other) in enumerate(zip(parts, others, strict=True)) if one != other)
    return group.name.split(".")[: own + 1] != parts[: own + 1]


def _proven(groups: list[Group], prover: Prover) -> tuple[list[Group], list[Refusal]]:
    """The groups that leave the output as it is: all at once if that holds, else each by itself."""
    if not groups or prover.error(groups) <= prover.bound:
        return groups, []
    kept, refused = [], []
    for group in groups:
        error = prover.error([group])
        if error <= prover.bound:
            kept.append(group)
        else:
            reason = f"folding it changed the block's output by {error:.2g} (bound {prover.bound:.2g})"
            refused.append(Refusal(group.name, group.kind, reason))
    return kept, refused


def _other_hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any], generator: torch.Generator) -> Run:
    """The arguments with random numbers of the same spread for the hidden states.

    Those are the first floating tensor of three axes (or of any), and all others of its shape.
    """
    floats = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    hidden = next((value for value in floats if value.ndim == 3), floats[0] if floats else None)
    if hidden is None:
        raise DiscoveryError("the block takes no floating tensor; a trace needs its hidden states among the arguments")

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.shape != hidden.shape:
            return leaf
        spread = float(leaf.float().std()) or 1.0
        return (torch.randn(leaf.shape, generator=generator) * spread).to(leaf.dtype)

    changed: Run = tree_map(other, (args, kwargs))
    return changed
