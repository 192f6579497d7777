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
    codes = torch.zeros(x.shape, dtype=torch.float64)
    scales = torch.ones((x.shape[0], 1), dtype=torch.float64)
    for m, token in enumerate(x.tolist()):
        scale = absmax_scale(token, dtype)
        scales[m] = scale
        for k, value in enumerate(token):
            codes[m, k] = round_to_code(_float32(value / scale), dtype)
    return codes, scales


def absmax_scale(values: list[float], dtype: torch.dtype) -> float:
    """Return the scale of float32 numbers: absmax / qmax in float32, 1 where all are zero, never a subnormal."""
    qmax = 127.0 if dtype == torch.int8 else fp8_magnitudes(dtype)[-1]
    absmax = max((abs(value) for value in values), default=0.0)
    return max(_float32(absmax / qmax), torch.finfo(torch.float32).tiny) if absmax > 0 else 1.0


def quantize_per_tensor(x: Tensor, dtype: torch.dtype, scale: float | None = None) -> tuple[Tensor, float]:
    """Return the codes' values [M, K] in float64 and the scale of x [M, K]: the one given, or that of all of x."""
    rows = x.tolist()
    if scale is None:
        scale = absmax_scale([value for row in rows for value in row], dtype)
    codes = [[round_to_code(_float32(value / scale), dtype) for value in row] for row in rows]
    return torch.tensor(codes, dtype=torch.float64).view(x.shape), scale


def quantize_per_group(x: Tensor, dtype: torch.dtype, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the codes' values [M, K] and scales [M, K / group_size], both float64, of x [M, K]."""
    parts = [quantize_per_token(x[:, start : start + group_size], dtype) for start in range(0, x.shape[1], group_size)]
    return torch.cat([codes for codes, _ in parts], dim=1), torch.cat([scales for _, scales in parts], dim=1)


def rms_norm(x: Tensor, gain: Tensor, eps: float, offset: float) -> Tensor:
    """Return x / sqrt(mean(x**2) + eps) * (gain + offset), [M, K] in float64, token by token."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for m, token in enumerate(x.tolist()):
        mean = sum(value**2 for value in token) / max(len(token), 1)
        for k, value in enumerate(token):
            out[m, k] = value / math.sqrt(mean + eps) * (gain[k].item() + offset)
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return gate / (1 + exp(-gate)) * up, [M, K] in float64, number by number."""
    products = []
    for g, u in zip(gate.flatten().tolist(), up.flatten().tolist(), strict=True):
        small = math.exp(-abs(g))  # 1 / (1 + exp(-g)) without the overflow
        products.append(g * (1 / (1 + small) if g >= 0 else small / (1 + small)) * u)
    return torch.tensor(products, dtype=torch.float64).view(gate.shape)


def rms_norm_quantize(x: Tensor, gain: Tensor, eps: float, offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the codes' values [M, K] and scales [M, 1], both float64, of the norm rounded to float32."""
    return quantize_per_token(rms_norm(x, gain, eps, offset).float(), dtype)


def silu_mul_quantize(gate: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the codes' values [M, K] and scales [M, 1], both float64, of SiLU(gate) * up rounded to float32."""
    return quantize_per_token(silu_mul(gate, up).float(), dtype)


def scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return (a @ b.T) * a_scale * b_scale.T + bias, [M, N] in float64, exact in the product of int8 codes."""
    out = (a.double() @ b.double().T) * a_scale.double() * b_scale.double().T
    return out if bias is None else out + bias.double()


def linear_dynamic(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return the output [..., N] in float64 for x [..., K] quantized per token to the weight's dtype."""
    codes, scale = quantize_per_token(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), weight.dtype)
    out = scaled_mm(codes, weight, scale, weight_scale, bias)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def linear_tensor(
    x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return the output [..., N] in float64 for x [..., K] quantized with one scale to the weight's dtype."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    given = None if input_scale is None else input_scale.float().item()
    codes, scale = quantize_per_tensor(rows, weight.dtype, given)
    by_feature = weight_scale.double().reshape(-1, 1).expand(weight.shape[0], 1)
    out = scaled_mm(codes, weight, torch.full((len(rows), 1), scale, dtype=torch.float64), by_feature, bias)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def linear_block(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, block: int = 128) -> Tensor:
    """Return the output [..., N] in float64: each code times the scale of its group or block, then one product."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    codes, scales = quantize_per_group(rows, weight.dtype, block)
    x_values, w_values = torch.zeros_like(codes), torch.zeros(weight.shape, dtype=torch.float64)
    for k in range(weight.shape[1]):
        x_values[:, k] = codes[:, k] * scales[:, k // block]
        for n in range(0, weight.shape[0], block):
            w_values[n : n + block, k] = (
                weight[n : n + block, k].double() * weight_scale[n // block, k // block].double()
            )
    out = x_values @ w_values.T
    out = out if bias is None else out + bias.double()
    return out.reshape(*x.shape[:-1], weight.shape[0])


def linear_llm_int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """Return the output [..., N] in float64, each column in float or in codes (arXiv:2208.07339, equation 8)."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).double()
    limit = _float32(threshold)
    outliers = [k for k in range(rows.shape[1]) if any(abs(value) >= limit for value in rows[:, k].tolist())]
    others = [k for k in range(rows.shape[1]) if k not in outliers]
    decoded = weight.double() * weight_scale.double()
    out = rows[:, outliers] @ decoded[:, outliers].T
    codes, scale = quantize_per_token(rows[:, others], torch.int8)
    out += scaled_mm(codes, weight[:, others], scale, weight_scale, bias)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def linear_grouped(x: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, activations: str) -> Tensor:
    """Return each token's output [M, N] in float64, one token after the other, by the expert whose run it is in."""
    out = torch.zeros((x.shape[0], weight.shape[1]), dtype=torch.float64)
    for m in range(x.shape[0]):
        expert = sum(1 for end in offsets[1:].tolist() if end <= m)
        if activations == "token":
            out[m] = linear_dynamic(x[m], weight[expert], weight_scale[expert], None)
        else:
            out[m] = (x[m].double() @ weight[expert].double().T) * weight_scale[expert, :, 0].double()
    return out


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


def unpack_sparse24(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """Return the weight [N, K] of packed 2:4 values, number by number, its dtype float64 for values in float."""
    if values.dtype == torch.int32:
        values = unpack(values, 4, in_features // 2)
    numbers = values.double().tolist()
    weight = torch.zeros((len(numbers), in_features), dtype=torch.float64)
    for n, words in enumerate(indices.tolist()):
        row = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
        for j, value in enumerate(numbers[n]):
            weight[n, 4 * (j // 2) + (row >> (2 * j)) % 4] = value
    return weight


def linear_sparse24(
    x: Tensor, values: Tensor, indices: Tensor, weight_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return the output [..., N] in float64 for a packed 2:4 weight decoded to x's dtype and the bias cast to it."""
    return _unpacked_product(x, unpack_sparse24(values, indices, x.shape[-1]), weight_scale, bias)


def unpack_venom(values: Tensor, indices: Tensor, columns: Tensor, in_features: int, v: int, m: int) -> Tensor:
    """Return the weight [N, K] of packed V:N:M values in float64, number by number."""
    gathered = unpack_sparse24(values, indices, in_features // m * 4)
    weight = torch.zeros((len(gathered), in_features), dtype=torch.float64)
    for n, numbers in enumerate(gathered.tolist()):
        of_block = columns[n // v].tolist()
        for k, number in enumerate(numbers):
            weight[n, k // 4 * m + of_block[k]] = number
    return weight


def linear_venom(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    columns: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    v: int,
    m: int,
) -> Tensor:
    """Return the output [..., N] in float64 for a packed V:N:M weight decoded to x's dtype and the bias cast to it."""
    return _unpacked_product(x, unpack_venom(values, indices, columns, x.shape[-1], v, m), weight_scale, bias)


def _unpacked_product(x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return the output [..., N] in float64 for codes with scales, or a weight in float and none."""
    if weight_scale is not None:
        return linear_weight_only(x, weight, weight_scale, bias)
    out = x.double() @ weight.to(x.dtype).double().T
    return out if bias is None else out + bias.to(x.dtype).double()


def linear_sparse_input(x: Tensor, weight_t: Tensor, weight_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return the output [..., N] in float64: the nonzero numbers of each token times their rows, one by one."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out = torch.zeros((len(rows), weight_t.shape[1]), dtype=torch.float64)
    for m, token in enumerate(rows.tolist()):
        for k, value in enumerate(token):
            if value != 0:
                out[m] += value * weight_t[k].double()
    if weight_scale is not None:
        out *= weight_scale.double().view(-1)
    if bias is not None:
        out += bias.double()
    return out.reshape(*x.shape[:-1], weight_t.shape[1])


def mlp_sparse(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    up_scale: Tensor | None,
    up_bias: Tensor | None,
    down_t: Tensor,
    down_scale: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    """Return the output [..., N] in float64 of the neurons whose gate isn't zero."""
    hidden = x.double() @ up.double().T
    if up_scale is not None:
        hidden *= up_scale.double().view(-1)
    if up_bias is not None:
        hidden += up_bias.double()
    hidden = torch.where(gate != 0, hidden * gate.double(), 0.0)
    return linear_sparse_input(hidden, down_t, down_scale, down_bias)


def _float32(value: float) -> float:
    """Return the number rounded to float32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])
