"""Number formats without arithmetic of their own in torch: E2M1, two in a byte, and E8M0, a power of two in a byte.

OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 and 5.4.1.
"""

import torch
from quantkit_kernels.formats import decode
from torch import Tensor

E8M0_DTYPES = (torch.uint8, torch.float8_e8m0fnu)
PACKED_DTYPES = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def e2m1_values() -> Tensor:
    """The 16 values of E2M1 by code, float32: a sign, two bits of exponent with bias 1, a bit of significand."""
    values = []
    for code in range(16):
        exponent, fraction = (code >> 1) & 3, (code & 1) / 2
        magnitude = fraction if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - 1)
        values.append(-magnitude if code & 8 else magnitude)
    return torch.tensor(values)


def pairs(values: Tensor, *, high_first: bool) -> Tensor:
    """The two values [256, 2] of every byte whose nibbles are places in `values` [16]."""
    byte = torch.arange(256)
    low, high = values[byte & 0xF], values[byte >> 4]
    return torch.stack((high, low) if high_first else (low, high), dim=1)


def e2m1(packed: Tensor) -> Tensor:
    """The float32 values [..., 2 * B] of bytes [..., B], the low nibble first.

    Args:
        packed: uint8, int8 or float4_e2m1fn_x2.
    """
    places = packed.contiguous().view(torch.uint8).reshape(-1).int()
    table = pairs(e2m1_values(), high_first=False)
    return table.index_select(0, places).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def e8m0(exponents: Tensor) -> Tensor:
    """2**(e - 127) of bytes e in float32, exact (the smallest is subnormal); 255 is NaN.

    Args:
        exponents: uint8 or float8_e8m0fnu.
    """
    biased = exponents.contiguous().view(torch.uint8).int()
    bits = torch.where(biased == 0, 1 << 22, biased << 23)  # float32 has the same bias; its 0 is subnormal
    return bits.view(torch.float32).masked_fill(biased == 255, torch.nan)


def read_floats(codes: Tensor) -> Tensor:
    """Codes of int8 or FP8 as float32 numbers, exact."""
    return decode(codes, torch.float32)


def scale_values(scale: Tensor) -> Tensor:
    """A stored scale in float32, exact: floats, FP8, or bytes that are powers of two."""
    if scale.dtype in E8M0_DTYPES:
        return e8m0(scale)
    return read_floats(scale)
