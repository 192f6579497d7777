"""The memory of this process: its peak, and giving back what is free."""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path


def peak_memory_bytes() -> int | None:
    """VmHWM, the most memory that this process has held at once, in bytes; None where the kernel doesn't say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def resident_memory_bytes() -> int | None:
    """The memory that this process holds now, in bytes; None where the kernel doesn't say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


class Excess:
    """Gives memory back when much has been added since that was last done.

    Short-lived tensors with longer-lived ones between them leave holes that the C library keeps and can't use again.
    Giving back costs time, as what comes next must be fetched anew; so holes may add up to some size first.

    Args:
        allowed: bytes, what is in use included.
    """

    def __init__(self, allowed: int) -> None:
        self._allowed = allowed
        self.give_back()

    def give_back(self) -> None:
        """Give back now."""
        give_back_memory()
        self._least = resident_memory_bytes()

    def watch(self) -> None:
        """Give back if there is more than is allowed."""
        now = resident_memory_bytes()
        if now is not None and self._least is not None and now - self._least > self._allowed:
            self.give_back()


def give_back_memory() -> None:
    """Return what the C library keeps of freed memory to the system, where that is glibc.

    Without it glibc holds on to a large part of the blocks that have come and gone.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
    return found
