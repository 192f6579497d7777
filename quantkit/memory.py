"""The peak memory of this process."""

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
