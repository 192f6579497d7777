"""The ops' way on a CPU: integer products where the processor multiplies int8 without saturating.

`torch._int_mm` is exact where the processor has VNNI. Without it oneDNN adds pairs of products in 16 bits
that saturate, and the result is wrong without a word; there the exact float32 product of `generic.int_mm`
runs, with one warning. Both give the same bits.

A layer of one token takes some tens of microseconds, of which every torch call is one or two: so one token has a way of
its own with few calls, its scale a Python number. Many tokens are quantized, and their sums scaled, some rows at a
time, so that what is between stays in cache. What weights are decoded for is in `cpu_decoding.py`.
"""

import functools
import logging

import torch
from torch import Tensor

from quantkit_kernels import cpu_decoding, formats, generic

logger = logging.getLogger("quantkit")

_CHUNK_ELEMENTS = 1 << 18
"""Activations are quantized, and sums scaled, this many at a time: one MiB in float32."""

_TINY = torch.finfo(torch.float32).tiny

_CASTS = {torch.float32: Tensor.float, torch.bfloat16: Tensor.bfloat16, torch.float16: Tensor.half}
"""Casts that cost half of what `Tensor.to` does: it looks longer at its arguments than at a thousand numbers."""

ONE_BY_ONE = 6
"""Up to so many tokens each has a product of its own: oneDNN's kernel for one row reads a weight [N, K] as it lies, and
the one for several copies all of the weight into another order first."""

SWAPPED = 96
"""Up to so many tokens the weight is the left matrix of the product, which is copied faster than the right one. Beyond,
turning the result around costs more than that saves."""


@functools.cache
def has_exact_int_mm() -> bool:
    """Return whether `torch._int_mm` is exact on this processor, that is, whether it has VNNI."""
    return bool(torch.cpu._is_vnni_supported())


@functools.cache
def warn_no_vnni() -> None:
    """Say, once, that int8 products run the slower way."""
    logger.warning("this processor has no VNNI: int8 products run in float32 (exact, but several times slower)")


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Return the exact product a @ b.T, [M, N] in int32, contiguous, of a [M, K] and b [N, K] in int8.

    Measured on an AMD EPYC (Zen 4) with one and two threads: `kernels/bench/cpu_linear.py` and its results.
    """
    if not has_exact_int_mm():
        warn_no_vnni()
        return generic.int_mm(a, b)
    tokens, in_features = a.shape
    if in_features < 2:  # torch._int_mm mistakes the strides of a single column (torch 2.13)
        return generic.int_mm(a, b)
    if tokens < 2 or tokens > SWAPPED or b.stride(1) != 1:
        return torch._int_mm(a, b.t())
    if tokens <= ONE_BY_ONE:
        out = torch.empty((tokens, b.shape[0]), dtype=torch.int32)
        right = b.t()
        for left, row in zip(a.chunk(tokens), out.chunk(tokens), strict=True):
            torch._int_mm(left, right, out=row)
        return out
    missing = -tokens % (8 if tokens <= 8 else 16)  # the kernel's steps: nine tokens cost more than sixteen
    left = torch.nn.functional.pad(a, (0, 0, 0, missing)) if missing else a
    return torch._int_mm(b, left.t()).t()[:tokens].contiguous()


def scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Return the scaled product [M, N]: integers exactly, fp8 decoded to float32 and multiplied there."""
    acc = int_mm(a, b) if a.dtype == torch.int8 else cpu_decoding.fp8_mm(a, b)
    return epilogue(acc, a_scale, b_scale, bias, out_dtype)


def epilogue(
    acc: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    added: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return what `generic.epilogue` returns, bit for bit, computed some rows at a time.

    Args:
        acc: [M, N], int32 or float32, contiguous; float32 is overwritten.
        a_scale: float32; [M, 1], or [1] for all tokens.
        b_scale: float; [N, 1], or [1] for all out features.
        bias: [N], float, or None.
        out_dtype: dtype of the result.
        added: None, or two float32 matrices [M, O] and [O, N] whose product is added before `b_scale` is applied.
    """
    tokens, out_features = acc.shape
    row = b_scale.float().view(1, -1)
    if bias is not None:
        bias = bias.float()
    step = max(1, _CHUNK_ELEMENTS // max(1, out_features))
    if tokens <= step:
        return _CASTS[out_dtype](_scaled(acc, a_scale, row, bias, added))
    out = torch.empty((tokens, out_features), dtype=out_dtype)
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        scale = a_scale if a_scale.shape[0] == 1 else a_scale[part]
        out[part] = _scaled(acc[part], scale, row, bias, None if added is None else (added[0][part], added[1]))
    return out


def _scaled(
    acc: Tensor, a_scale: Tensor, row: Tensor, bias: Tensor | None, added: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Return the scaled sums in float32: integers times float32 numbers are converted to float32 first."""
    out = acc.mul_(a_scale) if acc.dtype == torch.float32 else torch.mul(acc, a_scale)
    if added is not None:
        out.addmm_(*added)
    out.mul_(row)
    return out if bias is None else out.add_(bias)


def quantize_per_token(x: Tensor, dtype: torch.dtype, left_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return what `formats.quantize_per_token` returns, bit for bit, but for the scale of a token of zeros.

    That scale is float32's smallest normal number here: all its codes are zeros, and so is what they are multiplied to.

    Args:
        x: [M, K], float32, bfloat16 or float16, M and K at least 1; any strides.
        dtype: torch.int8, torch.float8_e4m3fn or torch.float8_e5m2.
        left_out: columns that count as zeros, or None.
    """
    tokens, in_features = x.shape
    step = max(1, _CHUNK_ELEMENTS // in_features)
    if tokens <= step:
        return _quantize_rows(x, dtype, left_out)
    codes = torch.empty((tokens, in_features), dtype=dtype)
    scale = torch.empty((tokens, 1), dtype=torch.float32)
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        codes[part], scale[part] = _quantize_rows(x[part], dtype, left_out)
    return codes, scale


def _quantize_rows(x: Tensor, dtype: torch.dtype, left_out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return codes [M, K] and scales [M, 1] of a few tokens."""
    values = x.float().contiguous()
    if left_out is not None:
        values = values.index_fill(1, left_out, 0.0)
    scale = values.abs().amax(dim=1, keepdim=True).div_(formats.QMAX[dtype]).clamp_(min=_TINY)
    return _to_codes(values.div_(scale) if values is not x else values / scale, dtype), scale


def _to_codes(quotients: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the codes nearest to float32 quotients, which lie within +-qmax or round to it; overwrites them."""
    return quotients.round_().char() if dtype == torch.int8 else quotients.to(dtype)


def linear_dynamic(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype, x quantized per token."""
    values = generic.tokens(x)
    if values.numel() == 0:
        return generic.linear_dynamic(x, weight, weight_scale, bias)
    if values.shape[0] == 1 and weight.dtype == torch.int8:
        out = _one_token(values, _absmax(values), weight, weight_scale, bias)
    else:
        codes, scale = quantize_per_token(values, weight.dtype)
        out = scaled_mm(codes, weight, scale, weight_scale, bias, x.dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


def linear_tensor(
    x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype, x quantized with one scale."""
    values = generic.tokens(x)
    if values.numel() == 0 or weight.dtype != torch.int8:
        return generic.linear_tensor(x, weight, weight_scale, input_scale, bias, scaled_mm)
    absmax = _absmax(values)
    given = None if input_scale is None else input_scale.to(torch.float32).item()
    if values.shape[0] == 1:
        out = _one_token(values, absmax, weight, weight_scale, bias, given)
    else:
        scale = torch.full((1,), _scale_of(absmax, given), dtype=torch.float32)
        if given is None:
            codes = _codes_by_parts(values, scale, False)
        else:
            static = torch.full((1,), given, dtype=torch.float32)
            codes = _codes_by_parts(values, static, not absmax <= 127.0 * given)
        out = epilogue(int_mm(codes, weight), scale, weight_scale, bias, x.dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


def linear_llm_int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype, outlier columns gathered and multiplied in float.

    Without outliers it is `linear_dynamic`, and costs one more look at x.
    """
    values = generic.tokens(x)
    if values.numel() == 0:
        return generic.linear_dynamic(x, weight, weight_scale, bias)
    absmax, limit = _absmax(values), generic.in_float32(threshold)
    if absmax < limit:
        if values.shape[0] > 1:
            return linear_dynamic(x, weight, weight_scale, bias)
        out = _one_token(values, absmax, weight, weight_scale, bias)
    elif values.shape[0] == 1:
        out = _one_mixed_token(values, limit, weight, weight_scale, bias)
    else:
        outliers = _outlier_columns(values, limit)
        codes, scale = quantize_per_token(values, torch.int8, outliers)
        added = None
        if outliers is not None:
            added = (values.index_select(1, outliers).float(), _columns(weight, outliers).float().t())
        out = epilogue(int_mm(codes, weight), scale, weight_scale, bias, x.dtype, added)
    return out.view(*x.shape[:-1], weight.shape[0])


def _one_mixed_token(x: Tensor, limit: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return LLM.int8's output [1, N] in x's dtype for x [1, K], numbers of magnitude >= limit being outliers."""
    row = x[0].float()
    outliers = (row.abs() >= limit).nonzero().view(-1)
    added = torch.mv(_columns(weight, outliers).float(), row.index_select(0, outliers))
    rest = row.index_fill(0, outliers, 0.0).view(1, -1)
    return _CASTS[x.dtype](_one_token(rest, _absmax(rest), weight, weight_scale, bias, added=added))


def _one_token(
    x: Tensor,
    absmax: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    given: float | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """Return the output [1, N] in x's dtype for x [1, K] of that largest magnitude, in as few calls as can be.

    With `given` that is the scale of the activations; `added`, float32 [N], is added before the weight's scale is
    applied.

    The scale is found as a Python number and rounded to float32: for a quotient of float32 numbers that is the float32
    quotient, as float64 has more than twice float32's digits.
    """
    scale = torch.full((1,), _scale_of(absmax, given), dtype=torch.float32)
    if given is None:
        codes = _codes(x, scale, False)
    else:
        codes = _codes(x, torch.full((1,), given, dtype=torch.float32), not absmax <= 127.0 * given)
    out = int_mm(codes, weight).float().mul_(scale)
    if added is not None:
        out.add_(added)
    out.mul_(weight_scale.float().view(1, -1))
    if bias is not None:
        out.add_(bias.float())
    return _CASTS[x.dtype](out)


def _codes(x: Tensor, scale: Tensor, saturate: bool) -> Tensor:
    """Return the int8 codes of x [M, K] for one scale, float32 [1]; saturated, unless no quotient can need it.

    The scale of x itself lets none exceed 127 by more than two roundings, which rounds to 127.
    """
    values = x.float().contiguous()
    values = values.div_(scale) if values is not x else values / scale
    if saturate:
        values.clamp_(-127.0, 127.0)
    return values.round_().char()


def _codes_by_parts(x: Tensor, scale: Tensor, saturate: bool) -> Tensor:
    """Return what `_codes` returns, some rows at a time."""
    step = max(1, _CHUNK_ELEMENTS // x.shape[1])
    if x.shape[0] <= step:
        return _codes(x, scale, saturate)
    codes = torch.empty(x.shape, dtype=torch.int8)
    for start in range(0, x.shape[0], step):
        codes[start : start + step] = _codes(x[start : start + step], scale, saturate)
    return codes


def _scale_of(absmax: float, given: float | None) -> float:
    """Return the scale of int8 activations: the one given, or absmax / 127; NaN where x holds one."""
    if given is None:
        return max(absmax / 127.0, _TINY)  # in this order NaN stays NaN
    return absmax if absmax != absmax else given


def _absmax(x: Tensor) -> float:
    """Return the largest magnitude in x, which holds one number at least; NaN where it holds one."""
    low, high = torch.aminmax(x)
    return float(max(-low.item(), high.item()))


def _outlier_columns(x: Tensor, limit: float) -> Tensor | None:
    """Return the indices of the columns of x [M, K] that hold |x| >= limit, a float32 number; or None."""
    magnitudes = x.abs()
    largest = magnitudes.amax(dim=0) if x.shape[0] > 1 else magnitudes.view(-1)
    columns = (largest.float() >= limit).nonzero().view(-1)
    if x.shape[0] > 1 and bool(largest.isnan().any()):  # it hides what else is in its column
        is_outlier = magnitudes.float() >= limit
        columns = is_outlier.view(torch.uint8).amax(dim=0).nonzero().view(-1)
    return columns if columns.numel() else None


def _columns(weight: Tensor, columns: Tensor) -> Tensor:
    """Return the columns of a weight [N, K], gathered along the axis that is contiguous in memory."""
    if weight.stride(0) == 1:
        return weight.t().index_select(0, columns).t()
    return weight.index_select(1, columns)
