# ruff: noqa: N803 (M, N, K and compile-time constants are written large, as Triton writes them)
"""LLM.int8 in Triton (Dettmers et al. 2022, arXiv:2208.07339): outlier columns in float, the rest in int8.

The suffixes are those of `tiles.py`; columns_o are the outlier columns (O) in ascending order, in a buffer for all K,
and their count stands behind them. Nothing waits for the device: the count bounds a loop there.

| M | launches |
| --- | --- |
| 1 | one: `token_kernel` quantizes the token in every program, and multiplies |
| to FEW | two: `quantize_rest_kernel` looks for outliers in all tokens itself; `product_kernel` |
| more | a buffer of zeros, and three: `find_columns_kernel`, `quantize_rest_kernel`, `product_kernel` |

out = (codes @ weight.T * token's scale + outliers @ their columns of the weight) * weight's scale + bias: the int8 sum
is exact, the rest in float32. Without outliers the bits are those of `linear_dynamic`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels import generic
from quantkit_kernels.configurations import architecture, configuration
from quantkit_kernels.gpu.float_products import add_product, compute_type
from quantkit_kernels.gpu.quantization import magnitude, scale_of, to_codes
from quantkit_kernels.gpu.tiles import (
    GROUP_M,
    SWAP_BELOW,
    TileConfig,
    add_bias_and_store,
    contiguous_rows,
    is_aligned,
    load_columns,
    rows_of,
    tile_config,
    tile_of,
)

FEW = 16
"""Up to so many tokens each program of the quantization reads all of them, instead of a launch that does so once."""

FEW_NUMBERS = 16384
"""Numbers that a program of the quantization holds in registers at most: tokens it looks at, times in features."""

OUTLIERS = 16
"""Outlier columns that are multiplied at once: the least that a tensor core takes."""

SCAN = 2048
"""In features that a program for one token takes at once when it looks for the largest magnitude."""

NARROW = 128
"""In features that it takes at once when it looks for outliers to multiply."""

UNALIGNED_TOKEN = {"block_n": 16, "block_k": 128, "num_warps": 4, "num_stages": 3}
"""For one token, where the weight's rows are not multiples of 16 bytes."""


@triton.jit  # type: ignore[untyped-decorator]
def find_columns_kernel(  # type: ignore[no-untyped-def]
    x_mk,
    found_k,
    M,
    K,
    stride_xm,
    limit,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Store 1 for each column of x in which one of BLOCK_M * STEPS tokens is an outlier."""
    offset_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * (BLOCK_M * STEPS)
    found = tl.zeros((BLOCK_K,), dtype=tl.int32)
    for step in range(STEPS):
        offset_m = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (offset_m < M)[:, None] & (offset_k < K)[None, :]
        ptrs = x_mk + offset_m.to(tl.int64)[:, None] * stride_xm + offset_k[None, :]
        values = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
        found = tl.maximum(found, tl.max((tl.abs(values) >= limit).to(tl.int32), axis=0))
    tl.store(found_k + offset_k, found.to(tl.int8), mask=found > 0)  # whoever writes, writes 1


@triton.jit  # type: ignore[untyped-decorator]
def _outliers(x_mk, found_k, offsets, M, K, stride_xm, limit, FEW: tl.constexpr, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return 1 for each of the columns that holds an outlier, else 0, in int32; FEW: by looking at all M tokens."""
    if FEW:
        offset_m = tl.arange(0, BLOCK_M)
        inside = (offset_m < M)[:, None] & (offsets < K)[None, :]
        ptrs = x_mk + offset_m.to(tl.int64)[:, None] * stride_xm + offsets[None, :]
        values = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
        return tl.max((tl.abs(values) >= limit).to(tl.int32), axis=0)
    return tl.load(found_k + offsets, mask=offsets < K, other=0).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _rest(x_mk, row, is_outlier, offsets, K, stride_xm):  # type: ignore[no-untyped-def]
    """Return the token's float32 numbers at these columns, 0 in outlier columns and beyond K."""
    values = tl.load(x_mk + row * stride_xm + offsets, mask=offsets < K, other=0.0).to(tl.float32)
    return tl.where(is_outlier > 0, 0.0, values)


@triton.jit  # type: ignore[untyped-decorator]
def quantize_rest_kernel(  # type: ignore[no-untyped-def]
    x_mk,
    found_k,
    codes_mk,
    scale_m,
    columns_o,
    M,
    K,
    stride_xm,
    limit,
    FEW: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store codes and scale of one token without outlier columns; the program after the last token lists these."""
    row = tl.program_id(0).to(tl.int64)
    offset_k = tl.arange(0, BLOCK_K)
    if row == M:
        count = 0
        for step in range(tl.cdiv(K, BLOCK_K)):
            offsets = step * BLOCK_K + offset_k
            is_outlier = _outliers(x_mk, found_k, offsets, M, K, stride_xm, limit, FEW, BLOCK_M)
            place = count + tl.cumsum(is_outlier, axis=0) - is_outlier
            tl.store(columns_o + place, offsets, mask=is_outlier > 0)
            count += tl.sum(is_outlier, axis=0)
        tl.store(columns_o + K, count)
    elif ONE_BLOCK:
        is_outlier = _outliers(x_mk, found_k, offset_k, M, K, stride_xm, limit, FEW, BLOCK_M)
        values = _rest(x_mk, row, is_outlier, offset_k, K, stride_xm)
        scale = scale_of(tl.max(magnitude(values), axis=0), 127.0)
        tl.store(codes_mk + row * K + offset_k, to_codes(tl.div_rn(values, scale), "int8", False), mask=offset_k < K)
        tl.store(scale_m + row, scale)
    else:
        largest = tl.zeros((BLOCK_K,), dtype=tl.int32)
        for step in range(tl.cdiv(K, BLOCK_K)):
            offsets = step * BLOCK_K + offset_k
            is_outlier = _outliers(x_mk, found_k, offsets, M, K, stride_xm, limit, FEW, BLOCK_M)
            largest = tl.maximum(largest, magnitude(_rest(x_mk, row, is_outlier, offsets, K, stride_xm)))
        scale = scale_of(tl.max(largest, axis=0), 127.0)
        for step in range(tl.cdiv(K, BLOCK_K)):
            offsets = step * BLOCK_K + offset_k
            is_outlier = _outliers(x_mk, found_k, offsets, M, K, stride_xm, limit, FEW, BLOCK_M)
            values = _rest(x_mk, row, is_outlier, offsets, K, stride_xm)
            codes = to_codes(tl.div_rn(values, scale), "int8", False)
            tl.store(codes_mk + row * K + offsets, codes, mask=offsets < K)
        tl.store(scale_m + row, scale)


@triton.jit  # type: ignore[untyped-decorator]
def product_kernel(  # type: ignore[no-untyped-def]
    codes_mk,
    x_mk,
    w_nk,
    c_mn,
    scale_m,
    columns_o,
    scale_n,
    bias_n,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_cm,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Store one tile of the layer's output: the int8 product, then the outlier columns, both scaled, and the bias."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offset_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offset_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_ptrs = rows_of(codes_mk, offset_m, M, K, BLOCK_K)
    w_ptrs = rows_of(w_nk, offset_n, N, stride_wn, BLOCK_K)
    if SWAP:  # noqa: SIM108 (decided by the compiler)
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        left = K - step * BLOCK_K
        tile_mk = load_columns(a_ptrs, left, BLOCK_K, EVEN_K)
        tile_nk = load_columns(w_ptrs, left, BLOCK_K, EVEN_K)
        if SWAP:
            acc = tl.dot(tile_nk, tile_mk.T, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(tile_mk, tile_nk.T, acc, out_dtype=tl.int32)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if SWAP:
        acc = acc.T
    row_scale = tl.load(scale_m + offset_m, mask=offset_m < M, other=0.0)
    out_mn = acc.to(tl.float32) * row_scale[:, None]

    x_rows = x_mk + tl.minimum(offset_m, M - 1).to(tl.int64) * stride_xm
    w_rows = w_nk + tl.minimum(offset_n, N - 1).to(tl.int64) * stride_wn
    count = tl.load(columns_o + K)
    for step in tl.range(tl.cdiv(count, OUTLIERS), num_stages=1):
        place = step * OUTLIERS + tl.arange(0, OUTLIERS)
        inside = (place < count)[None, :]
        column = tl.load(columns_o + place, mask=place < count, other=0)[None, :]
        outliers_mo = tl.load(x_rows[:, None] + column, mask=inside, other=0.0)
        weight_no = tl.load(w_rows[:, None] + column, mask=inside, other=0)
        out_mn = add_product(outliers_mo, weight_no, out_mn, "int8", COMPUTE)

    out_mn *= tl.load(scale_n + offset_n, mask=offset_n < N, other=0.0).to(tl.float32)[None, :]
    add_bias_and_store(out_mn, c_mn, bias_n, offset_m, offset_n, M, N, stride_cm, HAS_BIAS)


@triton.jit  # type: ignore[untyped-decorator]
def token_kernel(  # type: ignore[no-untyped-def]
    x_k,
    w_nk,
    c_n,
    scale_n,
    bias_n,
    N,
    K,
    stride_wn,
    limit,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    SCAN: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store BLOCK_N outputs for one token, which every program quantizes for itself: little beside the weight."""
    largest = tl.zeros((SCAN,), dtype=tl.int32)
    outliers = tl.zeros((SCAN,), dtype=tl.int32)
    for step in range(tl.cdiv(K, SCAN)):
        offsets = step * SCAN + tl.arange(0, SCAN)
        values = tl.load(x_k + offsets, mask=offsets < K, other=0.0).to(tl.float32)
        is_outlier = tl.abs(values) >= limit
        largest = tl.maximum(largest, magnitude(tl.where(is_outlier, 0.0, values)))
        outliers += is_outlier.to(tl.int32)
    scale = scale_of(tl.max(largest, axis=0), 127.0)

    offset_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offset_k = tl.arange(0, BLOCK_K)
    w_ptrs = rows_of(w_nk, offset_n, N, stride_wn, BLOCK_K)
    first = (tl.arange(0, 16) == 0)[None, :]
    acc = tl.zeros((BLOCK_N, 16), dtype=tl.int32)  # a tensor core takes no fewer tokens; the others are zeros
    for step in range(tl.cdiv(K, BLOCK_K)):
        left = K - step * BLOCK_K
        tile_nk = load_columns(w_ptrs, left, BLOCK_K, EVEN_K)
        values = tl.load(x_k + step * BLOCK_K + offset_k, mask=offset_k < left, other=0.0).to(tl.float32)
        rest = tl.where(tl.abs(values) >= limit, 0.0, values)
        codes = to_codes(tl.div_rn(rest, scale), "int8", False)
        tile_km = tl.where(first, codes[:, None], 0).to(tl.int8)
        acc = tl.dot(tile_nk, tile_km, acc, out_dtype=tl.int32)
        w_ptrs += BLOCK_K
    out_n = tl.sum(acc, axis=1).to(tl.float32) * scale

    if tl.sum(outliers, axis=0) > 0:
        offset_o = tl.arange(0, NARROW)
        narrow_ptrs = rows_of(w_nk, offset_n, N, stride_wn, NARROW)
        for step in range(tl.cdiv(K, NARROW)):
            column = step * NARROW + offset_o
            numbers = tl.load(x_k + column, mask=column < K, other=0.0).to(tl.float32)
            is_large = tl.abs(numbers) >= limit
            if tl.max(is_large.to(tl.int32), axis=0) > 0:  # of the weight just these columns are read
                tile_no = tl.load(narrow_ptrs + step * NARROW, mask=is_large[None, :], other=0).to(tl.float32)
                out_n += tl.sum(tile_no * tl.where(is_large, numbers, 0.0)[None, :], axis=1)

    out_n *= tl.load(scale_n + offset_n, mask=offset_n < N, other=0.0).to(tl.float32)
    if HAS_BIAS:
        out_n += tl.load(bias_n + offset_n, mask=offset_n < N, other=0.0).to(tl.float32)
    tl.store(c_n + offset_n, out_n.to(c_n.dtype.element_ty), mask=offset_n < N)


def launch(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: float,
    config: TileConfig | None = None,
) -> None:
    """Write the layer's output into `out` [M, N], whose rows are contiguous, for x [M, K].

    The other tensors are `linear_llm_int8`'s. Where `config` is None the tables choose how the product is cut up, and
    one token is one launch.
    """
    if out.numel() == 0:
        return
    x, weight = contiguous_rows(x), contiguous_rows(weight)
    limit = generic.in_float32(threshold)
    scale = weight_scale.contiguous()
    bias = bias.contiguous() if bias is not None else None
    # Triton launches on the current device; for CPU tensors (the interpreter) this changes nothing
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        if x.shape[0] == 1 and config is None:
            _launch_token(out, x, weight, scale, bias, limit)
        else:
            codes, x_scale, columns = _quantize_rest(x, limit)
            _launch_product(out, codes, x, weight, x_scale, columns, scale, bias, config)


def linear_llm_int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype: what `ops.linear_llm_int8` says."""
    tokens = generic.tokens(x)
    out = torch.empty((tokens.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    launch(out, tokens, weight, weight_scale, bias, threshold)
    return out.view(*x.shape[:-1], weight.shape[0])


def _launch_token(
    out: Tensor, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, limit: float
) -> None:
    """Write the output [1, N] for one token x [1, K]."""
    out_features, in_features = weight.shape
    config = UNALIGNED_TOKEN
    if is_aligned(weight):
        config = configuration("llm_int8_token", 1, out_features, in_features, architecture(x.device))
    token_kernel[(triton.cdiv(out_features, config["block_n"]),)](
        x,
        weight,
        out,
        weight_scale,
        bias if bias is not None else weight_scale,
        out_features,
        in_features,
        weight.stride(0),
        limit,
        HAS_BIAS=bias is not None,
        EVEN_K=in_features % config["block_k"] == 0,
        SCAN=min(SCAN, triton.next_power_of_2(max(in_features, 1))),
        NARROW=NARROW,
        BLOCK_N=config["block_n"],
        BLOCK_K=config["block_k"],
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        enable_fp_fusion=False,
    )


def _quantize_rest(x: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [M, K] and scales [M] of x without its outlier columns, and these: [K + 1], their count last."""
    tokens, in_features = x.shape
    few = tokens <= FEW
    rows = triton.next_power_of_2(tokens) if few else 1
    block = min(triton.next_power_of_2(max(in_features, 1)), FEW_NUMBERS // rows)
    codes = torch.empty((tokens, in_features), dtype=torch.int8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    columns = torch.empty(in_features + 1, dtype=torch.int32, device=x.device)
    found = columns
    if not few:
        found = torch.zeros(in_features, dtype=torch.int8, device=x.device)
        grid = (triton.cdiv(in_features, 128), triton.cdiv(tokens, 32 * 4))
        if in_features:
            find_columns_kernel[grid](
                x, found, tokens, in_features, x.stride(0), limit, BLOCK_M=32, BLOCK_K=128, STEPS=4, num_warps=4
            )
    quantize_rest_kernel[(tokens + 1,)](
        x,
        found,
        codes,
        scale,
        columns,
        tokens,
        in_features,
        x.stride(0),
        limit,
        FEW=few,
        ONE_BLOCK=in_features <= block,
        BLOCK_M=rows,
        BLOCK_K=block,
        num_warps=max(1, min(16, block * rows // 512)),
        enable_fp_fusion=False,
    )
    return codes, scale, columns


def _launch_product(
    out: Tensor,
    codes: Tensor,
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    columns: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    config: TileConfig | None,
) -> None:
    """Write the output [M, N] of what `_quantize_rest` returned."""
    (tokens, in_features), out_features = codes.shape, weight.shape[0]
    config = config or tile_config("llm_int8", codes, weight, architecture(x.device))
    programs = triton.cdiv(tokens, config.block_m) * triton.cdiv(out_features, config.block_n)
    product_kernel[(programs,)](
        codes,
        x,
        weight,
        out,
        x_scale,
        columns,
        weight_scale,
        bias if bias is not None else weight_scale,
        tokens,
        out_features,
        in_features,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        HAS_BIAS=bias is not None,
        EVEN_K=in_features % config.block_k == 0,
        SWAP=config.block_m < SWAP_BELOW,
        COMPUTE=compute_type(x.dtype),
        OUTLIERS=OUTLIERS,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
    )
