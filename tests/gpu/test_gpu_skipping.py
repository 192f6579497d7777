"""Products that skip rows on a GPU: rows that meet zeros aren't read, in a CUDA graph those of its own replay."""

import math

import pytest
import torch
from gpu_calls import CUDA, FLOATS, on_gpu, random
from quantkit_kernels import formats, ops, reference

pytestmark = on_gpu
BF16, INT8 = torch.bfloat16, torch.int8


def sparse(seed, *shape, dtype):
    """Return numbers of which nine tenths are zero."""
    generator = torch.Generator().manual_seed(seed)
    return random(seed, *shape, dtype=dtype).masked_fill(torch.rand(shape, generator=generator) < 0.9, 0.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_rows_that_meet_zeros_are_not_read(dtype, tokens):
    """NaN times zero is NaN: what is read of them reaches the output."""
    for in_features, out_features in ((512, 384), (333, 77)):
        x, weight = sparse(1, tokens, in_features, dtype=dtype), random(2, in_features, out_features, dtype=dtype)
        exact, size = reference.linear_sparse_input(x, weight, None, None), x.double().abs() @ weight.double().abs()
        weight[(x == 0).all(0)] = math.nan
        out = ops.linear_sparse_input(x.to(CUDA), weight.to(CUDA), None, None, "triton").cpu().double()
        bound = (in_features + 4) * 2.0**-23 * size + 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-30
        assert ((out - exact).abs() <= bound).all()


def test_a_graph_skips_what_its_own_replay_has_zero():
    weight = random(2, 512, 256, dtype=BF16).to(CUDA)
    x = sparse(1, 1, 512, dtype=BF16).to(CUDA)
    ops.linear_sparse_input(x, weight, None, None, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.linear_sparse_input(x, weight, None, None, "triton")
    for seed in (3, 4):
        numbers = sparse(seed, 1, 512, dtype=BF16).to(CUDA)
        expected = ops.linear_sparse_input(numbers, weight, None, None, "triton").clone()
        kept = weight.clone()
        weight[numbers[0] == 0] = math.nan
        x.copy_(numbers)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
        weight.copy_(kept)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("tokens", [0, 1, 5, 16, 40])
def test_gated_mlp(tokens, kind, backend):
    x, gate = random(1, tokens, 256, dtype=BF16), sparse(2, tokens, 384, dtype=BF16)
    up, down = random(3, 384, 256, dtype=BF16), random(4, 192, 384, dtype=BF16)
    up_scale = down_scale = None
    if kind == "int8":
        (up, up_scale), (down, down_scale) = (formats.quantize_weight(each, INT8) for each in (up, down))
    taken = (x, gate, up, up_scale, None, down.t().contiguous(), down_scale, None)
    exact = reference.mlp_sparse(*taken)
    out = ops.mlp_sparse(*(each if each is None else each.to(CUDA) for each in taken), backend).cpu().double()
    assert out.shape == exact.shape
    assert not tokens or (out - exact).norm() <= 2.0**-7 * exact.norm()
