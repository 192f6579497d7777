# ruff: noqa: N803 (M, N, K and compile-time constants are written large, as Triton writes them)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Some tokens times a packed 2:4 or V:N:M weight in Triton, by tiles on tensor cores.

Tensor cores multiply dense tiles (Triton cannot drive the sparse ones), so what is spared is memory: the packed weight
becomes dense in registers, one of the four places after the other. Legend of the suffixes, each letter an axis in
memory order: m tokens (M), n out features (N), k in features (K), g scales of a row (G), u words of values along K
(`codes.py`), s parts of K.
"""

import triton
import triton.language as tl

from quantkit_kernels.gpu import codes
from quantkit_kernels.gpu.weight_only_tiles import scaled_codes


@triton.jit
def sparse24_kernel(
    x_mk,
    w_nu,
    index_nu,
    column_bk,
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
    rows,
    tile,
    stride_xm,
    stride_wn,
    stride_in,
    stride_cb,
    stride_sn,
    stride_sg,
    stride_os,
    stride_om,
    NUMBERS: tl.constexpr,
    PAIRS: tl.constexpr,
    SCALES: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store out_smn = x_mk @ weight_nk.T + bias_n for `steps` * BLOCK_K in features: one tile a program.

    A word of values holds PAIRS pairs, and the unit of indices beside it as many times 4 bits. SCALES says where scales
    are applied: "row" to the sum, "code" to each code, rounded to the scale's dtype and to x's (4 * PAIRS divides
    groups), "none" where there are none. COMPUTE is x's dtype, or float32 in the interpreter, which cannot compute with
    bfloat16. Axis s is the part of K. COLUMNS: x is gathered first, in feature 4 * t + i being number
    column_bk[b, 4 * t + i] of `tile` * t on, where `rows`, a multiple of BLOCK_N, out features share a b; K counts what
    was gathered.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m = tl.program_id(0) % tiles_m  # neighbours share their rows of the weight
    tile_n = tl.program_id(0) // tiles_m
    offset_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offset_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m = offset_m < M
    inside_n = offset_n < N
    row_n = offset_n.to(tl.int64)
    BLOCK_U: tl.constexpr = BLOCK_K // (4 * PAIRS)
    offset_k = tl.arange(0, BLOCK_K)
    offset_u = tl.arange(0, BLOCK_U)
    first = tl.program_id(1) * steps
    x_ptrs = x_mk + offset_m.to(tl.int64)[:, None] * stride_xm
    w_ptrs = w_nu + row_n[:, None] * stride_wn + offset_u[None, :]
    i_ptrs = index_nu + row_n[:, None] * stride_in + offset_u[None, :]
    c_ptrs = column_bk + (tile_n * BLOCK_N // rows).to(tl.int64) * stride_cb

    acc_nm = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(first, tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))):
        start_k = step * BLOCK_K
        start_u = step * BLOCK_U
        inside_k = offset_k < K - start_k
        if COLUMNS:
            column_k = tl.load(c_ptrs + start_k + offset_k, mask=inside_k, other=0).to(tl.int32)
            place_k = (start_k + offset_k) // 4 * tile + column_k
        else:
            place_k = start_k + offset_k
        x_tile = tl.load(x_ptrs + place_k[None, :], mask=inside_m[:, None] & inside_k[None, :], other=0.0)
        parts = _by_place(x_tile.to(COMPUTE), PAIRS, BLOCK_M, BLOCK_K)
        inside_nu = inside_n[:, None] & (offset_u < units - start_u)[None, :]
        w_tile = tl.load(w_ptrs + start_u, mask=inside_nu, other=0)
        i_tile = tl.load(i_ptrs + start_u, mask=inside_nu, other=0).to(tl.int32)
        if SCALES == "code":
            group_u = (start_u + offset_u) * (4 * PAIRS) // group
            s_ptrs = scale_ng + row_n[:, None] * stride_sn + group_u[None, :] * stride_sg
            scale_nu = tl.load(s_ptrs, mask=inside_nu, other=0.0)
            acc_nm = _product(acc_nm, w_tile, i_tile, parts, exponent, scale_nu, NUMBERS, PAIRS, True, COMPUTE)
        else:
            acc_nm = _product(acc_nm, w_tile, i_tile, parts, exponent, None, NUMBERS, PAIRS, False, COMPUTE)
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
def _by_place(x_mk, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return x taken apart: part 4 * h + t has the numbers that meet place t of pair h of each word, [M, U]."""
    QUARTER: tl.constexpr = BLOCK_K // 4
    even_mk, odd_mk = _halves(x_mk, BLOCK_M, 2 * QUARTER)
    x_0, x_2 = _halves(even_mk, BLOCK_M, QUARTER)
    x_1, x_3 = _halves(odd_mk, BLOCK_M, QUARTER)
    a_0, b_0 = _halves(x_0, BLOCK_M, QUARTER // 2)
    a_1, b_1 = _halves(x_1, BLOCK_M, QUARTER // 2)
    a_2, b_2 = _halves(x_2, BLOCK_M, QUARTER // 2)
    a_3, b_3 = _halves(x_3, BLOCK_M, QUARTER // 2)
    if PAIRS == 2:
        return a_0, a_1, a_2, a_3, b_0, b_1, b_2, b_3
    else:  # noqa: RET505 (Triton compiles what follows a return)
        tl.static_assert(PAIRS == 4)
        a_0, c_0 = _halves(a_0, BLOCK_M, QUARTER // 4)
        a_1, c_1 = _halves(a_1, BLOCK_M, QUARTER // 4)
        a_2, c_2 = _halves(a_2, BLOCK_M, QUARTER // 4)
        a_3, c_3 = _halves(a_3, BLOCK_M, QUARTER // 4)
        b_0, d_0 = _halves(b_0, BLOCK_M, QUARTER // 4)
        b_1, d_1 = _halves(b_1, BLOCK_M, QUARTER // 4)
        b_2, d_2 = _halves(b_2, BLOCK_M, QUARTER // 4)
        b_3, d_3 = _halves(b_3, BLOCK_M, QUARTER // 4)
        return a_0, a_1, a_2, a_3, b_0, b_1, b_2, b_3, c_0, c_1, c_2, c_3, d_0, d_1, d_2, d_3


@triton.jit
def _halves(x_mk, BLOCK_M: tl.constexpr, HALF: tl.constexpr):
    """Return the numbers at even and those at odd places of the last axis, [M, HALF] each."""
    return tl.split(tl.reshape(x_mk, (BLOCK_M, HALF, 2)))


@triton.jit
def _product(
    acc_nm,
    w_nu,
    index_nu,
    parts,
    exponent,
    scale_nu,
    NUMBERS: tl.constexpr,
    PAIRS: tl.constexpr,
    SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Return acc_nm + weight_nk @ x_mk.T: of each word the first place of all its first pairs, then the second...

    The order of K is free as long as both operands have the same: x is taken apart, the weight is not put together.
    """
    for h in tl.static_range(PAIRS):
        one_nu = codes.word_codes(w_nu, exponent, NUMBERS, 2 * h)
        two_nu = codes.word_codes(w_nu, exponent, NUMBERS, 2 * h + 1)
        if SCALED:
            one_nu = scaled_codes(one_nu, scale_nu, COMPUTE)
            two_nu = scaled_codes(two_nu, scale_nu, COMPUTE)
        one_nu = one_nu.to(COMPUTE)
        two_nu = two_nu.to(COMPUTE)
        for place in tl.static_range(4):
            dense_nu = at_place(one_nu, two_nu, index_nu >> (4 * h), place)
            acc_nm = tl.dot(dense_nu, parts[4 * h + place].T, acc_nm)
    return acc_nm


@triton.jit
def at_place(one, two, bits, place: tl.constexpr):
    """Return what stands at a place, 0 to 3, of four: the pair's number with this index, or 0.

    The lowest two bits are the first one's place, 0, 1 or 2, the next two the second one's, 1, 2 or 3.
    """
    found = tl.zeros_like(one)
    if place > 0:
        found = tl.where((bits & 12) == 4 * place, two, found)
    if place == 0:
        found = tl.where((bits & 3) == 0, one, found)
    elif place < 3:  # bit 0 is set for place 1 alone, bit 1 for place 2
        found = tl.where((bits & place) != 0, one, found)
    return found
