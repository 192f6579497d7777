"""What goes to stderr: warnings, progress, and what --quiet and --log-level make of them."""

import pytest

from quantkit.report import MOST_LINES, LeftAlone, Report


@pytest.fixture
def arguments(model_folder, tmp_path):
    """A command line that has something to warn of."""
    return ("quantize", model_folder("llama"), "-o", tmp_path / "out", "-m", "w8a8", "--dataset", "unused.txt")


def process(*arguments):
    """Runs the command in a process of its own: handlers are those of a user."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "quantkit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_warnings_and_progress_go_to_stderr(arguments):
    done = process(*arguments)
    assert done.returncode == 0
    assert "quantkit: --dataset unused.txt is unused" in done.stderr
    assert "quantizing: " in done.stderr
    assert "quantizing" not in done.stdout


def test_quiet_says_nothing_but_the_result(arguments):
    done = process(*arguments, "--quiet")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "linear layers" in done.stdout


def test_an_error_is_said_all_the_same(arguments, tmp_path):
    done = process("quantize", tmp_path / "nothing", "-o", tmp_path / "out", "-m", "w8a8", "--quiet")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_level_can_be_chosen(cli, arguments, tmp_path, caplog):
    done = process(*arguments, "--log-level", "error")
    assert "unused" not in done.stderr
    assert "quantizing: " in done.stderr
    *head, _ = arguments
    done = process(*head[:3], tmp_path / "again", *head[4:], "x", "--log-level", "info", "--quiet")
    assert "is unused" in done.stderr
    assert "model.layers.0: " in done.stderr
    assert "quantizing: " not in done.stderr


def test_a_report_fits_a_screen_whatever_there_is_to_say():
    left = [LeftAlone(f"layer.{number}", (1, 2), f"reason {number}") for number in range(50)]
    recipe, notes = {"steps": ["w8a8"]}, [f"note {n}" for n in range(50)]
    verified = {"tensors": 1, "layers": 0}
    report = Report("model", recipe, "float", [], left, [], {}, [], 2, 1, verified, notes=notes)
    lines = report.to_text().splitlines()
    assert len(lines) <= 24
    assert lines[-1] == f"  and {100 - MOST_LINES + 1} lines more, in quantkit_report.json"
    assert len(report.to_dict()["notes"]) == 50
