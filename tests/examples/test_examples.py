"""The short examples run and say what they promise."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def _run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_quantize_and_generate() -> None:
    said = _run("quantize_and_generate.py", "--prompt", "Return the")
    assert "linear layers" in said
    assert "Return the" in said.splitlines()[-1] or "Return the" in said


def test_model_in_memory() -> None:
    said = _run("model_in_memory.py")
    assert "compiled equals eager: True" in said
    assert "KL " in said
