"""int4: weights in 4-bit integers, activations untouched."""

from collections.abc import Mapping
from typing import ClassVar

from quantkit.methods.base import WEIGHT_RANGE, Method, Parameter
from quantkit.scheme import Scheme


class Int4(Method):
    """Int4 weights, one scale for a group of 128 or a row; activations stay in float (W4A16)."""

    summary = "int4 weights only: a quarter of bf16's bytes, activations in float"
    paper = (
        "Nagel et al. 2021, arXiv:2106.08295 (rounding to nearest, symmetric weights, ranges by MSE); "
        "groups as in GPTQ, arXiv:2210.17323"
    )
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("group", ("128", "channel"), "one scale for each 128 weights of a row, or one a row"),
        Parameter(WEIGHT_RANGE.name, ("mse", "absmax"), WEIGHT_RANGE.help),
    )
    quantizes = True

    def scheme(self, parameters: Mapping[str, str]) -> Scheme:
        """Int4 weights by group or row, float activations."""
        group = parameters["group"]
        return Scheme("int4", None if group == "channel" else int(group), weight_range=parameters["weight_range"])
