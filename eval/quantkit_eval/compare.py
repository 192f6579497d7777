"""How far a model's predictions have moved from its baseline's: KL divergence, top-1 agreement, probability change.

Perplexity can stay where it was while predictions change (errors cancel in a mean over the true tokens); these numbers
can't. p is the baseline's distribution, q the model's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quantkit_eval.perplexity import row_chunks


@dataclass(frozen=True)
class ComparisonResult:
    """KL(p || q) in nats: mean and 99th percentile over tokens; agreement as a share; the probability change's RMS."""

    kl_mean: float
    kl_p99: float
    top1_agreement: float
    delta_p_rms: float
    tokens: int


class Comparison:
    """A running comparison of two models' logits; memory: one float64 a token, whatever the vocabulary."""

    def __init__(self) -> None:
        self._kl: list[torch.Tensor] = []
        self._agreed = 0
        self._squared_change = 0.0

    def update(self, baseline_nv: torch.Tensor, model_nv: torch.Tensor, targets_n: torch.Tensor) -> None:
        """Takes in N predictions of both models, [N, V] each, and the tokens that really came, [N].

        Log-probabilities are float64, a chunk of rows at a time. Raises ValueError where shapes don't fit.
        """
        if baseline_nv.ndim != 2 or baseline_nv.shape != model_nv.shape or targets_n.shape != model_nv.shape[:1]:
            raise ValueError(
                f"baseline {tuple(baseline_nv.shape)}, model {tuple(model_nv.shape)}, targets "
                f"{tuple(targets_n.shape)}: expected [N, V], [N, V], [N]"
            )
        device = model_nv.device
        for rows in row_chunks(model_nv):
            base, model = baseline_nv[rows].to(device), model_nv[rows]
            self._agreed += int((base.argmax(-1) == model.argmax(-1)).sum())
            log_p, log_q = base.double().log_softmax(-1), model.double().log_softmax(-1)
            p = log_p.exp()
            # Where p is 0 the term is 0, also for a token that both exclude with a logit of -inf.
            terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
            self._kl.append(terms.sum(-1).cpu())
            true = targets_n[rows, None].to(device)
            change = log_q.gather(-1, true).exp() - log_p.gather(-1, true).exp()
            self._squared_change += float((change * change).sum())

    def state(self) -> dict[str, torch.Tensor]:
        """All that it holds, for `take_up`."""
        kl = torch.cat(self._kl) if self._kl else torch.empty(0, dtype=torch.float64)
        change = torch.tensor(self._squared_change, dtype=torch.float64)
        return {"kl": kl, "agreed": torch.tensor(self._agreed), "squared_change": change}

    def take_up(self, state: Mapping[str, torch.Tensor]) -> None:
        """Hold what another one held."""
        self._kl = [state["kl"]] if state["kl"].numel() else []
        self._agreed, self._squared_change = int(state["agreed"]), float(state["squared_change"])

    def merge(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take in all that another one was given, which is in this state of it."""
        self._kl += [state["kl"]] if state["kl"].numel() else []
        self._agreed += int(state["agreed"])
        self._squared_change += float(state["squared_change"])

    def result(self) -> ComparisonResult:
        """The statistics over all tokens so far; a percentile interpolates linearly between neighbours."""
        if not self._kl:
            raise ValueError("no prediction was given")
        kl = torch.cat(self._kl).sort().values
        place = 0.99 * (kl.numel() - 1)
        low, high = kl[math.floor(place)], kl[math.ceil(place)]
        return ComparisonResult(
            kl_mean=float(kl.mean()),
            kl_p99=float(low + (high - low) * (place - math.floor(place))),
            top1_agreement=self._agreed / kl.numel(),
            delta_p_rms=math.sqrt(self._squared_change / kl.numel()),
            tokens=kl.numel(),
        )
