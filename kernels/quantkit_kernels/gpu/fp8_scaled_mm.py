# ruff: noqa: N803 (M, N, K and compile-time constants are written large, as Triton writes them)
"""FP8 matrix product in Triton: E4M3 or E5M2 codes in, scales and bias in the epilogue, floats out.

The suffixes are those of `tiles.py`; scale_m is one number a token or one for all, scale_n one an out feature or
one for all. Fp8 products need sm_89.

Sums: the tensor cores of sm_90 keep about 14 bits of a sum of fp8 products (DeepSeek-V3, arXiv:2412.19437, section
3.3.2), so a tile's at most 128 in features are added up there and the tile's sum goes into float32 outside of them
(PROMOTE). sm_100 adds up in float32.

Few tokens: the weight is the left operand, for wgmma to be used (it needs 64 rows on the left); with tokens on the
left the codes would be widened to float16 one by one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.configurations import architecture, family
from quantkit_kernels.errors import KernelError
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

LEAST_ARCHITECTURE = 89
"""The first architecture with a product of fp8 codes."""

PROMOTE_EVERY = 128
"""Most products that a tensor core adds up before the sum goes into float32 outside of it."""


@triton.jit  # type: ignore[untyped-decorator]
def multiply_add(x, y, acc, PROMOTE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return acc + x @ y.T in float32; PROMOTE: the sum of each 128 products is added by a float32 addition."""
    if PROMOTE:
        # a K of BLOCK_K <= 128; the bound also keeps the compiler from making the addition the tensor core's
        acc += tl.dot(x, y.T, max_num_imprecise_acc=x.shape[1])
    else:
        acc = tl.dot(x, y.T, acc)
    return acc


@triton.jit  # type: ignore[untyped-decorator]
def fp8_scaled_mm_kernel(  # type: ignore[no-untyped-def]
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
    PROMOTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALVES: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Store c_mn = (a_mk @ b_nk.T) * scale_m * scale_n + bias_n, one tile a program."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    WIDTH: tl.constexpr = BLOCK_N // HALVES
    offset_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offset_n = tile_n * BLOCK_N + tl.arange(0, WIDTH)
    acc = tl.zeros((WIDTH, BLOCK_M) if SWAP else (BLOCK_M, WIDTH), dtype=tl.float32)
    if HALVES == 2:
        right_n = offset_n + WIDTH
        right_acc = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        k = step * BLOCK_K
        tile_mk = load_tile(a_mk, tile_m * BLOCK_M, k, M, K, stride_am, BLOCK_M, BLOCK_K, EVEN_K, DESCRIPTORS)
        tile_nk = load_tile(b_nk, tile_n * BLOCK_N, k, N, K, stride_bn, WIDTH, BLOCK_K, EVEN_K, DESCRIPTORS)
        acc = multiply_add(tile_nk, tile_mk, acc, PROMOTE) if SWAP else multiply_add(tile_mk, tile_nk, acc, PROMOTE)
        if HALVES == 2:
            right_nk = load_tile(
                b_nk, tile_n * BLOCK_N + WIDTH, k, N, K, stride_bn, WIDTH, BLOCK_K, EVEN_K, DESCRIPTORS
            )
            right_acc = multiply_add(tile_mk, right_nk, right_acc, PROMOTE)
    if SWAP:
        acc = acc.T
    scale_and_store(
        acc, c_mn, scale_m, scale_n, bias_n, offset_m, offset_n, M, N, stride_cm,
        stride_scale_m, stride_scale_n, HAS_BIAS,
    )  # fmt: skip
    if HALVES == 2:
        scale_and_store(
            right_acc, c_mn, scale_m, scale_n, bias_n, offset_m, right_n, M, N, stride_cm,
            stride_scale_m, stride_scale_n, HAS_BIAS,
        )  # fmt: skip


def promotes(architecture: int) -> bool:
    """Return whether the architecture's tensor cores are given at most PROMOTE_EVERY products to add up.

    All but sm_100's: of those of sm_89 and sm_120 it is not known that they need it, and safe.
    """
    return family(architecture) != 100


def require_fp8(architecture: int) -> None:
    """Raise KernelError unless the architecture multiplies fp8 codes."""
    if architecture < LEAST_ARCHITECTURE:
        raise KernelError(
            f"the device is sm_{architecture}, whose tensor cores do not multiply fp8 codes (sm_{LEAST_ARCHITECTURE} "
            "and later do): use backend 'auto' or 'torch', or a weight-only scheme"
        )


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

    Raises:
        KernelError: before sm_89.
    """
    device = architecture(a.device)
    require_fp8(device)
    if out.numel() == 0:
        return
    a, b = contiguous_rows(a), contiguous_rows(b)
    config = config or tile_config("fp8_scaled_mm", a, b, device)
    assert config.block_k <= PROMOTE_EVERY or not promotes(device), f"{config}: sums must be promoted"
    launch_tiles(
        fp8_scaled_mm_kernel,
        out,
        a,
        b,
        a_scale.contiguous(),
        b_scale.contiguous(),
        bias,
        (scale_stride(a_scale), scale_stride(b_scale)),
        config,
        EVEN_K=a.shape[1] % config.block_k == 0,
        PROMOTE=promotes(device),
        HALVES=config.halves,
        enable_fp_fusion=False,
    )


def scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Return (a @ b.T) * a_scale * b_scale.T + bias, [M, N] in `out_dtype`: what `ops.scaled_mm` says, fp8 only.

    Products of two fp8 codes are exact in float32; their sum is accumulated in float32 but for the at most 128
    products that sm_90's tensor cores add up with fewer bits.

    Args:
        a: [M, K], fp8; rows that are not contiguous are copied.
        b: [N, K], the same dtype; rows that are not contiguous are copied.
        a_scale: [M, 1], float32; or [1], one scale for all tokens.
        b_scale: [N, 1], any float dtype; or [1], one scale for all out features.
        bias: [N], any float dtype, or None.
        out_dtype: float32, bfloat16 or float16.

    Raises:
        KernelError: before sm_89.
    """
    out = torch.empty((a.shape[0], b.shape[0]), dtype=out_dtype, device=a.device)
    launch(out, a, b, a_scale, b_scale, bias)
    return out
