"""int8: weights in 8-bit integers, activations untouched."""

from collections.abc import Mapping
from typing import ClassVar

from quantkit.methods.base import WEIGHT_RANGE, Method, Parameter
from quantkit.scheme import Scheme


class Int8(Method):
    """Int8 weights, one scale a row or a group of 128; activations stay in float (W8A16)."""

    summary = "int8 weights only: half of bf16's bytes, activations in float"
    paper = "Nagel et al. 2021, arXiv:2106.08295 (symmetric weights, ranges by absmax or MSE)"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("group", ("channel", "128"), "one scale a row, or one for each 128 weights of a row"),
        WEIGHT_RANGE,
    )
    quantizes = True

    def scheme(self, parameters: Mapping[str, str]) -> Scheme:
        """Int8 weights by row or group, float activations."""
        group = parameters["group"]
        return Scheme("int8", None if group == "channel" else int(group), weight_range=parameters["weight_range"])
