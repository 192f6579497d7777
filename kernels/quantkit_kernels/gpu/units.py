"""A quantized weight as the weight-only kernels read it: views of its bytes, chosen by shapes and dtypes. No copies."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_kernels.configurations import architecture

TOKEN_BYTES = 16
"""What a thread of the one-token kernel loads at once."""

WORD_TOKENS = 64
"""Up to so many tokens "tiles" reads codes of 8 bits as words of four."""


@dataclass(frozen=True)
class Units:
    """A quantized weight as a kernel takes it.

    Attributes:
        tensor: [N, U], rows contiguous: int8, uint8 or fp8 with a code each, or int32 words.
        numbers: how its units are read, NUMBERS of `codes.py`.
        per_unit: codes in a unit.
    """

    tensor: Tensor
    numbers: str
    per_unit: int


def token_units(weight: Tensor, in_features: int, groups: int, bits: int | None) -> Units | None:
    """Return the weight as "token" reads it: words, or fp8; None where a thread's 16 bytes would be in two groups."""
    units = word_units(weight, in_features, bits)
    if units is None and by_bytes(weight, bits).numbers == "fp8":
        units = by_bytes(weight, bits)
    if units is None:
        return None
    wide = TOKEN_BYTES // units.tensor.element_size() * units.per_unit
    whole = in_features % wide == 0 and (groups == 1 or in_features // groups % wide == 0)
    return units if whole else None


def tile_units(weight: Tensor, in_features: int, groups: int, bits: int | None, tokens: int) -> Units:
    """Return the weight as "tiles" reads it: words where it can, but for many tokens bytes if it has any.

    From words codes become numbers in fewer instructions, but x has to be taken apart.
    """
    words = word_units(weight, in_features, bits)
    in_words = words is not None and (groups == 1 or in_features // groups % words.per_unit == 0)
    if words is not None and in_words and (bits == 4 or tokens <= WORD_TOKENS):
        return words
    return by_bytes(weight, bits)


def word_units(weight: Tensor, in_features: int, bits: int | None) -> Units | None:
    """Return the weight as int32 words, without a copy; None for fp8 that the device knows, or odd sizes."""
    if bits == 4:
        return Units(weight, "offset4", 8)
    if in_features % 4:
        return None
    if bits == 8:
        return Units(weight, "offset8", 4)
    numbers = by_bytes(weight, bits).numbers
    if numbers == "fp8" or weight.stride(0) % 4 or weight.data_ptr() % 4:
        return None
    return Units(weight.view(torch.int32), numbers, 4)


def by_bytes(weight: Tensor, bits: int | None) -> Units:
    """Return the weight of 8 bits as bytes, without a copy."""
    if bits == 8:
        return Units(weight.view(torch.uint8), "offset8", 1)
    if by_bits(weight):
        return Units(weight.view(torch.uint8), "e4m3", 1)
    return Units(weight, "int8" if weight.dtype == torch.int8 else "fp8", 1)


def by_bits(weight: Tensor) -> bool:
    """Return whether the weight is E4M3 on a device that does not know it: before sm_89."""
    return weight.dtype == torch.float8_e4m3fn and architecture(weight.device) < 89
