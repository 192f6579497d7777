"""The contract: every op's schema, shapes and choice of implementation, registered with torch.library.

| op | generic.py (any device) | cpu.py | Triton (CUDA) |
| --- | --- | --- | --- |
| quantize_per_token | formats.quantize_per_token | - | - |
| scaled_mm | exact float32 products; fp8 decoded | int8: `torch._int_mm` | int8: int8_scaled_mm.py |
| linear_dynamic | the two above | the two above | int8: the two above |
| linear_weight_only | decode, then F.linear | - | - |
| linear_weight_only_packed | unpack, decode, then F.linear | - | - |

M tokens, K in features, N out features, G scales a row. Quantized weights are [N, K] with codes of int8 or
fp8, or packed into int32 words along K. The typed functions below call `torch.ops.quantkit.*`, which
torch.compile sees as single nodes. No op has a gradient: backward raises.

Each op is in `reference.py` again, in float64 and plain loops, as the oracle of the tests.
"""

import functools
import math
from collections.abc import Callable
from typing import NoReturn, cast

import torch
from torch import Tensor

from quantkit_kernels import cpu, formats, generic
from quantkit_kernels.backends import select_backend
from quantkit_kernels.errors import KernelError

__all__ = [
    "KernelError",
    "linear_dynamic",
    "linear_weight_only",
    "linear_weight_only_packed",
    "quantize_per_token",
    "scaled_mm",
    "select_backend",
]


def quantize_per_token(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return codes [M, K] in `dtype` and scales [M, 1] in float32 of x [M, K]: `formats.quantize_per_token`.

    Raises:
        KernelError: unless x is [M, K] in float32, bfloat16 or float16 and dtype is int8 or fp8.
    """
    return cast("tuple[Tensor, Tensor]", torch.ops.quantkit.quantize_per_token(x, dtype))


def scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    """Return (a @ b.T) * a_scale * b_scale.T + bias, [M, N] in `out_dtype`.

    Int8: the product is exact, and all backends give the same bits. Fp8: accumulated in float32, error
    <= K * 2**-24 * (|a| @ |b|.T) before the scales. Then `generic.epilogue`.

    Args:
        a: [M, K], int8 or fp8; any strides, M may be 0.
        b: [N, K], the same dtype.
        a_scale: [M, 1], float32.
        b_scale: [N, 1], any float dtype.
        bias: [N], any float dtype, or None.
        out_dtype: float32, bfloat16 or float16.
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for shapes, dtypes or a backend that do not fit; the message names them.
    """
    return cast("Tensor", torch.ops.quantkit.scaled_mm(a, b, a_scale, b_scale, bias, out_dtype, backend))


def linear_dynamic(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, backend: str = "auto"
) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype, x quantized per token to the weight's dtype.

    `quantize_per_token`, then `scaled_mm` (W8A8; Xiao et al. 2022, arXiv:2211.10438, per-token dynamic).

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides and leading dimensions.
        weight: [N, K], int8 or fp8.
        weight_scale: [N, 1], any float dtype.
        bias: [N], any float dtype, or None.
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for shapes, dtypes or a backend that do not fit; the message names them.
    """
    return cast("Tensor", torch.ops.quantkit.linear_dynamic(x, weight, weight_scale, bias, backend))


def linear_weight_only(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, backend: str = "auto"
) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype, the weight being decoded to x's dtype first.

    F.linear(x, formats.dequantize(weight, weight_scale).to(x.dtype), bias): the decoding and the cast round
    once each.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides and leading dimensions.
        weight: [N, K], fp8 or int8.
        weight_scale: [N, G], any float dtype; G divides K.
        bias: [N], any float dtype (cast to x's), or None.
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for shapes, dtypes or a backend that do not fit; the message names them.
    """
    return cast("Tensor", torch.ops.quantkit.linear_weight_only(x, weight, weight_scale, bias, backend))


def linear_weight_only_packed(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    bits: int,
    backend: str = "auto",
) -> Tensor:
    """Return `linear_weight_only` for a weight packed by `formats.pack_int32`, [..., N] in x's dtype.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides and leading dimensions.
        weight_packed: [N, ceil(K * bits / 32)], int32.
        weight_scale: [N, G], any float dtype; G divides K.
        bias: [N], any float dtype (cast to x's), or None.
        bits: 1 to 8.
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for shapes, dtypes or a backend that do not fit; the message names them.
    """
    return cast(
        "Tensor",
        torch.ops.quantkit.linear_weight_only_packed(x, weight_packed, weight_scale, bias, bits, backend),
    )


_LINEAR_SCHEMA = "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, str backend='auto') -> Tensor"
_SCHEMAS = {
    "quantize_per_token": "(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    "scaled_mm": "(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, ScalarType out_dtype, "
    "str backend='auto') -> Tensor",
    "linear_dynamic": _LINEAR_SCHEMA,
    "linear_weight_only": _LINEAR_SCHEMA,
    "linear_weight_only_packed": "(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? bias, "
    "int bits, str backend='auto') -> Tensor",
}


def _quantize_per_token(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check_per_token(x, dtype)
    return formats.quantize_per_token(x, dtype)


def _quantize_per_token_fake(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check_per_token(x, dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    _check_scaled_mm(a, b, a_scale, b_scale, bias, out_dtype)
    way = select_backend("scaled_mm", a.dtype, a.device, backend)
    return _run_scaled_mm(way, a, b, a_scale, b_scale, bias, out_dtype)


def _scaled_mm_fake(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    _check_scaled_mm(a, b, a_scale, b_scale, bias, out_dtype)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def _run_scaled_mm(
    way: str,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return the scaled product [M, N] by the way that `select_backend` named."""
    if way == "triton":
        from quantkit_kernels import int8_scaled_mm

        return int8_scaled_mm.scaled_mm(a, b, a_scale, b_scale, bias, out_dtype)
    implementation = cpu.scaled_mm if way == "cpu" else generic.scaled_mm
    return implementation(a, b, a_scale, b_scale, bias, out_dtype)


def _linear_dynamic(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, backend: str = "auto"
) -> Tensor:
    _check_linear(x, weight, weight_scale, bias)
    _check_int32_sum(weight)
    way = select_backend("linear_dynamic", weight.dtype, x.device, backend)
    *lead, in_features = x.shape
    codes, scale = formats.quantize_per_token(x.reshape(math.prod(lead), in_features), weight.dtype)
    out = _run_scaled_mm(way, codes, weight, scale, weight_scale, bias, x.dtype)
    return out.view(*lead, weight.shape[0])


def _linear_weight_only(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, backend: str = "auto"
) -> Tensor:
    _check_linear(x, weight, weight_scale, bias, _groups(weight_scale, weight.shape[-1]))
    select_backend("linear_weight_only", weight.dtype, x.device, backend)
    return generic.linear_weight_only(x, weight, weight_scale, bias).contiguous()


def _linear_dynamic_fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, backend: str = "auto"
) -> Tensor:
    _check_linear(x, weight, weight_scale, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_weight_only_fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, backend: str = "auto"
) -> Tensor:
    _check_linear(x, weight, weight_scale, bias, _groups(weight_scale, weight.shape[-1]))
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_weight_only_packed(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    bits: int,
    backend: str = "auto",
) -> Tensor:
    _check_packed(x, weight_packed, weight_scale, bias, bits)
    select_backend("linear_weight_only_packed", weight_packed.dtype, x.device, backend)
    return generic.linear_weight_only_packed(x, weight_packed, weight_scale, bias, bits).contiguous()


def _linear_weight_only_packed_fake(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    bits: int,
    backend: str = "auto",
) -> Tensor:
    _check_packed(x, weight_packed, weight_scale, bias, bits)
    return x.new_empty((*x.shape[:-1], weight_packed.shape[0]))


def _shape(tensor: Tensor) -> str:
    """Return dtype and shape for a message."""
    return f"{tensor.dtype} {list(tensor.shape)}"


def _check_per_token(x: Tensor, dtype: torch.dtype) -> None:
    if x.ndim != 2 or x.dtype not in formats.FLOAT_DTYPES:
        raise KernelError(f"x is {_shape(x)}: expected [M, K] in float32, bfloat16 or float16")
    if dtype not in formats.QMAX:
        raise KernelError(f"cannot quantize to {dtype}: expected int8, float8_e4m3fn or float8_e5m2")


def _check_scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> None:
    if a.dtype not in formats.QMAX or a.dtype != b.dtype:
        raise KernelError(f"a is {a.dtype} and b {b.dtype}: expected both int8, or both the same fp8 dtype")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise KernelError(f"a is {_shape(a)} and b {_shape(b)}: expected [M, K] and [N, K]")
    if a_scale.dtype != torch.float32 or a_scale.shape != (a.shape[0], 1):
        raise KernelError(f"a_scale is {_shape(a_scale)}: expected torch.float32 [{a.shape[0]}, 1]")
    _check_int32_sum(a)
    _check_scale_and_bias(b_scale, bias, b.shape[0], 1)
    if out_dtype not in formats.FLOAT_DTYPES:
        raise KernelError(f"out_dtype is {out_dtype}: expected float32, bfloat16 or float16")
    _check_devices(a, b, a_scale, b_scale, bias)


def _check_int32_sum(codes: Tensor) -> None:
    if codes.dtype == torch.int8 and codes.shape[-1] > generic.INT8_MAX_K:
        raise KernelError(
            f"K is {codes.shape[-1]}: an int8 product overflows int32 beyond {generic.INT8_MAX_K}, split it along K"
        )


def _check_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, groups: int = 1) -> None:
    if weight.dtype not in formats.QMAX or weight.ndim != 2:
        raise KernelError(f"weight is {_shape(weight)}: expected [N, K] in int8, float8_e4m3fn or float8_e5m2")
    _check_x(x, weight.shape[1])
    _check_scale_and_bias(weight_scale, bias, weight.shape[0], groups)
    _check_devices(x, weight, weight_scale, bias)


def _check_packed(x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise KernelError(f"{bits} bits: expected 1 to 8")
    if x.ndim < 1:
        raise KernelError(f"x is {_shape(x)}: expected [..., K]")
    words = formats.packed_words(x.shape[-1], bits)
    if weight_packed.dtype != torch.int32 or weight_packed.ndim != 2 or weight_packed.shape[1] != words:
        raise KernelError(
            f"weight_packed is {_shape(weight_packed)}: expected torch.int32 [N, {words}] for x {_shape(x)} "
            f"and {bits} bits"
        )
    _check_x(x, x.shape[-1])
    _check_scale_and_bias(weight_scale, bias, weight_packed.shape[0], _groups(weight_scale, x.shape[-1]))
    _check_devices(x, weight_packed, weight_scale, bias)


def _groups(weight_scale: Tensor, in_features: int) -> int:
    """Return G of a scale [N, G] that divides K, or raise KernelError."""
    groups = weight_scale.shape[-1] if weight_scale.ndim == 2 else 0
    if groups < 1 or in_features % groups:
        raise KernelError(f"weight_scale is {_shape(weight_scale)}: expected [N, G], G dividing K = {in_features}")
    return groups


def _check_x(x: Tensor, in_features: int) -> None:
    if x.ndim < 1 or x.dtype not in formats.FLOAT_DTYPES or x.shape[-1] != in_features:
        raise KernelError(f"x is {_shape(x)}: expected [..., {in_features}] in float32, bfloat16 or float16")


def _check_scale_and_bias(scale: Tensor, bias: Tensor | None, out_features: int, groups: int) -> None:
    if not scale.is_floating_point() or scale.shape != (out_features, groups):
        raise KernelError(f"the weight's scale is {_shape(scale)}: expected float [{out_features}, {groups}]")
    if bias is not None and (not bias.is_floating_point() or bias.shape != (out_features,)):
        raise KernelError(f"bias is {_shape(bias)}: expected float [{out_features}]")


def _check_devices(first: Tensor, *others: Tensor | None) -> None:
    for tensor in others:
        if tensor is not None and tensor.device != first.device:
            raise KernelError(f"tensors are on {first.device} and {tensor.device}: expected one device")


def _refuse_backward(name: str, ctx: object, *grads: Tensor) -> NoReturn:
    """Raise KernelError: without this, autograd would differentiate through rounding and call it a gradient."""
    raise KernelError(f"quantkit.{name} has no gradient: run it under torch.no_grad(), or train the float model")


def _register() -> None:
    """Define every op with its implementation and its shape function."""
    implementations: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
        "quantize_per_token": (_quantize_per_token, _quantize_per_token_fake),
        "scaled_mm": (_scaled_mm, _scaled_mm_fake),
        "linear_dynamic": (_linear_dynamic, _linear_dynamic_fake),
        "linear_weight_only": (_linear_weight_only, _linear_weight_only_fake),
        "linear_weight_only_packed": (_linear_weight_only_packed, _linear_weight_only_packed_fake),
    }
    for name, (implementation, fake) in implementations.items():
        op = f"quantkit::{name}"
        torch.library.define(op, _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(op, "CompositeExplicitAutograd", implementation)
        torch.library.register_fake(op, fake)
        torch.library.register_autograd(op, functools.partial(_refuse_backward, name))


_register()
