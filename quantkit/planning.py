"""The plan: what would happen to every tensor, and why, from config and headers alone."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from quantkit import formats
from quantkit.activating import Activating, choose_activating, recorded_layout
from quantkit.activations import Activations, remembered
from quantkit.candidates import FLOAT_DTYPES, Candidate, Reasons, candidates_of
from quantkit.checkpoint import Source, linears, tied_parameters
from quantkit.errors import CheckpointError, RecipeError
from quantkit.exploration import Findings, explore
from quantkit.methods import method_class
from quantkit.naming import Names, Origin, conversion_problems
from quantkit.recipe import Recipe, Step, matches
from quantkit.storing import choose_storage, quantization_config
from quantkit.targets import Target, choose_pruned, tensor_specs

__all__ = ["FLOAT_DTYPES", "LeftAlone", "PatternMatch", "Plan", "Stage", "Target", "make_plan", "tensor_specs"]


@dataclass(frozen=True)
class LeftAlone:
    """A weight matrix that stays as it is, and why."""

    module: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class PatternMatch:
    """A pattern of the recipe and how many linear layers it matched."""

    kind: str
    pattern: str
    matched: int


@dataclass(frozen=True)
class Stage:
    """Checkpoint keys that are read, worked on and written together: a block; or, one by one, what lies outside."""

    name: str
    keys: tuple[str, ...]
    is_block: bool


@dataclass(frozen=True)
class Plan:
    """Everything that will happen.

    Attributes:
        stages: the keys in the order of the work.
        targets: checkpoint key to what becomes of it, for all that will be quantized, or packed in float.
        quantized: the linear layers that will be quantized, as the model has them.
        left: every other weight matrix of the model, with the reason.
        linears_left: the names of the linear layers among them.
        ignored: what a config names as left in float: these layers, and the experts of a mixture.
        unused: checkpoint keys that the model doesn't use; they are copied.
        renamed: checkpoint keys that are written under another name: a tied tensor stored only under the name of its
            second use gets that of the first, where servers look for it.
        patterns: what the patterns matched.
        notes: what else a reader of the plan should know.
        output_bytes: bytes of all tensors that will be written.
        layout: the format that they are written in; None when nothing is quantized or packed.
        findings: what the model does with its parameters.
        names: its keys and parameters.
        pruned: the linear layers of which weights will be set to zero, as the model has them.
        pruning: how; None where none are.
        activating: what is changed between linear layers; None where nothing is.
        recorded: what the source says of its activations already.
    """

    stages: tuple[Stage, ...]
    targets: dict[str, Target]
    quantized: tuple[Candidate, ...]
    left: tuple[LeftAlone, ...]
    linears_left: tuple[str, ...]
    ignored: tuple[str, ...]
    unused: tuple[str, ...]
    renamed: dict[str, str]
    patterns: tuple[PatternMatch, ...]
    notes: tuple[str, ...]
    output_bytes: int
    layout: ModuleType | None
    findings: Findings
    names: Names
    pruned: tuple[Candidate, ...] = ()
    pruning: Step | None = None
    activating: Activating | None = None
    recorded: Activations = field(default_factory=Activations)

    def quantization_config(self, activations: Activations | None = None) -> dict[str, Any] | None:
        """The `quantization_config` of the result; None when everything is in float, and no activation is recorded.

        `activations` are what was found of them in calibration; by default what is known of them before.
        """
        layout = self.layout if self.targets else None
        found = quantization_config(layout, self.targets, self.quantized, self.ignored)
        more = Activations()
        if self.activating is not None and self.activating.is_recorded:
            more = activations or self.activating.planned()
        said = self.recorded.with_more(more)
        return formats.native.with_activations(found, said) if said else found

    def pruned_by_key(self, key: str) -> tuple[list[str], bool]:
        """The pruned layers that a checkpoint key is the weight of, and whether it holds K before N."""
        found = [each for each in self.pruned if key in each.keys]
        return [each.name for each in found], bool(found) and found[0].keys[key]


def make_plan(source: Source, recipe: Recipe, layout: str | ModuleType = "auto") -> Plan:
    """What the recipe does to the model.

    Args:
        source: the model.
        recipe: what to do.
        layout: a format's name or module; `auto` is the first that can say the recipe's scheme, or quantkit's own where
            experts lie together in one tensor, which no other can say. Pruned weights are packed in quantkit's own
            where that is asked for by name; `dense` is `auto` for a recipe that prunes.

    Raises:
        RecipeError: a pattern matches nothing, nothing is left to quantize, or a group size doesn't divide (all such
            layers are named).
        CheckpointError: the weights don't make the model.
    """
    names = Names(source)
    _refuse_incomplete(source, names.origins)
    findings = explore(source.skeleton, groups=recipe.smooths, activations=recipe.rectifying is not None)
    candidates = candidates_of(source, names, findings)
    patterns = _pattern_matches(source, recipe, [candidate.name for candidate in candidates])
    judge = Reasons(source, recipe, names, findings)
    reasons = {candidate.name: judge.of(candidate) for candidate in candidates}
    pruned, unpruned = choose_pruned(source, recipe, names, candidates, reasons, findings)
    activating = choose_activating(source, recipe, candidates, reasons, findings)
    recorded = remembered(source.skeleton)
    records = bool(recorded) or (activating is not None and activating.is_recorded)
    layout = recorded_layout(layout, recipe, records)
    stored, storage = choose_storage(source, recipe, layout, names, candidates, reasons, findings, pruned)
    chosen, targets, reasons = stored.layout, stored.targets, stored.reasons
    if recipe.scheme is not None and not targets:
        raise RecipeError(_nothing_left(source, {name: why for name, why in reasons.items() if why}))
    left = {candidate.name: reasons[candidate.name] or "" for candidate in candidates if reasons[candidate.name]}
    worked, told, packed = {name for target in targets.values() for name in target.parameters}, left, stored.packed
    if recipe.scheme is None and pruned:
        worked, told = {each.parameter for each in pruned}, {name: why for name, why in unpruned.items() if why}
    return Plan(
        _stages(source, names, findings),
        targets,
        tuple(candidate for candidate in candidates if candidate.name not in left),
        _left_alone(source, worked, told, findings),
        tuple(each.name for each in candidates if each.name in left and not each.experts and each.name not in packed),
        _ignored(source, names, candidates, left, chosen),
        tuple(key for key, origin in names.origins.items() if origin.parameter is None),
        _renamed(source, names.origins),
        patterns,
        (
            *_notes(recipe, findings, judge.ended, chosen, [c for c in candidates if c.name not in left]),
            *storage,
            *(activating.notes() if activating is not None else ()),
        ),
        stored.nbytes,
        formats.native if chosen is None and records else chosen,
        findings,
        names,
        pruned,
        recipe.pruning,
        activating,
        recorded,
    )


def _ignored(
    source: Source, names: Names, candidates: Sequence[Candidate], left: dict[str, str], layout: ModuleType | None
) -> tuple[str, ...]:
    """What is left in float, for a config: modules by name, experts (compressed-tensors) by a regex of their layers.

    A module of a subclass of nn.Linear that computes something else is named too: others would take it for one. Where
    the files call a module otherwise than transformers does, both names are there: servers know the files' alone.
    """
    known = {candidate.name for candidate in candidates}
    on_disk: dict[str, list[str]] = {}
    for key, origin in names.origins.items():
        if origin.parameter is not None and not origin.converted:
            on_disk.setdefault(origin.parameter.removesuffix(".weight"), []).append(key.removesuffix(".weight"))
    found = []
    for name, _ in linears(source.skeleton):
        if name not in known:
            found += [name, *on_disk.get(name, ())]
    for candidate in candidates:
        if candidate.name not in left:
            continue
        if not candidate.experts:
            found += [candidate.name, *on_disk.get(candidate.name, ())]
        elif layout is formats.compressed_tensors:
            found += [f"re:{re.escape(owner)}\\.[0-9]+\\." for owner in candidate.owners]
    return tuple(dict.fromkeys(found))


def _notes(
    recipe: Recipe, findings: Findings, ended: str | None, layout: ModuleType | None, quantized: Sequence[Candidate]
) -> tuple[str, ...]:
    """What a reader should know of how the data flow was seen; `ended` says why the pass without data ended early."""
    notes = [method_class(step.name).cost for step in recipe.transforms if method_class(step.name).cost]
    if ended is not None and (findings.ended is not None or findings.untraced.keys() - set(findings.idle)):
        notes.append(f"the pass without data, which stands in where no block is traced, ended early: {ended}")
    if findings.ended is not None:
        notes.append(
            f"the data flow was seen only in part, as the pass over random weights ended early: {findings.ended}"
        )
    for number, why in findings.untraced.items():
        notes.append(f"block {number} was not traced: {why}")
    if layout is formats.compressed_tensors and any(each.transposed and not each.experts for each in quantized):
        notes.append(
            "transformers with compressed-tensors passes Conv1D layers by and takes their codes for weights; load it "
            "with quantkit, or serve it with vLLM"
        )
    if recipe.scheme is not None and recipe.scheme.outlier_columns is not None:
        notes.append("the columns that stay in float are found in calibration: they come on top of the planned size")
    return tuple(notes)


def _nothing_left(source: Source, reasons: dict[str, str]) -> str:
    """The sentence for a model of which nothing would be quantized, with the commonest reason."""
    if not reasons:
        return f"{source.name} has no linear layer; quantkit quantizes nothing else, use another model"
    reason, count = Counter(reasons.values()).most_common(1)[0]
    return (
        f"no linear layer of {source.name} is left to quantize ({count} of {len(reasons)}: {reason}); "
        "change --include or --ignore if that is why, or use another model"
    )


def _refuse_incomplete(source: Source, origins: dict[str, Origin]) -> None:
    """Raise CheckpointError when a parameter has no tensor, or one of another shape."""
    model, tied = source.skeleton, tied_parameters(source.skeleton)
    made = {origin.parameter for origin in origins.values()}
    made |= {tied[name] for name in made if name in tied}
    converted = any(origin.converted for origin in origins.values())
    problems = conversion_problems(source) if converted and source.folder is not None else []
    if problems:
        raise CheckpointError(
            f"{source.name} is incomplete: {problems[0]} ({len(problems)} such problems); "
            "a shard may be missing: download the checkpoint again"
        )
    absent = [name for name, _ in model.named_parameters() if name not in made]
    if absent and not converted:
        raise CheckpointError(
            f"{source.name} holds no tensor for {absent[0]!r} ({len(absent)} of the model's parameters are missing); "
            "a shard may be missing: download the checkpoint again"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, origin in origins.items():
        expected = parameters.get(origin.parameter or "")
        shape = source.weights.tensors[key].shape
        if expected is not None and not origin.converted and tuple(expected.shape) != shape:
            raise CheckpointError(
                f"tensor {key!r} of {source.name} is {list(shape)} where config.json asks for {list(expected.shape)}; "
                "config and weights don't belong together"
            )


def _pattern_matches(source: Source, recipe: Recipe, names: Sequence[str]) -> tuple[PatternMatch, ...]:
    """What each pattern matched, or RecipeError when one matched nothing."""
    found = []
    for kind, patterns in (("include", recipe.include), ("ignore", recipe.ignore)):
        for pattern in patterns:
            count = sum(matches(pattern, name) for name in names)
            if not count:
                example = names[len(names) // 2] if names else "none"
                raise RecipeError(
                    f"--{kind} {pattern!r} matches none of the {len(names)} linear layers of {source.name}; "
                    f"their names look like {example!r}, and a glob must match all of a name"
                )
            found.append(PatternMatch(kind, pattern, count))
    return tuple(found)


def _left_alone(
    source: Source, quantized: set[str], reasons: dict[str, str], findings: Findings
) -> tuple[LeftAlone, ...]:
    """Every weight of two or more axes that isn't quantized, with the reason."""
    used = {
        f"{findings.blocks}.{number}.{use.parameter}": use
        for number, structure in findings.structures.items()
        for use in structure.linears
    }
    found = []
    for name, parameter in source.skeleton.named_parameters(remove_duplicate=False):
        module, _, leaf = name.rpartition(".")
        if parameter.ndim < 2 or name in quantized:
            continue
        reason = reasons.get(name) or (reasons.get(module) if leaf == "weight" else None)
        if reason is None and name in used:
            use = used[name]
            reason = use.reason if use.role != "linear" and use.reason else "is multiplied as it stands, by no layer"
        if reason is None:
            kind = type(source.skeleton.get_submodule(module)).__name__
            reason = f"belongs to {kind}, which is no plain linear layer"
        label = module if leaf == "weight" else name
        found.append(LeftAlone(label, tuple(parameter.shape), reason))
    return tuple(found)


def _renamed(source: Source, origins: dict[str, Origin]) -> dict[str, str]:
    """Keys of tied tensors whose first name the checkpoint lacks, to that name."""
    made = {origin.parameter for origin in origins.values()}
    renamed = {}
    for name, first in tied_parameters(source.skeleton).items():
        if name in origins and origins[name].parameter == name and first not in made:
            renamed[name] = first
            made.add(first)
    return renamed


def _stages(source: Source, names: Names, findings: Findings) -> tuple[Stage, ...]:
    """All keys: those outside of the blocks first, then block by block."""
    blocks = findings.blocks
    members: dict[str, list[str]] = {"outside the blocks": []}
    members |= {f"{blocks}.{number}": [] for number in range(findings.count)}
    for key, origin in names.origins.items():
        name = origin.parameter or ""
        number = name.removeprefix(f"{blocks}.").split(".")[0] if name.startswith(f"{blocks}.") else ""
        members.get(f"{blocks}.{number}", members["outside the blocks"]).append(key)
    outside = members.pop("outside the blocks")
    stages = [Stage("outside the blocks", tuple(outside), is_block=False)]
    stages += [Stage(name, tuple(keys), is_block=True) for name, keys in members.items()]
    return tuple(stage for stage in stages if stage.keys)
