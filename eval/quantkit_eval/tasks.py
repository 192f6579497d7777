"""Last-word accuracy (LAMBADA): is a passage's last word what the model would have said?

A passage is a context and a continuation. It counts as right where every token of the continuation is the model's
first choice given everything before it. Tokens are split and cut as lm-evaluation-harness does (its `_encode_pair` and
`_loglikelihood_tokens`), so that numbers compare, with one exception: where the tokenizer's tokens straddle the place
between context and continuation, the two are encoded apart.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from quantkit_eval.perplexity import exp_mean


@dataclass(frozen=True)
class Passage:
    """Token ids of context and continuation.

    Attributes:
        tokens: the ids.
        continuation: how many at the end are the continuation.
        truncated: whether the left was cut.
        split: whether the two parts were encoded apart.
    """

    tokens: tuple[int, ...]
    continuation: int
    truncated: bool
    split: bool = False


class UnscorablePassageError(ValueError):
    """A passage of which no prediction can be asked."""


def encode_passage(
    context: str, continuation: str, encode: Callable[[str], Sequence[int]], context_length: int
) -> Passage:
    """The passage's tokens, at most context_length + 1 (the last one is predicted, never read).

    Spaces at the context's end go to the continuation; the whole and the context are encoded, and the continuation is
    what the whole has beyond the context's tokens. Where the whole doesn't begin with the context's tokens and go on (a
    tokenizer that attaches a space to the word before it), context and continuation are encoded apart: the target then
    begins where the continuation begins. Raises UnscorablePassageError where nothing is left to predict from or to
    predict, or where the continuation alone is longer than the model's context.
    """
    kept = context.rstrip()
    context, continuation = kept, context[len(kept) :] + continuation
    prefix = list(encode(context))
    whole = list(encode(context + continuation))
    split = whole[: len(prefix)] != prefix or len(whole) == len(prefix)
    target = list(encode(continuation)) if split else whole[len(prefix) :]
    if not prefix or not target:
        raise UnscorablePassageError("a passage needs at least one token of context and one of continuation")
    if len(target) > context_length:
        raise UnscorablePassageError(
            f"a continuation of {len(target)} tokens is longer than the context of {context_length}"
        )
    tokens = prefix + target
    kept_tokens = tokens[-(context_length + 1) :]
    return Passage(tuple(kept_tokens), len(target), truncated=len(kept_tokens) < len(tokens), split=split)


def padded(passages: Sequence[Passage], pad_token: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), int64 [B, T]: the passages without their last tokens, padded on the right.

    On the right, no real token of a causal model sees the padding, and positions are what they are unbatched.
    """
    if not passages:
        raise ValueError("no passage was given")
    longest = max(len(p.tokens) for p in passages) - 1
    input_ids = torch.full((len(passages), longest), pad_token, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, passage in enumerate(passages):
        length = len(passage.tokens) - 1
        input_ids[row, :length] = torch.tensor(passage.tokens[:-1])
        attention_mask[row, :length] = 1
    return input_ids, attention_mask


def continuation_rows(logits_tv: torch.Tensor, passage: Passage) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [n, V], targets [n]): the predictions of the passage's n continuation tokens, from its row of a batch."""
    end = len(passage.tokens) - 1
    if logits_tv.ndim != 2 or logits_tv.shape[0] < end:
        raise ValueError(f"logits {tuple(logits_tv.shape)}: expected [T, V] with T at least {end}")
    targets = torch.tensor(passage.tokens[-passage.continuation :], device=logits_tv.device)
    return logits_tv[end - passage.continuation : end], targets


@dataclass(frozen=True)
class LastWordResult:
    """Accuracy as a share, and exp of the mean nats of a continuation, each with its standard error (n = 1: None)."""

    accuracy: float
    accuracy_stderr: float | None
    perplexity: float
    perplexity_stderr: float | None
    passages: int
    tokens: int


class LastWord:
    """A running last-word accuracy; memory: two numbers a passage."""

    def __init__(self) -> None:
        self._nats: list[float] = []
        self._right = 0
        self._tokens = 0

    def update(self, nll_n: torch.Tensor, greedy_n: torch.Tensor) -> None:
        """Takes in one passage: the nats of its continuation's tokens, and whether each was the first choice."""
        if nll_n.ndim != 1 or nll_n.shape != greedy_n.shape or nll_n.numel() < 1:
            raise ValueError(f"nll {tuple(nll_n.shape)} and greedy {tuple(greedy_n.shape)}: expected [n] and [n]")
        self._nats.append(float(nll_n.double().sum()))
        self._right += bool(greedy_n.all())
        self._tokens += nll_n.numel()

    def state(self) -> dict[str, torch.Tensor]:
        """All that it holds, for `take_up`."""
        counts = torch.tensor([self._right, self._tokens])
        return {"nats": torch.tensor(self._nats, dtype=torch.float64), "counts": counts}

    def take_up(self, state: Mapping[str, torch.Tensor]) -> None:
        """Hold what another one held."""
        self._nats = state["nats"].tolist()
        self._right, self._tokens = state["counts"].tolist()

    def merge(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take in all that another one was given, which is in this state of it."""
        right, tokens = state["counts"].tolist()
        self._nats.extend(state["nats"].tolist())
        self._right, self._tokens = self._right + right, self._tokens + tokens

    def result(self) -> LastWordResult:
        """Accuracy a ± √(a(1 - a)/(n - 1)), the sample error of a mean of zeros and ones; perplexity by passage."""
        count = len(self._nats)
        if count < 1:
            raise ValueError("no passage was given")
        accuracy = self._right / count
        perplexity = exp_mean(self._nats, self._tokens)
        return LastWordResult(
            accuracy=accuracy,
            accuracy_stderr=math.sqrt(accuracy * (1 - accuracy) / (count - 1)) if count > 1 else None,
            perplexity=perplexity.perplexity,
            perplexity_stderr=perplexity.stderr,
            passages=count,
            tokens=self._tokens,
        )
