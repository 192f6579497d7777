import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.memory import peak_memory_bytes


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
