"""linear_tensor, linear_block and linear_llm_int8 against float64 with derived bounds, element by element."""

import math

import pytest
import torch
from quantkit_kernels import cpu, formats, generic, ops, reference

INT8 = torch.int8
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
QUANTIZED = (INT8, *FP8)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
U32 = 2.0**-24
SIZES = [(0, 13, 70), (1, 1, 1), (3, 40, 17), (17, 13, 70), (64, 9, 33)]  # M, N, K


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return negative and positive rows that differ in size, with outliers, one row in seven zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x[torch.rand(shape, generator=generator) < 0.03] *= 20.0
    x *= 0.05 + 3 * torch.rand((*shape[:-1], 1), generator=generator)
    x.view(-1, shape[-1])[3::7] = 0
    return x.to(dtype)


def within(out: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor, terms: int) -> None:
    """Assert that `out` is right to `terms` roundings in float32 of the sum of magnitudes, then one to its dtype."""
    assert out.shape == expected.shape
    float32_error = 1.01 * terms * U32 * magnitude
    rounding = torch.finfo(out.dtype).eps / 2 * (expected.abs() + float32_error) + torch.finfo(out.dtype).tiny
    bound = float32_error + rounding
    error = (out.double() - expected).abs()
    worst = (error / bound).nan_to_num(math.inf).amax().item() if out.numel() else 0.0
    assert (error <= bound).all(), f"the worst error is {worst:.3g} of its bound"
    if expected.count_nonzero():  # the bound says something: it is far below the size of what is compared
        assert bound.mean() < 0.1 * expected.abs().mean()


def magnitude_of(product, x, weight, weight_scale, bias, codes, scale):
    """Return the sum of the absolute terms of a scaled product, bias included, in float64."""
    size = reference.scaled_mm(codes.abs(), weight.double().abs(), scale, weight_scale, None)
    return size if bias is None else size + bias.double().abs()


@pytest.fixture(params=["cpu", "cpu without VNNI", "generic"])
def way(request, monkeypatch):
    """Run the test on each implementation that the CPU has."""
    if request.param == "cpu" and not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has no VNNI")
    if request.param == "cpu without VNNI":
        monkeypatch.setattr(cpu, "has_exact_int_mm", lambda: False)
    if request.param == "generic":
        for name in ("scaled_mm", "linear_dynamic", "linear_tensor", "linear_llm_int8"):
            monkeypatch.setattr(cpu, name, getattr(generic, name))
    return request.param


def tensor_magnitude(x, weight, weight_scale, input_scale, bias):
    codes, scale = reference.quantize_per_tensor(
        x.reshape(math.prod(x.shape[:-1]), x.shape[-1]),
        weight.dtype,
        None if input_scale is None else input_scale.item(),
    )
    size = (codes.abs() @ weight.double().abs().T) * scale * weight_scale.double().view(1, -1)
    size = size.view(*x.shape[:-1], weight.shape[0])
    return size if bias is None else size + bias.double().abs()


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("given", [None, 0.02, 3.0])
@pytest.mark.parametrize("size", SIZES)
def test_linear_tensor(way, dtype, x_dtype, given, size):
    """Int8: the integer product is exact, so four roundings. Fp8 adds K of them for a float32 sum in any order.

    With a scale of 0.02 most int8 codes of x saturate, with 3.0 most are zero.
    """
    tokens, out_features, in_features = size
    x, bias = random(0, tokens, in_features, dtype=x_dtype), random(1, 1, out_features, dtype=x_dtype)[0]
    granularity = "tensor" if tokens % 2 else "row"
    codes, scale = formats.quantize_weight(random(2, out_features, in_features), dtype, granularity=granularity)
    input_scale = None if given is None else torch.tensor([given])
    for some_bias in (bias, None):
        out = ops.linear_tensor(x, codes, scale, input_scale, some_bias)
        assert out.dtype == x_dtype
        expected = reference.linear_tensor(x, codes, scale, input_scale, some_bias)
        terms = 4 if dtype == INT8 else 4 + in_features
        within(out, expected, tensor_magnitude(x, codes, scale, input_scale, some_bias), terms)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_one_scale_a_token_and_one_for_all_agree_on_one_token(dtype):
    """On one token the two quantizers are one, so the ops give the same bits."""
    x, (codes, scale) = random(3, 1, 70), formats.quantize_weight(random(4, 13, 70), dtype)
    by_token = ops.linear_dynamic(x, codes, scale, None)
    assert torch.equal(ops.linear_tensor(x, codes, scale, None, None), by_token)
    absmax = formats.quantize_per_token(x, dtype)[1].view(1)
    assert torch.equal(ops.linear_tensor(x, codes, scale, absmax, None), by_token)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_one_scale_of_the_weight_is_the_same_scale_for_every_row(dtype):
    x, (codes, scale) = random(5, 6, 70), formats.quantize_weight(random(6, 13, 70), dtype, granularity="tensor")
    out = ops.linear_tensor(x, codes, scale, None, None)
    assert torch.equal(out, ops.linear_tensor(x, codes, scale.expand(13, 1), None, None))


def test_a_static_scale_in_any_float_dtype_is_its_float32_number():
    x, (codes, scale) = random(7, 6, 70), formats.quantize_weight(random(8, 13, 70), INT8)
    given = torch.tensor([0.0371], dtype=torch.bfloat16)
    out = ops.linear_tensor(x, codes, scale, given, None)
    assert torch.equal(out, ops.linear_tensor(x, codes, scale, given.float(), None))


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("given", [None, torch.ones(1)])
def test_linear_tensor_does_not_hide_nan(dtype, given):
    x, (codes, scale) = random(9, 4, 70), formats.quantize_weight(random(10, 13, 70), dtype)
    x[1, 2] = math.nan
    assert ops.linear_tensor(x, codes, scale, given, None)[1].isnan().all()


BLOCK_SIZES = [(0, 13, 128), (1, 1, 128), (3, 200, 256), (17, 128, 128), (64, 130, 128)]  # M, N, K


def block_magnitude(x, weight, weight_scale, bias):
    codes, scales = reference.quantize_per_group(x, weight.dtype, 128)
    values = codes.abs() * scales.repeat_interleave(128, dim=1)
    rows = weight_scale.double().repeat_interleave(128, dim=0)[: weight.shape[0]].repeat_interleave(128, dim=1)
    size = values @ (weight.double().abs() * rows).T
    return size if bias is None else size + bias.double().abs()


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_linear_block(dtype, x_dtype, size):
    """Products of fp8 codes are exact in float32. A block's sum: 127 roundings in any order; its scales: two; the sum
    over blocks and the bias: K / 128 at most. The bound of the contract is one more."""
    tokens, out_features, in_features = size
    x, bias = random(11, tokens, in_features, dtype=x_dtype), random(12, 1, out_features, dtype=x_dtype)[0]
    weight = random(13, out_features, in_features, dtype=x_dtype)
    codes, scale = formats.quantize_weight(weight, dtype, granularity="block")
    for some_bias in (bias, None):
        out = ops.linear_block(x, codes, scale, some_bias)
        assert out.dtype == x_dtype
        expected = reference.linear_block(x, codes, scale, some_bias)
        within(out, expected, block_magnitude(x, codes, scale, some_bias), 130 + in_features // 128)


def test_linear_block_of_one_group_is_linear_dynamic_on_it():
    """One group a token and one block of weights: the quantizers are those of a token and of the whole weight."""
    x, (codes, scale) = random(14, 5, 128), formats.quantize_weight(random(15, 13, 128), FP8[0], granularity="block")
    out = ops.linear_block(x, codes, scale, None)
    expected = reference.linear_dynamic(x, codes, scale.expand(13, 1), None)
    within(out, expected, block_magnitude(x, codes, scale, None), 131)


def llm_int8_magnitude(x, weight, weight_scale, bias, threshold):
    """Return the sum of absolute terms: float products of outlier columns, scaled codes of the others, bias."""
    outlier = (x.double().abs() >= threshold).any(dim=0)
    values = x.double()
    codes, scale = reference.quantize_per_token(x.float().masked_fill(outlier, 0), INT8)
    values = values.abs() * outlier
    size = (
        values @ weight.double().abs().T + (codes.abs() @ weight.double().abs().T) * scale
    ) * weight_scale.double().T
    return size if bias is None else size + bias.double().abs()


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("threshold", [1e-6, 0.5, 6.0, 1e6])
@pytest.mark.parametrize("size", SIZES)
def test_linear_llm_int8(way, x_dtype, threshold, size):
    """The integers are exact. Three roundings for their scales; the decoded weight's rounding and K more for float sums
    in any order; two for adding both and the bias. The smallest threshold makes all columns outliers (but those of
    zeros), the largest none."""
    tokens, out_features, in_features = size
    x, bias = random(16, tokens, in_features, dtype=x_dtype), random(17, 1, out_features, dtype=x_dtype)[0]
    codes, scale = formats.quantize_weight(random(18, out_features, in_features), INT8)
    for some_bias in (bias, None):
        out = ops.linear_llm_int8(x, codes, scale, some_bias, threshold)
        assert out.dtype == x_dtype
        expected = reference.linear_llm_int8(x, codes, scale, some_bias, threshold)
        within(out, expected, llm_int8_magnitude(x, codes, scale, some_bias, threshold), in_features + 6)


@pytest.mark.parametrize("x_dtype", FLOATS)
def test_without_outliers_it_is_linear_dynamic(way, x_dtype):
    x, bias = random(19, 17, 70, dtype=x_dtype).clamp(-5.9, 5.9), random(20, 1, 13)[0]
    codes, scale = formats.quantize_weight(random(21, 13, 70), INT8)
    for some_bias in (bias, None):
        out = ops.linear_llm_int8(x, codes, scale, some_bias, 6.0)
        assert torch.equal(out, ops.linear_dynamic(x, codes, scale, some_bias))


def test_outliers_keep_what_int8_loses(way):
    """One feature a thousand times larger than the rest: int8 alone rounds the rest away, LLM.int8 doesn't."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(22))
    x[:, 5] = 1000.0
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(23))
    codes, scale = formats.quantize_weight(weight, INT8)
    exact = x.double() @ formats.dequantize(codes, scale).double().T
    rest = exact - x[:, 5:6].double() @ formats.dequantize(codes, scale)[:, 5:6].double().T
    mixed = (ops.linear_llm_int8(x, codes, scale, None, 6.0).double() - exact).norm() / rest.norm()
    plain = (ops.linear_dynamic(x, codes, scale, None).double() - exact).norm() / rest.norm()
    assert mixed < 0.01
    assert plain > 0.5


@pytest.mark.parametrize("beside", [0.0, 50.0])
def test_a_number_on_the_threshold_is_an_outlier_and_the_next_below_is_not(way, beside):
    """Compared in float32: numbers around a threshold that bfloat16 cannot hold, alone or beside an outlier."""
    codes, scale = formats.quantize_weight(torch.ones(1, 3), INT8)
    for dtype, threshold in ((torch.float32, 6.1), (torch.bfloat16, 6.1), (torch.bfloat16, 6.0), (torch.float16, 6.0)):
        number = torch.tensor(threshold).to(dtype)
        for near in (number, torch.nextafter(number, torch.tensor(0, dtype=dtype)), number + 0.04):
            x = torch.tensor([[near, 0.0301, beside]]).to(dtype)
            kept = x.float() >= torch.tensor(threshold)
            assert bool(kept[0, 2]) == (beside > 0)
            expected = ops.linear_dynamic(x.float() * ~kept, codes, scale, None) + (x.float() * kept).sum()
            out = ops.linear_llm_int8(x.float(), codes, scale, None, threshold)
            assert (out - expected).abs() <= 6 * U32 * expected.abs()
            assert ops.linear_llm_int8(x, codes, scale, None, threshold).item() == out.to(dtype).item()


def test_damage_stays_in_its_token_and_hides_no_outlier(way):
    """NaN is no outlier and shows in its token; the other tokens are what they are without it."""
    x = random(24, 6, 70)
    x[0], x[4] = x[1], x[2]
    x[2, 9] = 50.0
    codes, scale = formats.quantize_weight(random(25, 13, 70), INT8)
    clean = ops.linear_llm_int8(x, codes, scale, None, 6.0)
    x[0, 9] = math.nan
    out = ops.linear_llm_int8(x, codes, scale, None, 6.0)
    assert out[0].isnan().all()
    assert torch.equal(out[1:], clean[1:])
    x[0, 9] = math.inf
    assert not ops.linear_llm_int8(x, codes, scale, None, 6.0)[0].isfinite().any()


def all_outliers(tokens: int) -> torch.Tensor:
    return random(26, tokens, 70).abs() + 7.0


def test_all_columns_outliers(way):
    x, bias = all_outliers(5), random(27, 1, 13)[0]
    codes, scale = formats.quantize_weight(random(28, 13, 70), INT8)
    out = ops.linear_llm_int8(x, codes, scale, bias, 6.0)
    exact = x.double() @ (codes.double() * scale.double()).T + bias.double()
    within(out, exact, llm_int8_magnitude(x, codes, scale, bias, 6.0), 76)


def test_generic_does_not_wait_for_the_device():
    """On meta tensors nothing can be asked of numbers: the generic code runs through."""
    x = torch.empty(5, 256, device="meta", dtype=torch.bfloat16)
    codes, scale = torch.empty(13, 256, device="meta", dtype=INT8), torch.empty(13, 1, device="meta")
    assert generic.linear_llm_int8(x, codes, scale, None, 6.0).shape == (5, 13)
    fp8 = torch.empty(13, 256, device="meta", dtype=FP8[0])
    assert generic.linear_block(x, fp8, torch.empty(1, 2, device="meta"), None).shape == (5, 13)
    for input_scale in (None, torch.empty(1, device="meta")):
        assert generic.linear_tensor(x, codes, scale, input_scale, None).shape == (5, 13)


def test_bitsandbytes_finds_the_same_outlier_columns():
    """Its scales differ: it leaves only the outliers themselves out of a token's range, not all of their columns."""
    functional = pytest.importorskip("bitsandbytes.functional")
    x = random(29, 33, 64).clamp(-30, 30).half()
    x[7, 11] = 6.0
    _, _, their_columns = functional.int8_vectorwise_quant(x, threshold=6.0)
    columns = cpu._outlier_columns(x, 6.0)
    assert columns is not None
    assert 11 in columns.tolist()
    assert columns.tolist() == their_columns.tolist()
