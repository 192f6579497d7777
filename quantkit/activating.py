"""What a recipe changes between linear layers: which modules get a relu, which layers a threshold, how that is said.

Where a plain relu stands in place of an activation everywhere, a key of config.json may say so: each key that holds a
word is set to `relu` in turn, and the model built from it without weights. The keys that change just these modules are
the ones. Everything else is said in `quantization_config` (`quantkit.activations`).
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn

from quantkit import formats
from quantkit.activations import Activations, Output, remembered
from quantkit.candidates import Candidate
from quantkit.checkpoint import Source
from quantkit.discovery import Activation, Structure
from quantkit.discovery.rectifying import is_relu
from quantkit.errors import RecipeError
from quantkit.exploration import Findings
from quantkit.methods.relu import shift_of
from quantkit.outcome import ChangedActivation
from quantkit.recipe import Recipe, matches
from quantkit.targets import unobserved

ACTIVATION, NORM, UP, THRESHOLD = "activation", "norm", "up", "threshold"
RELU = "relu"

Key = tuple[str, ...]
"""Where a value lies in config.json: a name, or one after the other."""


@dataclass(frozen=True)
class Place:
    """A module that gets a relu.

    Attributes:
        module: its name in the model.
        kind: `activation` (the relu takes its place), `norm` or `up` (it comes behind).
        feeds: the parameters of linear layers that see its zeros.
        shift: of relu(x - shift); None where calibration finds it.
    """

    module: str
    kind: str
    feeds: tuple[str, ...]
    shift: float | None = 0.0

    def changed(self, shift: float) -> ChangedActivation:
        """What is told of it, with a shift."""
        return ChangedActivation(
            self.module, self.kind, shift, tuple(name.removesuffix(".weight") for name in self.feeds)
        )


@dataclass(frozen=True)
class Activating:
    """What a recipe changes between linear layers.

    Attributes:
        places: the modules that get a relu.
        inputs: the linear layers that get a threshold.
        left: what gets none, by name, with the reason.
        keys: the keys of config.json that say all of it; empty where none can.
    """

    places: tuple[Place, ...] = ()
    inputs: tuple[Candidate, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    keys: tuple[Key, ...] = ()

    @property
    def is_recorded(self) -> bool:
        """Whether quantkit's own format says it."""
        return not self.keys and bool(self.places or self.inputs)

    def planned(self) -> Activations:
        """What the checkpoint will say, with 0 where calibration finds a number."""
        found = [place.changed(place.shift or 0.0) for place in self.places]
        return recorded([*found, *(ChangedActivation(layer.name, THRESHOLD, 0.0) for layer in self.inputs)])

    def given(self, block: str) -> list[ChangedActivation]:
        """What is changed in a block of a run without data, in which every shift is given."""
        return [place.changed(place.shift) for place in self.within(block).places if place.shift is not None]

    def within(self, block: str) -> "Activating":
        """What lies in a block."""
        start = f"{block}."
        places = tuple(place for place in self.places if place.module.startswith(start))
        return Activating(places, tuple(layer for layer in self.inputs if layer.parameter.startswith(start)))

    def parameters(self) -> list[str]:
        """The parameters of all linear layers whose input may be zero, each once."""
        fed = [name for place in self.places for name in place.feeds]
        return list(dict.fromkeys((*fed, *(layer.parameter for layer in self.inputs))))

    def write(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config with the keys that say it, a copy."""
        return with_keys(config, self.keys)

    def notes(self) -> list[str]:
        """What a reader should know."""
        found = []
        if self.keys:
            said = " and ".join(".".join(key) for key in self.keys)
            found.append(f"relu is said by {said} in config.json: transformers runs it as it is")
        elif self.is_recorded:
            found.append(
                "what is done to activations stands in quantization_config (quantkit's own format, version "
                f"{formats.native.VERSION}), for quantkit.load and (after import quantkit.hf) transformers"
            )
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(f"activations: {names[0]}{more} stays as it is: {why}")
        return found


def recorded(changes: Iterable[ChangedActivation]) -> Activations:
    """What a checkpoint says of these changes."""
    outputs, inputs = dict[str, Output](), dict[str, float]()
    for each in changes:
        if each.kind == THRESHOLD:
            inputs[each.module] = each.value
        else:
            outputs[each.module] = Output(each.value, each.kind == ACTIVATION, each.feeds)
    return Activations(outputs, inputs)


def choose_activating(
    source: Source,
    recipe: Recipe,
    candidates: Sequence[Candidate],
    reasons: Mapping[str, str | None],
    findings: Findings,
) -> Activating | None:
    """What the recipe changes between the model's linear layers; None for one that has no such step.

    Args:
        source: the model.
        recipe: what to do.
        candidates: its linear layers.
        reasons: for each why it is left alone whatever the format, or None.
        findings: what the model does with its parameters, activations among them.

    Raises:
        RecipeError: a step of the recipe finds nothing to change.
    """
    if recipe.rectifying is None and recipe.thresholding is None:
        return None
    left: dict[str, str] = {}
    places = tuple(_places(source, recipe, findings, left)) if recipe.rectifying is not None else ()
    if recipe.rectifying is not None and not places:
        name, why = next(iter(left.items()), ("its blocks", "nothing between two linear layers is an activation"))
        raise RecipeError(
            f"{recipe.rectifying} finds nothing to change in {source.name} ({name}: {why}); use another model or step, "
            "or look at how much is zero in it as it is, with `quantkit sparsity`"
        )
    inputs = tuple(_limited(candidates, reasons, findings, left)) if recipe.thresholding is not None else ()
    if recipe.thresholding is not None and not inputs:
        why = next(iter(left.values()), "it has none")
        raise RecipeError(
            f"no linear layer of {source.name} is left to have a threshold ({why}); change --include or --ignore if "
            "that is why, or use another model"
        )
    plain = not remembered(source.skeleton) and all(place.kind == ACTIVATION and place.shift == 0 for place in places)
    keys = said_by(source, {place.module for place in places}) if plain and not inputs else ()
    return Activating(places, inputs, left, keys)


def recorded_layout(layout: str | ModuleType, recipe: Recipe, records: bool) -> str | ModuleType:
    """The format that is asked for, or quantkit's own in the place of `auto` where activations must be recorded.

    Raises:
        RecipeError: another is asked for, which can't say what is done to activations.
    """
    if not records or layout in (formats.native, formats.native.NAME):
        return layout
    if layout != "auto" and not (layout == "dense" and recipe.scheme is None):
        name = layout if isinstance(layout, str) else layout.NAME
        raise RecipeError(
            f"format {name} cannot say what {', '.join(_words(recipe)) or 'the model'} does to activations; use "
            f"--format auto, which takes {formats.native.NAME} here"
        )
    return layout if recipe.scheme is None else formats.native


def _words(recipe: Recipe) -> list[str]:
    return [str(step) for step in (recipe.rectifying, recipe.thresholding) if step is not None]


def _places(source: Source, recipe: Recipe, findings: Findings, left: dict[str, str]) -> Iterator[Place]:
    """The modules of all blocks that get a relu; `left` takes the others, with the reason."""
    aliases: dict[int, list[str]] = {}
    for name, module in source.skeleton.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    done = remembered(source.skeleton).outputs
    for number in range(findings.count):
        block = f"{findings.blocks}.{number}"
        structure = findings.structures.get(number)
        if structure is None:
            left[block] = f"its data flow could not be traced ({findings.untraced.get(number, 'it did not run')})"
            continue
        left |= {f"{block}.{name}": why for name, why in _unchanged(recipe, structure).items()}
        for place in _of_block(recipe, structure, block, left):
            why = "it has a relu already" if place.module in done else _not_wanted(recipe, place)
            if why is not None:
                left[place.module] = why
                continue
            known = aliases[id(source.skeleton.get_submodule(place.module))]
            for name in [each for each in known if each.startswith(f"{block}.")] or [place.module]:
                yield Place(name, place.kind, place.feeds, place.shift)


def _unchanged(recipe: Recipe, structure: Structure) -> dict[str, str]:
    """What discovery couldn't give a relu, as far as the recipe asks for one there."""
    step = recipe.rectifying
    norms = step is not None and step.parameters["stage"] == "2"
    known = {name for name, why in structure.unchanged.items() if why.startswith("its output also goes")}
    return {name: why for name, why in structure.unchanged.items() if norms or name not in known}


def _of_block(recipe: Recipe, structure: Structure, block: str, left: dict[str, str]) -> Iterator[Place]:
    """The modules of a block that the recipe asks a relu for."""
    assert recipe.rectifying is not None
    words = recipe.rectifying.parameters
    shift, double = shift_of(words), words["variant"] == "drelu"

    def full(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(f"{block}.{name}" for name in names)

    if words["stage"] == "2":
        for norm in structure.norms:
            yield Place(f"{block}.{norm.module}", NORM, full(norm.feeds))
    for each in structure.activations:
        module, feeds = f"{block}.{each.module}", full(each.feeds)
        against = _against_double(each, shift) if double else None
        if against is not None:
            left[module] = against
            continue
        if double:
            for up in each.ups:
                yield Place(f"{block}.{up}", UP, feeds)
        if shift == 0 and each.rectifies:
            left[module] = "it is relu already" if each.is_relu else "it gives 0 for negative numbers already"
        elif each.rectifies and not each.is_relu:
            left[module] = "it gives 0 for negative numbers, and is not relu: a shift would change more than that"
        else:
            yield Place(module, ACTIVATION, feeds, shift)


def _against_double(each: Activation, shift: float | None) -> str | None:
    """Why an MLP can't have dReLU, or None."""
    if not each.gated:
        return "dReLU is for gated MLPs, and nothing is multiplied with its output"
    if not each.ups:
        return "dReLU needs an up projection that is a module of its own"
    if each.fused and shift is not None and shift < 0:
        return "dReLU of a fused gate and up projection takes no shift below 0"
    return None


def _not_wanted(recipe: Recipe, place: Place) -> str | None:
    """Why the user's patterns leave a module alone, or None."""
    names = [place.module, *(name.removesuffix(".weight") for name in place.feeds)]

    def hit(pattern: str) -> bool:
        return any(matches(pattern, name) for name in names)

    ignored = next((pattern for pattern in recipe.ignore if hit(pattern)), None)
    if ignored is not None:
        return f"ignored by {ignored!r}"
    return "no include pattern matches it" if recipe.include and not any(map(hit, recipe.include)) else None


def _limited(
    candidates: Sequence[Candidate], reasons: Mapping[str, str | None], findings: Findings, left: dict[str, str]
) -> Iterator[Candidate]:
    """The linear layers that get a threshold; `left` takes the others, with the reason."""
    for candidate in candidates:
        why = reasons[candidate.name] or unobserved(candidate, findings)
        if why is None and candidate.experts:
            why = "holds experts, whose input no module of their own takes: it can have no threshold"
        if why is None:
            yield candidate
        else:
            left[candidate.name] = why


def with_keys(config: Mapping[str, Any], keys: Iterable[Key]) -> dict[str, Any]:
    """A copy of a config in which these keys say relu."""
    made = copy.deepcopy(dict(config))
    for *outer, last in keys:
        holder = made
        for name in outer:
            holder = holder.setdefault(name, {})
        holder[last] = RELU
    return made


def said_by(source: Source, modules: set[str]) -> tuple[Key, ...]:
    """The keys of config.json by which just these modules of the model become relu; empty where there are none."""
    config: Any = source.skeleton.config
    before = _kinds(source, ())
    if before is None:
        return ()
    found: list[Key] = []
    for key in _word_keys(config):
        changed = _changed(source, [key], before)
        if changed and changed <= modules:
            found.append(key)
    return tuple(found) if found and _changed(source, found, before) == modules else ()


def _word_keys(config: Any) -> Iterator[Key]:
    """Where a config, or that of a part of the model, holds words."""
    for name, value in config.to_dict().items():
        if isinstance(value, str):
            yield (name,)
        elif isinstance(value, dict) and name in config.sub_configs:
            yield from ((name, inner) for inner, word in value.items() if isinstance(word, str))


def _changed(source: Source, keys: Sequence[Key], before: Mapping[str, Any]) -> set[str] | None:
    """The modules that are others where these keys say relu; None where there's no such model, or one isn't relu."""
    after = _kinds(source, keys)
    if after is None or after.keys() != before.keys():
        return None
    changed = {name for name, (kind, _) in after.items() if kind != before[name][0]}
    return changed if all(_is_relu(after[name][1]) for name in changed) else None


def _kinds(source: Source, keys: Sequence[Key]) -> dict[str, tuple[Any, nn.Module]] | None:
    """What every module of the model is where keys say relu: its class, and the words and functions that it holds."""
    skeleton: Any = source.skeleton
    try:
        with torch.device("meta"):
            model: nn.Module = type(skeleton)(type(skeleton.config).from_dict(with_keys(source.config, keys)))
    except Exception:  # whatever a config's value does to the model's own code
        return None
    found: dict[str, tuple[Any, nn.Module]] = {}
    for name, module in model.eval().named_modules(remove_duplicate=False):
        held = {key: value for key, value in vars(module).items() if key[0] != "_"}
        words = {key: value for key, value in held.items() if isinstance(value, (str, bool))}
        words |= {key: getattr(value, "__qualname__", "") for key, value in held.items() if callable(value)}
        found[name] = ((type(module), tuple(sorted(words.items()))), module)
    return found


def _is_relu(module: nn.Module) -> bool:
    """Whether a module computes relu; whatever another one raises is no."""
    try:
        return is_relu(module, 3)
    except Exception:  # a module that takes no such tensor
        return False
