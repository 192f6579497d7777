"""Scales of a tensor, a block and a group against loops over numbers, and compressed-tensors."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from quantkit_kernels import formats, reference

INT8 = torch.int8
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZED = (INT8, *FP8)
BLOCK = 128


def random_weight(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return rows and columns of very different sizes, so that another block's scale would show."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight *= torch.logspace(-1, 1, shape[-2]).unsqueeze(-1) * torch.logspace(0.5, -0.5, shape[-1])
    return weight.to(dtype)


def expected_quantized(values: torch.Tensor, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """Return the scale and the codes' values of what shares one scale, with divisions in float64 rounded to float32."""
    qmax = 127.0 if dtype == INT8 else reference.fp8_magnitudes(dtype)[-1]
    numbers = values.double()
    quotient = (numbers.abs().max() / qmax).float()
    scale = max(quotient.to(values.dtype).item(), torch.finfo(values.dtype).tiny) if numbers.any() else 1.0
    codes = [[reference.round_to_code(value, dtype) for value in row] for row in (numbers / scale).float().tolist()]
    return scale, torch.tensor(codes)


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("float_dtype", FLOATS)
def test_tensor_is_the_loop(dtype, float_dtype):
    weight = random_weight(0, (13, 40), float_dtype)
    weight[3] = 0
    for view in (weight, weight.T.contiguous().T, weight.repeat_interleave(2, dim=1)[:, ::2]):
        codes, scale = formats.quantize_weight(view, dtype, granularity="tensor")
        expected_scale, expected_codes = expected_quantized(weight, dtype)
        assert codes.dtype == dtype
        assert codes.is_contiguous()
        assert scale.dtype == float_dtype
        assert scale.tolist() == [expected_scale]
        assert torch.equal(codes.float(), expected_codes)


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize(
    ("shape", "float_dtype"),
    [((128, 128), torch.float32), ((130, 256), torch.bfloat16), ((5, 300), torch.float16), ((257, 3), torch.float32)],
)
def test_block_is_the_loop(monkeypatch, dtype, shape, float_dtype):
    weight = random_weight(1, shape, float_dtype)
    weight[:BLOCK, BLOCK : 2 * BLOCK] = 0  # a block of zeros, where there is one
    tall, wide = (math.ceil(size / BLOCK) for size in shape)
    for view, chunk in ((weight, 1 << 20), (weight.T.contiguous().T, 1)):  # one block column at a time, or all
        monkeypatch.setattr(formats, "_CHUNK_ELEMENTS", chunk)
        codes, scale = formats.quantize_weight(view, dtype, granularity="block")
        assert codes.shape == shape
        assert codes.is_contiguous()
        assert scale.shape == (tall, wide)
        assert scale.dtype == float_dtype
        for n, k in itertools.product(range(tall), range(wide)):
            part = (slice(n * BLOCK, (n + 1) * BLOCK), slice(k * BLOCK, (k + 1) * BLOCK))
            expected_scale, expected_codes = expected_quantized(weight[part], dtype)
            assert scale[n, k].item() == expected_scale
            assert torch.equal(codes[part].float(), expected_codes)


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_mse_is_never_worse_than_absmax_and_no_chunk_shows(monkeypatch, dtype, granularity):
    """Errors are float64 sums of float32 squares: a tie may turn by 2**-20 of itself and no more."""
    weight = torch.randn(260, 300, generator=torch.Generator().manual_seed(2))
    errors = {}
    for weight_range in formats.WEIGHT_RANGES:
        codes, scale = formats.quantize_weight(weight, dtype, None, weight_range, granularity)
        square = (formats.dequantize_weight(codes, scale, granularity) - weight).double().square()
        parts = [square] if granularity == "tensor" else [
            square[n : n + BLOCK, k : k + BLOCK] for n in range(0, 260, BLOCK) for k in range(0, 300, BLOCK)
        ]  # fmt: skip
        errors[weight_range] = torch.stack([part.sum() for part in parts])
    assert (errors["mse"] <= errors["absmax"] * (1 + 2.0**-20)).all()
    if dtype == INT8 or granularity == "block":  # all of a large tensor in fp8 gains next to nothing
        assert (errors["mse"] < errors["absmax"] * 0.98).any()
    monkeypatch.setattr(formats, "_CHUNK_ELEMENTS", 700)
    pieces = formats.quantize_weight(weight, dtype, None, "mse", granularity)
    assert torch.equal(pieces[0].float(), codes.float())
    assert torch.equal(pieces[1], scale)


def test_mse_of_a_tensor_is_close_to_the_best_of_a_dense_search():
    weight = torch.randn(20, 100, generator=torch.Generator().manual_seed(3))
    weight[4, 7] = weight.abs().median() * 30
    codes, scale = formats.quantize_weight(weight, INT8, weight_range="mse", granularity="tensor")
    found = (codes.double() * scale.double() - weight.double()).square().sum().item()
    best = math.inf
    for factor in torch.linspace(0.4, 1.0, 2000).tolist():
        trial = weight.abs().max() / 127 * factor
        value = (weight / trial).clamp(-127, 127).round() * trial
        best = min(best, (value - weight).double().square().sum().item())
    assert found <= best * 1.05


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("granularity", ["tensor", "block"])
@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (0, 0)])
def test_empty_weights(dtype, granularity, shape):
    codes, scale = formats.quantize_weight(torch.zeros(shape), dtype, granularity=granularity)
    assert codes.shape == shape
    assert scale.shape == ((1,) if granularity == "tensor" else tuple(math.ceil(size / BLOCK) for size in shape))
    assert formats.dequantize_weight(codes, scale, granularity).shape == shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": "column"}, "'column': expected one of row, tensor, block"),
        ({"granularity": "block", "group_size": 8}, "groups are parts of a row"),
        ({"granularity": "tensor", "weight": torch.ones(2, 3, 16)}, r"\[2, 3, 16\]: granularity 'tensor' expects"),
        ({"granularity": "tensor", "weight": torch.full((2, 16), -math.inf)}, "NaN or infinity"),
        ({"granularity": "block", "weight": torch.full((2, 16), math.nan)}, "NaN or infinity"),
    ],
)
def test_quantize_weight_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        formats.quantize_weight(**{"weight": torch.ones(2, 16), "dtype": INT8, **changes})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (7, 8), (3, 15)])
def test_one_damaged_number_is_found(bad, place):
    weight = torch.ones(8, 16)
    weight[place] = bad
    for view in (weight, weight.bfloat16(), weight.T.contiguous().T):
        with pytest.raises(ValueError, match="NaN or infinity"):
            formats.quantize_weight(view, INT8)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_experts_are_quantized_as_each_by_itself(dtype):
    weight = random_weight(4, (3, 5, 24))
    for view, group_size in itertools.product((weight, weight.mT.contiguous().mT), (None, 8)):
        codes, scale = formats.quantize_weight(view, dtype, group_size)
        assert codes.is_contiguous()
        for expert in range(3):
            alone_codes, alone_scale = formats.quantize_weight(weight[expert].contiguous(), dtype, group_size)
            assert torch.equal(codes[expert].float(), alone_codes.float())
            assert torch.equal(scale[expert], alone_scale)


MEMORY_PROGRAM = """
import torch
from quantkit_kernels import formats
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
weight = torch.rand(4096, 8192).t()
formats.quantize_weight(weight[:128, :128], torch.int8, granularity={granularity!r})  # what torch itself loads
before = peak()
formats.quantize_weight(weight, torch.int8, granularity={granularity!r})
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("granularity", formats.GRANULARITIES)
def test_quantizing_takes_little_memory_beside_the_result(granularity):
    """A weight of 128 MiB, stored [K, N], and its codes of 32: the rest may take half of what a copy would."""
    program = MEMORY_PROGRAM.format(granularity=granularity)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) / 1024 <= 32 + 64


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("float_dtype", FLOATS)
@pytest.mark.parametrize("granularity", ["row", "tensor", "block"])
@pytest.mark.parametrize("shape", [(128, 256), (300, 130), (7, 5)])
def test_dequantize_weight_rounds_each_product_once(dtype, float_dtype, granularity, shape):
    weight = random_weight(5, shape, float_dtype)
    codes, scale = formats.quantize_weight(weight, dtype, granularity=granularity)
    rows, columns = (torch.arange(size) for size in shape)
    each = {
        "row": lambda: scale.expand(shape),
        "tensor": lambda: scale.expand(shape),
        "block": lambda: scale[rows // BLOCK][:, columns // BLOCK],
    }[granularity]()
    expected = (codes.double() * each.double()).to(float_dtype)
    for view in (codes, codes.T.contiguous().T):
        ours = formats.dequantize_weight(view, scale, granularity)
        assert ours.dtype == float_dtype
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("float_dtype", FLOATS)
@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_dequantize_weight_is_compressed_tensors_bit_for_bit(dtype, float_dtype, granularity):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    kind = "int" if dtype == INT8 else "float"
    structure = [BLOCK, BLOCK] if granularity == "block" else None
    args = QuantizationArgs(num_bits=8, type=kind, strategy=granularity, block_structure=structure, symmetric=True)
    codes, scale = formats.quantize_weight(random_weight(6, (200, 384), float_dtype), dtype, granularity=granularity)
    theirs = dequantize(codes, scale, args=args)
    assert torch.equal(formats.dequantize_weight(codes, scale, granularity), theirs)


@pytest.mark.parametrize(
    ("granularity", "shape", "message"),
    [
        ("column", (1,), "'column': expected one of row, tensor, block"),
        ("tensor", (1, 1), r"scale is \[1, 1\] for codes \[130, 256\]: granularity 'tensor' makes it \[1\]"),
        ("block", (1, 2), r"makes it \[2, 2\]"),
        ("row", (130, 3), "3 scales a row do not divide the 256"),
    ],
)
def test_dequantize_weight_refuses(granularity, shape, message):
    with pytest.raises(ValueError, match=message):
        formats.dequantize_weight(torch.zeros(130, 256, dtype=INT8), torch.ones(shape), granularity)


def views(x: torch.Tensor) -> list[torch.Tensor]:
    return [x, x.mT.contiguous().mT, torch.cat([x, x]).repeat_interleave(2, dim=1)[: len(x), ::2]]


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("float_dtype", FLOATS)
def test_quantize_per_group_is_the_loop(dtype, float_dtype):
    x = random_weight(7, (4, 48), float_dtype)
    x[2, 16:32] = 0
    for view in views(x):
        codes, scale = formats.quantize_per_group(view, dtype, 16)
        expected_codes, expected_scale = reference.quantize_per_group(x, dtype, 16)
        assert scale.dtype == torch.float32
        assert codes.is_contiguous()
        assert torch.equal(scale.double(), expected_scale)
        assert torch.equal(codes.double(), expected_codes)
    assert scale[2, 1].item() == 1.0


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("float_dtype", FLOATS)
@pytest.mark.parametrize("given", [None, 0.003, 1.0, 1e4])
def test_quantize_per_tensor_is_the_loop(dtype, float_dtype, given):
    """With a scale of 0.003 most numbers saturate, with 1e4 most are zero."""
    x = random_weight(8, (5, 30), float_dtype)
    x[1] = 0
    given_scale = None if given is None else torch.tensor([given]).to(float_dtype)
    expected_codes, expected_scale = reference.quantize_per_tensor(
        x, dtype, None if given_scale is None else given_scale.float().item()
    )
    for view in views(x):
        codes, scale = formats.quantize_per_tensor(view, dtype, given_scale)
        assert scale.dtype == torch.float32
        assert codes.is_contiguous()
        assert scale.tolist() == [expected_scale]
        assert torch.equal(codes.double(), expected_codes)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_numbers_beyond_a_given_scale_saturate(dtype):
    codes, scale = formats.quantize_per_tensor(torch.tensor([[1e30, -math.inf, 3.0]]), dtype, torch.ones(1))
    assert codes.float().tolist() == [[formats.QMAX[dtype], -formats.QMAX[dtype], 3.0]]
    assert scale.tolist() == [1.0]


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("given", [None, torch.ones(1)])
def test_nan_shows(dtype, given):
    codes, scale = formats.quantize_per_tensor(torch.tensor([[1.0, math.nan, 3.0]]), dtype, given)
    assert (codes.float() * scale).isnan()[0, 1]


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_activations_of_nothing(dtype):
    for shape in ((0, 128), (3, 0), (0, 0)):
        codes, scale = formats.quantize_per_tensor(torch.zeros(shape), dtype)
        assert codes.shape == shape
        assert scale.tolist() == [1.0]
        codes, scale = formats.quantize_per_tensor(torch.zeros(shape), dtype, torch.full((1,), 0.5))
        assert scale.tolist() == [0.5]
        codes, scale = formats.quantize_per_group(torch.zeros(shape), dtype)
        assert codes.shape == shape
        assert scale.shape == (shape[0], shape[1] // 128)
    codes, scale = formats.quantize_per_tensor(torch.zeros(2, 3), dtype)
    assert scale.tolist() == [1.0]
    assert not codes.float().any()


def test_quantizers_of_activations_refuse():
    x = torch.ones(2, 16)
    with pytest.raises(ValueError, match="group_size 5 does not divide the 16"):
        formats.quantize_per_group(x, INT8, 5)
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        formats.quantize_per_group(x, torch.uint8, 8)
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        formats.quantize_per_tensor(x, torch.uint8)
    with pytest.raises(ValueError, match=r"scale is torch.float32 \[1, 1\]: expected float \[1\]"):
        formats.quantize_per_tensor(x, INT8, torch.ones(1, 1))
