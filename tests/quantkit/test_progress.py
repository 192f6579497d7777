"""Progress on stderr."""

import io
import sys

import pytest

from quantkit import progress
from quantkit.progress import track


class Clock:
    """A clock that moves by a fixed number of seconds each time it is read."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


def test_items_pass_through_and_the_last_line_has_count_and_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), "reading", 3, "batch")) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("reading: 3/3 batch, ")
    assert "batch/s" in captured.err
    assert captured.err.count("\n") == 1


def test_a_log_gets_a_line_now_and_then_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 items of 2 s: one line each 10 s and one at the end, 20 in all (the one at 200 s is the end's)."""
    monkeypatch.setattr(progress, "time", Clock(2.0))
    list(track(iter(range(100)), "reading", 100, "batch"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20
    assert lines[0] == "reading: 5/100 batch, 0.5 batch/s, 03:10 left"
    assert lines[-1].startswith("reading: 100/100 batch")
    assert "left" not in lines[-1]


def test_no_total(capsys: pytest.CaptureFixture[str]) -> None:
    list(track(iter("ab"), "reading", None, "row"))
    assert capsys.readouterr().err.startswith("reading: 2 row, ")


def test_disabled_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track("abc", "reading", disable=True)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(track(range(4), "reading", unit="batch")) == [0, 1, 2, 3]
    assert "100%|" in terminal.getvalue()
    assert "reading" in terminal.getvalue()
