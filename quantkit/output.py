"""The output folder: nothing is overwritten, one run writes at a time, and it appears when all of it is right.

While a run writes, everything lies in a folder beside it, from which a run that was stopped goes on.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from quantkit import journal
from quantkit.errors import CheckpointError
from quantkit.shards import sync

MARKER = "quantkit_partial"

log = logging.getLogger("quantkit")


def refuse_existing(output: str | Path) -> Path:
    """The output's path, or CheckpointError when something is there already."""
    try:
        path = Path(output).expanduser()
        path = path if path.name not in ("", "..") else path.resolve()
        if path.is_mount() or path.resolve() == Path.cwd():
            kind = "a mount point" if path.is_mount() else "the folder that you are in"
            raise CheckpointError(f"{path} is {kind}, and the result replaces its folder; give a new folder as -o OUT")
        tidy(path)
        taken = path.is_symlink() or (any(path.iterdir()) if path.is_dir() else path.exists())
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{output} cannot be written to ({error}); give another -o OUT") from error
    if taken:
        raise CheckpointError(f"{path} exists already; give another -o OUT, or remove it first")
    return path


def free_space(output: Path) -> tuple[Path, int]:
    """The folder that exists above an output that is yet to be made, and the bytes that are free on its disk."""
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    return folder, shutil.disk_usage(folder).free


def refuse_full_disk(output: Path, needed: int) -> None:
    """Return nothing; raise CheckpointError when the disk has no room for what will be written."""
    folder, free = free_space(output)
    partial = _partial(output)
    there = sum(path.stat().st_size for path in partial.glob("*.safetensors")) if partial.is_dir() else 0
    if free + there < needed:
        raise CheckpointError(
            f"no space: the result takes {needed:,} bytes and the disk of {folder} has {free:,} free; "
            "free some or give another -o OUT"
        )


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


@contextmanager
def partial_folder(output: Path, fingerprint: Mapping[str, Any], *, restart: bool = False) -> Iterator[Path]:
    """A folder beside the output to write in; renamed to the output at the end.

    Its marker says that it is quantkit's, and is locked while a run writes. One left by a run that was stopped is taken
    up again, if it was begun with the same fingerprint. On any error it stays if a stage is finished, and a line says
    how to go on; else it is removed.

    Args:
        output: where the result goes.
        fingerprint: what the run is known by: model, recipe, data, versions.
        restart: begin anew, whatever was finished.

    Raises:
        CheckpointError: the folder can't be made, isn't quantkit's, was begun with another fingerprint, or another run
            is writing in it.
    """
    partial = _partial(output)
    lock = FileLock(str(partial / MARKER), timeout=0)
    left = partial.exists()
    try:
        if left and not (partial / MARKER).is_file():
            raise CheckpointError(f"{partial} exists and isn't quantkit's; move it away or give another -o OUT")
        partial.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"another run is writing to {partial}; wait for it, or give another -o OUT") from error
    except OSError as error:
        raise CheckpointError(f"{partial} cannot be made: {error.strerror}; give another -o OUT") from error
    try:
        refuse_existing(output)
        if left and (restart or not journal.records(partial)):
            log.warning("%s is left from a run that was stopped; starting anew", partial)
            _empty(partial)
        journal.begin(partial, fingerprint)
        if left and journal.records(partial):
            log.warning("%s is left from a run that was stopped; going on from there", partial)
        with _kept_if_worth_it(partial):
            yield partial
            sync(partial)
            _put_in_place(partial, output)
        tidy(output)
    finally:
        lock.release()


@contextmanager
def _kept_if_worth_it(partial: Path) -> Iterator[None]:
    """On any error a folder without a finished stage is removed, and of another it is said how to go on."""
    try:
        yield
    except BaseException:
        if journal.records(partial):
            log.warning("what is finished is kept in %s: the same command goes on from there", partial)
        else:
            _empty(partial)
            shutil.rmtree(partial, ignore_errors=True)
        raise


def tidy(output: Path) -> None:
    """Remove what a finished run leaves in its output when it is stopped just after the last rename."""
    if (output / MARKER).is_file():
        journal.forget(output)
        (output / MARKER).unlink(missing_ok=True)


def _empty(partial: Path) -> None:
    """Remove everything but the marker, which goes last: what a kill leaves behind stays known as ours."""
    for path in partial.iterdir() if partial.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != MARKER:
            path.unlink(missing_ok=True)


def _put_in_place(partial: Path, output: Path) -> None:
    """Rename the finished folder, durably."""
    try:
        partial.rename(output)
    except OSError as error:
        raise CheckpointError(f"{output} cannot be made ({error.strerror}); give another -o OUT") from error
    sync(output.absolute().parent)
