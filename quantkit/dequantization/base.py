"""What every kind of compressed source speaks of: the plan of a float checkpoint, and a view that carries it out.

A plan says of every float tensor which stored tensors make it and how. A decoder yields the float32 values of one
tensor in consecutive pieces, in the order in which the tensor lies in memory, so that beside the stored codes and the
result only a piece is held.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.errors import CheckpointError
from quantkit.scheme import LARGEST_COUNT
from quantkit.shards import TensorInfo

PIECE = 1 << 20
"""Elements decoded at a time."""

NUMBERS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
)
"""Dtypes in which scales, zero points and the like are stored."""


class Tensors(Protocol):
    """A model's weights by checkpoint name (`quantkit.checkpoint.Tensors`, which lies above this package)."""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name to shape and dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""

    def get(self, name: str) -> Tensor:
        """One tensor."""


@dataclass(frozen=True)
class Source:
    """A compressed checkpoint.

    Attributes:
        weights: its tensors.
        stored: what its config.json says of compression.
        where: what the user called it.
        shapes: shapes of float tensors by name, as far as the model was asked.
        transposed: float tensors that the model has as [K, N].
    """

    weights: Tensors
    stored: Mapping[str, Any]
    where: str
    shapes: Mapping[str, tuple[int, ...]]
    transposed: Collection[str]


@dataclass(frozen=True)
class Part:
    """A float tensor and what makes it.

    Attributes:
        shape: of the float tensor, out features before in features also where the model has them the other way.
        keys: the stored tensors that it is made of, the codes first.
        decode: takes these tensors in this order; yields float32 pieces, consecutive in the float tensor's own order.
    """

    shape: tuple[int, ...]
    keys: tuple[str, ...]
    decode: Callable[..., Iterator[Tensor]]


@dataclass
class Plan:
    """The float tensors by name, and the stored names that are no tensors of the float checkpoint."""

    parts: dict[str, Part] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    def add(self, name: str, part: Part) -> None:
        """Take a part; what it is made of is no tensor of the float checkpoint any more."""
        self.parts[name] = part
        self.dropped.update(part.keys)


class FloatView:
    """The tensors of a float checkpoint, decoded from a compressed one when they are asked for.

    A decoded value is float32 arithmetic on the stored numbers, rounded once more to the dtype. Tensors that are not
    compressed come as they are stored.

    Attributes:
        tensors: name to TensorInfo; the path is the file of the codes.
    """

    def __init__(self, source: Source, plan: Plan, dtype: torch.dtype) -> None:
        self._weights, self._where, self._transposed = source.weights, source.where, source.transposed
        self._parts, self._dtype = plan.parts, dtype
        for key in (key for part in plan.parts.values() for key in part.keys[1:]):
            stored = source.weights.tensors[key].dtype
            if stored not in NUMBERS:
                raise damaged(source.where, f"{key!r} is {stored}, which scales nothing")
        made_at = {part.keys[0]: (name, part) for name, part in plan.parts.items()}
        self.tensors: dict[str, TensorInfo] = {}
        for key, info in source.weights.tensors.items():
            if key in made_at:
                name, part = made_at[key]
                shape = (*part.shape[:-2], *part.shape[:-3:-1]) if name in self._transposed else part.shape
                self.tensors[name] = TensorInfo(info.path, shape, dtype)
            elif key not in plan.dropped:
                self.tensors[key] = info

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as floats."""
        return sum(info.nbytes for info in self.tensors.values())

    def get(self, name: str) -> Tensor:
        """One tensor; of a decoded one only what it is made of is read.

        Raises:
            CheckpointError: a stored tensor is damaged, or what it holds doesn't fit the others.
        """
        part = self._parts.get(name)
        if part is None:
            self.tensors[name]  # a KeyError for what the float checkpoint doesn't hold, scales for one
            return self._weights.get(name)
        made = torch.empty(part.shape, dtype=self._dtype)
        flat, filled = made.view(-1), 0
        for piece in part.decode(*(self._weights.get(key) for key in part.keys)):
            flat[filled : filled + piece.numel()].copy_(piece.reshape(-1))
            filled += piece.numel()
        if filled != flat.numel():
            raise damaged(self._where, f"{part.keys[0]!r} holds {filled} values where {flat.numel()} are expected")
        return made.mT.contiguous() if name in self._transposed else made


def damaged(where: str, what: str) -> CheckpointError:
    """The error for stored tensors that don't fit one another."""
    return CheckpointError(f"{where} cannot be dequantized: {what}; download it again, or give the float model")


def unknown(where: str, what: str) -> CheckpointError:
    """The error for what is stored in a way that isn't decoded here."""
    return CheckpointError(f"{where} cannot be dequantized: {what}; give the float model that it was made from")


def need(weights: Tensors, key: str, beside: str, where: str) -> TensorInfo:
    """The stored tensor of that name, or CheckpointError when the one beside it has to do without."""
    if key not in weights.tensors:
        raise damaged(where, f"{beside!r} is stored without its {key!r}")
    return weights.tensors[key]


def is_count(value: object) -> bool:
    """Whether a config's value is a number of neighbours that may share a scale."""
    return type(value) is int and 0 < value <= LARGEST_COUNT


def need_shape(info: TensorInfo, expected: Sequence[int], key: str, where: str) -> None:
    """Return nothing; raise CheckpointError when a stored tensor has another shape."""
    if tuple(info.shape) != tuple(expected):
        raise damaged(where, f"{key!r} is {list(info.shape)} where {list(expected)} is expected")


def need_matrix(info: TensorInfo, key: str, where: str) -> tuple[int, ...]:
    """The shape of a stored weight, or CheckpointError when it holds no matrix."""
    if len(info.shape) < 2 or 0 in info.shape:
        raise damaged(where, f"{key!r} has the shape {list(info.shape)}, no matrix")
    return info.shape


def runs(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """The first and past-last row of every piece of a matrix."""
    step = max(1, PIECE // max(columns, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def leading(shape: Sequence[int]) -> int:
    """How many matrices a tensor [..., N, K] holds."""
    return math.prod(shape[:-2])
