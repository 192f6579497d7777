"""The ops' way on a CPU: integer products where the processor multiplies int8 without saturating.

`torch._int_mm` is exact where the processor has VNNI. Without it oneDNN adds pairs of products in 16 bits
that saturate, and the result is wrong without a word; there the exact float32 product of `generic.int_mm`
runs, with one warning. Both give the same bits.
"""

import functools
import logging

import torch
from torch import Tensor

from quantkit_kernels import generic

logger = logging.getLogger("quantkit")


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


def scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Return the scaled product [M, N]: integers exactly, fp8 decoded to float32 and multiplied there."""
    if a.dtype != torch.int8:
        return generic.scaled_mm(a, b, a_scale, b_scale, bias, out_dtype)
    return generic.epilogue(int_mm(a, b), a_scale, b_scale, bias, out_dtype)
