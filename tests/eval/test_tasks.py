"""Last-word accuracy: how passages are split, cut, batched and scored."""

import math
import re
import statistics

import pytest
import torch
from quantkit_eval.perplexity import token_nll
from quantkit_eval.tasks import (
    LastWord,
    Passage,
    UnscorablePassageError,
    continuation_rows,
    encode_passage,
    padded,
)


def words(text: str) -> list[int]:
    """A tokenizer for the tests: a token is a word with the spaces before it, its id the sum of its characters."""
    tokens, current = [], ""
    for character in text:
        if character == " " and current.strip():
            tokens.append(current)
            current = ""
        current += character
    return [sum(map(ord, token)) % 97 for token in [*tokens, current] if token]


def test_spaces_at_the_end_of_the_context_belong_to_the_continuation() -> None:
    whole = words("the stone was red today")
    for context, continuation in (("the stone was", " red today"), ("the stone was ", "red today")):
        passage = encode_passage(context, continuation, words, 100)
        assert passage == Passage(tuple(whole), 2, truncated=False)


def left_words(text: str) -> list[int]:
    """As `words`, but a space belongs to the word before it; nothing is made of what isn't ASCII."""
    ascii_text = text.encode("ascii", "ignore").decode()
    return [sum(map(ord, token)) for token in re.findall(r"[^ ]+ ?| ", ascii_text)]


def test_where_tokens_straddle_the_two_parts_they_are_encoded_apart() -> None:
    """The context's tokens are no prefix of the whole's: `was` is another token than `was `."""
    context, continuation = "the stone was", " red today"
    assert left_words(context + continuation)[:3] != left_words(context)
    expected = (*left_words(context), *left_words(continuation))
    assert encode_passage(context, continuation, left_words, 100) == Passage(expected, 3, truncated=False, split=True)
    # One token for all of it: the whole goes on by none, the continuation alone has one.
    assert encode_passage("some", "where", left_words, 100).tokens == (*left_words("some"), *left_words("where"))


def test_a_continuation_without_a_token_cannot_be_scored() -> None:
    for context in ("some words", "some "):
        with pytest.raises(UnscorablePassageError, match="one of continuation"):
            encode_passage(context, "Ünï".replace("n", ""), lambda text: left_words(text.strip()), 100)


def test_the_context_is_cut_from_the_left_and_the_last_token_is_not_read() -> None:
    """As lm-evaluation-harness does: (context + continuation)[-(length + 1):][:-1] is what the model reads."""
    whole = words("a b c d e f g")
    assert encode_passage("a b c d e f", " g", words, 6) == Passage(tuple(whole), 1, truncated=False)
    assert encode_passage("a b c d e f", " g", words, 5) == Passage(tuple(whole[-6:]), 1, truncated=True)
    input_ids, mask = padded([encode_passage("a b c d e f", " g", words, 5)])
    assert input_ids.tolist() == [whole[1:6]]
    assert mask.tolist() == [[1] * 5]


@pytest.mark.parametrize(
    ("context", "continuation", "length", "message"),
    [
        ("", "word", 10, "at least one token of context"),
        ("  ", "word", 10, "at least one token of context"),
        ("some words", "", 10, "one of continuation"),
        ("some", " words that go on", 3, "continuation of 4 tokens is longer than the context of 3"),
    ],
)
def test_a_passage_that_cannot_be_scored(context: str, continuation: str, length: int, message: str) -> None:
    with pytest.raises(UnscorablePassageError, match=message):
        encode_passage(context, continuation, words, length)


def test_padding_is_on_the_right() -> None:
    batch = [Passage((5, 6, 7, 8), 1, False), Passage((9, 10), 1, False)]
    input_ids, mask = padded(batch, pad_token=3)
    assert input_ids.tolist() == [[5, 6, 7], [9, 3, 3]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_continuation_rows_are_the_logits_before_each_of_its_tokens() -> None:
    passage = Passage((5, 6, 7, 8), 2, False)
    logits = torch.arange(5.0)[:, None].expand(5, 9)  # row t is t everywhere; rows 3 and 4 are padding
    rows, targets = continuation_rows(logits, passage)
    assert rows[:, 0].tolist() == [1, 2]
    assert targets.tolist() == [7, 8]


def causal_model(input_ids: torch.Tensor) -> torch.Tensor:
    """Logits that depend on all tokens so far and on nothing behind: a cumulated embedding, twisted."""
    table = torch.randn(100, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (table[input_ids].cumsum(1) * 1.7).sin() * 5


def test_batched_passages_score_as_unbatched_ones() -> None:
    texts = [("one two three four", " five"), ("six", " seven eight"), ("nine ten", " eleven twelve"), ("a b c", " d")]
    passages = [encode_passage(c, w, lambda t: [i % 50 for i in words(t)], 100) for c, w in texts]
    together, alone = [], []
    logits = causal_model(padded(passages)[0])
    for row, passage in enumerate(passages):
        together.append(token_nll(*continuation_rows(logits[row], passage)).tolist())
        alone.append(token_nll(*continuation_rows(causal_model(padded([passage])[0])[0], passage)).tolist())
    assert together == alone


def test_accuracy_wants_every_token_and_perplexity_is_by_passage() -> None:
    running = LastWord()
    running.update(torch.tensor([1.0, 2.0]), torch.tensor([True, True]))
    running.update(torch.tensor([4.0]), torch.tensor([False]))
    running.update(torch.tensor([0.5, 0.5, 1.0]), torch.tensor([True, False, True]))
    result = running.result()
    nats = [3.0, 4.0, 2.0]
    assert result.accuracy == 1 / 3
    # The sample error of (1, 0, 0).
    assert result.accuracy_stderr == pytest.approx(statistics.stdev([1, 0, 0]) / math.sqrt(3), rel=1e-14)
    assert result.perplexity == pytest.approx(math.exp(3.0), rel=1e-14)
    assert result.perplexity_stderr == pytest.approx(math.exp(3.0) * statistics.stdev(nats) / math.sqrt(3), rel=1e-14)
    assert (result.passages, result.tokens) == (3, 6)


def test_wrong_use_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="no passage"):
        LastWord().result()
    with pytest.raises(ValueError, match="no passage"):
        padded([])
    with pytest.raises(ValueError, match=r"expected \[n\] and \[n\]"):
        LastWord().update(torch.zeros(2), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="T at least 3"):
        continuation_rows(torch.zeros(2, 9), Passage((5, 6, 7, 8), 1, False))
