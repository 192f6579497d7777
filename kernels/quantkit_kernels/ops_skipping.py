"""The ops that don't read what zeros of an activation would multiply: part of the contract in `ops.py`.

Weights here are "neuron-contiguous": the weights of a neuron, whose activation may be zero, lie side by side. Of a down
projection that is [K, N], a row for each in feature; of an up projection [I, K], the ordinary layout. Mirzadeh et al.
2023 (arXiv:2310.04564) make such zeros with ReLU. `checks.py` says what the arguments must be; `reference.py` has both
again in float64.
"""

from typing import cast

import torch
from torch import Tensor

from quantkit_kernels import checks, cpu_skipping, generic
from quantkit_kernels.backends import take_backend
from quantkit_kernels.dispatch import is_plain_call
from quantkit_kernels.registration import register


def linear_sparse_input(
    x: Tensor, weight_t: Tensor, weight_scale: Tensor | None, bias: Tensor | None, backend: str = "auto"
) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype: the sum of x_k * weight_t[k] over the k with x_k != 0.

    Rows that meet zeros aren't read, where that is faster: with few tokens on a GPU, and on a CPU where few numbers of
    x are nonzero (`cpu_skipping.py` says from where on). Else all rows are multiplied, so that weights must be finite.
    Scales multiply sums. Sums in float32: error <= (K + 4) * 2**-24 * (|x| @ |weight_t|) * |scale|, then one rounding
    to x's dtype, or two: of the sum before it is scaled or the bias is added, and of the result.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides and leading dimensions.
        weight_t: [K, N], float32, bfloat16, float16 or int8; any strides, and whole rows can be skipped where they are
            contiguous. Floats are cast to x's dtype where their dtype is another.
        weight_scale: [N, 1], any float dtype, with int8. None for a weight in float, and only there.
        bias: [N], any float dtype, or None.
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for shapes, dtypes or a backend that do not fit; the message names them.
    """
    if is_plain_call(x, weight_t, weight_scale, bias):
        return _linear_sparse_input(x, weight_t, weight_scale, bias, backend)
    return cast("Tensor", torch.ops.quantkit.linear_sparse_input(x, weight_t, weight_scale, bias, backend))


def mlp_sparse(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    up_scale: Tensor | None,
    up_bias: Tensor | None,
    down_t: Tensor,
    down_scale: Tensor | None,
    down_bias: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    """Return a gated MLP's output [..., N] in x's dtype: ((x @ up.T) * gate) @ down_t, neurons with gate 0 left out.

    `gate` is what the activation function made of the gate projection. Of `up` and `down_t` only rows of neurons whose
    gate isn't zero are read, where that is faster: as `linear_sparse_input` says, whose error this has twice, with the
    products h = (x @ up.T) * gate rounded to x's dtype up to three times in between. At a share s of zeros a third and
    2 (1 - s) thirds of the weights are read, gate's own included.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides and leading dimensions.
        gate: [..., I], x's dtype, the same leading dimensions.
        up: [I, K], float32, bfloat16, float16 or int8.
        up_scale: [I, 1], any float dtype, with int8, else None.
        up_bias: [I], any float dtype, or None.
        down_t: [I, N], up's dtype.
        down_scale: [N, 1], any float dtype, with int8, else None.
        down_bias: [N], any float dtype, or None.
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for shapes, dtypes or a backend that do not fit; the message names them.
    """
    taken = (x, gate, up, up_scale, up_bias, down_t, down_scale, down_bias)
    if is_plain_call(*taken):
        return _mlp_sparse(*taken, backend)
    return cast("Tensor", torch.ops.quantkit.mlp_sparse(*taken, backend))


def _linear_sparse_input(
    x: Tensor, weight_t: Tensor, weight_scale: Tensor | None, bias: Tensor | None, backend: str = "auto"
) -> Tensor:
    checks.linear_sparse_input(x, weight_t, weight_scale, bias)
    way = take_backend("linear_sparse_input", weight_t.dtype, x.device, backend)
    if way == "triton":
        from quantkit_kernels.gpu import skipping

        return skipping.linear_sparse_input(x, weight_t, weight_scale, bias)
    implementation = cpu_skipping.linear_sparse_input if way == "cpu" else generic.linear_sparse_input
    return implementation(x, weight_t, weight_scale, bias)


def _linear_sparse_input_fake(
    x: Tensor, weight_t: Tensor, weight_scale: Tensor | None, bias: Tensor | None, backend: str = "auto"
) -> Tensor:
    checks.linear_sparse_input(x, weight_t, weight_scale, bias)
    return x.new_empty((*x.shape[:-1], weight_t.shape[1]))


def _mlp_sparse(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    up_scale: Tensor | None,
    up_bias: Tensor | None,
    down_t: Tensor,
    down_scale: Tensor | None,
    down_bias: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    checks.mlp_sparse(x, gate, up, up_scale, up_bias, down_t, down_scale, down_bias)
    way = take_backend("mlp_sparse", up.dtype, x.device, backend)
    if way == "triton":
        from quantkit_kernels.gpu import skipping

        return skipping.mlp_sparse(x, gate, up, up_scale, up_bias, down_t, down_scale, down_bias)
    implementation = cpu_skipping.mlp_sparse if way == "cpu" else generic.mlp_sparse
    return implementation(x, gate, up, up_scale, up_bias, down_t, down_scale, down_bias)


def _mlp_sparse_fake(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    up_scale: Tensor | None,
    up_bias: Tensor | None,
    down_t: Tensor,
    down_scale: Tensor | None,
    down_bias: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    checks.mlp_sparse(x, gate, up, up_scale, up_bias, down_t, down_scale, down_bias)
    return x.new_empty((*x.shape[:-1], down_t.shape[1]))


register(
    "linear_sparse_input",
    "(Tensor x, Tensor weight_t, Tensor? weight_scale, Tensor? bias, str backend='auto') -> Tensor",
    _linear_sparse_input,
    _linear_sparse_input_fake,
)
register(
    "mlp_sparse",
    "(Tensor x, Tensor gate, Tensor up, Tensor? up_scale, Tensor? up_bias, Tensor down_t, Tensor? down_scale, "
    "Tensor? down_bias, str backend='auto') -> Tensor",
    _mlp_sparse,
    _mlp_sparse_fake,
)
