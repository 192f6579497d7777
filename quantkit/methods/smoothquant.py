"""smoothquant: what is hard about activations is moved into the weights, where it is easy."""

from collections.abc import Mapping
from typing import ClassVar

from quantkit.methods.base import Method, Parameter, number_between


class SmoothQuant(Method):
    """Channels of activations are divided by a factor, and the weights that read them multiplied; all stays float."""

    summary = "moves outlier channels of activations into the weights before a quantizer such as w8a8; folds exactly"
    paper = "Xiao et al. 2022, arXiv:2211.10438"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(
            "alpha",
            ("0.5", "auto"),
            "how much moves: s = max|X|^alpha / max|W|^(1 - alpha) a channel; auto searches the best for each group",
            number_between(0, 1),
            "a number from 0 to 1",
        ),
    )

    smooths = True

    def scheme(self, parameters: Mapping[str, str]) -> None:
        """None: layers stay in float."""
        return

    def observes(self, parameters: Mapping[str, str]) -> bool:
        """Yes: it needs the largest magnitude of every channel of the activations."""
        return True
