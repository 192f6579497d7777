"""Tensors that wait on disk: their storages are emptied in place and filled again when they are needed.

Whoever holds the tensor objects (a forward pass that is stopped in the middle, say) needn't know of it: a tensor keeps
its shape and strides, and its storage has no bytes for a while.
"""

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

SMALLEST = 1 << 16
"""Storages of fewer bytes stay in memory."""

PIECE = 1 << 24
"""Bytes that are written and read at a time."""


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

    def put(self, values: Any) -> Parcel:
        """The parcel of all tensors in nested lists, tuples and dicts, whose storages are empty from now on.

        Raises:
            OSError: the disk is full, or another failure to write; then the tensors are as they were.
        """
        found: dict[int, torch.Tensor] = {}
        for leaf in tree_leaves(values):
            if isinstance(leaf, torch.Tensor) and _may_go(leaf) and _address(leaf) not in self._exempt:
                found.setdefault(_address(leaf), leaf)
        parcel = Parcel(
            [_Waiting(tensor, self._file(), tensor.untyped_storage().nbytes()) for tensor in found.values()]
        )
        self.away(parcel)
        return parcel

    def _file(self) -> Path:
        return self._free.pop() if self._free else self.folder / f"{next(self._numbers):06d}.bin"

    def away(self, parcel: Parcel) -> None:
        """Empty the storages again; what was changed in place since is written anew."""
        if parcel.is_away:
            return
        changed = [each for each in parcel.waiting if each.version != each.tensor._version]
        for each in changed:
            with each.file.open("wb") as file:
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
            storage = each.tensor.untyped_storage()
            storage.resize_(each.nbytes)
            with each.file.open("rb") as file:
                for piece in _bytes(each.tensor).split(PIECE):  # type: ignore[no-untyped-call]
                    held = torch.empty(piece.numel(), dtype=torch.uint8)
                    if file.readinto(held.numpy().data) != piece.numel():
                        raise OSError(f"{each.file} is shorter than what was written")
                    piece.copy_(held)
        parcel.is_away = False

    def drop(self, parcel: Parcel) -> None:
        """Forget a parcel; its files are used for others."""
        self._free += [each.file for each in parcel.waiting]
        parcel.waiting = []


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


def total_bytes(values: Iterable[Parcel]) -> int:
    """Bytes that these parcels hold on disk or in memory."""
    return sum(each.nbytes for parcel in values for each in parcel.waiting)
