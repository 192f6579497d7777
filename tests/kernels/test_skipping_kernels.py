"""The Triton kernels that skip rows, without a GPU: numbers in the interpreter, instructions from the compiler."""

import pytest

pytest.importorskip("triton", reason="Triton exists on Linux only")

import offline

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def check_compiled(lines) -> None:
    """Assert for each compilation: no tensor cores, no spills, no shared memory beyond limits, 16 bytes in a load."""
    for line in lines:
        offline.check(line, "")
        if line["aligned"]:
            assert any(".v4.b32" in load for load in line["loads"]), line


def test_interpreter(tmp_path):
    out = offline.run("interpret_skipping.py", cache=tmp_path, interpret=True)
    assert out.strip() == "26 cases right"


def test_compiles_on_every_target(tmp_path):
    lines = offline.lines("compile_skipping.py", "one", "80", "86", "89", "90", "100", cache=tmp_path)
    assert [line["architecture"] for line in lines[::2]] == [80, 86, 89, 90, 100]
    check_compiled(lines)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_dtype_compiles(tmp_path, architecture):
    check_compiled(offline.lines("compile_skipping.py", "all", str(architecture), cache=tmp_path))
