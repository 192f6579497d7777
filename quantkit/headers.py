"""What a model on the hub is made of, without its weights: small files whole, and of its shards the headers alone.

A safetensors file begins with 8 bytes that say how long its header is, then the header (JSON: names, dtypes, shapes).
Both are asked for by range, to the byte, so that no weight comes along. A server that answers with the whole file is
left at once.
"""

import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from quantkit.errors import CheckpointError
from quantkit.hub import TIMEOUT, Hub, cached, explain, failures, listed, patiently, without_an_answer
from quantkit.progress import Steps
from quantkit.shards import INDEX, SINGLE, ShardReader, TensorInfo, parse_header, read_index

AT_ONCE = 8
"""Headers that are asked for at the same time."""

LENGTH = 8
LARGEST_HEADER = 100_000_000
"""Bytes of a header that safetensors reads at most."""

PARTIAL, BEYOND_THE_END = 206, 416
log = logging.getLogger("quantkit")


class NoPartsError(CheckpointError):
    """Parts of a file can't be had from this hub."""


@dataclass
class Remote:
    """A model on the hub at one commit, of which files and headers can be fetched.

    Attributes:
        name: the model, as org/name.
        hub: how to find it.
        commit: the commit.
        sizes: the bytes of its files.
        fetched: how many bytes came so far.
    """

    name: str
    hub: Hub
    commit: str
    sizes: Mapping[str, int]
    fetched: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def missing(self) -> int:
        """Bytes of its files that are not in the cache."""
        return sum(size for file, size in self.sizes.items() if self.cached(file) is None)

    def cached(self, file: str) -> Path | None:
        """Where the file lies in the cache, or None."""
        return cached(self.name, file, self.commit, self.hub)

    def file(self, file: str) -> Path:
        """Where the file lies in the cache, once it has been fetched."""
        from huggingface_hub import hf_hub_download

        found = self.cached(file)
        if found is not None:
            return found
        words = {**self.hub.download, "revision": self.commit}
        with self._told(file):
            found = Path(patiently(lambda: hf_hub_download(self.name, file, **words), broken=True))
        self._count(self.sizes[file] or found.stat().st_size)
        return found

    def header(self, file: str) -> tuple[bytes, int]:
        """The header (JSON) of a safetensors file, and how many bytes the file has after it.

        Raises:
            CheckpointError: the file ends before its header does, or the hub doesn't give it.
            NoPartsError: the hub gives whole files only.
        """
        with self._told(file):
            start, size = self._part(file, 0, LENGTH)
            length = int.from_bytes(start, "little")
            if len(start) < LENGTH:
                raise self.damaged(file, f"it has {size} bytes")
            if length > min(size - LENGTH, LARGEST_HEADER):
                raise self.damaged(file, f"its header would take {length:,} bytes, and the file has {size:,}")
            header = self._part(file, LENGTH, length)[0] if length else b""
        return header, size - LENGTH - length

    def say(self) -> None:
        """Say on stderr what was fetched, if anything was."""
        if self.fetched:
            log.warning(
                "%s is read at commit %s by config and headers: %s bytes fetched, %s bytes of its files are not here",
                *(self.name, self.commit, f"{self.fetched:,}", f"{self.missing:,}"),
            )

    def damaged(self, file: str, reason: str) -> CheckpointError:
        """The error for a file that is no safetensors file."""
        return CheckpointError(
            f"shard {file} of {self.name} on the hub is truncated or damaged ({reason}); tell its owner, or give "
            "another --revision"
        )

    @contextmanager
    def _told(self, file: str) -> Iterator[None]:
        """A context in which what goes wrong with the hub becomes a CheckpointError."""
        try:
            yield
        except failures() as error:
            reason = explain(error, self.name, self.hub)
            raise CheckpointError(f"{file} of {self.name} cannot be read: {reason}") from error

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.fetched += nbytes

    def _part(self, file: str, start: int, length: int) -> tuple[bytes, int]:
        """These bytes of a file (fewer where it ends before), and the bytes of the whole file."""
        path = self.cached(file)
        if path is None:
            return patiently(lambda: self._ask(file, start, length), broken=True)
        with path.open("rb") as opened:
            opened.seek(start)
            return opened.read(length), path.stat().st_size

    def _ask(self, file: str, start: int, length: int) -> tuple[bytes, int]:
        """The same from the hub; NoPartsError where it answers with something else than the part."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.name, file, revision=self.commit)
        headers = build_hf_headers(token=self.hub.token)
        # A packed answer would have ranges of its own.
        headers |= {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT) as response:
            if response.is_error:
                response.read()
                if response.status_code == BEYOND_THE_END:
                    return b"", start
                hf_raise_for_status(response)
            place = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
            first, last, size = map(int, place.groups()) if place else (-1, -1, -1)
            if response.status_code != PARTIAL or first != start or last - first >= length:
                raise NoPartsError(
                    f"{constants.ENDPOINT} gives {file} of {self.name} only as a whole, not the part that says what "
                    f"is in it; fetch the model with `hf download {self.name}` and run it again, or use another "
                    "HF_ENDPOINT"
                )
            data: bytes = response.read()
        self._count(len(data))
        return data, size


def find(name: str, hub: Hub, skip: Sequence[str]) -> Remote | Path:
    """A model on the hub; or, without an answer from it, the model's folder in the cache, which a line on stderr says.

    Arguments and errors are those of `hub.download`.
    """
    try:
        return Remote(name, hub, *listed(name, hub, skip))
    except failures() as error:
        return without_an_answer(name, hub, {**hub.download, "ignore_patterns": list(skip)}, error)


class HeaderReader(ShardReader):
    """The tensors of a model on the hub by the headers of its shards: names, shapes and dtypes, and no values.

    Args:
        remote: the model.
        folder: where its files would lie.
        placed: its shards, each with the names of the tensors that must be in it.
    """

    def __init__(self, remote: Remote, folder: Path, placed: Mapping[str, Sequence[str]]) -> None:
        self.folder, self.remote = folder, remote
        self.tensors: dict[str, TensorInfo] = {}
        files = sorted(placed)
        for file, (header, data) in zip(files, _headers(remote, files), strict=True):
            try:
                found = parse_header(header, folder / file, data)
            except ValueError as error:
                raise remote.damaged(file, str(error)) from error
            missing = sorted(set(placed[file]) - set(found))
            if missing:
                raise remote.damaged(file, f"it lacks tensor {missing[0]!r}, which {INDEX} places there")
            self.tensors.update(found)

    def get(self, name: str) -> torch.Tensor:
        """Nothing: raises NoPartsError."""
        raise NoPartsError(
            f"the values of tensor {name!r} of {self.remote.name} are needed, and only the headers of its files were "
            f"read; fetch the model with `hf download {self.remote.name}` and run it again"
        )


def _headers(remote: Remote, files: Sequence[str]) -> list[tuple[bytes, int]]:
    """The header of every file, several at a time."""
    pool = ThreadPoolExecutor(AT_ONCE)
    found = []
    try:
        with Steps("reading headers", len(files), "file", disable=not remote.hub.progress or len(files) == 1) as steps:
            for each in pool.map(remote.header, files):
                found.append(each)
                steps.advance()
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def weights_of(remote: Remote, folder: Path) -> ShardReader:
    """The tensors of a model on the hub: from its headers, or from its shards where all of them are in the cache.

    Raises:
        CheckpointError: there are no safetensors files, one is missing or damaged, or the hub doesn't give it.
    """
    if SINGLE in remote.sizes:
        placed: dict[str, list[str]] = {SINGLE: []}
    elif INDEX in remote.sizes:
        placed = read_index(remote.file(INDEX))
    else:
        raise CheckpointError(
            f"{remote.name} holds no {SINGLE} and no {INDEX} on the hub; give a model with safetensors weights"
        )
    absent = sorted(set(placed) - set(remote.sizes))
    if absent:
        raise CheckpointError(
            f"shard {absent[0]} is missing from {remote.name} on the hub, and {INDEX} names it; tell its owner, or "
            "give another --revision"
        )
    if all(remote.cached(file) is not None for file in placed):
        return ShardReader(folder)
    return HeaderReader(remote, folder, placed)
