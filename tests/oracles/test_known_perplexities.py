"""Checkpoints that users have, evaluated: numbers known from elsewhere, and batches against single passages."""

from pathlib import Path

import pytest

from quantkit.evaluation import evaluate
from quantkit.texts import Texts, tokenize


def test_a_real_model_has_the_known_perplexity(data: Path) -> None:
    """4.6306: the first 120,000 characters encoded at once, the second half of the tokens (from n // 2 on), float32.

    60 windows of 256, 255 predictions each, no BOS.
    """
    from quantkit.checkpoint import load_tokenizer

    text = (data / "text/tinystories/tinystories_val.txt").read_text(encoding="utf-8")[:120_000]
    tokenizer = load_tokenizer(data / "models/stories3M")
    ids = tokenize(Texts("t", "text", "", documents=(text,)), tokenizer).ids
    half = Texts("second half", "tokens", "", token_ids=ids[len(ids) // 2 :])
    result = evaluate(data / "models/stories3M", half, seq_len=256, progress=False)
    assert result["protocol"] == "60 windows of 256 tokens that don't overlap"
    assert result["tokens"] == 60 * 255
    assert result["perplexity"] == pytest.approx(4.6306, abs=5e-4)


def test_a_real_model_on_lambada(data: Path) -> None:
    """Batches of passages give what each passage gives alone."""
    options = {"data_dir": data / "text", "max_tokens": 1500, "progress": False}
    together = evaluate(data / "models/stories3M", "lambada", **options)
    alone = evaluate(data / "models/stories3M", "lambada", batch_size=1, **options)
    assert together["passages"] == alone["passages"] > 10
    assert together["accuracy"] == alone["accuracy"]
    assert together["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-4)
