"""What the programs `interpret_*.py` have in common: outputs full of NaN, hostile codes, the interpreter's rounding."""

import math

import torch


def guarded(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a view [rows, columns] and the larger tensor it lies in, all NaN: what is not written stays NaN."""
    around = torch.full((rows + 2, columns + 3), math.nan, dtype=dtype)
    return around[1 : rows + 1, 1 : columns + 1], around


def truncated(values: torch.Tensor) -> torch.Tensor:
    """Return float32 numbers cut to bfloat16: the interpreter does not round (Triton 3.7)."""
    return (values.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def stored(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return float32 numbers in the dtype as the interpreter stores them."""
    return truncated(values) if dtype == torch.bfloat16 else values.to(dtype)


def fp8_codes(generator: torch.Generator, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return fp8 codes of all sizes: any finite code in every third row, small numbers in the others, a row of zeros.

    Every finite code is among those that can come, negative zero and subnormal numbers too.
    """
    finite = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = finite[finite.float().isfinite()]
    out = torch.randn(rows, columns, generator=generator).to(dtype)
    some = torch.randint(len(finite), out[::3].shape, generator=generator)
    out.view(torch.uint8)[::3] = finite.view(torch.uint8)[some]
    out.view(torch.uint8)[4:5] = 0
    return out


def whole_codes(generator: torch.Generator, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return fp8 codes of whole numbers from -4 to 4: the sum of any 2**20 of their products is exact in float32."""
    return torch.randint(-4, 5, (rows, columns), generator=generator).to(torch.float32).to(dtype)
