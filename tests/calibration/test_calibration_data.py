"""Windows for calibration: which, in what order, and what is refused."""

import collections

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantkit_calibration.data import calibration_windows


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    count=st.integers(1, 300), seq_len=st.integers(1, 12), samples=st.integers(1, 40), seed=st.integers(0, 2**32 - 1)
)
def test_windows_are_different_pieces_of_the_grid_in_order(count: int, seq_len: int, samples: int, seed: int) -> None:
    tokens = torch.arange(count)
    if count < seq_len:
        with pytest.raises(ValueError, match=f"{count} tokens make no window of {seq_len}"):
            calibration_windows(tokens, samples, seq_len, seeded(seed))
        return
    windows = calibration_windows(tokens, samples, seq_len, seeded(seed))
    assert windows.shape == (min(samples, count // seq_len), seq_len)
    starts = windows[:, 0].tolist()
    assert starts == sorted(set(starts))
    assert all(start % seq_len == 0 for start in starts)
    assert torch.equal(windows, torch.tensor(starts)[:, None] + torch.arange(seq_len))
    assert torch.equal(windows, calibration_windows(tokens, samples, seq_len, seeded(seed)))


def test_the_choice_is_the_seed_s_and_reaches_the_whole_stream() -> None:
    """Each of 50 windows is in 2 of 50 with probability 1/25: unseen in 400 draws with (24/25)**400 < 1e-7."""
    tokens = torch.arange(50 * 4)
    chosen = [tuple(calibration_windows(tokens, 2, 4, seeded(seed))[:, 0].tolist()) for seed in range(400)]
    assert len(set(chosen)) > 300
    assert set(collections.Counter(start for pair in chosen for start in pair)) == set(range(0, 200, 4))


def test_the_windows_are_a_copy() -> None:
    """A slice would keep a stream of any length in memory."""
    for samples in (2, 100):
        tokens = torch.arange(40)
        windows = calibration_windows(tokens, samples, 4, seeded())
        assert windows.untyped_storage().nbytes() == windows.numel() * 8
        tokens.zero_()
        assert int(windows.max()) > 0


@pytest.mark.parametrize(
    ("tokens", "samples", "seq_len", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), 1, 2, "one dimension"),
        (torch.zeros(8), 1, 2, "expected integers"),
        (torch.zeros(8, dtype=torch.bool), 1, 2, "expected integers"),
        (torch.zeros(8, dtype=torch.int64), 0, 2, "0 samples of 2 tokens"),
        (torch.zeros(8, dtype=torch.int64), 1, 0, "1 samples of 0 tokens"),
        (torch.zeros(0, dtype=torch.int64), 1, 2, "0 tokens make no window of 2"),
    ],
)
def test_wrong_use_is_a_value_error(tokens: torch.Tensor, samples: int, seq_len: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_windows(tokens, samples, seq_len, seeded())
