"""Which configuration (tile sizes, warps, stages) a Triton kernel runs with: by table, not by trying out.

First the user's cache, $XDG_CACHE_HOME/quantkit/kernels/sm_90.json, then the package's table for the family of
architectures, configurations/sm_90.json. The two have one format:

    {"measured": false, "processors": 132, "kernels": {"int8_scaled_mm": [
        {"config": {"block_m": 128, "block_n": 256, "block_k": 128, "num_warps": 8, "num_stages": 3}},
        {"tokens": 16, "out_features": 4096, "in_features": 4096, "config": {...}}]}}

An entry serves the calls that it names: `tokens` is the largest M, `out_features` and `in_features` are exact, and
what is absent is any. "measured" says whether timings stand behind the choice; the package's tables are reasoned
where it is false. The choice is a function of the shape alone, so that timings and results repeat.
"""

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantkit_kernels.errors import KernelError

FAMILIES = (80, 86, 89, 90, 100, 120)
"""Architectures (ten times the major compute capability plus the minor) with a table. A device takes the nearest one
below its own: what fits there fits here, but for sm_110 and sm_121, which NVIDIA counts to the next."""

PACKAGE_TABLES = Path(__file__).with_name("configurations")
"""The directory of the package's tables."""

INTERPRETED = 90
"""The architecture whose tables Triton's interpreter follows, which runs on the CPU."""


@dataclass(frozen=True)
class Entry:
    """One line of a table: the calls that it serves, None being any, and the configuration for them."""

    config: dict[str, int]
    tokens: int | None = None
    out_features: int | None = None
    in_features: int | None = None

    def serves(self, tokens: int, out_features: int, in_features: int) -> bool:
        """Return whether this entry is for such a call."""
        return (
            (self.tokens is None or tokens <= self.tokens)
            and self.out_features in (None, out_features)
            and self.in_features in (None, in_features)
        )

    @property
    def breadth(self) -> tuple[bool, bool, float]:
        """Return what sorts entries: those that name their shape first, then by the largest M."""
        return (self.out_features is None, self.in_features is None, self.tokens or float("inf"))


@dataclass(frozen=True)
class Table:
    """The configurations of one architecture: streaming multiprocessors, and each kernel's entries by breadth."""

    processors: int
    kernels: dict[str, tuple[Entry, ...]]


def architecture(device: torch.device) -> int:
    """Return ten times the major compute capability of the CUDA device plus the minor, such as 90; asked once.

    For the CPU, where only Triton's interpreter runs kernels, INTERPRETED.
    """
    if device.type != "cuda":
        return INTERPRETED
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def family(architecture: int) -> int:
    """Return the architecture whose table serves this one.

    Raises:
        KernelError: before sm_80, which Triton does not compile for.
    """
    families = [member for member in FAMILIES if member <= architecture]
    if not families:
        raise KernelError(
            f"the device is sm_{architecture}: Triton kernels need sm_80 or later, use backend 'auto' or 'torch'"
        )
    return families[-1]


def configuration(kernel: str, tokens: int, out_features: int, in_features: int, architecture: int) -> dict[str, int]:
    """Return the configuration of `kernel` for a product of M x K by N x K: what its launcher passes on.

    The entries of least breadth that serve the call, in the user's cache or else in the package's table; of several
    with `block_m` and `block_n` the cheapest (`_cost`), and of equally cheap ones the first.

    Args:
        kernel: the name of its module, such as "int8_scaled_mm".
        tokens: M.
        out_features: N.
        in_features: K.
        architecture: what `architecture` returns.

    Raises:
        KernelError: for a device before sm_80, a table that cannot be read, or a kernel without an entry.
    """
    cache_home = os.environ.get("XDG_CACHE_HOME")
    found = dict(_choice(kernel, tokens, out_features, in_features, architecture, cache_home))
    for attempt in _trials:
        attempt.asked[kernel, tokens, out_features, in_features] = found
        found = dict(attempt.instead.get(kernel, found))
    return found


@dataclass
class Trial:
    """What kernels are told instead, by name, and what was asked for: kernel, M, N and K, and the tables' answer."""

    instead: dict[str, dict[str, int]]
    asked: dict[tuple[str, int, int, int], dict[str, int]] = field(default_factory=dict)


_trials: list[Trial] = []


@contextmanager
def trial(instead: dict[str, dict[str, int]]) -> Iterator[Trial]:
    """Give kernels the configurations of `instead`, by name, while it lasts: what tuning tries out."""
    attempt = Trial(instead)
    _trials.append(attempt)
    try:
        yield attempt
    finally:
        _trials.remove(attempt)


def forget() -> None:
    """Forget what was read of tables: after one has been written."""
    table.cache_clear()
    _choice.cache_clear()


@functools.lru_cache(maxsize=4096)
def _choice(
    kernel: str, tokens: int, out_features: int, in_features: int, device: int, cache_home: str | None
) -> dict[str, int]:
    """Return `configuration`, remembered: a launch must not wait for it."""
    name = f"sm_{family(device)}.json"
    shipped = table(PACKAGE_TABLES / name)
    assert shipped is not None
    for source in (table(cache_directory(cache_home) / name), shipped):
        entries = source.kernels.get(kernel, ()) if source is not None else ()
        serving = [entry for entry in entries if entry.serves(tokens, out_features, in_features)]
        if serving:
            least = min(entry.breadth for entry in serving)
            best = [entry.config for entry in serving if entry.breadth == least]
            return min(best, key=lambda config: _cost(config, tokens, out_features, shipped.processors))
    raise KernelError(f"{kernel} has no configuration in {name}: use backend 'auto' or 'torch'")


def _cost(config: dict[str, int], tokens: int, out_features: int, processors: int) -> int:
    """Return the rows of both operands that the busiest multiprocessor brings in, a number that grows with time.

    A program brings in BLOCK_M + BLOCK_N rows of K for BLOCK_M * BLOCK_N sums; the programs are spread over the
    multiprocessors, and all wait for the one that has most. Bringing in is what limits a product: at few tokens from
    memory, at many from the second-level cache, which cannot keep the tensor cores busy with one-byte codes.
    """
    if not {"block_m", "block_n"} <= set(config):
        return 0
    programs = -(-tokens // config["block_m"]) * -(-out_features // config["block_n"])
    return -(-programs // processors) * (config["block_m"] + config["block_n"])


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def cache_directory(cache_home: str | None) -> Path:
    """Return the user's directory of measured configurations, which need not exist, for what XDG_CACHE_HOME says."""
    return (Path(cache_home) if cache_home else Path.home() / ".cache") / "quantkit" / "kernels"


@functools.cache
def table(path: Path) -> Table | None:
    """Return the table in a file, read once in a process; None where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kernels = {name: _entries(entries) for name, entries in content["kernels"].items()}
        return Table(int(content.get("processors", 0)), kernels)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise KernelError(f"{path} is not a table of kernel configurations ({error!r}): mend or delete it") from error


def _entries(entries: list[dict[str, Any]]) -> tuple[Entry, ...]:
    """Return the entries, narrow ones first.

    Raises:
        TypeError, ValueError: for unknown keys, or configurations that are not positive integers.
    """
    made = [Entry(**entry) for entry in entries]
    for entry in made:
        values = entry.config.values()
        if not all(isinstance(value, int) and value > 0 for value in values):
            raise ValueError(f"config is {entry.config}: expected positive integers")
    return tuple(sorted(made, key=lambda entry: entry.breadth))
