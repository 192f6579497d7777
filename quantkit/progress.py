"""Progress on stderr: how much is done, how fast, how long it will take."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

# Where stderr is a file or a pipe a line is written when it is this many seconds after the one before.
LINE_INTERVAL = 10.0


def track(
    iterable: Iterable[T], label: str, total: int | None = None, unit: str = "it", disable: bool = False
) -> Iterator[T]:
    """The same items, while stderr says how many of `total` are done, the rate in `unit`/s and the time left.

    On a terminal that is one bar that moves; elsewhere (a log file, a job's output) one line every LINE_INTERVAL
    seconds and one at the end. `total` defaults to the iterable's length where it has one.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if disable:
        yield from iterable
    elif sys.stderr.isatty():
        yield from tqdm(iterable, desc=label, total=total, unit=f" {unit}", dynamic_ncols=True, file=sys.stderr)
    else:
        yield from _lines(iterable, label, total, unit)


def _lines(iterable: Iterable[T], label: str, total: int | None, unit: str) -> Iterator[T]:
    """The same items, with a line on stderr now and then."""
    started = last = time.monotonic()
    done = 0
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= LINE_INTERVAL and done != total:
            last = now
            _write_line(label, done, total, unit, now - started)
    _write_line(label, done, total, unit, time.monotonic() - started)


def _write_line(label: str, done: int, total: int | None, unit: str, elapsed: float) -> None:
    """One line such as `perplexity: 12/60 windows, 3.40 windows/s, 00:14 left`."""
    count = f"{done}/{total}" if total is not None else f"{done}"
    rate = done / elapsed if elapsed > 0 else 0.0
    line = f"{label}: {count} {unit}"
    if rate > 0:
        line += f", {rate:.3g} {unit}/s"
    if total is not None and total > done and rate > 0:
        line += f", {tqdm.format_interval((total - done) / rate)} left"
    else:
        line += f", {tqdm.format_interval(elapsed)}"
    print(line, file=sys.stderr, flush=True)  # noqa: T201


class Steps:
    """Progress of work that isn't a loop: a context in which `advance` says that one more of `total` is done."""

    def __init__(self, label: str, total: int, unit: str, disable: bool = False) -> None:
        self._shown = track(range(total), label, total, unit, disable)

    def __enter__(self) -> "Steps":
        next(self._shown, None)
        return self

    def advance(self) -> None:
        """Say that one more is done."""
        next(self._shown, None)

    def __exit__(self, *exception: object) -> None:
        self._shown.close()  # type: ignore[attr-defined]
