"""The output folder: nothing is overwritten, one run writes at a time, and it appears when all of it is right.

While a run writes, everything lies in a folder beside it, from which a run that was stopped goes on.
"""

import errno
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from quantkit import journal
from quantkit.durable import sync, write_error, writing
from quantkit.errors import CheckpointError

MARKER = "quantkit_partial"
PARTIAL = ".partial"

log = logging.getLogger("quantkit")


def refuse_existing(output: str | Path) -> Path:
    """The output's path, or CheckpointError when something is there already."""
    try:
        path = Path(output).expanduser()
        path = path if path.name not in ("", "..") else path.resolve()
        if path.is_mount() or path.resolve() == Path.cwd():
            kind = "a mount point" if path.is_mount() else "the folder that you are in"
            raise CheckpointError(f"{path} is {kind}, and the result replaces its folder; give a new folder as -o OUT")
        if path.name.endswith(PARTIAL):
            raise CheckpointError(
                f"{path} ends in {PARTIAL}, as the folders of unfinished work do; give another -o OUT"
            )
        partial_of(path).exists()  # its name is longer, and may be too long
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
    partial = partial_of(output)
    there = sum(path.stat().st_size for path in partial.glob("*.safetensors")) if partial.is_dir() else 0
    if free + there < needed:
        raise CheckpointError(
            f"no space: the result takes {needed:,} bytes and the disk of {folder} has {free:,} free; "
            "free some or give another -o OUT"
        )


def partial_of(output: Path) -> Path:
    """The folder that an output is written in until it is whole."""
    return output.with_name(output.name + PARTIAL)


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
    partial = partial_of(output)
    lock = _locked(partial)
    try:
        if journal.records(partial) and not restart:
            journal.refuse_other(partial, fingerprint)
        with _kept_if_worth_it(partial):
            refuse_existing(output)
            if restart or not journal.records(partial):
                if _empty(partial):
                    log.warning("%s is left from a run that was stopped; starting anew", partial)
            else:
                log.warning("%s is left from a run that was stopped; going on from there", partial)
            sync(partial.absolute().parent)
            journal.begin(partial, fingerprint)
            yield partial
            _make_durable(partial)
            _put_in_place(partial, output)
        try:
            tidy(output)
        except CheckpointError as error:
            log.warning("%s is whole, but what its run kept there is not removed yet: %s", output, error)
    finally:
        lock.release()


def _locked(partial: Path) -> FileLock:
    """The lock of a partial folder, held; the folder is made if need be."""
    lock = FileLock(str(partial / MARKER), timeout=0)
    try:
        there = partial.exists() or partial.is_symlink()
        # An empty one is left by a kill between its making and the marker's.
        if there and not (partial / MARKER).is_file() and not (partial.is_dir() and not any(partial.iterdir())):
            raise CheckpointError(f"{partial} exists and isn't quantkit's; move it away or give another -o OUT")
        partial.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"another run is writing to {partial}; wait for it, or give another -o OUT") from error
    except OSError as error:
        with suppress(OSError):
            partial.rmdir()  # an empty one
        raise _not_made(error, partial) from error
    return lock


def _not_made(error: OSError, path: Path) -> CheckpointError:
    """The error for a folder that can't be made or renamed: because of its disk, or of its place."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
        return write_error(error, path)
    return CheckpointError(f"{path} cannot be made: {error.strerror}; give another -o OUT")


@contextmanager
def _kept_if_worth_it(partial: Path) -> Iterator[None]:
    """On any error a folder without a finished stage is removed, and of another it is said how to go on."""
    try:
        yield
    except BaseException:
        if journal.records(partial):
            log.warning("what is finished is kept in %s: the same command goes on from there", partial)
        else:
            with suppress(CheckpointError):
                _empty(partial)
            shutil.rmtree(partial, ignore_errors=True)
        raise


def tidy(output: Path) -> None:
    """Remove what a finished run leaves in its output when it is stopped just after the last rename.

    The marker goes last, when all else is gone for good: with it the next run knows what is to be removed.
    """
    if (output / MARKER).is_file():
        journal.forget(output)
        sync(output)
        with writing(output):
            (output / MARKER).unlink(missing_ok=True)


def _empty(partial: Path) -> bool:
    """Whether there was something to remove but the marker, which stays: what a kill leaves is known as ours.

    The journal goes first: nothing that is half removed is taken for finished.
    """
    with writing(partial):
        found = [path for path in partial.iterdir() if path.name != MARKER] if partial.is_dir() else []
        journal.forget(partial)
        for path in (path for path in found if path.name != journal.STATE):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return bool(found)


def _make_durable(partial: Path) -> None:
    """Sync every file of the finished folder, those that others wrote too, and the folders."""
    for path in sorted(partial.rglob("*"), reverse=True):  # a folder comes after what is in it
        if path.name != MARKER and not path.is_symlink() and path.parent.name != journal.STATE:
            sync(path)
    sync(partial)


def _put_in_place(partial: Path, output: Path) -> None:
    """Rename the finished folder, durably."""
    try:
        partial.rename(output)
    except OSError as error:
        raise _not_made(error, output) from error
    try:
        sync(output.absolute().parent)
    except CheckpointError as error:
        raise CheckpointError(f"{output} is written and verified, and a power cut may take it away: {error}") from error
