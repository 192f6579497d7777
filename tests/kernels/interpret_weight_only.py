"""Program: the weight-only kernels in Triton's interpreter, on CPU tensors, against float64.

Run by test_weight_only.py in a process of its own with TRITON_INTERPRET=1. Prints how many cases were right.
"""

import warnings
from unittest import mock

import torch
from interpreting import guarded, stored
from quantkit_kernels import formats, ops
from quantkit_kernels.gpu import dequantize, units, weight_only

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CUT = {BF16: 2.0**-7, FP16: 2.0**-11, FP32: 2.0**-24}
"""The largest relative error of one rounding in the interpreter, which cuts bfloat16 instead of rounding it."""

TOKEN = {"block_n": 4, "num_warps": 1, "num_stages": 2}
WIDE = {**TOKEN, "block_n": 128}
TILES = {"block_m": 16, "block_n": 16, "block_k": 128, "num_warps": 4, "num_stages": 2}


def bit_patterns_on() -> mock._patch:
    """Return a context in which the device is one that has no E4M3: sm_80."""
    return mock.patch.object(units, "architecture", return_value=80)


def layer(generator, shape, kind, groups, scale_dtype):
    """Return x [M, K] with outliers, codes [N, K] with a row of zeros, and scales [N, G], some of them negative.

    `kind` is a dtype, or the number of bits of codes that are packed.
    """
    tokens, out_features, in_features = shape
    x = torch.randn(tokens, in_features, generator=generator)
    x[:, ::7] *= 30.0
    if isinstance(kind, int):
        low = -(1 << (kind - 1))
        codes = torch.randint(low, -low, (out_features, in_features), generator=generator).to(torch.int8)
    elif kind == torch.int8:
        codes = torch.randint(-128, 128, (out_features, in_features), generator=generator).to(torch.int8)
    else:
        codes = (torch.randn(out_features, in_features, generator=generator) * 3).to(kind)
    codes.view(torch.int8)[3:4] = 0
    scale = torch.rand(out_features, groups, generator=generator) + 0.01
    scale[::5] *= -1
    return x, codes, scale.to(scale_dtype)


def check(generator, way, shape, kind, groups, dtype, scale_dtype, config=None, with_bias=True, rounded=False):
    """Raise AssertionError unless the kernel of that way was taken, kept its bound and wrote nothing else.

    The bound is the module's: K + 4 roundings of float32, one of the output; where weights are rounded (`rounded`), to
    the scale's dtype and to x's, those of the sum of magnitudes as well.
    """
    x, codes, scale = layer(generator, shape, kind, groups, scale_dtype)
    x = torch.cat([x, x], dim=1).to(dtype)[:, : shape[2]]  # rows apart in memory
    bias = torch.randn(shape[1], generator=generator).to(dtype) if with_bias else None
    bits = kind if isinstance(kind, int) else None
    weight = codes if bits is None else formats.pack_int32(codes, bits)
    what = f"{way}, {shape}, {kind}, {groups} groups, {dtype}, {scale_dtype}, {config}"
    assert weight_only.way(x, weight, scale, bits) == way, what
    out, around = guarded(shape[0], shape[1], dtype)
    weight_only.launch(out, x, weight, scale, bias, bits, config)

    decoded = codes.double() * scale.double().repeat_interleave(shape[2] // groups, dim=1)
    exact, size = x.double() @ decoded.T, x.double().abs() @ decoded.abs().T
    bound = (shape[2] + 4) * 2.0**-24 * size
    if bias is not None:
        exact += bias.double()
        bound += 2.0**-24 * bias.double().abs()
    if rounded:
        bound += (CUT[dtype] + CUT[scale_dtype]) * 1.01 * size
    bound += CUT[dtype] * (exact.abs() + bound) + 2.0**-24
    error = (out.double() - exact).abs()
    assert (error <= bound).all(), f"{what}: {float((error / bound).max())} of the bound"
    assert int(around.isnan().sum()) == around.numel() - out.numel(), f"written outside: {what}"


def token_cases(generator) -> int:
    """Run the one-token kernel on every kind of weight, with scales by row and by group, at ragged N."""
    cases = [
        (torch.int8, 560, 1, BF16, BF16), (torch.int8, 320, 5, FP16, FP32), (torch.int8, 32, 2, FP32, FP16),
        (E4M3, 192, 1, FP16, FP16), (E4M3, 192, 6, BF16, BF16), (E5M2, 192, 1, BF16, FP32), (E5M2, 192, 2, FP32, FP32),
        (4, 1088, 1, BF16, BF16), (4, 512, 4, BF16, BF16), (4, 320, 10, FP16, FP16),
        (8, 320, 1, FP32, FP32), (8, 320, 5, BF16, BF16),
    ]  # fmt: skip
    for number, (kind, in_features, groups, dtype, scale_dtype) in enumerate(cases):
        shape = (1, 9 + number % 4, in_features)
        check(generator, "token", shape, kind, groups, dtype, scale_dtype, TOKEN, with_bias=number % 3 != 0)
    with bit_patterns_on():
        check(generator, "token", (1, 7, 192), E4M3, 1, FP16, FP16, TOKEN)
        check(generator, "token", (1, 7, 192), E4M3, 4, BF16, BF16, None)
    return len(cases) + 2


def tile_cases(generator) -> int:
    """Run the kernel for tiles: every kind, scales applied in all places, ragged sizes, K in one part and more."""
    cases = [
        ((3, 21, 70), torch.int8, 1, BF16, BF16, False), ((17, 33, 256), torch.int8, 2, FP16, FP32, False),
        ((2, 9, 120), torch.int8, 8, BF16, BF16, True), ((1, 9, 70), torch.int8, 1, FP16, FP16, False),
        ((17, 33, 70), E4M3, 1, FP16, FP16, False), ((3, 21, 256), E4M3, 4, BF16, BF16, False),
        ((5, 7, 96), E5M2, 3, BF16, FP32, True), ((64, 40, 128), E5M2, 1, BF16, BF16, False),
        ((3, 21, 140), 4, 1, BF16, BF16, False), ((17, 33, 384), 4, 3, BF16, BF16, False),
        ((2, 9, 192), 4, 3, FP16, FP16, True), ((64, 40, 256), 4, 1, FP16, FP16, False),
        ((3, 21, 71), 8, 1, BF16, BF16, False), ((17, 33, 256), 8, 2, FP16, FP16, False),
    ]  # fmt: skip
    for number, (shape, kind, groups, dtype, scale_dtype, rounded) in enumerate(cases):
        for parts in (1, 3) if number % 2 else (1,):
            config = {**TILES, "parts": parts}
            check(generator, "tiles", shape, kind, groups, dtype, scale_dtype, config, number % 3 != 0, rounded)
    with bit_patterns_on():
        check(generator, "tiles", (3, 21, 70), E4M3, 1, BF16, BF16, {**TILES, "parts": 1})
    check(generator, "tiles", (3, 5, 2048), torch.int8, 1, BF16, BF16)  # configuration and parts as they are chosen
    check(generator, "tiles", (3, 5, 2048), 4, 16, BF16, BF16)
    return len(cases) + len(cases) // 2 + 3


def whole_cases(generator) -> int:
    """Run what is decoded as a whole: float32 with several tokens, straddling bits, groups of no whole words."""
    cases = [
        ((3, 21, 70), torch.int8, 1, FP32), ((1, 9, 70), E4M3, 7, FP32), ((4, 9, 70), 3, 1, BF16),
        ((4, 9, 66), 5, 2, FP16), ((1, 9, 60), 4, 6, FP16), ((1, 9, 64), 2, 1, FP32),
        ((weight_only.WHOLE_TOKENS + 1, 3, 16), 4, 1, BF16),
    ]  # fmt: skip
    for shape, kind, groups, dtype in cases:
        check(generator, "whole", shape, kind, groups, dtype, FP32, None, rounded=True)
    return len(cases)


def check_every_code() -> int:
    """Raise AssertionError unless each code in each place of a word is the right number, E4M3's NaN included."""
    every = torch.arange(-128, 128).to(torch.int8)
    kinds = [(every, None), (every.view(E4M3), None), (every.view(E5M2), None), (every[120:136], 4), (every, 8)]
    cases = 0
    for codes, bits in kinds:
        expected = codes.float()
        for place in range(8):  # one code in each row, the others 0
            rows = torch.zeros(len(codes), 32, dtype=codes.dtype)
            rows.view(torch.int8)[:, place] = codes.view(torch.int8)
            weight = rows if bits is None else formats.pack_int32(rows, bits)
            for on in (90, 80) if codes.dtype == E4M3 else (90,):
                out = torch.full((1, len(codes)), -77.0)
                with mock.patch.object(units, "architecture", return_value=on):
                    weight_only.launch(out, torch.ones(1, 32), weight, torch.ones(len(codes), 1), None, bits, WIDE)
                # the interpreter's own conversion of fp8 knows no NaN and no infinity
                looked = expected.isfinite() if on == 90 else torch.ones_like(expected, dtype=torch.bool)
                same = torch.equal(out[0][looked].nan_to_num(1e9), expected[looked].nan_to_num(1e9))
                assert same, f"{codes.dtype}, {bits} bits, place {place}, sm_{on}"
        cases += 1
    return cases


def check_dequantize(generator) -> int:
    """Raise AssertionError unless the decoded weight has the bits of `formats.dequantize`, for any strides."""
    cases = 0
    for kind in (torch.int8, E4M3, E5M2, 1, 2, 3, 4, 5, 6, 7, 8):
        for groups, scale_dtype, dtype in ((1, FP32, FP16), (9, FP16, FP32), (12, BF16, BF16)):
            _, codes, scale = layer(generator, (0, 21, 72), kind, groups, scale_dtype)
            bits = kind if isinstance(kind, int) else None
            weight = codes if bits is None else formats.pack_int32(codes, bits)
            if cases % 2:
                weight, scale = weight.t().contiguous().t(), scale.t().contiguous().t()
            product = codes.float().unflatten(1, (groups, -1)) * scale.float().unsqueeze(2)
            expected = stored(stored(product.flatten(1), scale_dtype).float(), dtype)
            out, around = guarded(21, 72, dtype)
            dequantize.launch(out, weight, scale, bits)
            same = torch.equal(out, expected)
            assert same, f"{kind}, {groups} groups, {scale_dtype} to {dtype}"
            assert int(around.isnan().sum()) == around.numel() - out.numel(), f"written outside, {kind}"
            if scale_dtype != BF16:
                assert torch.equal(out, formats.dequantize(codes, scale).to(dtype)), f"{kind}: not that of formats"
            cases += 1
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).view(8, 32)
    with mock.patch.object(dequantize, "architecture", return_value=80):
        by_bits = dequantize.dequantize(every, torch.ones(8, 1), FP32)
    assert torch.equal(by_bits.nan_to_num(1e9), every.float().nan_to_num(1e9))
    return cases + 1


def check_ops(generator) -> int:
    """Raise AssertionError unless the ops take the kernels when told to, for no tokens and no in features too."""
    x = torch.randn(2, 3, 64, generator=generator).to(FP16)
    weight, scale = formats.quantize_weight(torch.randn(24, 64, generator=generator), torch.int8)
    launches = []
    with mock.patch.object(weight_only, "launch", side_effect=weight_only.launch) as launch:
        launches = launch.call_args_list
        by_kernel = ops.linear_weight_only(x, weight, scale, None, "triton")
        by_torch = ops.linear_weight_only(x, weight, scale, None)
        assert len(launches) == 1, "'auto' on the CPU must not take the kernel"
        assert torch.allclose(by_kernel.float(), by_torch.float(), rtol=2e-3, atol=2e-2)
        packed = formats.pack_int32(weight, 8)
        assert torch.equal(ops.linear_weight_only_packed(x, packed, scale, None, 8, "triton"), by_kernel)
        none = ops.linear_weight_only(x[:0], weight, scale, None, "triton")
        assert none.shape == (0, 3, 24)
        bias = torch.randn(24, generator=generator).to(FP16)
        empty = ops.linear_weight_only(x[..., :0], weight[:, :0], scale, bias, "triton")
        assert torch.equal(empty, bias.expand(2, 3, 24))
        by_column = ops.linear_weight_only(x, weight.t().contiguous().t(), scale, None, "triton")
        assert torch.allclose(by_column.float(), by_torch.float(), rtol=2e-3, atol=2e-2)
        assert len(launches) == 5
    return 1


def main() -> None:
    """Run all cases."""
    generator = torch.Generator().manual_seed(0)
    cases = token_cases(generator) + tile_cases(generator) + whole_cases(generator)
    cases += check_every_code() + check_dequantize(generator) + check_ops(generator)
    print(cases, "cases right")  # noqa: T201 (what the test reads)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # NaN and infinity, inside the interpreter's numpy
        main()
