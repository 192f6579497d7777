# ruff: noqa: N803 (M, N, K, E and compile-time constants are written large, as Triton writes them)
"""The linear layers of all experts of a mixture in one launch, each token by its own expert.

The suffixes are those of `tiles.py`; e experts (E): w_enk is [E, N, K], offsets_e says where each expert's tokens
begin among tokens that are sorted by expert, and after the last one where they end. Tokens lie as they are, without
padding: a tile has tokens of one expert only, and each program finds its expert, from how many tiles the experts before
have. As the host does not know that, it launches as many programs as there could be; those left over end at once.

| KIND | tokens | weight | multiplied as |
| --- | --- | --- | --- |
| int8 | int8 | int8 | int8, exactly, in int32 |
| fp8 | fp8 | fp8 | fp8 (sm_89 and later), promoted as in `fp8_scaled_mm.py` |
| half | fp8 | fp8 | float16, exactly: what processors before sm_89 have |
| float | float | int8 or fp8 | x's dtype, each product exact (`float_products.py`) |
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.configurations import architecture, configuration
from quantkit_kernels.gpu.codes import byte_codes
from quantkit_kernels.gpu.float_products import add_product, compute_type
from quantkit_kernels.gpu.fp8_scaled_mm import LEAST_ARCHITECTURE, PROMOTE_EVERY, multiply_add, promotes
from quantkit_kernels.gpu.quantization import quantize_per_token
from quantkit_kernels.gpu.tiles import GROUP_M, SWAP_BELOW, UNALIGNED, TileConfig, contiguous_rows, tile_of


@triton.jit  # type: ignore[untyped-decorator]
def _tokens_of(tile, offsets_e, M, E, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the tile's expert, its first token, and where the expert's tokens end; E or more where no tile is left."""
    expert_e = tl.arange(0, EXPERTS)
    begin_e = tl.maximum(tl.load(offsets_e + expert_e, mask=expert_e < E, other=0), 0)
    end_e = tl.minimum(tl.load(offsets_e + expert_e + 1, mask=expert_e < E, other=0), M)
    tiles_e = tl.cdiv(tl.maximum(end_e - begin_e, 0), BLOCK_M)
    last_e = tl.cumsum(tiles_e, axis=0)
    expert = tl.sum((last_e <= tile).to(tl.int32), axis=0)
    mine = expert_e == expert
    token = tl.sum(tl.where(mine, begin_e + (tile - (last_e - tiles_e)) * BLOCK_M, 0), axis=0)
    return expert, token, tl.sum(tl.where(mine, end_e, 0), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def grouped_kernel(  # type: ignore[no-untyped-def]
    a_mk,
    w_enk,
    c_mn,
    scale_m,
    scale_en,
    offsets_e,
    M,
    N,
    K,
    E,
    tiles,
    stride_am,
    stride_we,
    stride_wn,
    stride_wk,
    KIND: tl.constexpr,
    NUMBERS: tl.constexpr,
    COMPUTE: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    PROMOTE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Store one tile of c_mn = a_mk @ w_nk.T * scale_m * scale_n, with w and scale_n of the tile's expert."""
    tile_m, tile_n = tile_of(tl.program_id(0), tiles * BLOCK_M, N, BLOCK_M, BLOCK_N, GROUP_M)
    expert, first, end = _tokens_of(tile_m, offsets_e, M, E, EXPERTS, BLOCK_M)
    if expert < E:
        offset_m = first + tl.arange(0, BLOCK_M)
        offset_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        offset_k = tl.arange(0, BLOCK_K)
        row_m = tl.minimum(offset_m, end - 1).to(tl.int64)  # what is beyond is not stored
        row_n = tl.minimum(offset_n, N - 1).to(tl.int64)
        a_ptrs = a_mk + row_m[:, None] * stride_am + offset_k[None, :]
        w_ptrs = w_enk + expert.to(tl.int64) * stride_we + row_n[:, None] * stride_wn + offset_k[None, :] * stride_wk
        SUM: tl.constexpr = tl.int32 if KIND == "int8" else tl.float32
        if SWAP:  # noqa: SIM108 (decided by the compiler)
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=SUM)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
        for step in range(tl.cdiv(K, BLOCK_K)):
            if EVEN_K:
                tile_mk = tl.load(a_ptrs)
                tile_nk = tl.load(w_ptrs)
            else:
                inside = (offset_k < K - step * BLOCK_K)[None, :]
                tile_mk = tl.load(a_ptrs, mask=inside, other=0.0)
                tile_nk = tl.load(w_ptrs, mask=inside, other=0.0)
            if KIND == "float":
                acc = add_product(tile_mk, tile_nk, acc, NUMBERS, COMPUTE)
            elif KIND == "half":
                half_mk = byte_codes(tile_mk, NUMBERS, COMPUTE)
                acc = tl.dot(half_mk, byte_codes(tile_nk, NUMBERS, COMPUTE).T, acc)
            elif KIND == "int8":
                if SWAP:
                    acc = tl.dot(tile_nk, tile_mk.T, acc, out_dtype=tl.int32)
                else:
                    acc = tl.dot(tile_mk, tile_nk.T, acc, out_dtype=tl.int32)
            elif SWAP:
                acc = multiply_add(tile_nk, tile_mk, acc, PROMOTE)
            else:
                acc = multiply_add(tile_mk, tile_nk, acc, PROMOTE)
            a_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * stride_wk
        if SWAP:
            acc = acc.T
        out_mn = acc.to(tl.float32)
        if KIND != "float":
            out_mn *= tl.load(scale_m + offset_m, mask=offset_m < end, other=0.0)[:, None]
        scale_ptrs = scale_en + expert.to(tl.int64) * N + offset_n
        out_mn *= tl.load(scale_ptrs, mask=offset_n < N, other=0.0).to(tl.float32)[None, :]
        c_ptrs = c_mn + offset_m.to(tl.int64)[:, None] * N + offset_n[None, :]
        tl.store(c_ptrs, out_mn.to(c_mn.dtype.element_ty), mask=(offset_m < end)[:, None] & (offset_n < N)[None, :])


def launch(
    out: Tensor,
    a: Tensor,
    weight: Tensor,
    a_scale: Tensor | None,
    weight_scale: Tensor,
    offsets: Tensor,
    config: TileConfig | None = None,
) -> None:
    """Write each token's product with its expert's weight into `out` [M, N], contiguous.

    Args:
        out: float32, bfloat16 or float16.
        a: [M, K], stride 1 along K: codes in the weight's dtype, or floats.
        weight: [E, N, K], int8 or fp8, any strides; fast with stride 1 along K.
        a_scale: [M, 1], float32, contiguous; None where a is floats.
        weight_scale: [E, N, 1], any float dtype.
        offsets: [E + 1], int32, contiguous, ascending from 0 to M. It is not looked at on the host; tokens that no
            expert has are not written, and none beyond M is.
        config: how the product is cut up; None lets the tables choose.
    """
    (tokens, in_features), (experts, out_features, _) = a.shape, weight.shape
    if out.numel() == 0:
        return
    device = architecture(a.device)
    kind, numbers = kind_of(a, weight, device)
    config = config or _config(a, weight, device)
    assert kind != "fp8" or config.block_k <= PROMOTE_EVERY or not promotes(device), f"{config}: sums must be promoted"
    if numbers == "e4m3":
        weight, a = weight.view(torch.uint8), a if kind == "float" else a.view(torch.uint8)
    used = min(tokens, experts)
    tiles = (tokens - used) // config.block_m + used  # each expert with tokens fills all its tiles but one
    # Triton launches on the current device; for CPU tensors (the interpreter) this changes nothing
    with torch.cuda.device_of(a):  # type: ignore[no-untyped-call]
        grouped_kernel[(tiles * triton.cdiv(out_features, config.block_n),)](
            a,
            weight,
            out,
            a_scale if a_scale is not None else weight_scale,
            weight_scale.contiguous(),
            offsets,
            tokens,
            out_features,
            in_features,
            experts,
            tiles,
            a.stride(0),
            *weight.stride(),
            KIND=kind,
            NUMBERS=numbers,
            COMPUTE=compute_type(torch.float16 if kind == "half" else a.dtype),
            EVEN_K=in_features % config.block_k == 0,
            SWAP=config.block_m < SWAP_BELOW and kind in ("int8", "fp8"),
            PROMOTE=promotes(device),
            EXPERTS=triton.next_power_of_2(experts),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=GROUP_M,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )


def linear_grouped(x: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, activations: str) -> Tensor:
    """Return each token's output [M, N] in x's dtype: what `ops.linear_grouped` says."""
    out = torch.empty((x.shape[0], weight.shape[1]), dtype=x.dtype, device=x.device)
    if activations == "token":
        codes, scale = quantize_per_token(x, weight.dtype)
        launch(out, codes, weight, scale, weight_scale, offsets.contiguous())
    else:
        launch(out, contiguous_rows(x), weight, None, weight_scale, offsets.contiguous())
    return out


def kind_of(a: Tensor, weight: Tensor, architecture: int) -> tuple[str, str]:
    """Return the kernel's KIND, and how codes are read where they are multiplied as floats (`codes.py`)."""
    by_bits = weight.dtype == torch.float8_e4m3fn and (architecture < LEAST_ARCHITECTURE or not weight.is_cuda)
    numbers = "int8" if weight.dtype == torch.int8 else ("e4m3" if by_bits else "fp8")
    if a.dtype != weight.dtype:
        return "float", numbers
    if weight.dtype == torch.int8:
        return "int8", numbers
    return ("half" if architecture < LEAST_ARCHITECTURE or not weight.is_cuda else "fp8"), numbers


def _config(a: Tensor, weight: Tensor, architecture: int) -> TileConfig:
    """Return how the product is cut up, by the mean number of tokens of an expert that has some."""
    experts, out_features, in_features = weight.shape
    strides = (a.stride(0), weight.stride(0), weight.stride(1), in_features, a.data_ptr(), weight.data_ptr())
    if weight.stride(2) != 1 or any(number % 16 for number in strides):
        found = UNALIGNED
    else:
        kind, _ = kind_of(a, weight, architecture)
        kernel = "grouped_float" if kind == "float" else "grouped"
        if kind == "half" and architecture < LEAST_ARCHITECTURE:  # codes become twice as wide, one by one
            kernel = "grouped_half"
        tokens = -(-a.shape[0] // min(experts, a.shape[0]))
        found = TileConfig(**configuration(kernel, tokens, out_features, in_features, architecture))
    if a.dtype == torch.float32:  # twice the shared memory, and three products
        return TileConfig(found.block_m, found.block_n, found.block_k // 2, found.num_warps, found.num_stages)
    return found
