"""Linear layers with packed 2:4 and V:N:M weights in Triton: y = x @ unpacked(W).T + bias.

Values in bfloat16, float16, int8, fp8 (also on processors without fp8) and in codes of 4 bits; a scale a row, or one
for each group of a row. What is read is the packed weight, as it lies: values and 2-bit indices (`sparse24.py`), and of
V:N:M the columns (`venom.py`). M tokens, K in features, N out features, G scales a row.

Which of four ways is taken depends on shapes and dtypes alone, and on what torch was built with (`way`):

- "token" (`sparse24_token.py`): one token. Float32 arithmetic, the input of each value found by selects.
- "tiles" (`sparse24_tiles.py`): up to TILE_TOKENS tokens in bfloat16 or float16, of V:N:M up to COLUMN_TOKENS. The
  packed weight becomes dense in registers, exactly, and meets x in the tensor cores. Where there are too few tiles to
  fill the processors K is split among programs, as in `weight_only.py`.
- "cusparselt" (`cusparselt.py`): from `cusparselt.TOKENS` tokens on, where torch offers it for this device. The weight
  is made dense once (`sparse24_dense.py`), put into the order of the sparse tensor cores, and multiplied there.
- "whole": the rest. The weight is made dense once, 2 or 4 bytes a weight for the time of the call, and cuBLAS does the
  product: many tokens, float32 with several tokens, values in float32, rows or groups that are not whole words, V that
  is too small for a tile.

Error. "whole" and "cusparselt" round the dense weight as `generic.linear_sparse24` does. "tiles" rounds values in float
to x's dtype, which changes nothing where that is theirs, and codes times scales of groups. Else scales multiply sums,
and nothing is rounded before them: |y - exact| <= (K / 2 + 8) * 2**-24 * sum over k of |x * weight| + 2**-24 * |bias|,
then one rounding to x's dtype; for tensor cores, which cut sums off instead of rounding them and add the zeros as well,
(K + 4) and twice that.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from quantkit_kernels import formats, generic
from quantkit_kernels.configurations import architecture, configuration
from quantkit_kernels.gpu import codes, cusparselt, sparse24_dense, units, weight_only
from quantkit_kernels.gpu.sparse24_tiles import sparse24_kernel
from quantkit_kernels.gpu.sparse24_token import sparse24_token_kernel
from quantkit_kernels.gpu.sparse24_units import Packed, tile_words, token_words

TILE_TOKENS = 64
"""The most tokens that "tiles" is taken for: a tile or two. With more the weight would be made dense in registers again
and again, and doing it once costs about what 450 tokens cost (`weight_only.WHOLE_TOKENS`)."""

COLUMN_TOKENS = 16
"""The most tokens that "tiles" is taken for with V:N:M: x is gathered number by number, for each tile again."""

LEAST_ROWS = 16
"""The least out features of a tile: V may not be smaller for "tiles"."""

UNALIGNED = {"block_m": 16, "block_n": 64, "block_k": 128, "num_warps": 8, "num_stages": 2}
"""For sizes, strides or addresses that are not multiples of 16, where numbers are loaded one by one."""


def way(x: Tensor, weight: Packed) -> str:
    """Return "token", "tiles", "cusparselt" or "whole": how `launch` computes x [M, K] times this weight."""
    tokens = x.shape[0]
    if tokens == 1 and token_words(weight) is not None:
        return "token"
    most = TILE_TOKENS
    if weight.columns is not None:
        most = COLUMN_TOKENS if _rows_of_tile(weight, 64) else 0
    if x.dtype != torch.float32 and tokens <= most and tile_words(weight) is not None:
        return "tiles"
    against = cusparselt.reason_against(x.dtype, weight.values.shape[0], weight.in_features, x.device)
    return "cusparselt" if tokens >= cusparselt.TOKENS and not against else "whole"


def launch(out: Tensor, x: Tensor, weight: Packed, bias: Tensor | None, config: dict[str, int] | None = None) -> None:
    """Write x @ unpacked(weight).T + bias into `out` [M, N], whose rows are contiguous.

    Args:
        out: [M, N], x's dtype.
        x: [M, K]; rows that are not contiguous are copied.
        weight: the packed weight, its scale in float32, bfloat16 or float16, any strides.
        bias: [N] or None.
        config: what `configuration` would return for the way that is taken.
    """
    if out.numel() == 0:
        return
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    if x.shape[1] == 0:
        out.copy_(torch.zeros_like(out) if bias is None else bias.expand_as(out))
        return
    taken = way(x, weight)
    if taken in ("whole", "cusparselt"):
        dense_weight = dense(weight, x.dtype)
        if taken == "cusparselt":
            out.copy_(cusparselt.linear(x, dense_weight, bias))
        else:
            weight_only.multiply_dense(out, x, dense_weight, bias)
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    # Triton launches on the current device; for CPU tensors (the interpreter) this changes nothing
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        launcher = _launch_token if taken == "token" else _launch_tiles
        launcher(out, x, weight, bias, config)


def linear_sparse24(
    x: Tensor, values: Tensor, indices: Tensor, weight_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return x @ W.T + bias, [..., N] in x's dtype: what `ops.linear_sparse24` says, with this module's error."""
    return _linear(x, Packed(values, indices, _known(weight_scale), x.shape[-1]), bias)


def linear_venom(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    columns: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    v: int,
    m: int,
) -> Tensor:
    """Return x @ W.T + bias, [..., N] in x's dtype: what `ops.linear_venom` says, with this module's error."""
    weight = Packed(values, indices, _known(weight_scale), x.shape[-1], columns.contiguous(), v, m)
    return _linear(x, weight, bias)


def _known(scale: Tensor | None) -> Tensor | None:
    """Return the scale in a dtype that kernels read."""
    return scale if scale is None or scale.dtype in formats.FLOAT_DTYPES else scale.float()


def _linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    tokens = generic.tokens(x)
    out = torch.empty((tokens.shape[0], weight.values.shape[0]), dtype=x.dtype, device=x.device)
    launch(out, tokens, weight, bias)
    return out.view(*x.shape[:-1], weight.values.shape[0])


def dense(weight: Packed, dtype: torch.dtype) -> Tensor:
    """Return the dense weight [N, K] in `dtype`: codes times scales rounded to the scale's dtype, then to `dtype`."""
    values, indices, columns = weight.values.contiguous(), weight.indices.contiguous(), weight.columns
    out_features, pairs = values.shape[0], weight.pairs
    make = torch.empty if columns is None else torch.zeros
    out = make((out_features, weight.in_features), dtype=dtype, device=values.device)
    if values.dtype == torch.int32:
        numbers = "offset4"
    elif units.by_bits(values):
        values, numbers = values.view(torch.uint8), "e4m3"
    else:
        numbers = {torch.int8: "int8"}.get(values.dtype, "float" if values.dtype in formats.FLOAT_DTYPES else "fp8")
    scale = weight.scale
    whole_groups = weight.by_row or weight.group % weight.tile == 0
    grid = (triton.cdiv(pairs, sparse24_dense.BLOCK_P), triton.cdiv(out_features, sparse24_dense.BLOCK_N))
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        sparse24_dense.dense_kernel[grid](
            values,
            indices.view(torch.uint8),
            indices if columns is None else columns,
            values if scale is None else scale,
            out,
            out_features,
            pairs,
            weight.group,
            weight.rows,
            weight.tile,
            values.stride(0),
            4 * indices.stride(0),
            0 if columns is None else columns.stride(0),
            0 if scale is None else scale.stride(0),
            0 if scale is None else scale.stride(1),
            out.stride(0),
            NUMBERS=numbers,
            SCALES="none" if scale is None else ("pair" if whole_groups else "code"),
            COLUMNS=columns is not None,
            BLOCK_N=sparse24_dense.BLOCK_N,
            BLOCK_P=sparse24_dense.BLOCK_P,
            num_warps=sparse24_dense.NUM_WARPS,
        )
    return out


def _launch_token(out: Tensor, x: Tensor, weight: Packed, bias: Tensor | None, config: dict[str, int] | None) -> None:
    """Write the product with one token into `out` [1, N]."""
    out_features, words = out.shape[1], token_words(weight)
    assert words is not None
    scale, columns = weight.scale, weight.columns
    if config is None:
        config = weight_only.narrowed(_configuration("sparse24_token", x, weight), out_features, x.device)
    block_n = config["block_n"] if columns is None else math.gcd(config["block_n"], weight.rows)
    sparse24_token_kernel[(triton.cdiv(out_features, block_n),)](
        x,
        words.values,
        words.indices,
        words.indices if columns is None else columns,
        words.values if scale is None else scale,
        words.values if bias is None else bias,
        out,
        out_features,
        weight.pairs // words.pairs,
        weight.group_of_kept,
        codes.EXPONENT,
        weight.rows,
        weight.tile,
        words.values.stride(0),
        words.indices.stride(0),
        0 if columns is None else columns.stride(0),
        0 if scale is None else scale.stride(0),
        0 if scale is None else scale.stride(1),
        NUMBERS=words.numbers,
        PAIRS=words.pairs,
        SCALES="none" if scale is None else ("row" if weight.by_row else "group"),
        COLUMNS=columns is not None,
        HAS_BIAS=bias is not None,
        BLOCK_N=block_n,
        LANES=32 * config["num_warps"],
        WIDE=words.wide,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )


def _launch_tiles(out: Tensor, x: Tensor, weight: Packed, bias: Tensor | None, config: dict[str, int] | None) -> None:
    """Write the product into `out` [M, N] by tiles, and by parts of K where there are too few of them."""
    tokens, out_features = out.shape
    words = tile_words(weight)
    assert words is not None
    scale, columns, kept = weight.scale, weight.columns, 4 * weight.pairs
    if config is None:
        config = _configuration("sparse24", x, weight) if _aligned(x, weight) else UNALIGNED
    least = 16 * 4 * words.pairs  # tensor cores are 16 deep at least, and have a product for each place of a word
    block_n = config["block_n"] if columns is None else _rows_of_tile(weight, config["block_n"])
    # with fewer out features the same depth would take more registers a thread
    block_k = least if block_n < config["block_n"] else max(least, config["block_k"])
    tiles = triton.cdiv(tokens, config["block_m"]) * triton.cdiv(out_features, block_n)
    steps = triton.cdiv(kept, block_k)
    wanted = config.get("parts") or weight_only.split(tiles, steps, tokens, x.device)
    steps_each = triton.cdiv(steps, min(wanted, steps))
    parts = triton.cdiv(steps, steps_each)  # none of them is empty
    sums = out if parts == 1 else torch.empty((parts, *out.shape), dtype=torch.float32, device=out.device)
    sparse24_kernel[(tiles, parts)](
        x,
        words.values,
        words.indices,
        words.indices if columns is None else columns,
        words.values if scale is None else scale,
        words.values if bias is None else bias,
        sums,
        tokens,
        out_features,
        kept,
        triton.cdiv(weight.pairs, words.pairs),
        weight.group_of_kept,
        codes.EXPONENT,
        steps_each,
        weight.rows,
        weight.tile,
        x.stride(0),
        words.values.stride(0),
        words.indices.stride(0),
        0 if columns is None else columns.stride(0),
        0 if scale is None else scale.stride(0),
        0 if scale is None else scale.stride(1),
        0 if parts == 1 else sums.stride(0),
        sums.stride(-2),
        NUMBERS=words.numbers,
        PAIRS=words.pairs,
        SCALES="none" if scale is None else ("row" if weight.by_row else "code"),
        COLUMNS=columns is not None,
        HAS_BIAS=bias is not None and parts == 1,
        COMPUTE=tl.float32 if knobs.runtime.interpret else weight_only.COMPUTE[x.dtype],
        BLOCK_M=config["block_m"],
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    if parts > 1:
        weight_only.sum_parts(out, sums, bias)


def _rows_of_tile(weight: Packed, block_n: int) -> int:
    """Return how many out features a tile has where V rows share their columns; 0 where they are too few."""
    rows = block_n if weight.rows >= weight.values.shape[0] else math.gcd(weight.rows, block_n)
    return rows if rows >= LEAST_ROWS else 0


def _aligned(x: Tensor, weight: Packed) -> bool:
    """Return whether Triton sees that it may load 16 bytes at once: sizes, strides and addresses divided by 16."""
    values = weight.values
    numbers = (x.data_ptr(), values.data_ptr(), x.stride(0), values.stride(0) * values.element_size())
    return all(number % 16 == 0 for number in (*numbers, weight.pairs))


def _configuration(kernel: str, x: Tensor, weight: Packed) -> dict[str, int]:
    """Return the configuration for this shape on x's device; each width of values has a table of its own."""
    name = f"{kernel}_{weight.bits}bit"
    return configuration(name, x.shape[0], weight.values.shape[0], 4 * weight.pairs, architecture(x.device))
