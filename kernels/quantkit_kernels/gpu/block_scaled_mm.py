# ruff: noqa: N803 (M, N, K and compile-time constants are written large, as Triton writes them)
"""FP8 matrix product in Triton with scales along K: one for 1 x 128 of the tokens, one for 128 x 128 of the weight.

DeepSeek-V3's scheme (arXiv:2412.19437, section 3.3). The suffixes are those of `tiles.py`; scale_mg is
[M, K / 128], scale_hg [ceil(N / 128), K / 128]. A program takes 128 in features at a time, and at most 128 out
features that share their blocks of the weight, so a step has one scale a token and one for the weight: the tensor
cores' sum over the step, taken from 0, is scaled and added in float32. That promotes sums every 128 by itself.

Fp8 products need sm_89. Few tokens: the weight is the left operand, as in `fp8_scaled_mm.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.configurations import architecture
from quantkit_kernels.gpu.fp8_scaled_mm import require_fp8
from quantkit_kernels.gpu.tiles import (
    UNALIGNED,
    TileConfig,
    add_bias_and_store,
    contiguous_rows,
    launch_tiles,
    load_tile,
    tile_config,
    tile_of,
)

BLOCK = 128
"""In features with one scale, and out features of a block of the weight: `formats.BLOCK`."""

UNALIGNED_BLOCKS = TileConfig(64, 64, BLOCK, 8, 3)
"""What UNALIGNED is elsewhere."""


@triton.jit  # type: ignore[untyped-decorator]
def block_scaled_mm_kernel(  # type: ignore[no-untyped-def]
    a_mk,
    b_nk,
    c_mn,
    scale_mg,
    scale_hg,
    bias_n,
    M,
    N,
    K,
    stride_am,
    stride_bn,
    stride_cm,
    stride_scale_m,
    stride_scale_h,
    HAS_BIAS: tl.constexpr,
    SWAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALVES: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Store c_mn = sum over g of (a_mk @ b_nk.T over block g) * scale_mg * scale_hg, + bias_n, one tile a program.

    BLOCK_K is 128, and BLOCK_N / HALVES divides it.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    WIDTH: tl.constexpr = BLOCK_N // HALVES
    offset_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offset_n = tile_n * BLOCK_N + tl.arange(0, WIDTH)
    row_scale = scale_mg + tl.minimum(offset_m, M - 1).to(tl.int64) * stride_scale_m
    block_scale = scale_hg + (tile_n * BLOCK_N // BLOCK_K) * stride_scale_h
    acc = tl.zeros((WIDTH, BLOCK_M) if SWAP else (BLOCK_M, WIDTH), dtype=tl.float32)
    if HALVES == 2:
        right_n = offset_n + WIDTH
        last_block = (N - 1) // BLOCK_K
        right_scale = scale_hg + tl.minimum((tile_n * BLOCK_N + WIDTH) // BLOCK_K, last_block) * stride_scale_h
        right_acc = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
    for step in range(K // BLOCK_K):
        k = step * BLOCK_K
        tile_mk = load_tile(a_mk, tile_m * BLOCK_M, k, M, K, stride_am, BLOCK_M, BLOCK_K, True, DESCRIPTORS)
        tile_nk = load_tile(b_nk, tile_n * BLOCK_N, k, N, K, stride_bn, WIDTH, BLOCK_K, True, DESCRIPTORS)
        token_scale = tl.load(row_scale + step)
        scale = token_scale * tl.load(block_scale + step).to(tl.float32)
        if SWAP:
            acc += tl.dot(tile_nk, tile_mk.T, max_num_imprecise_acc=BLOCK_K) * scale[None, :]
        else:
            acc += tl.dot(tile_mk, tile_nk.T, max_num_imprecise_acc=BLOCK_K) * scale[:, None]
        if HALVES == 2:
            right_nk = load_tile(b_nk, tile_n * BLOCK_N + WIDTH, k, N, K, stride_bn, WIDTH, BLOCK_K, True, DESCRIPTORS)
            scale = token_scale * tl.load(right_scale + step).to(tl.float32)
            right_acc += tl.dot(tile_mk, right_nk.T, max_num_imprecise_acc=BLOCK_K) * scale[:, None]
    if SWAP:
        acc = acc.T
    add_bias_and_store(acc, c_mn, bias_n, offset_m, offset_n, M, N, stride_cm, HAS_BIAS)
    if HALVES == 2:
        add_bias_and_store(right_acc, c_mn, bias_n, offset_m, right_n, M, N, stride_cm, HAS_BIAS)


def launch(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    config: TileConfig | None = None,
) -> None:
    """Write the product into `out` [M, N], whose rows are contiguous.

    The other tensors are `block_scaled_mm`'s. Where `config` is None, `tile_config` chooses how to cut the product up.

    Raises:
        KernelError: before sm_89.
    """
    device = architecture(a.device)
    require_fp8(device)
    if out.numel() == 0:
        return
    a, b = contiguous_rows(a), contiguous_rows(b)
    config = config or tile_config("block_scaled_mm", a, b, device)
    if config == UNALIGNED:
        config = UNALIGNED_BLOCKS
    assert config.block_k == BLOCK, f"{config}: a step has one scale"
    assert BLOCK % (config.block_n // config.halves) == 0, f"{config}: a tile has one scale a step"
    a_scale, b_scale = a_scale.contiguous(), b_scale.contiguous()
    strides = a_scale.stride(0), b_scale.stride(0)
    launch_tiles(block_scaled_mm_kernel, out, a, b, a_scale, b_scale, bias, strides, config, HALVES=config.halves)


def block_scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Return the product of the decoded codes plus bias, [M, N] in `out_dtype`: what `ops.linear_block` multiplies.

    A block's sum is taken in float32 (on sm_90 with the tensor cores' fewer bits), times the product of the two
    scales, rounded once; added in float32.

    Args:
        a: [M, K], fp8; 128 divides K; rows that are not contiguous are copied.
        b: [N, K], the same dtype; rows that are not contiguous are copied.
        a_scale: [M, K / 128], float32.
        b_scale: [ceil(N / 128), K / 128], any float dtype.
        bias: [N], any float dtype, or None.
        out_dtype: float32, bfloat16 or float16.

    Raises:
        KernelError: before sm_89.
    """
    out = torch.empty((a.shape[0], b.shape[0]), dtype=out_dtype, device=a.device)
    launch(out, a, b, a_scale, b_scale, bias)
    return out
