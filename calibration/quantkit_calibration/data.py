"""Windows of a token stream: what a model is calibrated with."""

import torch


def calibration_windows(tokens: torch.Tensor, samples: int, seq_len: int, generator: torch.Generator) -> torch.Tensor:
    """[samples, seq_len]: windows of the stream, chosen at random among those that don't overlap, in its order.

    The stream is packed: cut every `seq_len` tokens from its start on, a remainder is dropped. Each window is chosen at
    most once; where there are no more than `samples`, all are returned, which may be fewer. The choice depends on
    nothing but the generator and the number of windows.

    Args:
        tokens: 1-D, integer.
        samples: how many windows, at least 1.
        seq_len: tokens in each, at least 1.
        generator: on the CPU; not used where there is no choice.

    Raises:
        ValueError: another shape or dtype, a number below 1, or fewer tokens than one window has.
    """
    if tokens.ndim != 1:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}: expected one dimension")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens has dtype {tokens.dtype}: expected integers")
    if samples < 1 or seq_len < 1:
        raise ValueError(f"{samples} samples of {seq_len} tokens: expected at least 1 of each")
    available = tokens.numel() // seq_len
    if available < 1:
        raise ValueError(f"{tokens.numel()} tokens make no window of {seq_len}")
    windows = tokens[: available * seq_len].view(available, seq_len)
    if available <= samples:
        return windows.clone()
    chosen = torch.randperm(available, generator=generator)[:samples].sort().values
    return windows[chosen.to(tokens.device)]
