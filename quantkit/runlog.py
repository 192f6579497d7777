"""The log of a run: one JSON object a line, in a file beside the output, written as things happen."""

import errno
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from quantkit.durable import writing
from quantkit.errors import CheckpointError
from quantkit.memory import peak_memory_bytes

log = logging.getLogger("quantkit")


def log_path(output: Path) -> Path:
    """Where the log of a run with this output lies."""
    return output.with_name(f"{output.name}.log.jsonl")


class RunLog(logging.Handler):
    """Writes what happens in a run; while it is entered, what quantkit warns of as well.

    Every line has `time` (UTC, ISO 8601), `event` (`start`, `resume`, `step`, `stage`, `memory`, `train`, `warning`,
    `error`, `finish`), `elapsed` (seconds of this process's run) and `peak_memory_bytes` (VmHWM); the rest depends on
    the event. A line is written as a whole; it is not synced, which would cost more than it is worth.

    Args:
        path: the file.
        anew: whether to begin the file anew, or to go on in it.
        worth: asked on an error: whether the run leaves something, or else its log goes as well.
    """

    def __init__(self, path: Path, *, anew: bool, worth: Callable[[], object] = lambda: True) -> None:
        super().__init__(logging.WARNING)
        self.path, self._worth = path, worth
        self._started = time.monotonic()
        with writing(path):
            self._file = path.open("wb" if anew else "ab", buffering=0)  # a line is written as a whole, and at once
            if self._file.tell() and path.read_bytes()[-1:] != b"\n":  # a line that a full disk cut off
                self._file.write(b"\n")

    def write(self, event: str, **fields: Any) -> None:
        """Write one line."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            **fields,
            "elapsed": round(time.monotonic() - self._started, 3),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        text = json.dumps(line).encode() + b"\n"
        with writing(self.path):
            if self._file.write(text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a warning."""
        if record.levelno >= logging.WARNING:
            self.write("warning", message=record.getMessage())

    def __enter__(self) -> "RunLog":
        log.addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        log.removeHandler(self)
        if error is None:
            self._file.close()
            return
        with suppress(CheckpointError, OSError):  # what went wrong is said, and not that this can't be written either
            self.write("error", kind=type(error).__name__, message=str(error))
        with suppress(OSError):
            self._file.close()
            if not self._worth():
                self.path.unlink(missing_ok=True)
