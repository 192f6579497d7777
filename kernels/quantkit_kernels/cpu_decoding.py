"""Products on a CPU with weights that are decoded for them: fp8, and weights alone quantized.

A CPU has no instruction for fp8, and none for activations in float with weights in int8. So a weight is decoded some
rows at a time, which stay in cache until they have met the activations: memory for half a million weights, and no
copy of the layer. That costs more than the product itself while tokens are few. Two ways around it:

- int8 weights with one scale a row and bfloat16 activations have a kernel in torch, `_weight_int8pack_mm`, which
  decodes in registers.
- `decoded.py` has the products with a weight that the caller decoded once and keeps: the speed of the float layer, for
  the memory of its weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit_kernels import formats, generic

_DECODED_ELEMENTS = 1 << 19
"""A weight is decoded this many elements at a time: 2 MiB in float32."""

_UNPACKED_ELEMENTS = 1 << 22
"""Packed bytes become int8 codes this many at a time for the int8 kernel: 4 MiB."""

_SIGN_BITS = -0x7F7F_7F7F_7F7F_7F80
"""0x8080808080808080 as a signed number: flips the top bits of eight bytes, which turns code + 128 into the code."""

INT8_KERNEL_TOKENS = 16
"""Up to so many tokens `_weight_int8pack_mm` is faster than decoding for a product in bfloat16."""


def fp8_mm(a: Tensor, b: Tensor) -> Tensor:
    """Return the product a @ b.T, [M, N] in float32, of a [M, K] and b [N, K] in fp8, by parts of b."""
    left = formats.decode(a, torch.float32)
    out = torch.empty((a.shape[0], b.shape[0]), dtype=torch.float32)
    step = max(1, _DECODED_ELEMENTS // max(1, b.shape[1]))
    for start in range(0, b.shape[0], step):
        part = slice(start, start + step)
        torch.mm(left, formats.decode(b[part], torch.float32).t(), out=out[:, part])
    return out


def linear_block(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype: some rows of the weight at a time, all blocks of them.

    A sum for each block of 128 columns, scaled and added up in float32, as in `generic.linear_block`.
    """
    codes, scale = formats.quantize_per_group(generic.tokens(x), weight.dtype)
    (tokens, in_features), out_features = codes.shape, weight.shape[0]
    left = formats.decode(codes, torch.float32).view(tokens, scale.shape[1], formats.BLOCK).transpose(0, 1)
    left_scale = scale.t().unsqueeze(2)
    right_scale = weight_scale.float().repeat_interleave(formats.BLOCK, dim=0)[:out_features].t().unsqueeze(1)
    out = torch.empty((tokens, out_features), dtype=torch.float32)
    step = max(1, _DECODED_ELEMENTS // max(1, in_features))
    for start in range(0, out_features, step):
        part = slice(start, start + step)
        decoded = formats.decode(weight[part], torch.float32).contiguous()
        right = decoded.view(decoded.shape[0], scale.shape[1], formats.BLOCK).permute(1, 2, 0)
        sums = torch.bmm(left, right).mul_(left_scale).mul_(right_scale[:, :, part])
        torch.sum(sums, dim=0, out=out[:, part])
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], out_features)


def linear_weight_only(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ W.T + bias, [..., N] in x's dtype, by `_weight_int8pack_mm` or by parts of the decoded weight."""
    values = generic.tokens(x)
    if _has_int8_kernel(values, weight_scale) and weight.dtype == torch.int8 and weight.is_contiguous():
        out = torch._weight_int8pack_mm(values.contiguous(), weight, weight_scale.view(-1))
        out = out if bias is None else out.add_(bias.to(x.dtype))
    else:
        out = _by_parts(values, weight, weight_scale, bias, None)
    return out.view(*x.shape[:-1], weight.shape[0])


def linear_weight_only_packed(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """Return `linear_weight_only` of a packed weight, [..., N] in x's dtype, unpacked by parts."""
    values = generic.tokens(x)
    whole = weight_packed.is_contiguous() and weight_packed.storage_offset() % 2 == 0  # can be read as int64
    if bits == 8 and whole and _has_int8_kernel(values, weight_scale):
        out = _packed_bytes(values.contiguous(), weight_packed.view(torch.int64), weight_scale.view(-1))
        out = out if bias is None else out.add_(bias.to(x.dtype))
    else:
        out = _by_parts(values, weight_packed, weight_scale, bias, bits)
    return out.view(*x.shape[:-1], weight_packed.shape[0])


def linear_sparse24(
    x: Tensor, values: Tensor, indices: Tensor, weight_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return `linear_weight_only` of a packed 2:4 weight, [..., N] in x's dtype: some of its rows at a time."""
    tokens = generic.tokens(x)
    bias = None if bias is None else bias.to(x.dtype)
    step = max(1, _DECODED_ELEMENTS // max(1, x.shape[-1]))
    out = torch.empty((tokens.shape[0], values.shape[0]), dtype=x.dtype)
    for start in range(0, values.shape[0], step):
        part = slice(start, start + step)
        codes = generic.sparse24_codes(values[part], indices[part], x.shape[-1])
        scale = None if weight_scale is None else weight_scale[part]
        out[:, part] = _with_unpacked(tokens, codes, scale, None if bias is None else bias[part])
    return out.view(*x.shape[:-1], values.shape[0])


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
    """Return `linear_weight_only` of a packed V:N:M weight, [..., N] in x's dtype: some row blocks at a time."""
    tokens = generic.tokens(x)
    bias = None if bias is None else bias.to(x.dtype)
    blocks = max(1, _DECODED_ELEMENTS // max(1, v * x.shape[-1]))
    out = torch.empty((tokens.shape[0], values.shape[0]), dtype=x.dtype)
    for block in range(0, columns.shape[0], blocks):
        part = slice(block * v, (block + blocks) * v)
        of_part = values[part], indices[part], columns[block : block + blocks]
        codes = generic.venom_codes(*of_part, x.shape[-1], v, m)
        scale = None if weight_scale is None else weight_scale[part]
        out[:, part] = _with_unpacked(tokens, codes, scale, None if bias is None else bias[part])
    return out.view(*x.shape[:-1], values.shape[0])


def _with_unpacked(x: Tensor, codes: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return x @ W.T + bias, [M, N] in x's dtype, for codes [N, K] with scales, or a weight in float without."""
    if scale is None:
        return F.linear(x, codes.to(x.dtype), bias)
    if codes.dtype == torch.int8 and _has_int8_kernel(x, scale):
        out = torch._weight_int8pack_mm(x.contiguous(), codes, scale.reshape(-1))
        return out if bias is None else out.add_(bias)
    return F.linear(x, decoded_rows(codes, scale, x.dtype), bias)


def _has_int8_kernel(x: Tensor, weight_scale: Tensor) -> bool:
    """Return whether `_weight_int8pack_mm` takes such activations and scales, and is the faster way.

    Its blocks are 16 or 32 in features wide, and it reads past the end of rows that they don't divide (torch 2.13).
    """
    return (
        x.dtype == torch.bfloat16
        and weight_scale.dtype == torch.bfloat16
        and weight_scale.shape[1] == 1
        and 0 < x.shape[0] <= INT8_KERNEL_TOKENS
        and x.shape[1] > 0
        and x.shape[1] % 32 == 0
        and weight_scale.shape[0] > 0
    )


def _packed_bytes(x: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    """Return the product [M, N] with a weight whose bytes are code + 128, given as int64 words [N, K / 8]."""
    step = max(1, _UNPACKED_ELEMENTS // x.shape[1])
    parts = [
        torch._weight_int8pack_mm(
            x, torch.bitwise_xor(words[start : start + step], _SIGN_BITS).view(torch.int8), scale[start : start + step]
        )
        for start in range(0, words.shape[0], step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _by_parts(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int | None) -> Tensor:
    """Return x @ W.T + bias, [M, N] in x's dtype, for x [M, K] and codes [N, K], or words that hold them."""
    (tokens, in_features), out_features = x.shape, weight.shape[0]
    bias = None if bias is None else bias.to(x.dtype)
    step = max(1, _DECODED_ELEMENTS // max(1, in_features))
    out = torch.empty((tokens, out_features), dtype=x.dtype)
    for start in range(0, out_features, step):
        part = slice(start, start + step)
        codes = weight[part] if bits is None else formats.unpack_int32(weight[part], bits, in_features)
        decoded = decoded_rows(codes, weight_scale[part], x.dtype)
        product = F.linear(x, decoded, None if bias is None else bias[part])
        if step >= out_features:
            return product.contiguous()
        out[:, part] = product
    return out


def decoded_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `formats.dequantize(codes, scale).to(dtype)`, [N, K], bit for bit, through float32.

    A code has 8 bits at most and a scale in bfloat16 or float16 11: their product is exact in float32, and rounded once
    to the scale's dtype. A float32 scale's product is rounded once in float32.
    """
    if scale.dtype not in formats.FLOAT_DTYPES:
        return formats.dequantize(codes, scale).to(dtype)
    values = formats.decode(codes, torch.float32)
    scale32 = scale.to(torch.float32)
    if scale.shape[1] == 1:
        values.mul_(scale32)
    elif values.numel():
        values = values.contiguous()
        values.view(*scale.shape, -1).mul_(scale32.unsqueeze(-1))
    return values.to(scale.dtype).to(dtype)
