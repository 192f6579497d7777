"""The LLM.int8 kernels without a GPU: numbers in the interpreter, instructions and memory from the compiler.

The two cannot share a process (an interpreted kernel cannot be compiled), so each is a program beside this file.
"""

import re

import pytest

pytest.importorskip("triton", reason="Triton exists on Linux only")

import offline

INT8_SYNC = r"mma\.sync\.aligned\.m16n8k32\.row\.col\.satfinite\.s32\.s8\.s8\.s32"
INT8 = {90: INT8_SYNC + r"|wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8"}
HALF_SYNC = r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16\.bf16|f16\.f16)\.f32"
HALF = {
    90: HALF_SYNC + r"|wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(bf16\.bf16|f16\.f16)",
    100: HALF_SYNC + r"|tcgen05\.mma[\w.:]*kind::f16",
}
"""What the int8 product and the product of the outlier columns become, by architecture; elsewhere `mma.sync`."""
ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def check_compiled(lines: list[dict[str, object]]) -> None:
    """Assert for each compilation: its tensor core instructions, shared memory and spills."""
    for line in lines:
        architecture, found = line["architecture"], line["instructions"]
        wanted = {
            "product_kernel": [HALF.get(architecture, HALF_SYNC), INT8.get(architecture, INT8_SYNC)],
            "token_kernel": [INT8_SYNC],
        }.get(line["kernel"], [])
        for pattern in wanted:
            assert any(re.fullmatch(pattern, instruction) for instruction in found), (pattern, line)
        assert all(re.fullmatch("|".join(wanted) or "none", instruction) for instruction in found), line
        assert line["shared"] <= offline.SHARED_LIMIT[architecture], line
        assert line["spilled"] == 0, line
        if line["kernel"] == "product_kernel":
            assert line["fused"] == 0, line


def test_interpreter(tmp_path):
    out = offline.run("interpret_llm_int8.py", cache=tmp_path, interpret=True)
    assert out.strip() == "75 cases right"


def test_compiles_to_tensor_cores(tmp_path):
    lines = offline.lines("compile_llm_int8.py", "one", "80", "90", "100", cache=tmp_path)
    assert [line["architecture"] for line in lines] == [80, 80, 90, 90, 100, 100]
    check_compiled(lines)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_shipped_compiles_to_tensor_cores(tmp_path, architecture):
    lines = offline.lines("compile_llm_int8.py", "all", str(architecture), cache=tmp_path)
    assert len(lines) == 6 * (len(offline.configs("llm_int8", architecture)) + 3) + 18 + 6
    check_compiled(lines)
