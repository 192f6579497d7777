"""w8a8: weights and activations in 8-bit integers."""

from collections.abc import Mapping
from typing import ClassVar

from quantkit.methods.base import ACTIVATION_RANGE, WEIGHT_RANGE, Method, Parameter
from quantkit.scheme import Scheme


class W8A8(Method):
    """Int8 weights, one scale a row; int8 activations by token or by tensor, found at run time or in calibration."""

    summary = "int8 weights and int8 activations: integer matrix products"
    paper = (
        "Xiao et al. 2022, arXiv:2211.10438 (token, tensor and tensor-static are its O1, O2 and O3, here with weights "
        "by row); vector-wise int8 of arXiv:2208.07339"
    )
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(
            "activation",
            ("token", "tensor", "tensor-static"),
            "what shares a scale among activations: a token, or all tokens of a call, both found at run time; or one "
            "scale, stored after calibration",
        ),
        WEIGHT_RANGE,
        ACTIVATION_RANGE,
    )
    quantizes = True

    def scheme(self, parameters: Mapping[str, str]) -> Scheme:
        """Int8 weights by row, int8 activations by token or tensor."""
        return Scheme(
            "int8",
            activation_dtype="int8",
            weight_range=parameters["weight_range"],
            activation=parameters["activation"],
            activation_range=parameters["activation_range"],
        )
