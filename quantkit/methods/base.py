"""What a method is: its name, parameters and paper, and the scheme that it gives a linear layer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from quantkit.scheme import Scheme


@dataclass(frozen=True)
class Parameter:
    """One parameter of a step: its name, the values that it takes (the first is the default), and what it means."""

    name: str
    choices: tuple[str, ...]
    help: str

    @property
    def default(self) -> str:
        """The value when none is given."""
        return self.choices[0]


WEIGHT_RANGE = Parameter(
    "weight_range",
    ("absmax", "mse"),
    "how a row's range is chosen: its largest magnitude, or the range of least squared error",
)


class Method(ABC):
    """One way to compress a model. Quantizers say so and give a scheme.

    Attributes:
        summary: one line for `quantkit methods`.
        paper: where it is described.
        parameters: everything that a step may set.
        quantizes: whether it replaces linear layers by quantized ones (at most one such step for each layer).
        observes: whether it needs calibration data.
    """

    summary: ClassVar[str]
    paper: ClassVar[str]
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    quantizes: ClassVar[bool] = False
    observes: ClassVar[bool] = False

    @abstractmethod
    def scheme(self, parameters: Mapping[str, str]) -> Scheme | None:
        """The scheme that these parameters ask for, or None for a transform that leaves layers in float."""
