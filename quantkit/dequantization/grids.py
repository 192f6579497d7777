"""Numbers that blocks of a weight share: which shape they are stored in, and how they meet the codes.

A weight is [..., N, K]. A block is (rows, columns), and the numbers of its blocks are [..., ceil(N / rows),
ceil(K / columns)]: (1, K) is a scale an out feature, (1, 32) one for 32 neighbours, (128, 128) a tile, (N, K) a matrix.
Blocks at the edges may be smaller.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from quantkit.dequantization.base import damaged, leading, runs

Block = tuple[int, int]


def grid(shape: Sequence[int], block: Block) -> tuple[int, ...]:
    """The shape of the numbers that belong to a weight of that shape."""
    *lead, rows, columns = shape
    return (*lead, -(-rows // block[0]), -(-columns // block[1]))


def check_grid(stored: Sequence[int], shape: Sequence[int], block: Block, key: str, where: str) -> None:
    """Return nothing; raise CheckpointError when numbers stored in that shape aren't those of the weight's blocks.

    Axes of length one may be left out: a number a row may be [N], a number a matrix [1] or no axis at all.
    """
    expected = grid(shape, block)
    if tuple(stored) == expected:
        return
    squeezed = [size for size in stored if size != 1]
    fewer = len(stored) < len(expected)
    if fewer and expected[-1] == 1 and squeezed == [size for size in expected if size != 1]:
        return
    raise damaged(where, f"{key!r} is {list(stored)} where {list(expected)} is expected for {list(shape)} weights")


class Blocks:
    """Numbers of blocks, and which of them meet which weights.

    Args:
        numbers: float32, as many as `grid` says.
        shape: [..., N, K] of the weight.
        block: rows and columns that share a number.
        columns: for each of the K columns the place of its number in a row of numbers; None for neighbours.
    """

    def __init__(self, numbers: Tensor, shape: Sequence[int], block: Block, columns: Tensor | None = None) -> None:
        self._rows, self._block = shape[-2], block
        *_, self._grid_rows, self._grid_columns = grid(shape, block)
        self._numbers = numbers.reshape(leading(shape) * self._grid_rows, self._grid_columns)
        ragged = self._grid_columns > 1 and shape[-1] % block[1] != 0
        self._columns = torch.arange(shape[-1]) // block[1] if ragged and columns is None else columns

    def met(self, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """A view of values [R, K], rows `start` and following of all matrices, and the numbers in a shape that fits."""
        row = torch.arange(start, start + values.shape[0])
        matrix = row.div(self._rows, rounding_mode="floor")
        place = matrix * self._grid_rows + (row % self._rows).div(self._block[0], rounding_mode="floor")
        chosen = self._numbers.index_select(0, place)
        if self._grid_columns == 1:
            return values, chosen
        if self._columns is not None:
            return values, chosen.index_select(1, self._columns)
        return values.view(-1, self._grid_columns, self._block[1]), chosen.unsqueeze(-1)


def scaled(
    codes: Tensor,
    read: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    scale: Blocks,
    zero: Blocks | None = None,
) -> Iterator[Tensor]:
    """Yield (code - zero) * scale, rows of a weight [..., N, K] at a time, float32.

    A difference of codes is exact; the product is rounded to float32, which is no rounding at all for scales of 16 bits
    (8 + 11 bits of significand) and for powers of two.

    Args:
        codes: as stored, [..., N, anything].
        read: makes float32 codes [R, K] of some rows of them, in memory of its own.
        shape: [..., N, K].
        scale: multiplies.
        zero: what is subtracted first.
    """
    stored = codes.reshape(-1, codes.shape[-1])
    for start, stop in runs(leading(shape) * shape[-2], shape[-1]):
        values = read(stored[start:stop])
        if zero is not None:
            part, numbers = zero.met(values, start)
            part.sub_(numbers)
        part, numbers = scale.met(values, start)
        part.mul_(numbers)
        yield values
