"""Ground truth of the number formats: quantize and dequantize in plain torch (`packing` packs codes into words).

Every kernel of the package is judged against these functions, and files are written with them. Symmetric
throughout: a stored code times its scale is the value, there is no zero point. M tokens, K in features, N out
features, G groups of K / G neighbours along K. "scale" multiplies on dequantize.

A float operation on a dtype with p significant bits rounds with a relative error of at most u = 2**-p
(float32 2**-24, float16 2**-11, bfloat16 2**-8); the bounds below are written with it.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit_kernels.packing import pack_int32, packed_words, unpack_int32
from quantkit_kernels.ranges import least_squares_scale

__all__ = [
    "BLOCK",
    "FLOAT_DTYPES",
    "GRANULARITIES",
    "QMAX",
    "WEIGHT_RANGES",
    "decode",
    "dequantize",
    "dequantize_weight",
    "pack_int32",
    "packed_words",
    "quantize_per_group",
    "quantize_per_tensor",
    "quantize_per_token",
    "quantize_weight",
    "unpack_int32",
]

QMAX: dict[torch.dtype, float] = {
    torch.int8: 127.0,
    torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max,
    torch.float8_e5m2: torch.finfo(torch.float8_e5m2).max,
}
"""Largest code of each quantized dtype. Int8 leaves -128 out, so that codes are symmetric."""

INT4 = (-8, 7)
"""Smallest and largest code of 4 bits. They lie in int8 until they are packed."""

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of weights, activations and scales."""

WEIGHT_RANGES = ("absmax", "mse")

GRANULARITIES = ("row", "tensor", "block")
"""What shares a scale in a weight [N, K]: a row or a group of it, all of it, or a block of BLOCK by BLOCK."""

BLOCK = 128
"""Rows and columns of a weight's block, and in features of a token's group."""

_CHUNK_ELEMENTS = 1 << 20
"""Weights are quantized this many elements at a time, so that temporaries stay small and in cache."""


def quantize_weight(
    weight: Tensor,
    dtype: torch.dtype,
    group_size: int | None = None,
    weight_range: str = "absmax",
    granularity: str = "row",
    scale_dtype: torch.dtype | None = None,
    bits: int = 8,
) -> tuple[Tensor, Tensor]:
    """Return the codes [..., N, K] in `dtype`, contiguous, and their scales in `scale_dtype` (the weight's dtype).

    Scales: "row" [..., N, G]; "tensor" [1]; "block" [ceil(N / 128), ceil(K / 128)], one for each 128 by 128
    weights, what is left over at the ends being smaller blocks.

    The scale is absmax / qmax of what shares it, computed in float32 and rounded to the weight's dtype; codes
    are weight / scale with that rounded scale, divided in float32, rounded half to even and clamped to +-qmax
    (fp8: clamped, then rounded to the nearest even code). Where all is zero the scale is 1 and codes are 0. A
    scale below the smallest normal number of the weight's dtype is raised to it, which costs int8 levels in
    float16 rows whose largest weight is below 0.0078.

    Error, int8 with "absmax": |weight - code * scale| <= scale / 2 * (1 + 2**-16), because a scale rounded
    down by u leaves |weight| / scale <= 127 / (1 - 2**-8) < 127.5; `dequantize` adds one rounding of the
    product. With 4 bits codes are -8 to 7, and absmax's scale is absmax / 7, with the same bound: only "mse"
    uses -8.

    Beyond codes and scales it takes memory for a few million elements only, whatever the weight's size and
    strides.

    Args:
        weight: [..., N, K] ("tensor" and "block": [N, K]), float32, bfloat16 or float16, all finite; any
            strides.
        dtype: torch.int8, torch.float8_e4m3fn or torch.float8_e5m2.
        group_size: neighbours along K that share a scale; None makes one scale an out feature (G = 1).
        weight_range: "absmax", or "mse": of a grid of ranges around absmax the one with the least squared
            error of what the scale is for, dequantized; never worse than absmax (Nagel et al. 2021,
            arXiv:2106.08295, section 3.1).
        granularity: "row", "tensor" or "block".
        scale_dtype: float32, bfloat16 or float16: what the scale is rounded to before codes are made with it; by
            default the weight's dtype.
        bits: 8; or 4, with int8 for `dtype` and granularity "row".

    Raises:
        ValueError: a dtype, group size, range, granularity or number of bits that is not offered, or a weight with NaN
            or infinity.
    """
    _check_weight(weight, dtype, group_size, weight_range, granularity)
    _check_bits(bits, dtype, granularity)
    codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    shape = _scale_shape(weight, group_size, granularity)
    scale = torch.ones(shape, dtype=scale_dtype or weight.dtype, device=weight.device)
    if weight.numel() == 0:
        return codes, scale
    if granularity == "tensor":
        _quantize_tensor(weight, codes, scale, weight_range)
    elif granularity == "block":
        _quantize_blocks(weight, codes, scale, weight_range)
    else:
        _quantize_rows(weight, codes, scale, weight_range, bits)
    return codes, scale


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """Return q.to(scale.dtype) * scale, [..., N, K] in the scale's dtype.

    Codes of int8 and fp8 are exact in every float dtype offered, so the result is the real product rounded
    once: relative error <= u of the scale's dtype (above its smallest normal number). The arithmetic is the
    one of compressed-tensors, bit for bit.

    Args:
        q: [..., N, K] codes, int8 or fp8.
        scale: [..., N, G], float; G divides K.

    Raises:
        ValueError: when G does not divide K.
    """
    in_features, groups = q.shape[-1], scale.shape[-1]
    if groups == 1:
        return decode(q, scale.dtype) * scale
    if groups == 0 or in_features % groups:
        raise ValueError(f"{groups} scales a row do not divide the {in_features} in features")
    grouped = q.reshape(*q.shape[:-1], groups, in_features // groups)
    return (decode(grouped, scale.dtype) * scale.unsqueeze(-1)).flatten(-2)


def dequantize_weight(q: Tensor, scale: Tensor, granularity: str = "row") -> Tensor:
    """Return the weight [..., N, K] in the scale's dtype: each code times its scale, rounded once.

    Args:
        q: [..., N, K] codes, int8 or fp8; [N, K] where granularity is "block".
        scale: float; [..., N, G] for "row", [1] for "tensor", [ceil(N / 128), ceil(K / 128)] for "block".
        granularity: "row", "tensor" or "block": what `quantize_weight` was told.

    Raises:
        ValueError: when the granularity is not offered, or the scale's shape is not the one it makes.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity is {granularity!r}: expected one of {', '.join(GRANULARITIES)}")
    if granularity == "row":
        return dequantize(q, scale)
    expected = (1,) if granularity == "tensor" else tuple(-(-size // BLOCK) for size in q.shape)
    if tuple(scale.shape) != expected or (granularity == "block" and q.ndim != 2):
        raise ValueError(
            f"scale is {list(scale.shape)} for codes {list(q.shape)}: granularity {granularity!r} makes it "
            f"{list(expected)}"
        )
    weight = decode(q, scale.dtype)
    if granularity == "tensor":
        return weight.mul_(scale)
    columns = scale.repeat_interleave(BLOCK, dim=1)[:, : q.shape[1]]  # [ceil(N / 128), K]
    bands = q.shape[0] // BLOCK
    weight[: bands * BLOCK].view(bands, BLOCK, q.shape[1]).mul_(columns[:bands].unsqueeze(1))
    weight[bands * BLOCK :].mul_(columns[bands:])  # no rows and no scales, or what is left over and one row of them
    return weight


def decode(q: Tensor, dtype: torch.dtype) -> Tensor:
    """Return q.to(dtype), the codes as numbers: exact for int8 and fp8 in every float dtype offered.

    Fp8 on a CPU goes through the bits of float16, which has the same fields, wider, and float32: some ten times faster
    than torch's conversions (torch 2.13), and the same numbers, infinities, NaN and -0 included.

    Args:
        q: codes, int8 or fp8, any shape and strides.
        dtype: float32, bfloat16, float16 or float64.
    """
    if q.device.type != "cpu" or q.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return q.to(dtype)
    signed = q.view(torch.int8)
    bits = signed.to(torch.int16)
    if q.dtype == torch.float8_e5m2:  # the upper byte of a float16
        half = bits.bitwise_left_shift_(8).view(torch.float16)
        return half if dtype == torch.float16 else half.to(torch.float32).to(dtype)
    # The sign was extended to the bits 14 and 15: clear 14, the top of float16's exponent, whose bias is larger by 8.
    half = bits.bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16)
    values = half if dtype == torch.float16 else half.to(torch.float32)
    values.mul_(2.0**8)
    if q.numel() and (int(signed.amax()) == 0x7F or int(q.view(torch.uint8).amax()) == 0xFF):
        values.masked_fill_((signed & 0x7F) == 0x7F, torch.nan)  # the two codes of NaN are the largest, each in its way
    return values.to(dtype)


def quantize_per_token(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the codes [M, K] in `dtype` and one scale for each token, [M, 1] in float32.

    scale = absmax over K / qmax in float32; a token of zeros has scale 1. Int8: |x - code * scale| <= scale /
    2 * (1 + 2**-16). A token that holds NaN or infinity has a scale that is NaN or infinite, so that the
    damage shows in whatever is computed from it.

    Args:
        x: [M, K], float32, bfloat16 or float16; any strides.
        dtype: torch.int8, torch.float8_e4m3fn or torch.float8_e5m2.

    Raises:
        ValueError: for a dtype that is not offered.
    """
    _check_dtype(dtype)
    values = x.float().contiguous()
    scale = _absmax_scale(values, dtype)
    # Divided by its own scale no number exceeds qmax by more than two roundings: it rounds to qmax unclamped.
    return _round(_divided(values, scale, x), dtype), scale


def quantize_per_group(x: Tensor, dtype: torch.dtype, group_size: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Return the codes [M, K] in `dtype` and scales [M, K / group_size] in float32: one a token and group.

    Each group is quantized as `quantize_per_token` quantizes a token.

    Args:
        x: [M, K], float32, bfloat16 or float16; any strides.
        dtype: torch.int8, torch.float8_e4m3fn or torch.float8_e5m2.
        group_size: neighbours along K that share a scale; divides K.

    Raises:
        ValueError: for a dtype or a group size that is not offered.
    """
    tokens, in_features = x.shape
    _check_group_size(group_size, in_features)
    groups = in_features // group_size
    codes, scale = quantize_per_token(x.reshape(tokens * groups, group_size), dtype)
    return codes.view(tokens, in_features), scale.view(tokens, groups)


def quantize_per_tensor(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the codes of x in `dtype`, contiguous, and their one scale, [1] in float32.

    Without a scale it is absmax of all of x / qmax in float32, 1 where x is all zeros (or empty): the error is
    `quantize_per_token`'s; NaN or infinity in x makes it NaN or infinite. With a scale (static) codes are x /
    scale and what lies beyond +-qmax saturates, infinity too; NaN, which int8 has no code for, makes the
    returned scale NaN there, and a NaN code in fp8.

    Args:
        x: any shape and strides, float32, bfloat16 or float16.
        dtype: torch.int8, torch.float8_e4m3fn or torch.float8_e5m2.
        scale: [1], any float dtype, positive; or None.

    Raises:
        ValueError: for a dtype that is not offered, or a scale of another shape.
    """
    _check_dtype(dtype)
    if scale is not None and (scale.shape != (1,) or not scale.is_floating_point()):
        raise ValueError(f"scale is {scale.dtype} {list(scale.shape)}: expected float [1]")
    values = x.float().contiguous()
    if scale is None:
        scale = values.new_ones(1) if x.numel() == 0 else _scale_of(_absmax(x).view(1), dtype, torch.float32)
        return _round(_divided(values, scale, x), dtype), scale
    scale = scale.float()
    codes = _encode(values, scale, dtype)
    if dtype == torch.int8 and x.numel():
        scale = torch.where(x.amin().isnan(), torch.nan, scale)
    return codes, scale


def _parts(weight: Tensor) -> Iterator[tuple[int | slice, ...]]:
    """Yield indices that cut a weight [..., N, K] into matrices of whole rows, a chunk of elements each."""
    *lead, out_features, in_features = weight.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, in_features))
    for index in itertools.product(*map(range, lead)):
        for start in range(0, out_features, step):
            yield (*index, slice(start, start + step))


def _quantize_rows(weight: Tensor, codes: Tensor, scale: Tensor, weight_range: str, bits: int = 8) -> None:
    """Write codes [..., N, K] and scale [..., N, G] of a weight [..., N, K]."""
    in_features, groups = weight.shape[-1], scale.shape[-1]
    for part in _parts(weight):
        rows = weight[part].reshape(-1, in_features // groups)
        row_scale = _row_scale(rows, codes.dtype, weight_range, scale.dtype, bits)
        codes[part] = _encode(rows.float(), row_scale.float(), codes.dtype, bits).view(-1, in_features)
        scale[part] = row_scale.view(-1, groups)


def _quantize_blocks(weight: Tensor, codes: Tensor, scale: Tensor, weight_range: str) -> None:
    """Write codes [N, K] and scale [ceil(N / 128), ceil(K / 128)] of a weight [N, K]."""
    out_features, in_features = weight.shape
    width = max(BLOCK, _CHUNK_ELEMENTS // BLOCK // BLOCK * BLOCK)
    for row, column in itertools.product(range(0, out_features, BLOCK), range(0, in_features, width)):
        part = (slice(row, row + BLOCK), slice(column, column + width))
        chunk = weight[part]
        height, length = chunk.shape
        blocks = -(-length // BLOCK)
        padded = torch.nn.functional.pad(chunk, (0, blocks * BLOCK - length))  # zeros: no range grows, no error
        rows = padded.reshape(height, blocks, BLOCK).transpose(0, 1).reshape(blocks, height * BLOCK)
        block_scale = _row_scale(rows, codes.dtype, weight_range, scale.dtype)
        encoded = _encode(rows.float(), block_scale.float(), codes.dtype).view(blocks, height, BLOCK)
        codes[part] = encoded.transpose(0, 1).reshape(height, blocks * BLOCK)[:, :length]
        scale[row // BLOCK, column // BLOCK : column // BLOCK + blocks] = block_scale.view(-1)


def _quantize_tensor(weight: Tensor, codes: Tensor, scale: Tensor, weight_range: str) -> None:
    """Write codes [N, K] and scale [1] of a weight [N, K]."""
    scale.copy_(_scale_of(_weight_absmax(weight).view(1), codes.dtype, scale.dtype))
    if weight_range == "mse":
        candidates = [scale.view(1, 1), *_mse_candidates(scale.view(1, 1), codes.dtype)]
        errors = torch.zeros(len(candidates), dtype=torch.float64, device=weight.device)
        for part in _parts(weight):
            rows = weight[part].reshape(1, -1).float()
            errors += torch.cat([_squared_error(rows, each, codes.dtype).view(1) for each in candidates])
        found = errors.tolist()
        scale.copy_(candidates[found.index(min(found))].view(1))  # absmax comes first, so it wins a tie
    for part in _parts(weight):
        codes[part] = _encode(weight[part].float(), scale.float(), codes.dtype)


def _scale_shape(weight: Tensor, group_size: int | None, granularity: str) -> tuple[int, ...]:
    """Return the shape of the scales that `quantize_weight` makes."""
    *lead, in_features = weight.shape
    if granularity == "tensor":
        return (1,)
    if granularity == "block":
        return tuple(-(-size // BLOCK) for size in weight.shape)
    return (*lead, 1 if group_size is None else in_features // group_size)


def _row_scale(rows: Tensor, dtype: torch.dtype, weight_range: str, scale_dtype: torch.dtype, bits: int = 8) -> Tensor:
    """Return the scale of each row, [R, 1] in `scale_dtype`, of rows [R, L]."""
    scale = _absmax_scale(rows, dtype, scale_dtype, bits)
    if weight_range == "absmax":
        return scale
    return _mse_scale(rows, scale, dtype) if bits == 8 else _mse_scale_int4(rows, scale)


def _absmax_scale(rows: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype | None = None, bits: int = 8) -> Tensor:
    """Return absmax / qmax of each row, [R, 1] in `scale_dtype` (the rows'): 1 for zeros, never a subnormal."""
    if rows.shape[1] == 0:
        return rows.new_ones((rows.shape[0], 1), dtype=scale_dtype)
    return _scale_of(rows.abs().amax(dim=1, keepdim=True), dtype, scale_dtype or rows.dtype, bits)


def _absmax(tensor: Tensor) -> Tensor:
    """Return the largest absolute value of all of the tensor; NaN where it holds one."""
    low, high = torch.aminmax(tensor)  # takes no memory where the tensor is contiguous, and a copy elsewhere
    return torch.maximum(-low, high)


def _weight_absmax(weight: Tensor) -> Tensor:
    """Return the largest absolute value of a weight [..., N, K], taken by parts; NaN where it holds one."""
    largest = weight.new_zeros(())
    for part in _parts(weight):
        torch.maximum(largest, _absmax(weight[part]), out=largest)  # nothing that stays, between parts in memory
    return largest


def _scale_of(absmax: Tensor, dtype: torch.dtype, float_dtype: torch.dtype, bits: int = 8) -> Tensor:
    """Return absmax / qmax, divided in float32, in `float_dtype`: 1 for zeros, never a subnormal."""
    scale = (absmax.float() / _limits(dtype, bits)[1]).to(float_dtype).clamp_(min=torch.finfo(float_dtype).tiny)
    return scale.masked_fill_(absmax == 0, 1.0)


def _divided(values: Tensor, scale: Tensor, source: Tensor) -> Tensor:
    """Return values / scale, in place where `values` is a copy of `source` and not itself."""
    is_copy = source.dtype != values.dtype or not source.is_contiguous()
    return values.div_(scale) if is_copy else values / scale


def _round(quotients: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the codes nearest to float32 quotients, which lie within +-qmax or round to it; overwrites them."""
    return quotients.round_().to(dtype) if dtype == torch.int8 else quotients.to(dtype)


def _limits(dtype: torch.dtype, bits: int = 8) -> tuple[float, float]:
    """Return the smallest and the largest code."""
    return (-QMAX[dtype], QMAX[dtype]) if bits == 8 else INT4


def _encode(rows: Tensor, scale: Tensor, dtype: torch.dtype, bits: int = 8) -> Tensor:
    """Return the codes of float32 values for float32 scales that fit their shape: saturated."""
    return _round((rows / scale).clamp_(*_limits(dtype, bits)), dtype)


def _mse_candidates(absmax_scale: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the scales that "mse" tries beside absmax_scale, one for each factor of a grid.

    Int8 gains by shrinking the range below outliers. An fp8 code has the same relative precision at every
    power of two, so a factor matters only by where the row's values fall between neighbouring codes: one
    octave around 1 holds every such alignment.
    """
    if dtype == torch.int8:
        factors = torch.linspace(0.4, 1.0, 61).tolist()[:-1]
    else:
        factors = torch.logspace(-0.5, 0.5, 49, base=2.0).tolist()
    tiny = torch.finfo(absmax_scale.dtype).tiny
    for factor in factors:
        yield (absmax_scale.float() * factor).to(absmax_scale.dtype).clamp(min=tiny)


def _mse_scale(rows: Tensor, absmax_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scales [R, 1] of least squared error among absmax_scale [R, 1] and its candidates."""
    values = rows.float()
    best_scale = absmax_scale.clone()
    best_error = _squared_error(values, best_scale, dtype)
    for scale in _mse_candidates(absmax_scale, dtype):
        error = _squared_error(values, scale, dtype)
        better = error < best_error
        best_scale.copy_(torch.where(better, scale, best_scale))  # in place: what stays must not scatter in memory
        best_error.copy_(torch.where(better, error, best_error))
    return best_scale


def _mse_scale_int4(rows: Tensor, absmax_scale: Tensor) -> Tensor:
    """Return the scales [R, 1] that `ranges` finds for 4 bits, or absmax's where they are no better.

    The search leaves out that a decoded weight is rounded to the scale's dtype; the last word is said with it.
    """
    found, values = least_squares_scale(rows, absmax_scale, *INT4), rows.float()
    new, old = (_squared_error(values, scale, torch.int8, 4) for scale in (found, absmax_scale))
    return torch.where(new < old, found, absmax_scale)


def _squared_error(rows: Tensor, scale: Tensor, dtype: torch.dtype, bits: int = 8) -> Tensor:
    """Return the squared error [R, 1], in float64, of float32 rows after quantizing with scales [R, 1]."""
    difference = dequantize(_encode(rows, scale.float(), dtype, bits), scale).float().sub_(rows)
    return difference.square_().sum(dim=1, keepdim=True, dtype=torch.float64)


def _check_weight(
    weight: Tensor, dtype: torch.dtype, group_size: int | None, weight_range: str, granularity: str
) -> None:
    """Raise ValueError where `quantize_weight` cannot do what was asked."""
    if weight.ndim < 2 or weight.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"weight is {weight.dtype} with {weight.ndim} dimensions: expected [..., N, K] in one of "
            f"{_names(FLOAT_DTYPES)}"
        )
    _check_dtype(dtype)
    if weight_range not in WEIGHT_RANGES:
        raise ValueError(f"weight_range is {weight_range!r}: expected one of {', '.join(WEIGHT_RANGES)}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity is {granularity!r}: expected one of {', '.join(GRANULARITIES)}")
    if group_size is not None:
        if granularity != "row":
            raise ValueError(f"group_size {group_size} with granularity {granularity!r}: groups are parts of a row")
        _check_group_size(group_size, weight.shape[-1])
    if granularity != "row" and weight.ndim != 2:
        raise ValueError(f"weight is {list(weight.shape)}: granularity {granularity!r} expects [N, K]")
    if weight.numel() and not bool(torch.isfinite(_weight_absmax(weight))):
        raise ValueError("the weight holds NaN or infinity: it cannot be quantized")


def _check_bits(bits: int, dtype: torch.dtype, granularity: str) -> None:
    """Raise ValueError unless codes of that many bits can be made."""
    if bits not in (4, 8) or (bits == 4 and (dtype, granularity) != (torch.int8, "row")):
        raise ValueError(f"{bits} bits in {dtype} by {granularity}: expected 8, or 4 in torch.int8 by row")


def _check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError unless codes can have this dtype."""
    if dtype not in QMAX:
        raise ValueError(f"cannot quantize to {dtype}: expected one of {_names(QMAX)}")


def _check_group_size(group_size: int, in_features: int) -> None:
    """Raise ValueError unless a row divides into such groups."""
    if group_size < 1 or in_features % group_size:
        raise ValueError(f"group_size {group_size} does not divide the {in_features} in features")


def _names(dtypes: dict[torch.dtype, float] | tuple[torch.dtype, ...]) -> str:
    """Return the dtypes' names for a message."""
    return ", ".join(str(dtype) for dtype in dtypes)
