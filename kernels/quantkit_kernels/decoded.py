"""Products on a CPU with a weight that was decoded once and is kept: at least the speed of the float layer.

A CPU multiplies neither fp8 nor int8 weights with activations in float, so such weights are decoded at every call, and
with few tokens that takes longer than the product. Who has the memory keeps the decoded weight: 2 bytes a weight in
bfloat16, 4 in float32, beside the code's one. As it is kept, it can lie in the order that oneDNN's product reads
("packed", what torch.compile does with frozen weights), where `F.linear` finds rows and orders them at every call: with
one token that is some two to three times as fast as `F.linear`. M tokens, K in features, N out features.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit_kernels import cpu, cpu_decoding, formats, generic
from quantkit_kernels.backends import count

_FEW = 4096

WEIGHTS_ALONE = ("linear_weight_only", "linear_weight_only_packed", "linear_sparse24", "linear_venom")
"""The ops whose activations stay in float."""


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Return whether oneDNN has a packed product in the dtype on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def decode_weight(op: str, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what to keep, [N, K], for activations in `dtype`: packed by oneDNN where it can be.

    Where only weights are quantized that is the weight itself, in `dtype`. Where the scale is applied to sums it is the
    codes, exactly; with a scale for each block it is the weight. Both are in bfloat16 for bfloat16, else in float32.

    Args:
        op: name of the op.
        codes: [N, K], int8 or fp8, not packed into words; any strides. For sparse weights also float.
        scale: as the op takes it.
        dtype: float32, bfloat16 or float16.
    """
    kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    if op in ("linear_sparse24", "linear_venom") and codes.dtype in formats.FLOAT_DTYPES:
        weight = codes.to(dtype)
    elif op in WEIGHTS_ALONE:
        weight = cpu_decoding.decoded_rows(codes, scale, dtype)
    elif op == "linear_block":
        weight = formats.dequantize_weight(codes, scale.to(torch.float32), "block").to(kept)
    else:
        weight = formats.decode(codes, kept)
    weight = weight.contiguous()
    if weight.numel() == 0 or not can_pack(weight.dtype):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return F.linear of x [M, K] with what `decode_weight` gave, in the dtype of both, summed in float32."""
    if not weight.is_mkldnn or x.numel() == 0:
        dense = weight.to_dense() if weight.is_mkldnn else weight
        return F.linear(x, dense, bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return out


def linear(
    op: str,
    x: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype, from what `decode_weight` gave for x's dtype.

    For weights alone that is `F.linear`'s, as `ops.linear_weight_only` says. Else activations are quantized as the op
    says. The error for float32 and float16 is the op's, but for blocks K + 4 roundings of float32. For bfloat16 sums
    are rounded to bfloat16 before they are scaled, one rounding more than the op's; with blocks the decoded weights and
    activations are rounded to it as well: an error of at most 3 * 2**-8 of the sum of magnitudes in all.

    Args:
        op: name of the op.
        x: [..., K], float32, bfloat16 or float16.
        weight: [N, K], from `decode_weight`.
        dtype: dtype of the codes that it was made from: what activations are quantized to.
        weight_scale: as the op takes it.
        input_scale: that of `linear_tensor`, or None.
        bias: [N], any float dtype, or None.
    """
    count(op, torch.int32 if op == "linear_weight_only_packed" else dtype, "cpu")
    if op in WEIGHTS_ALONE:
        out = _product(generic.tokens(x), weight, None if bias is None else bias.to(x.dtype))
        return out.view(*x.shape[:-1], weight.shape[0])
    values = generic.tokens(x)
    if op == "linear_block":
        codes, scale = formats.quantize_per_group(values, dtype)
        groups = formats.decode(codes, torch.float32).view(*scale.shape, formats.BLOCK) * scale.unsqueeze(-1)
        out = _product(groups.view(values.shape).to(weight.dtype), weight)
        if bias is not None:
            out = out.to(torch.float32).add_(bias)
        out = out.to(x.dtype)
    else:
        if op == "linear_tensor":
            codes, scale = formats.quantize_per_tensor(values, dtype, input_scale)
        else:
            quantize = cpu.quantize_per_token if values.numel() else formats.quantize_per_token
            codes, scale = quantize(values, dtype)
        # torch's own conversion takes longer, but for one call where there are few numbers
        left = codes.to(weight.dtype) if codes.numel() <= _FEW else formats.decode(codes, weight.dtype)
        out = cpu.epilogue(_product(left, weight).float(), scale, weight_scale, bias, x.dtype)
    return out.view(*x.shape[:-1], weight.shape[0])
