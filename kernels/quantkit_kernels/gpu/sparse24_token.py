# ruff: noqa: N803 (M, N, K and compile-time constants are written large, as Triton writes them)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""One token times a packed 2:4 or V:N:M weight in Triton: multiplied and added up in float32, without tensor cores.

With one token every number is used once, so the weight's bytes are what costs, and next to them the selects that find
the input of each number. A program has a few out features and runs along all of K: each thread loads 16 bytes of values
of each of its rows at once and the indices that go with them, and meets them with numbers of x that stay in registers
for all the rows. Legend of the suffixes, each letter an axis in memory order: n out features (N), k in features (K), g
scales of a row (G), u words of values along K (`codes.py`), l threads along K, v words of a thread, t the four in
features of which two are kept.
"""

import triton
import triton.language as tl

from quantkit_kernels.gpu import codes


@triton.jit
def sparse24_token_kernel(
    x_k,
    w_nu,
    index_nu,
    column_bk,
    scale_ng,
    bias_n,
    out_n,
    N,
    units,
    group,
    exponent,
    rows,
    tile,
    stride_wn,
    stride_in,
    stride_cb,
    stride_sn,
    stride_sg,
    NUMBERS: tl.constexpr,
    PAIRS: tl.constexpr,
    SCALES: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Store out_n = sum over the kept numbers of x_k * number * scale_ng + bias_n, BLOCK_N out features a program.

    A word of values holds PAIRS pairs, and the unit of indices beside it as many times 4 bits; four numbers of "fp8",
    which come as they are, count as a word here. `units`, words in a row, is a multiple of WIDE, and `group`, in
    features that share a scale, one of 4 * PAIRS * WIDE. SCALES is "row", "group" or "none". COLUMNS: x is gathered
    first, in feature 4 * t + i being number column_bk[b, 4 * t + i] of `tile` * t on, where `rows`, a multiple of
    BLOCK_N, out features share a b; K counts what was gathered.
    """
    offset_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = offset_n < N
    offset_l = tl.arange(0, LANES) * WIDE
    offset_lv = offset_l[:, None] + tl.arange(0, WIDE)[None, :]
    row_n = offset_n.to(tl.int64)
    if NUMBERS == "fp8":
        offset_lb = 4 * offset_l[:, None] + tl.arange(0, 4 * WIDE)[None, :]
        w_ptrs = w_nu + row_n[:, None, None] * stride_wn + offset_lb[None, :, :]
    else:
        w_ptrs = w_nu + row_n[:, None, None] * stride_wn + offset_lv[None, :, :]
    i_ptrs = index_nu + row_n[:, None, None] * stride_in + offset_lv[None, :, :]
    c_ptrs = column_bk + (tl.program_id(0) * BLOCK_N // rows).to(tl.int64) * stride_cb

    acc_nl = tl.zeros((BLOCK_N, LANES), dtype=tl.float32)
    for start in range(0, units, LANES * WIDE):
        inside_l = offset_l < units - start
        inside_nl = inside_n[:, None] & inside_l[None, :]
        if NUMBERS == "fp8":
            w_nlv = tl.load(w_ptrs + 4 * start, mask=inside_nl[:, :, None], other=0.0)
            pairs = _pairs_of_bytes(w_nlv.to(tl.float32), BLOCK_N, LANES, WIDE)
        else:
            w_nlv = tl.load(w_ptrs + start, mask=inside_nl[:, :, None], other=0)
        index_nlv = tl.load(i_ptrs + start, mask=inside_nl[:, :, None], other=0).to(tl.int32)
        part_nlv = tl.zeros((BLOCK_N, LANES, WIDE), dtype=tl.float32)
        for h in tl.static_range(PAIRS):
            four_lv = (start + offset_lv) * PAIRS + h
            k_lvt = four_lv[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
            if COLUMNS:
                column_lvt = tl.load(c_ptrs + k_lvt, mask=inside_l[:, None, None], other=0).to(tl.int32)
                k_lvt = four_lv[:, :, None] * tile + column_lvt
            x_lvt = tl.load(x_k + k_lvt, mask=inside_l[:, None, None], other=0.0).to(tl.float32)
            even_lvt, odd_lvt = tl.split(tl.reshape(x_lvt, (LANES, WIDE, 2, 2)))
            x0_lv, x2_lv = tl.split(even_lvt)
            x1_lv, x3_lv = tl.split(odd_lvt)
            bits_nlv = index_nlv >> (4 * h)
            # of the pair the first place is 0, 1 or 2, and the second 1, 2 or 3
            first_nlv = tl.where((bits_nlv & 1) != 0, x1_lv[None, :, :], x0_lv[None, :, :])
            first_nlv = tl.where((bits_nlv & 2) != 0, x2_lv[None, :, :], first_nlv)
            second_nlv = tl.where((bits_nlv & 4) != 0, x3_lv[None, :, :], x2_lv[None, :, :])
            second_nlv = tl.where((bits_nlv & 8) != 0, second_nlv, x1_lv[None, :, :])
            if NUMBERS == "fp8":
                part_nlv += pairs[2 * h] * first_nlv
                part_nlv += pairs[2 * h + 1] * second_nlv
            else:
                part_nlv += codes.word_codes(w_nlv, exponent, NUMBERS, 2 * h) * first_nlv
                part_nlv += codes.word_codes(w_nlv, exponent, NUMBERS, 2 * h + 1) * second_nlv
        part_nl = tl.sum(part_nlv, axis=2)
        if SCALES == "group":
            group_l = (start + offset_l) * (4 * PAIRS) // group
            s_ptrs = scale_ng + row_n[:, None] * stride_sn + group_l[None, :] * stride_sg
            part_nl *= tl.load(s_ptrs, mask=inside_nl, other=0.0).to(tl.float32)
        acc_nl += part_nl
    sum_n = tl.sum(acc_nl, axis=1)
    if SCALES == "row":
        sum_n *= tl.load(scale_ng + row_n * stride_sn, mask=inside_n, other=0.0).to(tl.float32)
    if HAS_BIAS:
        sum_n += tl.load(bias_n + offset_n, mask=inside_n, other=0.0).to(tl.float32)
    tl.store(out_n + offset_n, sum_n.to(out_n.dtype.element_ty), mask=inside_n)


@triton.jit
def _pairs_of_bytes(numbers_nlb, BLOCK_N: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr):
    """Return the first, second, third and fourth of every four numbers of a thread, each [N, L, V]."""
    first_nlb, second_nlb = tl.split(tl.reshape(numbers_nlb, (BLOCK_N, LANES, 2 * WIDE, 2)))
    first_0, first_1 = tl.split(tl.reshape(first_nlb, (BLOCK_N, LANES, WIDE, 2)))
    second_0, second_1 = tl.split(tl.reshape(second_nlb, (BLOCK_N, LANES, WIDE, 2)))
    return first_0, second_0, first_1, second_1
