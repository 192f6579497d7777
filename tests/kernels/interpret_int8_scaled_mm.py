"""Program: the W8A8 kernel in Triton's interpreter, on CPU tensors, against exact integers.

Run by test_int8_scaled_mm.py in a process of its own with TRITON_INTERPRET=1. Prints how many cases were right.
"""

import functools
import itertools
import warnings

import offline
import torch
from interpreting import guarded, truncated
from quantkit_kernels import formats, generic, ops, reference
from quantkit_kernels.configurations import INTERPRETED
from quantkit_kernels.gpu import int8_scaled_mm
from quantkit_kernels.gpu.tiles import GROUP_M, UNALIGNED, TileConfig

SIZES = [(1, 1), (7, 0), (33, 70), (40, 64), (130, 129)]  # (N, K): ragged, aligned, a single one, none


def codes(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    """Return negative and positive codes, every third row large, one row of zeros."""
    out = torch.randint(-9, 10, (rows, columns), generator=generator)
    out[::3] = torch.randint(-127, 128, out[::3].shape, generator=generator)
    out[4:5] = 0
    return out.to(torch.int8)


def check(
    generator: torch.Generator,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    with_bias: bool,
    config: TileConfig | None,
    spread: bool = False,
) -> None:
    """Raise AssertionError unless the kernel's output is right in every bit and nothing else was written."""
    tokens, out_features, in_features = shape
    a, b = codes(generator, tokens, in_features), codes(generator, out_features, in_features)
    if spread:  # columns apart in a; rows apart in b
        a = a.repeat_interleave(2, dim=1)[:, ::2]
        b = torch.nn.functional.pad(b, (3, 5), value=77)[:, 3 : 3 + in_features]
    one = torch.ones(tokens, 1), torch.ones(out_features, 1)
    out, around = guarded(tokens, out_features, torch.float32)
    int8_scaled_mm.launch(out, a, b, *one, None, config)
    exact = a.long() @ b.long().T
    assert torch.equal(out.long(), exact), f"integer product, {shape}, {config}"
    assert int(around.isnan().sum()) == around.numel() - out.numel(), f"written outside, {shape}, {config}"

    a_scale, b_scale = torch.rand(tokens, 1, generator=generator), torch.rand(out_features, 1, generator=generator)
    b_scale = b_scale.to(torch.bfloat16)
    bias = torch.randn(out_features, generator=generator).to(torch.bfloat16) if with_bias else None
    out, around = guarded(tokens, out_features, dtype)
    int8_scaled_mm.launch(out, a, b, a_scale, b_scale, bias, config)
    in_float32 = generic.epilogue(exact.to(torch.int32), a_scale, b_scale, bias, torch.float32)
    expected = truncated(in_float32) if dtype == torch.bfloat16 else in_float32.to(dtype)
    assert torch.equal(out, expected), f"scaled product, {shape}, {dtype}, {config}"
    assert int(around.isnan().sum()) == around.numel() - out.numel(), f"written outside, {shape}, {config}"
    oracle = reference.scaled_mm(a, b, a_scale, b_scale, bias)
    size = exact.abs() * a_scale.double() * b_scale.double().T + (0 if bias is None else bias.double().abs())
    assert ((in_float32.double() - oracle).abs() <= 4 * 2.0**-24 * 1.01 * size).all(), f"oracle, {shape}"


def check_ops() -> None:
    """Raise AssertionError unless the ops take the kernel when told to, and give the bits of the other backend."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 40, generator=generator)
    weight, scale = formats.quantize_weight(torch.randn(24, 40, generator=generator), torch.int8)
    bias = torch.randn(24, generator=generator)
    launches = []
    launch = int8_scaled_mm.launch
    int8_scaled_mm.launch = lambda *arguments: launches.append(1) or launch(*arguments)
    calls = [functools.partial(ops.linear_dynamic, x, weight, scale, bias)]
    for weight_scale, input_scale in itertools.product((scale, torch.tensor([0.02])), (None, torch.tensor([0.01]))):
        calls += [functools.partial(ops.linear_tensor, x, weight, weight_scale, input_scale, bias)]
    for number, call in enumerate(calls, start=1):
        by_kernel = call("triton")
        assert len(launches) == number
        assert torch.equal(by_kernel, call("auto")), call
        assert len(launches) == number, "'auto' on the CPU must not take the kernel"
    int8_scaled_mm.launch = launch


def main() -> None:
    """Run all cases: each M and size as `tile_config` chooses, then each configuration at one ragged size."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    cases = 0
    for tokens in (0, 1, 3, 17, 64):
        for out_features, in_features in SIZES:
            dtype = dtypes[cases % 3]
            shape = (tokens, out_features, in_features)
            check(generator, shape, dtype, with_bias=cases % 2 == 0, config=None, spread=cases % 4 == 0)
            cases += 1
    for config in [*offline.configs("int8_scaled_mm", INTERPRETED), UNALIGNED]:
        for dtype, in_features in zip(dtypes, (70, 288, 128), strict=True):
            check(generator, (67, 131, in_features), dtype, with_bias=dtype != torch.float16, config=config)
            cases += 1
    # more row tiles than GROUP_M, so that programs are numbered in two bands, the second of them shorter
    check(generator, (16 * GROUP_M + 30, 130, 17), torch.float32, True, TileConfig(16, 64, 64, 4, 2))
    check_ops()
    print(cases + 2, "cases right")  # noqa: T201 (what the test reads)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "overflow encountered in cast")  # NaN to bfloat16, inside the interpreter
        main()
