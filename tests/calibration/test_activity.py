"""Statistics of zeros and distributions against plain loops and numpy."""

import numpy as np
import pytest
import torch
from quantkit_calibration.activity import GAMMAS, Distribution, Zeros


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shares(x: torch.Tensor, length: int) -> dict[int, float]:
    """The definition, word for word: neurons unused in all tokens of a group, over groups and neurons."""
    found = {}
    for gamma in GAMMAS:
        unused = groups = 0
        for window in x.split(length):
            for start in range(0, length - gamma + 1, gamma):
                for neuron in range(x.shape[1]):
                    unused += all(float(window[start + t, neuron]) == 0 for t in range(gamma))
                    groups += 1
        if groups:
            found[gamma] = unused / groups
    return found


@pytest.mark.parametrize("length", [1, 3, 7, 16, 21])
def test_zeros_are_counted_as_they_are_defined(length: int) -> None:
    x = torch.randn(length * 6, 5, generator=seeded()).relu()
    x[:, 1] = 0
    x[:, 2] = -0.0
    found = Zeros(length)
    found.update(x[: 2 * length])
    found.update(x[2 * length :].reshape(4, length, 5))
    assert found.result() == pytest.approx(shares(x, length))
    assert found.tokens == 6 * length


def test_tokens_that_do_not_follow_one_another_are_counted_alone() -> None:
    found = Zeros(None)
    found.update(torch.tensor([[0.0, 1.0, 0.0, 3.0]]))
    found.update(torch.zeros(0, 4))
    assert found.result() == {1: 0.5}
    assert Zeros(None).result() == {}


def test_windows_must_be_whole() -> None:
    with pytest.raises(ValueError, match="5 tokens: expected windows of 4"):
        Zeros(4).update(torch.zeros(5, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_quantiles_are_those_of_all_numbers(share: float, dtype: torch.dtype) -> None:
    """Within a bin, 2**-7 of the number's power of two, and as near in rank as a bin holds numbers."""
    x = (torch.randn(40_001, generator=seeded()) * 3 + 0.5).to(dtype)
    found, part = Distribution(), Distribution()
    found.update(x[:100])
    part.update(x[100:].reshape(-1, 1))
    found.merge(part)
    assert found.count == x.numel()
    exact = float(np.quantile(x.float().numpy(), share))
    assert found.quantile(share) == pytest.approx(exact, rel=2**-6, abs=1e-3)
    size = float(np.quantile(x.float().abs().numpy(), share))
    assert found.magnitude(share) == pytest.approx(size, rel=2**-6, abs=1e-3)
    below = float((x.float() <= found.quantile(share)).float().mean())
    assert below == pytest.approx(share, abs=0.01)


def test_quantiles_of_few_numbers() -> None:
    found = Distribution()
    with pytest.raises(ValueError, match="no number was given"):
        found.quantile(0.5)
    found.update(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert found.magnitude(0.5) < 1e-30
    assert found.magnitude(1.0) == pytest.approx(1.0, rel=2**-6)
    assert found.quantile(0.25) < 1e-30
    with pytest.raises(ValueError, match="expected 0 to 1"):
        found.magnitude(1.5)
