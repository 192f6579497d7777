"""Ctrl-C and SIGTERM: what is finished stays, and the exit code says what happened."""

import subprocess
import sys

import pytest

from quantkit import pipeline


@pytest.mark.parametrize("place", ["compress_stage", "verify", "copy_files", "make_plan"])
def test_ctrl_c_leaves_what_is_finished_and_exits_130(cli, model_folder, tmp_path, monkeypatch, place):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, place, interrupt)
    result = cli("quantize", model_folder(), "-o", tmp_path / "out", "-m", "w8a8")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert "Traceback" not in result.stderr
    finished = place in ("verify", "copy_files")
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out.log.jsonl", "out.partial"] if finished else [])


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_real_signal_before_anything_is_finished_leaves_nothing(model_folder, tmp_path, name, code):
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "from quantkit import pipeline\n"
        "stage = pipeline.compress_stage\n"
        "def then_interrupt(*words, **more):\n"
        "    layers = stage(*words, **more)\n"
        f"    if layers: os.kill(os.getpid(), signal.{name})\n"
        "    return layers\n"
        "pipeline.compress_stage = then_interrupt\n"
        "from quantkit.cli import main\n"
        "main()\n"
    )
    words = ["quantize", str(model_folder()), "-o", str(tmp_path / "out"), "-m", "w8a8"]
    result = subprocess.run(
        [sys.executable, "-P", "-c", program, *words], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == code
    assert ("interrupted" if name == "SIGINT" else "terminated") in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
