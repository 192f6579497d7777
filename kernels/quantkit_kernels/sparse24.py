"""2:4 sparse weights packed: of every four neighbours along K two values, and where they stood.

N out features, K in features; 4 divides K. A weight [N, K] becomes

- values [N, K / 2] in the weight's dtype: the two kept numbers of every four, in the order in which they stood;
- indices int32 [N, ceil(K / 32)]: for each value its place among its four, 0 to 3, in 2 bits. Value j of a row lies in
  word j // 16 of the row, in the bits 2 * (j % 16) and the next, counted from the lowest. So the input that value j
  meets is 4 * (j // 2) + place. Bits past the end of a row are zero.

In each four the first place is the smaller one. Where fewer than two of the four differ from zero, zeros fill up from
the lowest places: every 2:4 weight has one packed form. Values lie in rows and in the order of the inputs, so that
threads side by side read values side by side, and sixteen values share a word of indices, which a warp reads once.

A weight costs 9/16 of its bytes in bfloat16, int8 and fp8 5/16 of bfloat16's, and int4 (`pack_int32` of the values)
3/16. Zeros that aren't kept come back as +0, also where they were -0.
"""

import functools
import math
import sys

import torch
from torch import Tensor
from torch.nn.functional import pad as padded

from quantkit_kernels.packing import pack_int32, unpack_int32

VALUE_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
"""Dtypes of values; four bits lie in int8 until they are packed."""

GROUP, PER_WORD = 4, 16
"""Neighbours of which two are kept, and values that a word of indices speaks of."""

_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_WIDE = {1: torch.int32, 2: torch.int64}
_PAIR = {8: torch.int16, 16: torch.int32}
_PIECE = 1 << 19
"""Weights worked on at a time, so that temporaries stay in cache."""


def index_words(in_features: int) -> int:
    """Return how many int32 words of indices a row of `in_features` weights takes."""
    return -(-in_features // (2 * PER_WORD))


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return values [..., N, K / 2] and indices int32 [..., N, ceil(K / 32)] of a 2:4 weight, both contiguous.

    Args:
        weight: [..., N, K] in one of VALUE_DTYPES; of every four neighbours along K at least two are zero.

    Raises:
        ValueError: for another dtype, or K; or four neighbours of which more than two aren't zero.
    """
    _check_weight(weight)
    *lead, in_features = weight.shape
    groups = in_features // GROUP
    raw = weight.reshape(math.prod(lead), groups, GROUP).contiguous()
    bits = raw.view(_RAW[weight.dtype.itemsize])
    values = torch.empty((*bits.shape[:2], 2), dtype=bits.dtype, device=weight.device)
    index = torch.empty(bits.shape[:2], dtype=torch.uint8, device=weight.device)
    for part in _parts(bits.shape[0], in_features):
        mask = nonzero(raw[part])
        pattern = (mask * mask.new_tensor([1, 2, 4, 8], dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
        places = _places(weight.device)[pattern.int()]  # [rows, groups, 2], of more than two 0 and 0
        worst = (mask.sum(-1) > 2).nonzero()
        if len(worst):
            row, group = worst[0].tolist()
            raise ValueError(
                f"row {row + part.start} of the weight is no 2:4 row: of columns {GROUP * group} to "
                f"{GROUP * group + 3} more than two differ from zero"
            )
        values[part] = bits[part].gather(-1, places)
        index[part] = (places[..., 0] | places[..., 1] << 2).to(torch.uint8)
    packed = _join(index).view(*lead, index_words(in_features))
    return values.view(*lead, in_features // 2).view(weight.dtype), packed


def unpack(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """Return the weight [..., N, K] in the values' dtype, contiguous, that `pack` packed.

    Args:
        values: [..., N, K / 2], one of VALUE_DTYPES.
        indices: [..., N, ceil(K / 32)], int32, each first place before the second (see `are_ascending`).
        in_features: K.

    Raises:
        ValueError: for other dtypes or shapes.
    """
    check_packed(values, indices, in_features)
    *lead, _ = values.shape
    groups = in_features // GROUP
    raw = values.reshape(math.prod(lead), groups, 2).contiguous().view(_RAW[values.dtype.itemsize])
    words = _rows(indices)
    out = torch.empty((*raw.shape[:2], GROUP), dtype=raw.dtype, device=values.device)
    wide = _WIDE.get(values.dtype.itemsize) if sys.byteorder == "little" else None
    for part in _parts(raw.shape[0], in_features):
        nibbles = _split(words[part], groups)
        if wide is None or not nibbles.numel():
            _select(out[part], raw[part], nibbles)
            continue
        bits = 8 * values.dtype.itemsize
        pairs = raw[part].view(_PAIR[bits]).squeeze(-1).to(wide)
        mask = (1 << bits) - 1
        _place(out[part].view(wide).squeeze(-1), pairs & mask, pairs.bitwise_right_shift_(bits) & mask, nibbles, bits)
    return out.view(*lead, in_features).view(values.dtype)


def _select(out: Tensor, pairs: Tensor, nibbles: Tensor) -> None:
    """Write the fours [R, G, 4] of pairs [R, G, 2], a place after the other."""
    first, second = nibbles & 3, nibbles >> 2
    low, high = pairs[..., 0], pairs[..., 1]
    for place in range(GROUP):  # the smaller place is 0, 1 or 2, the larger one 1, 2 or 3
        kept = torch.where(second == place, high, 0) if place else torch.zeros_like(low)
        out[..., place] = torch.where(first == place, low, kept) if place < GROUP - 1 else kept


def _place(out: Tensor, first: Tensor, second: Tensor, nibbles: Tensor, bits: int) -> None:
    """Write the fours as one whole number each, `out` [R, G], of pairs in as many `bits` a number; overwrites these.

    A tenth of the time of `_select`, on a CPU, which goes by single numbers and with gaps between them.
    """
    first <<= nibbles.bitwise_and(3).mul_(bits).to(out.dtype)
    second <<= nibbles.bitwise_right_shift(2).mul_(bits).to(out.dtype)
    torch.bitwise_or(first, second, out=out)


def pack_int4(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values of 2:4 codes of 4 bits as int32 words [..., N, ceil(K / 16)], and their indices.

    Raises:
        ValueError: as `pack` and `pack_int32`.
    """
    values, indices = pack(codes)
    return pack_int32(values, 4), indices


def unpack_int4(words: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """Return the codes int8 [..., N, K] that `pack_int4` packed."""
    groups = in_features // GROUP
    if sys.byteorder != "little" or words.ndim != 2 or not words.numel() or in_features % GROUP:
        return unpack(unpack_int32(words, 4, in_features // 2), indices, in_features)
    fours = torch.empty((words.shape[0], groups), dtype=torch.int32, device=words.device)
    for part in _parts(words.shape[0], in_features):
        pairs = words[part].contiguous().view(torch.uint8)[:, :groups]  # a pair is a byte, code + 8 in four bits each
        first, second = pairs.bitwise_and(15).sub_(8).int(), pairs.bitwise_right_shift(4).sub_(8).int()
        _place(fours[part], first, second, _split(indices[part], groups), 8)
    return fours.view(torch.int8)


def indices_of_bitmask(bitmask: Tensor, in_features: int) -> Tensor:
    """Return the indices int32 [..., N, ceil(K / 32)] of weights whose places are given as bits.

    Args:
        bitmask: [..., N, ceil(K / 8)], uint8; bit k % 8 of byte k // 8, counted from the lowest, is 1 where weight k is
            stored. In every four just two are.
        in_features: K.

    Raises:
        ValueError: for other dtypes or shapes, or four bits of which not just two are set.
    """
    _check_in_features(in_features)
    width = -(-in_features // 8)
    if bitmask.dtype != torch.uint8 or bitmask.ndim < 1 or bitmask.shape[-1] != width:
        raise ValueError(f"bitmask is {bitmask.dtype} {list(bitmask.shape)}: expected torch.uint8 [..., {width}]")
    half = in_features % 8 != 0
    bits = bitmask.clone()
    if half:  # the upper four of the last byte belong to nothing: any two will do, and are taken out below
        if bool((bits[..., -1] >> 4).any()):
            raise ValueError(f"bitmask has bits set beyond its {in_features} columns")
        bits[..., -1] |= 0x30
    found = _index_of_mask(bitmask.device)[bits.int()]
    if bool((found < 0).any()):
        raise ValueError("bitmask is none of a 2:4 weight: in some four neighbours not just two are stored")
    index = found.to(torch.uint8)
    if half:
        index[..., -1] &= 0x0F
    return _words(index)


def are_ascending(indices: Tensor, in_features: int) -> bool:
    """Return whether in each four the first place is before the second, as `pack` writes them."""
    nibbles = _split(_rows(indices), in_features // GROUP)
    return bool(((nibbles & 3) < (nibbles >> 2)).all())


def check_packed(values: Tensor, indices: Tensor, in_features: int) -> None:
    """Return nothing; raise ValueError unless values and indices have the shapes and dtypes of packed rows of K."""
    _check_in_features(in_features)
    if values.dtype not in VALUE_DTYPES or values.ndim < 1 or values.shape[-1] != in_features // 2:
        raise ValueError(
            f"values are {values.dtype} {list(values.shape)}: expected [..., {in_features // 2}] in float32, bfloat16, "
            "float16, int8, float8_e4m3fn or float8_e5m2"
        )
    expected = (*values.shape[:-1], index_words(in_features))
    if indices.dtype != torch.int32 or indices.shape != expected:
        raise ValueError(f"indices are {indices.dtype} {list(indices.shape)}: expected torch.int32 {list(expected)}")


def _check_weight(weight: Tensor) -> None:
    if weight.dtype not in VALUE_DTYPES or weight.ndim < 1:
        raise ValueError(
            f"weight is {weight.dtype} {list(weight.shape)}: expected [..., K] in float32, bfloat16, float16, int8, "
            "float8_e4m3fn or float8_e5m2"
        )
    _check_in_features(weight.shape[-1])


def _check_in_features(in_features: int) -> None:
    if in_features % GROUP or in_features < 0:
        raise ValueError(f"K is {in_features}: 2:4 needs a multiple of 4 in features, leave the layer dense")


def _parts(rows: int, in_features: int) -> list[slice]:
    """Return slices of rows that hold some _PIECE weights each."""
    step = max(1, _PIECE // max(in_features, 1))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _rows(tensor: Tensor) -> Tensor:
    """Return a tensor [..., B] as [R, B]."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def nonzero(weight: Tensor) -> Tensor:
    """Return where numbers differ from 0, NaN included; of fp8 from its bits, as torch has no comparison of it."""
    if weight.dtype.itemsize == 1 and weight.is_floating_point():
        return weight.view(torch.uint8) & 0x7F != 0
    return weight != 0


def _pair(pattern: int) -> tuple[int, int]:
    """Return the places kept of four of which the bits of `pattern` are nonzero: theirs, filled up from the lowest."""
    kept = [place for place in range(GROUP) if pattern >> place & 1]
    if len(kept) > 2:
        return 0, 0
    rest = [place for place in range(GROUP) if place not in kept]
    first, second = sorted(kept + rest[: 2 - len(kept)])
    return first, second


@functools.cache
def _places(device: torch.device) -> Tensor:
    """Return the kept places int64 [16, 2] by pattern."""
    return torch.tensor([_pair(pattern) for pattern in range(16)], device=device)


@functools.cache
def _index_of_mask(device: torch.device) -> Tensor:
    """Return the byte of indices int16 [256] of each byte of a bitmask; -1 where not just two of a four are set."""

    def nibble(pattern: int) -> int:
        first, second = _pair(pattern)
        return first | second << 2 if pattern.bit_count() == 2 else -1

    halves = [(nibble(byte & 15), nibble(byte >> 4)) for byte in range(256)]
    return torch.tensor([low | high << 4 if min(low, high) >= 0 else -1 for low, high in halves], dtype=torch.int16).to(
        device
    )


def _join(nibbles: Tensor) -> Tensor:
    """Return int32 words [R, ceil(G / 8)] of uint8 [R, G] that hold 4 bits each, the first in the lowest bits."""
    even = padded(nibbles, (0, nibbles.shape[1] % 2))
    return _words(even[:, 0::2] | even[:, 1::2] << 4)


def _words(data: Tensor) -> Tensor:
    """Return int32 words [..., ceil(B / 4)] of bytes [..., B], the first in the lowest bits."""
    whole = padded(data, (0, -data.shape[-1] % 4)).contiguous()
    if not whole.numel():
        return whole.new_empty((*whole.shape[:-1], whole.shape[-1] // 4), dtype=torch.int32)
    if sys.byteorder == "little":
        return whole.view(torch.int32)
    four = whole.view(*whole.shape[:-1], -1, 4).int()
    return four[..., 0] | four[..., 1] << 8 | four[..., 2] << 16 | four[..., 3] << 24


def _split(words: Tensor, count: int) -> Tensor:
    """Return uint8 [R, count] of the 4 bits each in int32 words [R, W], from the lowest."""
    if sys.byteorder == "little":
        data = words.contiguous().view(torch.uint8)
    else:
        data = torch.stack([words >> shift & 0xFF for shift in (0, 8, 16, 24)], dim=-1).to(torch.uint8).flatten(-2)
    if sys.byteorder == "little":
        both = data.to(torch.int16)
        return both.bitwise_or_(both << 4).bitwise_and_(0x0F0F).view(torch.uint8)[:, :count]
    return torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)[:, :count]
