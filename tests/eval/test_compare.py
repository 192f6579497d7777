"""The comparison of two models' logits against a plain loop in Python floats."""

import math

import numpy as np
import pytest
import torch
from quantkit_eval import perplexity
from quantkit_eval.compare import Comparison


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = math.fsum(math.exp(x - top) for x in logits)
    return [math.exp(x - top) / total for x in logits]


def two_models(rows: int, vocabulary: int, distance: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    base = 3 * torch.randn(rows, vocabulary, generator=generator)
    model = base + distance * torch.randn(rows, vocabulary, generator=generator)
    return base, model, torch.randint(0, vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("distance", [1.0, 1e-3])
@pytest.mark.parametrize("chunk", [1, 50, 2**19])
def test_comparison_is_the_plain_loop(distance: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KL of 1e-7 is a sum of terms of 1e-4 in float64: cancellation leaves it exact to 1e-15."""
    monkeypatch.setattr(perplexity, "CHUNK_VALUES_CPU", chunk)
    base, model, targets = two_models(211, 13, distance)
    kl, agreed, change = [], [], []
    for row in range(211):
        p, q = softmax(base[row].tolist()), softmax(model[row].tolist())
        kl.append(math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))
        agreed.append(p.index(max(p)) == q.index(max(q)))
        change.append(q[int(targets[row])] - p[int(targets[row])])
    running = Comparison()
    for start in range(0, 211, 50):
        part = slice(start, start + 50)
        running.update(base[part], model[part], targets[part])
    result = running.result()
    assert result.kl_mean == pytest.approx(math.fsum(kl) / 211, abs=1e-14, rel=1e-12)
    assert result.kl_p99 == pytest.approx(float(np.quantile(kl, 0.99)), abs=1e-14, rel=1e-12)
    assert result.top1_agreement == sum(agreed) / 211
    assert result.delta_p_rms == pytest.approx(math.sqrt(math.fsum(x * x for x in change) / 211), rel=1e-12)
    assert result.tokens == 211
    if distance == 1.0:
        assert 0 < result.top1_agreement < 1


def test_kl_is_of_the_baseline_against_the_model_and_not_the_reverse() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): KL(p||q) = ln 2 - ln 3 / 2 = 0.1438, KL(q||p) = 0.1308.
    running = Comparison()
    running.update(torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log(), torch.tensor([0]))
    result = running.result()
    assert result.kl_mean == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-7)
    assert result.delta_p_rms == pytest.approx(0.25, rel=1e-7)


def test_a_model_is_no_distance_from_itself_and_masked_entries_are_nothing() -> None:
    base, _, targets = two_models(20, 9, 1.0)
    base[:, 4] = -math.inf
    targets[targets == 4] = 5
    running = Comparison()
    running.update(base, base.clone(), targets)
    result = running.result()
    assert (result.kl_mean, result.kl_p99, result.top1_agreement, result.delta_p_rms) == (0.0, 0.0, 1.0, 0.0)


def test_wrong_use_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"expected \[N, V\]"):
        Comparison().update(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="no prediction"):
        Comparison().result()
