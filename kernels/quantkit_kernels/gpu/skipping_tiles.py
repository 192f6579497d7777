# ruff: noqa: N803 (M, N, K and compile-time constants are written large, as Triton writes them)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""One token times the rows of a weight that it needs, in Triton: float32 arithmetic, no tensor cores (`skipping.py`).

Legend of the suffixes, each letter an axis in memory order: m tokens (M), n out features or neurons (N), k in features
(K), s parts of K.
"""

import triton
import triton.language as tl


@triton.jit
def rows_kernel(
    x_mk,
    w_kn,
    scale_n,
    bias_n,
    out_smn,
    N,
    K,
    steps,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_os,
    stride_om,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store out_smn = (sum of x_mk * w_kn where x_mk != 0) * scale_n + bias_n for `steps` * BLOCK_K in features.

    Axis 0 of the programs is the tile of out features, axis 1 the part of K, axis 2 the token.
    """
    offset_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = offset_n < N
    token = tl.program_id(2).to(tl.int64)
    offset_k = tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * steps
    x_ptrs = x_mk + token * stride_xm
    w_ptrs = w_kn + offset_n.to(tl.int64)[None, :] * stride_wn

    acc_kn = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    for step in range(first, tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))):
        row_k = step * BLOCK_K + offset_k
        x_k = tl.load(x_ptrs + row_k.to(tl.int64) * stride_xk, mask=row_k < K, other=0.0).to(tl.float32)
        needed_k = x_k != 0.0  # true of NaN
        if tl.max(needed_k.to(tl.int32), axis=0) > 0:
            w_tile = tl.load(
                w_ptrs + row_k.to(tl.int64)[:, None] * stride_wk, mask=needed_k[:, None] & inside_n[None, :], other=0
            )
            acc_kn += w_tile.to(tl.float32) * x_k[:, None]
    sum_n = tl.sum(acc_kn, axis=0)
    if HAS_SCALE:
        sum_n *= tl.load(scale_n + offset_n, mask=inside_n, other=0.0).to(tl.float32)
    if HAS_BIAS:
        sum_n += tl.load(bias_n + offset_n, mask=inside_n, other=0.0).to(tl.float32)
    out_ptrs = out_smn + tl.program_id(1).to(tl.int64) * stride_os + token * stride_om + offset_n
    tl.store(out_ptrs, sum_n.to(out_smn.dtype.element_ty), mask=inside_n)


@triton.jit
def neurons_kernel(
    x_mk,
    gate_mn,
    w_nk,
    scale_n,
    bias_n,
    out_mn,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_gm,
    stride_gn,
    stride_wn,
    stride_wk,
    stride_om,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store out_mn = (sum over k of x_mk * w_nk * scale_n + bias_n) * gate_mn, and 0 where gate_mn is, for N neurons.

    Axis 0 of the programs is the tile of neurons, axis 1 the token.
    """
    offset_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = offset_n < N
    token = tl.program_id(1).to(tl.int64)
    row_n = offset_n.to(tl.int64)
    gate_n = tl.load(gate_mn + token * stride_gm + row_n * stride_gn, mask=inside_n, other=0.0).to(tl.float32)
    needed_n = gate_n != 0.0  # true of NaN
    value_n = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if tl.max(needed_n.to(tl.int32), axis=0) > 0:
        offset_k = tl.arange(0, BLOCK_K)
        x_ptrs = x_mk + token * stride_xm
        w_ptrs = w_nk + row_n[:, None] * stride_wn
        acc_nk = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            place_k = (start + offset_k).to(tl.int64)
            inside_k = place_k < K
            x_k = tl.load(x_ptrs + place_k * stride_xk, mask=inside_k, other=0.0).to(tl.float32)
            w_tile = tl.load(w_ptrs + place_k[None, :] * stride_wk, mask=needed_n[:, None] & inside_k[None, :], other=0)
            acc_nk += w_tile.to(tl.float32) * x_k[None, :]
        value_n = tl.sum(acc_nk, axis=1)
        if HAS_SCALE:
            value_n *= tl.load(scale_n + offset_n, mask=needed_n, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value_n += tl.load(bias_n + offset_n, mask=needed_n, other=0.0).to(tl.float32)
        value_n *= gate_n  # nothing was loaded of what isn't needed: 0
    tl.store(out_mn + token * stride_om + offset_n, value_n.to(out_mn.dtype.element_ty), mask=inside_n)
