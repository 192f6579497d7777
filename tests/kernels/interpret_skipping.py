"""Program: the kernels that skip rows in Triton's interpreter, on CPU tensors, against float64.

Run by test_skipping_kernels.py in a process of its own with TRITON_INTERPRET=1. Rows that must not be read are full of
NaN. Prints how many cases were right.
"""

import math
from unittest import mock

import torch
from interpreting import guarded
from quantkit_kernels import formats, ops
from quantkit_kernels.gpu import skipping

BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
CUT = {BF16: 2.0**-7, FP16: 2.0**-11, FP32: 2.0**-24}
"""The largest relative error of one rounding in the interpreter, which cuts bfloat16 instead of rounding it."""

ROWS = {"block_n": 32, "block_k": 16, "num_warps": 1, "num_stages": 1}
NEURONS = {"block_n": 4, "block_k": 32, "num_warps": 1, "num_stages": 1}


def sparse(generator, tokens, in_features, share, dtype):
    """Return x [M, K] of which that share is zero, runs of it too, some of it -0.0; the first token is all zeros."""
    x = torch.randn(tokens, in_features, generator=generator) * 3
    x[torch.rand(x.shape, generator=generator) < share] = 0.0
    x[:, in_features // 2 : in_features // 2 + 40] = -0.0
    x[:1] = 0.0
    return x.to(dtype)


def weight_of(generator, rows, columns, dtype):
    """Return a weight and None, or int8 codes and the scales [rows or columns, 1] of both axes."""
    if dtype == INT8:
        codes = torch.randint(-128, 128, (rows, columns), generator=generator).to(INT8)
        return codes, (torch.rand(columns, 1, generator=generator) - 0.3), torch.rand(rows, 1, generator=generator)
    return torch.randn(rows, columns, generator=generator).to(dtype), None, None


def strided(tensor):
    """Return the same numbers with gaps between rows and columns."""
    return tensor.repeat_interleave(3, 0).repeat_interleave(2, 1)[::3, ::2]


def within(what, out, around, exact, size, terms, dtype):
    """Raise AssertionError unless the output keeps the bound of that many float32 roundings and one of its own."""
    bound = terms * 2.0**-24 * size
    bound += CUT[dtype] * (exact.abs() + bound) + 2.0**-126
    error = (out.double() - exact).abs()
    assert (error <= bound).all(), f"{what}: {float((error / bound).max())} of the bound"
    assert int(around.isnan().sum()) == around.numel() - out.numel(), f"written outside: {what}"


def check_rows(generator, shape, dtype, kind, share, config, spread=False):
    """Raise AssertionError unless a product is right, though rows that meet zeros of all tokens are NaN."""
    tokens, out_features, in_features = shape
    what = f"rows {shape}, {dtype}, {kind}, {share}, {config}"
    x = sparse(generator, tokens, in_features, share, dtype)
    weight, scale, _ = weight_of(generator, in_features, out_features, kind)
    bias = torch.randn(out_features, generator=generator).to(dtype) if in_features % 2 else None
    unread = (x == 0).all(0)
    exact, size = x.double() @ weight.double(), x.double().abs() @ weight.double().abs()
    if scale is not None:
        exact, size = exact * scale.double().view(-1), size * scale.double().abs().view(-1)
    else:
        weight[unread] = math.nan
        assert unread.any()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    out, around = guarded(tokens, out_features, dtype)
    x, weight = (strided(x), strided(weight)) if spread else (x, weight)
    skipping.launch(out, x, weight, scale, bias, config)
    within(what, out, around, exact, size, in_features + 4, dtype)


def check_neurons(generator, shape, dtype, kind, share, spread=False):
    """Raise AssertionError unless gated neurons are right, 0 where the gate is, though rows that none needs are NaN."""
    tokens, neurons, in_features = shape
    what = f"neurons {shape}, {dtype}, {kind}, {share}"
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    gate = sparse(generator, tokens, neurons, share, dtype)
    up, _, scale = weight_of(generator, neurons, in_features, kind)
    bias = torch.randn(neurons, generator=generator).to(dtype) if neurons % 2 else None
    exact, size = x.double() @ up.double().T, x.double().abs() @ up.double().abs().T
    if scale is not None:
        exact, size = exact * scale.double().view(-1), size * scale.double().view(-1)
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    exact, size = exact * gate.double(), size * gate.double().abs()
    unread = (gate == 0).all(0)
    if scale is None:
        up[unread] = math.nan
    if bias is not None:
        bias[unread] = math.nan
    out, around = guarded(tokens, neurons, FP32)
    x, gate, up = (strided(x), strided(gate), strided(up)) if spread else (x, gate, up)
    skipping.launch_neurons(out, x, gate, up, scale, bias, NEURONS)
    within(what, out, around, exact, size, in_features + 5, FP32)
    assert unread.any()
    assert (out[:, unread] == 0).all()


def products(generator) -> int:
    """Run products of all dtypes, at ragged sizes, with K in one part and more, and the configurations as shipped."""
    cases = [
        ((1, 33, 70), BF16, BF16, 0.5), ((3, 64, 128), FP16, FP16, 0.8), ((5, 7, 101), FP32, FP32, 0.9),
        ((16, 40, 128), BF16, BF16, 0.95), ((2, 33, 71), BF16, INT8, 0.5), ((3, 128, 128), FP32, INT8, 0.9),
        ((2, 9, 65), FP32, BF16, 0.8), ((2, 9, 65), BF16, FP32, 0.8),
    ]  # fmt: skip
    done = 0
    for number, (shape, dtype, kind, share) in enumerate(cases):
        for parts in (1, 3):
            check_rows(generator, shape, dtype, kind, share, {**ROWS, "parts": parts}, spread=number % 3 == 2)
            done += 1
    check_rows(generator, (2, 24, 257), BF16, BF16, 0.9, None)
    check_rows(generator, (1, 24, 96), FP16, INT8, 0.9, None)
    return done + 2


def gated(generator) -> int:
    """Run neurons of all dtypes at ragged sizes."""
    cases = [
        ((1, 81, 70), BF16, BF16, 0.5), ((3, 64, 128), FP16, FP16, 0.8), ((2, 101, 33), FP32, FP32, 0.95),
        ((2, 81, 65), BF16, INT8, 0.9),
    ]  # fmt: skip
    for number, case in enumerate(cases):
        check_neurons(generator, *case, spread=number == 2)
    return len(cases)


def check_ops(generator) -> int:
    """Raise AssertionError unless the ops take the kernels when told to, and for no tokens or in features too."""
    x = sparse(generator, 3, 96, 0.9, FP16).view(3, 1, 96)
    weight, bias = torch.randn(96, 24, generator=generator).to(FP16), torch.randn(24, generator=generator).to(FP16)
    with mock.patch.object(skipping, "launch", side_effect=skipping.launch) as launch:
        by_kernel = ops.linear_sparse_input(x, weight, None, bias, "triton")
        by_torch = ops.linear_sparse_input(x, weight, None, bias)
        assert launch.call_count == 1, "'auto' on the CPU must not take the kernel"
        assert torch.allclose(by_kernel.float(), by_torch.float(), rtol=2e-3, atol=2e-2)
        assert torch.equal(by_kernel[0, 0], bias), "a token of zeros gives the bias"
        assert ops.linear_sparse_input(x[:0], weight, None, bias, "triton").shape == (0, 1, 24)
        empty = ops.linear_sparse_input(x[..., :0], weight[:0], None, bias, "triton")
        assert torch.equal(empty, bias.expand(3, 1, 24))
        many = sparse(generator, skipping.FEW_TOKENS + 1, 96, 0.5, FP32)
        calls = launch.call_count
        ops.linear_sparse_input(many, weight.float(), None, None, "triton")
        assert launch.call_count == calls, "many tokens are one product"
    for kind in (FP32, INT8):
        up, down = torch.randn(96, 40, generator=generator), torch.randn(96, 24, generator=generator)
        up_scale = down_scale = None
        if kind == INT8:
            up, up_scale = formats.quantize_weight(up, INT8)
            down, down_scale = formats.quantize_weight(down.t(), INT8)
            down = down.t().contiguous()
        token = torch.randn(3, 1, 40, generator=generator)
        taken = (token, x.float(), up, up_scale, torch.randn(96, generator=generator), down, down_scale, bias.float())
        by_kernel, by_torch = ops.mlp_sparse(*taken, "triton"), ops.mlp_sparse(*taken)
        assert torch.allclose(by_kernel, by_torch, rtol=1e-5, atol=1e-4), kind
    return 3


def check_nan(generator) -> int:
    """Raise AssertionError unless NaN in x is one of the numbers that aren't zero."""
    x = torch.zeros(1, 64)
    x[0, 40] = math.nan
    out = torch.zeros(1, 8)
    skipping.launch(out, x, torch.ones(64, 8), None, None, ROWS)
    assert out.isnan().all()
    skipping.launch_neurons(out, torch.ones(1, 64), torch.full((1, 8), math.nan), torch.ones(8, 64), None, None)
    assert out.isnan().all()
    return 1


def main() -> None:
    """Run all cases."""
    generator = torch.Generator().manual_seed(0)
    cases = products(generator) + gated(generator) + check_ops(generator) + check_nan(generator)
    print(cases, "cases right")  # noqa: T201 (what the test reads)


if __name__ == "__main__":
    main()
