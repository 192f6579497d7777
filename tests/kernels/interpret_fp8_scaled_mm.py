"""Program: the fp8 kernel in Triton's interpreter, on CPU tensors, against exact sums and against float64.

Run by test_fp8_scaled_mm.py in a process of its own with TRITON_INTERPRET=1. Prints how many cases were right.
"""

import functools
import itertools
import warnings
from unittest import mock

import offline
import pytest
import torch
from interpreting import fp8_codes, guarded, stored, whole_codes
from quantkit_kernels import formats, generic, ops, reference
from quantkit_kernels.configurations import INTERPRETED
from quantkit_kernels.errors import KernelError
from quantkit_kernels.gpu import fp8_scaled_mm
from quantkit_kernels.gpu.tiles import GROUP_M, UNALIGNED, TileConfig

SIZES = [(1, 1), (7, 0), (33, 70), (40, 64), (130, 129)]  # (N, K): ragged, aligned, a single one, none
DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
"""Relative error of the last rounding; the interpreter cuts bfloat16 off (2**-7) instead of rounding it (2**-8)."""


def check_exactly(
    generator: torch.Generator, shape: tuple[int, int, int], out_dtype: torch.dtype, config: TileConfig | None
) -> None:
    """Raise AssertionError unless sums that float32 holds exactly come out so in every bit, scaled as specified."""
    tokens, out_features, in_features = shape
    a = whole_codes(generator, tokens, in_features, DTYPES[0])
    b = whole_codes(generator, out_features, in_features, DTYPES[0])
    a_scale, b_scale = torch.rand(tokens, 1, generator=generator), torch.rand(out_features, 1, generator=generator)
    bias = torch.randn(out_features, generator=generator)
    out, around = guarded(tokens, out_features, out_dtype)
    fp8_scaled_mm.launch(out, a, b, a_scale, b_scale, bias, config)
    exact = (a.double() @ b.double().T).float()
    expected = stored(generic.epilogue(exact, a_scale, b_scale, bias, torch.float32), out_dtype)
    assert torch.equal(out, expected), f"exact sums, {shape}, {out_dtype}, {config}"
    assert int(around.isnan().sum()) == around.numel() - out.numel(), f"written outside, {shape}, {config}"


def check(
    generator: torch.Generator,
    shape: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    one_scale: tuple[bool, bool],
    with_bias: bool,
    config: TileConfig | None = None,
    spread: bool = False,
) -> None:
    """Raise AssertionError unless the kernel's output is within its bound of float64, and nothing else was written.

    Products of two codes are exact in float32 (at most 8 bits), so only additions round: any order of K of them
    errs by at most K * 2**-24 * 1.01 * (|a| @ |b|.T) (Higham, Accuracy and Stability, 2002, equation 3.5; padding
    adds zeros, exactly). The epilogue adds 4 roundings, storing one more.
    """
    tokens, out_features, in_features = shape
    codes, out_dtype = dtypes
    a, b = fp8_codes(generator, tokens, in_features, codes), fp8_codes(generator, out_features, in_features, codes)
    if spread:  # columns apart in a; rows apart in b
        a = a.repeat_interleave(2, dim=1)[:, ::2]
        b = torch.nn.functional.pad(b.view(torch.uint8), (3, 5), value=77).view(codes)[:, 3 : 3 + in_features]
    largest = formats.QMAX[codes]
    a_scale = torch.rand((1,) if one_scale[0] else (tokens, 1), generator=generator) / largest
    b_scale = torch.rand((1,) if one_scale[1] else (out_features, 1), generator=generator).to(torch.bfloat16) / largest
    bias = torch.randn(out_features, generator=generator).to(torch.bfloat16) if with_bias else None
    out, around = guarded(tokens, out_features, out_dtype)
    fp8_scaled_mm.launch(out, a, b, a_scale, b_scale, bias, config)
    scales = a_scale.double().view(-1, 1) * b_scale.double().view(1, -1)
    oracle = (a.double() @ b.double().T) * scales + (0 if bias is None else bias.double())
    size = (a.double().abs() @ b.double().abs().T) * scales + (0 if bias is None else bias.double().abs())
    bound = (in_features + 4) * 2.0**-24 * 1.01 * size + ROUNDING[out_dtype] * 1.01 * size + 2.0**-25
    what = f"{shape}, {dtypes}, {one_scale}, {config}"
    assert ((out.double() - oracle).abs() <= bound).all(), f"scaled product, {what}"
    assert int(around.isnan().sum()) == around.numel() - out.numel(), f"written outside, {what}"


def check_ops() -> int:
    """Raise AssertionError unless the ops take the kernel when told to and are right; return how many calls were."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 40, generator=generator)
    bias = torch.randn(24, generator=generator)
    calls = []
    for dtype in DTYPES:
        weight, scale = formats.quantize_weight(torch.randn(24, 40, generator=generator), dtype)
        calls.append((functools.partial(ops.linear_dynamic, x, weight, scale, bias), reference.linear_dynamic))
        for weight_scale, input_scale in itertools.product((scale, scale.amax().view(1)), (None, torch.tensor([0.01]))):
            arguments = (x, weight, weight_scale, input_scale, bias)
            calls.append((functools.partial(ops.linear_tensor, *arguments), reference.linear_tensor))
    launches = []
    launch = fp8_scaled_mm.launch
    with mock.patch.object(fp8_scaled_mm, "launch", lambda *some: launches.append(1) or launch(*some)):
        for number, (call, oracle) in enumerate(calls, start=1):
            by_kernel, expected = call("triton"), oracle(*call.args)
            assert len(launches) == number
            # at most 44 roundings of a sum whose terms are at most absmax(x) * absmax(w) = 3.5 * 3.5 each, 1 for bias
            assert ((by_kernel.double() - expected).abs() <= 44 * 2.0**-24 * 1.01 * (40 * 3.5**2 + 3.5)).all(), call
            call("auto")
            assert len(launches) == number, "'auto' on the CPU must not take the kernel"
    return len(calls)


def check_refusal() -> None:
    """Raise AssertionError unless a device without fp8 products is refused, with what to do instead."""
    a = torch.zeros(16, 32).to(DTYPES[0])
    one = torch.ones(16, 1)
    said = pytest.raises(KernelError, match=r"sm_86.*use backend 'auto' or 'torch'")
    with mock.patch.object(fp8_scaled_mm, "architecture", return_value=86), said:
        fp8_scaled_mm.scaled_mm(a, a, one, one, None, torch.float32)


def main() -> None:
    """Run all cases: each M and size as `tile_config` chooses, then each configuration at one ragged size."""
    generator = torch.Generator().manual_seed(0)
    out_dtypes = (torch.float32, torch.bfloat16, torch.float16)
    kinds = list(itertools.product(DTYPES, (False, True), (False, True)))
    cases = 0
    for tokens, (out_features, in_features) in itertools.product((0, 1, 3, 17, 64), SIZES):
        codes, *one_scale = kinds[cases % len(kinds)]
        shape, out_dtype = (tokens, out_features, in_features), out_dtypes[cases % 3]
        check(generator, shape, (codes, out_dtype), one_scale, cases % 2 == 0, spread=cases % 4 == 0)
        check_exactly(generator, shape, out_dtype, None)
        cases += 2
    for config in [*offline.configs("fp8_scaled_mm", INTERPRETED), UNALIGNED]:
        for in_features, out_dtype in ((70, torch.float32), (288, torch.bfloat16), (128, torch.float16)):
            shape = (67, 131, in_features)
            check(generator, shape, (DTYPES[cases % 2], out_dtype), (False, False), out_dtype != torch.float16, config)
            check_exactly(generator, shape, out_dtype, config)
            cases += 2
    # more row tiles than GROUP_M, so that programs are numbered in two bands, the second of them shorter
    check_exactly(generator, (16 * GROUP_M + 30, 130, 17), torch.float32, TileConfig(16, 64, 64, 4, 2))
    cases += 1 + check_ops()
    check_refusal()
    print(cases + 1, "cases right")  # noqa: T201 (what the test reads)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "overflow encountered in cast")  # NaN to bfloat16, inside the interpreter
        main()
