import resource
import sys
from pathlib import Path

import pytest
import torch

from quantkit.memory import peak_memory_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_the_peak_is_the_kernels_and_grows_with_what_is_held():
    before = peak_memory_bytes()
    held = torch.ones(before // 4 + 2**26)
    after = peak_memory_bytes()
    assert after >= before
    assert after >= held.nbytes
    assert after == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.05)


def test_where_the_kernel_does_not_say_it_is_unknown(monkeypatch):
    def fail(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", fail)
    assert peak_memory_bytes() is None
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "Name:\tx\n")
    assert peak_memory_bytes() is None
