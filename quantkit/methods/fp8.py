"""fp8: 8-bit floating point, weights alone or with activations."""

from collections.abc import Mapping
from typing import ClassVar

from quantkit.methods.base import ACTIVATION_RANGE, WEIGHT_RANGE, Method, Parameter
from quantkit.scheme import Scheme

TORCH_DTYPE = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
GRANULARITIES = {
    "dynamic": ("row", "token"),
    "static": ("tensor", "tensor-static"),
    "block": ("block", "group"),
    "weight-only": ("row", "token"),  # activations by token is what a scheme says that has none
}
"""What shares a scale among weights, and among activations."""


class FP8(Method):
    """FP8 weights and activations by row and token, by tensor (static), or by block and group; or weights alone."""

    summary = "FP8 weights (E4M3 or E5M2), with FP8 activations or alone"
    paper = "Micikevicius et al. 2022, arXiv:2209.05433; blocks of 128 x 128 as in DeepSeek-V3, arXiv:2412.19437"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(
            "scheme",
            ("dynamic", "static", "block", "weight-only"),
            "one scale a row and, found at run time, one a token; one scale a weight and one for its inputs, stored "
            "after calibration; one for 128 x 128 weights and, found at run time, one for 128 features of a token; or "
            "weights by row and activations in float",
        ),
        Parameter(
            "dtype", ("e4m3", "e5m2"), "4 exponent and 3 mantissa bits (largest 448), or 5 and 2 (largest 57344)"
        ),
        WEIGHT_RANGE,
        ACTIVATION_RANGE,
    )
    quantizes = True

    def scheme(self, parameters: Mapping[str, str]) -> Scheme:
        """FP8 weights, and FP8 activations unless weights only."""
        dtype, asked = TORCH_DTYPE[parameters["dtype"]], parameters["scheme"]
        weights, activations = GRANULARITIES[asked]
        return Scheme(
            dtype,
            activation_dtype=None if asked == "weight-only" else dtype,
            weight_range=parameters["weight_range"],
            weight_granularity=weights,
            activation=activations,
            activation_range=parameters["activation_range"],
        )
