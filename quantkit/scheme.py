"""Scheme: what the numbers of one linear layer look like. It needs no torch."""

import sys
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.errors import RecipeError
from quantkit.sparsity import is_packable, tiles_of

WEIGHT_DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")
FOUR_BITS = ("int4", "uint4")
"""Dtypes of weights in 4 bits; `uint4` is what has zero points, and is read and not written."""
FLOAT = "float"
"""In place of a code's dtype: the weight's own dtype. Such weights are not quantized, only packed for their zeros."""
WEIGHT_RANGES = ("absmax", "mse")
WEIGHT_GRANULARITIES = ("row", "tensor", "block")
ACTIVATIONS = ("token", "tensor", "tensor-static", "group")
ACTIVATION_RANGES = ("absmax", "percentile", "mse")
BLOCK = 128
"""Rows and columns of a weight's block that share a scale, and the activations of one token that do."""

LARGEST = sys.float_info.max
"""The largest threshold; JSON can write larger whole numbers, which are no floats."""
LARGEST_COUNT = 2**31
"""Of weights that share a scale, and of columns."""


@dataclass(frozen=True)
class Scheme:
    """What the numbers of one linear layer look like.

    Attributes:
        weight_dtype: torch's name of the stored codes: `int8`, `float8_e4m3fn` or `float8_e5m2`; or `int4`
            for 4 bits, and of checkpoints that others wrote `uint4`, with a zero point beside every scale; or with
            sparsity `float`, which is the dtype that the weight has anyway.
        group_size: None for the scales of `weight_granularity`, else one for each run of this many weights along K
            (scale [N, K / group_size]).
        activation_dtype: None when only weights are quantized, else the dtype that activations are quantized to.
        weight_range: how the range of a row is chosen: `absmax`, or `mse` (least squared error). It changes the
            scales, not the layout.
        weight_granularity: `row` (scale [N, 1]), `tensor` (scale [1]), or `block` (one for each 128 x 128 weights,
            scale [ceil(N / 128), ceil(K / 128)]).
        activation: what shares a scale among activations: a `token`, or a `group` of 128 features of one token, or the
            whole `tensor`, all found anew at each call (dynamic); or `tensor-static`, one stored number.
        activation_range: how that stored number was chosen in calibration; like `weight_range` no matter of layout.
        threshold: None, or where LLM.int8 begins: features in which any token reaches it stay in float.
        outlier_columns: None, or with a threshold how many columns of the weight lie in float beside the codes: those
            in which calibration data reached it. 0 where nothing was counted yet, as in a recipe.
        sparsity: None, or `2:4` where two of every four neighbours along K are zero and are not stored; or a pattern
            V:2:M such as `64:2:8`, of which only what it keeps is stored, too (see `sparsity`).
    """

    weight_dtype: str
    group_size: int | None = None
    activation_dtype: str | None = None
    weight_range: str = "absmax"
    weight_granularity: str = "row"
    activation: str = "token"
    activation_range: str = "absmax"
    threshold: float | None = None
    outlier_columns: int | None = None
    sparsity: str | None = None

    def __post_init__(self) -> None:
        self._check_words()
        self._check_weights()
        self._check_activations()
        self._check_threshold()
        self._check_outlier_columns()
        self._check_sparsity()

    def _check_words(self) -> None:
        for what, value, known in (
            ("weight dtype", self.weight_dtype, (*WEIGHT_DTYPES, *FOUR_BITS, FLOAT)),
            ("weight range", self.weight_range, WEIGHT_RANGES),
            ("weight granularity", self.weight_granularity, WEIGHT_GRANULARITIES),
            ("activation granularity", self.activation, ACTIVATIONS),
            ("activation range", self.activation_range, ACTIVATION_RANGES),
        ):
            if value not in known:
                raise RecipeError(f"{what} {value!r} is unknown; use one of {', '.join(known)}")

    def _check_weights(self) -> None:
        size = self.group_size
        is_count = isinstance(size, int) and not isinstance(size, bool) and 0 < size <= LARGEST_COUNT
        if size is not None and (not is_count or self.activation_dtype is not None or self.weight_granularity != "row"):
            raise RecipeError(
                f"group size {size!r} needs to be a positive whole number, with weights by row and activations in "
                "float; leave it out for one scale a row"
            )

    def _check_activations(self) -> None:
        if self.activation_dtype not in (None, self.weight_dtype):
            raise RecipeError(
                f"activations in {self.activation_dtype} cannot meet weights in {self.weight_dtype}: give both the "
                "same dtype, or quantize weights only"
            )
        if self.activation_dtype in FOUR_BITS:
            raise RecipeError(f"activations in {self.activation_dtype} are not multiplied here; leave them in float")
        if self.activation_dtype is None and self.activation != "token":
            raise RecipeError(
                f"activations by {self.activation} are never used where only weights are quantized; give an "
                "activation dtype, or leave it out"
            )
        blocks = (self.weight_granularity == "block", self.activation == "group")
        if any(blocks) and not (all(blocks) and self.activation_dtype not in (None, "int8")):
            raise RecipeError(
                f"{self.weight_dtype} weights by {self.weight_granularity} with activations by {self.activation} are "
                "no scheme: blocks of weights go with groups of activations, both in fp8"
            )
        if self.activation_range != "absmax" and not self.is_static:
            raise RecipeError(
                f"activation_range={self.activation_range} chooses a stored scale, and here activations are never "
                "given one; leave it out, or ask for static activations (w8a8:activation=tensor-static or "
                "fp8:scheme=static)"
            )

    def _check_threshold(self) -> None:
        value = self.threshold
        if value is None:
            return
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= LARGEST
        row = self.weight_granularity == "row"
        if not number or self.activation_dtype != "int8" or self.activation != "token" or not row:
            raise RecipeError(
                f"threshold {value!r} needs to be a positive number, with int8 weights by row and int8 activations "
                "by token"
            )

    def _check_outlier_columns(self) -> None:
        value = self.outlier_columns
        if value is None:
            return
        is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT
        if not is_count or self.threshold is None:
            raise RecipeError(
                f"outlier_columns {value!r} needs to be a whole number from 0, with the threshold of LLM.int8"
            )

    def _check_sparsity(self) -> None:
        if self.sparsity is not None and not is_packable(self.sparsity):
            raise RecipeError(
                f"sparsity {self.sparsity!r} is unknown; use 2:4 or V:2:M such as 64:2:8, or leave it out"
            )
        if self.sparsity is not None and (self.outlier_columns is not None or self.weight_dtype == "uint4"):
            what = "zero points" if self.weight_dtype == "uint4" else "outlier columns in float"
            raise RecipeError(f"{self.sparsity} sparse weights with {what} are not packed here; leave one of both out")
        plain = Scheme.__dataclass_fields__
        alike = all(getattr(self, name) == plain[name].default for name in ("weight_range", "weight_granularity"))
        scaled = self.group_size is not None or self.activation_dtype is not None or not alike
        if self.is_float and (self.sparsity is None or scaled):
            raise RecipeError(
                "weights in float have nothing to say but their sparsity: give sparsity 2:4 and no scales, or a dtype "
                f"of codes ({', '.join((*WEIGHT_DTYPES, *FOUR_BITS))})"
            )

    @property
    def is_float(self) -> bool:
        """Whether weights are in float, without a scale: they are packed, and not quantized."""
        return self.weight_dtype == FLOAT

    @property
    def tiles(self) -> tuple[int, int] | None:
        """V and M where weights are packed by V:2:M, or None."""
        return tiles_of(self.sparsity)

    def shared_columns(self, in_features: int) -> int:
        """Of how many columns the indices of a packed weight speak: all K by 2:4, and by V:2:M 4 of every M."""
        return in_features if self.tiles is None else 4 * (in_features // self.tiles[1])

    @property
    def bits(self) -> int:
        """Bits of one stored code; 16 of weights in float, whatever their dtype."""
        if self.is_float:
            return 16
        return 4 if self.weight_dtype in FOUR_BITS else 8

    @property
    def code_dtype(self) -> str:
        """The torch dtype, by name, that a code lies in where it isn't packed: int8 also for 4 bits.

        Of weights in float it is what stands in for a dtype, and no dtype's name.
        """
        return "int8" if self.weight_dtype in FOUR_BITS else self.weight_dtype

    @property
    def is_static(self) -> bool:
        """Whether a scale of the activations is stored, so that calibration must find it."""
        return self.activation_dtype is not None and self.activation == "tensor-static"

    @property
    def needs_data(self) -> bool:
        """Whether something is stored that only calibration finds: a scale of the activations, or outlier columns."""
        return self.is_static or self.outlier_columns is not None

    @property
    def label(self) -> str:
        """A short name for tables, such as `int8 g128` or `2:4 float8_e4m3fn, activations per token`."""
        return self._label if self.sparsity is None else f"{self.sparsity} {self._label}"

    @property
    def _label(self) -> str:
        """The name without the sparsity."""
        group = "" if self.group_size is None else f" g{self.group_size}"
        group += "" if self.weight_granularity == "row" else f" per {self.weight_granularity}"
        if self.activation_dtype is None:
            return f"{self.weight_dtype}{group}"
        outliers = "" if self.threshold is None else f", outliers from {self.threshold:g} in float"
        outliers += "" if self.outlier_columns is None else ", their weights too"
        return f"{self.weight_dtype}{group}, activations per {self.activation}{outliers}"

    def to_dict(self) -> dict[str, Any]:
        """The scheme as plain JSON values; `Scheme(**d)` gives it back."""
        return asdict(self)
