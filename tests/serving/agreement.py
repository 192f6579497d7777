"""What a server's predictions of a checkpoint may differ from ours by, and whether they do.

Distances are KL divergences in nats of next-token distributions, one a position. Three things explain a distance:

- **Q**, what quantization did: from the float model to the compressed one, both ours, in float32.
- **Flips.** A server sums in another order, so a hidden state differs by some 1e-7 of itself. Where that moves an
  activation across the border between two codes, the code changes by a whole step, and all that follows is a second
  draw of the same rounding errors. In float32 many positions see none, and agree to float32's own precision.
- **N**, what bfloat16 did to the float model: ours in float32 against ours in bfloat16. In bfloat16 every position
  sees flips.

Two independent draws of an error, each of mean Q from the float model, are 2 Q from one another (to second order KL is
a squared distance, and independent squares add). Hence the rules:

- float32: a checkpoint that is misread is wrong everywhere, and a flip is somewhere. So a quarter of the positions at
  least agree to `EXACT`, and the others are 2 Q apart at most, in the mean.
- bfloat16: the mean is at most 2 (Q + N).
"""

from dataclasses import dataclass

import torch

EXACT = 1e-6
"""Nats: what sums in another order are allowed to make of float32 log-probabilities (seen: under 1e-7)."""


@dataclass(frozen=True)
class Agreement:
    """Distances in nats from ours to the server's, the two that explain them, and how many positions agree.

    `moved` is the share of positions that are further apart than `EXACT`, `agreed` that with the same first choice.
    """

    mean: float
    quartile: float
    quantization: float
    rounding: float
    moved: float
    agreed: float

    @property
    def is_exact(self) -> bool:
        """Whether the server computes what we compute, but for codes that flipped: the rule for float32."""
        return self.quartile <= EXACT and self.mean <= 2 * self.quantization * self.moved + EXACT

    @property
    def is_explained(self) -> bool:
        """Whether rounding explains the distance: the rule for bfloat16."""
        return self.mean <= 2 * (self.quantization + self.rounding)


def distance(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each position, in nats, from log-probabilities [..., V] that are normalized anew in float64."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def compare(
    served: torch.Tensor, ours: torch.Tensor, exact: torch.Tensor, base: torch.Tensor, base_rounded: torch.Tensor
) -> Agreement:
    """How a server's log-probabilities [B, T, V] compare.

    Args:
        served: the server's, of the compressed checkpoint.
        ours: ours, of the same checkpoint in the server's dtype.
        exact: ours, of the same checkpoint in float32.
        base: ours, of the float model in float32.
        base_rounded: ours, of the float model in the server's dtype.
    """
    apart = distance(ours, served)
    return Agreement(
        mean=float(apart.mean()),
        quartile=float(apart.quantile(0.25)),
        quantization=float(distance(base, exact).mean()),
        rounding=float(distance(base, base_rounded).mean()),
        moved=float((apart > EXACT).double().mean()),
        agreed=float((served.argmax(-1) == ours.argmax(-1)).double().mean()),
    )
