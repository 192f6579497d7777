# ruff: noqa: N803 (M, K and compile-time constants are written large, as Triton writes them)
"""Activations to codes in Triton: per token, per group of 128, per tensor; alone, or right after a norm or SiLU * mul.

Legend of the suffixes: each letter is one axis, in memory order. m tokens (M), k in features (K): x_mk is [M, K],
scale_m one number a token. Codes are stored as bytes, whatever their dtype.

The bits are those of `formats`: scales and quotients are IEEE divisions, quotients round half to even, and a
token that holds NaN or infinity gets a scale that says so. The largest magnitude is found among the bits of the
float32 numbers without their sign, which as integers are ordered like the magnitudes, NaN above all. An fp8 code
is made by the processor where it can (sm_89 and later), elsewhere from those bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels import formats
from quantkit_kernels.configurations import architecture
from quantkit_kernels.gpu.tiles import contiguous_rows

FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
"""What the kernels call each dtype of codes."""

LONGEST_ROW = 16384
"""Up to so many in features a token is held in registers; longer ones are read again for each step."""

GROUPS = 8
"""Groups of 128 that one program quantizes: 8 numbers a thread, 16 bytes in bfloat16."""

TENSOR_BLOCK = 4096
"""Numbers of one row that one program quantizes with the scale of the whole tensor."""

PARTS = 1024
"""How many programs at most look for the largest magnitude of a tensor."""

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
HALF_EVEN = tl.constexpr(1.5 * 2.0**23)
"""Added to a float32 number below 2**22 and taken away again it leaves the nearest whole number, ties to even."""


@triton.jit  # type: ignore[untyped-decorator]
def magnitude(values):  # type: ignore[no-untyped-def]
    """Return the bits of |values| in int32 for float32 values."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit  # type: ignore[untyped-decorator]
def scale_of(largest, QMAX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the scale for the bits of the largest magnitude: 1 for zeros, never a subnormal, NaN for NaN."""
    absmax = largest.to(tl.float32, bitcast=True)
    scale = tl.div_rn(absmax, tl.full(absmax.shape, QMAX, tl.float32))
    return tl.where(largest == 0, 1.0, tl.where(scale < TINY, TINY, scale))


@triton.jit  # type: ignore[untyped-decorator]
def to_codes(quotients, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes, as bytes in int8, nearest to float32 quotients that lie within +-qmax or round to it."""
    if FORMAT == "int8":
        rounded = (quotients + HALF_EVEN) - HALF_EVEN
        return tl.where(quotients == quotients, rounded, 0.0).to(tl.int8)
    if HARDWARE:
        if FORMAT == "e4m3":
            return quotients.to(tl.float8e4nv).to(tl.int8, bitcast=True)
        return quotients.to(tl.float8e5).to(tl.int8, bitcast=True)
    MANTISSA: tl.constexpr = 3 if FORMAT == "e4m3" else 2
    BIAS: tl.constexpr = 7 if FORMAT == "e4m3" else 15
    SHIFT: tl.constexpr = 23 - MANTISSA
    bits = quotients.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + ((1 << (SHIFT - 1)) - 1) + ((size >> SHIFT) & 1)) >> SHIFT) - ((127 - BIAS) << MANTISSA)
    # A float32 number whose last bit is the smallest fp8 number: what is added to it is rounded to that.
    STEPS: tl.constexpr = 2.0 ** (23 + 1 - BIAS - MANTISSA)
    STEPS_BITS: tl.constexpr = (127 + 23 + 1 - BIAS - MANTISSA) << 23
    small = (size.to(tl.float32, bitcast=True) + STEPS).to(tl.int32, bitcast=True) - STEPS_BITS
    code = tl.where(size < ((128 - BIAS) << 23), small, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.int8)


@triton.jit  # type: ignore[untyped-decorator]
def _row_part(x_mk, other, offsets, K, unit, offset, WHAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return float32 numbers of one token after the norm ("norm"), SiLU * mul ("silu"), or as they are ("plain").

    `other` points to the gain, or to the token's row of `up`; `unit` is 1 / root mean square.
    """
    inside = offsets < K
    values = tl.load(x_mk + offsets, mask=inside, other=0.0).to(tl.float32)
    if WHAT == "norm":
        gain = tl.load(other + offsets, mask=inside, other=0.0).to(tl.float32)
        values = (values * unit) * (gain + offset)
    if WHAT == "silu":
        up = tl.load(other + offsets, mask=inside, other=0.0).to(tl.float32)
        values = tl.div_rn(values, 1.0 + tl.exp(-values)) * up
    return values


@triton.jit  # type: ignore[untyped-decorator]
def quantize_rows_kernel(  # type: ignore[no-untyped-def]
    x_mk,
    other,
    codes_mk,
    scale_m,
    K,
    stride_xm,
    stride_om,
    eps,
    offset,
    WHAT: tl.constexpr,
    FORMAT: tl.constexpr,
    QMAX: tl.constexpr,
    HARDWARE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store the codes and the scale of one token, one program a token."""
    row = tl.program_id(0).to(tl.int64)
    x_mk += row * stride_xm
    codes_mk += row * K
    if WHAT == "silu":
        other += row * stride_om
    offset_k = tl.arange(0, BLOCK_K)

    unit = 1.0
    if WHAT == "norm":
        squares = tl.zeros((BLOCK_K,), dtype=tl.float32)
        for step in range(1 if ONE_BLOCK else tl.cdiv(K, BLOCK_K)):
            values = _row_part(x_mk, other, step * BLOCK_K + offset_k, K, unit, offset, "plain")
            squares += values * values
        mean = tl.div_rn(tl.sum(squares, axis=0), K.to(tl.float32))
        unit = tl.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(mean + eps))

    if ONE_BLOCK:
        values = _row_part(x_mk, other, offset_k, K, unit, offset, WHAT)
        scale = scale_of(tl.max(magnitude(tl.where(offset_k < K, values, 0.0)), axis=0), QMAX)
        codes = to_codes(tl.div_rn(values, scale), FORMAT, HARDWARE)
        tl.store(codes_mk + offset_k, codes, mask=offset_k < K)
    else:
        largest = tl.zeros((BLOCK_K,), dtype=tl.int32)
        for step in range(tl.cdiv(K, BLOCK_K)):
            offsets = step * BLOCK_K + offset_k
            values = _row_part(x_mk, other, offsets, K, unit, offset, WHAT)
            largest = tl.maximum(largest, magnitude(tl.where(offsets < K, values, 0.0)))
        scale = scale_of(tl.max(largest, axis=0), QMAX)
        for step in range(tl.cdiv(K, BLOCK_K)):
            offsets = step * BLOCK_K + offset_k
            values = _row_part(x_mk, other, offsets, K, unit, offset, WHAT)
            codes = to_codes(tl.div_rn(values, scale), FORMAT, HARDWARE)
            tl.store(codes_mk + offsets, codes, mask=offsets < K)
    tl.store(scale_m + row, scale)


@triton.jit  # type: ignore[untyped-decorator]
def quantize_groups_kernel(  # type: ignore[no-untyped-def]
    x_mk,
    codes_mk,
    scale_mg,
    total,
    groups,
    stride_xm,
    FORMAT: tl.constexpr,
    QMAX: tl.constexpr,
    HARDWARE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Store the codes and the scales of GROUPS groups of all `total`, counted along tokens and then along K."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < total
    offset_k = tl.arange(0, GROUP)[None, :]
    starts = (group // groups) * stride_xm + (group % groups) * GROUP
    values = tl.load(x_mk + starts[:, None] + offset_k, mask=inside[:, None], other=0.0).to(tl.float32)
    scale = scale_of(tl.max(magnitude(values), axis=1), QMAX)
    codes = to_codes(tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape)), FORMAT, HARDWARE)
    tl.store(codes_mk + (group * GROUP)[:, None] + offset_k, codes, mask=inside[:, None])
    tl.store(scale_mg + group, scale, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def largest_kernel(  # type: ignore[no-untyped-def]
    x_mk,
    largest_p,
    M,
    K,
    stride_xm,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store for each program the bits of the largest magnitude in its part of x: every PARTS-th block."""
    blocks = tl.cdiv(K, BLOCK_K)
    part = tl.program_id(0)
    largest = tl.zeros((BLOCK_K,), dtype=tl.int32)
    for step in range(tl.cdiv(M * blocks - part, PARTS)):
        block = part + step * PARTS
        offsets = (block % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        ptrs = x_mk + (block // blocks).to(tl.int64) * stride_xm + offsets
        values = tl.load(ptrs, mask=offsets < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude(values))
    tl.store(largest_p + part, tl.max(largest, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def quantize_tensor_kernel(  # type: ignore[no-untyped-def]
    x_mk,
    codes_mk,
    given,
    found,
    K,
    stride_xm,
    FORMAT: tl.constexpr,
    QMAX: tl.constexpr,
    HARDWARE: tl.constexpr,
    STATIC: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store the codes of one block of x, and the scale.

    STATIC: `given` points to the scale, and `found` holds a copy of it, which becomes NaN where an int8 code cannot
    say that x is NaN. Else `given` are the largest magnitudes that `largest_kernel` left.
    """
    blocks = tl.cdiv(K, BLOCK_K)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offsets = (tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    values = tl.load(x_mk + row * stride_xm + offsets, mask=offsets < K, other=0.0).to(tl.float32)
    if STATIC:
        quotients = tl.div_rn(values, tl.load(given).to(tl.float32))
        quotients = tl.where(quotients > QMAX, QMAX, tl.where(quotients < -QMAX, -QMAX, quotients))  # NaN stays
        if FORMAT == "int8":  # noqa: SIM102 (decided by the compiler)
            if tl.max(magnitude(values), axis=0) > 0x7F800000:
                tl.store(found, float("nan"))
    else:
        scale = scale_of(tl.max(tl.load(given + tl.arange(0, PARTS)), axis=0), QMAX)
        quotients = tl.div_rn(values, scale)
        if tl.program_id(0) == 0:
            tl.store(found, scale)
    tl.store(codes_mk + row * K + offsets, to_codes(quotients, FORMAT, HARDWARE), mask=offsets < K)


def launch_rows(
    codes: Tensor,
    scale: Tensor,
    x: Tensor,
    what: str = "plain",
    other: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> None:
    """Write the codes [M, K] and scales [M, 1] of the tokens of x [M, K], which may be apart but not their numbers.

    Args:
        codes: [M, K], int8 or fp8, contiguous.
        scale: [M, 1], float32, contiguous.
        x: [M, K], float; stride 1 along K.
        what: "plain"; "norm": after an RMSNorm with the gain `other` [K]; "silu": SiLU(x) * `other` [M, K].
        other: see `what`; stride 1 along K.
        eps: added to the mean square.
        offset: added to the gain.
    """
    tokens, in_features = x.shape
    if tokens == 0:
        return
    block = min(triton.next_power_of_2(max(in_features, 1)), LONGEST_ROW)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        quantize_rows_kernel[(tokens,)](
            x,
            x if other is None else other,
            codes.view(torch.int8),
            scale,
            in_features,
            x.stride(0),
            0 if other is None else other.stride(0),
            eps,
            offset,
            WHAT=what,
            FORMAT=FORMATS[codes.dtype],
            QMAX=formats.QMAX[codes.dtype],
            HARDWARE=_converts_fp8(x),
            ONE_BLOCK=in_features <= block,
            BLOCK_K=block,
            num_warps=_warps(block),
            enable_fp_fusion=False,
        )


def launch_groups(codes: Tensor, scale: Tensor, x: Tensor) -> None:
    """Write the codes [M, K] and scales [M, K / 128] of x [M, K], whose tokens may be apart but not their numbers.

    Args:
        codes: [M, K], int8 or fp8, contiguous.
        scale: [M, K / 128], float32, contiguous.
        x: [M, K], float; stride 1 along K; 128 divides K.
    """
    tokens, groups = scale.shape
    total = tokens * groups
    if total == 0:
        return
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        quantize_groups_kernel[(triton.cdiv(total, GROUPS),)](
            x,
            codes.view(torch.int8),
            scale,
            total,
            groups,
            x.stride(0),
            FORMAT=FORMATS[codes.dtype],
            QMAX=formats.QMAX[codes.dtype],
            HARDWARE=_converts_fp8(x),
            GROUP=formats.BLOCK,
            GROUPS=GROUPS,
            num_warps=4,
            enable_fp_fusion=False,
        )


def launch_tensor(codes: Tensor, scale: Tensor, x: Tensor, given: Tensor | None) -> None:
    """Write the codes [M, K] of x [M, K] and their one scale [1]; in two launches where none is given.

    Args:
        codes: [M, K], int8 or fp8, contiguous.
        scale: [1], float32; holds the scale already where one is given.
        x: [M, K], float, not empty; stride 1 along K.
        given: [1], any float dtype, another tensor than `scale`; or None: the scale is that of x.
    """
    tokens, in_features = x.shape
    block = min(triton.next_power_of_2(in_features), TENSOR_BLOCK)
    blocks = tokens * triton.cdiv(in_features, block)
    parts = 1
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        if given is None:
            parts = min(triton.next_power_of_2(blocks), PARTS)
            largest = torch.empty(parts, dtype=torch.int32, device=x.device)
            largest_kernel[(parts,)](
                x, largest, tokens, in_features, x.stride(0), PARTS=parts, BLOCK_K=block, num_warps=_warps(block)
            )
        quantize_tensor_kernel[(blocks,)](
            x,
            codes.view(torch.int8),
            largest if given is None else given,
            scale,
            in_features,
            x.stride(0),
            FORMAT=FORMATS[codes.dtype],
            QMAX=formats.QMAX[codes.dtype],
            HARDWARE=_converts_fp8(x),
            STATIC=given is not None,
            PARTS=parts,
            BLOCK_K=block,
            num_warps=_warps(block),
            enable_fp_fusion=False,
        )


def quantize_per_token(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the codes [M, K] and scales [M, 1] in float32 of x [M, K]: the bits of `formats.quantize_per_token`."""
    return _by_row(x, dtype)


def rms_norm_quantize(x: Tensor, gain: Tensor, eps: float, offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return codes [M, K] and scales [M, 1] of x [M, K] after an RMSNorm: what `ops.rms_norm_quantize` says."""
    return _by_row(x, dtype, "norm", gain.contiguous(), eps, offset)


def silu_mul_quantize(gate: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return codes [M, K] and scales [M, 1] of SiLU(gate) * up: what `ops.silu_mul_quantize` says."""
    return _by_row(gate, dtype, "silu", contiguous_rows(up))


def quantize_per_group(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the codes [M, K] and scales [M, K / 128] of x [M, K]: the bits of `formats.quantize_per_group`."""
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty((x.shape[0], x.shape[1] // formats.BLOCK), dtype=torch.float32, device=x.device)
    launch_groups(codes, scale, contiguous_rows(x))
    return codes, scale


def quantize_per_tensor(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the codes of x in `dtype`, contiguous, and their one scale [1]: those of `formats.quantize_per_tensor`."""
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel() == 0 or scale is not None:
        found = torch.ones(1, device=x.device) if scale is None else scale.to(torch.float32, copy=True)
    else:
        found = torch.empty(1, dtype=torch.float32, device=x.device)
    if x.numel():
        rows = contiguous_rows(x.reshape(-1, x.shape[-1]) if x.ndim else x.view(1, 1))
        launch_tensor(codes.view(rows.shape), found, rows, scale)
    return codes, found


def _by_row(
    x: Tensor,
    dtype: torch.dtype,
    what: str = "plain",
    other: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the codes [M, K] and scales [M, 1] that `launch_rows` writes."""
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
    launch_rows(codes, scale, contiguous_rows(x), what, other, eps, offset)
    return codes, scale


def _converts_fp8(x: Tensor) -> bool:
    """Return whether the processor rounds float32 to fp8: not in the interpreter, whose casts lose a carry."""
    return x.is_cuda and architecture(x.device) >= 89


def _warps(block: int) -> int:
    """Return how many warps share a row of so many numbers: 16 each where there are as many threads."""
    return max(1, min(16, block // 512))
