"""Ground truth of the number formats: quantize, dequantize, pack and unpack, in plain torch.

Every kernel of the package is judged against these functions, and files are written with them. Symmetric
throughout: a stored code times its scale is the value, there is no zero point. M tokens, K in features, N out
features, G groups of K / G neighbours along K. "scale" multiplies on dequantize.

A float operation on a dtype with p significant bits rounds with a relative error of at most u = 2**-p
(float32 2**-24, float16 2**-11, bfloat16 2**-8); the bounds below are written with it.
"""

import sys

import torch
from torch import Tensor

QMAX: dict[torch.dtype, float] = {
    torch.int8: 127.0,
    torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max,
    torch.float8_e5m2: torch.finfo(torch.float8_e5m2).max,
}
"""Largest code of each quantized dtype. Int8 leaves -128 out, so that codes are symmetric."""

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of weights, activations and scales."""

WEIGHT_RANGES = ("absmax", "mse")

_CHUNK_ELEMENTS = 1 << 20
"""Weights are quantized this many elements at a time, so that temporaries stay small and in cache."""


def quantize_weight(
    weight: Tensor,
    dtype: torch.dtype,
    group_size: int | None = None,
    weight_range: str = "absmax",
) -> tuple[Tensor, Tensor]:
    """Return the codes [..., N, K] in `dtype` and their scales [..., N, G] in the weight's dtype.

    The scale is absmax / qmax, computed in float32 and rounded to the weight's dtype; codes are weight /
    scale with that rounded scale, divided in float32, rounded half to even and clamped to +-qmax (fp8:
    clamped, then rounded to the nearest even code). A row or group of zeros has scale 1 and codes 0. A scale
    below the smallest normal number of the weight's dtype is raised to it, which costs int8 levels in float16
    rows whose largest weight is below 0.0078.

    Error, int8 with "absmax": |weight - code * scale| <= scale / 2 * (1 + 2**-16), because a scale rounded
    down by u leaves |weight| / scale <= 127 / (1 - 2**-8) < 127.5; `dequantize` adds one rounding of the
    product.

    Args:
        weight: [..., N, K], float32, bfloat16 or float16, all finite.
        dtype: torch.int8, torch.float8_e4m3fn or torch.float8_e5m2.
        group_size: neighbours along K that share a scale; None makes one scale an out feature (G = 1).
        weight_range: "absmax", or "mse": of a grid of ranges around absmax the one with the least squared
            error of the dequantized row or group; never worse than absmax (Nagel et al. 2021,
            arXiv:2106.08295, section 3.1).

    Raises:
        ValueError: a dtype, group size or range that is not offered, or a weight with NaN or infinity.
    """
    _check_weight(weight, dtype, weight_range)
    *lead, in_features = weight.shape
    length = in_features if group_size is None else group_size
    if group_size is not None and (group_size < 1 or in_features % group_size):
        raise ValueError(f"group_size {group_size} does not divide the {in_features} in features")
    groups = 1 if group_size is None else in_features // group_size
    rows = weight.reshape(weight.numel() // max(length, 1), length)
    codes = torch.empty(rows.shape, dtype=dtype, device=weight.device)
    scale = torch.ones((*lead, groups), dtype=weight.dtype, device=weight.device)
    flat_scale = scale.view(-1, 1)
    step = max(1, _CHUNK_ELEMENTS // max(length, 1))
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        flat_scale[part] = _absmax_scale(rows[part], dtype)
        if weight_range == "mse":
            flat_scale[part] = _mse_scale(rows[part], flat_scale[part], dtype)
        codes[part] = _encode(rows[part].float(), flat_scale[part].float(), dtype)
    return codes.view(weight.shape), scale


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """Return q.to(scale.dtype) * scale, [..., N, K] in the scale's dtype.

    Codes of int8 and fp8 are exact in every float dtype offered, so the result is the real product rounded
    once: relative error <= u of the scale's dtype (above its smallest normal number). The arithmetic is the
    one of compressed-tensors, bit for bit.

    Args:
        q: [..., N, K] codes, int8 or fp8.
        scale: [..., N, G], float; G divides K.

    Raises:
        ValueError: when G does not divide K.
    """
    in_features, groups = q.shape[-1], scale.shape[-1]
    if groups == 1:
        return decode(q, scale.dtype) * scale
    if groups == 0 or in_features % groups:
        raise ValueError(f"{groups} scales a row do not divide the {in_features} in features")
    grouped = q.reshape(*q.shape[:-1], groups, in_features // groups)
    return (decode(grouped, scale.dtype) * scale.unsqueeze(-1)).flatten(-2)


def decode(q: Tensor, dtype: torch.dtype) -> Tensor:
    """Return q.to(dtype), the codes as numbers: exact for int8 and fp8 in every float dtype offered.

    Fp8 on a CPU goes through the bits of float16, which has the same fields, wider: some ten times faster than
    torch's conversion (torch 2.13), and the same numbers, infinities, NaN and -0 included.

    Args:
        q: codes, int8 or fp8, any shape and strides.
        dtype: float32, bfloat16, float16 or float64.
    """
    if q.device.type != "cpu" or q.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return q.to(dtype)
    signed = q.view(torch.int8)
    bits = signed.to(torch.int16)
    if q.dtype == torch.float8_e5m2:  # the upper byte of a float16
        return bits.bitwise_left_shift_(8).view(torch.float16).to(dtype)
    # The sign was extended to the bits 14 and 15: clear 14, the top of float16's exponent, whose bias is larger by 8.
    half = bits.bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16)
    values = half.mul_(2.0**8).masked_fill_((signed & 0x7F) == 0x7F, torch.nan)
    return values.to(dtype)


def quantize_per_token(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the codes [M, K] in `dtype` and one scale for each token, [M, 1] in float32.

    scale = absmax over K / qmax in float32; a token of zeros has scale 1. Int8: |x - code * scale| <= scale /
    2 * (1 + 2**-16). A token that holds NaN or infinity has a scale that is NaN or infinite, so that the
    damage shows in whatever is computed from it.

    Args:
        x: [M, K], float32, bfloat16 or float16; any strides.
        dtype: torch.int8, torch.float8_e4m3fn or torch.float8_e5m2.

    Raises:
        ValueError: for a dtype that is not offered.
    """
    if dtype not in QMAX:
        raise ValueError(f"cannot quantize to {dtype}: expected one of {_names(QMAX)}")
    values = x.float().contiguous()
    scale = _absmax_scale(values, dtype)
    return _encode(values, scale, dtype), scale


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
    nibbles = torch.stack((raw & 0xF, raw >> 4), dim=-1).view(torch.int8)
    return nibbles.flatten(-2)[..., :in_features] - 8


def _absmax_scale(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return absmax / qmax of each row, [R, 1] in the rows' dtype: 1 for zeros, never a subnormal."""
    if rows.shape[1] == 0:
        return rows.new_ones((rows.shape[0], 1))
    absmax = rows.abs().amax(dim=1, keepdim=True).float()
    scale = (absmax / QMAX[dtype]).to(rows.dtype).clamp(min=torch.finfo(rows.dtype).tiny)
    return torch.where(absmax == 0, torch.ones_like(scale), scale)


def _encode(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the codes [R, L] of float32 rows [R, L] for float32 scales [R, 1]."""
    qmax = QMAX[dtype]
    if dtype == torch.int8:
        return (rows / scale).round_().clamp_(-qmax, qmax).to(dtype)
    return (rows / scale).clamp_(-qmax, qmax).to(dtype)


def _mse_scale(rows: Tensor, absmax_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scales [R, 1] of least squared error among absmax_scale times a grid of factors.

    Int8 gains by shrinking the range below outliers. An fp8 code has the same relative precision at every
    power of two, so a factor matters only by where the row's values fall between neighbouring codes: one
    octave around 1 holds every such alignment.
    """
    if dtype == torch.int8:
        factors = torch.linspace(0.4, 1.0, 61).tolist()[:-1]
    else:
        factors = torch.logspace(-0.5, 0.5, 49, base=2.0).tolist()
    values = rows.float()
    best_scale = absmax_scale.clone()
    best_error = _squared_error(values, best_scale, dtype)
    tiny = torch.finfo(rows.dtype).tiny
    for factor in factors:
        scale = (absmax_scale.float() * factor).to(rows.dtype).clamp(min=tiny)
        error = _squared_error(values, scale, dtype)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


def _squared_error(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the squared error [R, 1], in float64, of float32 rows after quantizing with scales [R, 1]."""
    difference = dequantize(_encode(rows, scale.float(), dtype), scale).float().sub_(rows)
    return difference.square_().sum(dim=1, keepdim=True, dtype=torch.float64)


def _check_weight(weight: Tensor, dtype: torch.dtype, weight_range: str) -> None:
    """Raise ValueError where `quantize_weight` cannot do what was asked."""
    if weight.ndim < 2 or weight.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"weight is {weight.dtype} with {weight.ndim} dimensions: expected [..., N, K] in one of "
            f"{_names(FLOAT_DTYPES)}"
        )
    if dtype not in QMAX:
        raise ValueError(f"cannot quantize to {dtype}: expected one of {_names(QMAX)}")
    if weight_range not in WEIGHT_RANGES:
        raise ValueError(f"weight_range is {weight_range!r}: expected one of {', '.join(WEIGHT_RANGES)}")
    if weight.numel() and not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds NaN or infinity: it cannot be quantized")


def _check_bits(bits: int) -> None:
    """Raise ValueError unless bits is 1 to 8."""
    if not 1 <= bits <= 8:
        raise ValueError(f"{bits} bits: expected 1 to 8")


def _names(dtypes: dict[torch.dtype, float] | tuple[torch.dtype, ...]) -> str:
    """Return the dtypes' names for a message."""
    return ", ".join(str(dtype) for dtype in dtypes)
