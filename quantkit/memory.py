"""The memory of this process: its peak, and giving back what is free."""

import ctypes
import functools
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
