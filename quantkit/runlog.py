"""The log of a run: one JSON object a line, in a file beside the output, written as things happen."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from quantkit.durable import write_error
from quantkit.memory import peak_memory_bytes

log = logging.getLogger("quantkit")


def log_path(output: Path) -> Path:
    """Where the log of a run with this output lies."""
    return output.with_name(f"{output.name}.log.jsonl")


class RunLog(logging.Handler):
    """Writes what happens in a run; while it is entered, what quantkit warns of as well.

    Every line has `time` (UTC, ISO 8601), `event` (`start`, `resume`, `stage`, `step`, `warning`, `error`, `finish`),
    `elapsed` (seconds of this process's run) and `peak_memory_bytes` (VmHWM); the rest depends on the event. A line is
    written as a whole and flushed; it is not synced, which would cost more than it is worth.

    Args:
        path: the file.
        anew: whether to begin the file anew, or to go on in it.
    """

    def __init__(self, path: Path, *, anew: bool) -> None:
        super().__init__(logging.WARNING)
        self.path = path
        self._started = time.monotonic()
        try:
            self._file = path.open("w" if anew else "a", encoding="utf-8")
        except OSError as error:
            raise write_error(error, path) from error

    def write(self, event: str, **fields: Any) -> None:
        """Write one line."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            **fields,
            "elapsed": round(time.monotonic() - self._started, 3),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise write_error(error, self.path) from error

    @contextmanager
    def step(self, stage: str, step: str) -> Iterator[None]:
        """While this lasts a step of a stage is done; its line says how long it took."""
        started = time.monotonic()
        yield
        self.write("step", stage=stage, step=step, seconds=round(time.monotonic() - started, 3))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a warning."""
        self.write("warning", message=record.getMessage())

    def __enter__(self) -> "RunLog":
        log.addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        log.removeHandler(self)
        try:
            if error is not None:
                self.write("error", kind=type(error).__name__, message=str(error))
        finally:
            self._file.close()
