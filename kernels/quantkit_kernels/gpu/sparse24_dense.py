# ruff: noqa: N803 (M, N, K and compile-time constants are written large, as Triton writes them)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""A packed 2:4 or V:N:M weight as a dense one in floats, in Triton, for a product that wants the whole weight.

Bit for bit what `generic.linear_sparse24` multiplies with: numbers in float are rounded to the result's dtype, codes
times scales to the scale's dtype and then to the result's. Legend of the suffixes: n out features (N), p pairs of
values along K, k in features (K), g scales of a row (G).
"""

import triton
import triton.language as tl

from quantkit_kernels.gpu import codes
from quantkit_kernels.gpu.sparse24_tiles import at_place

BLOCK_N = 16
BLOCK_P = 64
NUM_WARPS = 4
"""A program writes a tile of 16 by 256: 32 numbers a thread, rows of 512 bytes in bfloat16."""


@triton.jit
def dense_kernel(
    w_nk,
    index_nb,
    column_bk,
    scale_ng,
    out_nk,
    N,
    pairs,
    group,
    rows,
    tile,
    stride_wn,
    stride_in,
    stride_cb,
    stride_sn,
    stride_sg,
    stride_on,
    NUMBERS: tl.constexpr,
    SCALES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Store the dense weight out_nk, a tile a program; of V:N:M (COLUMNS) the kept columns alone.

    NUMBERS is "offset4" for int32 words of eight codes w_nk, else what a number is (`codes.py`, or "float"). index_nb
    is bytes of two pairs. SCALES is "none", "pair" where a pair's four (with COLUMNS: `tile`) in features lie in a
    group, or "code".
    """
    offset_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offset_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside_n = offset_n < N
    inside_p = offset_p < pairs
    inside_np = inside_n[:, None] & inside_p[None, :]
    row_n = offset_n.to(tl.int64)[:, None]
    if NUMBERS == "offset4":
        words_np = tl.load(w_nk + row_n * stride_wn + (offset_p // 4)[None, :], mask=inside_np, other=0)
        fields_np = words_np >> (offset_p % 4 * 8)[None, :]
        one_np = ((fields_np & 15) - 8).to(tl.float32)
        two_np = (((fields_np >> 4) & 15) - 8).to(tl.float32)
    else:
        NOTHING: tl.constexpr = 0.0 if NUMBERS == "fp8" or NUMBERS == "float" else 0
        offset_pair = 2 * offset_p[:, None] + tl.arange(0, 2)[None, :]
        w_ptrs = w_nk + row_n[:, :, None] * stride_wn + offset_pair[None, :, :]
        units = tl.load(w_ptrs, mask=inside_np[:, :, None], other=NOTHING)
        one_np, two_np = tl.split(codes.byte_codes(units, NUMBERS, tl.float32))
    bytes_np = tl.load(index_nb + row_n * stride_in + (offset_p // 2)[None, :], mask=inside_np, other=0)
    bits_np = bytes_np.to(tl.int32) >> (offset_p % 2 * 4)[None, :]
    dense_0 = _weights(one_np, two_np, bits_np, scale_ng, column_bk, out_nk, inside_np, offset_n, offset_p, group, rows,
                       tile, stride_cb, stride_sn, stride_sg, SCALES, COLUMNS, 0)  # fmt: skip
    dense_1 = _weights(one_np, two_np, bits_np, scale_ng, column_bk, out_nk, inside_np, offset_n, offset_p, group, rows,
                       tile, stride_cb, stride_sn, stride_sg, SCALES, COLUMNS, 1)  # fmt: skip
    dense_2 = _weights(one_np, two_np, bits_np, scale_ng, column_bk, out_nk, inside_np, offset_n, offset_p, group, rows,
                       tile, stride_cb, stride_sn, stride_sg, SCALES, COLUMNS, 2)  # fmt: skip
    dense_3 = _weights(one_np, two_np, bits_np, scale_ng, column_bk, out_nk, inside_np, offset_n, offset_p, group, rows,
                       tile, stride_cb, stride_sn, stride_sg, SCALES, COLUMNS, 3)  # fmt: skip
    out_ptrs = out_nk + row_n * stride_on
    if COLUMNS:
        c_ptrs = column_bk + offset_n.to(tl.int64)[:, None] // rows * stride_cb + 4 * offset_p[None, :]
        out_ptrs += (offset_p.to(tl.int64) * tile)[None, :]
        tl.store(out_ptrs + tl.load(c_ptrs, mask=inside_np, other=0).to(tl.int32), dense_0, mask=inside_np)
        tl.store(out_ptrs + tl.load(c_ptrs + 1, mask=inside_np, other=0).to(tl.int32), dense_1, mask=inside_np)
        tl.store(out_ptrs + tl.load(c_ptrs + 2, mask=inside_np, other=0).to(tl.int32), dense_2, mask=inside_np)
        tl.store(out_ptrs + tl.load(c_ptrs + 3, mask=inside_np, other=0).to(tl.int32), dense_3, mask=inside_np)
    else:
        four = tl.join(tl.join(dense_0, dense_2), tl.join(dense_1, dense_3))  # place 2 * i + j at [i, j]
        offset_k = tl.program_id(0).to(tl.int64) * (4 * BLOCK_P) + tl.arange(0, 4 * BLOCK_P)
        inside = inside_n[:, None] & (offset_k < 4 * pairs)[None, :]
        tl.store(out_ptrs + offset_k[None, :], tl.reshape(four, (BLOCK_N, 4 * BLOCK_P)), mask=inside)


@triton.jit
def _weights(
    one_np,
    two_np,
    bits_np,
    scale_ng,
    column_bk,
    out_nk,
    inside_np,
    offset_n,
    offset_p,
    group,
    rows,
    tile,
    stride_cb,
    stride_sn,
    stride_sg,
    SCALES: tl.constexpr,
    COLUMNS: tl.constexpr,
    place: tl.constexpr,
):
    """Return the weights at a place of the four of each pair, in the result's dtype."""
    dense_np = at_place(one_np, two_np, bits_np, place)
    if SCALES != "none":
        k_np = (offset_p * tile)[None, :] + tl.zeros_like(bits_np)
        if SCALES == "code":
            if COLUMNS:
                c_ptrs = column_bk + offset_n.to(tl.int64)[:, None] // rows * stride_cb + 4 * offset_p[None, :] + place
                k_np += tl.load(c_ptrs, mask=inside_np, other=0).to(tl.int32)
            else:
                k_np += place
        s_ptrs = scale_ng + offset_n.to(tl.int64)[:, None] * stride_sn + (k_np // group).to(tl.int64) * stride_sg
        scale_np = tl.load(s_ptrs, mask=inside_np, other=0.0)
        dense_np = (dense_np * scale_np.to(tl.float32)).to(scale_np.dtype)
    return dense_np.to(out_nk.dtype.element_ty)
