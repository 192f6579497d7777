"""Perplexity against a plain loop in Python floats."""

import math
import statistics

import pytest
import torch
from quantkit_eval import perplexity
from quantkit_eval.perplexity import Perplexity, bits_per_byte, exp_mean, token_nll, window_nll


def plain_nll(logits: list[float], target: int) -> float:
    """-log softmax(logits)[target], in Python."""
    top = max(logits)
    return top + math.log(math.fsum(math.exp(x - top) for x in logits)) - logits[target]


def some_logits(*shape: int, scale: float = 4.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


@pytest.mark.parametrize("chunk", [1, 40, 2**19])
def test_token_nll_is_the_plain_loop(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both work in float64 on the same float32 logits: a few ulps of values below 64, 1e-13."""
    monkeypatch.setattr(perplexity, "CHUNK_VALUES_CPU", chunk)
    logits = some_logits(23, 17)
    targets = torch.arange(23) % 17
    expected = [plain_nll(row, t) for row, t in zip(logits.tolist(), targets.tolist(), strict=True)]
    found = token_nll(logits, targets)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, abs=1e-13, rel=0)


def test_token_nll_of_a_masked_vocabulary_entry_and_of_nan() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf], [0.0, math.nan, 0.0]])
    nll = token_nll(logits, torch.tensor([0, 0]))
    assert float(nll[0]) == pytest.approx(math.log(2), abs=1e-15)
    assert math.isnan(float(nll[1]))


def test_window_nll_predicts_each_token_from_the_logits_before_it() -> None:
    logits, tokens = some_logits(3, 5, 11), torch.arange(15).view(3, 5) % 11
    expected = [[plain_nll(logits[b, t].tolist(), int(tokens[b, t + 1])) for t in range(4)] for b in range(3)]
    assert window_nll(logits, tokens).tolist() == [pytest.approx(row, abs=1e-13, rel=0) for row in expected]


def test_perplexity_and_its_standard_error_are_the_formulas() -> None:
    nll = some_logits(7, 9).abs().double()
    running = Perplexity()
    for batch in nll.split([3, 3, 1]):
        running.update(batch)
    result = running.result()
    means = [statistics.fmean(row) for row in nll.tolist()]
    value = math.exp(statistics.fmean([x for row in nll.tolist() for x in row]))
    assert result.perplexity == pytest.approx(value, rel=1e-14)
    assert result.stderr == pytest.approx(value * statistics.stdev(means) / math.sqrt(7), rel=1e-12)
    assert result.mean_nll == pytest.approx(math.log(value), rel=1e-14)
    assert result.tokens == 63


def test_a_single_window_has_no_standard_error() -> None:
    running = Perplexity()
    running.update(torch.ones(1, 4))
    assert running.result().stderr is None
    assert running.result().perplexity == pytest.approx(math.e, rel=1e-15)


def test_a_perplexity_beyond_float64_is_inf() -> None:
    assert exp_mean([1000.0, 1000.0], 2).perplexity == math.inf


def test_bits_per_byte() -> None:
    # 8 bits a token, 2 bytes a token.
    assert bits_per_byte(8 * math.log(2), tokens=50, utf8_bytes=100) == pytest.approx(4.0, rel=1e-15)


def test_wrong_use_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"expected \[N, V\] and \[N\]"):
        token_nll(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected \[B, T, V\]"):
        window_nll(torch.zeros(1, 3, 4), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="no window"):
        Perplexity().result()
    running = Perplexity()
    running.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="4 predictions after windows of 3"):
        running.update(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="expected at least one"):
        bits_per_byte(1.0, 10, 0)
