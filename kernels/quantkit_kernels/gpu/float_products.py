# ruff: noqa: N803 (compile-time constants are written large, as Triton writes them)
"""Products of floats with codes of one byte on tensor cores: every single product exact, the sums in float32.

Codes of int8 and fp8 are exact in bfloat16 and in float16. A float32 number is the sum of three bfloat16 numbers.
"""

import torch
import triton
import triton.language as tl
from triton import knobs

from quantkit_kernels.gpu.codes import byte_codes


@triton.jit  # type: ignore[untyped-decorator]
def _dot(x_mk, units_nk, acc, NUMBERS: tl.constexpr, COMPUTE: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.dot(x_mk.to(COMPUTE), byte_codes(units_nk, NUMBERS, COMPUTE).T, acc)


@triton.jit  # type: ignore[untyped-decorator]
def add_product(x_mk, units_nk, acc, NUMBERS: tl.constexpr, COMPUTE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return acc + x_mk @ codes.T in float32, for x in any float dtype; NUMBERS says how a unit is read (codes.py).

    Float32 numbers from 3.39e38 up, where bfloat16 ends, count as infinite.
    """
    if x_mk.dtype == tl.float32:
        high = x_mk.to(tl.bfloat16).to(tl.float32)
        rest = tl.where(tl.abs(high) < float("inf"), x_mk - high, 0.0)
        middle = rest.to(tl.bfloat16).to(tl.float32)
        low = rest - middle  # eight bits are left
        acc = _dot(low, units_nk, acc, NUMBERS, COMPUTE)
        acc = _dot(middle, units_nk, acc, NUMBERS, COMPUTE)
        acc = _dot(high, units_nk, acc, NUMBERS, COMPUTE)
    else:
        acc = _dot(x_mk, units_nk, acc, NUMBERS, COMPUTE)
    return acc


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """Return what tensor cores multiply for x of that dtype; float32 in the interpreter, which has no bfloat16."""
    if knobs.runtime.interpret:
        return tl.float32
    return tl.float16 if dtype == torch.float16 else tl.bfloat16
