"""Products on a CPU that skip rows: right by float64, blind to rows that they need not read, and told which way ran."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantkit_kernels import cpu_skipping, formats, ops, reference
from quantkit_kernels.backends import counted
from quantkit_kernels.errors import KernelError

BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
ROWS = "linear_sparse_input, all rows"


def sparse(tokens, features, share, dtype, seed=0):
    """Return numbers [M, K] of which that share is zero; the first token is all zeros where there are several."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator)
    x[torch.rand(x.shape, generator=generator) < share] = 0.0
    if tokens > 1:
        x[0] = 0.0
    return x.to(dtype)


def weight_of(rows, columns, dtype, seed=1):
    """Return a weight [rows, columns] and None, or int8 codes and scales [columns, 1]."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if dtype != INT8:
        return weight.to(dtype), None
    codes, scale = formats.quantize_weight(weight.t(), INT8)
    return codes.t().contiguous(), scale


def check(out, exact, size, terms, bias=None):
    """Assert the bound of the op: float32 roundings of the sum of magnitudes, then two roundings to the output's dtype.

    The first of these is of the sum without the bias, which may be larger by the bias.
    """
    unit = torch.finfo(out.dtype).eps / 2
    bound = terms * 2.0**-24 * size
    before = exact.abs() if bias is None else exact.abs() + bias.double().abs()
    bound += 2.02 * unit * (before + bound) + torch.finfo(out.dtype).tiny
    error = (out.double() - exact).abs()
    assert (error <= bound).all(), f"{float((error / bound).max())} of the bound"


def magnitudes(x, weight, scale, bias):
    """Return the sum of magnitudes [M, N] of a product in float64."""
    size = x.double().abs() @ weight.double().abs()
    size = size if scale is None else size * scale.double().abs().view(-1)
    return size if bias is None else size + bias.double().abs()


@pytest.mark.parametrize("kind", [FP32, BF16, FP16, INT8])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_products_are_right_however_many_tokens_and_zeros(dtype, kind):
    for tokens, share, out_features in ((0, 0.5, 33), (1, 0.9, 128), (1, 0.0, 33), (5, 0.9, 128), (40, 0.0, 33)):
        x = sparse(tokens, 70, share, dtype)
        weight, scale = weight_of(70, out_features, kind)
        bias = torch.randn(out_features).to(dtype) if tokens % 2 else None
        for given_x, rows in ((x, weight), (x.t().contiguous().t(), weight.t().contiguous().t())):
            out = ops.linear_sparse_input(given_x, rows, scale, bias)
            assert out.shape == (tokens, out_features)
            assert out.dtype == dtype
            # floats of another dtype are cast to x's: one more rounding of each weight
            cast = kind.is_floating_point and torch.finfo(kind).eps < torch.finfo(dtype).eps
            terms = 74 + (2.0**24 * torch.finfo(dtype).eps if cast else 0)
            check(
                out,
                reference.linear_sparse_input(x, weight, scale, bias),
                magnitudes(x, weight, scale, bias),
                terms,
                bias,
            )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_rows_that_meet_zeros_are_not_read(dtype, threads):
    """NaN times zero is NaN: what is read of them reaches the output."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens in (1, 3):
            x, (weight, _) = sparse(tokens, 64, 0.9, dtype), weight_of(64, 256, dtype)
            exact, size = reference.linear_sparse_input(x, weight, None, None), magnitudes(x, weight, None, None)
            weight[(x == 0).all(0)] = math.nan
            assert weight.isnan().any()
            with counted() as calls:
                check(ops.linear_sparse_input(x, weight, None, None), exact, size, 68)
            assert {call.op for call in calls} == {"linear_sparse_input"}
    finally:
        torch.set_num_threads(before)


def test_a_product_with_all_rows_is_counted_as_one():
    """The rule is arithmetic: (1.6 + 0.065 M) * K rows read by themselves take as long as all rows in one product."""
    weight, _ = weight_of(64, 32, FP32)
    for tokens, nonzero, everything in ((1, 64, False), (4, 30, True), (4, 29, False), (20, 10, True), (20, 9, False)):
        x = torch.zeros(tokens, 64)
        x[:, :nonzero] = 1.0
        assert tokens == 1 or (nonzero * tokens > (1.6 + tokens * 0.065) * 64) is everything
        with counted() as calls:
            out = ops.linear_sparse_input(x, weight, None, None)
        assert any(call.op == ROWS for call in calls) is everything
        assert torch.allclose(out, x @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3])
def test_tokens_of_zeros_give_the_bias(tokens):
    x, bias = torch.zeros(tokens, 64), torch.randn(1024)
    for kind in (FP32, INT8):
        weight, scale = weight_of(64, 1024, kind)
        assert torch.equal(ops.linear_sparse_input(x, weight, scale, bias), bias.expand(tokens, -1))
    packed = cpu_skipping.pack_rows(weight)
    assert torch.equal(cpu_skipping.linear_of_rows(x, packed, scale, bias, torch.zeros_like), bias.expand(tokens, -1))
    gate, up = torch.zeros(tokens, 64), torch.randn(64, 8)
    out = ops.mlp_sparse(torch.randn(tokens, 8), gate, up, None, None, torch.randn(64, 1024), None, bias)
    assert torch.equal(out, bias.expand(tokens, -1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.sampled_from([1, 7, 512, 1024]), st.integers(0, 2**31 - 1))
def test_packed_rows_hold_the_codes(rows, columns, seed):
    codes = torch.randint(-128, 128, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(INT8)
    packed = cpu_skipping.pack_rows(codes)
    assert torch.equal(packed.codes(), codes)
    assert packed.table.numel() == rows * (columns + 8 * max(1, columns // 512 if columns % 512 == 0 else 1))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("columns", [40, 1024])
def test_packed_rows_give_the_product(columns, dtype):
    codes, scale = weight_of(70, columns, INT8)
    packed, bias = cpu_skipping.pack_rows(codes), torch.randn(columns).to(dtype)
    for tokens, share in ((1, 0.9), (1, 0.0), (4, 0.8), (40, 0.0), (40, 0.9), (0, 0.0)):
        x = sparse(tokens, 70, share, dtype)
        with counted() as calls:
            out = cpu_skipping.linear_of_rows(
                x, packed, scale, bias, lambda x: reference.linear_sparse_input(x, codes, scale, bias).to(x.dtype)
            )
        exact = reference.linear_sparse_input(x, codes, scale, bias)
        size = 383 * x.double().abs().sum(1, keepdim=True) * scale.double().view(1, -1) + bias.double().abs()
        check(out, exact, size, 74, bias)
        assert {call.op for call in calls} == {ROWS if share == 0 else "linear_sparse_input"}


def test_packed_rows_that_meet_zeros_are_not_read():
    codes, scale = weight_of(64, 1024, INT8)
    packed, x = cpu_skipping.pack_rows(codes), sparse(3, 64, 0.9, FP32)
    exact = cpu_skipping.linear_of_rows(x, packed, scale, None, torch.zeros_like)
    unread = (x == 0).all(0)
    packed.table[unread.repeat_interleave(packed.parts), -8:] = torch.tensor([math.nan, math.nan]).view(torch.uint8)
    assert torch.equal(cpu_skipping.linear_of_rows(x, packed, scale, None, torch.zeros_like), exact)
    packed.table[:, -8:] = packed.table[unread.nonzero()[0] * packed.parts, -8:]
    assert cpu_skipping.linear_of_rows(x[1:], packed, scale, None, torch.zeros_like).isnan().all()


@pytest.mark.parametrize("kind", [FP32, BF16, INT8])
@pytest.mark.parametrize("share", [0.9, 0.0])
@pytest.mark.parametrize("tokens", [0, 1, 3, 9])
def test_gated_neurons(tokens, share, kind):
    """Also with NaN in all that neurons without a gate have; the error is that of both products and of rounding h."""
    dtype = FP32 if kind == INT8 else kind
    x, gate = torch.randn(tokens, 40).to(dtype), sparse(tokens, 70, share, dtype, seed=2)
    up, up_scale = weight_of(40, 70, kind)
    up = up.t().contiguous()
    down, down_scale = weight_of(70, 128, kind, seed=3)
    up_bias, down_bias = torch.randn(70).to(dtype), torch.randn(128).to(dtype)
    exact = reference.mlp_sparse(x, gate, up, up_scale, up_bias, down, down_scale, down_bias)
    hidden = magnitudes(x, up.t(), up_scale, up_bias) * gate.double().abs()
    size = magnitudes(hidden, down, down_scale, down_bias)
    unread = (gate == 0).all(0)
    if kind != INT8 and 0 < tokens <= cpu_skipping.GATHERED_TOKENS and share:
        for tensor in (up, up_bias, down):
            tensor[unread] = math.nan
    with counted() as calls:
        out = ops.mlp_sparse(x, gate, up, up_scale, up_bias, down, down_scale, down_bias)
    check(out, exact, size, 170 + 4 * 2.0**24 * torch.finfo(dtype).eps / 2, down_bias)
    gathered = bool(0 < tokens <= cpu_skipping.GATHERED_TOKENS and share)
    assert any(call.op == "mlp_sparse, all rows" for call in calls) is not gathered


def test_arguments_that_do_not_fit_are_refused():
    x, weight = torch.randn(2, 8), torch.randn(8, 4)
    codes, scale = weight_of(8, 4, INT8)
    for taken, said in (
        ((x, torch.randn(7, 4), None, None), r"x is torch.float32 \[2, 8\]: expected \[..., 7\]"),
        ((x, codes, None, None), "weight_scale goes with int8"),
        ((x, weight, scale, None), "None with floats"),
        ((x, codes, scale.t(), None), r"expected float \[4, 1\]"),
        ((x, weight, None, torch.randn(3)), r"bias is torch.float32 \[3\]"),
    ):
        with pytest.raises(KernelError, match=said):
            ops.linear_sparse_input(*taken)
    up = torch.randn(6, 8)
    for gate, down, said in (
        (torch.randn(2, 5), torch.randn(6, 4), r"gate is .* expected torch.float32 \[2, 6\]"),
        (torch.randn(2, 6), torch.randn(5, 4), "as many rows"),
        (torch.randn(2, 6).to(BF16), torch.randn(6, 4), "gate is torch.bfloat16"),
    ):
        with pytest.raises(KernelError, match=said):
            ops.mlp_sparse(x, gate, up, None, None, down, None, None)
