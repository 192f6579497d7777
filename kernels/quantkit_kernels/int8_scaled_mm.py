# ruff: noqa: N803 (M, N, K and compile-time constants are written large, as Triton writes them)
"""W8A8 matrix product in Triton: int8 codes in, scales and bias in the epilogue, floats out.

Legend of the suffixes: each letter is one axis, in memory order. m tokens (M), n out features (N), k in
features (K): a_mk is [M, K], b_nk is [N, K] with K contiguous, c_mn is [M, N], scale_m one number a token,
scale_n one an out feature. Products are added up in int32, so the integer part is exact; the epilogue is
`generic.epilogue`'s, operation by operation, without fused multiply-add: the bits are those of the other
backends.

The weight stays [N, K] and is transposed in the dot: tensor cores take it so, and rows of a checkpoint need
no copy.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class TileConfig:
    """How the product is cut up: a program makes BLOCK_M by BLOCK_N outputs, BLOCK_K in features at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


GROUP_M = 8
"""Row tiles that share their column tiles in the second-level cache before the next column tile is taken."""

CONFIGS: tuple[tuple[int | None, TileConfig], ...] = (
    (16, TileConfig(16, 64, 256, 4, 4)),
    (32, TileConfig(32, 64, 128, 4, 5)),
    (64, TileConfig(64, 64, 128, 4, 4)),
    (256, TileConfig(64, 128, 128, 4, 3)),
    (None, TileConfig(128, 128, 128, 8, 3)),
)
"""The largest M that each configuration serves, ascending; None is the rest. At small M the weight's bytes are what
costs: narrow tiles make more programs, and more stages keep more bytes on the way. All of them need less than
the 99 KiB of shared memory that sm_86, sm_89 and sm_120 give a program. Chosen by reasoning and by what the
compiler makes of
them; no timing stands behind them."""

UNALIGNED = TileConfig(64, 64, 64, 8, 3)
"""For addresses or rows that are not multiples of 16 bytes: every byte is loaded by itself, into registers, and the
tiles above would spill."""


def tile_config(tokens: int, aligned: bool) -> TileConfig:
    """Return the configuration for M = `tokens`: a fixed choice, so that timings repeat.

    Args:
        tokens: M.
        aligned: whether K, addresses and row strides of both matrices are multiples of 16 bytes.
    """
    if not aligned:
        return UNALIGNED
    return next(config for limit, config in CONFIGS if limit is None or tokens <= limit)


@triton.jit  # type: ignore[untyped-decorator]
def int8_scaled_mm_kernel(  # type: ignore[no-untyped-def]
    a_mk,
    b_nk,
    c_mn,
    scale_m,
    scale_n,
    bias_n,
    M,
    N,
    K,
    stride_am,
    stride_bn,
    stride_cm,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Store c_mn = float(a_mk @ b_nk.T) * scale_m * scale_n + bias_n, one tile a program."""
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    band = program // (GROUP_M * tiles_n)
    band_start = band * GROUP_M
    band_height = tl.minimum(tiles_m - band_start, GROUP_M)
    in_band = program % (GROUP_M * tiles_n)
    tile_m = band_start + in_band % band_height
    tile_n = in_band // band_height

    offset_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offset_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offset_k = tl.arange(0, BLOCK_K)
    inside_m = offset_m < M
    inside_n = offset_n < N
    a_ptrs = a_mk + offset_m.to(tl.int64)[:, None] * stride_am + offset_k[None, :]
    b_ptrs = b_nk + offset_n.to(tl.int64)[:, None] * stride_bn + offset_k[None, :]

    acc_mn = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        inside_k = offset_k < K - step * BLOCK_K
        tile_mk = tl.load(a_ptrs, mask=inside_m[:, None] & inside_k[None, :], other=0)
        tile_nk = tl.load(b_ptrs, mask=inside_n[:, None] & inside_k[None, :], other=0)
        acc_mn = tl.dot(tile_mk, tile_nk.T, acc_mn, out_dtype=tl.int32)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K

    row_scale = tl.load(scale_m + offset_m, mask=inside_m, other=0.0).to(tl.float32)
    column_scale = tl.load(scale_n + offset_n, mask=inside_n, other=0.0).to(tl.float32)
    out_mn = acc_mn.to(tl.float32) * row_scale[:, None] * column_scale[None, :]
    if HAS_BIAS:
        out_mn += tl.load(bias_n + offset_n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    c_ptrs = c_mn + offset_m.to(tl.int64)[:, None] * stride_cm + offset_n[None, :]
    tl.store(c_ptrs, out_mn.to(c_mn.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])


def launch(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    config: TileConfig | None = None,
) -> None:
    """Write the scaled product into `out` [M, N], whose rows are contiguous.

    The other tensors are `scaled_mm`'s. Where `config` is None, `tile_config` chooses how to cut the product up.
    """
    (tokens, in_features), out_features = a.shape, b.shape[0]
    if out.numel() == 0:
        return
    a, b = _contiguous_rows(a), _contiguous_rows(b)
    config = config or tile_config(tokens, _aligned(a) and _aligned(b))
    programs = triton.cdiv(tokens, config.block_m) * triton.cdiv(out_features, config.block_n)
    # Triton launches on the current device; for CPU tensors (the interpreter) this changes nothing
    with torch.cuda.device_of(a):  # type: ignore[no-untyped-call]
        int8_scaled_mm_kernel[(programs,)](
            a,
            b,
            out,
            a_scale.contiguous(),
            b_scale.contiguous(),
            bias.contiguous() if bias is not None else b_scale,
            tokens,
            out_features,
            in_features,
            a.stride(0),
            b.stride(0),
            out.stride(0),
            HAS_BIAS=bias is not None,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=GROUP_M,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )


def scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Return (a @ b.T) * a_scale * b_scale.T + bias, [M, N] in `out_dtype`: what `ops.scaled_mm` says, int8 only.

    The same bits as the other backends. K up to 131071 (beyond, int32 could overflow).

    Args:
        a: [M, K], int8; rows that are not contiguous are copied.
        b: [N, K], int8; rows that are not contiguous are copied.
        a_scale: [M, 1], float32.
        b_scale: [N, 1], any float dtype.
        bias: [N], any float dtype, or None.
        out_dtype: float32, bfloat16 or float16.
    """
    out = torch.empty((a.shape[0], b.shape[0]), dtype=out_dtype, device=a.device)
    launch(out, a, b, a_scale, b_scale, bias)
    return out


def _contiguous_rows(tensor: Tensor) -> Tensor:
    """Return the matrix itself when its rows are contiguous, or a copy that has contiguous rows."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _aligned(matrix: Tensor) -> bool:
    """Return whether every row of the int8 matrix begins at, and is, a multiple of 16 bytes."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 16 == 0 and matrix.shape[1] % 16 == 0
