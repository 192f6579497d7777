"""The Triton kernel for fp8 codes with scales for blocks, without a GPU: numbers, instructions, memory.

The two cannot share a process (an interpreted kernel cannot be compiled), so each is a program beside this file.
"""

import pytest

pytest.importorskip("triton", reason="Triton exists on Linux only")

import offline
from offline import FP8
from offline import FP8_INSTRUCTION as INSTRUCTION


def check_compiled(lines: list[dict[str, object]]) -> None:
    """Assert for each compilation: the tensor core instruction, shared memory, and no spills."""
    for line in lines:
        offline.check(line, INSTRUCTION[line["architecture"]].format(FP8[line["codes"]]))
        if line["architecture"] < 100:  # scaling and adding up is one operation; later ones do two at once
            assert line["fused"] > 0, line


def test_interpreter(tmp_path):
    out = offline.run("interpret_block_scaled_mm.py", cache=tmp_path, interpret=True)
    assert out.strip() == "41 cases right"


def test_compiles_to_tensor_cores_on_every_target(tmp_path):
    lines = offline.lines("compile_scaled_mm.py", "block_scaled_mm", "one", *map(str, INSTRUCTION), cache=tmp_path)
    assert [line["architecture"] for line in lines] == list(INSTRUCTION)
    check_compiled(lines)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", INSTRUCTION)
def test_every_configuration_compiles_to_tensor_cores(tmp_path, architecture):
    lines = offline.lines("compile_scaled_mm.py", "block_scaled_mm", "all", str(architecture), cache=tmp_path)
    assert len(lines) == 12 * len(offline.configs("block_scaled_mm", architecture)) + 24
    check_compiled(lines)
