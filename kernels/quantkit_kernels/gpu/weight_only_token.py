# ruff: noqa: N803 (M, N, K and compile-time constants are written large, as Triton writes them)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""One token times a quantized weight in Triton: multiplied and added up in float32, without tensor cores.

With one token every code is used once, so the weight's bytes are what costs. A program has a few out features and runs
along all of K: each thread loads 16 bytes of each of its rows at once, and meets them with numbers of x that stay in
registers for all the rows. Legend of the suffixes, each letter an axis in memory order: n out features (N), k in
features (K), g scales of a row (G), u units of the weight along K (`codes.py`), l threads along K, v units of a thread.
"""

import triton
import triton.language as tl

from quantkit_kernels.gpu import codes


@triton.jit
def weight_only_token_kernel(
    x_k,
    w_nu,
    scale_ng,
    bias_n,
    out_n,
    N,
    units,
    group,
    exponent,
    stride_wn,
    stride_sn,
    stride_sg,
    NUMBERS: tl.constexpr,
    PER_UNIT: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Store out_n = sum over k of x_k * codes_nk * scale_ng + bias_n, BLOCK_N out features a program.

    `units` is a multiple of WIDE, and `group`, in features that share a scale, one of WIDE * PER_UNIT (where ROW_SCALE
    is true the scales are one a row and `group` does not matter).
    """
    offset_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = offset_n < N
    offset_l = tl.arange(0, LANES) * WIDE
    offset_lv = offset_l[:, None] + tl.arange(0, WIDE)[None, :]
    row_n = offset_n.to(tl.int64)
    w_ptrs = w_nu + row_n[:, None, None] * stride_wn + offset_lv[None, :, :]

    NOTHING: tl.constexpr = 0.0 if NUMBERS == "fp8" else 0
    acc_nl = tl.zeros((BLOCK_N, LANES), dtype=tl.float32)
    for start in range(0, units, LANES * WIDE):
        inside_l = offset_l < units - start
        w_nlv = tl.load(w_ptrs + start, mask=inside_n[:, None, None] & inside_l[None, :, None], other=NOTHING)
        if PER_UNIT == 1:
            x_lv = tl.load(x_k + start + offset_lv, mask=inside_l[:, None], other=0.0).to(tl.float32)
            part_nlv = codes.byte_codes(w_nlv, NUMBERS, tl.float32) * x_lv[None, :, :]
        else:
            part_nlv = tl.zeros((BLOCK_N, LANES, WIDE), dtype=tl.float32)
            for i in tl.static_range(PER_UNIT):
                x_ptrs = x_k + (start + offset_lv) * PER_UNIT + i
                x_lv = tl.load(x_ptrs, mask=inside_l[:, None], other=0.0).to(tl.float32)
                part_nlv += codes.word_codes(w_nlv, exponent, NUMBERS, i) * x_lv[None, :, :]
        part_nl = tl.sum(part_nlv, axis=2)
        if ROW_SCALE:
            acc_nl += part_nl
        else:
            group_l = (start + offset_l) * PER_UNIT // group
            s_ptrs = scale_ng + row_n[:, None] * stride_sn + group_l[None, :] * stride_sg
            scale_nl = tl.load(s_ptrs, mask=inside_n[:, None] & inside_l[None, :], other=0.0)
            acc_nl += part_nl * scale_nl.to(tl.float32)
    sum_n = tl.sum(acc_nl, axis=1)
    if ROW_SCALE:
        sum_n *= tl.load(scale_ng + row_n * stride_sn, mask=inside_n, other=0.0).to(tl.float32)
    if HAS_BIAS:
        sum_n += tl.load(bias_n + offset_n, mask=inside_n, other=0.0).to(tl.float32)
    tl.store(out_n + offset_n, sum_n.to(out_n.dtype.element_ty), mask=inside_n)
