"""The ops in plain torch for any device: what runs where no faster way is registered.

`reference.py` is the slow float64 oracle of the tests; this module is the implementation that users get on a
device without one of its own, and the home of what the fast ways share: the integer product that is exact
everywhere and the one epilogue. M tokens, K in features, N out features.
"""

import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from quantkit_kernels import formats, sparse24, venom
from quantkit_kernels.errors import KernelError

ScaledProduct = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
"""What `scaled_mm` is: (a, b, a_scale, b_scale, bias, out_dtype) -> [M, N]."""

EXACT_CHUNK = 1024
"""Products of int8 codes are at most 2**14 in size: a float32 sum of 2**10 of them is at most 2**24, exact."""

INT8_MAX_K = (2**31 - 1) // 2**14
"""Longest row whose int8 product cannot overflow int32, whatever the codes: 131071."""


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Return the exact product a @ b.T, [M, N] in int32, of a [M, K] and b [N, K] in int8.

    Float32 products of EXACT_CHUNK columns at a time, added up in int32; exact for K up to INT8_MAX_K.
    """
    total = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], EXACT_CHUNK):
        part = slice(start, start + EXACT_CHUNK)
        total += (a[:, part].float() @ b[:, part].float().t()).to(torch.int32)
    return total


def epilogue(acc: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Return ((float32(acc) * a_scale) * b_scale + bias) in `out_dtype`: the order that every backend keeps.

    Four roundings: relative error <= 4 * 2**-24 of |acc * a_scale * b_scale| + |bias|, then one to
    `out_dtype`.

    Args:
        acc: [M, N], int32 or float32; float32 is overwritten.
        a_scale: float32; [M, 1], or [1] for all tokens.
        b_scale: float; [N, 1], or [1] for all out features.
        bias: [N], float, or None.
        out_dtype: dtype of the result.
    """
    out = acc.to(torch.float32).mul_(a_scale.to(torch.float32))
    out *= b_scale.to(torch.float32).view(1, -1)
    if bias is not None:
        out += bias.to(torch.float32)
    return out.to(out_dtype)


def scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Return the scaled product [M, N]: integers exactly, fp8 decoded to float32 and multiplied there."""
    acc = (
        int_mm(a, b)
        if a.dtype == torch.int8
        else formats.decode(a, torch.float32) @ formats.decode(b, torch.float32).t()
    )
    return epilogue(acc, a_scale, b_scale, bias, out_dtype)


def linear_weight_only(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ W.T + bias, [..., N] in x's dtype, where W is the decoded weight cast to x's dtype."""
    decoded = formats.dequantize(weight, weight_scale).to(x.dtype)
    return torch.nn.functional.linear(x, decoded, None if bias is None else bias.to(x.dtype))


def linear_weight_only_packed(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """Return `linear_weight_only` of the unpacked weight, [..., N] in x's dtype."""
    weight = formats.unpack_int32(weight_packed, bits, x.shape[-1])
    return linear_weight_only(x, weight, weight_scale, bias)


def sparse24_codes(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """Return the codes [N, K], or the weight in float, of a packed 2:4 weight as `ops.linear_sparse24` takes it."""
    if values.dtype == torch.int32:
        return sparse24.unpack_int4(values, indices, in_features)
    return sparse24.unpack(values, indices, in_features)


def linear_sparse24(
    x: Tensor, values: Tensor, indices: Tensor, weight_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return `linear_weight_only` of the unpacked weight, [..., N] in x's dtype."""
    return _linear_unpacked(x, sparse24_codes(values, indices, x.shape[-1]), weight_scale, bias)


def venom_codes(values: Tensor, indices: Tensor, columns: Tensor, in_features: int, v: int, m: int) -> Tensor:
    """Return the codes [N, K], or the weight in float, of a packed V:N:M weight as `ops.linear_venom` takes it."""
    take = venom.unpack_int4 if values.dtype == torch.int32 else venom.unpack
    return take(values, indices, columns, in_features, v, m)


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
    """Return `linear_weight_only` of the unpacked weight, [..., N] in x's dtype."""
    return _linear_unpacked(x, venom_codes(values, indices, columns, x.shape[-1], v, m), weight_scale, bias)


def _linear_unpacked(x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return `linear_weight_only`, or with no scale the product with a weight in float that is cast to x's dtype."""
    if weight_scale is not None:
        return linear_weight_only(x, weight, weight_scale, bias)
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def linear_sparse_input(x: Tensor, weight_t: Tensor, weight_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return x @ (weight_t * scale) + bias, [..., N] in x's dtype: all rows of [K, N], those that meet zeros as well.

    Codes meet x in bfloat16 where x has it, else in float32, since their sums go beyond float16's range.
    """
    if weight_scale is None:
        return torch.nn.functional.linear(x, weight_t.t().to(x.dtype), None if bias is None else bias.to(x.dtype))
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    out = (x.to(dtype) @ weight_t.to(dtype)).float() * weight_scale.float().view(-1)
    return (out if bias is None else out + bias.float()).to(x.dtype)


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
    """Return the gated MLP's output [..., N] in x's dtype, from all neurons."""
    hidden = linear_sparse_input(x, up.t(), up_scale, up_bias) * gate
    return linear_sparse_input(hidden, down_t, down_scale, down_bias)


def linear_dynamic(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, product: ScaledProduct = scaled_mm
) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype, x quantized per token, by `product`."""
    codes, scale = formats.quantize_per_token(tokens(x), weight.dtype)
    return product(codes, weight, scale, weight_scale, bias, x.dtype).view(*x.shape[:-1], weight.shape[0])


def linear_tensor(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    product: ScaledProduct = scaled_mm,
) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype, x quantized with one scale, by `product`."""
    codes, scale = formats.quantize_per_tensor(tokens(x), weight.dtype, input_scale)
    return product(codes, weight, scale, weight_scale, bias, x.dtype).view(*x.shape[:-1], weight.shape[0])


def linear_block(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype: 128 columns at a time, each with its scales.

    Only 128 columns of the weight are decoded at any moment.
    """
    codes, scale = formats.quantize_per_group(tokens(x), weight.dtype)
    decoded = formats.decode(codes, torch.float32)
    rows = weight_scale.to(torch.float32).repeat_interleave(formats.BLOCK, dim=0)[: weight.shape[0]].t().contiguous()
    out = torch.zeros((codes.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    for block in range(scale.shape[1]):
        part = slice(block * formats.BLOCK, (block + 1) * formats.BLOCK)
        acc = decoded[:, part] @ formats.decode(weight[:, part], torch.float32).t()
        out += acc.mul_(scale[:, block : block + 1]).mul_(rows[block])
    if bias is not None:
        out += bias.to(torch.float32)
    return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def linear_llm_int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype, outlier columns multiplied in float.

    Columns are masked, not gathered: nothing waits for the device to say how many there are.
    """
    values = tokens(x).float()
    outlier = (values.abs() >= in_float32(threshold)).any(dim=0)
    codes, scale = formats.quantize_per_token(values.masked_fill(outlier, 0.0), weight.dtype)
    out = epilogue(int_mm(codes, weight), scale, weight_scale, None, torch.float32)
    out += values.masked_fill(~outlier, 0.0) @ formats.dequantize(weight, weight_scale.float()).t()
    if bias is not None:
        out += bias.to(torch.float32)
    return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def linear_grouped(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    offsets: Tensor,
    activations: str,
    linear: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = linear_dynamic,
) -> Tensor:
    """Return each token's output [M, N] in x's dtype, one expert after the other, activations "token" by `linear`.

    Raises:
        KernelError: for offsets that do not ascend from 0 to M.
    """
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != x.shape[0] or bounds != sorted(bounds):
        raise KernelError(f"offsets are {bounds}: expected numbers that ascend from 0 to the {x.shape[0]} tokens")
    out = x.new_empty((x.shape[0], weight.shape[1]))
    for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
        part, codes, scale = x[start:stop], weight[expert], weight_scale[expert]
        if start == stop:
            continue
        if activations == "token":
            out[start:stop] = linear(part, codes, scale, None)
        else:
            out[start:stop] = (part.float() @ formats.decode(codes, torch.float32).t()).mul_(scale.float().view(1, -1))
    return out


def rms_norm(x: Tensor, gain: Tensor, eps: float, offset: float) -> Tensor:
    """Return x / sqrt(mean(x**2) + eps) * (gain + offset), [M, K] in float32: each operation rounded once."""
    values = x.float()
    mean = values.square().mean(dim=1, keepdim=True).add_(eps)
    unit = mean.double().sqrt_().float().reciprocal_()  # torch's float32 root may be off in its last bit on a CPU
    return (values * unit).mul_(gain.float() + offset)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return SiLU(gate) * up, [M, K] in float32."""
    return torch.nn.functional.silu(gate.float()).mul_(up.float())


@functools.lru_cache(maxsize=64)
def in_float32(number: float) -> float:
    """Return the number rounded to float32: what float32 numbers are compared with on every device."""
    return torch.tensor(number, dtype=torch.float32).item()


def tokens(x: Tensor) -> Tensor:
    """Return x [..., K] as [M, K]: a view where its strides allow one."""
    *lead, in_features = x.shape
    return x if len(lead) == 1 else x.reshape(math.prod(lead), in_features)
