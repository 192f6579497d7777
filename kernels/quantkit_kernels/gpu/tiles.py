# ruff: noqa: N803 (M, N, K and compile-time constants are written large, as Triton writes them)
"""What the scaled products have in common: tiles, their pointers and loads, the epilogue, and the choice of sizes.

Legend of the suffixes: each letter is one axis, in memory order. m tokens (M), n out features (N), k in
features (K): a_mk is [M, K], b_nk is [N, K] with K contiguous, c_mn is [M, N].
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from quantkit_kernels.configurations import configuration
from quantkit_kernels.errors import KernelError

GROUP_M = 8
"""Row tiles that share their column tiles in the second-level cache before the next column tile is taken."""


@dataclass(frozen=True)
class TileConfig:
    """How a product is cut up: a program makes BLOCK_M by BLOCK_N outputs, BLOCK_K in features at a time.

    `halves` 2 makes the left and the right half of the tile one after the other from one load of the tokens: fp8
    sums that are promoted need a second set of registers, and so only one half of it. `descriptors` 1 has whole
    tiles brought in by the copy engine of sm_90 and later, which needs no registers for addresses and no masks.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    halves: int = 1
    descriptors: int = 0


UNALIGNED = TileConfig(64, 64, 64, 8, 3)
"""For addresses or rows that are not multiples of 16 bytes: every byte is loaded by itself, into registers, and the
tiles of the tables would spill. (The product of blocks has 128 in features in a tile, whatever the alignment.)"""

SWAP_BELOW = 64
"""Tiles with fewer tokens than this multiply with the weight on the left: sm_90's wgmma needs 64 rows there."""


@triton.jit  # type: ignore[untyped-decorator]
def tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the row and the column of the program's tile: down GROUP_M row tiles, then the next column tile."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    band = program // (GROUP_M * tiles_n)
    band_start = band * GROUP_M
    band_height = tl.minimum(tiles_m - band_start, GROUP_M)
    in_band = program % (GROUP_M * tiles_n)
    return band_start + in_band % band_height, in_band // band_height


@triton.jit  # type: ignore[untyped-decorator]
def rows_of(matrix, offset, rows, stride, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return pointers to the first BLOCK_K columns of the rows; beyond the last row, to the last row.

    Such rows make outputs that are not stored. So loads need no mask for rows.
    """
    inside = tl.minimum(offset, rows - 1).to(tl.int64)
    return matrix + inside[:, None] * stride + tl.arange(0, BLOCK_K)[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def load_columns(pointers, left, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the tile at the pointers, 0 beyond the `left` columns that are left; EVEN_K: there are enough."""
    if EVEN_K:
        return tl.load(pointers)
    return tl.load(pointers, mask=(tl.arange(0, BLOCK_K) < left)[None, :], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def load_tile(  # type: ignore[no-untyped-def]
    matrix,
    first,
    column,
    rows,
    K,
    stride,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Return the tile [ROWS, BLOCK_K] of a matrix [rows, K] at a row and a column; what lies beyond K is 0.

    What lies beyond the rows makes outputs that are not stored: it is 0 too, or the last row. DESCRIPTORS: `matrix` is
    a tensor descriptor of such tiles, else a pointer to rows `stride` apart.
    """
    if DESCRIPTORS:
        tile = matrix.load([first, column])
    else:
        pointers = rows_of(matrix, first + tl.arange(0, ROWS), rows, stride, BLOCK_K)
        tile = load_columns(pointers + column, K - column, BLOCK_K, EVEN_K)
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def add_bias_and_store(  # type: ignore[no-untyped-def]
    out_mn, c_mn, bias_n, offset_m, offset_n, M, N, stride_cm, HAS_BIAS: tl.constexpr
):
    """Store float32 out_mn + bias_n in c_mn's dtype, inside of [M, N]."""
    if HAS_BIAS:
        out_mn += tl.load(bias_n + offset_n, mask=offset_n < N, other=0.0).to(tl.float32)[None, :]
    pointers = c_mn + offset_m.to(tl.int64)[:, None] * stride_cm + offset_n[None, :]
    tl.store(pointers, out_mn.to(c_mn.dtype.element_ty), mask=(offset_m < M)[:, None] & (offset_n < N)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def scale_and_store(  # type: ignore[no-untyped-def]
    acc_mn,
    c_mn,
    scale_m,
    scale_n,
    bias_n,
    offset_m,
    offset_n,
    M,
    N,
    stride_cm,
    stride_scale_m,
    stride_scale_n,
    HAS_BIAS: tl.constexpr,
):
    """Store float(acc_mn) * scale_m * scale_n + bias_n: `generic.epilogue`, operation by operation."""
    row_scale = tl.load(scale_m + offset_m * stride_scale_m, mask=offset_m < M, other=0.0).to(tl.float32)
    column_scale = tl.load(scale_n + offset_n * stride_scale_n, mask=offset_n < N, other=0.0).to(tl.float32)
    out_mn = acc_mn.to(tl.float32) * row_scale[:, None] * column_scale[None, :]
    add_bias_and_store(out_mn, c_mn, bias_n, offset_m, offset_n, M, N, stride_cm, HAS_BIAS)


def tile_config(kernel: str, a: Tensor, b: Tensor, architecture: int) -> TileConfig:
    """Return the configuration for a [M, K] and b [N, K]: a fixed choice, so that timings repeat.

    Args:
        kernel: name of the kernel in the tables.
        a: [M, K] with contiguous rows.
        b: [N, K] with contiguous rows.
        architecture: what `configurations.architecture` returns.

    Raises:
        KernelError: where the user's table says something else than a TileConfig.
    """
    if not (is_aligned(a) and is_aligned(b)):
        return UNALIGNED
    found = configuration(kernel, a.shape[0], b.shape[0], b.shape[1], architecture)
    try:
        return TileConfig(**found)
    except TypeError as error:
        raise KernelError(
            f"{kernel} has the configuration {found}: expected {', '.join(TileConfig.__annotations__)} "
            "(halves and descriptors may be absent), mend or delete your table"
        ) from error


def operands(a: Tensor, b: Tensor, config: TileConfig) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor]:
    """Return what the kernel is given for a [M, K] and b [N, K]: descriptors of their tiles, or themselves.

    Descriptors, where the configuration wants them, need aligned rows that do not overlap, and one column at least.
    """
    if not config.descriptors or not all(_describable(matrix) for matrix in (a, b)):
        return a, b
    return (
        TensorDescriptor.from_tensor(a, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(b, [config.block_n // config.halves, config.block_k]),
    )


def _describable(matrix: Tensor) -> bool:
    return is_aligned(matrix) and matrix.stride(0) >= matrix.shape[1] > 0


def launch_tiles(
    kernel: Any,
    out: Tensor,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    scale_strides: tuple[int, int],
    config: TileConfig,
    **more: Any,
) -> None:
    """Launch a scaled product over the tiles of `out` [M, N].

    Args:
        kernel: takes the arguments that the scaled products have in common, and `more`.
        out: [M, N] with contiguous rows.
        a: [M, K] with contiguous rows.
        b: [N, K] with contiguous rows.
        a_scale: contiguous, of a.
        b_scale: contiguous, of b.
        bias: [N], or None.
        scale_strides: how far apart the scales of two rows (or blocks of rows) of a and of b are.
        config: how the product is cut up.
        more: further constants and options of the launch.
    """
    (tokens, in_features), out_features = a.shape, b.shape[0]
    a_tiles, b_tiles = operands(a, b, config)
    programs = triton.cdiv(tokens, config.block_m) * triton.cdiv(out_features, config.block_n)
    # Triton launches on the current device; for CPU tensors (the interpreter) this changes nothing
    with torch.cuda.device_of(a):  # type: ignore[no-untyped-call]
        kernel[(programs,)](
            a_tiles,
            b_tiles,
            out,
            a_scale,
            b_scale,
            bias.contiguous() if bias is not None else b_scale,
            tokens,
            out_features,
            in_features,
            a.stride(0),
            b.stride(0),
            out.stride(0),
            *scale_strides,
            HAS_BIAS=bias is not None,
            SWAP=config.block_m < SWAP_BELOW,
            DESCRIPTORS=a_tiles is not a,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=GROUP_M,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **more,
        )


def contiguous_rows(tensor: Tensor) -> Tensor:
    """Return the matrix itself when its rows are contiguous, or a copy that has contiguous rows."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def is_aligned(matrix: Tensor) -> bool:
    """Return whether every row of the one-byte matrix begins at, and is, a multiple of 16 bytes."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 16 == 0 and matrix.shape[1] % 16 == 0


def scale_stride(scale: Tensor) -> int:
    """Return how far apart the scales of two rows are: 1 for [rows, 1], 0 for the one scale [1] of all rows."""
    return 0 if scale.ndim == 1 else 1
