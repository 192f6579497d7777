"""fp8: 8-bit floating point, weights alone or with activations."""

from collections.abc import Mapping
from typing import ClassVar

from quantkit.methods.base import WEIGHT_RANGE, Method, Parameter
from quantkit.scheme import Scheme

TORCH_DTYPE = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


class FP8(Method):
    """FP8 weights, one scale a row; with `scheme=dynamic` activations too, one scale a token, found at run time."""

    summary = "FP8 weights (E4M3 or E5M2), with activations by token or alone"
    paper = "Micikevicius et al. 2022, arXiv:2209.05433"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("scheme", ("dynamic", "weight-only"), "quantize activations too, one scale a token; or weights only"),
        Parameter(
            "dtype", ("e4m3", "e5m2"), "4 exponent and 3 mantissa bits (largest 448), or 5 and 2 (largest 57344)"
        ),
        WEIGHT_RANGE,
    )
    quantizes = True

    def scheme(self, parameters: Mapping[str, str]) -> Scheme:
        """FP8 weights by row; FP8 activations by token when dynamic."""
        dtype = TORCH_DTYPE[parameters["dtype"]]
        activation = dtype if parameters["scheme"] == "dynamic" else None
        return Scheme(dtype, activation_dtype=activation, weight_range=parameters["weight_range"])
