"""The W8A8 Triton kernel without a GPU: numbers in the interpreter, instructions and memory from the compiler.

The two cannot share a process (an interpreted kernel cannot be compiled), so each is a program beside this file.
"""

import pytest

pytest.importorskip("triton", reason="Triton exists on Linux only")

import offline

MMA_SYNC = r"mma\.sync\.aligned\.m16n8k32\.row\.col\.satfinite\.s32\.s8\.s8\.s32"
WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8"
INSTRUCTION = {80: MMA_SYNC, 86: MMA_SYNC, 89: MMA_SYNC, 90: WGMMA, 100: MMA_SYNC, 120: MMA_SYNC}
"""What an int8 product becomes. On sm_100 Triton 3.7 makes no tcgen05 of int8 operands: that architecture runs the
older instruction too."""


def check_compiled(lines: list[dict[str, object]]) -> None:
    """Assert for each compilation: the tensor core instruction, shared memory, spills, and separate roundings."""
    for line in lines:
        offline.check(line, INSTRUCTION[line["architecture"]])
        assert line["fused"] == 0, line
        assert line["rounds_to_bf16"] == (line["out"] == "bf16"), line


def test_interpreter(tmp_path):
    out = offline.run("interpret_int8_scaled_mm.py", cache=tmp_path, interpret=True)
    assert out.strip() == "48 cases right"


def test_compiles_to_tensor_cores_on_every_target(tmp_path):
    lines = offline.lines("compile_scaled_mm.py", "int8_scaled_mm", "one", *map(str, INSTRUCTION), cache=tmp_path)
    assert [line["architecture"] for line in lines] == list(INSTRUCTION)
    check_compiled(lines)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", INSTRUCTION)
def test_every_configuration_compiles_to_tensor_cores(tmp_path, architecture):
    lines = offline.lines("compile_scaled_mm.py", "int8_scaled_mm", "all", str(architecture), cache=tmp_path)
    assert len(lines) == 9 * len(offline.configs("int8_scaled_mm", architecture)) + 12
    check_compiled(lines)
