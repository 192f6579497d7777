"""The W8A8 Triton kernel without a GPU: numbers in the interpreter, instructions and memory from the compiler.

The two cannot share a process (an interpreted kernel cannot be compiled), so each is a program beside this file.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists on Linux only")

HERE = Path(__file__).parent

# Shared memory that one program may use, in bytes (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

MMA_SYNC = r"mma\.sync\.aligned\.m16n8k32\.row\.col\.satfinite\.s32\.s8\.s8\.s32"
WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8"
INSTRUCTION = {80: MMA_SYNC, 86: MMA_SYNC, 89: MMA_SYNC, 90: WGMMA, 100: MMA_SYNC, 120: MMA_SYNC}
"""What an int8 product becomes. sm_90's wgmma needs a tile of 64 tokens; smaller tiles use the older instruction. On
sm_100 Triton 3.7 makes no tcgen05 of int8 operands: that architecture runs the older instruction too."""


def run(program: str, *arguments: str, cache: Path, interpret: bool = False) -> str:
    """Return what the program printed; show all of it where it failed."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(HERE / program), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{program} failed\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def check_compiled(lines: list[dict[str, object]]) -> None:
    """Assert for each compilation: the tensor core instruction, shared memory, spills, and separate roundings."""
    for line in lines:
        architecture, config = line["architecture"], line["config"]
        expected = INSTRUCTION[architecture] if config["block_m"] >= 64 else MMA_SYNC
        assert len(line["instructions"]) == 1, line
        assert re.fullmatch(expected, line["instructions"][0]), line
        assert line["shared"] <= SHARED_LIMIT[architecture], line
        assert line["spilled"] == 0, line
        assert line["fused"] == 0, line
        assert line["rounds_to_bf16"] == (line["out"] == "bf16"), line


def test_interpreter(tmp_path):
    out = run("interpret_int8_scaled_mm.py", cache=tmp_path, interpret=True)
    assert out.strip() == "45 cases right"


def test_compiles_to_tensor_cores_on_every_target(tmp_path):
    out = run("compile_int8_scaled_mm.py", "one", "80", "90", "100", cache=tmp_path)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["architecture"] for line in lines] == [80, 90, 100]
    check_compiled(lines)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", sorted(INSTRUCTION))
def test_every_configuration_compiles_to_tensor_cores(tmp_path, architecture):
    out = run("compile_int8_scaled_mm.py", "all", str(architecture), cache=tmp_path)
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 37
    check_compiled(lines)
