"""Program: the quantization kernels in Triton's interpreter, on CPU tensors, against `formats` and float64.

Run by test_quantization_kernels.py in a process of its own with TRITON_INTERPRET=1. Prints how many cases were right.
"""

import itertools
import math
import warnings

import torch
from quantkit_kernels import formats, generic, ops, reference
from quantkit_kernels.gpu import quantization

DTYPES = tuple(formats.QMAX)
U32 = 2.0**-24


def same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], what: object) -> None:
    """Raise AssertionError unless codes and scales have the same bits; NaN scales are alike, and their int8 codes 0."""
    codes, scale = found
    assert codes.dtype == expected[0].dtype, what
    assert codes.is_contiguous(), what
    assert torch.equal(scale, expected[1]) or torch.equal(scale.nan_to_num(), expected[1].nan_to_num()), what
    assert torch.equal(scale.isnan(), expected[1].isnan()), what
    if codes.dtype == torch.int8:
        assert torch.equal(codes, expected[0]), what
    else:
        nan = codes.float().isnan()
        assert torch.equal(nan, expected[0].float().isnan()), what
        assert torch.equal(codes.view(torch.int8)[~nan], expected[0].view(torch.int8)[~nan]), what


def activations(generator: torch.Generator, tokens: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Return tokens of many sizes, with outliers; the third is zeros, the seventh holds NaN, the ninth infinity.

    The fifth is subnormal in float32. (Subnormal bfloat16 numbers become zeros in the interpreter, Triton 3.7.)
    """
    x = torch.randn(tokens, in_features, generator=generator) * 10.0 ** torch.randint(
        -3, 4, (tokens, 1), generator=generator
    )
    x[torch.rand(x.shape, generator=generator) < 0.03] *= 50
    x[2:3] = 0
    x[4:5] *= 1e-42 if dtype == torch.float32 else 1e-3
    x[6:7, :1] = math.nan
    x[8:9, :1] = math.inf
    return x.to(dtype)


def hostile(dtype: torch.dtype) -> torch.Tensor:
    """Return float32 numbers at the halves between all codes and beside them, beyond the range, NaN; both signs."""
    if dtype == torch.int8:
        values = torch.arange(0, 130, dtype=torch.float64)
    else:
        values = torch.tensor(reference.fp8_magnitudes(dtype), dtype=torch.float64)
    halves = torch.cat([(values[1:] + values[:-1]) / 2, values]).float()
    around = [halves, torch.nextafter(halves, torch.tensor(math.inf)), torch.nextafter(halves, torch.tensor(-math.inf))]
    beyond = torch.tensor([0.0, 1e-45, 1e-30, 480.0, 464.0, 61440.0, 1e30, math.inf, math.nan])
    one_sign = torch.cat([*around, beyond])
    return torch.cat([one_sign, -one_sign])


def check_every_code() -> int:
    """Raise AssertionError unless every number that could be rounded wrongly becomes the code of `formats`."""
    one = torch.ones(1)
    for dtype in DTYPES:
        x = hostile(dtype)
        same(quantization.quantize_per_tensor(x, dtype, one), formats.quantize_per_tensor(x, dtype, one), dtype)
        near = x[x.abs() < 2 * formats.QMAX[dtype]]
        codes, _ = quantization.quantize_per_tensor(near, dtype, one)
        expected = [reference.round_to_code(value, dtype) for value in near.tolist()]
        assert codes.double().tolist() == expected, dtype
    return len(DTYPES)


def check_bits(generator: torch.Generator) -> int:
    """Raise AssertionError unless all the plain quantizers have the bits of `formats`; return how many cases."""
    cases = 0
    sizes = itertools.product((0, 1, 3, 17), (0, 1, 70, 128))
    floats = itertools.cycle((*formats.FLOAT_DTYPES, torch.float32))
    for (tokens, in_features), dtype in itertools.product(sizes, DTYPES):
        float_dtype = next(floats)
        what = (tokens, in_features, dtype, float_dtype)
        x = activations(generator, tokens, in_features, float_dtype)
        if cases % 3 == 0:  # numbers apart
            x = x.repeat_interleave(2, dim=1)[:, ::2]
        elif cases % 3 == 1:  # tokens apart
            x = torch.nn.functional.pad(x, (3, 5), value=77)[:, 3 : 3 + in_features]
        same(quantization.quantize_per_token(x, dtype), formats.quantize_per_token(x, dtype), what)
        given = torch.rand(1, generator=generator).to(float_dtype) + 0.01
        for scale in (None, given):
            found = quantization.quantize_per_tensor(x, dtype, scale)
            same(found, formats.quantize_per_tensor(x, dtype, scale), (*what, scale))
            assert scale is None or found[1].data_ptr() != scale.data_ptr()
        if in_features % formats.BLOCK == 0:
            wide = torch.cat([x, x * 3], dim=1)
            same(quantization.quantize_per_group(wide, dtype), formats.quantize_per_group(wide, dtype), what)
        cases += 1
    return cases


def check_nothing_else_is_written(generator: torch.Generator) -> None:
    """Raise AssertionError where a kernel writes a code or a scale outside of what it was given."""
    x = activations(generator, 5, 256, torch.float32)[:4]
    launches = (
        (quantization.launch_rows, (4, 1)),
        (quantization.launch_groups, (4, 2)),
        (lambda codes, scale, x: quantization.launch_tensor(codes, scale, x, None), (1, 1)),
    )
    for launch, shape in launches:
        codes = torch.full((6, 256), 99, dtype=torch.int8)
        scale = torch.full((shape[0] + 2, shape[1]), math.nan)
        launch(codes[1:5], scale[1:-1], x)
        assert (codes[0] == 99).all()
        assert (codes[5] == 99).all()
        assert int(scale.isnan().sum()) == 2 * shape[1]


def check_long_rows(generator: torch.Generator) -> None:
    """Raise AssertionError unless rows that are read in steps, and tensors by more programs, have the same bits."""
    kept = quantization.LONGEST_ROW, quantization.TENSOR_BLOCK, quantization.PARTS
    quantization.LONGEST_ROW, quantization.TENSOR_BLOCK, quantization.PARTS = 32, 16, 4
    for dtype in DTYPES:
        x = activations(generator, 9, 70, torch.bfloat16)
        gain = torch.randn(70, generator=generator)
        same(quantization.quantize_per_token(x, dtype), formats.quantize_per_token(x, dtype), dtype)
        same(quantization.quantize_per_tensor(x, dtype), formats.quantize_per_tensor(x, dtype), dtype)
        same(quantization.quantize_per_tensor(x[:6], dtype), formats.quantize_per_tensor(x[:6], dtype), dtype)
        check_fused(x[:6], gain, x[:6] * 2, dtype)
    quantization.LONGEST_ROW, quantization.TENSOR_BLOCK, quantization.PARTS = kept


def between(found: tuple[torch.Tensor, torch.Tensor], y: torch.Tensor, delta: float, what: object) -> None:
    """Raise AssertionError unless the codes are those of numbers within a relative `delta` of y, float64.

    The scale is absmax / qmax, so within delta and two roundings of y's. A quotient is then within twice that and one
    rounding more, and rounding to codes is monotonic: the code lies between those of the interval's ends.
    """
    codes, scale = found
    _, expected = reference.quantize_per_token(y.float(), codes.dtype)
    assert ((scale.double() - expected).abs() <= (delta + 3 * U32) * expected).all(), what
    width = 1 + 2 * delta + 8 * U32
    quotients = y / expected
    for code, quotient in zip(codes.double().flatten().tolist(), quotients.flatten().tolist(), strict=True):
        ends = [reference.round_to_code(end, codes.dtype) for end in (quotient / width, quotient * width)]
        assert min(ends) <= code <= max(ends), (what, code, quotient)


def check_fused(x: torch.Tensor, gain: torch.Tensor, up: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise AssertionError unless norm and SiLU * mul, kernel and torch code, are right within derived bounds.

    The norm: (K / 2 + 6) u, as its op says. SiLU: exp within 4 units in the last place is 8 u, the sum, the quotient
    and the product round once each.
    """
    for offset, quantize in itertools.product((0.0, 1.0), (quantization.rms_norm_quantize, ops.rms_norm_quantize)):
        y = reference.rms_norm(x, gain, 1e-5, offset)
        between(quantize(x, gain, 1e-5, offset, dtype), y, (x.shape[1] / 2 + 6) * U32, ("norm", offset, x.shape))
    gate = x.clamp(-60, 60)  # below -88 exp(-gate) is infinite in float32, and SiLU 0
    for quantize in (quantization.silu_mul_quantize, ops.silu_mul_quantize):
        between(quantize(gate, up, dtype), reference.silu_mul(gate, up), 11 * U32, ("silu", x.shape))


def check_exact_norm(generator: torch.Generator) -> None:
    """Raise AssertionError unless the norm has the bits of the torch code where the sum of squares is exact."""
    x = torch.randint(-9, 10, (5, 64), generator=generator).to(torch.float16)
    gain = torch.randn(64, generator=generator).to(torch.bfloat16)
    for dtype, offset in itertools.product(DTYPES, (0.0, 1.0)):
        expected = formats.quantize_per_token(generic.rms_norm(x, gain, 1e-6, offset), dtype)
        same(quantization.rms_norm_quantize(x, gain, 1e-6, offset, dtype), expected, (dtype, offset))
        same(ops.rms_norm_quantize(x, gain, 1e-6, offset, dtype, "triton"), expected, (dtype, offset))
    x = x.float()
    x[0, 0] = math.nan
    scales = [
        quantization.rms_norm_quantize(x, gain, 1e-6, 0.0, torch.int8)[1],
        quantization.silu_mul_quantize(x, x, torch.int8)[1],
    ]
    assert all(scale.isnan().flatten().tolist() == [True] + [False] * 4 for scale in scales)


def check_ops(generator: torch.Generator) -> None:
    """Raise AssertionError unless the ops take the kernels when told to, and give the bits of the torch code."""
    x = torch.randn(3, 256, generator=generator)
    for dtype in DTYPES:
        for quantize in (ops.quantize_per_token, ops.quantize_per_group, ops.quantize_per_tensor):
            more = (None,) if quantize is ops.quantize_per_tensor else ()
            same(quantize(x, dtype, *more, "triton"), quantize(x, dtype, *more), (quantize, dtype))


def main() -> None:
    """Run all cases."""
    generator = torch.Generator().manual_seed(0)
    cases = check_every_code() + check_bits(generator)
    for tokens, in_features in ((0, 5), (1, 1), (3, 70), (17, 33)):
        for dtype, float_dtype in zip(DTYPES, formats.FLOAT_DTYPES, strict=True):
            x = activations(generator, min(tokens, 6), in_features, float_dtype)
            up = torch.randn(x.shape, generator=generator).to(float_dtype)
            check_fused(x, torch.randn(in_features, generator=generator).to(float_dtype), up, dtype)
            cases += 1
    check_nothing_else_is_written(generator)
    check_long_rows(generator)
    check_exact_norm(generator)
    check_ops(generator)
    print(cases, "cases right")  # noqa: T201 (what the test reads)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "overflow encountered")  # exp of large numbers, inside the interpreter
        warnings.filterwarnings("ignore", "invalid value encountered")  # infinity / infinity, likewise
        main()
