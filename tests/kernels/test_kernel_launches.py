"""What is launched, and that nothing waits for the device: the launchers on tensors that hold no numbers.

A meta tensor has a shape and no numbers. Code that asks for one (`.item()`, `.tolist()`, a branch, a shape that depends
on it) raises. So a launcher that goes through could be captured in a CUDA graph.
"""

import pytest
import torch
from quantkit_kernels import formats, generic

pytest.importorskip("triton", reason="Triton exists on Linux only")

from quantkit_kernels.gpu import grouped, llm_int8, quantization

E4M3 = torch.float8_e4m3fn
KERNELS = {
    quantization: ("quantize_rows_kernel", "quantize_groups_kernel", "largest_kernel", "quantize_tensor_kernel"),
    llm_int8: ("find_columns_kernel", "quantize_rest_kernel", "product_kernel", "token_kernel"),
    grouped: ("grouped_kernel",),
}


@pytest.fixture
def launches(monkeypatch):
    """Return a list that gets the name and the programs of each kernel instead of its launch."""
    found: list[tuple[str, tuple[int, ...]]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *arguments, **constants: found.append((self.name, grid))

    for module, names in KERNELS.items():
        for name in names:
            assert hasattr(module, name)
            monkeypatch.setattr(module, name, Recorder(name.removesuffix("_kernel")))
    return found


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_meta_tensors_do_refuse_what_waits():
    with pytest.raises((RuntimeError, NotImplementedError)):
        generic.linear_grouped(meta(4, 8), meta(2, 8, 8), meta(2, 8, 1), meta(3, dtype=torch.int32), "none")


@pytest.mark.parametrize("dtype", formats.QMAX)
def test_quantization(launches, dtype):
    x = meta(32, 256)
    quantization.quantize_per_token(x, dtype)
    quantization.quantize_per_group(x, dtype)
    quantization.rms_norm_quantize(x, meta(256), 1e-6, 1.0, dtype)
    quantization.silu_mul_quantize(x, x, dtype)
    quantization.quantize_per_tensor(x, dtype, meta(1, dtype=torch.float32))
    assert launches == [
        ("quantize_rows", (32,)),
        ("quantize_groups", (8,)),
        ("quantize_rows", (32,)),
        ("quantize_rows", (32,)),
        ("quantize_tensor", (32,)),
    ]
    launches.clear()
    codes, scale = quantization.quantize_per_tensor(x, dtype)
    assert launches == [("largest", (32,)), ("quantize_tensor", (32,))]
    assert (codes.dtype, scale.shape) == (dtype, (1,))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, []),
        (1, [("token", (256,))]),
        (3, [("quantize_rest", (4,)), ("product", (128,))]),
        (16, [("quantize_rest", (17,)), ("product", (128,))]),
        (2048, [("find_columns", (8, 16)), ("quantize_rest", (2049,)), ("product", (512,))]),
    ],
)
def test_llm_int8(launches, tokens, expected):
    weight, scale = meta(4096, 1024, dtype=torch.int8), meta(4096, 1, dtype=torch.float32)
    out = llm_int8.linear_llm_int8(meta(tokens, 1024), weight, scale, meta(4096), 6.0)
    assert out.shape == (tokens, 4096)
    assert launches == expected


@pytest.mark.parametrize(("dtype", "activations"), [(torch.int8, "token"), (E4M3, "token"), (E4M3, "none")])
def test_grouped(launches, dtype, activations):
    """8 tokens of 128 experts are 8 tiles at most; 1000 tokens of 4 experts in tiles of 128 are 996 // 128 + 4 = 11."""
    for tokens, experts, tiles in ((8, 128, 8 * 4), (1000, 4, 11 * 2)):
        weight, scale = meta(experts, 256, 512, dtype=dtype), meta(experts, 256, 1)
        offsets = meta(experts + 1, dtype=torch.int32)
        out = grouped.linear_grouped(meta(tokens, 512), weight, scale, offsets, activations)
        assert out.shape == (tokens, 256)
        before = [("quantize_rows", (tokens,))] if activations == "token" else []
        assert launches == [*before, ("grouped", (tiles,))]
        launches.clear()
