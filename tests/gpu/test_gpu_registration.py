"""The ops on a GPU as torch sees them: opcheck, CUDA graphs, torch.compile, and every shipped configuration."""

import pytest
import torch
from gpu_calls import CALLS, CUDA, moved, on_gpu, random
from quantkit_kernels import configurations, formats, ops, sparse24, venom
from quantkit_kernels.backends import select_backend
from quantkit_kernels.errors import KernelError
from quantkit_kernels.registration import SCHEMAS

pytestmark = on_gpu
BF16, INT8, E4M3 = torch.bfloat16, torch.int8, torch.float8_e4m3fn


def arguments():
    """Return for each op its arguments but for the backend, on the GPU, in int8 where it offers that."""
    x = random(1, 16, 256, dtype=BF16).to(CUDA)
    weight = random(2, 128, 256, dtype=BF16).to(CUDA)
    codes, scale = formats.quantize_weight(weight, INT8)
    blocks = formats.quantize_weight(weight, E4M3, granularity="block")
    four = formats.quantize_weight(weight, INT8, 128, bits=4)
    experts = formats.quantize_weight(torch.stack([weight, -weight]), INT8)
    a, a_scale = formats.quantize_per_token(x, INT8)
    offsets = torch.tensor([0, 5, 16], dtype=torch.int32, device=CUDA)
    thin = codes * venom.mask(codes.float().abs(), 64, 8)  # which is 2:4 as well
    gate, columns = x[:, :128].relu(), (codes.t().contiguous(), scale)
    return {
        "quantize_per_token": (x, INT8),
        "quantize_per_tensor": (x, INT8, None),
        "quantize_per_group": (x, INT8),
        "rms_norm_quantize": (x, x[0].clone(), 1e-6, 0.0, INT8),
        "silu_mul_quantize": (x, x.flip(0), INT8),
        "dequantize": (codes, scale, BF16),
        "scaled_mm": (a, codes, a_scale, scale, None, BF16),
        "linear_dynamic": (x, codes, scale, None),
        "linear_tensor": (x, codes, scale, None, None),
        "linear_block": (x, *blocks, None),
        "linear_llm_int8": (x, codes, scale, None, 1.0),
        "linear_weight_only": (x, codes, scale, None),
        "linear_weight_only_packed": (x, formats.pack_int32(four[0], 4), four[1], None, 4),
        "linear_grouped": (x, *experts, offsets, "token"),
        "linear_sparse24": (x, *sparse24.pack(thin), scale, None),
        "linear_venom": (x, *venom.pack(thin, 64, 8), scale, None, 64, 8),
        "linear_sparse_input": (x.relu(), *columns, None),
        "mlp_sparse": (x, gate, codes, scale, None, codes[:, :64].contiguous(), scale[:64], None),
    }


def test_every_op_is_here():
    assert set(arguments()) == set(SCHEMAS)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("op", SCHEMAS)
def test_opcheck(op, backend):
    """Without the comparison that looks for changed arguments where these are fp8, which torch cannot compare."""
    known = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    tests = known[1:] if op == "linear_block" else known
    torch.library.opcheck(getattr(torch.ops.quantkit, op).default, (*arguments()[op], backend), test_utils=tests)


@pytest.mark.parametrize("tokens", [1, 16, 600])
@pytest.mark.parametrize("name", CALLS)
def test_cuda_graph(name, tokens):
    """A graph that was captured with some activations gives the bits of a plain call on others.

    Where cuBLAS multiplies a decoded weight it may choose otherwise in a graph: then it is near.
    """
    call = CALLS[name]
    tensors = moved(call.prepare(random(1, 128, 256, dtype=BF16)))
    first, second = (random(seed, tokens, 256, dtype=BF16, outliers=name == "llm-int8").to(CUDA) for seed in (2, 3))
    x = first.clone()
    try:
        call.run(x, tensors, None, "triton")
    except KernelError as error:
        pytest.skip(str(error))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call.run(x, tensors, None, "triton")
    for numbers in (first, second):
        x.copy_(numbers)
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        plain = call.run(numbers, tensors, None, "triton")
        if call.weights or name.startswith("zeros"):
            torch.testing.assert_close(out, plain, rtol=2.0**-6, atol=2.0**-6 * plain.abs().max().item())
        else:
            assert torch.equal(out, plain)


def test_cuda_graph_of_experts_follows_other_offsets():
    x, weight = random(1, 16, 256, dtype=BF16).to(CUDA), random(2, 4, 128, 256, dtype=BF16).to(CUDA)
    codes, scale = formats.quantize_weight(weight, INT8)
    offsets = torch.tensor([0, 1, 1, 9, 16], dtype=torch.int32, device=CUDA)
    ops.linear_grouped(x, codes, scale, offsets, "token", "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.linear_grouped(x, codes, scale, offsets, "token", "triton")
    for bounds in ([0, 1, 1, 9, 16], [0, 16, 16, 16, 16], [0, 0, 5, 6, 16]):
        offsets.copy_(torch.tensor(bounds, dtype=torch.int32))
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, ops.linear_grouped(x, codes, scale, offsets, "token", "torch"))


def test_torch_compile_sees_one_node():
    codes, scale = formats.quantize_weight(random(1, 128, 256, dtype=BF16).to(CUDA), INT8)
    compiled = torch.compile(lambda x: ops.linear_dynamic(x, codes, scale, None) * 2, fullgraph=True)
    for tokens in (1, 16, 33):
        x = random(tokens, tokens, 256, dtype=BF16).to(CUDA)
        assert torch.equal(compiled(x), ops.linear_dynamic(x, codes, scale, None) * 2)


def test_what_auto_takes():
    """Triton everywhere but for products of fp8 codes before sm_89."""
    before = configurations.architecture(CUDA) < 89
    for dtype in (INT8, E4M3):
        wanted = "torch" if before and dtype == E4M3 else "triton"
        assert select_backend("linear_dynamic", dtype, CUDA, "auto") == wanted
        assert select_backend("linear_weight_only", dtype, CUDA, "auto") == "triton"


def test_every_shipped_configuration_gives_the_right_result():
    """Of this card's table, each configuration of each kernel that the ops ask for, at a few sizes."""
    from quantkit_kernels.benchmarks.cases import activations
    from quantkit_kernels.benchmarks.tuning import candidates, gives_the_right_result, tunable

    seen, wrong = set(), []
    for name, case in tunable(()).items():
        experts = (4,) if case.kind == "experts" else ()
        weight = torch.randn(*experts, 512, 1024, dtype=BF16, device=CUDA) / 32
        for tokens in (1, 16, 200):
            operands = case.prepare(activations(tokens, 1024, BF16, case.outliers, "cuda"), weight)
            try:
                with configurations.trial({}) as attempt:
                    case.run(*operands)
            except KernelError:
                continue
            for kernel, *_ in attempt.asked:
                wrong += [
                    (name, tokens, kernel, config)
                    for config in candidates(kernel, configurations.architecture(CUDA))
                    if not gives_the_right_result(case, operands, kernel, config)
                ]
                seen.add(kernel)
    assert not wrong
    table = configurations.table(
        configurations.PACKAGE_TABLES / f"sm_{configurations.family(configurations.architecture(CUDA))}.json"
    )
    assert set(table.kernels) - seen <= {"grouped_half"}
