"""The journal of a run: which stages are finished and durable, so that a run that was stopped goes on after them.

It lies in a folder of its own beside the written tensors. A record names stages and the files that hold their tensors;
it is written once those are durable, under a temporary name, synced and renamed. What no record names is done again,
and so is what isn't whole any more: every record carries a hash of itself, and of all tensors that it names.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from quantkit.durable import put, sync, write_json, writing
from quantkit.errors import CheckpointError
from quantkit.memory import peak_memory_bytes
from quantkit.outcome import ChangedActivation, GroupReport, LayerReport, Outcome, PrunedReport, SparsityReport
from quantkit.shards import Onlooker, Part, ShardWriter, checksum, is_whole, json_checksum, read_tensors, write_tensors

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
        self._sums: dict[str, dict[str, str]] = {}
        self._parts = 0
        self._records = 0
        self.is_complete = False
        self._scratch: str | None = None if isinstance(writer, Onlooker) else SCRATCH
        if self._scratch is not None:
            self.is_complete = (self.folder / COMPLETE).is_file()
            self._take_up()

    def __len__(self) -> int:
        return len(self._stages)

    @property
    def records(self) -> int:
        """How many records there are."""
        return self._records

    def taken(self) -> dict[str, Any]:
        """What `follow` needs to know of what is finished."""
        states = {stage: path.name for stage, path in self._states.items()}
        return {
            "folder": self.writer.folder,
            "limit": self.writer.max_shard_bytes,
            "every": self.every,
            "parts": self.writer.parts,
            "stages": self._stages,
            "states": states,
            "records": self._records,
            "is_complete": self.is_complete,
        }

    @classmethod
    def follow(cls, taken: Mapping[str, Any], number: int) -> "Journal":
        """A journal for another process of the same run: it knows what is finished, and writes nothing of its own."""
        found = cls(taken["folder"], Onlooker(taken["folder"], taken["limit"]), every=taken["every"])
        found.writer.parts += taken["parts"]
        found._stages, found._records = dict(taken["stages"]), taken["records"]
        found._states = {stage: found.folder / name for stage, name in taken["states"].items()}
        found._scratch, found.is_complete = f"{SCRATCH}-{number}", taken["is_complete"]
        return found

    def _take_up(self) -> None:
        """Take what the records of a run that was stopped name, as far as it is whole, and remove all else.

        Raises:
            CheckpointError: something isn't whole, and what it was made of is gone: all stages were done.
        """
        damaged: Path | None = None
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        while damaged is None and (path := self._record(self._records)).is_file():
            damaged = self._read(path)
        if self.is_complete:
            damaged = damaged or self._damaged_end()
            if damaged is not None:
                raise CheckpointError(
                    f"{damaged} is not as it was written; check the disk, and give --restart to begin anew"
                )
        elif damaged is not None:
            log.warning("%s is not as it was written; what was finished from there on is done again", damaged)
        self._parts = len(self.writer.parts)
        self._tidy()

    def _read(self, path: Path) -> Path | None:
        """Take what a record names; a file that isn't as it was written, or None."""
        try:
            record = read_whole(path)
            parts = [Part(part["file"], tuple(part["tensors"]), part["nbytes"]) for part in record["parts"]]
            stages = {name: outcome_of(value) for name, value in record["stages"].items()}
            states: dict[str, Path] = {name: self.folder / file for name, file in record["states"].items()}
            checksums, kept = record["checksums"], record["state_checksums"]
            seconds, peak = record["seconds"], record["peak_memory_bytes"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return path
        if not self.is_complete:  # then parts may be shards already, and no state is needed
            for part in parts:
                if not is_whole(self.writer.folder / part.file, {name: checksums[name] for name in part.tensors}):
                    return self.writer.folder / part.file
            for name, state in states.items():
                if not is_whole(state, kept[name]):
                    return state
        self.writer.parts += parts
        self.writer.checksums |= checksums
        self._stages |= stages
        self._states |= states
        self.seconds, self.peak_memory_bytes = seconds, peak
        self._records += 1
        return None

    def _damaged_end(self) -> Path | None:
        """A file of a run whose stages are all done that isn't as it was written, or None."""
        path = self.folder / COMPLETE
        try:
            if read_whole(path)["records"] != self._records:
                return self._record(self._records)
        except (OSError, ValueError, KeyError, TypeError):
            return path
        for file, group in self.writer.shards().items():
            if (self.writer.folder / file).exists():
                if not self.writer.is_whole(file, group):
                    return self.writer.folder / file
                continue
            for part in group:
                if not self.writer.is_whole(part.file, [part]):
                    return self.writer.folder / part.file
        return None

    def _tidy(self) -> None:
        """Remove what a run that was stopped left half-written, and what is to be done again."""
        named = {part.file for part in self.writer.parts} | {path.name for path in self._states.values()}
        named |= {self._record(number).name for number in range(self._records)}
        for path in (*self.writer.folder.iterdir(), *self.folder.iterdir()):
            ours = path.name.startswith(("part-", "record-", "state-", ".tmp")) or path.suffix == ".tmp"
            if ours and path.name not in named and path.is_file():
                with writing(path):
                    path.unlink()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for what need not outlive this process."""
        folder = self.folder / (self._scratch or SCRATCH)
        shutil.rmtree(folder, ignore_errors=True)
        with writing(folder):
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
        try:
            found: dict[str, Any] = read_whole(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not as it was written ({error}); give --restart to begin anew") from error
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
            found.pruned += each.pruned
            found.activations += each.activations
            found.sparsity += each.sparsity
        return found

    def commit(self, stage: str, outcome: Outcome, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Say that a stage is done: all its tensors are with the writer. `state` is kept beside it."""
        if isinstance(self.writer, Onlooker):
            self._stages[stage] = outcome
            return
        now = time.monotonic()
        seconds, self._latest = now - self._latest, now
        self._tell("stage", stage=stage, layers=len(outcome.layers), notes=outcome.notes, seconds=round(seconds, 3))
        peak = (peak_memory_bytes() or 0) / 1e6
        log.info("%s: %d layers, %.1f s, %.0f MB peak memory", stage, len(outcome.layers), seconds, peak)
        if state:
            path = self.folder / f"state-{len(self._states):05d}.safetensors"
            kept = {name: value.detach().cpu().contiguous() for name, value in state.items()}
            write_tensors(path, kept)
            self._states[stage] = path
            self._sums[stage] = {name: checksum(value) for name, value in kept.items()}
        self._pending[stage] = outcome
        if self.every:
            self.writer.write()
        else:
            self.writer.flush()
        if self.writer.is_empty:
            self._write()

    def put(self, number: int, stages: Mapping[str, Outcome], writer: ShardWriter) -> None:
        """Write the record of stages that some process of the run has done with a writer of its own.

        Args:
            number: of the record, counted from those that the run was begun with.
            stages: what came of them.
            writer: holds their tensors and no others.
        """
        write_whole(self._record(self._records + number), self._content(stages, writer.parts, writer.checksums))

    def adopt(self, stages: Mapping[str, Outcome], parts: list[Part], checksums: Mapping[str, str]) -> None:
        """Take what a record holds that was `put`; in the order of the records."""
        self.writer.parts += parts
        self.writer.checksums |= checksums
        self._stages |= stages
        self._parts, self._records = len(self.writer.parts), self._records + 1
        for name, outcome in stages.items():
            self._tell("stage", stage=name, layers=len(outcome.layers), notes=outcome.notes)

    def tell(self, event: str, **fields: Any) -> None:
        """Write a line to the run's log."""
        self._tell(event, **fields)

    def _content(
        self, stages: Mapping[str, Outcome], parts: list[Part], checksums: Mapping[str, str]
    ) -> dict[str, Any]:
        """What a record holds."""
        names = [name for part in parts for name in part.tensors]
        return {
            "stages": {name: asdict(outcome) for name, outcome in stages.items()},
            "parts": [asdict(part) for part in parts],
            "checksums": {name: checksums[name] for name in names},
            "states": {name: self._states[name].name for name in stages if name in self._states},
            "state_checksums": {name: self._sums[name] for name in stages if name in self._sums},
            "seconds": self.seconds + time.monotonic() - self._started,
            "peak_memory_bytes": max(self.peak_memory_bytes, peak_memory_bytes() or 0),
        }

    def _write(self) -> None:
        record = self._content(self._pending, self.writer.parts[self._parts :], self.writer.checksums)
        write_whole(self._record(self._records), record)
        self._stages |= self._pending
        self._pending = {}
        self._parts, self._records = len(self.writer.parts), self._records + 1

    def complete(self) -> None:
        """Say that all stages are done."""
        if isinstance(self.writer, Onlooker):
            return
        self.writer.write()
        if self._pending:
            self._write()
        write_whole(self.folder / COMPLETE, {"records": self._records})
        self.is_complete = True


def write_whole(path: Path, value: Any) -> None:
    """Write a JSON file that is whole and durable when it appears, and says a hash of itself."""
    temporary = path.with_suffix(".tmp")
    write_json(temporary, {"hash": json_checksum(value), "content": value})
    put(temporary, path)


def read_whole(path: Path) -> Any:
    """What `write_whole` wrote, or ValueError when a byte of it is another, or OSError."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        content = read["content"]
        if set(read) != {"hash", "content"} or read["hash"] != json_checksum(content):
            raise ValueError("it is not as it was written")
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("it is not as it was written") from error
    return content


def outcome_of(values: Mapping[str, Any]) -> Outcome:
    """The outcome that `asdict` gave these values of."""
    layers = [LayerReport(**(value | {"shape": tuple(value["shape"])})) for value in values["layers"]]
    groups = [GroupReport(**(value | {"consumers": tuple(value["consumers"])})) for value in values["groups"]]
    pruned = [PrunedReport(**(value | {"shape": tuple(value["shape"])})) for value in values["pruned"]]
    activations = [ChangedActivation(**(value | {"feeds": tuple(value["feeds"])})) for value in values["activations"]]
    sparsity = [SparsityReport(**(value | {"shape": tuple(value["shape"])})) for value in values["sparsity"]]
    return Outcome(layers, groups, list(values["notes"]), pruned, activations, sparsity)


def refuse_other(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Return nothing; raise CheckpointError when the folder's journal belongs to another fingerprint, or is damaged.

    What differs is named.
    """
    path = folder / STATE / FINGERPRINT
    if not path.is_file():
        return
    try:
        found = read_whole(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); give --restart to begin anew") from error
    difference = _difference(found, _plain(fingerprint))
    if difference is not None:
        key, then, now = difference
        raise CheckpointError(
            f"{folder} was begun with another {key} ({_short(then)}, now {_short(now)}); give the same command to go "
            "on, --restart to begin anew, or another -o OUT"
        )


def begin(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Return nothing; the folder's journal belongs to this fingerprint from now on, if it belongs to none.

    Raises:
        CheckpointError: it belongs to another, or can't be written.
    """
    refuse_other(folder, fingerprint)
    path = folder / STATE / FINGERPRINT
    if path.is_file():
        return
    forget(folder)  # records of which nobody knows what run they are of
    with writing(path.parent):
        path.parent.mkdir(exist_ok=True)
    sync(folder)
    write_whole(path, _plain(fingerprint))


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _difference(found: Any, wanted: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The key at which two values differ first, and what each has there; a file's name is a key."""
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return None if found == wanted else (key or "fingerprint", found, wanted)
    for each in {**wanted, **found}:
        inner = _difference(found.get(each), wanted.get(each), f"{key}: {each}" if key else each)
        if inner is not None:
            return inner
    return None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def records(folder: Path) -> int:
    """How many records of finished stages a folder holds."""
    state = folder / STATE
    return len(list(state.glob("record-*.json"))) if (state / FINGERPRINT).is_file() else 0


def forget(folder: Path) -> None:
    """Remove the journal; without its fingerprint, which goes first, what is left of it counts for nothing."""
    with writing(folder / STATE):
        (folder / STATE / FINGERPRINT).unlink(missing_ok=True)
        with suppress(FileNotFoundError):  # it isn't there, or another process removes it, too
            shutil.rmtree(folder / STATE)
