# ruff: noqa: N803 (M, N, K and compile-time constants are written large, as Triton writes them)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Some tokens times a quantized weight in Triton, by tiles on tensor cores, and the sum of parts of K.

Legend of the suffixes, each letter an axis in memory order: m tokens (M), n out features (N), k in features (K), g
scales of a row (G), u units of the weight along K (`codes.py`), s parts of K.
"""

import triton
import triton.language as tl

from quantkit_kernels.gpu import codes


@triton.jit
def weight_only_kernel(
    x_mk,
    w_nu,
    scale_ng,
    bias_n,
    out_smn,
    M,
    N,
    K,
    units,
    group,
    exponent,
    steps,
    stride_xm,
    stride_wn,
    stride_sn,
    stride_sg,
    stride_os,
    stride_om,
    NUMBERS: tl.constexpr,
    PER_UNIT: tl.constexpr,
    SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store out_smn = x_mk @ (codes_nk * scale_ng).T + bias_n for `steps` * BLOCK_K in features: one tile a program.

    SCALES says where scales are applied: "row" to the sum (one a row), "step" to the sum of each BLOCK_K in features
    (which lie within a group), "code" to each code, rounded to the scale's dtype and to x's (PER_UNIT divides groups).
    COMPUTE is x's dtype, or float32 in the interpreter, which cannot compute with bfloat16. Axis s is the part of K.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m = tl.program_id(0) % tiles_m  # neighbours share their rows of the weight
    tile_n = tl.program_id(0) // tiles_m
    offset_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offset_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m = offset_m < M
    inside_n = offset_n < N
    row_n = offset_n.to(tl.int64)
    BLOCK_U: tl.constexpr = BLOCK_K // PER_UNIT
    offset_k = tl.arange(0, BLOCK_K)
    offset_u = tl.arange(0, BLOCK_U)
    first = tl.program_id(1) * steps
    x_ptrs = x_mk + offset_m.to(tl.int64)[:, None] * stride_xm + offset_k[None, :]
    w_ptrs = w_nu + row_n[:, None] * stride_wn + offset_u[None, :]
    NOTHING: tl.constexpr = 0.0 if NUMBERS == "fp8" else 0

    acc_nm = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(first, tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))):
        start_k = step * BLOCK_K
        start_u = step * BLOCK_U
        x_tile = tl.load(x_ptrs + start_k, mask=inside_m[:, None] & (offset_k < K - start_k)[None, :], other=0.0)
        x_tile = x_tile.to(COMPUTE)
        inside_u = offset_u < units - start_u
        w_tile = tl.load(w_ptrs + start_u, mask=inside_n[:, None] & inside_u[None, :], other=NOTHING)
        if SCALES == "code":
            group_u = (start_u + offset_u) * PER_UNIT // group
            s_ptrs = scale_ng + row_n[:, None] * stride_sn + group_u[None, :] * stride_sg
            scale_nu = tl.load(s_ptrs, mask=inside_n[:, None] & inside_u[None, :], other=0.0)
            sum_nm = _product(
                acc_nm, w_tile, x_tile, exponent, scale_nu, NUMBERS, PER_UNIT, True, COMPUTE, BLOCK_M, BLOCK_U
            )
            acc_nm = sum_nm
        elif SCALES == "step":
            s_ptrs = scale_ng + row_n * stride_sn + start_k // group * stride_sg
            scale_n = tl.load(s_ptrs, mask=inside_n, other=0.0).to(tl.float32)
            zero_nm = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            sum_nm = _product(
                zero_nm, w_tile, x_tile, exponent, None, NUMBERS, PER_UNIT, False, COMPUTE, BLOCK_M, BLOCK_U
            )
            acc_nm += sum_nm * scale_n[:, None]
        else:
            acc_nm = _product(
                acc_nm, w_tile, x_tile, exponent, None, NUMBERS, PER_UNIT, False, COMPUTE, BLOCK_M, BLOCK_U
            )
    if SCALES == "row":
        acc_nm *= tl.load(scale_ng + row_n * stride_sn, mask=inside_n, other=0.0).to(tl.float32)[:, None]
    if HAS_BIAS:
        acc_nm += tl.load(bias_n + offset_n, mask=inside_n, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_smn + tl.program_id(1).to(tl.int64) * stride_os + offset_m.to(tl.int64)[:, None] * stride_om
    tl.store(
        out_ptrs + offset_n[None, :],
        tl.trans(acc_nm).to(out_smn.dtype.element_ty),
        mask=inside_m[:, None] & inside_n[None, :],
    )


@triton.jit
def _product(
    acc_nm,
    w_nu,
    x_mk,
    exponent,
    scale_nu,
    NUMBERS: tl.constexpr,
    PER_UNIT: tl.constexpr,
    SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Return acc_nm + codes_nk @ x_mk.T: of words the first code of all, then the second, and so on.

    The order of K is free as long as both operands have the same: x is taken apart in registers, the weight not at all.
    """
    if PER_UNIT == 1:
        w_nk = codes.byte_codes(w_nu, NUMBERS, COMPUTE)
        if SCALED:
            w_nk = scaled_codes(w_nk, scale_nu, COMPUTE)
        acc_nm = tl.dot(w_nk, x_mk.T, acc_nm)
    else:
        HALF: tl.constexpr = PER_UNIT * BLOCK_U // 2
        x_0, x_1 = tl.split(tl.reshape(x_mk, (BLOCK_M, HALF, 2)))  # by bit 0 of k
        x_0, x_2 = tl.split(tl.reshape(x_0, (BLOCK_M, HALF // 2, 2)))  # by bit 1
        x_1, x_3 = tl.split(tl.reshape(x_1, (BLOCK_M, HALF // 2, 2)))
        if PER_UNIT == 4:
            parts = (x_0, x_1, x_2, x_3)
        else:
            tl.static_assert(PER_UNIT == 8)
            x_0, x_4 = tl.split(tl.reshape(x_0, (BLOCK_M, BLOCK_U, 2)))  # by bit 2
            x_1, x_5 = tl.split(tl.reshape(x_1, (BLOCK_M, BLOCK_U, 2)))
            x_2, x_6 = tl.split(tl.reshape(x_2, (BLOCK_M, BLOCK_U, 2)))
            x_3, x_7 = tl.split(tl.reshape(x_3, (BLOCK_M, BLOCK_U, 2)))
            parts = (x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7)  # type: ignore[assignment]
        for i in tl.static_range(PER_UNIT):
            w_nk = codes.word_codes(w_nu, exponent, NUMBERS, i)
            if SCALED:
                w_nk = scaled_codes(w_nk, scale_nu, COMPUTE)
            acc_nm = tl.dot(w_nk.to(COMPUTE), parts[i].T, acc_nm)
    return acc_nm


@triton.jit
def scaled_codes(w_nk, scale_nk, COMPUTE: tl.constexpr):
    """Return codes times scales, rounded to the scales' dtype and then to COMPUTE: `formats.dequantize`."""
    return (w_nk.to(tl.float32) * scale_nk.to(tl.float32)).to(scale_nk.dtype).to(COMPUTE)


@triton.jit
def sum_parts_kernel(
    part_smn, bias_n, out_mn, N, stride_ps, stride_om, PARTS, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """Store out_mn = the sum over s of part_smn, one s after the other, + bias_n: BLOCK out features of one token."""
    token = tl.program_id(0)
    offset_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_n = offset_n < N
    ptrs = part_smn + token.to(tl.int64) * N + offset_n
    sum_n = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(PARTS):
        sum_n += tl.load(ptrs, mask=inside_n, other=0.0)
        ptrs += stride_ps
    if HAS_BIAS:
        sum_n += tl.load(bias_n + offset_n, mask=inside_n, other=0.0).to(tl.float32)
    out_ptrs = out_mn + token.to(tl.int64) * stride_om + offset_n
    tl.store(out_ptrs, sum_n.to(out_mn.dtype.element_ty), mask=inside_n)
