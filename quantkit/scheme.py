"""Scheme: what the numbers of one linear layer look like. It needs no torch."""

from dataclasses import asdict, dataclass
from typing import Any

from quantkit.errors import RecipeError

WEIGHT_DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")
WEIGHT_RANGES = ("absmax", "mse")


@dataclass(frozen=True)
class Scheme:
    """What the numbers of one linear layer look like.

    Attributes:
        weight_dtype: torch's name of the stored codes: `int8`, `float8_e4m3fn` or `float8_e5m2`.
        group_size: None for one scale a row (scale [N, 1]), else one for each run of this many weights along K
            (scale [N, K / group_size]).
        activation_dtype: None when only weights are quantized, else the dtype that activations are quantized to, one
            scale a token, found anew at each call (dynamic).
        weight_range: how the range of a row is chosen: `absmax`, or `mse` (least squared error). It changes the
            scales, not the layout.
    """

    weight_dtype: str
    group_size: int | None = None
    activation_dtype: str | None = None
    weight_range: str = "absmax"

    def __post_init__(self) -> None:
        if self.weight_dtype not in WEIGHT_DTYPES:
            raise RecipeError(f"weight dtype {self.weight_dtype!r} is unknown; use one of {', '.join(WEIGHT_DTYPES)}")
        if self.activation_dtype not in (None, self.weight_dtype):
            raise RecipeError(
                f"activations in {self.activation_dtype} cannot meet weights in {self.weight_dtype}: give both the "
                "same dtype, or quantize weights only"
            )
        size = self.group_size
        is_count = isinstance(size, int) and not isinstance(size, bool) and size > 0
        if size is not None and (not is_count or self.activation_dtype is not None):
            raise RecipeError(
                f"group size {size!r} needs to be a positive whole number, and activations in float; "
                "leave it out for one scale a row"
            )
        if self.weight_range not in WEIGHT_RANGES:
            raise RecipeError(f"weight range {self.weight_range!r} is unknown; use one of {', '.join(WEIGHT_RANGES)}")

    @property
    def bits(self) -> int:
        """Bits of one stored code."""
        return 8

    @property
    def label(self) -> str:
        """A short name for tables, such as `int8 g128` or `float8_e4m3fn, activations per token`."""
        group = "" if self.group_size is None else f" g{self.group_size}"
        activation = "" if self.activation_dtype is None else ", activations per token"
        return f"{self.weight_dtype}{group}{activation}"

    def to_dict(self) -> dict[str, Any]:
        """The scheme as plain JSON values; `Scheme(**d)` gives it back."""
        return asdict(self)
