"""linear_grouped, the torch ways: against float64 with derived bounds, token by token; what does not fit is refused."""

import pytest
import torch
from quantkit_kernels import cpu, formats, ops, reference
from quantkit_kernels.errors import KernelError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
N, K = 13, 70
COUNTS = ((0,), (0, 0), (3,), (0, 4, 0, 1), (2, 3, 0))


def inputs(counts, dtype, x_dtype, seed=0):
    """Return x, weight, its scale and the offsets for so many tokens an expert; experts differ in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), K, generator=generator)
    x[1:2] = 0
    weight = torch.randn(len(counts), N, K, generator=generator) * torch.arange(1, len(counts) + 1).view(-1, 1, 1)
    codes, scale = formats.quantize_weight(weight.to(x_dtype), dtype)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return x.to(x_dtype), codes, scale, offsets


def bound(x, codes, scale, offsets, activations, expected):
    """Return the bound: K roundings of a float32 sum and 4 of products, of absolute values, then one to x's dtype.

    With int8 on both sides the sum is exact.
    """
    sizes = reference.linear_grouped(x.float().abs(), codes.double().abs(), scale, offsets, "none")
    if activations == "token":
        values, x_scale = reference.quantize_per_token(x, codes.dtype)
        sizes = reference.linear_grouped(values.abs(), codes.double().abs(), scale, offsets, "none") * x_scale
    terms = 4 + (0 if activations == "token" and codes.dtype == torch.int8 else K)
    error = terms * 2.0**-24 * 1.01 * sizes
    return error + torch.finfo(x.dtype).eps / 2 * (expected.abs() + error) + torch.finfo(x.dtype).tiny


@pytest.mark.parametrize("dtype", formats.QMAX)
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("activations", ["none", "token"])
@pytest.mark.parametrize("counts", COUNTS)
def test_against_float64(dtype, x_dtype, activations, counts):
    x, codes, scale, offsets = inputs(counts, dtype, x_dtype)
    out = ops.linear_grouped(x, codes, scale, offsets, activations)
    assert out.dtype == x_dtype
    assert out.shape == (sum(counts), N)
    expected = reference.linear_grouped(x, codes, scale, offsets, activations)
    limit = bound(x, codes, scale, offsets, activations, expected)
    assert ((out.double() - expected).abs() <= limit).all()
    if out.numel():  # the bound says something: another expert's weight would be seen
        assert limit.mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("with_vnni", [True, False])
def test_int8_experts_have_the_bits_of_their_own_layers(monkeypatch, with_vnni):
    if with_vnni and not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has no VNNI")
    monkeypatch.setattr(cpu, "has_exact_int_mm", lambda: with_vnni)
    x, codes, scale, offsets = inputs((2, 0, 5), torch.int8, torch.bfloat16)
    out = ops.linear_grouped(x, codes, scale, offsets, "token")
    assert torch.equal(out[:2], ops.linear_dynamic(x[:2], codes[0], scale[0], None))
    assert torch.equal(out[2:], ops.linear_dynamic(x[2:], codes[2], scale[2], None))


@pytest.mark.parametrize("activations", ["none", "token"])
def test_any_strides_meta_tensors_and_no_gradient(activations):
    x, codes, scale, offsets = inputs((2, 3), torch.int8, torch.float32)
    expected = ops.linear_grouped(x, codes, scale, offsets, activations)
    apart, transposed = x.repeat_interleave(2, dim=1)[:, ::2], codes.mT.contiguous().mT
    out = ops.linear_grouped(apart, transposed, scale, offsets, activations)
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-4)
    tensors = [value.to("meta") for value in (x, codes, scale, offsets)]
    out = torch.ops.quantkit.linear_grouped(*tensors[:3], tensors[3], activations)
    assert (out.shape, out.device.type) == ((5, N), "meta")
    out = ops.linear_grouped(x.requires_grad_(), codes, scale, offsets, activations)
    with pytest.raises(KernelError, match=r"quantkit.linear_grouped has no gradient"):
        out.sum().backward()


def bad_calls():
    x, codes, scale, offsets = inputs((2, 3), torch.int8, torch.float32)

    def numbers(*values):
        return torch.tensor(values, dtype=torch.int32)

    long_codes = torch.ones(1, 1, 2**17, dtype=torch.int8)
    return [
        ((x, codes, scale, offsets, "tensor"), "activations is 'tensor': expected 'none' or 'token'"),
        ((x[None], codes, scale, offsets, "none"), r"\[1, 5, 70\]: expected \[M, K\], tokens sorted by expert"),
        ((x[:, 1:], codes, scale, offsets, "none"), r"expected \[\.\.\., 70\]"),
        ((x, codes[0], scale, offsets, "none"), r"expected \[E, N, K\] in int8"),
        ((x, codes.float(), scale, offsets, "none"), r"expected \[E, N, K\] in int8"),
        ((x, codes[:0], scale[:0], offsets[:1], "none"), r"weight is torch.int8 \[0, 13, 70\]"),
        ((x, codes, scale[:, :, 0], offsets, "none"), r"expected float \[2, 13, 1\]"),
        ((x, codes, scale, offsets.long(), "none"), r"torch.int64 \[3\]: expected torch.int32 \[3\]"),
        ((x, codes, scale, offsets[1:], "none"), r"\[2\]: expected torch.int32 \[3\]"),
        ((x, codes, scale, numbers(0, 2, 4), "none"), "0, 2, 4.*expected numbers that ascend from 0 to the 5 tokens"),
        ((x, codes, scale, numbers(1, 2, 5), "none"), "ascend from 0 to the 5 tokens"),
        ((x, codes, scale, numbers(0, 6, 5), "token"), "ascend from 0 to the 5 tokens"),
        ((x, codes, scale.to("meta"), offsets, "none"), "cpu and meta: expected one device"),
        ((x, codes, scale, offsets, "none", "cuda"), "expected one of auto, torch, triton"),
        ((x, codes, scale, offsets, "none", "triton"), "linear_grouped on device cpu: expected tensors on a CUDA"),
        (
            (torch.ones(1, 2**17), long_codes, torch.ones(1, 1, 1), numbers(0, 1), "token"),
            "overflows int32 beyond 131071",
        ),
    ]


@pytest.mark.parametrize("case", range(len(bad_calls())))
def test_what_does_not_fit_is_refused_by_name(case):
    arguments, message = bad_calls()[case]
    with pytest.raises(KernelError, match=message):
        ops.linear_grouped(*arguments)
