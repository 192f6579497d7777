"""What came of the work on a model: its quantized layers, its smoothing groups, and what a reader should know."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerReport:
    """One quantized linear layer.

    Attributes:
        module: its name.
        scheme: its scheme, in words.
        shape: N and K.
        bits_per_weight: stored bits, scales included, over weights.
        weight_error: Frobenius norm of what was lost over that of the float weight.
        outlier_columns: how many columns of the weight stay in float, where the scheme has such.
    """

    module: str
    scheme: str
    shape: tuple[int, int]
    bits_per_weight: float
    weight_error: float
    outlier_columns: int | None = None


@dataclass(frozen=True)
class PrunedReport:
    """One linear layer of which weights were set to zero.

    Attributes:
        module: its name.
        criterion: by which: `sparsegpt`, `wanda` or `magnitude`.
        pattern: as in the recipe, such as `2:4`.
        shape: N and K.
        sparsity: the share of its weights that are zero.
        weight_error: Frobenius norm of the change of the float weight over that of the weight.
        output_error: the same of the layer's output on calibration data (for Wanda on a sample of its tokens); None
            where none was observed.
    """

    module: str
    criterion: str
    pattern: str
    shape: tuple[int, int]
    sparsity: float
    weight_error: float
    output_error: float | None = None


@dataclass(frozen=True)
class GroupReport:
    """What became of one smoothing group.

    Attributes:
        block: the block's name.
        producer: the parameter that is divided.
        kind: `norm` or `linear`.
        consumers: the parameters that are multiplied.
        state: `folded`, `undone`, `kept` (a search found that smoothing doesn't help), `skipped` or `refused`.
        alpha: the migration strength, or None where nothing was folded.
        error: the largest change of the float block's output over what rounding explains: folded when at most 1.
        reason: why it isn't folded, or empty.
    """

    block: str
    producer: str
    kind: str
    consumers: tuple[str, ...]
    state: str
    alpha: float | None = None
    error: float | None = None
    reason: str = ""


@dataclass
class Outcome:
    """Everything that the work itself tells; the report adds what the plan and the disk know."""

    layers: list[LayerReport] = field(default_factory=list)
    groups: list[GroupReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pruned: list[PrunedReport] = field(default_factory=list)
