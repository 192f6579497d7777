"""Recipe and Step: what is to be done to a model, validated before a weight is read.

A *step* is a method with its parameters, written `name[:key=value[,key=value...]]`. A *recipe* is an ordered list of
steps with include and ignore patterns and a seed; it is stored in the checkpoint that it made. Both are frozen, and
neither needs torch.
"""

import fnmatch
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.errors import RecipeError
from quantkit.methods import METHODS, method_class
from quantkit.scheme import Scheme
from quantkit.untrusted import fits, regex_trouble, shown

LARGEST_RECIPE = 2**20
"""Bytes of the largest file that is read as a recipe."""

SEEDS = (-(2**63), 2**64 - 1)
"""The smallest and the largest that torch takes."""

RECIPE_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Step:
    """A method's name with a value for every parameter (defaults filled in).

    Raises:
        RecipeError: the method, a parameter or a value is unknown, or the values contradict one another.
    """

    name: str
    parameters: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise RecipeError(
                f"step {self.name!r} is unknown; use one of {', '.join(METHODS)} (see `quantkit methods`)"
            )
        method = method_class(self.name)
        known = {parameter.name: parameter for parameter in method.parameters}
        values = {name: parameter.default for name, parameter in known.items()}
        for key, value in self.parameters.items():
            if key not in known:
                expected = ", ".join(known) or "none"
                raise RecipeError(f"step {self.name!r} has no parameter {key!r}; it takes: {expected}")
            if not known[key].takes(value):
                raise RecipeError(
                    f"{key}={value!r} is not a value for step {self.name!r}; use {key}={known[key].values}"
                )
            values[key] = value
        try:
            method().scheme(values)
        except RecipeError as error:
            raise RecipeError(f"step {self.name!r}: {error}") from error
        object.__setattr__(self, "parameters", values)

    @classmethod
    def parse(cls, text: str) -> "Step":
        """The step written as `name[:key=value[,key=value...]]`."""
        name, colon, rest = text.partition(":")
        parameters: dict[str, str] = {}
        for item in rest.split(",") if colon else ():
            key, equals, value = item.partition("=")
            if not (key and equals and value):
                raise RecipeError(f"step {text!r}: {item!r} is not key=value; write name:key=value,key=value")
            if key in parameters:
                raise RecipeError(f"step {text!r} gives {key!r} twice; give it once")
            parameters[key] = value
        return cls(name, parameters)

    def __str__(self) -> str:
        """The step with every parameter spelled out."""
        values = ",".join(f"{key}={value}" for key, value in self.parameters.items())
        return f"{self.name}:{values}" if values else self.name


@dataclass(frozen=True)
class Recipe:
    """Ordered steps, the modules they may touch, and the seed of everything random.

    Attributes:
        steps: transforms first, then at most one quantizer.
        include: patterns of module names; when there are any, only what they match is quantized.
        ignore: patterns of module names that stay float.
        seed: seed of every random choice.
        dataset: what was calibrated on, or None when no step observed anything.
    """

    steps: tuple[Step, ...]
    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    seed: int = 0
    dataset: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.steps:
            raise RecipeError("a recipe needs at least one step; give -m STEP or --recipe NAME|FILE")
        quantizers = [step.name for step in self.steps if method_class(step.name).quantizes]
        if len(quantizers) > 1:
            raise RecipeError(
                f"the steps {' and '.join(quantizers)} would quantize the same layers; keep one quantizer in a recipe"
            )
        transforms = [step.name for step in self.transforms]
        late = next((step.name for step in self.steps[len(transforms) :] if step.name in transforms), None)
        if late is not None:
            raise RecipeError(
                f"the step {late} comes after {quantizers[0]}, when there is nothing in float left to work on; "
                f"write -m {late} before -m {quantizers[0]}"
            )
        smoothing = next((step for step in self.transforms if method_class(step.name).smooths), None)
        limited = self.thresholding
        if limited and smoothing and self.transforms.index(limited) < self.transforms.index(smoothing):
            raise RecipeError(
                f"the step {smoothing.name} comes after {limited.name}, and would move what its thresholds were found "
                f"on; write -m {smoothing.name} before -m {limited.name}"
            )
        once = [name for name in transforms if not method_class(name).trains]
        again = next((name for name in once if once.count(name) > 1), None)
        if again is not None:
            raise RecipeError(f"the step {again} is given {transforms.count(again)} times; give it once")
        for pattern in (*self.include, *self.ignore):
            check_pattern(pattern)
        if not SEEDS[0] <= self.seed <= SEEDS[1]:
            raise RecipeError(f"seed {shown(self.seed)} is not a number of 64 bits; give one from 0 to 2**64 - 1")

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of this recipe's quantizer, or None without one."""
        schemes = (method_class(step.name)().scheme(step.parameters) for step in self.steps)
        return next((scheme for scheme in schemes if scheme is not None), None)

    @property
    def transforms(self) -> tuple[Step, ...]:
        """The steps that rewrite float weights, in their order: all but the quantizer."""
        return tuple(step for step in self.steps if not method_class(step.name).quantizes)

    @property
    def pruning(self) -> Step | None:
        """The step that sets weights to zero, or None."""
        return next((step for step in self.transforms if method_class(step.name).prunes), None)

    @property
    def observes_pruning(self) -> bool:
        """Whether that step needs calibration data."""
        step = self.pruning
        return step is not None and method_class(step.name)().observes(step.parameters)

    @property
    def smooths(self) -> bool:
        """Whether a step moves factors between weights, for which it must be known what feeds what."""
        return any(method_class(step.name).smooths for step in self.transforms)

    @property
    def rectifying(self) -> Step | None:
        """The step that changes activation functions, or None."""
        return next((step for step in self.transforms if method_class(step.name).rectifies), None)

    @property
    def thresholding(self) -> Step | None:
        """The step that zeroes what is small in the input of linear layers, or None."""
        return next((step for step in self.transforms if method_class(step.name).thresholds), None)

    @property
    def trains(self) -> bool:
        """Whether a step trains float weights."""
        return any(method_class(step.name).trains for step in self.steps)

    @property
    def observes(self) -> bool:
        """Whether a step needs calibration data."""
        return any(method_class(step.name)().observes(step.parameters) for step in self.steps)

    @property
    def reports(self) -> bool:
        """Whether calibration data are of use, if only to the report."""
        return any(method_class(step.name)().reports(step.parameters) for step in self.steps)

    @classmethod
    def of(
        cls, steps: Sequence[str | Step], include: Sequence[str] = (), ignore: Sequence[str] = (), seed: int = 0
    ) -> "Recipe":
        """The recipe of these steps, each a `Step` or its text; a single string is one step or pattern."""
        steps = [steps] if isinstance(steps, str) else steps
        include, ignore = ([v] if isinstance(v, str) else v for v in (include, ignore))
        parsed = tuple(Step.parse(step) if isinstance(step, str) else step for step in steps)
        return cls(parsed, tuple(include), tuple(ignore), seed)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """The recipe that `to_dict` wrote."""
        known = {"steps", "include", "ignore", "seed", "dataset", "description"}
        unknown = sorted(set(values) - known)
        if unknown:
            raise RecipeError(f"a recipe has no key {unknown[0]!r}; it takes: {', '.join(sorted(known))}")
        for key in ("steps", "include", "ignore"):
            found = values.get(key, [])
            if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
                raise RecipeError(f"{key} = {shown(found)} in a recipe must be a list of strings, such as ['w8a8']")
        seed = values.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise RecipeError(f"seed = {shown(seed)} in a recipe must be a whole number")
        dataset = values.get("dataset")
        if not (dataset is None or _is_json_object(dataset)):
            raise RecipeError(f"dataset = {shown(dataset)} in a recipe must be a table of plain values; leave it out")
        recipe = cls.of(values.get("steps", []), values.get("include", ()), values.get("ignore", ()), seed)
        return cls(recipe.steps, recipe.include, recipe.ignore, seed, dataset)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values."""
        return {
            "steps": [str(step) for step in self.steps],
            "include": list(self.include),
            "ignore": list(self.ignore),
            "seed": self.seed,
            "dataset": None if self.dataset is None else dict(self.dataset),
        }

    def to_json(self) -> str:
        """The recipe as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_toml(self) -> str:
        """The recipe as TOML text (without the data set, which is a record of what happened)."""
        lines = [f"{key} = {_toml(value)}" for key, value in self.to_dict().items() if key != "dataset"]
        return "\n".join(lines) + "\n"


def _toml(value: str | int | list[str]) -> str:
    """A TOML value: JSON's strings, numbers and lists are TOML's, but for the character DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _is_json_object(value: Any) -> bool:
    """Whether JSON can say a value, and it is a table (TOML knows dates, which JSON doesn't)."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, dict)


def _is_file(path: Path) -> bool:
    """Whether a path is a file; a name that no file system takes is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def recipe_names() -> list[str]:
    """The names of the recipes that come with quantkit, sorted."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.toml"))


def load_recipe(name_or_file: str | Path) -> Recipe:
    """The recipe of that bundled name, or in that TOML or JSON file (`quantkit_recipe.json` of a checkpoint too).

    Raises:
        RecipeError: there is no such name or file, or it doesn't hold a recipe.
    """
    path = Path(name_or_file)
    if str(name_or_file) in recipe_names():
        path = RECIPE_FOLDER / f"{name_or_file}.toml"
    elif not _is_file(path):
        raise RecipeError(
            f"recipe {str(name_or_file)!r} is neither a file nor one of {', '.join(recipe_names())}; "
            "give one of these names or the path of a .toml or .json file"
        )
    try:
        if path.stat().st_size > LARGEST_RECIPE:
            raise RecipeError(f"recipe {path} has more than {LARGEST_RECIPE:,} bytes; give a file with a recipe in it")
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, OSError, RecursionError) as error:
        raise RecipeError(f"recipe {path} cannot be read as TOML or JSON: {error}; mend the file") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path} holds {type(values).__name__}, not a table with `steps`; mend the file")
    try:
        return Recipe.from_dict(values)
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error}") from error


def check_pattern(pattern: str) -> None:
    """Return nothing; raise RecipeError when the pattern is empty or a broken regular expression."""
    if not pattern or pattern == "re:":
        raise RecipeError("an empty pattern matches nothing; give a glob such as '*.mlp.*', or re:REGEX")
    if pattern.startswith("re:"):
        trouble = regex_trouble(pattern[3:])
        if trouble is not None:
            raise RecipeError(f"pattern {shown(pattern)} is not a regular expression: {trouble}; mend it")


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a module's name, or that of a module that it lies in.

    A pattern is a glob on the whole name, or after `re:` a regex from the name's start.
    """
    if pattern.startswith("re:"):
        return fits(pattern[3:], name)
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: end + 1]), pattern) for end in range(len(parts)))
