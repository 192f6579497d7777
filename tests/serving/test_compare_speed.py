"""The script that compares speeds, on models too small for them to mean anything: without vLLM, ours alone."""

import json
import subprocess
import sys
from pathlib import Path

import compare_speed
import models


def test_our_side_is_measured_in_its_own_processes(model_folder, compressed, tmp_path):
    models.copy(model_folder("llama"), tmp_path / "float")
    models.copy(compressed("w8a8", "llama"), tmp_path / "w8a8")
    words = ["--models", tmp_path, "--runs", "2", "--prompt-tokens", "8", "--new-tokens", "2", "--threads", "1"]
    words += ["--only", "quantkit W8A8", "transformers float32", "--out", tmp_path / "out.json"]
    command = [sys.executable, Path(compare_speed.__file__), *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "quantkit W8A8" in result.stdout
    assert "transformers float32" in result.stdout
    assert "vLLM" not in result.stdout.splitlines()[1]
    written = json.dumps(json.loads((tmp_path / "out.json").read_text()))
    assert "transformers float32" in written
