"""The ops that multiply with packed 2:4 and V:N:M sparse weights: part of the contract in `ops.py`.

`checks.py` says what the arguments must be; `reference.py` has them again in float64.
"""

from typing import cast

import torch
from torch import Tensor

from quantkit_kernels import checks, cpu_decoding, generic
from quantkit_kernels.backends import take_backend
from quantkit_kernels.dispatch import is_plain_call
from quantkit_kernels.registration import linear_fake, register


def linear_sparse24(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype for a weight that `sparse24` packed.

    `linear_weight_only` of the unpacked codes; values in float are the weight itself, cast to x's dtype. The Triton
    kernel spares the weight the roundings of decoding (`gpu/sparse24.py`).

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides and leading dimensions; 4 divides K.
        values: [N, K / 2], float32, bfloat16, float16, int8 or fp8; or int32 [N, ceil(K / 16)], codes of 4 bits that
            `formats.pack_int32` packed.
        indices: [N, ceil(K / 32)], int32.
        weight_scale: [N, G], any float dtype; G divides K. None for values in float, and only there.
        bias: [N], any float dtype (cast to x's), or None.
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for shapes, dtypes or a backend that do not fit; the message names them.
    """
    if is_plain_call(x, values, indices, weight_scale, bias):
        return _linear_sparse24(x, values, indices, weight_scale, bias, backend)
    return cast("Tensor", torch.ops.quantkit.linear_sparse24(x, values, indices, weight_scale, bias, backend))


def linear_venom(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    columns: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    v: int,
    m: int,
    backend: str = "auto",
) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype for a V:N:M weight that `venom` packed.

    `linear_weight_only` of the unpacked codes, as `linear_sparse24`. T = K / M.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides and leading dimensions; M divides K.
        values: [N, 2 T], float32, bfloat16, float16, int8 or fp8; or int32 [N, ceil(T / 4)], codes of 4 bits that
            `formats.pack_int32` packed.
        indices: [N, ceil(T / 8)], int32.
        columns: [ceil(N / V), 4 T], uint8.
        weight_scale: [N, G], any float dtype; G divides K. None for values in float, and only there.
        bias: [N], any float dtype (cast to x's), or None.
        v: V, out features that share their columns.
        m: M, in features of which four are kept.
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for shapes, dtypes, V, M or a backend that do not fit; the message names them.
    """
    if is_plain_call(x, values, indices, columns, weight_scale, bias):
        return _linear_venom(x, values, indices, columns, weight_scale, bias, v, m, backend)
    return cast(
        "Tensor", torch.ops.quantkit.linear_venom(x, values, indices, columns, weight_scale, bias, v, m, backend)
    )


def _linear_sparse24(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    checks.linear_sparse24(x, values, indices, weight_scale, bias)
    way = take_backend("linear_sparse24", values.dtype, x.device, backend)
    if way == "triton":
        from quantkit_kernels.gpu import sparse24

        return sparse24.linear_sparse24(x, values, indices, weight_scale, bias)
    implementation = cpu_decoding.linear_sparse24 if way == "cpu" else generic.linear_sparse24
    return implementation(x, values, indices, weight_scale, bias).contiguous()


def _linear_venom(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    columns: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    v: int,
    m: int,
    backend: str = "auto",
) -> Tensor:
    checks.linear_venom(x, values, indices, columns, weight_scale, bias, v, m)
    way = take_backend("linear_venom", values.dtype, x.device, backend)
    if way == "triton":
        from quantkit_kernels.gpu import sparse24

        return sparse24.linear_venom(x, values, indices, columns, weight_scale, bias, v, m)
    implementation = cpu_decoding.linear_venom if way == "cpu" else generic.linear_venom
    return implementation(x, values, indices, columns, weight_scale, bias, v, m).contiguous()


register(
    "linear_sparse24",
    "(Tensor x, Tensor values, Tensor indices, Tensor? weight_scale, Tensor? bias, str backend='auto') -> Tensor",
    _linear_sparse24,
    linear_fake(checks.linear_sparse24),
)

register(
    "linear_venom",
    "(Tensor x, Tensor values, Tensor indices, Tensor columns, Tensor? weight_scale, Tensor? bias, int v, int m, "
    "str backend='auto') -> Tensor",
    _linear_venom,
    linear_fake(checks.linear_venom),
)
