"""The plan: what would happen to every tensor, and why, from config and headers alone."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn

from quantkit.checkpoint import (
    Origin,
    Source,
    conversion_problems,
    decoder_blocks,
    linears,
    names_of,
    output_head,
    tied_parameters,
)
from quantkit.discovery import weights_read_elsewhere
from quantkit.errors import CheckpointError, RecipeError
from quantkit.recipe import Recipe, matches
from quantkit.scheme import Scheme

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """A linear layer that will be quantized: its module name, its weight's checkpoint key, N × K, dtype and scheme."""

    module: str
    key: str
    out_features: int
    in_features: int
    dtype: torch.dtype
    scheme: Scheme

    @property
    def prefix(self) -> str:
        """What the names of its tensors on disk begin with."""
        return self.key.removesuffix("weight")


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
        targets: checkpoint key to the linear layer whose weight it is, for all that will be quantized.
        left: every other weight matrix of the model, with the reason.
        linears_left: the names of the linear layers among them.
        unused: checkpoint keys that the model doesn't use; they are copied.
        renamed: checkpoint keys that are written under another name: a tied tensor stored only under the name of its
            second use gets that of the first, where servers look for it.
        patterns: what the patterns matched.
        notes: what else a reader of the plan should know.
        output_bytes: bytes of all tensors that will be written.
    """

    stages: tuple[Stage, ...]
    targets: dict[str, Target]
    left: tuple[LeftAlone, ...]
    linears_left: tuple[str, ...]
    unused: tuple[str, ...]
    renamed: dict[str, str]
    patterns: tuple[PatternMatch, ...]
    notes: tuple[str, ...]
    output_bytes: int


def make_plan(source: Source, recipe: Recipe, format_module: ModuleType) -> Plan:
    """What the recipe does to the model.

    Raises:
        RecipeError: a pattern matches nothing, nothing is left to quantize, or a group size doesn't divide (all such
            layers are named).
        CheckpointError: the weights don't make the model.
    """
    scheme = recipe.scheme
    if scheme is None:
        raise RecipeError("the recipe has no quantizer; add one such as -m w8a8")
    origins = names_of(source)
    _refuse_incomplete(source, origins)
    patterns = _pattern_matches(source, recipe)
    keys = {origin.parameter: key for key, origin in origins.items() if origin.parameter and not origin.converted}
    elsewhere, ended = weights_read_elsewhere(source.skeleton)
    reasons = _reasons(source, recipe, keys, elsewhere)
    targets = {}
    for name, module in linears(source.skeleton):
        if name not in reasons:
            key = keys[f"{name}.weight"]
            info = source.weights.tensors[key]
            targets[key] = Target(name, key, module.out_features, module.in_features, info.dtype, scheme)
    if not targets:
        raise RecipeError(_nothing_left(source, reasons))
    _refuse_indivisible(list(targets.values()), scheme)
    unused = tuple(key for key, origin in origins.items() if origin.parameter is None)
    output = sum(info.nbytes for key, info in source.weights.tensors.items() if key not in targets)
    for target in targets.values():
        specs = format_module.tensor_specs(scheme, target.out_features, target.in_features, target.dtype)
        output += sum(spec.nbytes for spec in specs.values())
    return Plan(
        _stages(source, origins),
        targets,
        _left_alone(source, {target.module for target in targets.values()}, reasons),
        tuple(reasons),
        unused,
        _renamed(source, origins),
        patterns,
        ()
        if ended is None
        else (f"the data flow was seen only in part, as the pass without data ended early: {ended}",),
        output,
    )


def _nothing_left(source: Source, reasons: dict[str, str]) -> str:
    """The sentence for a model of which nothing would be quantized, with the commonest reason."""
    if not reasons:
        return f"{source.name} has no linear layer of torch's own kind, and quantkit quantizes no other kind yet"
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


def _reasons(source: Source, recipe: Recipe, keys: dict[str, str], elsewhere: set[str]) -> dict[str, str]:
    """Every linear layer that stays in float, to the reason."""
    head, tied = output_head(source.skeleton), tied_parameters(source.skeleton)
    sources_of_ties = set(tied.values())
    reasons = {}
    for name, module in linears(source.skeleton):
        weight = f"{name}.weight"
        included = [pattern for pattern in recipe.include if matches(pattern, name)]
        ignored = [pattern for pattern in recipe.ignore if matches(pattern, name)]
        if type(module).forward is not nn.Linear.forward:
            reasons[name] = f"is a {type(module).__name__}, whose forward pass is its own"
        elif weight in tied or weight in sources_of_ties:
            reasons[name] = f"shares its weight with {tied.get(weight, 'another layer').removesuffix('.weight')}"
        elif ignored:
            reasons[name] = f"ignored by {ignored[0]!r}"
        elif recipe.include and not included:
            reasons[name] = "no include pattern matches it"
        elif name == head and not included:
            reasons[name] = "makes the logits; --include it to quantize it"
        elif name in elsewhere:
            reasons[name] = "has a weight that other code reads without calling the layer"
        elif weight not in keys:
            reasons[name] = "its weight is merged or changed while the checkpoint is loaded"
        elif source.weights.tensors[keys[weight]].dtype not in FLOAT_DTYPES:
            reasons[name] = f"its weight is stored as {source.weights.tensors[keys[weight]].dtype}"
    return reasons


def _pattern_matches(source: Source, recipe: Recipe) -> tuple[PatternMatch, ...]:
    """What each pattern matched, or RecipeError when one matched nothing."""
    names = [name for name, _ in linears(source.skeleton)]
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


def _refuse_indivisible(targets: Sequence[Target], scheme: Scheme) -> None:
    """Raise RecipeError naming every layer whose in features the group size doesn't divide."""
    size = scheme.group_size
    bad = [] if size is None else [target for target in targets if target.in_features % size]
    if bad:
        names = ", ".join(f"{target.module} ({target.in_features})" for target in bad)
        raise RecipeError(
            f"group size {size} does not divide the in features of {len(bad)} layers: {names}; "
            "--ignore them, or use group=channel"
        )


def _left_alone(source: Source, quantized: set[str], reasons: dict[str, str]) -> tuple[LeftAlone, ...]:
    """Every weight of two or more axes that isn't quantized, with the reason."""
    found = []
    for name, parameter in source.skeleton.named_parameters(remove_duplicate=False):
        module, _, leaf = name.rpartition(".")
        if parameter.ndim < 2 or (module in quantized and leaf == "weight"):
            continue
        reason = reasons.get(module) if leaf == "weight" else None
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


def _stages(source: Source, origins: dict[str, Origin]) -> tuple[Stage, ...]:
    """All keys: those outside of the blocks first, then block by block."""
    blocks, count = decoder_blocks(source.skeleton)
    members: dict[str, list[str]] = {"outside the blocks": []}
    members |= {f"{blocks}.{number}": [] for number in range(count)}
    for key, origin in origins.items():
        name = origin.parameter or ""
        number = name.removeprefix(f"{blocks}.").split(".")[0] if name.startswith(f"{blocks}.") else ""
        members.get(f"{blocks}.{number}", members["outside the blocks"]).append(key)
    outside = members.pop("outside the blocks")
    stages = [Stage("outside the blocks", tuple(outside), is_block=False)]
    stages += [Stage(name, tuple(keys), is_block=True) for name, keys in members.items()]
    return tuple(stage for stage in stages if stage.keys)
