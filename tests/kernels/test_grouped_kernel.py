"""The kernel for experts without a GPU: numbers in the interpreter, instructions and memory from the compiler.

The two cannot share a process (an interpreted kernel cannot be compiled), so each is a program beside this file.
"""

import pytest

pytest.importorskip("triton", reason="Triton exists on Linux only")

import offline

SYNC = r"mma\.sync\.aligned\.m16n8k{}\.row\.col\.(satfinite\.)?{}"
HALF = r"(bf16\.bf16|f16\.f16)"
INSTRUCTION = {
    "int8": SYNC.format(32, r"s32\.s8\.s8\.s32"),
    "fp8": SYNC.format(32, r"f32\.e(4m3\.e4m3|5m2\.e5m2)\.f32"),
    "half": SYNC.format(16, rf"f32\.{HALF}\.f32"),
    "float": SYNC.format(16, rf"f32\.{HALF}\.f32"),
}
"""What each kind of product becomes."""
WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k{}\.{}"
NEWER = {
    (90, "int8"): WGMMA.format(32, r"s32\.s8\.s8"),
    (90, "fp8"): WGMMA.format(32, r"f32\.e(4m3\.e4m3|5m2\.e5m2)"),
    (90, "float"): INSTRUCTION["float"] + "|" + WGMMA.format(16, rf"f32\.{HALF}"),
    (100, "fp8"): INSTRUCTION["fp8"] + r"|tcgen05\.mma[\w.:]*kind::f8f6f4",
    (100, "float"): INSTRUCTION["float"] + r"|tcgen05\.mma[\w.:]*kind::f16",
}
"""What it becomes on architectures that have more than `mma.sync`. On sm_90 floats with few tokens use `mma.sync`: the
weight is the right operand, and `wgmma` needs 64 rows on the left."""
ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def check_compiled(lines: list[dict[str, object]]) -> None:
    """Assert for each compilation: the tensor core instruction, shared memory, spills and separate roundings."""
    for line in lines:
        offline.check(line, NEWER.get((line["architecture"], line["kind"]), INSTRUCTION[line["kind"]]))
        assert line["fused"] == 0, line


def test_interpreter(tmp_path):
    out = offline.run("interpret_grouped.py", cache=tmp_path, interpret=True)
    assert out.strip() == "66 cases right"


def test_compiles_to_tensor_cores(tmp_path):
    lines = offline.lines("compile_grouped.py", "one", "80", "90", "100", cache=tmp_path)
    assert [line["architecture"] for line in lines] == [80] * 3 + [90] * 3 + [100] * 3
    check_compiled(lines)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_shipped_compiles_to_tensor_cores(tmp_path, architecture):
    lines = offline.lines("compile_grouped.py", "all", str(architecture), cache=tmp_path)
    assert len(lines) == 3 * (12 + 1 + 12 + 1)
    check_compiled(lines)
