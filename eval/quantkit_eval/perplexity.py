"""Perplexity with its standard error, and bits per byte.

A window of T tokens gives T - 1 predictions (the first token has nothing before it). All windows are equally long, so
the mean over windows of a window's mean is the mean over all predictions, and the windows are the sample whose spread
gives the standard error: tokens of one window are not independent of one another, windows nearly are.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

# Logits are turned into float64 log-probabilities this many values at a time: 4 MiB a copy on a CPU, where what fits in
# a cache is fastest, and 128 MiB on an accelerator, where every step waits for a launch.
CHUNK_VALUES_CPU = 2**19
CHUNK_VALUES = 2**24


def row_chunks(logits_nv: torch.Tensor) -> Iterator[slice]:
    """Slices that cover the rows, each of at most so many logits as a chunk may hold (and of at least one row)."""
    rows, vocabulary = logits_nv.shape
    values = CHUNK_VALUES_CPU if logits_nv.device.type == "cpu" else CHUNK_VALUES
    step = max(1, values // max(1, vocabulary))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def token_nll(logits_nv: torch.Tensor, targets_n: torch.Tensor) -> torch.Tensor:
    """float64 [N] on the CPU: -log softmax(logits)[target] in nats, row by row.

    Computed in float64 whatever the logits' dtype. NaN or infinite logits give values that aren't finite: the caller
    decides what that means. Raises ValueError where shapes don't fit.
    """
    if logits_nv.ndim != 2 or targets_n.shape != logits_nv.shape[:1]:
        raise ValueError(
            f"logits {tuple(logits_nv.shape)} and targets {tuple(targets_n.shape)}: expected [N, V] and [N]"
        )
    nll_n = torch.empty(logits_nv.shape[0], dtype=torch.float64)
    targets_n = targets_n.to(logits_nv.device)
    for rows in row_chunks(logits_nv):
        logits = logits_nv[rows].double()
        true = logits.gather(-1, targets_n[rows, None]).squeeze(-1)
        nll_n[rows] = (logits.logsumexp(-1) - true).cpu()
    return nll_n


def window_nll(logits_btv: torch.Tensor, tokens_bt: torch.Tensor) -> torch.Tensor:
    """float64 [B, T - 1]: the nats that each token of a window, but the first, cost given those before it."""
    if logits_btv.ndim != 3 or logits_btv.shape[:2] != tokens_bt.shape:
        raise ValueError(
            f"logits {tuple(logits_btv.shape)} and tokens {tuple(tokens_bt.shape)}: expected [B, T, V] and [B, T]"
        )
    # Window by window: logits[:, :-1] as rows would copy the whole tensor.
    return torch.stack(
        [token_nll(logits[:-1], tokens[1:]) for logits, tokens in zip(logits_btv, tokens_bt, strict=True)]
    )


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity: exp(mean nats); its standard error (None for a single sample); what it was taken over."""

    perplexity: float
    stderr: float | None
    mean_nll: float
    tokens: int


class Perplexity:
    """A running perplexity over equally long windows; memory: one float64 a window."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._length: int | None = None

    def update(self, nll_bt: torch.Tensor) -> None:
        """Takes in the nats of a batch of windows, [B, T - 1], all batches of the same T."""
        if nll_bt.ndim != 2 or nll_bt.shape[1] < 1:
            raise ValueError(f"nll has shape {tuple(nll_bt.shape)}: expected [windows, predictions]")
        if self._length not in (None, nll_bt.shape[1]):
            raise ValueError(f"a window of {nll_bt.shape[1]} predictions after windows of {self._length}")
        self._length = nll_bt.shape[1]
        self._means.extend(nll_bt.double().mean(dim=1).tolist())

    def state(self) -> dict[str, torch.Tensor]:
        """All that it holds, for `take_up`."""
        return {"means": torch.tensor(self._means, dtype=torch.float64), "length": torch.tensor(self._length or 0)}

    def take_up(self, state: Mapping[str, torch.Tensor]) -> None:
        """Hold what another one held."""
        self._means, self._length = state["means"].tolist(), int(state["length"]) or None

    def merge(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take in all that another one was given, which is in this state of it."""
        length = int(state["length"]) or None
        if None not in (length, self._length) and length != self._length:
            raise ValueError(f"windows of {length} predictions after windows of {self._length}")
        self._means.extend(state["means"].tolist())
        self._length = self._length or length

    def result(self) -> PerplexityResult:
        """exp(mean) ± exp(mean) · s/√W: the delta method, s the sample deviation of the windows' means."""
        if not self._means or self._length is None:
            raise ValueError("no window was given")
        return exp_mean(self._means, tokens=len(self._means) * self._length)


def exp_mean(nats: list[float], tokens: int) -> PerplexityResult:
    """The exp of the mean of independent samples in nats, with its standard error by the delta method.

    d exp(m)/dm = exp(m), hence se(exp(m)) = exp(m) · se(m), se(m) = s/√n. An exponential beyond float64 is inf.
    """
    count = len(nats)
    mean = math.fsum(nats) / count
    try:
        perplexity = math.exp(mean)
    except OverflowError:
        perplexity = math.inf
    stderr = None
    if count > 1:
        variance = math.fsum((x - mean) ** 2 for x in nats) / (count - 1)
        stderr = perplexity * math.sqrt(variance / count)
    return PerplexityResult(perplexity, stderr, mean, tokens)


def bits_per_byte(mean_nll: float, tokens: int, utf8_bytes: int) -> float:
    """Mean nats a token, as bits for each byte of text: nats/ln 2 · tokens/bytes.

    `tokens` and `utf8_bytes` are those of the whole text, so that their ratio is the tokenizer's and not one window's.
    Compares models whose tokenizers differ.
    """
    if tokens < 1 or utf8_bytes < 1:
        raise ValueError(f"{tokens} tokens and {utf8_bytes} bytes: expected at least one of each")
    return mean_nll / math.log(2) * tokens / utf8_bytes
