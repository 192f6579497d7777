"""Linear layers whose weights alone are quantized, in Triton: y = x @ dequantize(W).T + bias.

Weights: int8, fp8 E4M3 and E5M2 (on processors without fp8 as well), and codes of 4 or 8 bits packed into int32 words;
a scale a row, or one for each group of a row. M tokens, K in features, N out features, G scales a row.

Which of three ways is taken depends on shapes and dtypes alone (`way`):

- "token" (`weight_only_token.py`): one token. Float32 arithmetic, no tensor cores.
- "tiles" (`weight_only_tiles.py`): up to WHOLE_TOKENS tokens in bfloat16 or float16. Codes become x's dtype in
  registers, exactly, and meet x in the tensor cores. The weight is the left operand, so that a product's 64 rows are
  out features and a few tokens fill its 8 or 16 columns. Where there are too few tiles to fill the processors K is
  split among programs, whose sums go to a workspace in float32 and are added up in a fixed order by a second kernel:
  no atomics, so results repeat.
- "whole": the rest. The weight is decoded once (`dequantize.py`), 2 or 4 bytes a weight for the time of the call, and
  cuBLAS does the product: many tokens, float32 with several tokens, codes of other than 4 or 8 bits, groups that do
  not divide into whole words, a weight whose rows are not contiguous.

Error. "whole" rounds the decoded weight to the scale's dtype and then x's, as `generic.linear_weight_only` does, and so
does "tiles" where groups are shorter than a tile is deep. Else scales multiply sums, and nothing is rounded before
them: |y - exact| <= (K + 4) * 2**-24 * sum over k of |x * code * scale| + 2**-24 * |bias|, then one rounding to x's
dtype; for tensor cores, which cut sums off instead of rounding them, twice that. Hence the result differs from the
generic one by that and the roundings of the decoded weight that it is spared: u_scale + u_x of the same sum.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from quantkit_kernels import formats, generic
from quantkit_kernels.configurations import architecture, configuration
from quantkit_kernels.gpu import codes, dequantize
from quantkit_kernels.gpu.units import TOKEN_BYTES, tile_units, token_units
from quantkit_kernels.gpu.weight_only_tiles import sum_parts_kernel, weight_only_kernel
from quantkit_kernels.gpu.weight_only_token import weight_only_token_kernel

WHOLE_TOKENS = 512
"""The most tokens that "tiles" is taken for. Decoding the weight costs 5 bytes of traffic a weight (3 for int8 to write
it in bfloat16, 2 to read it again), 1.2 picoseconds at 4.3 TB/s, and a token's products with it 2.6 femtoseconds at 770
TFLOP/s. If "tiles" reaches two thirds of that speed, decoding pays for itself from 900 tokens on; at half, from 450."""

FEW_TOKENS = 16
"""Up to so many tokens the weight's bytes are all that costs, and two waves of programs are wanted."""

MAX_SPLIT = 16
"""The most programs that share a tile's K: beyond it the workspace's traffic adds up."""

UNALIGNED = {"block_m": 32, "block_n": 64, "block_k": 64, "num_warps": 8, "num_stages": 2}
"""For sizes, strides or addresses that are not multiples of 16: every number is loaded by itself, into registers, and
larger tiles would spill."""

SUM_BLOCK = 512
"""Out features of a token that one program adds up."""

COMPUTE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def way(x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int | None = None) -> str:
    """Return "token", "tiles" or "whole": how `launch` computes x [M, K] times this weight; the module says when."""
    tokens, in_features = x.shape
    groups = weight_scale.shape[1]
    in_words = groups == 1 or bits != 4 or in_features // groups % 8 == 0
    if weight.stride(1) != 1 or bits not in (None, 4, 8) or not in_words:
        return "whole"
    if tokens == 1 and token_units(weight, in_features, groups, bits) is not None:
        return "token"
    return "whole" if x.dtype == torch.float32 or tokens > WHOLE_TOKENS else "tiles"


def launch(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    bits: int | None = None,
    config: dict[str, int] | None = None,
) -> None:
    """Write x @ dequantize(weight).T + bias into `out` [M, N], whose rows are contiguous.

    Args:
        out: [M, N], x's dtype.
        x: [M, K]; rows that are not contiguous are copied.
        weight: [N, K] int8 or fp8, or [N, W] int32 packed.
        weight_scale: [N, G], any strides.
        bias: [N] or None.
        bits: of a packed weight; None for one that is not.
        config: what `configuration` would return for the way that is taken.
    """
    if out.numel() == 0:
        return
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    if x.shape[1] == 0:
        out.copy_(torch.zeros_like(out) if bias is None else bias.expand_as(out))
        return
    if weight_scale.dtype not in formats.FLOAT_DTYPES:
        weight_scale = weight_scale.float()
    taken = way(x, weight, weight_scale, bits)
    if taken == "whole":
        multiply_dense(out, x, dequantize.dequantize(weight, weight_scale, x.dtype, bits, x.shape[1]), bias)
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    # Triton launches on the current device; for CPU tensors (the interpreter) this changes nothing
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        launcher = _launch_token if taken == "token" else _launch_tiles
        launcher(out, x, weight, weight_scale, bias, bits, config)


def linear_weight_only(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ W.T + bias, [..., N] in x's dtype: what `ops.linear_weight_only` says, with this module's error."""
    return _linear(x, weight, weight_scale, bias, None)


def linear_weight_only_packed(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """Return `linear_weight_only` of a packed weight, [..., N] in x's dtype: as `ops.linear_weight_only_packed`."""
    return _linear(x, weight_packed, weight_scale, bias, bits)


def _linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int | None) -> Tensor:
    tokens = generic.tokens(x)
    out = torch.empty((tokens.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    launch(out, tokens, weight, weight_scale, bias, bits)
    return out.view(*x.shape[:-1], weight.shape[0])


def _launch_token(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    bits: int | None,
    config: dict[str, int] | None,
) -> None:
    """Write the product with one token into `out` [1, N]."""
    out_features, (groups, in_features) = out.shape[1], (weight_scale.shape[1], x.shape[1])
    units = token_units(weight, in_features, groups, bits)
    assert units is not None
    config = config or narrowed(_configuration("weight_only_token", x, out_features, bits), out_features, x.device)
    weight_only_token_kernel[(triton.cdiv(out_features, config["block_n"]),)](
        x,
        units.tensor,
        weight_scale,
        weight_scale if bias is None else bias,
        out,
        out_features,
        units.tensor.shape[1],
        in_features // groups,
        codes.EXPONENT,
        units.tensor.stride(0),
        weight_scale.stride(0),
        weight_scale.stride(1),
        NUMBERS=units.numbers,
        PER_UNIT=units.per_unit,
        ROW_SCALE=groups == 1,
        HAS_BIAS=bias is not None,
        BLOCK_N=config["block_n"],
        LANES=32 * config["num_warps"],
        WIDE=TOKEN_BYTES // units.tensor.element_size(),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )


def _launch_tiles(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    bits: int | None,
    config: dict[str, int] | None,
) -> None:
    """Write the product into `out` [M, N] by tiles, and by parts of K where there are too few of them."""
    (tokens, in_features), (out_features, groups) = x.shape, weight_scale.shape
    units = tile_units(weight, in_features, groups, bits, tokens)
    if config is None:
        aligned = _aligned(x, units.tensor)
        config = _configuration("weight_only", x, out_features, bits) if aligned else UNALIGNED
    scales, block_k = scales_and_depth(in_features // groups, groups, units.per_unit, config["block_k"])
    tiles = triton.cdiv(tokens, config["block_m"]) * triton.cdiv(out_features, config["block_n"])
    steps = triton.cdiv(in_features, block_k)
    parts = min(config["parts"], steps) if "parts" in config else split(tiles, steps, tokens, x.device)
    steps_each = triton.cdiv(steps, parts)
    parts = triton.cdiv(steps, steps_each)  # none of them is empty
    sums = out if parts == 1 else torch.empty((parts, *out.shape), dtype=torch.float32, device=out.device)
    weight_only_kernel[(tiles, parts)](
        x,
        units.tensor,
        weight_scale,
        weight_scale if bias is None else bias,
        sums,
        tokens,
        out_features,
        in_features,
        units.tensor.shape[1] if units.per_unit > 1 else in_features,
        in_features // groups,
        codes.EXPONENT,
        steps_each,
        x.stride(0),
        units.tensor.stride(0),
        weight_scale.stride(0),
        weight_scale.stride(1),
        0 if parts == 1 else sums.stride(0),
        sums.stride(-2),
        NUMBERS=units.numbers,
        PER_UNIT=units.per_unit,
        SCALES=scales,
        HAS_BIAS=bias is not None and parts == 1,
        COMPUTE=tl.float32 if knobs.runtime.interpret else COMPUTE[x.dtype],
        BLOCK_M=config["block_m"],
        BLOCK_N=config["block_n"],
        BLOCK_K=block_k,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    if parts > 1:
        sum_parts(out, sums, bias)


def multiply_dense(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Write x @ weight.T + bias into `out` [M, N] by the library's product: all of one dtype, weight [N, K]."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def sum_parts(out: Tensor, sums: Tensor, bias: Tensor | None) -> None:
    """Write the sum of parts [S, M, N], contiguous, in float32, one after the other, + bias [N] into `out` [M, N]."""
    parts, tokens, out_features = sums.shape
    sum_parts_kernel[(tokens, triton.cdiv(out_features, SUM_BLOCK))](
        sums,
        sums if bias is None else bias,
        out,
        out_features,
        sums.stride(0),
        out.stride(0),
        parts,
        HAS_BIAS=bias is not None,
        BLOCK=SUM_BLOCK,
        num_warps=4,
    )


def scales_and_depth(group: int, groups: int, per_unit: int, block_k: int) -> tuple[str, int]:
    """Return SCALES and BLOCK_K of the kernel: a step lies within a group where that leaves it deep enough.

    A product of tensor cores is 16 deep at least, so that words of eight codes need steps of 128, of four 64.
    """
    block_k = max(block_k, 16 * per_unit)
    if groups == 1:
        return "row", block_k
    within = min(block_k, group & -group)
    return ("step", within) if within >= max(64, 16 * per_unit) else ("code", block_k)


def _aligned(x: Tensor, units: Tensor) -> bool:
    """Return whether Triton sees that it may load 16 bytes at once: sizes, strides and addresses divided by 16."""
    numbers = (x.data_ptr(), units.data_ptr(), x.stride(0), units.stride(0), x.shape[1], units.shape[1])
    return all(number % 16 == 0 for number in numbers)


def split(tiles: int, steps: int, tokens: int, device: torch.device) -> int:
    """Return among how many programs K is split: enough to fill the processors, twice with few tokens."""
    wanted = (2 if tokens <= FEW_TOKENS else 1) * _processors(device)
    return max(1, min(wanted // tiles, steps // 2, MAX_SPLIT))


def narrowed(config: dict[str, int], out_features: int, device: torch.device) -> dict[str, int]:
    """Return the configuration with fewer rows a program where there would be less than two programs a processor."""
    block_n, wanted = config["block_n"], 2 * _processors(device)
    while block_n > 1 and triton.cdiv(out_features, block_n) < wanted:
        block_n //= 2
    return {**config, "block_n": block_n}


def _configuration(kernel: str, x: Tensor, out_features: int, bits: int | None) -> dict[str, int]:
    """Return the configuration for this shape on x's device; weights of 4 and of 8 bits have tables of their own."""
    name = f"{kernel}_{4 if bits == 4 else 8}bit"
    return configuration(name, x.shape[0], out_features, x.shape[1], architecture(x.device))


def _processors(device: torch.device) -> int:
    """Return how many multiprocessors the device has; asked once. For the CPU (the interpreter) a few."""
    if device.type != "cuda":
        return 8
    return _count(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _count(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
