"""The quantization kernels without a GPU: bits in the interpreter, instructions and memory from the compiler.

The two cannot share a process (an interpreted kernel cannot be compiled), so each is a program beside this file.
"""

import pytest

pytest.importorskip("triton", reason="Triton exists on Linux only")

import offline

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def check_compiled(lines: list[dict[str, object]]) -> None:
    """Assert for each compilation: no tensor cores, no spills, and 16 bytes a load where rows are aligned."""
    for line in lines:
        offline.check(line, "")
        if line["aligned"] and line.get("block", 4096) >= 4096:
            assert any("v4.b32" in load or "v2.b64" in load for load in line["loads"]), line


def test_interpreter(tmp_path):
    out = offline.run("interpret_quantization.py", cache=tmp_path, interpret=True)
    assert out.strip() == "63 cases right"


def test_compiles_with_and_without_fp8_conversion(tmp_path):
    lines = offline.lines("compile_quantization.py", "one", "80", "90", cache=tmp_path)
    assert [line["architecture"] for line in lines] == [80] * 3 + [90] * 3
    check_compiled(lines)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_shipped_compiles(tmp_path, architecture):
    lines = offline.lines("compile_quantization.py", "all", str(architecture), cache=tmp_path)
    assert len(lines) == 3 * (1 + 27 + 12)
    check_compiled(lines)
