"""The ops' way on a CPU: integer products where the processor multiplies int8 without saturating.

`torch._int_mm` is exact where the processor has VNNI. Without it oneDNN adds pairs of products in 16 bits
that saturate, and the result is wrong without a word; there the exact float32 product of `generic.int_mm`
runs, with one warning. Both give the same bits.
"""

import functools
import logging

import torch
from torch import Tensor

from quantkit_kernels import formats, generic

logger = logging.getLogger("quantkit")

_DECODED_ELEMENTS = 1 << 19
"""An fp8 weight is decoded this many elements at a time: 2 MiB in float32."""


@functools.cache
def has_exact_int_mm() -> bool:
    """Return whether `torch._int_mm` is exact on this processor, that is, whether it has VNNI."""
    return bool(torch.cpu._is_vnni_supported())


@functools.cache
def warn_no_vnni() -> None:
    """Say, once, that int8 products run the slower way."""
    logger.warning("this processor has no VNNI: int8 products run in float32 (exact, but several times slower)")


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Return the exact product a @ b.T, [M, N] in int32, of a [M, K] and b [N, K] in int8."""
    if not has_exact_int_mm():
        warn_no_vnni()
        return generic.int_mm(a, b)
    if a.shape[1] < 2:  # torch._int_mm mistakes the strides of a single column (torch 2.13)
        return generic.int_mm(a, b)
    return torch._int_mm(a, b.t())


def fp8_mm(a: Tensor, b: Tensor) -> Tensor:
    """Return the product a @ b.T, [M, N] in float32, of a [M, K] and b [N, K] in fp8.

    Some rows of b are decoded at a time, so that their float32 copy stays in cache: at 4096 by 4096 twice as
    fast as decoding all of it first.
    """
    left = formats.decode(a, torch.float32)
    out = torch.empty((a.shape[0], b.shape[0]), dtype=torch.float32)
    step = max(1, _DECODED_ELEMENTS // max(1, b.shape[1]))
    for start in range(0, b.shape[0], step):
        part = slice(start, start + step)
        torch.mm(left, formats.decode(b[part], torch.float32).t(), out=out[:, part])
    return out


def scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Return the scaled product [M, N]: integers exactly, fp8 decoded to float32 and multiplied there."""
    acc = int_mm(a, b) if a.dtype == torch.int8 else fp8_mm(a, b)
    return generic.epilogue(acc, a_scale, b_scale, bias, out_dtype)


def linear_llm_int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype, outlier columns gathered and multiplied in float.

    Without outliers it is `linear_dynamic`, and costs one more look at x.
    """
    values = generic.tokens(x)
    outliers = _outlier_columns(values, threshold)
    if outliers is None:
        return generic.linear_dynamic(x, weight, weight_scale, bias, scaled_mm)
    codes, scale = formats.quantize_per_token(values.index_fill(1, outliers, 0.0), weight.dtype)
    out = generic.epilogue(int_mm(codes, weight), scale, weight_scale, None, torch.float32)
    decoded = formats.dequantize(_columns(weight, outliers), weight_scale.float())
    out.addmm_(values.index_select(1, outliers).float(), decoded.t())
    if bias is not None:
        out += bias.to(torch.float32)
    return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _outlier_columns(x: Tensor, threshold: float) -> Tensor | None:
    """Return the indices of the columns of x [M, K] that hold |x| >= threshold, compared in float32; or None."""
    if x.numel() == 0:
        return None
    limit = generic.in_float32(threshold)
    low, high = (bound.item() for bound in torch.aminmax(x))
    if -limit < low and high < limit:  # false where x holds NaN, which hides what else is there
        return None
    is_outlier = x.abs().float() >= limit
    columns = is_outlier.view(torch.uint8).amax(dim=0).nonzero().view(-1)  # amax of bytes: faster than any()
    return columns if columns.numel() else None


def _columns(weight: Tensor, columns: Tensor) -> Tensor:
    """Return the columns of a weight [N, K], gathered along the axis that is contiguous in memory."""
    if weight.stride(0) == 1:
        return weight.t().index_select(0, columns).t()
    return weight.index_select(1, columns)
