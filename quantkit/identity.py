"""What tells one model from another: the fingerprint that a run which was stopped is taken up by."""

import hashlib
from pathlib import Path
from typing import Any

from quantkit.checkpoint import Source
from quantkit.errors import CheckpointError
from quantkit.shards import checksum, json_checksum

HEADER_LIMIT = 100_000_000
"""safetensors refuses longer headers."""


def identity(source: Source) -> dict[str, Any]:
    """What a source is known by: its config's hash, and every safetensors file's name, size, time and header's hash.

    A model in memory is known by the hashes of its tensors.
    """
    config = json_checksum(source.config)
    if source.folder is None:
        weights = {name: checksum(source.weights.get(name)) for name in source.weights.tensors}
        return {"config": config, "tensors": json_checksum(weights)}
    return {"config": config, "files": files_of(source.folder)}


def refuse_changed(source: Source, known: dict[str, Any]) -> None:
    """Return nothing; raise CheckpointError when a file of the source is another than when its `identity` was taken."""
    if source.folder is None:
        return
    now = files_of(source.folder)
    for name in {**known["files"], **now}:
        if known["files"].get(name) != now.get(name):
            raise CheckpointError(
                f"shard {source.folder / name} changed while it was read, so that the result would be of two models; "
                "leave the folder alone and give the command again with --restart"
            )


def files_of(folder: Path) -> dict[str, list[Any]]:
    """Size, time and header's hash of every safetensors file of a folder, by its name."""
    return {path.name: _file(path) for path in sorted(folder.glob("*.safetensors"))}


def _file(path: Path) -> list[Any]:
    try:
        status = path.stat()
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, HEADER_LIMIT, status.st_size))
    except OSError as error:
        raise CheckpointError(f"shard {path} cannot be read: {error.strerror}; fetch it again") from error
    return [status.st_size, status.st_mtime_ns, hashlib.blake2b(header, digest_size=16).hexdigest()]
