"""How calls are timed on a CPU, where other programs come between, and what the numbers depend on."""

import bisect
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantkit_kernels import cpu

SETTLED = 5
"""So many calls must have taken no more than a twentieth longer than the fastest: else a line is called disturbed."""


def seconds(
    runs: dict[str, list[Callable[[], Any]]],
    budget: float,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the least SETTLED seconds of single calls of each name, whose calls go round its list, names in turn.

    A name's turns end early once its least is no chance, which two rounds at least must say. The clock may be
    `time.process_time`, for one thread on a machine that others use: it stands still while they run.
    """
    least: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name, calls in runs.items():
            if turn > 1 and is_settled(least[name]):
                continue
            calls[0]()
            done, end, now = 0, clock() + budget / rounds, 0.0
            while now < end and not (done >= SETTLED and is_settled(least[name])):
                for call in calls:
                    begun = clock()
                    call()
                    now = clock()
                    bisect.insort(least[name], now - begun)
                    del least[name][SETTLED:]
                done += len(calls)
    return least


def is_settled(least: list[float]) -> bool:
    """Return whether as many calls as SETTLED says took no more than a twentieth longer than the fastest."""
    return len(least) == SETTLED and least[-1] <= 1.05 * least[0]


def ceilings() -> dict[str, float]:
    """Return bytes a second of a large copy, read and written, and operations a second of the faster float product."""
    source = torch.randn(last_cache_bytes(), dtype=torch.float32)
    target = torch.empty_like(source)
    size = 1024
    left = torch.randn(size, size)
    halves = left.to(torch.bfloat16)
    taken = seconds(
        {
            "copy": [lambda: target.copy_(source)],
            "float32": [lambda: left @ left.t()],
            "bfloat16": [lambda: halves @ halves.t()],
        },
        0.5,
        4,
    )
    return {
        "copy_bytes_per_second": 8 * source.numel() / taken["copy"][0],
        "product_operations_per_second": 2 * size**3 / min(taken["float32"][0], taken["bfloat16"][0]),
    }


def last_cache_bytes() -> int:
    """Return the size of the largest cache that Linux tells of; 32 MiB where it tells of none."""
    found = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        found.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]] if text[-1] in "KM" else int(text))
    return max(found) or 32 << 20


def machine() -> dict[str, object]:
    """Return what the numbers depend on: processor, versions, threads."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    said = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in said.items()}
    flags = fields.get("flags", "").split()
    return {
        "processor": fields.get("model name", platform.processor()),
        "family_model": f"{fields.get('cpu family')}/{fields.get('model')}",
        "features": [flag for flag in flags if flag.startswith(("avx512", "amx", "avx_vnni"))],
        "cores": os.cpu_count(),
        "last_cache_bytes": last_cache_bytes(),
        "threads": torch.get_num_threads(),
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "exact_int_mm": cpu.has_exact_int_mm(),
    }
