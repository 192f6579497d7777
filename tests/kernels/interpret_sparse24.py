"""Program: the kernels for packed 2:4 and V:N:M weights in Triton's interpreter, on CPU tensors, against float64.

Run by test_sparse24_kernels.py in a process of its own with TRITON_INTERPRET=1. Prints how many cases were right.
"""

import warnings
from unittest import mock

import torch
from interpreting import guarded, stored
from quantkit_kernels import formats, generic, ops, sparse24, venom
from quantkit_kernels.gpu import sparse24 as kernels
from quantkit_kernels.gpu import sparse24_units, units
from quantkit_kernels.gpu.sparse24_units import Packed

INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FLOATS = (BF16, FP16, FP32)

CUT = {BF16: 2.0**-7, FP16: 2.0**-11, FP32: 2.0**-24}
"""The largest relative error of one rounding in the interpreter, which cuts bfloat16 instead of rounding it."""

TOKEN = {"block_n": 4, "num_warps": 1, "num_stages": 1}
TILES = {"block_m": 16, "block_n": 16, "block_k": 128, "num_warps": 4, "num_stages": 2}
SPARSE24 = (1, 4)
"""V and M of a 2:4 weight."""


def layer(generator, shape, kind, groups, scale_dtype, v, m):
    """Return x [M, K] with outliers, the dense codes [N, K] of V:N:M with a row of zeros, and scales, some negative.

    `kind` is a dtype, or 4 for codes of 4 bits. Some rows keep fewer numbers than they may.
    """
    tokens, out_features, in_features = shape
    x = torch.randn(tokens, in_features, generator=generator)
    x[:, ::7] *= 30.0
    kept = venom.mask(torch.rand(out_features, in_features, generator=generator), v, m)
    kept[1::4] &= torch.rand(kept[1::4].shape, generator=generator) < 0.7
    kept[3:4] = False
    if kind in (4, INT8):
        low = -8 if kind == 4 else -128
        codes = torch.randint(low, -low, kept.shape, generator=generator).to(INT8) * kept
    else:
        codes = (torch.randn(kept.shape, generator=generator) * 3).masked_fill(~kept, 0.0).to(kind)
    if kind in FLOATS:
        return x, codes, None
    scale = torch.rand(out_features, groups, generator=generator) + 0.01
    scale[::5] *= -1
    return x, codes, scale.to(scale_dtype)


def packed(codes, scale, kind, v, m):
    """Return the packed weight as the launcher takes it."""
    if (v, m) == SPARSE24:
        values, indices = sparse24.pack_int4(codes) if kind == 4 else sparse24.pack(codes)
        return Packed(values, indices, scale, codes.shape[1])
    values, indices, columns = venom.pack_int4(codes, v, m) if kind == 4 else venom.pack(codes, v, m)
    return Packed(values, indices, scale, codes.shape[1], columns, v, m)


def check(generator, way, shape, kind, groups, dtype, scale_dtype, *, pattern=SPARSE24, config=None, with_bias=True,
          rounded=False):  # fmt: skip
    """Raise AssertionError unless the kernel of that way was taken, kept its bound and wrote nothing else.

    The bound is the module's: K + 8 roundings of float32, one of the output; where weights are rounded (`rounded`;
    values in float that are not x's always, but for one token), to the scale's dtype and to x's, those of the sum of
    magnitudes as well.
    """
    x, codes, scale = layer(generator, shape, kind, groups, scale_dtype, *pattern)
    x = torch.cat([x, x], dim=1).to(dtype)[:, : shape[2]]  # rows apart in memory
    bias = torch.randn(shape[1], generator=generator).to(dtype) if with_bias else None
    weight = packed(codes, scale, kind, *pattern)
    what = f"{way}, {shape}, {kind}, {groups} groups, {dtype}, {scale_dtype}, {pattern}, {config}"
    assert kernels.way(x, weight) == way, f"{what}: {kernels.way(x, weight)}"
    out, around = guarded(shape[0], shape[1], dtype)
    kernels.launch(out, x, weight, bias, config)

    decoded = codes.double()
    if scale is not None:
        decoded *= scale.double().repeat_interleave(shape[2] // groups, dim=1)
    exact, size = x.double() @ decoded.T, x.double().abs() @ decoded.abs().T
    bound = (shape[2] + 8) * 2.0**-24 * size
    if bias is not None:
        exact += bias.double()
        bound += 2.0**-24 * bias.double().abs()
    if rounded or (kind in FLOATS and kind != dtype and way != "token"):
        bound += (CUT[dtype] + (0.0 if scale is None else CUT[scale_dtype])) * 1.01 * size
    bound += CUT[dtype] * (exact.abs() + bound) + 2.0**-24
    error = (out.double() - exact).abs()
    assert (error <= bound).all(), f"{what}: {float((error / bound).max())} of the bound"
    assert int(around.isnan().sum()) == around.numel() - out.numel(), f"written outside: {what}"


def token_cases(generator) -> int:
    """Run the one-token kernel on every kind of value, 2:4 and V:N:M, with scales by row and by group, at ragged N."""
    cases = [
        (INT8, 544, 1, BF16, BF16, SPARSE24), (INT8, 320, 5, FP16, FP32, SPARSE24), (INT8, 64, 1, FP32, FP16, SPARSE24),
        (E4M3, 192, 1, FP16, FP16, SPARSE24), (E4M3, 192, 6, BF16, BF16, SPARSE24),
        (E5M2, 160, 1, BF16, FP32, SPARSE24),
        (4, 1088, 1, BF16, BF16, SPARSE24), (4, 512, 4, BF16, BF16, SPARSE24), (4, 320, 5, FP16, FP16, SPARSE24),
        (BF16, 272, 1, BF16, None, SPARSE24), (FP16, 48, 1, FP16, None, SPARSE24), (FP16, 48, 1, BF16, None, SPARSE24),
        (BF16, 48, 1, FP32, None, SPARSE24),
        (INT8, 256, 1, BF16, BF16, (4, 8)), (INT8, 512, 4, FP16, FP16, (2, 16)), (4, 384, 1, BF16, BF16, (3, 12)),
        (E4M3, 128, 1, BF16, BF16, (16, 8)), (E5M2, 128, 2, BF16, BF16, (64, 8)), (FP16, 64, 1, FP16, None, (1, 8)),
    ]  # fmt: skip
    for number, (kind, in_features, groups, dtype, scale_dtype, pattern) in enumerate(cases):
        shape, with_bias = (1, 9 + number % 4, in_features), number % 3 != 0
        check(generator, "token", shape, kind, groups, dtype, scale_dtype, pattern=pattern, config=TOKEN,
              with_bias=with_bias)  # fmt: skip
    with mock.patch.object(sparse24_units, "architecture", return_value=80):
        check(generator, "token", (1, 7, 192), E4M3, 1, FP16, FP16, config=TOKEN)
        check(generator, "token", (1, 7, 192), E4M3, 6, BF16, BF16)  # the configuration as it is chosen
    return len(cases) + 2


def tile_cases(generator) -> int:
    """Run the kernel for tiles: every kind, scales applied in all places, ragged sizes, K in one part and more."""
    cases = [
        ((3, 21, 72), INT8, 1, BF16, BF16, SPARSE24, False), ((17, 33, 256), INT8, 2, FP16, FP32, SPARSE24, True),
        ((2, 9, 120), INT8, 5, BF16, BF16, SPARSE24, True), ((1, 9, 72), INT8, 1, FP16, FP16, SPARSE24, False),
        ((17, 33, 136), E4M3, 1, FP16, FP16, SPARSE24, False), ((3, 21, 256), E4M3, 2, BF16, BF16, SPARSE24, True),
        ((5, 7, 96), E5M2, 3, BF16, FP32, SPARSE24, True), ((64, 40, 128), E5M2, 1, BF16, BF16, SPARSE24, False),
        ((3, 21, 140), 4, 1, BF16, BF16, SPARSE24, False), ((17, 33, 512), 4, 4, BF16, BF16, SPARSE24, True),
        ((2, 9, 192), 4, 3, FP16, FP16, SPARSE24, True), ((64, 40, 512), 4, 2, FP16, FP16, SPARSE24, True),
        ((3, 21, 264), BF16, 1, BF16, None, SPARSE24, False), ((17, 33, 72), FP16, 1, FP16, None, SPARSE24, False),
        ((4, 9, 72), FP16, 1, BF16, None, SPARSE24, False),
        ((3, 40, 272), INT8, 1, BF16, BF16, (16, 8), False), ((16, 33, 512), INT8, 2, FP16, FP16, (64, 8), True),
        ((3, 48, 288), 4, 1, BF16, BF16, (32, 12), False), ((5, 32, 144), E4M3, 3, BF16, BF16, (16, 8), True),
        ((2, 20, 128), FP16, 1, FP16, None, (20, 16), False),
    ]  # fmt: skip
    for number, (shape, kind, groups, dtype, scale_dtype, pattern, rounded) in enumerate(cases):
        for parts in (1, 3) if number % 2 else (1,):
            check(generator, "tiles", shape, kind, groups, dtype, scale_dtype, pattern=pattern, rounded=rounded,
                  config={**TILES, "parts": parts}, with_bias=number % 3 != 0)  # fmt: skip
    check(generator, "tiles", (3, 5, 2048), INT8, 1, BF16, BF16)  # configuration and parts as they are chosen
    check(generator, "tiles", (3, 16, 2048), 4, 16, BF16, BF16, pattern=(16, 8), rounded=True)
    return len(cases) + len(cases) // 2 + 2


def whole_cases(generator) -> int:
    """Run what is made dense first: float32, more tokens than tiles take, rows and groups of no words, small V."""
    cases = [
        ((3, 21, 72), INT8, 1, FP32, SPARSE24), ((1, 9, 68), E4M3, 17, BF16, SPARSE24),
        ((4, 9, 36), 4, 1, FP32, SPARSE24),
        ((1, 9, 60), 4, 6, FP16, SPARSE24), ((1, 9, 44), INT8, 22, FP16, SPARSE24),
        ((3, 9, 76), BF16, 1, BF16, SPARSE24),
        ((kernels.TILE_TOKENS + 1, 3, 16), FP16, 1, FP16, SPARSE24), ((2, 5, 64), FP32, 1, FP32, SPARSE24),
        ((1, 5, 64), FP32, 1, BF16, SPARSE24), ((3, 9, 64), INT8, 1, BF16, (2, 8)), ((3, 9, 72), 4, 18, FP32, (4, 12)),
        ((1, 9, 80), E5M2, 8, FP16, (4, 16)),
    ]  # fmt: skip
    for shape, kind, groups, dtype, pattern in cases:
        check(generator, "whole", shape, kind, groups, dtype, FP32, pattern=pattern, rounded=True)
    return len(cases)


def check_dense(generator) -> int:
    """Raise AssertionError unless the dense weight is what torch code unpacks and decodes, number for number."""
    cases = 0
    kinds = [(INT8, FP32), (E4M3, FP16), (E5M2, FP32), (4, FP32), (FP32, None), (BF16, None), (FP16, None)]
    patterns = [(SPARSE24, 1), (SPARSE24, 18), (SPARSE24, 36), ((4, 12), 1), ((4, 12), 4), ((5, 8), 3)]
    for kind, scale_dtype in kinds:
        for pattern, groups in patterns if scale_dtype else patterns[2:4]:
            dtype = FLOATS[cases % 3]
            _, codes, scale = layer(generator, (1, 17, 72), kind, groups, scale_dtype, *pattern)
            found = kernels.dense(packed(codes, scale, kind, *pattern), dtype)
            values = codes.float()
            if scale is not None:
                product = values.unflatten(1, (groups, -1)) * scale.float().unsqueeze(2)
                values = stored(product.flatten(1), scale_dtype).float()
            assert torch.equal(found, stored(values, dtype)), f"{kind}, {pattern}, {groups} groups, {dtype}"
            cases += 1
    with mock.patch.object(units, "architecture", return_value=80):
        codes = layer(generator, (1, 8, 64), E4M3, 1, FP32, *SPARSE24)[1]
        by_bits = kernels.dense(packed(codes, torch.ones(8, 1), E4M3, *SPARSE24), FP32)
    assert torch.equal(by_bits, codes.float())
    return cases + 1


def check_every_code() -> int:
    """Raise AssertionError unless each value at each place of a word is the right number, in all six pairs."""
    every = torch.arange(-128, 128).to(INT8)
    finite = [every.view(dtype)[every.view(dtype).float().isfinite()] for dtype in (E4M3, E5M2)]
    kinds = [(every, INT8), (finite[0], E4M3), (finite[1], E5M2), (every[120:136], 4)]
    kinds += [(finite[0].to(dtype), dtype) for dtype in (BF16, FP16)]
    cases = 0
    for codes, kind in kinds:
        raw = codes.view(INT8 if codes.element_size() == 1 else torch.int16)
        for first, second in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
            rows = torch.zeros(len(codes), 64, dtype=raw.dtype)
            group = 4 * (torch.arange(len(codes)) % 16)
            rows[torch.arange(len(codes)), group + first] = raw
            rows[torch.arange(len(codes)), group + second] = raw.flip(0)
            dense = rows.view(codes.dtype)
            scale = None if kind in FLOATS else torch.ones(len(codes), 1)
            x = 2.0 ** torch.arange(64).remainder(4).sub(2).float().expand(1, 64)
            out = torch.empty(1, len(codes))
            kernels.launch(out, x, packed(dense, scale, kind, *SPARSE24), None, {**TOKEN, "block_n": 128})
            assert torch.equal(out, x @ dense.float().T), f"token, {kind}, {first}, {second}"
            out = torch.empty(2, len(codes), dtype=FP16)
            kernels.launch(
                out, x.half().expand(2, 64), packed(dense, scale, kind, *SPARSE24), None, {**TILES, "block_n": 128}
            )
            expected = (x @ dense.float().T).half().expand(2, -1)
            assert torch.equal(out, expected), f"tiles, {kind}, {first}, {second}"
            cases += 1
    return cases


def check_ops(generator) -> int:
    """Raise AssertionError unless the ops take the kernels when told to, for no tokens and no in features too."""
    x = torch.randn(2, 3, 64, generator=generator).to(FP16)
    weight = torch.randn(24, 64, generator=generator) * venom.mask(torch.rand(24, 64, generator=generator), 24, 8)
    codes, scale = formats.quantize_weight(weight, INT8)
    bias = torch.randn(24, generator=generator).to(FP16)
    two_four, columns = sparse24.pack(codes), venom.pack(codes, 24, 8)
    with mock.patch.object(kernels, "launch", side_effect=kernels.launch) as launch:
        by_torch = ops.linear_sparse24(x, *two_four, scale, bias)
        assert not launch.call_count, "'auto' on the CPU must not take the kernel"
        by_kernel = ops.linear_sparse24(x, *two_four, scale, bias, "triton")
        assert torch.allclose(by_kernel.float(), by_torch.float(), rtol=2e-3, atol=2e-2)
        by_columns = ops.linear_venom(x, *columns, scale, bias, 24, 8, "triton")
        assert torch.allclose(by_columns.float(), by_torch.float(), rtol=2e-3, atol=2e-2)
        assert ops.linear_sparse24(x[:0], *two_four, scale, bias, "triton").shape == (0, 3, 24)
        empty = ops.linear_sparse24(x[..., :0], two_four[0][:, :0], two_four[1][:, :0], scale, bias, "triton")
        assert torch.equal(empty, bias.expand(2, 3, 24))
        apart = torch.stack([two_four[0], two_four[0]], dim=2)[..., 0]  # values with gaps between them
        strided = ops.linear_sparse24(x, apart, two_four[1], scale, bias, "triton")
        assert torch.allclose(strided.float(), by_torch.float(), rtol=2e-3, atol=2e-2)
        assert launch.call_count == 5
    assert torch.equal(
        generic.linear_venom(x, *columns, scale, bias, 24, 8), generic.linear_sparse24(x, *two_four, scale, bias)
    )
    return 1


def main() -> None:
    """Run all cases."""
    generator = torch.Generator().manual_seed(0)
    cases = token_cases(generator) + tile_cases(generator) + whole_cases(generator)
    cases += check_dense(generator) + check_every_code() + check_ops(generator)
    print(cases, "cases right")  # noqa: T201 (what the test reads)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # NaN and infinity, inside the interpreter's numpy
        main()
