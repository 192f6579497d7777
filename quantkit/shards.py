"""Safetensors files: reading a checkpoint tensor by tensor, and writing one shard by shard. Knows no model."""

import hashlib
import json
import math
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quantkit.durable import put, write_json, writing
from quantkit.errors import CheckpointError
from quantkit.untrusted import is_plain_file, name_trouble, read_json, shown, unambiguous

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MOST_AXES = 64
"""Of a tensor that torch calculates with."""
SMALLEST_SHARD = 16 * 2**20
PIECE = 2**20
"""Bytes that are read at a time where nothing but a hash of them is wanted."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Every dtype that both safetensors and torch know.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, and its shape and dtype as torch has them, from a file's header.

    `start` is the place of its first byte in the file (0 for a tensor that lies in none).
    """

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = field(default=0, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class ShardReader:
    """The tensors of a folder of safetensors files, read one at a time.

    Attributes:
        tensors: name to TensorInfo, for every tensor of every shard.

    Raises:
        CheckpointError: no safetensors file, or one that is missing, truncated or damaged (named).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        for path, names in _shards(folder):
            found = _header(path)
            twice = sorted(found.keys() & self.tensors.keys())
            if twice:
                raise CheckpointError(
                    f"tensor {twice[0]!r} lies in {self.tensors[twice[0]].path.name} and in {path.name}; "
                    "download the checkpoint again"
                )
            missing = sorted(set(names or ()) - set(found))
            if missing:
                raise CheckpointError(
                    f"shard {path} lacks tensor {missing[0]!r}, which {INDEX} places there; download the shard again"
                )
            self.tensors.update(found)

    def get(self, name: str) -> torch.Tensor:
        """The tensor of that name, read from disk (the file is closed again, so that its pages can go)."""
        return read_tensor(self.tensors[name].path, name)

    def checksum(self, name: str) -> str:
        """`checksum` of the tensor of that name as it lies on disk."""
        try:
            return stored_checksum(self.tensors[name])
        except OSError as error:
            path = self.tensors[name].path
            raise CheckpointError(f"tensor {name!r} of shard {path} cannot be read: {error}") from error

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


def _shards(folder: Path) -> Iterator[tuple[Path, list[str] | None]]:
    """Every shard's path, with the names that the index places in it (None for the single file).

    Where both are there the single file counts, as it does for transformers (`_get_resolved_checkpoint_files`).
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        yield folder / SINGLE, None
        return
    if index.is_file():
        for shard, names in sorted(read_index(index).items()):
            if not is_plain_file(folder / shard):
                raise CheckpointError(
                    f"shard {shown(shard, str)} is missing from {folder}, and {INDEX} names it; download it"
                )
            yield folder / shard, names
        return
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as pickle ({pickles[0]}), which can run code when it is read; "
            "convert it to safetensors first (model.save_pretrained of a model that you trust)"
        )
    raise CheckpointError(f"{folder} holds no {SINGLE} and no {INDEX}; give a folder with safetensors weights")


def read_index(index: Path) -> dict[str, list[str]]:
    """Every shard that an index names, with the names of the tensors that it places there.

    Raises:
        CheckpointError: it is no index, or names a file outside of its folder.
    """
    try:
        weight_map = read_json(index, "download it again")["weight_map"]
        shards: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str):
                raise TypeError(f"{shown(shard)} is no file name")
            shards.setdefault(shard, []).append(name)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error!r}); download it again") from error
    for shard in sorted(shards):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names {shown(shard)}, outside of its folder; refuse this checkpoint")
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names {shown(shard)}, which is no safetensors file and might run code when it is read; "
                "convert it to safetensors first (model.save_pretrained of a model that you trust)"
            )
    return shards


def _header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of one file, from its header.

    safetensors itself refuses a header that is longer than the file, and offsets that overlap, leave a hole, lead out
    of the file or don't fit a shape; it looks at sizes before it makes anything.
    """
    try:
        found = {}
        with safe_open(path, framework="pt") as file:
            with path.open("rb") as start:  # safetensors has found the header to be as long as it claims
                size = int.from_bytes(start.read(8), "little")
                entries = unambiguous(start.read(size))
            for name in file.keys():  # noqa: SIM118  (safe_open is no dict)
                view = file.get_slice(name)
                dtype, shape = view.get_dtype(), tuple(view.get_shape())
                _check_entry(path, name, dtype, shape)
                if dtype == "F4":  # the header counts elements, and torch the bytes that hold two each
                    shape = (*shape[:-1], shape[-1] // 2)
                found[name] = TensorInfo(path, shape, DTYPES[dtype], 8 + size + entries[name]["data_offsets"][0])
        return found
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"shard {path} is truncated or damaged ({error}); download it again") from error


def _check_entry(path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Return nothing; raise CheckpointError for a name, dtype or shape that torch or other software can't take."""
    trouble = name_trouble(name)
    if trouble is not None:
        raise CheckpointError(f"tensor {shown(name)} of {path} {trouble}; refuse this checkpoint")
    if dtype not in DTYPES:
        raise CheckpointError(f"tensor {name!r} of {path} has dtype {dtype}, which quantkit doesn't read")
    elements = math.prod(size or 1 for size in shape)  # an axis of none hides how long the others claim to be
    if len(shape) > MOST_AXES or elements * DTYPES[dtype].itemsize >= 2**63:
        raise CheckpointError(f"tensor {name!r} of {path} has the shape {shown(shape)}, which torch cannot hold")


def parse_header(header: bytes, path: Path, data: int) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors header, in the order of names, as `ShardReader` has it from a whole file.

    Args:
        header: the JSON that the 8 bytes at the start of a file give the length of.
        path: where the tensors are said to lie.
        data: how many bytes the file has after the header.

    Raises:
        ValueError: it is no header, the tensors don't fill the file from end to end, or a dtype is none that is read.
        CheckpointError: a name or shape is none that is read.
    """
    try:
        entries = unambiguous(header)
    except RecursionError as error:
        raise ValueError("the header is nested too deeply") from error
    if not isinstance(entries, dict):
        raise ValueError("the header is no JSON object")
    entries.pop("__metadata__", None)
    found, places = {}, []
    for name in sorted(entries):
        try:
            dtype, shape, (begin, end) = (entries[name][key] for key in ("dtype", "shape", "data_offsets"))
            sizes = [*shape, begin, end]
            if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes):
                raise ValueError(f"{sizes} are no sizes")
            known = dtype in DTYPES
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"the header's entry of {name!r} is no tensor: {error!r}") from error
        if not known:
            raise ValueError(f"tensor {name!r} has dtype {dtype}, which quantkit doesn't read")
        _check_entry(path, name, dtype, tuple(shape))
        if dtype == "F4":  # the header counts elements, and torch the bytes that hold two each
            if not shape or shape[-1] % 2:
                raise ValueError(f"tensor {name!r} has {shape} elements of four bits, which fill no whole bytes")
            shape = [*shape[:-1], shape[-1] // 2]
        found[name] = TensorInfo(path, tuple(shape), DTYPES[dtype])
        if end - begin != found[name].nbytes:
            raise ValueError(f"tensor {name!r} takes {found[name].nbytes} bytes and has {end - begin}")
        places.append((begin, end, name))
    filled = 0
    for begin, end, name in sorted(places):
        if begin != filled:
            raise ValueError(f"tensor {name!r} begins at {begin}, and the one before ends at {filled}")
        filled = end
    if filled != data:
        raise ValueError(f"its tensors take {filled} bytes, and the file has {data} for them")
    return found


def checksum(tensor: torch.Tensor) -> str:
    """A hash of a tensor's shape, dtype and bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = _digest(tensor.dtype, tensor.shape)
    digest.update(flat.numpy().data)
    return digest.hexdigest()


def stored_checksum(info: TensorInfo) -> str:
    """`checksum` of a tensor as it lies on disk, read in small pieces and never held whole, or OSError."""
    digest, left, piece = _digest(info.dtype, info.shape), info.nbytes, bytearray(PIECE)
    with info.path.open("rb", buffering=0) as file:
        file.seek(info.start)
        while left and (count := file.readinto(memoryview(piece)[:left])):
            digest.update(memoryview(piece)[:count])
            left -= count
    return digest.hexdigest()


def is_whole(path: Path, checksums: Mapping[str, str]) -> bool:
    """Whether a file holds the tensors that these are the checksums of, every byte of them, and no other."""
    try:
        found = _header(path)
        if found.keys() != checksums.keys():
            return False
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # neither reading nor hashing holds the interpreter
            return dict(zip(found, pool.map(stored_checksum, found.values()), strict=True)) == checksums
    except (CheckpointError, OSError):
        return False


def json_checksum(value: Any) -> str:
    """A hash of a value that JSON can write, the order of keys aside."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _digest(dtype: torch.dtype, shape: Sequence[int]) -> "hashlib._Hash":
    """The hash of a tensor before its bytes."""
    return hashlib.sha256(f"{dtype} {tuple(shape)}".encode())


@dataclass(frozen=True)
class Part:
    """A file of tensors that a run has written: its name, and the names and bytes of what it holds."""

    file: str
    tensors: tuple[str, ...]
    nbytes: int


class ShardWriter:
    """Writes tensors as they come, in parts that are each safe on disk before the next, and makes shards of them.

    A part is written under a temporary name, synced and renamed, with the mode that the umask gives any file. `finish`
    makes the final shards: parts become shards by a rename, and small neighbours are put together; a single shard
    becomes `model.safetensors`. It can be stopped anywhere and called again. The files carry no times, and which tensor
    lies where depends on the parts alone: the same tensors give the same bytes.

    Args:
        folder: where they go.
        max_shard_bytes: the most that a file holds, unless one tensor is larger.
        prefix: what the names of parts begin with.

    Attributes:
        checksums: name of every tensor written to the hash of its bytes.
        parts: what is written, in order.
    """

    def __init__(self, folder: Path, max_shard_bytes: int, prefix: str = "part-") -> None:
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self.prefix = prefix
        self.checksums: dict[str, str] = {}
        self.parts: list[Part] = []
        self._waiting: dict[str, torch.Tensor] = {}
        self._waiting_bytes = 0
        self._storages: set[int] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors written."""
        return sum(part.nbytes for part in self.parts)

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits to be written."""
        return not self._waiting

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take these tensors; write a part whenever the next one would be larger than the limit."""
        for name, tensor in tensors.items():
            if self._waiting and self._waiting_bytes + tensor.nbytes > self.max_shard_bytes:
                self.write()
            kept = tensor.detach().cpu().contiguous()
            storage = kept.untyped_storage().data_ptr()
            # safetensors refuses tensors that share memory.
            self._waiting[name] = kept.clone() if storage in self._storages else kept
            self._storages.add(storage)
            self._waiting_bytes += tensor.nbytes

    def flush(self) -> None:
        """Write what waits, if it is worth a file; a small model becomes one shard that way."""
        if self._waiting_bytes >= self.smallest:
            self.write()

    @property
    def smallest(self) -> int:
        """The fewest bytes that are worth a file."""
        return min(SMALLEST_SHARD, self.max_shard_bytes)

    def write(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        waiting, self._waiting, self._waiting_bytes, self._storages = self._waiting, {}, 0, set()
        part = Part(
            f"{self.prefix}{len(self.parts):05d}.safetensors", tuple(waiting), sum(t.nbytes for t in waiting.values())
        )
        with ThreadPoolExecutor(torch.get_num_threads()) as beside:  # hashing takes as long as writing does
            checksums = beside.map(checksum, waiting.values())
            write_tensors(self.folder / part.file, waiting)
        self.checksums |= dict(zip(waiting, checksums, strict=True))
        self.parts.append(part)

    def read(self, name: str) -> torch.Tensor:
        """A tensor that was written, from the part that holds it."""
        part = next(part for part in self.parts if name in part.tensors)
        return read_tensor(self.folder / part.file, name)

    def shards(self) -> dict[str, list[Part]]:
        """The final shards' names, each with the parts that it is made of."""
        groups = list(grouped(self.parts, self.smallest, self.max_shard_bytes))
        if len(groups) == 1:
            return {SINGLE: groups[0]}
        return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, 1)}

    def is_whole(self, file: str, parts: Sequence[Part]) -> bool:
        """Whether a file holds what was written in these parts, by the checksums."""
        return is_whole(self.folder / file, {name: self.checksums[name] for part in parts for name in part.tensors})

    def finish(self) -> None:
        """Write the rest, make the final shards and their index (none for a single shard).

        A shard that is there already was made of its parts by a run that was stopped.
        """
        self.write()
        weight_map: dict[str, str] = {}
        for final, group in self.shards().items():
            self._make_shard(self.folder / final, group)
            weight_map |= {name: final for part in group for name in part.tensors}
        if len(set(weight_map.values())) > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / INDEX, index)

    def _make_shard(self, final: Path, group: Sequence[Part]) -> None:
        paths = [self.folder / part.file for part in group]
        if not final.exists() and len(paths) == 1:
            with writing(final):
                paths[0].replace(final)
        elif not final.exists():
            found = {
                name: read_tensor(path, name) for path, part in zip(paths, group, strict=True) for name in part.tensors
            }
            write_tensors(final, found)
        for path in paths:
            with writing(path):
                path.unlink(missing_ok=True)


class Onlooker(ShardWriter):
    """Writes nothing: another process of the same run writes these tensors. What is written already can be read."""

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let them go."""


def grouped(parts: Sequence[Part], smallest: int, largest: int) -> Iterator[list[Part]]:
    """The parts of each shard: one, or small neighbours together until they are worth a file."""
    group: list[Part] = []
    size = 0
    for part in parts:
        if group and (part.nbytes >= smallest or size + part.nbytes > largest):
            yield group
            group, size = [], 0
        group.append(part)
        size += part.nbytes
        if size >= smallest:
            yield group
            group, size = [], 0
    if group:
        yield group


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file that is whole and durable when it appears, or raise CheckpointError."""
    temporary = path.with_suffix(".tmp")
    try:
        with writing(path):
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)
            save_file(tensors, temporary, metadata={"format": "pt"})
            # safetensors 0.8 puts a file in its place that only its owner may read.
            temporary.chmod(mode)
        put(temporary, path)
    except CheckpointError:
        with suppress(OSError):  # it would take room on a full disk
            temporary.unlink(missing_ok=True)
        raise


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, or CheckpointError."""
    return {name: read_tensor(path, name) for name in _header(path)}


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file (which is closed again, so that its pages can go), or CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"tensor {name!r} of shard {path} cannot be read: {error}; fetch it again") from error
