"""Every op again, slow and obviously right: loops over numbers, bit fields by hand, float64 sums.

The oracle of the tests; nothing in the package calls it. It shares no arithmetic with `formats.py` or
`generic.py` (those are what users run): fp8 codes are decoded from their bit fields and found by looking at
all of them, packed weights are read as one long integer a row. Results of products are float64, so that a
test's bound is the whole of the tested implementation's error. M tokens, K in features, N out features, G
scales a row.
"""

import functools
import math
import struct

import torch
from torch import Tensor

_FP8_FIELDS = {torch.float8_e4m3fn: (4, 3, 7), torch.float8_e5m2: (5, 2, 15)}
"""Exponent bits, mantissa bits and exponent bias of each fp8 dtype (Micikevicius et al. 2022, arXiv:2209.05433)."""


def decode_fp8(byte: int, dtype: torch.dtype) -> float:
    """Return the number that the byte 0..255 means in the fp8 `dtype`: NaN and infinity included.

    (-1)**s * 2**(e - bias) * (1 + m / 2**mbits), and 2**(1 - bias) * m / 2**mbits where e is 0. E5M2 has
    IEEE's infinities and NaNs at the largest exponent; E4M3 ("fn") has no infinity and one NaN, all ones.
    """
    exponent_bits, mantissa_bits, bias = _FP8_FIELDS[dtype]
    sign = -1.0 if byte & 0x80 else 1.0
    exponent = (byte & 0x7F) >> mantissa_bits
    mantissa = byte & ((1 << mantissa_bits) - 1)
    if exponent == (1 << exponent_bits) - 1:
        if dtype == torch.float8_e5m2:
            return sign * math.inf if mantissa == 0 else math.nan
        if mantissa == (1 << mantissa_bits) - 1:
            return math.nan
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)


@functools.cache
def fp8_magnitudes(dtype: torch.dtype) -> tuple[float, ...]:
    """Return the finite numbers of the fp8 `dtype` from 0 up; their index is their byte."""
    values = (decode_fp8(byte, dtype) for byte in range(128))
    return tuple(value for value in values if math.isfinite(value))


def round_to_code(value: float, dtype: torch.dtype) -> float:
    """Return the code's value nearest to `value`, ties to the even code, saturated: one element quantized."""
    if dtype == torch.int8:
        return float(max(-127, min(127, round(value))))
    magnitudes = fp8_magnitudes(dtype)
    nearest = min(range(len(magnitudes)), key=lambda code: (abs(magnitudes[code] - abs(value)), code % 2))
    return math.copysign(magnitudes[nearest], value)


def quantize_per_token(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the codes' values [M, K] and scales [M, 1], both float64, of x [M, K].

    A quotient of two float32 numbers, taken in float64 and rounded to float32, is the float32 quotient:
    float64 has more than twice float32's digits. So scale and x / scale here are what float32 division must
    give.
    """
    qmax = 127.0 if dtype == torch.int8 else fp8_magnitudes(dtype)[-1]
    codes = torch.zeros(x.shape, dtype=torch.float64)
    scales = torch.ones((x.shape[0], 1), dtype=torch.float64)
    for m, token in enumerate(x.tolist()):
        absmax = max((abs(value) for value in token), default=0.0)
        if absmax > 0:
            scales[m] = max(_float32(absmax / qmax), torch.finfo(torch.float32).tiny)
        for k, value in enumerate(token):
            codes[m, k] = round_to_code(_float32(value / scales[m].item()), dtype)
    return codes, scales


def scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return (a @ b.T) * a_scale * b_scale.T + bias, [M, N] in float64, exact in the product of int8 codes."""
    out = (a.double() @ b.double().T) * a_scale.double() * b_scale.double().T
    return out if bias is None else out + bias.double()


def linear_dynamic(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return the output [..., N] in float64 for x [..., K] quantized per token to the weight's dtype."""
    codes, scale = quantize_per_token(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), weight.dtype)
    out = scaled_mm(codes, weight, scale, weight_scale, bias)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def decoded_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight [N, K] in float64, each product rounded to the scale's dtype, then to `dtype`."""
    out_features, in_features = codes.shape
    numbers, scales, groups = codes.double().tolist(), scale.double().tolist(), scale.shape[1]
    products = [
        [numbers[n][k] * scales[n][k * groups // in_features] for k in range(in_features)] for n in range(out_features)
    ]
    weight = torch.tensor(products, dtype=torch.float64).view(out_features, in_features)
    return weight.to(scale.dtype).to(dtype).double()


def linear_weight_only(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return the output [..., N] in float64 for the weight decoded to x's dtype and the bias cast to it."""
    out = x.double() @ decoded_weight(weight, weight_scale, x.dtype).T
    return out if bias is None else out + bias.to(x.dtype).double()


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Return the codes [N, K] in int8 of an int32-packed weight, each row read as one long integer."""
    codes = torch.zeros((packed.shape[0], in_features), dtype=torch.int8)
    for n, words in enumerate(packed.tolist()):
        row = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
        for k in range(in_features):
            codes[n, k] = (row >> (k * bits)) % (1 << bits) - (1 << (bits - 1))
    return codes


def linear_weight_only_packed(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """Return the output [..., N] in float64 for a weight packed into int32 words."""
    return linear_weight_only(x, unpack(weight_packed, bits, x.shape[-1]), weight_scale, bias)


def _float32(value: float) -> float:
    """Return the number rounded to float32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])
