"""Windows of a token stream: what a perplexity is measured on."""

import torch


def windows(tokens: torch.Tensor, seq_len: int, max_tokens: int | None = None) -> torch.Tensor:
    """[W, seq_len]: the stream cut into windows that don't overlap; a remainder shorter than one is dropped.

    `tokens` is 1-D and integer. With `max_tokens` only that many tokens from the start are cut. Nothing is copied
    or reordered: the result, flattened, is a prefix of `tokens`.

    Raises ValueError for another shape or dtype, for seq_len below 2 (a window of one token predicts nothing), and
    where not one window comes out.
    """
    if tokens.ndim != 1:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}: expected one dimension")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens has dtype {tokens.dtype}: expected integers")
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}: expected at least 2, a window of one token predicts nothing")
    available = tokens.numel() if max_tokens is None else min(tokens.numel(), max_tokens)
    count = available // seq_len
    if count < 1:
        raise ValueError(f"{available} tokens make no window of {seq_len}")
    return tokens[: count * seq_len].view(count, seq_len)
