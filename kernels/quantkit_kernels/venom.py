"""V:N:M sparse weights packed: 4 of every M columns for V rows together, and 2:4 within those four.

Castro et al. 2023 (arXiv:2310.02065): sparsity 1 - 2 / M for hardware that knows 2:4 only (there N is 2, in "V:2:M").
N out features, K in features; M divides K, is a multiple of 4 and at most 256. A weight [N, K] is cut into tiles of V
rows and M columns, rows from 0 on (the last tiles have fewer rows where V doesn't divide N); T = K / M tiles lie side
by side, and B = ceil(N / V) one under the other. The weight becomes

- values [N, 2 T] in the weight's dtype: the two kept numbers of every tile of a row, in the order in which they stood;
- indices int32 [N, ceil(T / 8)]: for each value its place, 0 to 3, among the four columns of its tile, in 2 bits. Value
  j of a row lies in word j // 16 of the row, in the bits 2 * (j % 16) and the next, counted from the lowest;
- columns uint8 [B, 4 T]: the four columns of each tile, counted within the tile, 0 to M - 1, each larger than the one
  before. Tile t of row block b has columns[b, 4 t] to columns[b, 4 t + 3], one 32-bit word for whoever reads it so.

So the input that value j of row n meets is M * (j // 2) + columns[n // V, 4 * (j // 2) + place]. Values and indices are
those that `sparse24.pack` makes of the gathered weight [N, 4 T]: zeros fill up from the lowest places. Where fewer than
four columns of a tile hold anything, the lowest empty ones fill up. So every V:N:M weight has one packed form. With M =
4 it is a 2:4 weight. Numbers of 4 bits: the values packed by `pack_int32`, int32 [N, ceil(2 T / 8)].

A weight in bfloat16 costs 2 / M + 1 / (4 M) + 2 / (M V) of its bytes: with 64:2:8 28.5 %.

    values, indices, columns = venom.pack(weight, v, m)
    weight = venom.unpack(values, indices, columns, in_features, v, m)
    kept = venom.mask(scores, v, m)  # bool [N, K]: weight * kept can be packed
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit_kernels import sparse24
from quantkit_kernels.packing import pack_int32, unpack_int32

KEPT = 4
"""Columns of a tile that are kept."""

MOST_COLUMNS = 256
"""The largest M: a column of a tile is a byte."""

_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_PIECE = 1 << 20
"""Weights worked on at a time, so that temporaries stay in cache."""


def mask(scores: Tensor, v: int, m: int) -> Tensor:
    """Return which weights are kept, bool [N, K]: two in each row of each tile, so 2 / M of all.

    Of a tile's columns the four with the largest sums of scores, in float64, over its V rows; then in each row the two
    of these with the largest scores. Of equal ones the first is kept.

    Args:
        scores: [N, K], any float dtype: what it costs to lose each weight, such as its magnitude.
        v: V, rows that share their columns.
        m: M.

    Raises:
        ValueError: for other scores, V, M or K, or a score that is NaN.
    """
    if scores.ndim != 2 or not scores.is_floating_point() or scores.dtype.itemsize < 2:
        raise ValueError(f"scores are {scores.dtype} {list(scores.shape)}: expected [N, K] in float64, 32 or 16")
    check_pattern(scores.shape[1], v, m)
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for rows, blocks, tiles in _row_blocks(scores, v, m):
        if bool(rows.isnan().any()):
            raise ValueError("scores hold NaN: expected a number for each weight")
        sums = rows.new_zeros((blocks.stop - blocks.start, tiles, m), dtype=torch.float64)
        block_of = _block_of(rows.shape[0], v, scores.device)
        sums.index_add_(0, block_of, rows.double())
        columns = _largest(sums, KEPT)
        own = columns[block_of]
        part = slice(blocks.start * v, blocks.start * v + rows.shape[0])
        of_part = torch.zeros_like(rows, dtype=torch.bool).scatter_(2, own, _two_of_four(rows.gather(2, own)))
        kept[part] = of_part.flatten(1)
    return kept


def pack(weight: Tensor, v: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return values [N, 2 T], indices int32 [N, ceil(T / 8)] and columns uint8 [B, 4 T] of a V:N:M weight.

    Args:
        weight: [N, K] in one of `sparse24.VALUE_DTYPES`; in every tile of V rows and M columns at most four columns
            aren't all zero, and in every row of a tile at most two numbers aren't zero.
        v: V.
        m: M.

    Raises:
        ValueError: for another dtype, K, V or M; or a tile that keeps more, which the message names.
    """
    if weight.ndim != 2 or weight.dtype not in sparse24.VALUE_DTYPES:
        raise ValueError(
            f"weight is {weight.dtype} {list(weight.shape)}: expected [N, K] in float32, bfloat16, float16, int8, "
            "float8_e4m3fn or float8_e5m2"
        )
    out_features, in_features = weight.shape
    check_pattern(in_features, v, m)
    tiles = in_features // m
    raw = weight.contiguous().view(_RAW[weight.dtype.itemsize])
    columns = torch.empty((row_blocks(out_features, v), KEPT * tiles), dtype=torch.uint8, device=weight.device)
    gathered = torch.empty((out_features, KEPT * tiles), dtype=raw.dtype, device=weight.device)
    for rows, blocks, _ in _row_blocks(raw, v, m):
        nonzero = sparse24.nonzero(rows.view(weight.dtype))
        block_of = _block_of(rows.shape[0], v, weight.device)
        counts = torch.zeros((blocks.stop - blocks.start, tiles, m), dtype=torch.int32, device=weight.device)
        used = counts.index_add_(0, block_of, nonzero.to(torch.int32)) > 0
        worst = (used.sum(-1) > KEPT).nonzero()
        if len(worst):
            block, tile = worst[0].tolist()
            first = (blocks.start + block) * v
            raise ValueError(
                f"the weight is no {v}:2:{m} weight: in rows {first} to {min(first + v, out_features) - 1} more than "
                f"{KEPT} of columns {m * tile} to {m * tile + m - 1} are in use"
            )
        # those in use come first, then empty ones, each from the lowest on
        found = _largest(used.to(torch.uint8), KEPT)
        columns[blocks] = found.to(torch.uint8).flatten(1)
        part = slice(blocks.start * v, blocks.start * v + rows.shape[0])
        gathered[part] = rows.gather(2, found[block_of]).flatten(1)
    return *sparse24.pack(gathered.view(weight.dtype)), columns


def unpack(values: Tensor, indices: Tensor, columns: Tensor, in_features: int, v: int, m: int) -> Tensor:
    """Return the weight [N, K] in the values' dtype, contiguous, that `pack` packed.

    Args:
        values: [N, 2 T], one of `sparse24.VALUE_DTYPES`.
        indices: [N, ceil(T / 8)], int32, each first place before the second (`sparse24.are_ascending`).
        columns: [B, 4 T], uint8, ascending in every tile (`are_columns`).
        in_features: K.
        v: V.
        m: M.

    Raises:
        ValueError: for other dtypes or shapes.
    """
    check_packed(values, indices, columns, in_features, v, m)
    gathered = sparse24.unpack(values, indices, in_features // m * KEPT)
    raw = gathered.view(_RAW[values.dtype.itemsize])
    out = torch.zeros((values.shape[0], in_features), dtype=raw.dtype, device=values.device)
    for rows, blocks, tiles in _row_blocks(out, v, m):
        part = slice(blocks.start * v, blocks.start * v + rows.shape[0])
        own = (
            columns[blocks]
            .long()
            .view(blocks.stop - blocks.start, tiles, KEPT)[_block_of(rows.shape[0], v, values.device)]
        )
        rows.scatter_(2, own, raw[part].view(rows.shape[0], tiles, KEPT))  # `rows` is a view of `out`
    return out.view(values.dtype)


def pack_int4(codes: Tensor, v: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values of V:N:M codes of 4 bits, int8 [N, K], as int32 words, their indices, and the columns.

    Raises:
        ValueError: as `pack` and `pack_int32`.
    """
    values, indices, columns = pack(codes, v, m)
    return pack_int32(values, 4), indices, columns


def unpack_int4(words: Tensor, indices: Tensor, columns: Tensor, in_features: int, v: int, m: int) -> Tensor:
    """Return the codes int8 [N, K] that `pack_int4` packed."""
    check_pattern(in_features, v, m)
    return unpack(unpack_int32(words, 4, 2 * (in_features // m)), indices, columns, in_features, v, m)


def row_blocks(out_features: int, v: int) -> int:
    """Return how many blocks of V rows there are: B."""
    return -(-out_features // v)


def are_columns(columns: Tensor, m: int) -> bool:
    """Return whether the columns of every tile lie within it and ascend, as `pack` writes them."""
    tiles = columns.reshape(columns.shape[0], columns.shape[1] // KEPT, KEPT).int()
    return bool((tiles[..., 1:] > tiles[..., :-1]).all()) and bool((tiles < m).all())


def check_pattern(in_features: int, v: int, m: int) -> None:
    """Return nothing; raise ValueError unless a weight with so many in features can be V:N:M."""
    if v < 1:
        raise ValueError(f"V is {v}: expected the number of rows that share their columns, such as 64")
    if m < KEPT or m % KEPT or m > MOST_COLUMNS:
        raise ValueError(f"M is {m}: expected a multiple of 4 from 4 to {MOST_COLUMNS}")
    if in_features % m or in_features < 0:
        raise ValueError(f"K is {in_features}: {v}:2:{m} needs a multiple of {m} in features, leave the layer dense")


def check_packed(values: Tensor, indices: Tensor, columns: Tensor, in_features: int, v: int, m: int) -> None:
    """Return nothing; raise ValueError unless the three have the shapes and dtypes of a packed weight."""
    check_pattern(in_features, v, m)
    if values.ndim != 2:
        raise ValueError(f"values are {values.dtype} {list(values.shape)}: expected [N, {2 * (in_features // m)}]")
    sparse24.check_packed(values, indices, in_features // m * KEPT)
    expected = (row_blocks(values.shape[0], v), in_features // m * KEPT)
    if columns.dtype != torch.uint8 or columns.shape != expected:
        raise ValueError(f"columns are {columns.dtype} {list(columns.shape)}: expected torch.uint8 {list(expected)}")


def _row_blocks(matrix: Tensor, v: int, m: int) -> Iterator[tuple[Tensor, slice, int]]:
    """Give some row blocks after the other, of some _PIECE numbers: rows [R, T, M], which blocks they are, and T."""
    out_features, in_features = matrix.shape
    step = max(1, _PIECE // max(1, v * in_features))
    count = row_blocks(out_features, v)
    for start in range(0, count, step):
        blocks = slice(start, min(start + step, count))
        rows = matrix[blocks.start * v : blocks.stop * v]
        yield rows.view(rows.shape[0], in_features // m, m), blocks, in_features // m


def _block_of(rows: int, v: int, device: torch.device) -> Tensor:
    """Return the row block of each of so many rows, counted from the first one's."""
    return torch.arange(rows, device=device) // v


def _largest(numbers: Tensor, count: int) -> Tensor:
    """Return where the largest numbers of the last axis are, int64 [..., count] ascending; of equal ones the first."""
    order = numbers.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def _two_of_four(scores: Tensor) -> Tensor:
    """Return which two of every four scores [..., 4] are the largest, bool; of equal ones the first."""
    four = [each.contiguous() for each in scores.unbind(-1)]
    kept = []
    for i, score in enumerate(four):
        before = [four[j] >= score if j < i else four[j] > score for j in range(KEPT) if j != i]
        # at most one of the three others comes before it
        kept.append(~(before[0] & before[1] | before[0] & before[2] | before[1] & before[2]))
    return torch.stack(kept, dim=-1)
