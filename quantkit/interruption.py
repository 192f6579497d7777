"""Evaluations that go on where they were stopped: their statistics, kept in the user's cache from time to time."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch

from quantkit.errors import CheckpointError
from quantkit.shards import json_checksum, read_tensors, write_tensors

INTERVAL = 30.0
"""Seconds after which statistics are kept anew; a machine that fails loses no more of an evaluation."""

DONE = "done"

T = TypeVar("T")

log = logging.getLogger("quantkit")


class Statistic(Protocol):
    """What is gathered batch by batch."""

    def state(self) -> dict[str, torch.Tensor]:
        """All that it holds."""

    def take_up(self, state: Mapping[str, torch.Tensor]) -> None:
        """Hold this, which `state` gave."""

    def merge(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take in all that another one was given, which `state` gave of it."""


def cache_folder() -> Path:
    """Where statistics of evaluations are kept: `quantkit/evaluations` of the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "quantkit" / "evaluations"


class Interruptible:
    """A loop over batches that goes on where an earlier one with the same fingerprint was stopped.

    As a context it keeps the statistics when it is interrupted (Ctrl-C, SIGTERM), and forgets them when all is done.

    Args:
        fingerprint: what the evaluation is known by, or None for one that can't be known again (a model in memory).
        statistics: what is gathered, by name.
        restart: begin anew, whatever an earlier one did.
        ranks: the number of this process and how many share the batches; each keeps what it has done.

    Attributes:
        count: batches that are done.
        before: those of them that were done before this one was taken up.
    """

    def __init__(
        self,
        fingerprint: Mapping[str, Any] | None,
        statistics: Mapping[str, Statistic],
        *,
        restart: bool = False,
        ranks: tuple[int, int] = (0, 1),
    ) -> None:
        self.statistics = statistics
        self.count = self.before = 0
        self._path: Path | None = None
        self._saved = time.monotonic()
        if fingerprint is not None:
            name, (rank, count) = json_checksum(fingerprint), ranks
            self._path = cache_folder() / (
                f"{name}.safetensors" if count == 1 else f"{name}.{rank}-{count}.safetensors"
            )
            if restart:
                self._path.unlink(missing_ok=True)
            self._refuse_others(name, count, restart)
            self._take_up(self._path)

    @staticmethod
    def _refuse_others(name: str, count: int, restart: bool) -> None:
        """Refuse, or forget, what was kept by another number of processes."""
        for path in sorted(cache_folder().glob(f"{name}*.safetensors")):
            kept_by = int(path.stem.rpartition("-")[2]) if "-" in path.stem else 1
            if kept_by != count and restart:
                path.unlink(missing_ok=True)
            elif kept_by != count:
                raise CheckpointError(
                    f"this evaluation was stopped with {kept_by} processes, and now there are {count}: give as many to "
                    "go on, or --restart to begin anew"
                )

    def _take_up(self, path: Path) -> None:
        if not path.is_file():
            return
        try:
            found = read_tensors(path)
            count = int(found.pop(DONE))
            for name, statistic in self.statistics.items():
                statistic.take_up(
                    {key[len(name) + 1 :]: each for key, each in found.items() if key.startswith(f"{name}.")}
                )
        except (CheckpointError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path}, which an evaluation that was stopped left, is damaged ({error}); give --restart to begin anew"
            ) from error
        self.count = self.before = count
        log.warning("going on after batch %d, where this evaluation was stopped; --restart begins anew", count)

    def left(self, batches: Sequence[T]) -> Sequence[T]:
        """The batches that are still to be done."""
        return batches[self.count :]

    def done(self) -> None:
        """Say that one more batch is in the statistics."""
        self.count += 1
        if time.monotonic() - self._saved >= INTERVAL:
            self._keep()

    def _keep(self) -> bool:
        """Whether the statistics are kept; where they can't be, that is said once, and the evaluation goes on."""
        if self._path is None:
            return False
        try:
            self._save(self._path)
        except CheckpointError as error:
            log.warning("what is evaluated is not kept, and begins anew if it is stopped: %s", error)
            self._path = None
        return self._path is not None

    def _save(self, path: Path) -> None:
        tensors = {DONE: torch.tensor(self.count)}
        for name, statistic in self.statistics.items():
            tensors |= {f"{name}.{key}": value for key, value in statistic.state().items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{path.parent} cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder of yours"
            ) from error
        write_tensors(path, tensors)
        self._saved = time.monotonic()

    def __enter__(self) -> "Interruptible":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._path is None:
            return
        if kind is None:
            self._path.unlink(missing_ok=True)
        elif issubclass(kind, KeyboardInterrupt) and self.count and self._keep():
            log.warning("%d batches are kept: the same command goes on after them", self.count)
