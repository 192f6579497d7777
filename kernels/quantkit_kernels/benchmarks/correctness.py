"""Whether a result is right: against float64, number by number and as a norm, before anything is timed."""

from typing import Any

import torch
from torch import Tensor

from quantkit_kernels import formats
from quantkit_kernels.benchmarks.cases import Case, Operands

AT_EACH_END = 8
"""Of the tokens so many of the first and of the last are looked at."""
RUN = 64
"""Neighbouring outputs of a token whose relative error is one norm: a wrong tile cannot hide among right ones."""


def is_right(case: Case, operands: Operands, out: Any) -> bool:
    """Return whether the result of the case's op is within the case's bounds of float64; NaN never is."""
    if case.kind == "quantizer":
        return _codes_are_right(case, operands, out)
    return _product_is_right(case, operands, out)


def _product_is_right(case: Case, operands: Operands, out: Tensor) -> bool:
    """Return whether a product is right on the first and the last tokens, by two measures.

    Single numbers: float32 roundings of the sum of magnitudes, and roundings to x's dtype. With a rounded weight that
    bound is far above the error, which is why 64 neighbours must be near the exact ones in norm as well.
    """
    assert case.given is not None
    left, right, float32, rounded = case.given(*operands)
    tokens = left.shape[0]
    ends = [*range(min(AT_EACH_END, tokens)), *range(max(0, tokens - AT_EACH_END), tokens)]
    some = torch.tensor(ends, dtype=torch.int64, device=left.device)
    if callable(right):
        ends_of_runs = operands[-1][1:].long()
        of_each = torch.searchsorted(ends_of_runs, some, right=True).tolist()
        weights = {expert: right(expert) for expert in set(of_each)}
        exact = torch.stack([weights[e] @ left[m] for e, m in zip(of_each, ends, strict=True)])
        size = torch.stack([weights[e].abs() @ left[m].abs() for e, m in zip(of_each, ends, strict=True)])
    else:
        exact, size = left[some] @ right.t(), left[some].abs() @ right.abs().t()
    if out.shape != (tokens, exact.shape[1]):
        return False
    error = (out[some].double() - exact).abs()
    unit = torch.finfo(out.dtype).eps / 2
    bound = 1.01 * float32 * 2.0**-24 * size + abs(rounded) * unit * (size if rounded < 0 else exact.abs()) + 1e-30
    return bool((error <= bound * 1.01).all()) and _near(error, exact, case.tolerance)


def _near(error: Tensor, exact: Tensor, tolerance: float) -> bool:
    """Return whether each RUN neighbouring errors of a token are small against the numbers, as a norm."""
    whole = exact.shape[1] // RUN * RUN
    parts = [(error[:, :whole].reshape(-1, RUN), exact[:, :whole].reshape(-1, RUN))] if whole else []
    if exact.shape[1] != whole:  # of a few numbers at the end all may be small
        parts.append((error[:, -RUN:], exact[:, -RUN:]))
    return all(bool((wrong.norm(dim=-1) <= tolerance * right.norm(dim=-1)).all()) for wrong, right in parts)


def _codes_are_right(case: Case, operands: Operands, out: tuple[Tensor, Tensor]) -> bool:
    """Return whether codes times scales are the nearest to float64 numbers that these codes can be.

    Half a step of the codes: of int8 scale / 2; of fp8 half of the last bit, or of the smallest number. What a norm
    or a SiLU rounds on the way is K / 2 + 8 float32 roundings at most (`ops.rms_norm_quantize`), also of the largest
    number, which the scale comes from.
    """
    assert case.expected is not None
    exact, given = case.expected(*operands)
    codes, scale = out
    if codes.shape != exact.shape:
        return False
    half = {torch.int8: (0.0, 0.5), torch.float8_e4m3fn: (2.0**-4, 2.0**-10), torch.float8_e5m2: (2.0**-3, 2.0**-17)}
    relative, absolute = half[codes.dtype]
    rounded = (exact.shape[-1] / 2 + 8) * 2.0**-24
    scales = scale.double()
    shared = exact.view(exact.shape[0], scale.shape[1], -1) if scale.ndim == 2 else exact.view(1, 1, -1)
    absmax = shared.abs().amax(-1).view(scale.shape)
    wanted = torch.where(absmax > 0, absmax / formats.QMAX[codes.dtype], 1.0) if given is None else given.double()
    if not bool(((scales - wanted).abs() <= 2 * rounded * wanted + 1e-37).all()):
        return False
    each = scales.repeat_interleave(exact.shape[1] // scale.shape[1], dim=1) if scale.ndim == 2 else scales
    step = torch.maximum(relative * exact.abs(), absolute * each)
    return bool(((codes.double() * each - exact).abs() <= step * 1.0001 + 2 * rounded * exact.abs()).all())
