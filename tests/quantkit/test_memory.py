import subprocess
import sys
from pathlib import Path

import pytest

from quantkit import memory
from quantkit.memory import Excess, peak_memory_bytes, resident_memory_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_the_peak_is_the_most_that_was_ever_held():
    """In a process of its own, that holds 200 MB for a moment and then lets go of it."""
    code = (
        "from quantkit.memory import peak_memory_bytes\n"
        "before = peak_memory_bytes()\n"
        "held = bytearray(b'x') * (200 * 10**6)\n"
        "del held\n"
        "print(before, peak_memory_bytes())\n"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, result.stdout.split())
    assert 199 * 10**6 <= after - before <= 204 * 10**6


def test_where_the_kernel_does_not_say_it_is_unknown(monkeypatch):
    def fail(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", fail)
    assert peak_memory_bytes() is None
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "Name:\tx\n")
    assert peak_memory_bytes() is None
    assert resident_memory_bytes() is None


@pytest.mark.skipif(sys.platform != "linux", reason="statm is Linux's")
def test_what_is_held_now_grows_and_shrinks():
    """In a process of its own: one that has run long may keep freed pages, or take them from what it kept."""
    code = (
        "from quantkit.memory import resident_memory_bytes\n"
        "before = resident_memory_bytes()\n"
        "held = bytearray(b'x') * (100 * 10**6)\n"
        "during = resident_memory_bytes()\n"
        "del held\n"
        "print(before, during, resident_memory_bytes())\n"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    before, during, after = map(int, result.stdout.split())
    assert during - before >= 99 * 10**6
    assert after <= during - 99 * 10**6


def test_memory_is_given_back_when_more_than_allowed_was_added(monkeypatch):
    given, now = [], [500]
    monkeypatch.setattr(memory, "give_back_memory", lambda: given.append(now[0]) or now.__setitem__(0, now[0] - 10))
    monkeypatch.setattr(memory, "resident_memory_bytes", lambda: now[0])
    excess = Excess(100)
    assert (given, now) == ([500], [490])
    for now[0] in (590, 591, 681, 682):
        excess.watch()
    assert given == [500, 591, 682]
    monkeypatch.setattr(memory, "resident_memory_bytes", lambda: None)
    excess.give_back()
    excess.watch()
    assert len(given) == 4
