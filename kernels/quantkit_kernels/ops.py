"""The contract: every op's schema, shapes and choice of implementation, registered with torch.library.

| op | generic.py (any device) | cpu.py | Triton (CUDA) |
| --- | --- | --- | --- |
| quantize_per_token, _per_tensor, _per_group | formats | - | gpu/quantization.py |
| rms_norm_quantize, silu_mul_quantize | float32, then formats | - | gpu/quantization.py |
| dequantize | formats | - | gpu/dequantize.py |
| scaled_mm | int8 exact in float32; fp8 decoded | int8: `torch._int_mm`; fp8 in parts | gpu/{int8,fp8}_scaled_mm.py |
| linear_dynamic | the two above | cpu.py's product; one token in fewer calls | the two above |
| linear_tensor | formats.quantize_per_tensor, then scaled_mm's product | likewise | likewise |
| linear_block | 128 columns at a time, decoded | some rows at a time | gpu/block_scaled_mm.py |
| linear_llm_int8 | outlier columns masked: no waiting for the device | outlier columns gathered | gpu/llm_int8.py |
| linear_grouped | expert by expert | likewise | gpu/grouped.py |
| linear_weight_only | decode, then F.linear | `torch._weight_int8pack_mm`, or in parts | gpu/weight_only.py |
| linear_weight_only_packed | unpack, decode, then F.linear | likewise | gpu/weight_only.py |
| linear_sparse24 | unpack, decode, then F.linear | in parts | gpu/sparse24.py |
| linear_venom | unpack, decode, then F.linear | in parts | gpu/sparse24.py |
| linear_sparse_input | all rows | the rows that are needed, or all | gpu/skipping.py |
| mlp_sparse | all neurons | those with a gate, or all | gpu/skipping.py |

M tokens, K in features, N out features, G scales a row. Quantized weights are [N, K] with codes of int8 or
fp8, or packed into int32 words along K. Tensors may have any strides: a weight that is stored [K, N] is passed
as `w.t()`, without a copy on the CPU. The typed functions below call `torch.ops.quantkit.*`, which
torch.compile sees as single nodes, or where nobody would see them (`dispatch.py`) what implements them. No op has
a gradient: backward raises.

`checks.py` says what the arguments must be. Each op is in `reference.py` again, in float64 and plain loops, as
the oracle of the tests.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from quantkit_kernels import checks, cpu, cpu_decoding, generic
from quantkit_kernels.backends import select_backend, take_backend
from quantkit_kernels.dispatch import is_plain_call
from quantkit_kernels.errors import KernelError
from quantkit_kernels.ops_grouped import linear_grouped
from quantkit_kernels.ops_quantization import (
    dequantize,
    quantize_per_group,
    quantize_per_tensor,
    quantize_per_token,
    rms_norm_quantize,
    silu_mul_quantize,
)
from quantkit_kernels.ops_skipping import linear_sparse_input, mlp_sparse
from quantkit_kernels.ops_sparse24 import linear_sparse24, linear_venom
from quantkit_kernels.registration import linear_fake, register

__all__ = [
    "KernelError",
    "dequantize",
    "linear_block",
    "linear_dynamic",
    "linear_grouped",
    "linear_llm_int8",
    "linear_sparse24",
    "linear_sparse_input",
    "linear_tensor",
    "linear_venom",
    "linear_weight_only",
    "linear_weight_only_packed",
    "mlp_sparse",
    "quantize_per_group",
    "quantize_per_tensor",
    "quantize_per_token",
    "rms_norm_quantize",
    "scaled_mm",
    "select_backend",
    "silu_mul_quantize",
]


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
    <= K * 2**-24 * (|a| @ |b|.T) before the scales (sm_90 takes part of it with
    fewer bits: `gpu/fp8_scaled_mm.py`). Then `generic.epilogue`.

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
    if is_plain_call(x, weight, weight_scale, bias):
        return _linear_dynamic(x, weight, weight_scale, bias, backend)
    return cast("Tensor", torch.ops.quantkit.linear_dynamic(x, weight, weight_scale, bias, backend))


def linear_tensor(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype, x quantized with one scale to the weight's dtype.

    `formats.quantize_per_tensor`, then the product and `generic.epilogue` of `scaled_mm`: the same error.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides and leading dimensions.
        weight: [N, K], int8 or fp8; any strides.
        weight_scale: [N, 1] or [1], any float dtype.
        input_scale: [1], any float dtype: what lies beyond its range saturates (static); None takes absmax of
            all of x (dynamic), so that a token's result depends on the tokens beside it.
        bias: [N], any float dtype, or None.
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for shapes, dtypes or a backend that do not fit; the message names them.
    """
    if is_plain_call(x, weight, weight_scale, input_scale, bias):
        return _linear_tensor(x, weight, weight_scale, input_scale, bias, backend)
    return cast("Tensor", torch.ops.quantkit.linear_tensor(x, weight, weight_scale, input_scale, bias, backend))


def linear_block(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, backend: str = "auto") -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype, from fp8 with a scale for each 128 in features.

    x is quantized by `formats.quantize_per_group`, the weight has a scale for each 128 by 128 block. The result
    is the sum over blocks of 128 columns of (a @ b.T) * a_scale * b_scale in float32 (DeepSeek-AI 2024,
    arXiv:2412.19437, section 3.3): error <= (130 + K / 128) * 2**-24 of the same sum of absolute values, then
    one rounding to x's dtype.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides and leading dimensions.
        weight: [N, K], fp8; any strides; 128 divides K, N may be ragged.
        weight_scale: [ceil(N / 128), K / 128], any float dtype.
        bias: [N], any float dtype, or None.
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for shapes, dtypes or a backend that do not fit; the message names them.
    """
    if is_plain_call(x, weight, weight_scale, bias):
        return _linear_block(x, weight, weight_scale, bias, backend)
    return cast("Tensor", torch.ops.quantkit.linear_block(x, weight, weight_scale, bias, backend))


def linear_llm_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: float,
    backend: str = "auto",
) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype, outlier columns of x multiplied in float.

    LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339, equation 8): columns of x in which any token of the call
    has |x| >= threshold (compared in float32) multiply the decoded columns of the weight in float32; the rest
    is `linear_dynamic`, with scales from what is left of each token. Both sums are added, then the bias. Without
    outliers it is `linear_dynamic`.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides and leading dimensions.
        weight: [N, K], int8; any strides.
        weight_scale: [N, 1], any float dtype.
        bias: [N], any float dtype, or None.
        threshold: positive; 6.0 in the paper.
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for shapes, dtypes, a threshold or a backend that do not fit; the message names them.
    """
    if is_plain_call(x, weight, weight_scale, bias):
        return _linear_llm_int8(x, weight, weight_scale, bias, threshold, backend)
    return cast("Tensor", torch.ops.quantkit.linear_llm_int8(x, weight, weight_scale, bias, threshold, backend))


def linear_weight_only(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, backend: str = "auto"
) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype, the weight being decoded to x's dtype first.

    F.linear(x, formats.dequantize(weight, weight_scale).to(x.dtype), bias): the decoding and the cast round
    once each. The Triton kernel spares the weight these roundings where it can (`gpu/weight_only.py` says when): its
    result is nearer to the exact one, and by up to them away from this.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides and leading dimensions.
        weight: [N, K], fp8 or int8.
        weight_scale: [N, G], any float dtype; G divides K.
        bias: [N], any float dtype (cast to x's), or None.
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for shapes, dtypes or a backend that do not fit; the message names them.
    """
    if is_plain_call(x, weight, weight_scale, bias):
        return _linear_weight_only(x, weight, weight_scale, bias, backend)
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
    if is_plain_call(x, weight_packed, weight_scale, bias):
        return _linear_weight_only_packed(x, weight_packed, weight_scale, bias, bits, backend)
    return cast(
        "Tensor",
        torch.ops.quantkit.linear_weight_only_packed(x, weight_packed, weight_scale, bias, bits, backend),
    )


_LINEAR_SCHEMA = "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, str backend='auto') -> Tensor"
_SCHEMAS = {
    "scaled_mm": "(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, ScalarType out_dtype, "
    "str backend='auto') -> Tensor",
    "linear_dynamic": _LINEAR_SCHEMA,
    "linear_tensor": "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? input_scale, Tensor? bias, "
    "str backend='auto') -> Tensor",
    "linear_block": _LINEAR_SCHEMA,
    "linear_llm_int8": "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, float threshold, "
    "str backend='auto') -> Tensor",
    "linear_weight_only": _LINEAR_SCHEMA,
    "linear_weight_only_packed": "(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? bias, "
    "int bits, str backend='auto') -> Tensor",
}


def _scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    checks.scaled_mm(a, b, a_scale, b_scale, bias, out_dtype)
    product = _scaled_product(take_backend("scaled_mm", a.dtype, a.device, backend))
    return product(a, b, a_scale, b_scale, bias, out_dtype)


def _scaled_mm_fake(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    checks.scaled_mm(a, b, a_scale, b_scale, bias, out_dtype)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def _scaled_product(way: str) -> generic.ScaledProduct:
    """Return the scaled product of the way that `select_backend` named."""
    if way == "triton":
        from quantkit_kernels.gpu import linears

        return linears.scaled_mm
    return cpu.scaled_mm if way == "cpu" else generic.scaled_mm


def _linear_dynamic(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, backend: str = "auto"
) -> Tensor:
    checks.linear_dynamic(x, weight, weight_scale, bias)
    way = take_backend("linear_dynamic", weight.dtype, x.device, backend)
    if way == "triton":
        from quantkit_kernels.gpu import linears

        return linears.linear_dynamic(x, weight, weight_scale, bias)
    implementation = cpu.linear_dynamic if way == "cpu" else generic.linear_dynamic
    return implementation(x, weight, weight_scale, bias)


def _linear_tensor(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    checks.linear_tensor(x, weight, weight_scale, input_scale, bias)
    way = take_backend("linear_tensor", weight.dtype, x.device, backend)
    if way == "triton":
        from quantkit_kernels.gpu import linears

        return linears.linear_tensor(x, weight, weight_scale, input_scale, bias)
    implementation = cpu.linear_tensor if way == "cpu" else generic.linear_tensor
    return implementation(x, weight, weight_scale, input_scale, bias)


def _linear_block(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, backend: str = "auto"
) -> Tensor:
    checks.linear_block(x, weight, weight_scale, bias)
    way = take_backend("linear_block", weight.dtype, x.device, backend)
    if way == "triton":
        from quantkit_kernels.gpu import linears

        return linears.linear_block(x, weight, weight_scale, bias)
    implementation = cpu_decoding.linear_block if way == "cpu" else generic.linear_block
    return implementation(x, weight, weight_scale, bias)


def _linear_llm_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: float,
    backend: str = "auto",
) -> Tensor:
    checks.linear_llm_int8(x, weight, weight_scale, bias, threshold)
    way = take_backend("linear_llm_int8", weight.dtype, x.device, backend)
    if way == "triton":
        from quantkit_kernels.gpu import llm_int8

        return llm_int8.linear_llm_int8(x, weight, weight_scale, bias, threshold)
    implementation = cpu.linear_llm_int8 if way == "cpu" else generic.linear_llm_int8
    return implementation(x, weight, weight_scale, bias, threshold)


def _linear_weight_only(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, backend: str = "auto"
) -> Tensor:
    checks.linear_weight_only(x, weight, weight_scale, bias)
    way = take_backend("linear_weight_only", weight.dtype, x.device, backend)
    if way == "triton":
        from quantkit_kernels.gpu import weight_only

        return weight_only.linear_weight_only(x, weight, weight_scale, bias)
    implementation = cpu_decoding.linear_weight_only if way == "cpu" else generic.linear_weight_only
    return implementation(x, weight, weight_scale, bias).contiguous()


def _linear_weight_only_packed(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    bits: int,
    backend: str = "auto",
) -> Tensor:
    checks.linear_weight_only_packed(x, weight_packed, weight_scale, bias, bits)
    way = take_backend("linear_weight_only_packed", weight_packed.dtype, x.device, backend)
    if way == "triton":
        from quantkit_kernels.gpu import weight_only

        return weight_only.linear_weight_only_packed(x, weight_packed, weight_scale, bias, bits)
    implementation = cpu_decoding.linear_weight_only_packed if way == "cpu" else generic.linear_weight_only_packed
    return implementation(x, weight_packed, weight_scale, bias, bits).contiguous()


def _register() -> None:
    """Define every op with its implementation and its shape function."""
    implementations: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
        "scaled_mm": (_scaled_mm, _scaled_mm_fake),
        "linear_dynamic": (_linear_dynamic, linear_fake(checks.linear_dynamic)),
        "linear_tensor": (_linear_tensor, linear_fake(checks.linear_tensor)),
        "linear_block": (_linear_block, linear_fake(checks.linear_block)),
        "linear_llm_int8": (_linear_llm_int8, linear_fake(checks.linear_llm_int8)),
        "linear_weight_only": (_linear_weight_only, linear_fake(checks.linear_weight_only)),
        "linear_weight_only_packed": (_linear_weight_only_packed, linear_fake(checks.linear_weight_only_packed)),
    }
    for name, (implementation, fake) in implementations.items():
        register(name, _SCHEMAS[name], implementation, fake)


_register()
