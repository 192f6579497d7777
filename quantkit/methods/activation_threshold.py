"""activation-threshold: what is small in a linear layer's input is zeroed, so that weights need not be read for it."""

from collections.abc import Mapping
from typing import ClassVar

from quantkit.methods.base import Method, Parameter, number_between


class ActivationThreshold(Method):
    """Weights and activation functions stay as they are; each linear layer gets a threshold for its input."""

    summary = "zeroes the share `target` of each linear layer's input that is smallest; nothing is trained"
    paper = "Liu et al. 2024, arXiv:2408.14690 (TEAL, section 4.1, here the same share in every layer)"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(
            "target",
            ("0.4",),
            "the share of a layer's input that is zeroed: its threshold is this quantile of |x| on calibration data",
            number_between(0, 1, open_ends=True),
            "another number between 0 and 1",
        ),
    )
    thresholds = True

    def scheme(self, parameters: Mapping[str, str]) -> None:
        """None: layers stay in float."""
        return

    def observes(self, parameters: Mapping[str, str]) -> bool:
        """Yes: thresholds are found on data."""
        return True
