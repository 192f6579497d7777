"""Tensors that wait on disk: their storages are emptied in place and filled again when they are needed.

Whoever holds the tensor objects (a forward pass that is stopped in the middle, say) needn't know of it: a tensor keeps
its shape and strides, and its storage has no bytes for a while.
"""

import itertools
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

SMALLEST = 1 << 16
"""Storages of fewer bytes stay in memory."""

PIECE = 1 << 24
"""Bytes that are written and read at a time."""


class SpillError(OSError):
    """A file of waiting tensors can't be written or read; it has the `errno` of what went wrong."""


@dataclass(eq=False)
class _Waiting:
    tensor: torch.Tensor
    file: Path
    nbytes: int
    version: int = -1


@dataclass(eq=False)
class Parcel:
    """What is on disk together: the storages of one call's arguments."""

    waiting: list[_Waiting] = field(default_factory=list)
    is_away: bool = False


class Spill:
    """Puts tensors on disk and brings them back, bit by bit the same.

    Args:
        folder: where the files are written; it must exist, and is the caller's to remove.
        exempt: tensors whose storages stay in memory, such as a model's buffers.
    """

    def __init__(self, folder: Path, exempt: Collection[torch.Tensor] = ()) -> None:
        self.folder = folder
        self._exempt = {_address(tensor) for tensor in exempt if not tensor.is_meta}
        self._numbers = itertools.count()
        self._free: list[Path] = []
        self._parcels: dict[int, Parcel] = {}

    def put(self, values: Any, own: Collection[Parcel] = ()) -> Parcel:
        """The parcel of all tensors in nested lists, tuples and dicts, whose storages are empty from now on.

        What lies in one of the parcels in `own` moves over from there. What lies in another is needed at other times as
        well, and stays in memory.

        Raises:
            SpillError: the disk is full, or another failure to write; then the tensors are as they were.
        """
        found: dict[int, torch.Tensor] = {}
        for leaf in tree_leaves(values):
            if not isinstance(leaf, torch.Tensor) or _address(leaf) in self._exempt:
                continue
            if _may_go(leaf) or _address(leaf) in self._parcels:
                found.setdefault(_address(leaf), leaf)
        parcel = Parcel()
        for address, tensor in found.items():
            holder = self._parcels.get(address)
            if holder is None:
                parcel.waiting.append(_Waiting(tensor, self._file(), tensor.untyped_storage().nbytes()))
                self._parcels[address] = parcel
                continue
            waiting = self._taken_out(address, holder)
            if holder in own:
                parcel.waiting.append(waiting)
                self._parcels[address] = parcel
            else:
                self._exempt.add(address)
                self._free.append(waiting.file)
        self.away(parcel)
        return parcel

    def _taken_out(self, address: int, parcel: Parcel) -> _Waiting:
        """What a parcel has of that address, in memory, and no longer part of it."""
        found = next(each for each in parcel.waiting if _address(each.tensor) == address)
        if parcel.is_away:
            _fill(found)
        parcel.waiting.remove(found)
        del self._parcels[address]
        return found

    def _file(self) -> Path:
        return self._free.pop() if self._free else self.folder / f"{next(self._numbers):06d}.bin"

    def away(self, parcel: Parcel) -> None:
        """Empty the storages again; what was changed in place since is written anew."""
        if parcel.is_away:
            return
        changed = [each for each in parcel.waiting if each.version != each.tensor._version]
        for each in changed:
            with _told(), each.file.open("wb") as file:
                for piece in _bytes(each.tensor).split(PIECE):  # type: ignore[no-untyped-call]
                    # A copy: a storage that numpy has looked at can't be resized any more.
                    file.write(piece.to("cpu", copy=True).numpy().data)
        for each in parcel.waiting:
            each.version = each.tensor._version
            each.tensor.untyped_storage().resize_(0)
        parcel.is_away = True

    def back(self, parcel: Parcel) -> None:
        """Fill the storages with what they held."""
        if not parcel.is_away:
            return
        for each in parcel.waiting:
            _fill(each)
        parcel.is_away = False

    def drop(self, parcel: Parcel) -> None:
        """Forget a parcel; its files are used for others."""
        for each in parcel.waiting:
            self._parcels.pop(_address(each.tensor), None)
            self._free.append(each.file)
        parcel.waiting = []

    def rest(self, parcel: Parcel) -> Parcel:
        """What is left of a parcel whose holder let go of it: the tensors that someone else holds as well."""
        left = [each for each in parcel.waiting if _held_elsewhere(each)]
        parcel.waiting = [each for each in parcel.waiting if each not in left]
        self.drop(parcel)
        rest = Parcel(left, parcel.is_away)
        self._parcels |= {_address(each.tensor): rest for each in left}
        return rest


@contextmanager
def _told() -> Iterator[None]:
    """While this lasts whatever the disk refuses is a SpillError."""
    try:
        yield
    except OSError as error:
        raise SpillError(*error.args) from error


def _fill(waiting: _Waiting) -> None:
    """Fill a storage with what it held."""
    waiting.tensor.untyped_storage().resize_(waiting.nbytes)
    with _told(), waiting.file.open("rb") as file:
        for piece in _bytes(waiting.tensor).split(PIECE):  # type: ignore[no-untyped-call]
            held = torch.empty(piece.numel(), dtype=torch.uint8)
            if file.readinto(held.numpy().data) != piece.numel():
                raise OSError(f"{waiting.file} is shorter than what was written")
            piece.copy_(held)


def _held_elsewhere(waiting: _Waiting) -> bool:
    """Whether a tensor, or another of its memory, is held by more than what waits."""
    own = 2  # the attribute, and the argument of getrefcount
    uses = torch._C._storage_Use_Count(waiting.tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]
    return sys.getrefcount(waiting.tensor) > own or uses > 2  # the tensor's, and the object that was just made


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _may_go(tensor: torch.Tensor) -> bool:
    if tensor.is_meta or isinstance(tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return False
    storage = tensor.untyped_storage()
    return storage.nbytes() >= SMALLEST and storage.resizable()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor's storage; writing to them leaves the tensor's version alone."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))
