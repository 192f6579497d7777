"""Program: the kernel for blocks in Triton's interpreter, on CPU tensors, against exact sums and against float64.

Run by test_block_scaled_mm.py in a process of its own with TRITON_INTERPRET=1. Prints how many cases were right.
"""

import itertools
import warnings
from unittest import mock

import offline
import torch
from interpreting import fp8_codes, guarded, stored, whole_codes
from quantkit_kernels import formats, ops, reference
from quantkit_kernels.configurations import INTERPRETED
from quantkit_kernels.gpu import block_scaled_mm
from quantkit_kernels.gpu.block_scaled_mm import BLOCK, UNALIGNED_BLOCKS
from quantkit_kernels.gpu.tiles import GROUP_M, TileConfig

SIZES = [(1, 128), (7, 0), (33, 256), (130, 128), (300, 256)]  # (N, K): ragged N, one block and more, none
DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
"""Relative error of the last rounding; the interpreter cuts bfloat16 off (2**-7) instead of rounding it (2**-8)."""


def scales(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Return float32 scales from 0.25 to 1.25, no two alike."""
    return torch.rand(*shape, generator=generator) + 0.25


def decoded(codes: torch.Tensor, scale: torch.Tensor, rows: int) -> torch.Tensor:
    """Return codes times their scales in float64; a scale is for `rows` x 128 codes."""
    by_code = scale.double().repeat_interleave(rows, dim=0).repeat_interleave(BLOCK, dim=1)
    return codes.double() * by_code[: codes.shape[0]]


def check_exactly(
    generator: torch.Generator, shape: tuple[int, int, int], out_dtype: torch.dtype, config: TileConfig | None
) -> None:
    """Raise AssertionError unless whole codes with powers of two as scales give the exact sum in every bit."""
    tokens, out_features, in_features = shape
    groups, blocks = in_features // BLOCK, -(-out_features // BLOCK)
    a = whole_codes(generator, tokens, in_features, DTYPES[0])
    b = whole_codes(generator, out_features, in_features, DTYPES[0])
    a_scale = 2.0 ** torch.randint(-2, 3, (tokens, groups), generator=generator)
    b_scale = 2.0 ** torch.randint(-2, 3, (blocks, groups), generator=generator)
    out, around = guarded(tokens, out_features, out_dtype)
    block_scaled_mm.launch(out, a, b, a_scale, b_scale.to(torch.bfloat16), None, config)
    exact = (decoded(a, a_scale, 1) @ decoded(b, b_scale, BLOCK).T).float()
    assert torch.equal(out, stored(exact, out_dtype)), f"exact sums, {shape}, {out_dtype}, {config}"
    assert int(around.isnan().sum()) == around.numel() - out.numel(), f"written outside, {shape}, {config}"


def check(
    generator: torch.Generator,
    shape: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    with_bias: bool,
    config: TileConfig | None = None,
    spread: bool = False,
) -> None:
    """Raise AssertionError unless the kernel's output is within its bound of float64, and nothing else was written.

    With u = 2**-24: a block's sum of 128 exact products errs by at most 127 u, the product of the two scales by u,
    scaling by u, adding up K / 128 blocks and the bias by u each; all relative to the sum of magnitudes, and of
    second order by less than 1 %. Storing rounds once more.
    """
    tokens, out_features, in_features = shape
    codes, out_dtype = dtypes
    groups, blocks = in_features // BLOCK, -(-out_features // BLOCK)
    a, b = fp8_codes(generator, tokens, in_features, codes), fp8_codes(generator, out_features, in_features, codes)
    if spread:  # columns apart in a; rows apart in b
        a = a.repeat_interleave(2, dim=1)[:, ::2]
        b = torch.nn.functional.pad(b.view(torch.uint8), (3, 5), value=77).view(codes)[:, 3 : 3 + in_features]
    a_scale = scales(generator, tokens, groups) / formats.QMAX[codes]
    b_scale = (scales(generator, blocks, groups) / formats.QMAX[codes]).to(torch.bfloat16)
    if spread:
        a_scale, b_scale = a_scale.t().contiguous().t(), b_scale.t().contiguous().t()
    bias = torch.randn(out_features, generator=generator).to(torch.bfloat16) if with_bias else None
    out, around = guarded(tokens, out_features, out_dtype)
    block_scaled_mm.launch(out, a, b, a_scale, b_scale, bias, config)
    left, right = decoded(a, a_scale, 1), decoded(b, b_scale, BLOCK)
    oracle = left @ right.T + (0 if bias is None else bias.double())
    size = left.abs() @ right.abs().T + (0 if bias is None else bias.double().abs())
    bound = ((BLOCK + 2 + groups) * 2.0**-24 + ROUNDING[out_dtype]) * 1.01 * size + 2.0**-25
    what = f"{shape}, {dtypes}, {config}"
    assert ((out.double() - oracle).abs() <= bound).all(), f"scaled product, {what}"
    assert int(around.isnan().sum()) == around.numel() - out.numel(), f"written outside, {what}"


def check_op() -> None:
    """Raise AssertionError unless the op takes the kernel when told to and is right."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 256, generator=generator)
    bias = torch.randn(140, generator=generator)
    weight, scale = formats.quantize_weight(torch.randn(140, 256, generator=generator), DTYPES[0], granularity="block")
    launches = []
    launch = block_scaled_mm.launch
    with mock.patch.object(block_scaled_mm, "launch", lambda *some: launches.append(1) or launch(*some)):
        by_kernel = ops.linear_block(x, weight, scale, bias, "triton")
        assert launches == [1]
        ops.linear_block(x, weight, scale, bias)
        assert launches == [1], "'auto' on the CPU must not take the kernel"
    expected = reference.linear_block(x, weight, scale, bias)
    # `check`'s bound for terms of at most 4 * 4, the largest magnitudes that were drawn, and the bias
    assert max(x.abs().max(), bias.abs().max()) < 4
    assert ((by_kernel.double() - expected).abs() <= (BLOCK + 4) * 2.0**-24 * 1.01 * (256 * 4**2 + 4)).all()


def main() -> None:
    """Run all cases: each M and size as `tile_config` chooses, then each configuration at one ragged size."""
    generator = torch.Generator().manual_seed(0)
    out_dtypes = (torch.float32, torch.bfloat16, torch.float16)
    cases = 0
    for tokens, (out_features, in_features) in itertools.product((0, 1, 3, 17, 64), SIZES):
        shape, out_dtype = (tokens, out_features, in_features), out_dtypes[cases % 3]
        check(generator, shape, (DTYPES[cases % 2], out_dtype), cases % 4 < 2, spread=cases % 3 == 0)
        cases += 1
    # one whole tile of 256 out features in two halves, two blocks of the weight apart, though no table has it
    for number, config in enumerate(
        [*offline.configs("block_scaled_mm", INTERPRETED), UNALIGNED_BLOCKS, TileConfig(64, 256, 128, 8, 2, 2)]
    ):
        shape = (67, 131 + 128 * (number % 2), 256)
        check(generator, shape, (DTYPES[number % 2], out_dtypes[number % 3]), number % 2 == 0, config)
        check_exactly(generator, shape, out_dtypes[number % 3], config)
        cases += 2
    # more row tiles than GROUP_M, so that programs are numbered in two bands, the second of them shorter
    check_exactly(generator, (16 * GROUP_M + 30, 130, 128), torch.float32, TileConfig(16, 64, 128, 4, 2))
    check_op()
    print(cases + 2, "cases right")  # noqa: T201 (what the test reads)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "overflow encountered in cast")  # NaN to bfloat16, inside the interpreter
        main()
