"""Windows of a token stream."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantkit_eval.data import windows


@given(count=st.integers(2, 200), seq_len=st.integers(2, 20), cap=st.none() | st.integers(2, 250))
def test_windows_are_a_prefix_of_the_stream_in_order(count: int, seq_len: int, cap: int | None) -> None:
    tokens = torch.arange(count)
    available = count if cap is None else min(count, cap)
    if available < seq_len:
        with pytest.raises(ValueError, match=f"{available} tokens make no window of {seq_len}"):
            windows(tokens, seq_len, cap)
        return
    cut = windows(tokens, seq_len, cap)
    assert cut.shape == (available // seq_len, seq_len)
    assert cut.flatten().tolist() == list(range(available // seq_len * seq_len))


@pytest.mark.parametrize(
    ("tokens", "seq_len", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), 2, "one dimension"),
        (torch.zeros(8), 2, "expected integers"),
        (torch.zeros(8, dtype=torch.bool), 2, "expected integers"),
        (torch.zeros(8, dtype=torch.int64), 1, "seq_len is 1"),
    ],
)
def test_wrong_use_is_a_value_error(tokens: torch.Tensor, seq_len: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        windows(tokens, seq_len)
