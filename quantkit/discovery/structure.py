"""What a decoder block does with its parameters: the results of a trace, as plain data. It needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from quantkit.errors import QuantkitError

UNTOUCHED = -1
"""The channel of a position that a fold leaves alone."""


class DiscoveryError(QuantkitError):
    """A block that cannot be traced as it is handed over."""


@dataclass(frozen=True)
class Edit:
    """One axis of one parameter, multiplied by a power of a scale for each channel.

    Attributes:
        parameter: its name inside the block.
        axis: the axis that is multiplied.
        channels: for each position along the axis its channel, or `UNTOUCHED`. Positions may share a channel (the
            heads of one group of grouped-query attention).
        power: of the scale: -1 divides (a producer), 1 multiplies (a consumer), 2 multiplies by the square (the
            consumer behind a squared ReLU).
        offset: what the block adds to the parameter before it multiplies: 1 for norms that multiply by `1 + weight`,
            else 0. The new value is `(w + offset) * s ** power - offset`.
    """

    parameter: str
    axis: int
    channels: tuple[int, ...]
    power: int
    offset: float = 0.0


@dataclass(frozen=True)
class Group:
    """Parameters that can be scaled together, channel by channel, without changing what the block computes.

    Attributes:
        name: the parameter that produces the channels.
        kind: `norm` (a 1-D gain) or `linear` (rows of a linear weight).
        channels: how many scales there are.
        producers: what is divided: the parameter called `name` first, then what its output is added to (biases).
        consumers: what is multiplied: input axes of linear weights.
    """

    name: str
    kind: str
    channels: int
    producers: tuple[Edit, ...]
    consumers: tuple[Edit, ...]


@dataclass(frozen=True)
class Refusal:
    """A norm or linear weight whose channels cannot be scaled, and the operation that forbids it."""

    parameter: str
    kind: str
    reason: str


@dataclass(frozen=True)
class LinearUse:
    """A parameter that the block multiplies with activations, as the weight of a linear layer.

    Attributes:
        parameter: its name inside the block.
        in_axis: the axis that is contracted with the activations' features.
        out_axis: the axis of the output's features.
        expert_axis: the axis of experts of a 3-D parameter, else None.
        role: `linear`, or `router` when its output chooses what runs.
        reason: why it has that role, where there is something to say.
    """

    parameter: str
    in_axis: int
    out_axis: int
    expert_axis: int | None = None
    role: str = "linear"
    reason: str = ""


@dataclass(frozen=True)
class Activation:
    """A module that computes a nonlinear function of each number between linear layers: the activation of an MLP.

    Attributes:
        module: its name inside the block.
        feeds: the parameters of linear layers whose input is zero where its output is.
        takes: the parameters of linear layers whose output it is given.
        gated: whether its output is multiplied with that of another linear layer, or of the same one's other half.
        ups: the modules that compute the other factor; empty where no module of its own does, or nothing is multiplied.
        fused: whether the other factor is a half of what the same linear layer computes.
        is_relu: whether it computes relu already.
        rectifies: whether it gives 0 for all negative numbers, as relu does, and its square.
    """

    module: str
    feeds: tuple[str, ...]
    takes: tuple[str, ...]
    gated: bool = False
    ups: tuple[str, ...] = ()
    fused: bool = False
    is_relu: bool = False
    rectifies: bool = False


@dataclass(frozen=True)
class Norm:
    """A module that normalizes rows, and whose output meets linear layers and nothing else.

    Attributes:
        module: its name inside the block.
        feeds: the parameters of these linear layers.
    """

    module: str
    feeds: tuple[str, ...]


@dataclass(frozen=True)
class Structure:
    """What `discover` found in one block.

    Attributes:
        groups: what folds, proven on two inputs.
        refusals: norms and linear weights that don't fold, with the reason.
        linears: every parameter of two or more axes that is used as a linear weight and as nothing else.
        others: the other parameters of two or more axes, and what is done with them.
        activations: the activations of its MLPs, where they were looked for.
        norms: its norms before linear layers, where they were looked for.
        unchanged: activations and norms that can't be given a relu, by the name of the module or of the parameter that
            they feed, each with the reason.
    """

    groups: tuple[Group, ...]
    refusals: tuple[Refusal, ...]
    linears: tuple[LinearUse, ...]
    others: Mapping[str, str]
    activations: tuple[Activation, ...] = ()
    norms: tuple[Norm, ...] = ()
    unchanged: Mapping[str, str] = field(default_factory=dict)
