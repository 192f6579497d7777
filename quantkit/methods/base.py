"""What a method is: its name, parameters and paper, and the scheme that it gives a linear layer."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from quantkit.scheme import Scheme


@dataclass(frozen=True)
class Parameter:
    """One parameter of a step: its name, the values that it takes (the first is the default), and what it means.

    Attributes:
        name: what stands before the `=`.
        choices: the values that it takes, word for word.
        help: one phrase for `quantkit methods`.
        check: whether a text beyond the choices is a value too; None where there is no other.
        other: what such a text is, as in "a number from 0 to 1".
    """

    name: str
    choices: tuple[str, ...]
    help: str
    check: Callable[[str], bool] | None = None
    other: str = ""

    @property
    def default(self) -> str:
        """The value when none is given."""
        return self.choices[0]

    @property
    def values(self) -> str:
        """Every value that it takes, in words: `absmax|mse`, or `0.5|auto, or a number from 0 to 1`."""
        words = "|".join(self.choices)
        return f"{words}, or {self.other}" if self.other else words

    def takes(self, value: str) -> bool:
        """Whether that text is a value of this parameter."""
        return value in self.choices or (self.check is not None and self.check(value))


def number_between(low: float, high: float, *, open_ends: bool = False) -> Callable[[str], bool]:
    """A function that says whether a text is a decimal number from low to high (strictly between with open ends)."""

    def check(text: str) -> bool:
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?", text):
            return False
        value = float(text)
        return low < value < high if open_ends else low <= value <= high

    return check


POSITIVE = number_between(0, math.inf, open_ends=True)

WEIGHT_RANGE = Parameter(
    "weight_range",
    ("absmax", "mse"),
    "how the range of a row (or block, or the whole weight) is chosen: its largest magnitude, or least squared error",
)
ACTIVATION_RANGE = Parameter(
    "activation_range",
    ("absmax", "percentile", "mse"),
    "how a static range of activations is chosen from calibration data: the largest magnitude, a high percentile of "
    "the magnitudes, or least squared error",
)


class Method(ABC):
    """One way to compress a model. Quantizers say so and give a scheme; everything else is a transform.

    Attributes:
        summary: one line for `quantkit methods`.
        paper: where it is described.
        parameters: everything that a step may set.
        cost: what it cost in the papers, for methods of which that must be said; or empty.
        quantizes: whether it replaces linear layers by quantized ones (at most one such step in a recipe).
        prunes: whether it sets weights to zero.
        trains: whether it trains float weights.
        smooths: whether it moves factors between weights.
        rectifies: whether it changes activation functions.
        thresholds: whether it zeroes what is small in the input of linear layers.
    """

    summary: ClassVar[str]
    paper: ClassVar[str]
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    cost: ClassVar[str] = ""
    quantizes: ClassVar[bool] = False
    prunes: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    smooths: ClassVar[bool] = False
    rectifies: ClassVar[bool] = False
    thresholds: ClassVar[bool] = False

    @abstractmethod
    def scheme(self, parameters: Mapping[str, str]) -> Scheme | None:
        """The scheme that these parameters ask for, or None for a transform that leaves layers in float.

        Raises:
            RecipeError: the parameters contradict one another.
        """

    def observes(self, parameters: Mapping[str, str]) -> bool:
        """Whether it needs calibration data: where its scheme stores something of the activations."""
        scheme = self.scheme(parameters)
        return scheme is not None and scheme.needs_data

    def reports(self, parameters: Mapping[str, str]) -> bool:
        """Whether it has more to report when there are calibration data: what needs them has."""
        return self.observes(parameters)
