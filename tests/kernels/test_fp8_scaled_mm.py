"""The Triton kernel for fp8 codes with tensor-wise and row-wise scales, without a GPU: numbers, instructions, memory.

The two cannot share a process (an interpreted kernel cannot be compiled), so each is a program beside this file.
"""

import pytest

pytest.importorskip("triton", reason="Triton exists on Linux only")

import offline
from offline import FP8
from offline import FP8_INSTRUCTION as INSTRUCTION


def check_compiled(lines: list[dict[str, object]]) -> None:
    """Assert for each compilation: the tensor core instruction, shared memory, no spills, and that sums are promoted.

    Promoted sums are added to each output of a thread in float32, outside of the tensor cores, as the bias is.
    """
    for line in lines:
        offline.check(line, INSTRUCTION[line["architecture"]].format(FP8[line["codes"]]))
        assert line["fused"] == 0, line
        if line["architecture"] < 100:
            config = line["config"]
            outputs = config["block_m"] * config["block_n"] // (32 * config["num_warps"])
            assert line["added"] >= outputs * (1 + line["has_bias"]), line


def test_interpreter(tmp_path):
    out = offline.run("interpret_fp8_scaled_mm.py", cache=tmp_path, interpret=True)
    assert out.strip() == "104 cases right"


def test_compiles_to_tensor_cores_on_every_target(tmp_path):
    lines = offline.lines("compile_scaled_mm.py", "fp8_scaled_mm", "one", *map(str, INSTRUCTION), cache=tmp_path)
    assert [line["architecture"] for line in lines] == list(INSTRUCTION)
    check_compiled(lines)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", INSTRUCTION)
def test_every_configuration_compiles_to_tensor_cores(tmp_path, architecture):
    lines = offline.lines("compile_scaled_mm.py", "fp8_scaled_mm", "all", str(architecture), cache=tmp_path)
    assert len(lines) == 18 * len(offline.configs("fp8_scaled_mm", architecture)) + 24
    check_compiled(lines)
