"""The journal of a run: which stages are finished and durable, so that a run that was stopped goes on after them.

It lies in a folder of its own beside the written tensors. A record names stages and the files that hold their tensors;
it is written once those are durable, under a temporary name, synced and renamed. What no record names is done again.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import CheckpointError
from quantkit.memory import peak_memory_bytes
from quantkit.outcome import GroupReport, LayerReport, Outcome
from quantkit.shards import Part, ShardWriter, read_tensors, sync, write_json, write_tensors

STATE = "quantkit_state"
FINGERPRINT = "fingerprint.json"
COMPLETE = "complete.json"
SCRATCH = "scratch"

log = logging.getLogger("quantkit")


class Journal:
    """Records of finished stages, written as a run goes on and read when it is taken up again.

    Args:
        folder: where the run writes.
        writer: takes the tensors; what records name is given to it as written.
        every: each stage gets a file and a record of its own, however small. Without it stages share a file until it
            is worth one, and a run that is stopped does the last few again.
        tell: is told of every step and stage that is done: an event's name and its fields.

    Attributes:
        seconds: what the run took before it was taken up again.
        peak_memory_bytes: its peak memory until then.
        is_complete: all stages are done; a run that is taken up goes on with the final shards.
    """

    def __init__(
        self, folder: Path, writer: ShardWriter, *, every: bool, tell: Callable[..., None] | None = None
    ) -> None:
        self.folder = folder / STATE
        self.writer, self.every = writer, every
        self.seconds, self.peak_memory_bytes = 0.0, 0
        self._tell = tell or (lambda *_, **__: None)
        self._started = self._latest = time.monotonic()
        self._stages: dict[str, Outcome] = {}
        self._pending: dict[str, Outcome] = {}
        self._states: dict[str, Path] = {}
        self._parts = 0
        self._records = 0
        self.is_complete = (self.folder / COMPLETE).is_file()
        self._take_up()

    def __len__(self) -> int:
        return len(self._stages)

    def _take_up(self) -> None:
        """Read the records of a run that was stopped, as far as they go, and remove what belongs to none."""
        try:
            self.folder.mkdir(exist_ok=True)
            while (path := self._record(self._records)).is_file():
                record = json.loads(path.read_text(encoding="utf-8"))
                parts = [Part(part["file"], tuple(part["tensors"]), part["nbytes"]) for part in record["parts"]]
                if not self.is_complete and not all((self.writer.folder / part.file).is_file() for part in parts):
                    break
                self.writer.parts += parts
                self.writer.checksums |= record["checksums"]
                self._stages |= {name: outcome_of(value) for name, value in record["stages"].items()}
                self._states |= {name: self.folder / file for name, file in record["states"].items()}
                self.seconds, self.peak_memory_bytes = record["seconds"], record["peak_memory_bytes"]
                self._records += 1
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder} is damaged ({error!r}); give --restart to begin anew, or another -o OUT"
            ) from error
        self._parts = len(self.writer.parts)
        if not self.is_complete:
            named = {part.file for part in self.writer.parts}
            for path in self.writer.folder.glob("part-*"):
                if path.name not in named:
                    path.unlink()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for what need not outlive this process."""
        folder = self.folder / SCRATCH
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def step(self, stage: str, step: str) -> Iterator[None]:
        """While this lasts a step of a stage is done."""
        started = time.monotonic()
        yield
        self._tell("step", stage=stage, step=step, seconds=round(time.monotonic() - started, 3))

    def setting(self, name: str, value: Mapping[str, Any]) -> dict[str, Any]:
        """The value that a run was begun with: this one, or what was kept when it was begun."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            write_whole(path, dict(value))
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _record(self, number: int) -> Path:
        return self.folder / f"record-{number:05d}.json"

    def finished(self, stage: str) -> Outcome | None:
        """What came of a stage that is done, or None."""
        return self._stages.get(stage)

    def state(self, stage: str) -> dict[str, torch.Tensor]:
        """The tensors that were kept beside a finished stage."""
        return read_tensors(self._states[stage]) if stage in self._states else {}

    def outcome(self) -> Outcome:
        """What came of all finished stages together, in the order of the work."""
        found = Outcome()
        for each in self._stages.values():
            found.layers += each.layers
            found.groups += each.groups
            found.notes += each.notes
        return found

    def commit(self, stage: str, outcome: Outcome, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Say that a stage is done: all its tensors are with the writer. `state` is kept beside it."""
        now = time.monotonic()
        seconds, self._latest = now - self._latest, now
        self._tell("stage", stage=stage, layers=len(outcome.layers), notes=outcome.notes, seconds=round(seconds, 3))
        peak = (peak_memory_bytes() or 0) / 1e6
        log.info("%s: %d layers, %.1f s, %.0f MB peak memory", stage, len(outcome.layers), seconds, peak)
        if state:
            path = self.folder / f"state-{len(self._states):05d}.safetensors"
            write_tensors(path, {name: value.detach().cpu().contiguous() for name, value in state.items()})
            self._states[stage] = path
        self._pending[stage] = outcome
        if self.every:
            self.writer.write()
        else:
            self.writer.flush()
        if self.writer.is_empty:
            self._write()

    def _write(self) -> None:
        parts = self.writer.parts[self._parts :]
        names = [name for part in parts for name in part.tensors]
        record = {
            "stages": {name: asdict(outcome) for name, outcome in self._pending.items()},
            "parts": [asdict(part) for part in parts],
            "checksums": {name: self.writer.checksums[name] for name in names},
            "states": {name: self._states[name].name for name in self._pending if name in self._states},
            "seconds": self.seconds + time.monotonic() - self._started,
            "peak_memory_bytes": max(self.peak_memory_bytes, peak_memory_bytes() or 0),
        }
        write_whole(self._record(self._records), record)
        self._stages |= self._pending
        self._pending = {}
        self._parts, self._records = len(self.writer.parts), self._records + 1

    def complete(self) -> None:
        """Say that all stages are done."""
        self.writer.write()
        if self._pending:
            self._write()
        write_whole(self.folder / COMPLETE, {"records": self._records})
        self.is_complete = True


def write_whole(path: Path, value: Any) -> None:
    """Write a JSON file that is whole and durable when it appears."""
    temporary = path.with_suffix(".tmp")
    write_json(temporary, value)
    temporary.replace(path)
    sync(path.parent)


def outcome_of(values: Mapping[str, Any]) -> Outcome:
    """The outcome that `asdict` gave these values of."""
    layers = [LayerReport(**(value | {"shape": tuple(value["shape"])})) for value in values["layers"]]
    groups = [GroupReport(**(value | {"consumers": tuple(value["consumers"])})) for value in values["groups"]]
    return Outcome(layers, groups, list(values["notes"]))


def begin(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Return nothing; the folder's journal belongs to this fingerprint from now on.

    Raises:
        CheckpointError: it belongs to another; what differs is named.
    """
    path = folder / STATE / FINGERPRINT
    wanted = json.loads(json.dumps(fingerprint))
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        write_whole(path, wanted)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        different = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); give --restart to begin anew") from error
    if different:
        key = different[0]
        then, now = _short(found.get(key)), _short(wanted.get(key))
        raise CheckpointError(
            f"{folder} was begun with another {key} ({then}, now {now}); give the same command to go on, --restart to "
            "begin anew, or another -o OUT"
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def records(folder: Path) -> int:
    """How many records of finished stages a folder holds."""
    return len(list((folder / STATE).glob("record-*.json")))


def forget(folder: Path) -> None:
    """Remove the journal."""
    shutil.rmtree(folder / STATE, ignore_errors=True)
