"""Files that are durable once they are written, and one sentence for whatever a disk refuses."""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from quantkit.errors import CheckpointError


def write_error(error: Exception, path: Path) -> CheckpointError:
    """The error for a failed write: what is the matter with the disk, and what to do about it."""
    native = re.search(r"\(os error (\d+)\)", str(error))  # of what isn't Python
    number = getattr(error, "errno", None) or (int(native[1]) if native else None)
    folder, why = path.parent, os.strerror(number) if number else " ".join(str(error).split())
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return CheckpointError(f"no space is left on the disk of {folder}; free some or give another -o OUT")
    if number == errno.EIO:
        return CheckpointError(f"the disk of {folder} fails ({why} at {path.name}); check it or give another -o OUT")
    if number == errno.EROFS:
        return CheckpointError(f"the disk of {folder} can only be read; make it writable or give another -o OUT")
    if number == errno.EFBIG:
        return CheckpointError(
            f"{path} is larger than a file may be here ({why}); raise the limit (ulimit -f), give a smaller "
            "--max-shard-size or another -o OUT"
        )
    return CheckpointError(f"{path} cannot be written: {why}; check the folder's permissions")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While this lasts a file or folder is written: whatever the disk refuses is a CheckpointError."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise write_error(error, path) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file and sync it, or raise CheckpointError."""
    with writing(path):
        path.write_text(text, encoding="utf-8")
    sync(path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON and sync it."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def put(temporary: Path, path: Path) -> None:
    """Give a written file its name, durably: its bytes first, then the name."""
    sync(temporary)
    with writing(path):
        temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file or folder durable, or raise CheckpointError."""
    with writing(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
