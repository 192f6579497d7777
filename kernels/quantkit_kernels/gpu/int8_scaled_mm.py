# ruff: noqa: N803 (M, N, K and compile-time constants are written large, as Triton writes them)
"""W8A8 matrix product in Triton: int8 codes in, scales and bias in the epilogue, floats out.

The suffixes are those of `tiles.py`; scale_m is one number a token, scale_n one an out feature. Products are
added up in int32, so the integer part is exact; the epilogue is `generic.epilogue`'s, operation by operation,
without fused multiply-add: the bits are those of the other backends.

The weight stays [N, K] and is transposed in the dot: tensor cores take it so, and rows of a checkpoint need
no copy. Where a tile has few tokens, the weight is the left operand, which may be long there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.configurations import architecture
from quantkit_kernels.gpu.tiles import (
    TileConfig,
    contiguous_rows,
    launch_tiles,
    load_tile,
    scale_and_store,
    scale_stride,
    tile_config,
    tile_of,
)


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
    stride_scale_m,
    stride_scale_n,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Store c_mn = float(a_mk @ b_nk.T) * scale_m * scale_n + bias_n, one tile a program."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offset_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offset_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.int32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        k = step * BLOCK_K
        tile_mk = load_tile(a_mk, tile_m * BLOCK_M, k, M, K, stride_am, BLOCK_M, BLOCK_K, EVEN_K, DESCRIPTORS)
        tile_nk = load_tile(b_nk, tile_n * BLOCK_N, k, N, K, stride_bn, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS)
        if SWAP:
            acc = tl.dot(tile_nk, tile_mk.T, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(tile_mk, tile_nk.T, acc, out_dtype=tl.int32)
    if SWAP:
        acc = acc.T
    scale_and_store(
        acc, c_mn, scale_m, scale_n, bias_n, offset_m, offset_n, M, N, stride_cm,
        stride_scale_m, stride_scale_n, HAS_BIAS,
    )  # fmt: skip


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
    if out.numel() == 0:
        return
    a, b = contiguous_rows(a), contiguous_rows(b)
    config = config or tile_config("int8_scaled_mm", a, b, architecture(a.device))
    launch_tiles(
        int8_scaled_mm_kernel,
        out,
        a,
        b,
        a_scale.contiguous(),
        b_scale.contiguous(),
        bias,
        (scale_stride(a_scale), scale_stride(b_scale)),
        config,
        EVEN_K=a.shape[1] % config.block_k == 0,
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
        a_scale: [M, 1], float32; or [1], one scale for all tokens.
        b_scale: [N, 1], any float dtype; or [1], one scale for all out features.
        bias: [N], any float dtype, or None.
        out_dtype: float32, bfloat16 or float16.
    """
    out = torch.empty((a.shape[0], b.shape[0]), dtype=out_dtype, device=a.device)
    launch(out, a, b, a_scale, b_scale, bias)
    return out
