"""A packed 2:4 or V:N:M weight as the kernels read it: views of its bytes, chosen by shapes and dtypes. No copies.

Values are read as words, and the indices beside each word as one unit of as many times 4 bits as it holds pairs, so
that a thread that has a word has its indices:

| values | a word | pairs in it | a unit of indices |
| --- | --- | --- | --- |
| int8, fp8 | int32, four values | 2 | uint8 |
| codes of 4 bits | int32, eight values | 4 | int16 |
| bfloat16, float16 | int64, four values | 2 | uint8 |
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_kernels.configurations import architecture

TOKEN_BYTES = 16
"""What a thread of the one-token kernel loads of values at once."""

NUMBERS = {
    torch.int32: ("offset4", torch.int32, 4),
    torch.int8: ("int8", torch.int32, 2),
    torch.float8_e4m3fn: ("e4m3", torch.int32, 2),
    torch.float8_e5m2: ("e5m2", torch.int32, 2),
    torch.bfloat16: ("bf16", torch.int64, 2),
    torch.float16: ("fp16", torch.int64, 2),
}
"""For each dtype of values, NUMBERS of `codes.py`, the word's dtype and the pairs in a word."""


@dataclass(frozen=True)
class Packed:
    """A packed weight as the op gets it, with the columns of V:N:M, or without for 2:4.

    Attributes:
        values: [N, 2 T] in float, int8 or fp8, or int32 words [N, ceil(T / 4)] with codes of 4 bits; T is a quarter of
            the in features for 2:4, and one of M for V:N:M.
        indices: int32 [N, ceil(T / 8)].
        scale: [N, G], or None for values in float.
        in_features: K.
        columns: uint8 [ceil(N / V), 4 T], or None.
        rows: V; 1 without columns.
        tile: M; 4 without columns.
    """

    values: Tensor
    indices: Tensor
    scale: Tensor | None
    in_features: int
    columns: Tensor | None = None
    rows: int = 1
    tile: int = 4

    @property
    def pairs(self) -> int:
        """How many pairs of values a row has: T."""
        return self.in_features // self.tile

    @property
    def group(self) -> int:
        """How many in features share a scale; all of them where there is none."""
        return self.in_features // (1 if self.scale is None else self.scale.shape[1])

    @property
    def by_row(self) -> bool:
        """Whether a row has one scale, or none."""
        return self.group == self.in_features

    @property
    def group_of_kept(self) -> int:
        """How many of the four in features that each pair was chosen from share a scale; 0 where they do not."""
        return self.group // self.tile * 4 if self.by_row or self.group % self.tile == 0 else 0

    @property
    def bits(self) -> int:
        """Bits of a value."""
        return 4 if self.values.dtype == torch.int32 else 8 * self.values.element_size()


@dataclass(frozen=True)
class Words:
    """Views of a packed weight: values [N, U] and units of indices [N, >= U], the kind of numbers, pairs in a word."""

    values: Tensor
    indices: Tensor
    numbers: str
    pairs: int

    @property
    def wide(self) -> int:
        """How many words a thread of the one-token kernel loads at once; four numbers of fp8 count as one."""
        return TOKEN_BYTES // max(4, self.values.element_size())


def words(weight: Packed) -> Words | None:
    """Return the weight as words; None for float32, rows that are not whole words, or not contiguous."""
    values, indices = weight.values, weight.indices
    if values.dtype not in NUMBERS or values.stride(1) != 1 or indices.stride(1) != 1:
        return None
    numbers, word, pairs = NUMBERS[values.dtype]
    per_word = word.itemsize // values.element_size()
    if values.shape[1] % per_word or values.stride(0) % per_word or values.data_ptr() % word.itemsize:
        return None
    if values.storage_offset() % per_word:
        return None
    units = indices.view(torch.int16 if pairs == 4 else torch.uint8)
    return Words(values.view(word), units, numbers, pairs)


def token_words(weight: Packed) -> Words | None:
    """Return the weight as the one-token kernel reads it; None where a thread's 16 bytes are not whole, or two groups.

    Fp8 that the processor knows comes as it is.
    """
    found = words(weight)
    if found is None:
        return None
    each = 4 * found.pairs * found.wide
    if 4 * weight.pairs % each or not weight.group_of_kept or (not weight.by_row and weight.group_of_kept % each):
        return None
    if found.numbers == "e4m3" and architecture(weight.values.device) >= 89:
        return Words(weight.values, found.indices, "fp8", found.pairs)
    return found


def tile_words(weight: Packed) -> Words | None:
    """Return the weight as the kernel for tiles reads it; None where the values of a word have more than one scale."""
    found = words(weight)
    if found is None or not weight.group_of_kept:
        return None
    return found if weight.by_row or weight.group_of_kept % (4 * found.pairs) == 0 else None
