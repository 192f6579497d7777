"""Targets: which checkpoint keys are quantized, in which format, and as which tensors they are written."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from quantkit import formats
from quantkit.candidates import Candidate
from quantkit.checkpoint import Source
from quantkit.errors import RecipeError
from quantkit.exploration import Findings
from quantkit.naming import Names
from quantkit.outcome import LayerReport
from quantkit.pieces import expert_specs
from quantkit.recipe import Recipe
from quantkit.scheme import BLOCK, Scheme
from quantkit.sparsity import pattern_of


@dataclass(frozen=True)
class Target:
    """A checkpoint key whose tensor will be quantized.

    Attributes:
        modules: the linear layers that it is the weight of, by their names in the model, for experts that of the
            parameter that holds them: one, or several where the model splits the tensor.
        key: the checkpoint key of the float weight.
        out_features: N.
        in_features: K.
        dtype: dtype of the float weight.
        scheme: what its numbers will look like.
        parameters: the model's parameters that the key makes, or makes a part of.
        transposed: whether the key holds K before N.
        experts: how many experts the key holds together (they are written one layer an expert), or 0.
        of_experts: whether it is a part of a parameter that holds experts.
        whole: whether the key makes one parameter, all of it.
    """

    modules: tuple[str, ...]
    key: str
    out_features: int
    in_features: int
    dtype: torch.dtype
    scheme: Scheme
    parameters: tuple[str, ...]
    transposed: bool = False
    experts: int = 0
    of_experts: bool = False
    whole: bool = True

    @property
    def module(self) -> str:
        """The first of its layers."""
        return self.modules[0]

    @property
    def prefixes(self) -> list[str]:
        """What the names of its tensors on disk begin with: one prefix, or one an expert."""
        stem = self.key.removesuffix(".weight")
        if not self.experts:
            return [f"{stem}."]
        owner, _, leaf = stem.rpartition(".")
        return [f"{owner}.{expert}.{leaf}." for expert in range(self.experts)]

    @property
    def prefix(self) -> str:
        """The first of its prefixes."""
        return self.prefixes[0]


def choose_targets(
    source: Source,
    scheme: Scheme | None,
    layout: str | ModuleType,
    names: Names,
    candidates: Sequence[Candidate],
    reasons: dict[str, str | None],
    findings: Findings,
) -> tuple[ModuleType | None, dict[str, Target]]:
    """The format, and every target by its key; `reasons` gets one for each candidate that is in none.

    Raises:
        RecipeError: the format can't say the scheme, or a group or block size doesn't divide (all layers are named).
    """
    if scheme is None:
        reasons |= {name: reason or "the recipe quantizes nothing" for name, reason in reasons.items()}
        return None, {}
    chosen = layout if isinstance(layout, ModuleType) else _layout(scheme, layout, candidates, reasons)
    for candidate in candidates:
        reasons[candidate.name] = reasons[candidate.name] or _against(candidate, scheme, chosen, findings)
    _leave_partners(names, candidates, reasons)
    members: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        for key in candidate.keys if reasons[candidate.name] is None else ():
            members.setdefault(key, []).append(candidate)
    targets = {key: target_of(source, scheme, key, sharers) for key, sharers in members.items()}
    _refuse_indivisible(list(targets.values()), scheme)
    return chosen, targets


def choose_pruned(
    source: Source,
    recipe: Recipe,
    names: Names,
    candidates: Sequence[Candidate],
    reasons: Mapping[str, str | None],
    findings: Findings,
) -> tuple[tuple[Candidate, ...], dict[str, str | None]]:
    """The layers that a recipe prunes, and for each candidate why it doesn't, or None.

    Raises:
        RecipeError: there is none, or the groups of the pattern don't divide (all such layers are named).
    """
    step = recipe.pruning
    if step is None:
        return (), {}
    found = dict(reasons)
    if recipe.observes_pruning:
        for candidate in candidates:
            found[candidate.name] = found[candidate.name] or unobserved(candidate, findings)
    _leave_partners(names, candidates, found, "isn't pruned")
    chosen = tuple(candidate for candidate in candidates if found[candidate.name] is None)
    if not chosen:
        why = next((reason for reason in found.values() if reason), "it has none")
        raise RecipeError(
            f"no linear layer of {source.name} is left to prune ({why}); change --include or --ignore if that is why, "
            "or use another model"
        )
    pattern = pattern_of(step.parameters["pattern"])
    if isinstance(pattern, tuple):
        _refuse_ungrouped(chosen, pattern[-1])
    return chosen, found


def _refuse_ungrouped(candidates: Sequence[Candidate], of: int) -> None:
    """Raise RecipeError naming every layer whose in features no groups of so many make."""
    bad = [f"{each.name} ({each.in_features})" for each in candidates if each.in_features % of]
    if bad:
        raise RecipeError(
            f"{of} weights of a group do not divide the in features of {len(bad)} layers: {', '.join(bad)}; --ignore "
            "them, or use sparse24 with pattern=unstructured:0.5"
        )


def _leave_partners(
    names: Names, candidates: Sequence[Candidate], reasons: dict[str, str | None], what: str = "stays in float"
) -> None:
    """Leave as it is what shares a checkpoint tensor with something that is left, of which `what` is said."""
    makes: dict[str, set[str]] = {}
    for parameter, keys in names.sources().items():
        for key in keys:
            makes.setdefault(key, set()).add(parameter)
    quantized = {candidate.parameter: candidate for candidate in candidates if reasons[candidate.name] is None}
    while True:
        left = {}
        for parameter, candidate in quantized.items():
            partners = {other for key in candidate.keys for other in makes.get(key, ())} - quantized.keys()
            if partners:
                left[parameter] = f"shares its tensor on disk with {min(partners)}, which {what}"
        if not left:
            return
        for parameter, reason in left.items():
            reasons[quantized.pop(parameter).name] = reason


def _layout(scheme: Scheme, name: str, candidates: Iterable[Candidate], reasons: dict[str, str | None]) -> ModuleType:
    """The format of that name; `auto` is the first that says the scheme, unless it would lose what matters.

    quantkit's own takes its place where experts lie together in one tensor, for which compressed-tensors has no names;
    where linear layers have their weights in x out (Conv1D), whose codes transformers with compressed-tensors would
    take for weights; and where bitsandbytes could hold not one of the linear layers.
    """
    layout = formats.choose(scheme, name)
    if name != "auto":
        return layout
    open_ones = [each for each in candidates if reasons[each.name] is None]
    if layout is formats.bitsandbytes:
        plain = [each for each in open_ones if not each.experts]
        lost = plain and all(_against_linear(each, layout) for each in plain)
    else:
        fused = _by_row(scheme) and any(each.fused for each in open_ones)
        flipped = any(each.transposed and not each.experts for each in open_ones)
        lost = layout is formats.compressed_tensors and (fused or flipped)
    return formats.native if lost else layout


def _by_row(scheme: Scheme) -> bool:
    """Whether experts can have the scheme: scales by row, nothing stored of activations."""
    return scheme.weight_granularity == "row" and not scheme.needs_data


def _against(candidate: Candidate, scheme: Scheme, layout: ModuleType, findings: Findings) -> str | None:
    """Why this format or scheme can't take a candidate, or None."""
    unseen = unobserved(candidate, findings) if scheme.needs_data else None
    if unseen is not None:
        return unseen
    if candidate.converted and (scheme.weight_granularity != "row" or scheme.outlier_columns is not None):
        return "is merged or split while it is loaded, and only scales by row go along"
    if not candidate.experts:
        return _against_linear(candidate, layout)
    if layout is formats.bitsandbytes:
        return "bitsandbytes has no quantized experts; --format quantkit has"
    if not _by_row(scheme):
        return "experts have scales by row, and activations by token: with this recipe they stay in float"
    if candidate.transposed and scheme.group_size is not None:
        return "experts that are stored in x out have no groups; use group=channel"
    if candidate.fused and layout is formats.compressed_tensors:
        return (
            "holds all experts in one tensor, and compressed-tensors needs a layer an expert; --format quantkit has it"
        )
    return None


def unobserved(candidate: Candidate, findings: Findings) -> str | None:
    """Why calibration sees nothing of what meets a candidate, or None."""
    if not candidate.name.startswith(f"{findings.blocks}."):
        return "lies outside of the blocks, where no activation is observed"
    if any(candidate.name.startswith(f"{findings.blocks}.{i}.") for i in findings.idle):
        return "does not run when the model reads text, so that no activation is observed"
    if findings.unused(candidate.parameter):
        return "meets no activation when the model reads text, so that none is observed"
    return None


def _against_linear(candidate: Candidate, layout: ModuleType) -> str | None:
    """Why a plain linear layer can't be stored in this format, or None."""
    if layout is formats.bitsandbytes and candidate.special:
        return "is of a class that transformers with bitsandbytes passes by; --format quantkit has it"
    if layout is formats.bitsandbytes and candidate.converted:
        return "is merged or split while it is loaded, which bitsandbytes cannot do; --format quantkit has it"
    odd = next((key for key in candidate.keys if not key.endswith(".weight")), None)
    return None if odd is None else f"is stored as {odd!r}, whose name has no place for a scale beside a weight"


def target_of(source: Source, scheme: Scheme, key: str, members: Sequence[Candidate]) -> Target:
    """The target of a key that these candidates are made of."""
    first, info = members[0], source.weights.tensors[key]
    transposed = first.keys[key]
    out_features, in_features = info.shape[-2:] if not transposed else info.shape[:-3:-1]
    experts = info.shape[0] if len(info.shape) == 3 else 0
    return Target(
        tuple(candidate.name for candidate in members),
        key,
        out_features,
        in_features,
        info.dtype,
        scheme,
        tuple(candidate.parameter for candidate in members),
        transposed,
        experts,
        bool(first.experts),
        whole=len(members) == 1 and len(first.keys) == 1,
    )


def tensor_specs(target: Target, layout: ModuleType | None) -> dict[str, formats.TensorSpec]:
    """Every tensor that a target is written as, by its full name."""
    assert layout is not None
    sizes = (target.scheme, target.out_features, target.in_features, target.dtype)
    if target.experts:
        specs = expert_specs(layout, *sizes, transposed=target.transposed)
    else:
        specs = layout.tensor_specs(*sizes, transposed=target.transposed)
    return {prefix + name: spec for prefix in target.prefixes for name, spec in specs.items()}


def counted(targets: Mapping[str, Target], layers: Iterable[LayerReport]) -> dict[str, Target]:
    """The targets, in whose schemes stand how many columns of each layer were left in float, if any were to be."""
    counts = {layer.module: layer.outlier_columns for layer in layers if layer.outlier_columns is not None}
    return {
        key: replace(target, scheme=replace(target.scheme, outlier_columns=counts[target.module]))
        if target.module in counts
        else target
        for key, target in targets.items()
    }


def _refuse_indivisible(targets: Sequence[Target], scheme: Scheme) -> None:
    """Raise RecipeError naming every layer whose in features the group or block size doesn't divide."""
    size = BLOCK if scheme.weight_granularity == "block" else scheme.group_size
    bad = [] if size is None else [target for target in targets if target.in_features % size]
    if bad:
        names = dict.fromkeys(f"{target.module} ({target.in_features})" for target in bad)
        block = scheme.weight_granularity == "block"
        what, other = ("block", "another scheme") if block else ("group", "group=channel")
        raise RecipeError(
            f"{what} size {size} does not divide the in features of {len(names)} layers: {', '.join(names)}; "
            f"--ignore them, or use {other}"
        )
