"""Weights in 4 bits: codes and scales against loops over numbers, the search for ranges against a dense one."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantkit_kernels import cpu_int4, formats, ops, ranges, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def weight_of(seed, shape, dtype=torch.float32):
    """Return rows of very different sizes with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) < 0.02] *= 6.0
    return (weight * torch.logspace(-1, 1, shape[-2]).unsqueeze(-1)).to(dtype)


def quantize(weight, group_size=None, weight_range="mse", scale_dtype=None):
    return formats.quantize_weight(weight, torch.int8, group_size, weight_range, scale_dtype=scale_dtype, bits=4)


def group_errors(weight, codes, scale):
    """Return the squared error of each group, [N, G], after decoding as every product decodes."""
    difference = formats.dequantize(codes, scale).double() - weight.double()
    return difference.square().reshape(*scale.shape, -1).sum(-1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group_size", [None, 8])
def test_absmax_is_that_of_the_loop(dtype, group_size):
    """Divisions are float64's rounded to float32, which is float32's quotient."""
    weight, length = weight_of(0, (5, 24), dtype), group_size or 24
    codes, scale = quantize(weight, group_size, "absmax")
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, dtype, (5, 24 // length))
    for n in range(5):
        for group in range(24 // length):
            part = weight[n, group * length : (group + 1) * length].tolist()
            largest = torch.tensor(max(map(abs, part)) / 7, dtype=torch.float64).float().to(dtype).item()
            assert scale[n, group].item() == largest
            quotients = (torch.tensor(part, dtype=torch.float64) / largest).float().tolist()
            expected = [max(-8, min(7, round(value))) for value in quotients]
            assert codes[n, group * length : (group + 1) * length].tolist() == expected


shapes = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 40))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), shape=shapes, dtype=st.sampled_from(FLOATS), exponent=st.integers(-12, 8))
def test_absmax_is_off_by_half_a_scale_at_most(seed, shape, dtype, exponent):
    """|weight - code * scale| <= scale / 2 * (1 + 2**-16), as for 8 bits: 7 / (1 - 2**-8) is less than 7.5."""
    rows, groups, length = shape
    weight = (weight_of(seed, (rows, groups * length)) * 2.0**exponent).clamp(-3e4, 3e4).to(dtype)
    codes, scale = quantize(weight, length, "absmax")
    assert int(codes.abs().max()) <= 7
    each = scale.double().repeat_interleave(length, 1)
    assert bool(((weight.double() - codes.double() * each).abs() <= each / 2 * (1 + 2.0**-16)).all())


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 2**31), shape=shapes, dtype=st.sampled_from(FLOATS), exponent=st.integers(-30, 8))
def test_mse_is_never_worse_than_absmax_in_any_group(seed, shape, dtype, exponent):
    """Errors are float64 sums of float32 squares: 2**-20 of them is the most that a tie may turn by."""
    rows, groups, length = shape
    weight = (weight_of(seed, (rows, groups * length)) * 2.0**exponent).clamp(-3e4, 3e4).to(dtype)
    found = {name: group_errors(weight, *quantize(weight, length, name)) for name in formats.WEIGHT_RANGES}
    assert bool((found["mse"] <= found["absmax"] * (1 + 2.0**-20)).all())


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), shape=shapes, dtype=st.sampled_from(FLOATS), name=st.sampled_from(("absmax", "mse")))
def test_what_is_packed_comes_back(seed, shape, dtype, name):
    """Codes through words and back, bit for bit; and a decoded weight divided by its own scale is its code."""
    rows, groups, length = shape
    codes, scale = quantize(weight_of(seed, (rows, groups * length), dtype), length, name)
    packed = formats.pack_int32(codes, 4)
    assert packed.shape == (rows, math.ceil(groups * length / 8))
    assert torch.equal(formats.unpack_int32(packed, 4, groups * length), codes)
    assert torch.equal(reference.unpack(packed, 4, groups * length), codes)
    exact = codes.double() * scale.double().repeat_interleave(length, 1)
    again = (exact.float().view(rows, groups, length) / scale.float().unsqueeze(-1)).round().view(rows, -1)
    assert torch.equal(again.to(torch.int8), codes)


@pytest.mark.parametrize(("length", "outlier", "gain"), [(128, 1, 0.85), (512, 12, 0.6)])
def test_mse_is_close_to_the_best_of_a_dense_search(length, outlier, gain):
    """Within 3 % of the best of 3000 ranges for all rows, as a plain loop finds it, and far better than absmax."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(32, length, generator=generator)
    weight[:, 7] *= outlier
    found = group_errors(weight, *quantize(weight)).flatten()
    absmax = group_errors(weight, *quantize(weight, weight_range="absmax")).flatten()
    best, largest = torch.full((32,), math.inf, dtype=torch.float64), weight.abs().amax(1, keepdim=True)
    for factor in torch.linspace(0.05, 1.05, 3000).tolist():
        scale = largest / 7 * factor
        error = ((weight / scale).round().clamp(-8, 7) * scale - weight).double().square().sum(1)
        best = torch.minimum(best, error)
    assert float(found.sum()) <= 1.03 * float(best.sum())
    assert float(found.sum()) <= gain * float(absmax.sum())


def test_mse_uses_the_code_that_absmax_has_no_use_for():
    """Where the largest magnitude is negative a scale of absmax / 8 makes it -8."""
    weight = torch.tensor([[-8.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]])
    codes, scale = quantize(weight)
    assert float(group_errors(weight, codes, scale)) <= 2.0**-30
    assert codes.tolist() == [[-8, 1, 2, 3, 4, 5, 6, 7]]
    assert scale.item() == pytest.approx(1.0, rel=2**-20)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight_range", formats.WEIGHT_RANGES)
def test_rows_of_zeros_have_scale_one_and_codes_zero(dtype, weight_range):
    weight = weight_of(1, (4, 16), dtype)
    weight[2] = 0
    weight[3, 8:] = 0
    codes, scale = quantize(weight, 8, weight_range)
    assert scale[2].tolist() == [1.0, 1.0]
    assert scale[3, 1].item() == 1.0
    assert not codes[2].any()
    assert not codes[3, 8:].any()


@pytest.mark.parametrize("weight_range", formats.WEIGHT_RANGES)
def test_scales_of_the_smallest_and_largest_weights_are_finite_and_positive(weight_range):
    for dtype in FLOATS:
        info = torch.finfo(dtype)
        weight = torch.tensor([[info.tiny, -info.tiny / 2, 0.0], [info.max, -info.max, info.max / 3]], dtype=dtype)
        codes, scale = quantize(weight, weight_range=weight_range)
        assert bool(((scale >= info.tiny) & scale.isfinite()).all())
        assert bool(formats.dequantize(codes, scale.double()).isfinite().all())


def test_chunks_do_not_show(monkeypatch):
    weight = weight_of(4, (2, 9, 12)).mT.contiguous().mT  # experts, and strides that no reshape can keep
    whole = quantize(weight, 4)
    monkeypatch.setattr(formats, "_CHUNK_ELEMENTS", 30)
    monkeypatch.setattr(ranges, "CHUNK_ELEMENTS", 5)
    for one, other in zip(whole, quantize(weight, 4), strict=True):
        assert torch.equal(one, other)


def test_one_row_and_one_column():
    for shape in ((1, 256), (3, 1), (1, 1)):
        codes, scale = quantize(weight_of(5, shape))
        assert (codes.shape, scale.shape) == (shape, (shape[0], 1))
    codes, _ = quantize(torch.zeros(0, 16))
    assert codes.shape == (0, 16)


@pytest.mark.parametrize("changes", [{"bits": 3}, {"dtype": torch.float8_e4m3fn}, {"granularity": "tensor"}])
def test_what_has_no_four_bits_is_refused(changes):
    with pytest.raises(ValueError, match=r"expected 8, or 4 in torch\.int8 by row"):
        formats.quantize_weight(torch.ones(2, 16), **{"dtype": torch.int8, "bits": 4, **changes})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("group_size", [None, 128])
def test_the_product_is_that_of_the_decoded_weight(dtype, tokens, group_size):
    """Within 2 (K + 2) roundings of float32, and one of the output's dtype, of the sum of magnitudes."""
    weight = weight_of(6, (24, 256), dtype)
    codes, scale = quantize(weight, group_size)
    x, bias = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(7)).to(dtype), weight[:, 0].clone()
    out = ops.linear_weight_only_packed(x, formats.pack_int32(codes, 4), scale, bias, 4)
    exact = reference.linear_weight_only_packed(x, formats.pack_int32(codes, 4), scale, bias, 4)
    size = x.double().abs() @ reference.decoded_weight(codes, scale, dtype).abs().T + bias.double().abs()
    unit = 2 * 258 * 2.0**-24 + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert bool(((out.double() - exact).abs() <= unit * size).all())


MEMORY_PROGRAM = """
import torch
from quantkit_kernels import formats
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
formats.quantize_weight(torch.ones(128, 1024, dtype=torch.bfloat16), torch.int8, 128, "mse", bits=4)
weight = torch.randn(2048, 8192).bfloat16()
before = peak()
formats.quantize_weight(weight, torch.int8, 128, "mse", bits=4)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_search_takes_little_memory_beside_the_result():
    """Codes of 16 MiB, of a weight of 16 million; the float32 copy that made it was 64 and counts before already."""
    done = subprocess.run([sys.executable, "-c", MEMORY_PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) / 1024 <= 16 + 24


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize(("rows", "columns", "groups"), [(16, 32, 1), (80, 128, 4), (1040, 256, 2), (48, 512, 2)])
def test_the_reordered_product_is_that_of_the_exact_weight(rows, columns, groups, tokens, bias):
    """As `cpu_int4.linear` says: 2 * K roundings of float32 of the magnitudes, and one or two of bfloat16."""
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) + 0.01).bfloat16()
    x = torch.randn(2, tokens, columns, generator=generator).bfloat16()
    added = torch.randn(rows, generator=generator) if bias else None
    out = cpu_int4.linear(x, *cpu_int4.repack(codes, scale), added)
    weight = formats.dequantize(codes, scale.double())
    exact, size = x.double() @ weight.t(), x.double().abs() @ weight.t().abs()
    near = columns * 2**-23 * size + 2**-8 * exact.abs()
    if added is not None:
        exact = exact + added.bfloat16().double()
        near = near * (1 + 2**-8) + 2**-8 * exact.abs()
    assert out.dtype == torch.bfloat16
    assert bool(((out.double() - exact).abs() <= near).all())


def test_parts_of_rows_are_reordered_as_the_whole():
    codes = torch.randint(-8, 8, (2 * cpu_int4._PART + 16, 32), dtype=torch.int8)
    whole = torch._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
    assert torch.equal(cpu_int4.repack(codes, torch.ones(len(codes), 1).bfloat16())[0], whole)


@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [
        ((24, 32), 1, torch.bfloat16),
        ((16, 48), 1, torch.bfloat16),
        ((16, 64), 4, torch.bfloat16),
        ((16, 32), 1, torch.float32),
        ((16, 0), 1, torch.bfloat16),
        ((0, 32), 1, torch.bfloat16),
    ],
)
def test_what_the_reordering_kernel_cannot_take(shape, groups, dtype):
    assert cpu_int4.group_size(*shape, torch.ones(shape[0], groups, dtype=dtype)) is None
