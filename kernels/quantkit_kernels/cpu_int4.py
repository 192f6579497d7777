"""Products on a CPU with 4-bit weights in the order that torch's own kernel reads: decoded in registers, never stored.

`torch._weight_int4pack_mm_for_cpu` (torch 2.6 and later) wants codes in an order of its own, for rows by sixteens, and
a scale and a zero for 32, 64, 128 or 256 weights of a row. Codes are put into that order once, and kept: half a byte a
weight beside what is stored. K in features, N out features, G groups of K.
"""

import torch
from torch import Tensor

from quantkit_kernels import generic
from quantkit_kernels.backends import count

GROUP_SIZES = (256, 128, 64, 32)
"""Weights of a row that can share a scale, the best first where a row has just one."""

TOKENS = 32
"""Up to so many tokens it is the faster way; beyond, a weight that is decoded once for all of them pays."""

_ROWS, _PART = 16, 1024
"""Rows come in sixteens. So many are reordered at a time: they take 4 bytes a weight meanwhile."""


def group_size(out_features: int, in_features: int, scale: Tensor) -> int | None:
    """Return how many weights share a scale in the kernel's eyes; None where it can't take the layer.

    Args:
        out_features: N.
        in_features: K.
        scale: [N, G]; the kernel takes it in the activations' dtype only, which is bfloat16.
    """
    if scale.dtype != torch.bfloat16 or out_features % _ROWS or not in_features or not out_features:
        return None
    groups = scale.shape[1]
    if groups > 1:
        return in_features // groups if in_features // groups in GROUP_SIZES else None
    return next((size for size in GROUP_SIZES if in_features % size == 0), None)


def repack(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes in the kernel's order, uint8 [N, K / 2], and scales with zeros, bfloat16 [K / size, N, 2].

    Args:
        codes: [N, K], int8 from -8 to 7.
        scale: [N, G], such that `group_size` takes it.
    """
    out_features, in_features = codes.shape
    size = group_size(out_features, in_features, scale)
    assert size is not None, f"{list(codes.shape)} with scales {scale.dtype} {list(scale.shape)}"
    parts = [torch._convert_weight_to_int4pack_for_cpu(part.int() + 8, 1) for part in torch.split(codes, _PART)]
    spread = scale.expand(-1, in_features // size) if scale.shape[1] == 1 else scale
    return torch.cat(parts), torch.stack([spread.t(), torch.zeros_like(spread.t())], dim=-1).contiguous()


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ W.T + bias, [..., N] in bfloat16, for what `repack` gave.

    A weight is code times scale, exactly: it isn't rounded to bfloat16 as that of `ops.linear_weight_only_packed` is.
    Sums are in float32, with an error <= 2 * K * 2**-24 * (|x| @ |W|.T), and rounded to bfloat16; so is the sum with a
    bias.

    Args:
        x: [..., K], bfloat16.
        weight: uint8 [N, K / 2].
        scale: bfloat16 [K / size, N, 2].
        bias: [N], any float dtype (cast to bfloat16), or None.
    """
    count("linear_weight_only_packed", torch.int32, "cpu")
    values = generic.tokens(x).contiguous()
    size = x.shape[-1] // scale.shape[0]
    out = torch._weight_int4pack_mm_for_cpu(values, weight, size, scale)
    if bias is not None:
        out = out + bias.to(x.dtype)
    return out.view(*x.shape[:-1], weight.shape[0])
