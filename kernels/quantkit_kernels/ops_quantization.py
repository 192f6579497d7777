"""The ops that make codes of activations, and their scales, or floats of a weight's: part of the contract in `ops.py`,
which names them too.

`checks.py` says what the arguments must be; `reference.py` has each again in float64 and plain loops.
"""

from typing import cast

import torch
from torch import Tensor

from quantkit_kernels import checks, formats, generic
from quantkit_kernels.backends import take_backend
from quantkit_kernels.registration import register

Codes = tuple[Tensor, Tensor]
"""Codes and their scale or scales."""


def quantize_per_token(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> Codes:
    """Return codes [M, K] in `dtype` and scales [M, 1] in float32 of x [M, K]: `formats.quantize_per_token`.

    All backends give the same bits.

    Raises:
        KernelError: unless x is [M, K] in float32, bfloat16 or float16 and dtype is int8 or fp8.
    """
    return cast("Codes", torch.ops.quantkit.quantize_per_token(x, dtype, backend))


def quantize_per_tensor(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, backend: str = "auto") -> Codes:
    """Return the codes of x in `dtype`, contiguous, and their one scale [1] in float32: `formats.quantize_per_tensor`.

    All backends give the same bits.

    Args:
        x: any shape and strides, float32, bfloat16 or float16.
        dtype: int8 or fp8.
        scale: [1], any float dtype: what lies beyond its range saturates (static); None takes absmax of all of x.
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for dtypes, a scale or a backend that do not fit; the message names them.
    """
    return cast("Codes", torch.ops.quantkit.quantize_per_tensor(x, dtype, scale, backend))


def quantize_per_group(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> Codes:
    """Return codes [M, K] in `dtype` and scales [M, K / 128] in float32 of x [M, K]: `formats.quantize_per_group`.

    All backends give the same bits.

    Raises:
        KernelError: unless x is [M, K] in float32, bfloat16 or float16, 128 divides K and dtype is int8 or fp8.
    """
    return cast("Codes", torch.ops.quantkit.quantize_per_group(x, dtype, backend))


def rms_norm_quantize(
    x: Tensor, gain: Tensor, eps: float, offset: float, dtype: torch.dtype, backend: str = "auto"
) -> Codes:
    """Return codes [M, K] in `dtype` and scales [M, 1] in float32 of x [M, K] after an RMSNorm.

    y = x / sqrt(mean(x**2) + eps) * (gain + offset) (Zhang and Sennrich 2019, arXiv:1910.07467) in float32, then
    `formats.quantize_per_token` of y, which is never rounded to x's dtype. The mean is a float32 sum in an order that
    is the backend's own: the relative error of y is at most (K / 2 + 6) * 2**-24.

    Args:
        x: [M, K], float32, bfloat16 or float16; any strides.
        gain: [K], any float dtype.
        eps: not negative.
        offset: 0, or 1 where the gain is stored as the difference from 1, as Gemma's is.
        dtype: int8 or fp8.
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for shapes, dtypes, an eps, an offset or a backend that do not fit; the message names them.
    """
    return cast("Codes", torch.ops.quantkit.rms_norm_quantize(x, gain, eps, offset, dtype, backend))


def silu_mul_quantize(gate: Tensor, up: Tensor, dtype: torch.dtype, backend: str = "auto") -> Codes:
    """Return codes [M, K] in `dtype` and scales [M, 1] in float32 of SiLU(gate) * up.

    y = gate / (1 + exp(-gate)) * up (Shazeer 2020, arXiv:2002.05202, SwiGLU) in float32, then
    `formats.quantize_per_token` of y, which is never rounded to the inputs' dtype.

    Args:
        gate: [M, K], float32, bfloat16 or float16; any strides.
        up: as `gate`.
        dtype: int8 or fp8.
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for shapes, dtypes or a backend that do not fit; the message names them.
    """
    return cast("Codes", torch.ops.quantkit.silu_mul_quantize(gate, up, dtype, backend))


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """Return the weight [N, K] in `dtype`: `formats.dequantize(codes, scale).to(dtype)`, rounded twice at most.

    All backends give the same bits.

    Args:
        codes: [N, K], int8 or fp8; any strides.
        scale: [N, G] with G dividing K, or [1] for all; any float dtype.
        dtype: float32, bfloat16 or float16.
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for shapes, dtypes or a backend that do not fit; the message names them.
    """
    return cast("Tensor", torch.ops.quantkit.dequantize(codes, scale, dtype, backend))


def _quantize_per_token(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> Codes:
    checks.quantize_per_token(x, dtype)
    if take_backend("quantize_per_token", dtype, x.device, backend) == "triton":
        from quantkit_kernels.gpu import quantization

        return quantization.quantize_per_token(x, dtype)
    return formats.quantize_per_token(x, dtype)


def _quantize_per_token_fake(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> Codes:
    checks.quantize_per_token(x, dtype)
    return _by_token(x, dtype)


def _quantize_per_tensor(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, backend: str = "auto") -> Codes:
    checks.quantize_per_tensor(x, dtype, scale)
    if take_backend("quantize_per_tensor", dtype, x.device, backend) == "triton":
        from quantkit_kernels.gpu import quantization

        return quantization.quantize_per_tensor(x, dtype, scale)
    codes, found = formats.quantize_per_tensor(x, dtype, scale)
    return codes, found.clone() if found is scale else found  # an op's result is no view of its arguments


def _quantize_per_tensor_fake(
    x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, backend: str = "auto"
) -> Codes:
    checks.quantize_per_tensor(x, dtype, scale)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(1, dtype=torch.float32)


def _quantize_per_group(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> Codes:
    checks.quantize_per_group(x, dtype)
    if take_backend("quantize_per_group", dtype, x.device, backend) == "triton":
        from quantkit_kernels.gpu import quantization

        return quantization.quantize_per_group(x, dtype)
    return formats.quantize_per_group(x, dtype)


def _quantize_per_group_fake(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> Codes:
    checks.quantize_per_group(x, dtype)
    scale = x.new_empty((x.shape[0], x.shape[1] // formats.BLOCK), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), scale


def _rms_norm_quantize(
    x: Tensor, gain: Tensor, eps: float, offset: float, dtype: torch.dtype, backend: str = "auto"
) -> Codes:
    checks.rms_norm_quantize(x, gain, eps, offset, dtype)
    if take_backend("rms_norm_quantize", dtype, x.device, backend) == "triton":
        from quantkit_kernels.gpu import quantization

        return quantization.rms_norm_quantize(x, gain, eps, offset, dtype)
    return formats.quantize_per_token(generic.rms_norm(x, gain, eps, offset), dtype)


def _rms_norm_quantize_fake(
    x: Tensor, gain: Tensor, eps: float, offset: float, dtype: torch.dtype, backend: str = "auto"
) -> Codes:
    checks.rms_norm_quantize(x, gain, eps, offset, dtype)
    return _by_token(x, dtype)


def _silu_mul_quantize(gate: Tensor, up: Tensor, dtype: torch.dtype, backend: str = "auto") -> Codes:
    checks.silu_mul_quantize(gate, up, dtype)
    if take_backend("silu_mul_quantize", dtype, gate.device, backend) == "triton":
        from quantkit_kernels.gpu import quantization

        return quantization.silu_mul_quantize(gate, up, dtype)
    return formats.quantize_per_token(generic.silu_mul(gate, up), dtype)


def _silu_mul_quantize_fake(gate: Tensor, up: Tensor, dtype: torch.dtype, backend: str = "auto") -> Codes:
    checks.silu_mul_quantize(gate, up, dtype)
    return _by_token(gate, dtype)


def _dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    checks.dequantize(codes, scale, dtype)
    scales = scale.expand(codes.shape[0], 1) if scale.ndim == 1 else scale
    if take_backend("dequantize", codes.dtype, codes.device, backend) == "triton":
        from quantkit_kernels.gpu import dequantize as kernel

        return kernel.dequantize(codes, scales, dtype)
    return formats.dequantize(codes, scales).to(dtype).contiguous()


def _dequantize_fake(codes: Tensor, scale: Tensor, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    checks.dequantize(codes, scale, dtype)
    return codes.new_empty(codes.shape, dtype=dtype)


def _by_token(x: Tensor, dtype: torch.dtype) -> Codes:
    """Return empty codes [M, K] and scales [M, 1] for x [M, K]."""
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((x.shape[0], 1), dtype=torch.float32)


_END = "ScalarType dtype, str backend='auto') -> (Tensor, Tensor)"

register("quantize_per_token", f"(Tensor x, {_END}", _quantize_per_token, _quantize_per_token_fake)
register(
    "quantize_per_tensor",
    "(Tensor x, ScalarType dtype, Tensor? scale=None, str backend='auto') -> (Tensor, Tensor)",
    _quantize_per_tensor,
    _quantize_per_tensor_fake,
)
register("quantize_per_group", f"(Tensor x, {_END}", _quantize_per_group, _quantize_per_group_fake)
register(
    "rms_norm_quantize",
    f"(Tensor x, Tensor gain, float eps, float offset, {_END}",
    _rms_norm_quantize,
    _rms_norm_quantize_fake,
)
register("silu_mul_quantize", f"(Tensor gate, Tensor up, {_END}", _silu_mul_quantize, _silu_mul_quantize_fake)
register(
    "dequantize",
    "(Tensor codes, Tensor scale, ScalarType dtype, str backend='auto') -> Tensor",
    _dequantize,
    _dequantize_fake,
)
