"""Codes packed densely into int32 words, and unpacked: what compressed-tensors' "pack-quantized" lays on disk.

N out features, K in features. `formats` hands these on: it is the address that others import from.
"""

import sys

import torch
from torch import Tensor


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Return the codes packed densely into int32 words, [..., N, ceil(K * bits / 32)].

    Element k of a row is stored as code + 2**(bits - 1) in the bits k * bits to k * bits + bits - 1 of that
    row, counted from the lowest bit of its first word; elements may straddle words. The rest of the last word
    is zero.

    Args:
        codes: [..., N, K], int8, every code in [-2**(bits - 1), 2**(bits - 1) - 1].
        bits: 1 to 8.

    Raises:
        ValueError: for another dtype, number of bits, or a code out of range.
    """
    _check_bits(bits)
    if codes.dtype != torch.int8:
        raise ValueError(f"codes are {codes.dtype}: expected torch.int8")
    offset = 1 << (bits - 1)
    if codes.numel() and (int(codes.min()) < -offset or int(codes.max()) >= offset):
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits")
    *lead, in_features = codes.shape
    blocks = -(-in_features // 32)
    padded = torch.nn.functional.pad(codes, (0, blocks * 32 - in_features), value=-offset)
    padded = padded.view(*lead, blocks, 32)
    words = torch.zeros((*lead, blocks, bits), dtype=torch.int32, device=codes.device)
    for element in range(32):
        word, low = divmod(element * bits, 32)
        value = padded[..., element].to(torch.int32) + offset
        words[..., word] |= value << low
        if low + bits > 32:
            words[..., word + 1] |= value >> (32 - low)
    return words.view(*lead, blocks * bits)[..., : packed_words(in_features, bits)].contiguous()


def unpack_int32(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Return the codes [..., N, in_features] in int8 that `pack_int32` packed.

    Args:
        packed: [..., N, ceil(in_features * bits / 32)], int32.
        bits: 1 to 8.
        in_features: K; needed because the last word of a row may be partly empty.

    Raises:
        ValueError: for another dtype, number of bits, or a width that does not belong to `in_features`.
    """
    _check_bits(bits)
    if packed.dtype != torch.int32 or packed.shape[-1] != packed_words(in_features, bits):
        raise ValueError(
            f"packed weight is {packed.dtype} with {packed.shape[-1]} words a row: expected torch.int32 with "
            f"{packed_words(in_features, bits)} for {in_features} in features of {bits} bits"
        )
    if bits in (4, 8) and sys.byteorder == "little":
        return _unpack_bytes(packed, bits, in_features)
    *lead, width = packed.shape
    blocks = -(-in_features // 32)
    words = torch.nn.functional.pad(packed, (0, blocks * bits - width)).view(*lead, blocks, bits)
    codes = torch.empty((*lead, blocks, 32), dtype=torch.int8, device=packed.device)
    for element in range(32):
        word, low = divmod(element * bits, 32)
        in_word = min(bits, 32 - low)
        value = (words[..., word] >> low) & ((1 << in_word) - 1)
        if in_word < bits:
            value |= (words[..., word + 1] & ((1 << (bits - in_word)) - 1)) << in_word
        codes[..., element] = value - (1 << (bits - 1))
    return codes.view(*lead, blocks * 32)[..., :in_features].contiguous()


def packed_words(in_features: int, bits: int) -> int:
    """Return how many int32 words a row of `in_features` codes takes."""
    return -(-in_features * bits // 32)


def _unpack_bytes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Return what `unpack_int32` returns, for 8 or 4 bits, where no element straddles a byte."""
    raw = packed.contiguous().view(torch.uint8)
    if bits == 8:  # adding 128 modulo 256 is flipping the top bit
        return (raw[..., :in_features] ^ 0x80).view(torch.int8)
    wide = raw.to(torch.int16)  # each byte grows to two, its upper half shifted into the second, in place
    codes = wide.bitwise_or_(wide << 4).bitwise_and_(0x0F0F).view(torch.int8)
    return codes.sub_(8)[..., :in_features].contiguous()


def _check_bits(bits: int) -> None:
    """Raise ValueError unless bits is 1 to 8."""
    if not 1 <= bits <= 8:
        raise ValueError(f"{bits} bits: expected 1 to 8")
