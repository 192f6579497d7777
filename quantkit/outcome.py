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


@dataclass(frozen=True)
class ChangedActivation:
    """One module whose input or output is put through something that the model hadn't.

    Attributes:
        module: its name.
        kind: `activation` (relu stands in its place), `norm` or `up` (relu comes behind it), or `threshold` (what is
            small in its input is zeroed).
        value: the shift of the relu, or the threshold.
        feeds: the linear layers that see its zeros; of a threshold none but itself.
    """

    module: str
    kind: str
    value: float
    feeds: tuple[str, ...] = ()


@dataclass(frozen=True)
class SparsityReport:
    """How much of a linear layer's input is zero on calibration data, where the recipe changes activations.

    Attributes:
        module: its name, of experts that of the parameter that holds them.
        shape: N and K.
        before: the share of zeros in the model as it came, by gamma: in all of so many tokens that follow one another
            (`1`: in a token); of experts, whose tokens don't, for `1` alone.
        after: the same in the model as it is written.
        load: how many times a token is multiplied with it: 1, or of experts how many a token is sent to on average.
        weight_bits: of a stored weight, scales aside.
    """

    module: str
    shape: tuple[int, int]
    before: dict[str, float]
    after: dict[str, float]
    load: float
    weight_bits: float

    @property
    def flops(self) -> float:
        """Operations of a token, none of them spared: 2 N K."""
        return 2.0 * self.shape[0] * self.shape[1] * self.load

    @property
    def nbytes(self) -> float:
        """Bytes of the weights that a token needs, none of them spared."""
        return self.shape[0] * self.shape[1] * self.load * self.weight_bits / 8

    @property
    def spared(self) -> float:
        """The share of both that a token's zeros spare: a column of the weight for each."""
        return self.after.get("1", 0.0)


@dataclass
class Outcome:
    """Everything that the work itself tells; the report adds what the plan and the disk know."""

    layers: list[LayerReport] = field(default_factory=list)
    groups: list[GroupReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pruned: list[PrunedReport] = field(default_factory=list)
    activations: list[ChangedActivation] = field(default_factory=list)
    sparsity: list[SparsityReport] = field(default_factory=list)
