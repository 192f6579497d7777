"""What the ops demand of their arguments: KernelError, naming what does not fit, before anything is computed.

One function an op, with the op's arguments but for the backend. They look at shapes, dtypes and devices only, never
at numbers, so that they hold for fake tensors and make no device wait.
"""

import math

import torch
from torch import Tensor

from quantkit_kernels import formats, generic, sparse24, venom
from quantkit_kernels.errors import KernelError


def quantize_per_token(x: Tensor, dtype: torch.dtype) -> None:
    """Raise KernelError unless `ops.quantize_per_token` can run."""
    if x.ndim != 2 or x.dtype not in formats.FLOAT_DTYPES:
        raise KernelError(f"x is {_shape(x)}: expected [M, K] in float32, bfloat16 or float16")
    _check_codes(dtype)


def quantize_per_tensor(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> None:
    """Raise KernelError unless `ops.quantize_per_tensor` can run."""
    if x.dtype not in formats.FLOAT_DTYPES:
        raise KernelError(f"x is {_shape(x)}: expected float32, bfloat16 or float16")
    _check_codes(dtype)
    if scale is not None:
        if not scale.is_floating_point() or scale.shape != (1,):
            raise KernelError(f"scale is {_shape(scale)}: expected float [1], or None")
        _check_devices(x, scale)


def quantize_per_group(x: Tensor, dtype: torch.dtype) -> None:
    """Raise KernelError unless `ops.quantize_per_group` can run."""
    quantize_per_token(x, dtype)
    if x.shape[1] % formats.BLOCK:
        raise KernelError(f"K is {x.shape[1]}: groups need a multiple of {formats.BLOCK} in features")


def rms_norm_quantize(x: Tensor, gain: Tensor, eps: float, offset: float, dtype: torch.dtype) -> None:
    """Raise KernelError unless `ops.rms_norm_quantize` can run."""
    quantize_per_token(x, dtype)
    if not gain.is_floating_point() or gain.shape != x.shape[1:]:
        raise KernelError(f"gain is {_shape(gain)}: expected float [{x.shape[1]}]")
    if not 0 <= eps < math.inf:  # NaN neither
        raise KernelError(f"eps is {eps}: expected a number from 0, such as 1e-6")
    if not math.isfinite(offset):
        raise KernelError(f"offset is {offset}: expected 0, or 1 where the gain is stored as its difference from 1")
    _check_devices(x, gain)


def silu_mul_quantize(gate: Tensor, up: Tensor, dtype: torch.dtype) -> None:
    """Raise KernelError unless `ops.silu_mul_quantize` can run."""
    quantize_per_token(gate, dtype)
    if up.dtype != gate.dtype or up.shape != gate.shape:
        raise KernelError(f"gate is {_shape(gate)} and up {_shape(up)}: expected the same dtype and shape")
    _check_devices(gate, up)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """Raise KernelError unless `ops.dequantize` can run."""
    if codes.ndim != 2 or codes.dtype not in formats.QMAX:
        raise KernelError(f"codes are {_shape(codes)}: expected [N, K] in int8, float8_e4m3fn or float8_e5m2")
    if dtype not in formats.FLOAT_DTYPES:
        raise KernelError(f"dtype is {dtype}: expected float32, bfloat16 or float16")
    if scale.shape == (1,):
        _check_scale(scale, (1,))
    else:
        _check_groups(scale, *codes.shape)
    _check_devices(codes, scale)


def scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> None:
    """Raise KernelError unless `ops.scaled_mm` can run."""
    if a.dtype not in formats.QMAX or a.dtype != b.dtype:
        raise KernelError(f"a is {a.dtype} and b {b.dtype}: expected both int8, or both the same fp8 dtype")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise KernelError(f"a is {_shape(a)} and b {_shape(b)}: expected [M, K] and [N, K]")
    if a_scale.dtype != torch.float32 or a_scale.shape != (a.shape[0], 1):
        raise KernelError(f"a_scale is {_shape(a_scale)}: expected torch.float32 [{a.shape[0]}, 1]")
    _check_int32_sum(a)
    _check_scale(b_scale, (b.shape[0], 1))
    _check_bias(bias, b.shape[0])
    if out_dtype not in formats.FLOAT_DTYPES:
        raise KernelError(f"out_dtype is {out_dtype}: expected float32, bfloat16 or float16")
    _check_devices(a, b, a_scale, b_scale, bias)


def linear_dynamic(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """Raise KernelError unless `ops.linear_dynamic` can run."""
    _check_linear(x, weight, weight_scale, bias)
    _check_scale(weight_scale, (weight.shape[0], 1))
    _check_int32_sum(weight)


def linear_tensor(
    x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, bias: Tensor | None
) -> None:
    """Raise KernelError unless `ops.linear_tensor` can run."""
    _check_linear(x, weight, weight_scale, bias)
    _check_scale(weight_scale, (weight.shape[0], 1), (1,))
    if input_scale is not None:
        if not input_scale.is_floating_point() or input_scale.shape != (1,):
            raise KernelError(f"input_scale is {_shape(input_scale)}: expected float [1], or None")
        _check_devices(x, input_scale)
    _check_int32_sum(weight)


def linear_block(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """Raise KernelError unless `ops.linear_block` can run."""
    _check_linear(x, weight, weight_scale, bias)
    if weight.dtype == torch.int8:
        raise KernelError(f"weight is {_shape(weight)}: expected [N, K] in float8_e4m3fn or float8_e5m2")
    out_features, in_features = weight.shape
    if in_features % formats.BLOCK:
        raise KernelError(
            f"K is {in_features}: blocks need a multiple of {formats.BLOCK} in features, leave the layer in float"
        )
    _check_scale(weight_scale, (-(-out_features // formats.BLOCK), in_features // formats.BLOCK))


def linear_llm_int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, threshold: float) -> None:
    """Raise KernelError unless `ops.linear_llm_int8` can run."""
    _check_linear(x, weight, weight_scale, bias)
    if weight.dtype != torch.int8:
        raise KernelError(f"weight is {_shape(weight)}: expected [N, K] in int8")
    _check_scale(weight_scale, (weight.shape[0], 1))
    if not threshold > 0:  # NaN too
        raise KernelError(f"threshold is {threshold}: expected a positive number, such as 6.0")
    _check_int32_sum(weight)


def linear_grouped(x: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, activations: str) -> None:
    """Raise KernelError unless `ops.linear_grouped` can run; what the offsets are is not looked at."""
    if activations not in ("none", "token"):
        raise KernelError(f"activations is {activations!r}: expected 'none' or 'token'")
    if weight.ndim != 3 or weight.dtype not in formats.QMAX or weight.shape[0] == 0:
        raise KernelError(f"weight is {_shape(weight)}: expected [E, N, K] in int8, float8_e4m3fn or float8_e5m2")
    if x.ndim != 2:
        raise KernelError(f"x is {_shape(x)}: expected [M, K], tokens sorted by expert")
    _check_x(x, weight.shape[2])
    _check_scale(weight_scale, (*weight.shape[:2], 1))
    if offsets.dtype != torch.int32 or offsets.shape != (weight.shape[0] + 1,):
        raise KernelError(f"offsets is {_shape(offsets)}: expected torch.int32 [{weight.shape[0] + 1}]")
    if activations == "token":
        _check_int32_sum(weight)
    _check_devices(x, weight, weight_scale, offsets)


def linear_weight_only(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """Raise KernelError unless `ops.linear_weight_only` can run."""
    _check_linear(x, weight, weight_scale, bias)
    _check_groups(weight_scale, *weight.shape)


def linear_weight_only_packed(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int
) -> None:
    """Raise KernelError unless `ops.linear_weight_only_packed` can run."""
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
    _check_groups(weight_scale, weight_packed.shape[0], x.shape[-1])
    _check_bias(bias, weight_packed.shape[0])
    _check_devices(x, weight_packed, weight_scale, bias)


def linear_sparse24(
    x: Tensor, values: Tensor, indices: Tensor, weight_scale: Tensor | None, bias: Tensor | None
) -> None:
    """Raise KernelError unless `ops.linear_sparse24` can run; what the indices are is not looked at."""
    in_features = x.shape[-1] if x.ndim else 0
    if x.ndim < 1 or in_features % sparse24.GROUP:
        raise KernelError(f"x is {_shape(x)}: expected [..., K], and 2:4 needs a K that 4 divides")
    _check_x(x, in_features)
    _check_sparse(x, values, indices, weight_scale, bias, in_features)
    _check_devices(x, values, indices, weight_scale, bias)


def linear_venom(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    columns: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    v: int,
    m: int,
) -> None:
    """Raise KernelError unless `ops.linear_venom` can run; what indices and columns are is not looked at."""
    in_features = x.shape[-1] if x.ndim else 0
    try:
        venom.check_pattern(in_features, v, m)
    except ValueError as error:
        raise KernelError(f"x is {_shape(x)}, and {error}") from error
    _check_x(x, in_features)
    kept = in_features // m * venom.KEPT
    _check_sparse(x, values, indices, weight_scale, bias, kept)
    expected = (venom.row_blocks(values.shape[0], v), kept)
    if columns.dtype != torch.uint8 or columns.shape != expected:
        raise KernelError(f"columns are {_shape(columns)}: expected torch.uint8 {list(expected)}")
    _check_devices(x, values, indices, columns, weight_scale, bias)


def _check_sparse(
    x: Tensor, values: Tensor, indices: Tensor, weight_scale: Tensor | None, bias: Tensor | None, kept: int
) -> None:
    """Raise KernelError unless values, indices, scale and bias are those of a 2:4 weight with `kept` in features."""
    packed = values.dtype == torch.int32
    width = formats.packed_words(kept // 2, 4) if packed else kept // 2
    known = packed or values.dtype in sparse24.VALUE_DTYPES
    if not known or values.ndim != 2 or values.shape[1] != width:
        raise KernelError(
            f"values are {_shape(values)}: expected [N, {kept // 2}] in float, int8 or fp8, or torch.int32 "
            f"[N, {formats.packed_words(kept // 2, 4)}] of codes of 4 bits, for x {_shape(x)}"
        )
    expected = (values.shape[0], sparse24.index_words(kept))
    if indices.dtype != torch.int32 or indices.shape != expected:
        raise KernelError(f"indices are {_shape(indices)}: expected torch.int32 {list(expected)}")
    if (weight_scale is None) != (values.dtype in formats.FLOAT_DTYPES):
        raise KernelError(f"values are {values.dtype}: a weight_scale goes with codes, and None with values in float")
    if weight_scale is not None:
        _check_groups(weight_scale, values.shape[0], x.shape[-1])
    _check_bias(bias, values.shape[0])


def linear_sparse_input(x: Tensor, weight_t: Tensor, weight_scale: Tensor | None, bias: Tensor | None) -> None:
    """Raise KernelError unless `ops.linear_sparse_input` can run."""
    _check_rows("weight_t", weight_t, "[K, N]")
    _check_x(x, weight_t.shape[0])
    _check_row_scale("weight_scale", weight_scale, weight_t, weight_t.shape[1])
    _check_bias(bias, weight_t.shape[1])
    _check_devices(x, weight_t, weight_scale, bias)


def mlp_sparse(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    up_scale: Tensor | None,
    up_bias: Tensor | None,
    down_t: Tensor,
    down_scale: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    """Raise KernelError unless `ops.mlp_sparse` can run."""
    _check_rows("up", up, "[I, K]")
    _check_rows("down_t", down_t, "[I, N]")
    if down_t.dtype != up.dtype or down_t.shape[0] != up.shape[0]:
        raise KernelError(f"up is {_shape(up)} and down_t {_shape(down_t)}: expected one dtype and as many rows")
    _check_x(x, up.shape[1])
    if gate.dtype != x.dtype or gate.shape != (*x.shape[:-1], up.shape[0]):
        raise KernelError(
            f"gate is {_shape(gate)}: expected {x.dtype} {[*x.shape[:-1], up.shape[0]]} for x {_shape(x)}"
        )
    _check_row_scale("up_scale", up_scale, up, up.shape[0])
    _check_row_scale("down_scale", down_scale, down_t, down_t.shape[1])
    _check_bias(up_bias, up.shape[0])
    _check_bias(down_bias, down_t.shape[1])
    _check_devices(x, gate, up, up_scale, up_bias, down_t, down_scale, down_bias)


def _check_rows(name: str, weight: Tensor, expected: str) -> None:
    """Raise KernelError unless the weight is one that rows can be read of."""
    if weight.ndim != 2 or weight.dtype not in (*formats.FLOAT_DTYPES, torch.int8):
        raise KernelError(f"{name} is {_shape(weight)}: expected {expected} in float32, bfloat16, float16 or int8")


def _check_row_scale(name: str, scale: Tensor | None, weight: Tensor, out_features: int) -> None:
    """Raise KernelError unless int8 has a scale for each out feature, and floats have none."""
    if (scale is None) != (weight.dtype != torch.int8):
        raise KernelError(f"the weight is {weight.dtype}: {name} goes with int8, and None with floats")
    if scale is not None:
        _check_scale(scale, (out_features, 1))


def _shape(tensor: Tensor) -> str:
    """Return dtype and shape for a message."""
    return f"{tensor.dtype} {list(tensor.shape)}"


def _check_codes(dtype: torch.dtype) -> None:
    if dtype not in formats.QMAX:
        raise KernelError(f"cannot quantize to {dtype}: expected int8, float8_e4m3fn or float8_e5m2")


def _check_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """Raise KernelError unless the arguments are those of a linear layer; the scale's shape is each op's own."""
    if weight.ndim != 2 or weight.dtype not in formats.QMAX:
        raise KernelError(f"weight is {_shape(weight)}: expected [N, K] in int8, float8_e4m3fn or float8_e5m2")
    _check_x(x, weight.shape[1])
    _check_bias(bias, weight.shape[0])
    _check_devices(x, weight, weight_scale, bias)


def _check_x(x: Tensor, in_features: int) -> None:
    if x.ndim < 1 or x.dtype not in formats.FLOAT_DTYPES or x.shape[-1] != in_features:
        raise KernelError(f"x is {_shape(x)}: expected [..., {in_features}] in float32, bfloat16 or float16")


def _check_scale(scale: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise KernelError unless the scale is float and has one of the shapes."""
    if not scale.is_floating_point() or all(scale.shape != shape for shape in shapes):
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise KernelError(f"the weight's scale is {_shape(scale)}: expected float {expected}")


def _check_groups(scale: Tensor, out_features: int, in_features: int) -> None:
    """Raise KernelError unless the scale is [N, G], G dividing K."""
    groups = scale.shape[-1] if scale.ndim == 2 else 0
    if groups < 1 or in_features % groups:
        raise KernelError(f"weight_scale is {_shape(scale)}: expected [N, G], G dividing K = {in_features}")
    _check_scale(scale, (out_features, groups))


def _check_bias(bias: Tensor | None, out_features: int) -> None:
    if bias is not None and (not bias.is_floating_point() or bias.shape != (out_features,)):
        raise KernelError(f"bias is {_shape(bias)}: expected float [{out_features}]")


def _check_int32_sum(codes: Tensor) -> None:
    """Raise KernelError where an int8 product of such long rows could overflow."""
    if codes.dtype == torch.int8 and codes.shape[-1] > generic.INT8_MAX_K:
        raise KernelError(
            f"K is {codes.shape[-1]}: an int8 product overflows int32 beyond {generic.INT8_MAX_K}, split it along K"
        )


def _check_devices(first: Tensor, *others: Tensor | None) -> None:
    for tensor in others:
        if tensor is not None and tensor.device != first.device:
            raise KernelError(f"tensors are on {first.device} and {tensor.device}: expected one device")
