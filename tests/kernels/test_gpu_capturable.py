"""What a CUDA graph can capture: between a call on a GPU and its kernels nothing waits for a number of the device.

The kernels themselves are left out (there is no GPU); all that is around them runs, on CPU tensors.
"""

import functools
import itertools
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

from quantkit_kernels import formats
from quantkit_kernels.gpu import linears
from triton.runtime.jit import JITFunction
from waiting import NothingWaits

INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2


def layer(dtype, granularity="row"):
    """Return a weight [256, 256], its scale and a bias."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator)
    return *formats.quantize_weight(weight, dtype, granularity=granularity), torch.randn(256, generator=generator)


def calls():
    """Return the calls by name, each taking x [M, 256]."""
    for dtype in (INT8, E4M3, E5M2):
        weight, scale, bias = layer(dtype)
        yield (
            f"dynamic {dtype}",
            functools.partial(linears.linear_dynamic, weight=weight, weight_scale=scale, bias=bias),
        )
        for scale_of_x, by_row in itertools.product((None, torch.tensor([0.02])), (True, False)):
            yield (
                f"tensor {dtype}, {'dynamic' if scale_of_x is None else 'static'}, {'a row' if by_row else 'one'}",
                functools.partial(
                    linears.linear_tensor,
                    weight=weight,
                    weight_scale=scale if by_row else scale[0],
                    input_scale=scale_of_x,
                    bias=bias,
                ),
            )
    for dtype in (E4M3, E5M2):
        weight, scale, bias = layer(dtype, "block")
        yield f"block {dtype}", functools.partial(linears.linear_block, weight=weight, weight_scale=scale, bias=bias)


CALLS = dict(calls())


@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(name):
    launched = []
    x = torch.randn(17, 256, dtype=torch.bfloat16)
    with mock.patch.object(JITFunction, "run", lambda self, *some, **options: launched.append(self.fn.__name__)):
        with NothingWaits():
            out = CALLS[name](x[::2])
        shapes = [CALLS[name](torch.randn(tokens, 256)).shape for tokens in (0, 1)]
    assert any(kernel.endswith("scaled_mm_kernel") for kernel in launched)
    assert any(kernel.startswith("quantize") for kernel in launched)
    assert out.shape == (9, 256)
    assert shapes == [(0, 256), (1, 256)]


def test_waiting_would_be_seen():
    with pytest.raises(AssertionError, match="waits for the device"), NothingWaits():
        torch.ones(3).sum().item()
