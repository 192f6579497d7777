"""llm-int8: int8 weights and activations, but for the features in which activations are large."""

from collections.abc import Mapping
from typing import ClassVar

from quantkit.methods.base import POSITIVE, Method, Parameter
from quantkit.scheme import Scheme


class LLMInt8(Method):
    """Int8 weights by row and int8 activations by token; features with an outlier in float.

    They are found at run time, and their weights are decoded from int8 (as in bitsandbytes); or in calibration, and
    their weights are kept in float too (the paper's equation 8, whose weights are never quantized where an outlier is).
    """

    summary = "int8 weights and activations, with features that hold an outlier multiplied in float"
    paper = "Dettmers et al. 2022, arXiv:2208.07339"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(
            "threshold",
            ("6.0",),
            "the magnitude from which an activation is an outlier, which keeps its feature in float for the whole call",
            POSITIVE,
            "another positive number",
        ),
        Parameter(
            "outlier_weight",
            ("int8", "float"),
            "what outliers are multiplied with: the int8 weight; or the float one, kept in the columns in which "
            "calibration data reached the threshold",
        ),
    )
    quantizes = True

    def scheme(self, parameters: Mapping[str, str]) -> Scheme:
        """Int8 weights by row, int8 activations by token, outliers from the threshold in float."""
        columns = 0 if parameters["outlier_weight"] == "float" else None
        return Scheme(
            "int8", activation_dtype="int8", threshold=float(parameters["threshold"]), outlier_columns=columns
        )
