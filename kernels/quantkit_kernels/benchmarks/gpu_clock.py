"""How calls are timed on a GPU: CUDA graphs of several launches, two of them in turn, on data that no cache holds."""

import importlib.util
import math
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from quantkit_kernels.configurations import architecture

Call = Callable[[], Any]
LEAST_SECONDS = 5e-4
"""What one graph should take at least: beside it the time of its own launch is small."""
MOST_CALLS = 256
"""Calls of one graph at most, unless each is on operands of its own."""
LEAST_REPLAYS = 10
"""Replays of each graph at least."""
WARM_UP = 3
"""Replays before any counts."""


class Recorded:
    """Calls as a CUDA graph, or, where one cannot capture them, as they are: each call is timed with its launches.

    The calls go round as often as makes the graph long enough. Each is called once before: kernels are compiled then.
    """

    def __init__(self, calls: Sequence[Call], graph: bool = True) -> None:
        self.launched = list(calls)
        self.graph: torch.cuda.CUDAGraph | None = None
        for call in self.launched:
            call()
        torch.cuda.synchronize()
        if graph:
            self.graph = _captured(self.launched)
        took = min(_elapsed(self.replay) for _ in range(3))
        rounds = min(math.ceil(LEAST_SECONDS / max(took, 1e-7)), MOST_CALLS // len(self.launched))
        if rounds > 1:
            self.launched *= rounds
            if graph:
                self.graph = _captured(self.launched)

    def replay(self) -> None:
        """Launch all calls once."""
        if self.graph is not None:
            self.graph.replay()
            return
        for call in self.launched:
            call()


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """Return a graph of the calls, one after the other.

    Raises:
        RuntimeError: where one of them waits for the device.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _elapsed(call: Call) -> float:
    """Return the seconds between events around a call."""
    started, ended = _event(), _event()
    started.record()
    call()
    ended.record()
    ended.synchronize()
    return float(started.elapsed_time(ended)) / 1000


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def in_turn(recorded: Sequence[Recorded], budget: float) -> list[list[float]]:
    """Return for each the seconds of a call in each of its replays; they take turns until the budget is used up.

    Events lie in the stream, so that the host, which runs ahead, adds nothing between two replays.
    """
    for each in recorded:
        for _ in range(WARM_UP):
            each.replay()
    torch.cuda.synchronize()
    round_seconds = sum(_elapsed(each.replay) for each in recorded)
    rounds = max(LEAST_REPLAYS, min(200, int(budget / max(round_seconds, 1e-6))))
    events = [[(_event(), _event()) for _ in recorded] for _ in range(rounds)]
    for turn in events:
        for each, (started, ended) in zip(recorded, turn, strict=True):
            started.record()
            each.replay()
            ended.record()
    torch.cuda.synchronize()
    return [
        [turn[index][0].elapsed_time(turn[index][1]) / 1000 / len(each.launched) for turn in events]
        for index, each in enumerate(recorded)
    ]


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the tenth and the ninetieth of a hundred."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]


def ceilings(device: torch.device) -> dict[str, float]:
    """Return bytes a second of a large copy, read and written, and operations a second of a bfloat16 product."""
    free, _ = torch.cuda.mem_get_info(device)
    count, size = min(1 << 30, free // 8) // 2, 8192 if free > 4 << 30 else 4096
    return {
        "copy_bytes_per_second": 4 * count / _copy_seconds(count, device),
        "product_operations_per_second": 2 * size**3 / _product_seconds(size, device),
    }


def _copy_seconds(count: int, device: torch.device) -> float:
    """Return the seconds of a copy of so many bfloat16 numbers."""
    source = torch.randn(count, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return spread(in_turn([Recorded([lambda: target.copy_(source)])], 0.5)[0])[0]


def _product_seconds(size: int, device: torch.device) -> float:
    """Return the seconds of a bfloat16 product of two square matrices of random numbers."""
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return spread(in_turn([Recorded([lambda: left @ right.t()])], 0.5)[0])[0]


def machine(device: torch.device) -> dict[str, object]:
    """Return what the numbers depend on: the card, its driver, versions."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "architecture": f"sm_{architecture(device)}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "python": platform.python_version(),
    }


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, without importing it; None where it is not there."""
    try:
        return version(package) if importlib.util.find_spec(package) is not None else None
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Return the driver's version as nvidia-smi says it; None where there is no such program."""
    question = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(question, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0] if said else None
