"""The op that multiplies each token with the weight of its own expert: part of the contract in `ops.py`.

`checks.py` says what the arguments must be; `reference.py` has it again in float64.
"""

from typing import cast

import torch
from torch import Tensor

from quantkit_kernels import checks, cpu, generic
from quantkit_kernels.backends import take_backend
from quantkit_kernels.dispatch import is_plain_call
from quantkit_kernels.registration import register


def linear_grouped(
    x: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, activations: str, backend: str = "auto"
) -> Tensor:
    """Return the output [M, N] in x's dtype of E linear layers, each for its own run of tokens.

    Tokens offsets[e] to offsets[e + 1] - 1 meet weight[e]: all of an expert's tokens lie together, none is dropped, and
    there is no padding. With activations "token" an expert's output is `linear_dynamic`'s. With "none" it is
    (x @ codes.T) * scale: products of x and codes are exact, their sum has an error <= K * 2**-24 * (|x| @ |codes|.T)
    before the scale, and the result is rounded to x's dtype once.

    Args:
        x: [M, K], float32, bfloat16 or float16; any strides.
        weight: [E, N, K], int8 or fp8; any strides.
        weight_scale: [E, N, 1], any float dtype.
        offsets: [E + 1], int32, ascending from 0 to M; an expert without tokens is a number that comes twice. Torch
            code reads it on the host, which on a GPU waits for the device, and refuses others; the Triton kernel reads
            it on the device, and with others leaves tokens without a result.
        activations: "token" (x is quantized per token to the weight's dtype) or "none" (weight only).
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for shapes, dtypes, offsets or a backend that do not fit; the message names them.
    """
    if is_plain_call(x, weight, weight_scale, offsets):
        return _linear_grouped(x, weight, weight_scale, offsets, activations, backend)
    return cast("Tensor", torch.ops.quantkit.linear_grouped(x, weight, weight_scale, offsets, activations, backend))


def _linear_grouped(
    x: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, activations: str, backend: str = "auto"
) -> Tensor:
    checks.linear_grouped(x, weight, weight_scale, offsets, activations)
    way = take_backend("linear_grouped", weight.dtype, x.device, backend)
    if way == "triton":
        from quantkit_kernels.gpu import grouped

        return grouped.linear_grouped(x, weight, weight_scale, offsets, activations)
    linear = cpu.linear_dynamic if way == "cpu" else generic.linear_dynamic
    return generic.linear_grouped(x, weight, weight_scale, offsets, activations, linear)


def _linear_grouped_fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, activations: str, backend: str = "auto"
) -> Tensor:
    checks.linear_grouped(x, weight, weight_scale, offsets, activations)
    return x.new_empty((x.shape[0], weight.shape[1]))


register(
    "linear_grouped",
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor offsets, str activations, str backend='auto') -> Tensor",
    _linear_grouped,
    _linear_grouped_fake,
)
