"""Number formats against independent arithmetic: loops over numbers, and compressed-tensors."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantkit_kernels import formats, reference

INT8 = torch.int8
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZED = (INT8, *FP8)


def random_weight(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return rows of very different sizes with a few outliers, so that one scale for all would show."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) < 0.02] *= 8.0
    weight *= torch.logspace(-1, 1, shape[-2]).unsqueeze(-1)
    return weight.to(dtype)


def expected_quantized(row: list[float], dtype: torch.dtype, float_dtype: torch.dtype) -> tuple[float, list[float]]:
    """Return scale and code values of one row of nonzero numbers, with divisions in float64 rounded to float32."""
    qmax = 127.0 if dtype == INT8 else reference.fp8_magnitudes(dtype)[-1]
    quotient = torch.tensor(max(map(abs, row)) / qmax, dtype=torch.float64).float()
    scale = max(quotient.to(float_dtype).item(), torch.finfo(float_dtype).tiny)
    scaled = (torch.tensor(row, dtype=torch.float64) / scale).float().tolist()
    return scale, [reference.round_to_code(value, dtype) for value in scaled]


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("float_dtype", FLOATS)
@pytest.mark.parametrize("group_size", [None, 8])
def test_codes_and_scales_are_those_of_the_loop(dtype, float_dtype, group_size):
    weight = random_weight(0, (5, 24), float_dtype)
    codes, scale = formats.quantize_weight(weight, dtype, group_size)
    length = group_size or 24
    assert codes.dtype == dtype
    assert scale.dtype == float_dtype
    assert codes.shape == (5, 24)
    assert scale.shape == (5, 24 // length)
    for n in range(5):
        for group in range(24 // length):
            part = slice(group * length, (group + 1) * length)
            expected_scale, expected_codes = expected_quantized(weight[n, part].tolist(), dtype, float_dtype)
            assert scale[n, group].item() == expected_scale
            assert codes[n, part].float().tolist() == expected_codes


def test_int8_ties_round_to_even():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127.0]])
    codes, scale = formats.quantize_weight(weight, INT8)
    assert scale.item() == 1.0
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, 126, -127]]


@pytest.mark.parametrize("dtype", FP8)
def test_fp8_rounds_to_the_nearest_even_code_around_every_code(dtype):
    """Each number halfway between two neighbouring codes, one float32 step to both sides, and each code itself."""
    magnitudes = reference.fp8_magnitudes(dtype)
    assert len(magnitudes) == (127 if dtype == torch.float8_e4m3fn else 124)
    values = list(magnitudes)
    for low, high in pairwise(magnitudes):
        middle = torch.tensor((low + high) / 2)
        values += [middle.item()]
        values += [torch.nextafter(middle, torch.tensor(end)).item() for end in (low, high)]
    values += [-value for value in values]
    expected = torch.tensor([reference.round_to_code(value, dtype) for value in values])
    # the largest code in the row makes its scale exactly 1
    row = torch.tensor([[magnitudes[-1], *values]])
    codes, scale = formats.quantize_weight(row, dtype)
    assert scale.item() == 1.0
    assert torch.equal(codes.float()[0, 1:], expected)
    per_token, token_scale = formats.quantize_per_token(row, dtype)
    assert token_scale.item() == 1.0
    assert torch.equal(per_token.float()[0, 1:], expected)


@pytest.mark.parametrize("dtype", FP8)
def test_fp8_saturates_where_the_scale_was_rounded_down(dtype):
    """Bfloat16 scales fall up to 2**-8 short, so weight / scale exceeds the largest code: it must not become NaN."""
    weight = torch.linspace(1.0, 2.0, 300).unsqueeze(1).expand(300, 4).contiguous().bfloat16()
    codes, scale = formats.quantize_weight(weight, dtype)
    assert (weight.float() / scale.float() > formats.QMAX[dtype]).any()
    assert torch.isfinite(codes.float()).all()
    far = formats._encode(torch.tensor([[1e6, -1e30, 3.0]]), torch.ones(1, 1), dtype)
    assert far.float().tolist() == [[formats.QMAX[dtype], -formats.QMAX[dtype], 3.0]]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(1, 6), groups=st.integers(1, 3), length=st.integers(1, 40),
    dtype=st.sampled_from(FLOATS), exponent=st.integers(-14, 8),
)  # fmt: skip
def test_int8_error_is_at_most_half_a_scale(seed, rows, groups, length, dtype, exponent):
    """|weight - code * scale| <= scale / 2 * (1 + 2**-16): rounding, and 127 * 2**-24 from the float32 division.

    float16 and bfloat16 scales may be rounded down by 2**-8 at most, and 127 / (1 - 2**-8) < 127.5: clamping to 127
    stays within the same bound. The second bound adds `dequantize`'s rounding of the product.
    """
    weight = (random_weight(seed, (rows, groups * length)) * 2.0**exponent).clamp(-3e4, 3e4).to(dtype)
    codes, scale = formats.quantize_weight(weight, INT8, length)
    per_element = scale.double().repeat_interleave(length, dim=1)
    bound = per_element / 2 * (1 + 2.0**-16)
    exact = codes.double() * per_element
    assert ((weight.double() - exact).abs() <= bound).all()
    rounding = exact.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal * 2.0**-10
    error = (weight.double() - formats.dequantize(codes, scale).double()).abs()
    assert (error <= bound + rounding).all()


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("float_dtype", FLOATS)
@pytest.mark.parametrize("weight_range", formats.WEIGHT_RANGES)
def test_rows_of_zeros_have_scale_one_and_codes_zero(dtype, float_dtype, weight_range):
    weight = random_weight(1, (4, 16), float_dtype)
    weight[2] = 0
    weight[3, 8:] = 0
    codes, scale = formats.quantize_weight(weight, dtype, 8, weight_range)
    assert scale[2].tolist() == [1.0, 1.0]
    assert scale[3, 1].item() == 1.0
    assert scale[3, 0].item() != 1.0
    assert not codes[2].float().any()
    assert not codes[3, 8:].float().any()


@pytest.mark.parametrize("weight_range", formats.WEIGHT_RANGES)
@pytest.mark.parametrize("dtype", QUANTIZED)
def test_float16_scales_never_underflow(dtype, weight_range):
    weight = torch.tensor([[6e-8, -6e-8, 3e-7, 0.0], [1e-3, -2e-3, 5e-4, 1e-4]], dtype=torch.float16)
    codes, scale = formats.quantize_weight(weight, dtype, weight_range=weight_range)
    assert (scale >= torch.finfo(torch.float16).tiny).all()
    decoded = formats.dequantize(codes, scale)
    assert torch.isfinite(decoded).all()
    bound = scale.double() / 2 if dtype == INT8 else weight.double().abs() / 8 + scale.double() * 2.0**-10
    assert ((decoded.double() - weight.double()).abs() <= bound * (1 + 2.0**-10)).all()


def row_error(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, length: int) -> torch.Tensor:
    difference = formats.dequantize(codes, scale).double() - weight.double()
    return difference.square().reshape(-1, length).sum(dim=1)


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("float_dtype", FLOATS)
@pytest.mark.parametrize("group_size", [None, 16])
def test_mse_is_never_worse_than_absmax_in_any_row_and_better_in_some(dtype, float_dtype, group_size):
    """Errors are float64 sums of float32 squares, so a tie may turn by 2**-20 of itself and no more.

    Int8 gains little, and only where a row is long enough for its many small errors to outweigh its clipped maximum.
    """
    weight = torch.randn((24, 1024), generator=torch.Generator().manual_seed(2)).to(float_dtype)
    errors = {}
    for weight_range in formats.WEIGHT_RANGES:
        codes, scale = formats.quantize_weight(weight, dtype, group_size, weight_range)
        errors[weight_range] = row_error(weight, codes, scale, group_size or 1024)
    assert (errors["mse"] <= errors["absmax"] * (1 + 2.0**-20)).all()
    if dtype != INT8 or group_size is None:
        assert (errors["mse"] < errors["absmax"] * 0.98).sum() >= 6


@pytest.mark.parametrize(("dtype", "low", "high"), [(INT8, 0.4, 1.0), (torch.float8_e4m3fn, 0.71, 1.41)])
def test_mse_is_close_to_the_best_of_a_dense_search(dtype, low, high):
    """A row of many small weights and one 30 times larger: the best of 2000 ranges, with the paper's plain loop."""
    weight = random_weight(3, (1, 512))
    weight[0, 7] = weight.abs().median() * 30
    codes, scale = formats.quantize_weight(weight, dtype, weight_range="mse")
    found = row_error(weight, codes, scale, 512).item()
    qmax, best = formats.QMAX[dtype], math.inf
    for factor in torch.linspace(low, high, 2000).tolist():
        trial = weight.abs().max() / qmax * factor
        scaled = (weight / trial).clamp(-qmax, qmax)
        value = (scaled.round() if dtype == INT8 else scaled.to(dtype).float()) * trial
        best = min(best, (value - weight).double().square().sum().item())
    assert found <= best * 1.05


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_chunks_do_not_show(monkeypatch, dtype):
    weight = random_weight(4, (2, 9, 12)).mT.contiguous().mT  # experts, and strides that no reshape can keep
    whole = formats.quantize_weight(weight, dtype, 4, "mse")
    monkeypatch.setattr(formats, "_CHUNK_ELEMENTS", 10)
    pieces = formats.quantize_weight(weight, dtype, 4, "mse")
    assert whole[0].shape == (2, 9, 12)
    assert whole[1].shape == (2, 9, 3)
    for one, other in zip(whole, pieces, strict=True):
        assert torch.equal(one.float(), other.float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 5}, "group_size 5 does not divide the 16"),
        ({"group_size": 0}, "group_size 0"),
        ({"dtype": torch.uint8}, "cannot quantize to torch.uint8"),
        ({"weight_range": "best"}, "'best': expected one of absmax, mse"),
        ({"weight": torch.full((2, 16), math.inf)}, "NaN or infinity"),
        ({"weight": torch.full((2, 16), math.nan)}, "NaN or infinity"),
        ({"weight": torch.ones(16)}, "expected .* N, K"),
        ({"weight": torch.ones(2, 16, dtype=torch.float64)}, "torch.float64"),
    ],
)
def test_quantize_weight_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        formats.quantize_weight(**{"weight": torch.ones(2, 16), "dtype": INT8, **changes})


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("shape", [(0, 16), (4, 0)])
def test_empty_weights(dtype, shape):
    codes, scale = formats.quantize_weight(torch.zeros(shape), dtype)
    assert codes.shape == shape
    assert scale.shape == (shape[0], 1)
    assert formats.dequantize(codes, scale).shape == shape


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("float_dtype", FLOATS)
@pytest.mark.parametrize("strategy", ["channel", "group"])
def test_dequantize_is_compressed_tensors_dequantize_bit_for_bit(dtype, float_dtype, strategy):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    kind = "int" if dtype == INT8 else "float"
    group_size = 16 if strategy == "group" else None
    args = QuantizationArgs(num_bits=8, type=kind, strategy=strategy, group_size=group_size, symmetric=True)
    codes, scale = formats.quantize_weight(random_weight(5, (7, 48), float_dtype), dtype, group_size)
    theirs = dequantize(codes, scale, args=args)
    ours = formats.dequantize(codes, scale)
    assert ours.dtype == theirs.dtype == float_dtype
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("float_dtype", [*FLOATS, torch.float64])
def test_decode_is_torch_conversion_for_every_byte(dtype, float_dtype):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).view(16, 16)
    for view in (codes, codes.T, codes[:, ::3]):
        ours, theirs = formats.decode(view, float_dtype), view.to(float_dtype)
        assert ours.dtype == float_dtype
        assert torch.equal(ours.isnan(), theirs.isnan())
        number = ~theirs.isnan()
        assert torch.equal(ours[number], theirs[number])
        assert torch.equal(ours[number].signbit(), theirs[number].signbit())  # 0 and -0


def test_dequantize_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="3 scales a row do not divide the 8"):
        formats.dequantize(torch.zeros(2, 8, dtype=INT8), torch.ones(2, 3))


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("float_dtype", FLOATS)
def test_quantize_per_token_is_the_loop(dtype, float_dtype):
    x = random_weight(6, (6, 30), float_dtype)
    x[3] = 0
    x[4] = x[4] * 1e-4
    for view in (x, x.mT.contiguous().mT, torch.cat([x, x], dim=1)[:, ::2]):
        codes, scale = formats.quantize_per_token(view, dtype)
        expected_codes, expected_scale = reference.quantize_per_token(view, dtype)
        assert scale.dtype == torch.float32
        assert codes.is_contiguous()
        assert torch.equal(scale.double(), expected_scale)
        assert torch.equal(codes.double(), expected_codes)
    assert scale[3].item() == 1.0


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_quantize_per_token_of_nothing(dtype):
    for shape in ((0, 8), (3, 0), (0, 0)):
        codes, scale = formats.quantize_per_token(torch.zeros(shape), dtype)
        assert codes.shape == shape
        assert torch.equal(scale, torch.ones(shape[0], 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", QUANTIZED)
def test_a_damaged_token_shows_in_its_scale_and_in_no_other(dtype, bad):
    x = random_weight(7, (3, 8))
    clean = formats.quantize_per_token(x, dtype)
    x[1, 2] = bad
    codes, scale = formats.quantize_per_token(x, dtype)
    assert not torch.isfinite(scale[1]).any()
    assert torch.equal(scale[[0, 2]], clean[1][[0, 2]])
    assert torch.equal(codes[[0, 2]].float(), clean[0][[0, 2]].float())


packable = st.integers(1, 8).flatmap(
    lambda bits: st.tuples(
        st.just(bits),
        st.integers(0, 3),
        st.integers(0, 70).flatmap(
            lambda width: st.lists(
                st.integers(-(1 << (bits - 1)), (1 << (bits - 1)) - 1), min_size=width, max_size=width
            )
        ),
    )
)


@settings(deadline=None, max_examples=150)
@given(packable)
def test_unpack_of_pack_is_the_same(drawn):
    bits, rows, row = drawn
    codes = torch.tensor([row] * rows, dtype=INT8).reshape(rows, len(row))
    packed = formats.pack_int32(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, math.ceil(len(row) * bits / 32))
    assert torch.equal(formats.unpack_int32(packed, bits, len(row)), codes)
    assert torch.equal(reference.unpack(packed, bits, len(row)), codes)
    used = len(row) * bits % 32
    if rows and used:  # what is left of a row's last word is zero
        assert (packed[:, -1].to(torch.int64) & 0xFFFFFFFF).max().item() < 1 << used


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_and_unpack_are_compressed_tensors(bits):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    generator = torch.Generator().manual_seed(bits)
    for width in (1, 5, 31, 32, 33, 64, 100):
        codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (3, width), generator=generator, dtype=INT8)
        packed = formats.pack_int32(codes, bits)
        assert torch.equal(packed, pack_to_int32(codes, bits))
        assert torch.equal(formats.unpack_int32(packed, bits, width), unpack_from_int32(packed, bits, codes.shape))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_pack_takes_experts_and_any_strides(bits):
    limit = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-limit, limit, (2, 40, 3), generator=generator, dtype=INT8).mT
    packed = formats.pack_int32(codes, bits)
    assert packed.shape == (2, 3, math.ceil(40 * bits / 32))
    assert torch.equal(formats.unpack_int32(packed, bits, 40), codes)
    spread = packed.mT.contiguous().mT
    assert torch.equal(formats.unpack_int32(spread, bits, 40), codes)


def test_pack_and_unpack_refuse():
    codes = torch.full((2, 8), 7, dtype=INT8)
    for bits in (0, 9):
        with pytest.raises(ValueError, match="expected 1 to 8"):
            formats.pack_int32(codes, bits)
    with pytest.raises(ValueError, match="do not fit 3 bits"):
        formats.pack_int32(codes, 3)
    with pytest.raises(ValueError, match=r"torch\.int8"):
        formats.pack_int32(codes.int(), 4)
    with pytest.raises(ValueError, match="with 2 for 9 in features of 4 bits"):
        formats.unpack_int32(formats.pack_int32(codes, 4), 4, 9)
