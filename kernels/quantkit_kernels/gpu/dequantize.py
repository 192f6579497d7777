# ruff: noqa: N803 (M, N, K and compile-time constants are written large, as Triton writes them)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""A quantized weight back to floats, in Triton: codes times scales, for a product that wants the whole weight.

Bit for bit `formats.dequantize(codes, scale).to(dtype)`: a code has 8 significant bits at most and a scale in bfloat16
or float16 at most 11, so their product is exact in float32, and is rounded to the scale's dtype, then to the result's.
Legend of the suffixes: n out features (N), k in features (K), g scales of a row
(G), j runs of neighbours along K that share a scale.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels import formats
from quantkit_kernels.configurations import architecture
from quantkit_kernels.gpu import codes

BLOCK_N = 16
BLOCK_K = 256
NUM_WARPS = 4
"""A program decodes a tile of 16 by 256: 32 numbers a thread, rows of 512 bytes in bfloat16."""


@triton.jit
def dequantize_kernel(
    w_nk,
    scale_ng,
    out_nk,
    N,
    K,
    group,
    stride_wn,
    stride_wk,
    stride_sn,
    stride_sg,
    stride_on,
    NUMBERS: tl.constexpr,
    BITS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store out_nk = codes_nk * scale_ng, one tile a program.

    BITS is 0 for a code in each byte (NUMBERS of `codes.py`), else how many bits a code has in the int32 words w_nk,
    in which it may straddle two. SHARE neighbours along K, which are an axis of the tile, have the same scale.
    """
    offset_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offset_j = tl.program_id(0) * (BLOCK_K // SHARE) + tl.arange(0, BLOCK_K // SHARE)
    offset_k = offset_j[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    inside_n = offset_n < N
    inside = inside_n[:, None, None] & (offset_k < K)[None, :, :]
    inside_nj = (inside_n[:, None] & (offset_j * SHARE < K)[None, :])[:, :, None]
    row_n = offset_n.to(tl.int64)[:, None, None]
    w_ptrs = w_nk + row_n * stride_wn
    if BITS == 0:
        NOTHING: tl.constexpr = 0.0 if NUMBERS == "fp8" else 0
        units = tl.load(w_ptrs + offset_k.to(tl.int64)[None, :, :] * stride_wk, mask=inside, other=NOTHING)
        values = codes.byte_codes(units, NUMBERS, tl.float32)
    else:
        if BITS * SHARE == 32:  # a word for each place of the axis
            words = tl.load(w_ptrs + offset_j.to(tl.int64)[None, :, None] * stride_wk, mask=inside_nj, other=0)
            fields = words.to(tl.uint32, bitcast=True) >> (tl.arange(0, SHARE) * BITS).to(tl.uint32)[None, None, :]
        else:
            fields = _straddling(w_ptrs, offset_k, inside, stride_wk, BITS)
        values = ((fields & ((1 << BITS) - 1)).to(tl.int32) - (1 << (BITS - 1))).to(tl.float32)
    group_j = (offset_j * SHARE // group).to(tl.int64)
    s_ptrs = scale_ng + row_n * stride_sn + group_j[None, :, None] * stride_sg
    scale = tl.load(s_ptrs, mask=inside_nj, other=0.0)
    out = (values * scale.to(tl.float32)).to(scale.dtype).to(out_nk.dtype.element_ty)
    tl.store(out_nk + row_n * stride_on + offset_k[None, :, :], out, mask=inside)


@triton.jit
def _straddling(w_ptrs, offset_k, inside, stride_wk, BITS: tl.constexpr):
    """Return uint32 numbers whose lowest BITS bits are the fields of offset_k; where a word ends, of two words."""
    bit_k = offset_k.to(tl.int64) * BITS
    low_k = (bit_k % 32).to(tl.int32)
    low = tl.load(w_ptrs + (bit_k // 32 * stride_wk)[None, :, :], mask=inside, other=0)
    fields = low.to(tl.uint32, bitcast=True) >> low_k.to(tl.uint32)[None, :, :]
    if 32 % BITS != 0:
        straddles_k = low_k > 32 - BITS
        ptrs = w_ptrs + ((bit_k // 32 + 1) * stride_wk)[None, :, :]
        high = tl.load(ptrs, mask=inside & straddles_k[None, :, :], other=0).to(tl.uint32, bitcast=True)
        fields |= high << (tl.where(straddles_k, 32 - low_k, 0)).to(tl.uint32)[None, :, :]
    return fields


def launch(out: Tensor, weight: Tensor, scale: Tensor, bits: int | None = None) -> None:
    """Write the decoded weight into `out` [N, K], whose rows are contiguous.

    Args:
        out: [N, K], float32, bfloat16 or float16.
        weight: [N, K] int8 or fp8, or [N, ceil(K * bits / 32)] int32; any strides.
        scale: [N, G], float32, bfloat16 or float16; G divides K. Any strides.
        bits: of a packed weight, 1 to 8; None for one that is not.
    """
    if out.numel() == 0:
        return
    out_features, in_features = out.shape
    group = in_features // scale.shape[1]
    numbers = "int8" if weight.dtype == torch.int8 else "fp8"
    if weight.dtype == torch.float8_e4m3fn and architecture(weight.device) < 89:
        weight, numbers = weight.view(torch.uint8), "e4m3"
    # Triton launches on the current device; for CPU tensors (the interpreter) this changes nothing
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        dequantize_kernel[(triton.cdiv(in_features, BLOCK_K), triton.cdiv(out_features, BLOCK_N))](
            weight,
            scale,
            out,
            out_features,
            in_features,
            group,
            weight.stride(0),
            weight.stride(1),
            scale.stride(0),
            scale.stride(1),
            out.stride(0),
            NUMBERS=numbers,
            BITS=bits or 0,
            SHARE=8 if group % 8 == 0 else 1,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=NUM_WARPS,
        )


def dequantize(
    weight: Tensor, scale: Tensor, dtype: torch.dtype, bits: int | None = None, in_features: int | None = None
) -> Tensor:
    """Return the decoded weight [N, K] in `dtype`: `formats.dequantize(codes, scale).to(dtype)`, bit for bit.

    Args:
        weight: as `launch` takes it.
        scale: [N, G], any float dtype; one other than float32, bfloat16 and float16 is rounded to float32 first.
        dtype: float32, bfloat16 or float16.
        bits: of a packed weight; None for one that is not.
        in_features: K, which a packed weight does not say.
    """
    out_features, columns = weight.shape
    if scale.dtype not in formats.FLOAT_DTYPES:
        scale = scale.float()
    columns = columns if in_features is None else in_features
    out = torch.empty((out_features, columns), dtype=dtype, device=weight.device)
    launch(out, weight, scale, bits)
    return out
