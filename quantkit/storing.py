"""How a recipe's weights lie on disk: in which format, and those that are pruned packed or with their zeros.

Packed weights are for quantkit's own format, which is asked for by name. Everything else writes zeros, into a format
that other software loads. Which of both it is, and what the other would take, stands in the plan's notes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from quantkit import formats
from quantkit.candidates import Candidate
from quantkit.checkpoint import Source
from quantkit.errors import RecipeError
from quantkit.exploration import Findings
from quantkit.naming import Names
from quantkit.recipe import Recipe
from quantkit.scheme import FLOAT, Scheme
from quantkit.sparsity import is_packable, tiles_of
from quantkit.targets import Target, choose_targets, target_of, tensor_specs

DENSE = "dense"
"""What `--format` is called for zeros in the format that `auto` would be without them."""


@dataclass(frozen=True)
class Storage:
    """What becomes of checkpoint keys on disk.

    Attributes:
        layout: the format; None when everything stays in float.
        targets: key to what it is written as, for all that is quantized or packed.
        reasons: for each candidate why it isn't quantized, or None.
        nbytes: bytes of all tensors.
    """

    layout: ModuleType | None
    targets: dict[str, Target]
    reasons: dict[str, str | None]
    nbytes: int

    @property
    def packed(self) -> set[str]:
        """The layers in float whose zeros are left out: they are packed, and not quantized."""
        return {name for target in self.targets.values() if target.scheme.is_float for name in target.modules}

    @property
    def is_sparse(self) -> bool:
        """Whether zeros are left out anywhere."""
        return any(target.scheme.sparsity is not None for target in self.targets.values())


def choose_storage(
    source: Source,
    recipe: Recipe,
    layout: str | ModuleType,
    names: Names,
    candidates: Sequence[Candidate],
    reasons: Mapping[str, str | None],
    findings: Findings,
    pruned: Sequence[Candidate],
) -> tuple[Storage, list[str]]:
    """How everything is stored, and what a reader should know of pruned weights.

    Args:
        source: the model.
        recipe: what is done to it.
        layout: a format's name or module; nothing is packed but by the name `quantkit`.
        names: the model's keys and parameters.
        candidates: its linear layers.
        reasons: for each why it stays in float whatever the format, or None.
        findings: what the model does with its parameters.
        pruned: those that are pruned.

    Raises:
        RecipeError: the format can't say the scheme, a group size doesn't divide, or there is nothing that the format
            is for: no zeros to be written or packed.
    """
    wants = layout == formats.native.NAME
    refused = _against_packing(recipe)
    if layout == DENSE and recipe.pruning is None:
        raise RecipeError("--format dense writes the zeros of pruned weights, and no step prunes; use --format auto")
    if wants and recipe.pruning is not None and recipe.scheme is None and refused is not None:
        raise RecipeError(f"--format {formats.native.NAME} has nothing to hold: {refused}; use --format dense")

    def stored(form: str | ModuleType, pack: bool) -> Storage:
        found = dict(reasons)
        chosen, targets = choose_targets(source, recipe.scheme, form, names, candidates, found, findings)
        if pack:
            chosen, targets = formats.native, _packed(source, recipe, targets, pruned)
        return Storage(chosen, targets, found, _nbytes(source, chosen, targets))

    packs = wants and refused is None
    made = stored("auto" if layout == DENSE else layout, packs)
    if refused is not None:
        return made, [f"zeros are written: {refused}"] if wants and recipe.pruning is not None else []
    other = stored("auto" if packs else formats.native, not packs)
    if packs and not made.is_sparse:
        why = next((each for each in map(_against_float, pruned) if each), "none is left")
        raise RecipeError(f"no pruned layer of {source.name} can be packed ({why}); use --format dense")
    return made, _notes(recipe, made, other, packs, pruned)


def _against_packing(recipe: Recipe) -> str | None:
    """Why a recipe's weights can't be packed, or None."""
    if recipe.pruning is None:
        return "no step prunes"
    pattern = recipe.pruning.parameters["pattern"]
    if not is_packable(pattern):
        return f"the pattern {pattern} has no packed form (2:4 and V:2:M have one)"
    try:
        replace(recipe.scheme or Scheme(FLOAT, sparsity=pattern), sparsity=pattern)
    except RecipeError as error:
        return str(error).partition(";")[0]
    return None


def _against_float(candidate: Candidate) -> str | None:
    """Why a pruned layer that isn't quantized keeps its zeros on disk, or None."""
    if candidate.experts:
        return "experts in float are packed only when they are quantized"
    if candidate.converted:
        return "what is merged or split while it is loaded is packed only when it is quantized"
    odd = next((key for key in candidate.keys if not key.endswith(".weight")), None)
    return None if odd is None else f"{odd!r} is a name without a place for indices beside a weight"


def _fits_tiles(source: Source, sharers: Sequence[Candidate], key: str, pattern: str) -> bool:
    """Whether a checkpoint key can be packed by the pattern, of V:2:M as well.

    Rows are pruned V by V from the first row of a layer's weight on, and packed so from the first of the tensor: where
    a tensor is a part of a weight, or holds several, V must divide the rows of all.
    """
    tiles = tiles_of(pattern)
    whole = len(sharers) == 1 and len(sharers[0].keys) == 1
    rows = [each.out_features for each in sharers] + [target_of(source, Scheme("int8"), key, sharers).out_features]
    return tiles is None or whole or all(size % tiles[0] == 0 for size in rows)


def _packed(
    source: Source, recipe: Recipe, targets: Mapping[str, Target], pruned: Sequence[Candidate]
) -> dict[str, Target]:
    """Targets whose zeros are left out where they are pruned; without a quantizer, of float weights."""
    assert recipe.pruning is not None
    pattern = recipe.pruning.parameters["pattern"]
    members: dict[str, list[Candidate]] = {}
    for candidate in pruned:
        for key in candidate.keys:
            members.setdefault(key, []).append(candidate)
    if recipe.scheme is None:
        float_scheme = Scheme(FLOAT, sparsity=pattern)
        found = {key: each for key, each in members.items() if all(_against_float(one) is None for one in each)}
        return {key: target_of(source, float_scheme, key, sharers) for key, sharers in found.items()}
    parameters = {candidate.parameter for candidate in pruned}
    made = dict(targets)
    for key, target in targets.items():
        fits = parameters.issuperset(target.parameters) and _fits_tiles(source, members[key], key, pattern)
        made[key] = replace(target, scheme=replace(target.scheme, sparsity=pattern)) if fits else target
    return made


def _nbytes(source: Source, layout: ModuleType | None, targets: Mapping[str, Target]) -> int:
    """Bytes of all tensors that will be written."""
    size = sum(info.nbytes for key, info in source.weights.tensors.items() if key not in targets)
    return size + sum(spec.nbytes for target in targets.values() for spec in tensor_specs(target, layout).values())


def _notes(recipe: Recipe, made: Storage, other: Storage, packs: bool, pruned: Sequence[Candidate]) -> list[str]:
    """What was chosen, what the other way takes, and what packed weights are not good for."""
    assert recipe.pruning is not None
    pattern = recipe.pruning.parameters["pattern"]
    if not packs:
        form = "an ordinary float checkpoint" if made.layout is None else made.layout.NAME
        less = "" if not other.is_sparse else f"; packed by --format quantkit they would take {other.nbytes:,}"
        return [f"the zeros of {pattern} are written, in {form}: {made.nbytes:,} bytes of tensors{less}"]
    found = [
        f"weights are packed by {pattern}, for quantkit.load and (after import quantkit.hf) transformers: "
        f"{made.nbytes:,} bytes of tensors; with their zeros, by --format dense, for other software too: "
        f"{other.nbytes:,}"
    ]
    left = {why: each.name for each in reversed(pruned) if (why := _against_float(each)) is not None}
    if recipe.scheme is None:
        found += [f"{name} and its like keep their zeros: {why}" for why, name in left.items()]
    elif any(target.of_experts and target.scheme.sparsity for target in made.targets.values()):
        found.append("packed experts are unpacked when they are loaded: no product takes them packed")
    parameters = {candidate.parameter for candidate in pruned}
    dense = [each for each in made.targets.values() if each.scheme.sparsity is None]
    odd = next((each.module for each in dense if parameters.issuperset(each.parameters)), None)
    if odd is not None:
        found.append(
            f"{odd} and its like keep their zeros: they lie in parts on disk, or several in one tensor, whose rows "
            f"{pattern.partition(':')[0]} doesn't divide"
        )
    if recipe.scheme is not None and recipe.scheme.activation_dtype is not None:
        found.append(
            "no product takes packed codes with activations in 8 bits: they lie packed on disk, and are unpacked once, "
            "when the model first runs"
        )
    return found


def quantization_config(
    layout: ModuleType | None, targets: Mapping[str, Target], quantized: Sequence[Candidate], left: Sequence[str]
) -> dict[str, Any] | None:
    """The `quantization_config` of what is written, or None when everything is in float.

    Args:
        layout: the format.
        targets: what is quantized or packed.
        quantized: the linear layers that are quantized, as the model has them.
        left: what a config names as left in float.
    """
    if layout is None:
        return None
    schemes = {name: target.scheme for target in targets.values() for name in target.modules}
    names = dict.fromkeys(layer.name for layer in quantized) if quantized else schemes
    first = next(iter(schemes.values()))
    if first.outlier_columns is not None:
        columns = {target.module: target.scheme.outlier_columns for target in targets.values()}
        found: dict[str, Any] = layout.config(first, list(names), left, columns=columns)
        return found
    by_scheme: dict[Scheme, list[str]] = {}
    for name in names:
        by_scheme.setdefault(schemes[name], []).append(name)
    configs = [layout.config(scheme, modules, left) for scheme, modules in by_scheme.items()]
    return configs[0] if len(configs) == 1 else formats.native.joined(configs)
