"""Progress of a training on stderr: tokens, the loss, the rate, the time left."""

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from quantkit.progress import LINE_INTERVAL


class TrainingProgress:
    """A context in which `show` says how far a training is: one bar on a terminal, elsewhere a line now and then.

    Args:
        done: tokens that were read before.
        total: tokens that will have been read.
        disable: say nothing.
    """

    def __init__(self, done: int, total: int, *, disable: bool = False) -> None:
        self._done = self._first = done
        self._total, self._disable = total, disable
        self._started = self._last = time.monotonic()
        self._loss = 0.0
        self._bar: Any = None
        if not disable and sys.stderr.isatty():
            self._bar = tqdm(
                desc="recovering", initial=done, total=total, unit=" tokens", dynamic_ncols=True, file=sys.stderr
            )

    def show(self, done: int, loss: float) -> None:
        """Say that so many tokens are read, and what the latest loss is."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(done - self._done)
        self._done, self._loss = done, loss
        now = time.monotonic()
        if self._bar is None and not self._disable and now - self._last >= LINE_INTERVAL and done < self._total:
            self._last = now
            self._line(now)

    def _line(self, now: float) -> None:
        rate = (self._done - self._first) / max(1e-9, now - self._started)
        left = (self._total - self._done) / rate if rate else 0.0
        print(  # noqa: T201
            f"recovering: {self._done:,}/{self._total:,} tokens, loss {self._loss:.4f}, {rate:,.0f} tokens/s, "
            f"{tqdm.format_interval(left)} left",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif not self._disable and self._done > self._first:
            self._line(time.monotonic())
