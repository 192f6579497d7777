"""Every op of a linear layer on a GPU, on each backend, against float64."""

import functools

import pytest
import torch
from gpu_calls import CALLS, CUDA, FLOATS, check, expected, moved, on_gpu, random
from quantkit_kernels import ops, reference
from quantkit_kernels.errors import KernelError

pytestmark = on_gpu
TOKENS = (0, 1, 3, 17, 70)
ALIGNED, RAGGED = (192, 256), (77, 200)


def run(call, x, tensors, bias, backend):
    """Return the output, or skip where this card's tensor cores have no such product."""
    try:
        return call.run(x, tensors, bias, backend)
    except KernelError as error:
        if "expected sm_" not in str(error):
            raise
        return pytest.skip(str(error))


@functools.lru_cache(maxsize=2 * len(TOKENS))
def problem(name, x_dtype, out_features, in_features, tokens):
    """Return x, the weight's tensors, a bias or None, and what float64 says of the output, for all backends."""
    call = CALLS[name]
    tensors = call.prepare(random(1, out_features, in_features, dtype=x_dtype))
    x = random(2 + tokens, tokens, in_features, dtype=x_dtype, outliers=name == "llm-int8")
    bias = random(3, out_features, dtype=x_dtype) if tokens % 2 else None
    return x, tensors, bias, expected(call, x, tensors, bias)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("name", CALLS)
def test_against_float64(name, x_dtype, backend):
    call = CALLS[name]
    for out_features, in_features in (ALIGNED, (77, 384) if call.blocks else RAGGED):
        for tokens in TOKENS:
            x, tensors, bias, wanted = problem(name, x_dtype, out_features, in_features, tokens)
            on_device = None if bias is None else bias.to(CUDA)
            out = run(call, x.to(CUDA), moved(tensors), on_device, backend)
            check(out, *wanted, x_dtype)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", CALLS)
def test_strides_and_leading_dimensions(name, backend):
    """Activations with gaps and transposed, a weight stored [K, N]: what a view of a fused tensor looks like."""
    call, (out_features, in_features) = CALLS[name], ALIGNED
    tensors = call.prepare(random(1, out_features, in_features, dtype=torch.bfloat16))
    on_device = moved(tensors)
    transposed = (on_device[0].t().contiguous().t(), *on_device[1:])
    wide = random(2, 2, 10, in_features + 8, dtype=torch.bfloat16, outliers=name == "llm-int8")
    x = wide[:, ::2, 8:]
    exact, bound = expected(call, x, tensors, None)
    for strided in (wide.to(CUDA)[:, ::2, 8:], x.transpose(0, 2).contiguous().to(CUDA).transpose(0, 2)):
        for weight in (on_device, transposed):
            check(run(call, strided, weight, None, backend), exact, bound, torch.bfloat16)


@pytest.mark.parametrize("name", [name for name in CALLS if "int8" in name and "weights" not in name])
def test_int8_gives_the_same_bits_everywhere(name):
    """The integer product is exact and the epilogue rounds alike. LLM.int8 does so where there are no outliers."""
    call, (out_features, in_features) = CALLS[name], ALIGNED
    tensors = call.prepare(random(1, out_features, in_features, dtype=torch.bfloat16))
    x, bias = random(2, 65, in_features, dtype=torch.bfloat16), random(3, out_features, dtype=torch.bfloat16)
    assert x.abs().max() < 6
    on_cpu = call.run(x, tensors, bias, "torch")
    for backend in ("triton", "torch"):
        assert torch.equal(call.run(x.to(CUDA), moved(tensors), bias.to(CUDA), backend).cpu(), on_cpu), backend


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("activations", ["token", "none"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_experts(dtype, activations, backend):
    from quantkit_kernels import formats

    for x_dtype in FLOATS:
        weight = random(1, 5, 96, 128, dtype=x_dtype)
        codes, scale = formats.quantize_weight(weight, dtype)
        for counts in ([0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [3, 0, 70, 1, 16]):
            offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
            x = random(2, sum(counts), 128, dtype=x_dtype)
            out = ops.linear_grouped(*moved((x, codes, scale, offsets)), activations, backend)
            exact = reference.linear_grouped(x, codes, scale, offsets, activations)
            size = reference.linear_grouped(x.abs(), codes.float().abs().to(dtype), scale, offsets, activations)
            float32 = (2 * 128 * 2.0**-24 + (0 if dtype == torch.int8 else 2.0**-6)) * size
            unit = torch.finfo(x_dtype).eps / 2
            check(out, exact, float32 + 1.01 * unit * (exact.abs() + float32) + 1e-30, x_dtype)


def test_another_card_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    other, call = torch.device("cuda", 1), CALLS["dynamic int8"]
    tensors = call.prepare(random(1, *ALIGNED, dtype=torch.bfloat16))
    x = random(2, 17, ALIGNED[1], dtype=torch.bfloat16)
    assert torch.cuda.current_device() == 0
    check(call.run(x.to(other), moved(tensors, other), None, "triton"), *expected(call, x, tensors, None), x.dtype)
