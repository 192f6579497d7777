"""w8a8: weights and activations in 8-bit integers."""

from collections.abc import Mapping
from typing import ClassVar

from quantkit.methods.base import WEIGHT_RANGE, Method, Parameter
from quantkit.scheme import Scheme


class W8A8(Method):
    """Int8 weights, one scale a row; int8 activations, one scale a token, found at run time."""

    summary = "int8 weights and int8 activations: integer matrix products"
    paper = (
        "Xiao et al. 2022, arXiv:2211.10438 (the O1 setting, without smoothing); vector-wise int8 of arXiv:2208.07339"
    )
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("activation", ("token",), "granularity of the activations' scales: one a token, dynamic"),
        WEIGHT_RANGE,
    )
    quantizes = True

    def scheme(self, parameters: Mapping[str, str]) -> Scheme:
        """Int8 weights by row, int8 activations by token."""
        return Scheme("int8", activation_dtype="int8", weight_range=parameters["weight_range"])
