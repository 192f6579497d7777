"""What quantizes activations on a GPU: the bits of the CPU's code, and of fused kernels half a step of float64."""

import math

import pytest
import torch
from gpu_calls import CUDA, FLOATS, on_gpu, random
from quantkit_kernels import formats, ops, reference

pytestmark = on_gpu
CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
SHAPES = ((0, 128), (1, 128), (3, 384), (17, 4096), (2, 20480))


def same(found, wanted):
    """Assert that scales have the same bits, NaN where NaN is, and so do the codes of finite scales."""
    codes, scale = (each.cpu() for each in found)
    assert torch.equal(scale.nan_to_num(-1.0), wanted[1].nan_to_num(-1.0))
    assert codes.shape == wanted[0].shape
    finite = scale.isfinite()
    if scale.ndim == 2 and codes.numel():
        finite = finite.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
    differ = codes.view(torch.int8) != wanted[0].view(torch.int8)
    assert not (differ & finite).any()


def hostile(shape, dtype):
    """Return numbers with zero rows, subnormal ones, and in the last row infinity and NaN."""
    x = random(1, *shape, dtype=torch.float32)
    if len(x) > 2:
        x[1] = torch.finfo(dtype).tiny / 4
        x[-1, 0], x[-1, 1] = math.inf, math.nan
    return x.to(dtype)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("dtype", CODES)
def test_bits(dtype, x_dtype, backend):
    for shape in SHAPES:
        x = hostile(shape, x_dtype)
        there = x.to(CUDA)
        same(ops.quantize_per_token(there, dtype, backend), formats.quantize_per_token(x, dtype))
        same(ops.quantize_per_group(there, dtype, backend), formats.quantize_per_group(x, dtype))
        finite = x[:-1]
        same(ops.quantize_per_tensor(finite.to(CUDA), dtype, None, backend), formats.quantize_per_tensor(finite, dtype))
        scale = torch.tensor([0.01])
        found = ops.quantize_per_tensor(finite.to(CUDA), dtype, scale.to(CUDA), backend)
        same(found, formats.quantize_per_tensor(finite, dtype, scale))
        wide = there.repeat(2, 2)
        same(
            ops.quantize_per_token(wide[::2, : shape[1]], dtype, backend),
            formats.quantize_per_token(wide[::2, : shape[1]].cpu(), dtype),
        )


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("dtype", CODES)
def test_fused_ones_give_the_nearest_codes(dtype, x_dtype, backend):
    from quantkit_kernels.benchmarks.cases import Case
    from quantkit_kernels.benchmarks.correctness import is_right

    for shape in ((0, 128), (1, 128), (3, 385), (17, 4096)):
        x, up = random(1, *shape, dtype=x_dtype), random(2, *shape, dtype=x_dtype)
        gain = random(3, shape[1], dtype=x_dtype)
        norm = ops.rms_norm_quantize(x.to(CUDA), gain.to(CUDA), 1e-6, 1.0, dtype, backend)
        silu = ops.silu_mul_quantize(x.to(CUDA), up.to(CUDA), dtype, backend)
        for out, exact in ((norm, reference.rms_norm(x, gain, 1e-6, 1.0)), (silu, reference.silu_mul(x, up))):
            case = Case(lambda *_: (), lambda *_: None, kind="quantizer", expected=lambda exact=exact: (exact, None))
            if exact.numel():
                assert is_right(case, (), tuple(each.cpu() for each in out))
            assert out[0].shape == exact.shape


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", CODES)
def test_dequantize_gives_the_bits_of_the_cpu(dtype, backend):
    for x_dtype in FLOATS:
        for group in (None, 32):
            codes, scale = formats.quantize_weight(random(1, 77, 192, dtype=x_dtype), dtype, group)
            for out_dtype in FLOATS:
                out = ops.dequantize(codes.to(CUDA), scale.to(CUDA), out_dtype, backend)
                assert torch.equal(out.cpu(), formats.dequantize(codes, scale).to(out_dtype))
