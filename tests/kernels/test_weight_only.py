"""The weight-only Triton kernels without a GPU: numbers in the interpreter, instructions from the compiler."""

import ast
import inspect
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

import offline
from quantkit_kernels import formats, ops, reference
from quantkit_kernels.gpu import dequantize, units, weight_only

MMA_SYNC = {"bf16": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
            "fp16": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32"}  # fmt: skip
WGMMA = {"bf16": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16",
         "fp16": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.f16\.f16"}  # fmt: skip
TCGEN05 = dict.fromkeys(("bf16", "fp16"), r"tcgen05\.mma\.cta_group::1\.kind::f16")
INSTRUCTION = {80: MMA_SYNC, 86: MMA_SYNC, 89: MMA_SYNC, 90: WGMMA, 100: TCGEN05, 120: MMA_SYNC}
"""What a product becomes: the weight is its left operand, so that its rows are out features, and few tokens will do."""


def check_compiled(lines) -> None:
    """Assert for each compilation: the instruction, no spills, memory within limits, and 16 bytes in every load."""
    for line in lines:
        by_tiles = line["kernel"] == "tiles"
        offline.check(line, INSTRUCTION[line["architecture"]][line["dtype"]] if by_tiles else "")
        if line["kernel"] == "token" and line["aligned"]:
            assert any(".v4.b32" in load for load in line["loads"]), line


def test_interpreter(tmp_path):
    out = offline.run("interpret_weight_only.py", cache=tmp_path, interpret=True)
    assert out.strip() == "85 cases right"


def test_compiles_to_tensor_cores_on_every_target(tmp_path):
    lines = offline.lines("compile_weight_only.py", "one", "80", "86", "89", "90", "100", cache=tmp_path)
    assert [line["architecture"] for line in lines[::2]] == [80, 86, 89, 90, 100]
    check_compiled(lines)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", sorted(INSTRUCTION))
def test_every_configuration_compiles_to_tensor_cores(tmp_path, architecture):
    check_compiled(offline.lines("compile_weight_only.py", "all", str(architecture), cache=tmp_path))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("groups", [None, 1, 7])
def test_dequantize_op(dtype, groups):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 70, generator=generator)
    codes, scale = formats.quantize_weight(
        weight, dtype, None if groups in (None, 1) else 70 // groups, granularity="tensor" if groups is None else "row",
        scale_dtype=torch.bfloat16,
    )  # fmt: skip
    out = ops.dequantize(codes.t().contiguous().t(), scale, torch.float16)
    assert out.is_contiguous()
    expected = reference.decoded_weight(codes, scale.expand(9, 1) if groups is None else scale, torch.float16)
    assert torch.equal(out.double(), expected)


def test_ways_and_where_scales_are_applied():
    def way(tokens, in_features, dtype=torch.bfloat16, weight=torch.int8, groups=1, bits=None):
        x, scale = torch.empty(tokens, in_features, dtype=dtype), torch.empty(8, groups)
        width = in_features if bits is None else formats.packed_words(in_features, bits)
        return weight_only.way(x, torch.empty(8, width, dtype=torch.int32 if bits else weight), scale, bits)

    assert way(1, 4096) == way(1, 4096, torch.float32) == way(1, 4096, bits=4, groups=32) == "token"
    assert way(2, 4096) == way(weight_only.WHOLE_TOKENS, 4096, torch.float16) == way(1, 70) == "tiles"
    assert way(weight_only.WHOLE_TOKENS + 1, 4096) == way(2, 4096, torch.float32) == way(2, 70, bits=3) == "whole"
    assert way(2, 60, bits=4, groups=6) == "whole"
    assert way(1, 320, groups=40) == way(1, 96, bits=4, groups=6) == "tiles"  # a thread's 16 bytes, but two groups
    assert weight_only.scales_and_depth(4096, 1, 8, 256) == ("row", 256)
    assert weight_only.scales_and_depth(4096, 1, 8, 64) == ("row", 128)
    assert weight_only.scales_and_depth(128, 32, 8, 256) == ("step", 128)
    assert weight_only.scales_and_depth(384, 32, 1, 64) == ("step", 64)
    assert weight_only.scales_and_depth(64, 64, 8, 128) == ("code", 128)
    assert weight_only.scales_and_depth(32, 64, 1, 128) == ("code", 128)


def test_nothing_waits_for_the_device():
    """Launches can be captured in a CUDA graph: they look at shapes, strides, addresses, never at numbers."""
    waiting = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "unique", "bool"}
    for module in (weight_only, units, dequantize):
        tree = ast.parse(Path(inspect.getfile(module)).read_text(encoding="utf-8"))
        called = {
            node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "attr")
        }
        assert not called & waiting
