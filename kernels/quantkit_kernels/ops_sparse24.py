"""The op that multiplies with a packed 2:4 sparse weight: part of the contract in `ops.py`.

`checks.py` says what the arguments must be; `reference.py` has it again in float64.
"""

from typing import cast

import torch
from torch import Tensor

from quantkit_kernels import checks, cpu_decoding, generic
from quantkit_kernels.backends import select_backend
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


def _linear_sparse24(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    checks.linear_sparse24(x, values, indices, weight_scale, bias)
    way = select_backend("linear_sparse24", values.dtype, x.device, backend)
    implementation = cpu_decoding.linear_sparse24 if way == "cpu" else generic.linear_sparse24
    return implementation(x, values, indices, weight_scale, bias).contiguous()


register(
    "linear_sparse24",
    "(Tensor x, Tensor values, Tensor indices, Tensor? weight_scale, Tensor? bias, str backend='auto') -> Tensor",
    _linear_sparse24,
    linear_fake(checks.linear_sparse24),
)
