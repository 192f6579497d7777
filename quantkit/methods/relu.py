"""relu: activations of MLPs become relu, and norms get one behind them, so that much of what is multiplied is zero."""

import re
from collections.abc import Mapping
from typing import ClassVar

from quantkit.methods.base import Method, Parameter, number_between

AUTO = "auto"
SHARE = 0.9
"""The share of pre-activations that a shift found in calibration turns off, where none is given."""
_SHARE = number_between(0, 1, open_ends=True)

COST = (
    "relu in the place of another activation costs quality until the model is trained again: Llama-7B's zero-shot mean "
    "of 68.4 was 67.1 (stage 1, 62 % zeros before down projections) and 66.4 (stage 2) after fine-tuning on tens of "
    "billions of tokens (Mirzadeh et al. 2023, arXiv:2310.04564, table 1); measure yours with `quantkit eval`"
)


def is_shift(text: str) -> bool:
    """Whether a text says a shift: `auto:S` with S between 0 and 1, or a number from -1000 to 1000."""
    if text.startswith(f"{AUTO}:"):
        return _SHARE(text.removeprefix(f"{AUTO}:"))
    return re.fullmatch(r"-?[0-9]{1,4}(\.[0-9]{1,9})?", text) is not None and abs(float(text)) <= 1000


def shift_of(parameters: Mapping[str, str]) -> float | None:
    """The shift that a step gives, or None where calibration finds it."""
    text = parameters["shift"]
    return None if text.startswith(AUTO) else float(text)


def share_of(parameters: Mapping[str, str]) -> float:
    """The share of pre-activations that a shift found in calibration turns off."""
    return float(parameters["shift"].partition(":")[2] or SHARE)


class Relu(Method):
    """Weights stay as they are; what the model does between its linear layers changes."""

    summary = (
        "puts relu in the place of the MLPs' activation (stage 1), and behind norms (stage 2): zeros to be skipped"
    )
    paper = (
        "Mirzadeh et al. 2023, arXiv:2310.04564 (relufication, sections 4.1 and 4.2; shifted relu, section 5.3); Song "
        "et al. 2024, arXiv:2406.05955 (dReLU)"
    )
    cost = COST
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(
            "stage",
            ("1", "2"),
            "1: the activation of every MLP becomes relu; 2: norms before linear layers get a relu behind them, too",
        ),
        Parameter(
            "shift",
            ("0", AUTO),
            "b of relu(x - b) in MLPs; auto finds for each the b that turns 0.9 of its pre-activations off on "
            "calibration data (0 where more are off without)",
            is_shift,
            "auto:S for another share S, or a number",
        ),
        Parameter(
            "variant", ("relu", "drelu"), "drelu: of gated MLPs the up projection's output goes through relu, too"
        ),
    )
    rectifies = True

    def scheme(self, parameters: Mapping[str, str]) -> None:
        """None: layers stay in float."""
        return

    def observes(self, parameters: Mapping[str, str]) -> bool:
        """Whether a shift is to be found."""
        return shift_of(parameters) is None

    def reports(self, parameters: Mapping[str, str]) -> bool:
        """Yes: with data the report says how much is zero."""
        return True
