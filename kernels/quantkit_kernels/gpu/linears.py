"""The W8A8 linear ops on a GPU: a quantization kernel, then a scaled product; nothing waits for the device.

M tokens, K in features, N out features. What the ops mean is said in `ops.py`.
"""

import torch
from torch import Tensor

from quantkit_kernels import generic
from quantkit_kernels.gpu import block_scaled_mm, fp8_scaled_mm, int8_scaled_mm, quantization


def scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Return the scaled product [M, N] by the kernel for the codes' dtype; scales may be [1], one for all rows."""
    product = int8_scaled_mm.scaled_mm if a.dtype == torch.int8 else fp8_scaled_mm.scaled_mm
    return product(a, b, a_scale, b_scale, bias, out_dtype)


def linear_dynamic(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype, x quantized per token."""
    codes, scale = quantization.quantize_per_token(generic.tokens(x), weight.dtype)
    return scaled_mm(codes, weight, scale, weight_scale, bias, x.dtype).view(*x.shape[:-1], weight.shape[0])


def linear_tensor(
    x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype, x quantized with one scale."""
    codes, scale = quantization.quantize_per_tensor(generic.tokens(x), weight.dtype, input_scale)
    return scaled_mm(codes, weight, scale, weight_scale, bias, x.dtype).view(*x.shape[:-1], weight.shape[0])


def linear_block(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype, codes scaled by groups and blocks of 128."""
    codes, scale = quantization.quantize_per_group(generic.tokens(x), weight.dtype)
    out = block_scaled_mm.block_scaled_mm(codes, weight, scale, weight_scale, bias, x.dtype)
    return out.view(*x.shape[:-1], weight.shape[0])
