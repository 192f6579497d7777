"""The fastest of the shipped configurations on the user's card, for shapes of the user's choice, as a table.

What is written is the table that `configurations.py` reads first. Every configuration's result is checked before it is
timed, on the shape that it is for. A configuration replaces the one in use only where it is faster by more than noise.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from quantkit_kernels import configurations
from quantkit_kernels.benchmarks import gpu_clock
from quantkit_kernels.benchmarks.cases import Case, Operands, activations, chosen, linear_cases, rotated
from quantkit_kernels.benchmarks.correctness import is_right
from quantkit_kernels.benchmarks.experts import expert_cases
from quantkit_kernels.benchmarks.shapes import Shape
from quantkit_kernels.benchmarks.skipping import skipping_cases
from quantkit_kernels.benchmarks.table import Bench
from quantkit_kernels.errors import KernelError

Config = dict[str, int]
Clock = Callable[[str, Sequence[Config], list[Callable[[], Any]]], list[float]]
"""A kernel's name, its configurations and calls of the op, to the seconds of a call with each of them."""

MARGIN = 0.98
"""A configuration must take at most so much of the time of the one in use."""


def require_cuda(device: torch.device) -> None:
    """Raise KernelError unless kernels can be tried out there."""
    if device.type != "cuda":
        raise KernelError(
            f"--tune is for a CUDA device and the device here is {device}: run it on the machine with the GPU"
        )


def tunable(words: Sequence[str]) -> dict[str, Case]:
    """Return the cases to tune, those of products alone first, where nothing else takes time.

    Raises:
        KernelError: for a word that names no op with a table.
    """
    found = chosen({**linear_cases(), **skipping_cases(), **expert_cases()}, words)
    return dict(sorted(found.items(), key=lambda named: not named[0].endswith("product")))


def candidates(kernel: str, architecture: int) -> list[Config]:
    """Return the configurations of a kernel that the package's table for the architecture has, each once."""
    table = configurations.table(configurations.PACKAGE_TABLES / f"sm_{configurations.family(architecture)}.json")
    found: list[Config] = []
    for entry in table.kernels.get(kernel, ()) if table is not None else ():
        if entry.config not in found:
            found.append(entry.config)
    return found


def tune(
    bench: Bench,
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    cases: dict[str, Case],
    said: Callable[[dict[str, Any]], None] = lambda record: None,
    clock: Clock | None = None,
) -> list[dict[str, Any]]:
    """Return a record for each kernel and size that the cases ask the tables for: what was chosen, of what, and times.

    Args:
        bench: where, and how long each configuration is measured.
        shapes: linear layers.
        tokens: numbers of tokens.
        cases: ops by name.
        said: is given each record as it comes.
        clock: what times calls; by default CUDA graphs that take turns.
    """
    clock = clock or _graphs_in_turn(bench.seconds)
    records: list[dict[str, Any]] = []
    done: set[tuple[str, int, int, int]] = set()
    with torch.inference_mode():
        for shape in shapes:
            experts = (shape.experts,) if shape.experts else ()
            size = (*experts, shape.out_features, shape.in_features)
            weight = torch.randn(size, dtype=bench.dtype, device=bench.device).div_(shape.in_features**0.5)
            for count in tokens:
                for case in cases.values():
                    if (case.kind == "experts") != bool(shape.experts):
                        continue
                    rows = count * max(1, shape.top)
                    x = activations(rows, shape.in_features, bench.dtype, case.outliers, str(bench.device))
                    operands = case.prepare(x, weight)
                    for record in _chosen(bench, case, operands, done, clock):
                        records.append(record)
                        said(record)
    return records


def _chosen(
    bench: Bench, case: Case, operands: Operands, done: set[tuple[str, int, int, int]], clock: Clock
) -> list[dict[str, Any]]:
    """Return a record for each kernel that the case's op asks the tables for and that was not asked for before."""
    try:
        with configurations.trial({}) as attempt:
            case.run(*operands)
    except KernelError:  # no such product on this architecture
        return []
    architecture = configurations.architecture(bench.device)
    records = []
    for asked, used in attempt.asked.items():
        if asked in done:
            continue
        done.add(asked)
        kernel, count, out_features, in_features = asked
        tried = [used, *(config for config in candidates(kernel, architecture) if config != used)]
        right = [config for config in tried if gives_the_right_result(case, operands, kernel, config)]
        if not right:
            continue
        times = clock(kernel, right, rotated(case, operands, bench.cache_bytes))
        chosen_config = select(right, times, used)
        records.append(
            {
                "kernel": kernel,
                "tokens": count,
                "out_features": out_features,
                "in_features": in_features,
                "config": chosen_config,
                "microseconds": round(times[right.index(chosen_config)] * 1e6, 2),
                "before": round(times[0] * 1e6, 2) if right[0] == used else None,
                "tried": len(right),
                "refused": len(tried) - len(right),
            }
        )
    return records


def select(configs: Sequence[Config], seconds: Sequence[float], used: Config) -> Config:
    """Return the fastest configuration, but the one in use unless another is faster by more than MARGIN says."""
    fastest = min(range(len(configs)), key=lambda index: seconds[index])
    if used in configs and seconds[fastest] > MARGIN * seconds[list(configs).index(used)]:
        return used
    return configs[fastest]


def gives_the_right_result(case: Case, operands: Operands, kernel: str, config: Config) -> bool:
    """Return whether the op runs with the configuration, and its result is right: some need more memory than there is.

    Triton says so by OutOfResources, a launcher by KernelError or an assertion; other errors are raised.
    """
    try:
        with configurations.trial({kernel: config}):
            out = case.run(*operands)
        return is_right(case, operands, out)
    except (KernelError, AssertionError):
        return False
    except Exception as error:
        if type(error).__name__ != "OutOfResources":
            raise
        return False


def _graphs_in_turn(seconds: float) -> Clock:
    """Return a clock that captures a graph with each configuration, and lets them take turns."""

    def clock(kernel: str, configs: Sequence[Config], calls: list[Callable[[], Any]]) -> list[float]:
        graphs = []
        for config in configs:
            with configurations.trial({kernel: config}):
                graphs.append(gpu_clock.Recorded(calls))
        return [gpu_clock.spread(each)[0] for each in gpu_clock.in_turn(graphs, seconds * len(graphs))]

    return clock


def write(records: Sequence[dict[str, Any]], architecture: int, facts: dict[str, Any]) -> Path:
    """Return the user's table after the records were put into it, in place of entries for the same calls.

    It is written beside and then renamed: nobody reads half of it.

    Raises:
        KernelError: where the table that is there cannot be read, or the new one not be written.
    """
    path = configurations.cache_directory(os.environ.get("XDG_CACHE_HOME"))
    path /= f"sm_{configurations.family(architecture)}.json"
    configurations.forget()
    there = configurations.table(path)  # says what is wrong with one that cannot be read
    kernels: dict[str, list[dict[str, Any]]] = (
        json.loads(path.read_text(encoding="utf-8"))["kernels"] if there is not None else {}
    )
    for record in records:
        call = {key: record[key] for key in ("tokens", "out_features", "in_features")}
        entries = kernels.setdefault(record["kernel"], [])
        entries[:] = [each for each in entries if {**each, "config": None} != {**call, "config": None}]
        entries.append({**call, "config": record["config"]})
    content = json.dumps({"measured": True, "machine": facts, "kernels": kernels}, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
            file.write(content)
        Path(file.name).replace(path)
    except OSError as error:
        raise KernelError(f"the table cannot be written to {path}: {error}") from error
    configurations.forget()
    return path


def line(record: dict[str, Any]) -> str:
    """Return a record on a line."""
    config = " ".join(f"{key}={value}" for key, value in record["config"].items())
    before = "" if record["before"] is None else f", {record['before'] / record['microseconds']:.2f}x what was in use"
    size = f"{record['out_features']} x {record['in_features']}, tokens up to {record['tokens']}"
    return (
        f"{record['kernel']:24} {size}: {record['microseconds']:.4g} us{before}; of {record['tried']} "
        f"({record['refused']} refused): {config}"
    )
