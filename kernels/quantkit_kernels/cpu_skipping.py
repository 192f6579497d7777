"""Products on a CPU that read only the rows of a weight which meet nonzero numbers.

A row of a neuron-contiguous weight [K, N] is one address and one length: `embedding_bag`, which adds up weighted rows
of a table, is that product, reads rows where they lie, adds in float32 and asks for the next row in time. Gathering
rows first and multiplying them afterwards moves each three times.

One AMD EPYC (Zen 4), two threads, weights in memory and not in the cache, microseconds of one token, and in brackets
the ordinary layer [N, K] (`F.linear`; int8: `torch._weight_int8pack_mm`), by the share of zeros:

| K x N | 0 | 50 % | 80 % | 90 % | 95 % |
| --- | --- | --- | --- | --- | --- |
| 4096 x 1024, bfloat16 (419) | 473 | 255 | 75 | 53 | 40 |
| 5632 x 2048, bfloat16 (1388) | 1122 | 463 | 141 | 87 | 58 |
| 4096 x 1024, int8 (192) | 322 | 224 | 94 | 73 | 62 |
| 5632 x 2048, int8 (365) | 608 | 281 | 142 | 104 | 79 |

A float weight lies as [K, N] only, which a product with all rows reads slower still (668 and 1815), so that with one
token rows are always read by themselves. With several that depends on how many are read in all, and so it does for int8
weights, which have their ordinary layout beside this one. `ROWS_OF_A_PRODUCT` and what follows are the break-even.

Which way a call took is counted: a product with all rows once more, under the op's name and ", all rows".
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit_kernels import cpu_decoding, generic
from quantkit_kernels.backends import count

ROWS_OF_A_PRODUCT = 1.6
ROWS_OF_A_TOKEN = 0.065
"""A product of M tokens with all K float rows takes as long as (ROWS_OF_A_PRODUCT + ROWS_OF_A_TOKEN * M) * K rows that
are read by themselves. Measured in bfloat16, at K x N of 4096 x 1024, 5632 x 2048 and 11008 x 4096: 1.7, 1.5 and 1.9
times K with two tokens, 2.6, 2.2 and 2.1 with 8, 2.3, 2.9 and 2.6 with 16, 5.5, 7 and 5.6 with 64."""

CODES_OF_A_PRODUCT = 0.4
CODES_OF_A_TOKEN = 0.2
"""The same for int8 rows, beside the ordinary layer: K rows times the larger of CODES_OF_A_PRODUCT and M times
CODES_OF_A_TOKEN. Measured, at the same sizes: 0.4, 0.6 and 0.4 times K with one token, 0.5, 0.85 and 0.7 with 4, 1.7,
2.3 and 2.1 with 8, 4, 4.8 and 5 with 16."""

GATHERED_SHARE = 0.35
"""Up to this share of the rows it is faster to copy rows [I, K] and multiply the copies than to multiply all rows where
they lie: a copied row is written and read again. Measured: 0.5 x in float32 at one half, 2.2 x at a fifth."""

GATHERED_TOKENS = 4
"""Up to so many tokens neurons that any of them needs are gathered for all; more have few in common."""

PART = 512
"""Columns of int8 rows in one part: parts of a row are added up by different threads."""

_TAIL = 8
"""Bytes after a part: a float32 scale and a float32 offset, here 1 and -128."""


def linear_sparse_input(x: Tensor, weight_t: Tensor, weight_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return the output [..., N] in x's dtype, from the rows that x needs, or from all where that is faster."""
    values = generic.tokens(x)
    rows = 1.0 * len(values) if len(values) < 2 else ROWS_OF_A_PRODUCT + ROWS_OF_A_TOKEN * len(values)
    found = _needed(values, rows, weight_t.dtype)
    if found is None or weight_t.numel() == 0:
        return generic.linear_sparse_input(x, weight_t, weight_scale, bias)
    if weight_scale is not None:
        sums = _gathered_codes(values, weight_t)
    else:
        dtype = x.dtype if weight_t.dtype == x.dtype else torch.float32
        weight_t = weight_t if weight_t.dtype == x.dtype else weight_t.float()
        sums = _bags(values.to(dtype), weight_t.contiguous(), found)
    return _finished(sums, weight_scale, bias, x.dtype).view(*x.shape[:-1], weight_t.shape[1])


def mlp_sparse(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    up_scale: Tensor | None,
    up_bias: Tensor | None,
    down_t: Tensor,
    down_scale: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    """Return the gated MLP's output [..., N] in x's dtype, from the neurons that the gates leave."""

    def rows(used: Tensor | None) -> Tensor:
        if used is None:
            return product_of_rows(x, up, up_scale, up_bias)
        scale, bias = (None if each is None else each.index_select(0, used) for each in (up_scale, up_bias))
        return product_of_rows(x, up.index_select(0, used), scale, bias)

    return gated(gate, rows, up.dtype, lambda hidden: linear_sparse_input(hidden, down_t, down_scale, down_bias))


def gated(
    gate: Tensor, rows: Callable[[Tensor | None], Tensor], dtype: torch.dtype, down: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return down(up(x) * gate), with only those neurons of `up` that have a gate where they are few.

    Args:
        gate: [..., I].
        rows: what the up projection gives, [..., R], for the numbers of R neurons; [..., I] of all for None.
        dtype: of its weights, to be counted.
        down: the product after it.
    """
    gates = generic.tokens(gate)
    tokens, neurons = gates.shape
    used = None
    if 0 < tokens <= GATHERED_TOKENS:
        any_gate = gates[0] if tokens == 1 else gates.abs().amax(0)
        if int(torch.count_nonzero(any_gate)) <= GATHERED_SHARE * neurons:  # which costs a tenth of finding them
            used = any_gate.nonzero().view(-1)
    if used is None:
        count("mlp_sparse, all rows", dtype, "cpu")
        return down(rows(None).mul_(gate))
    hidden = torch.zeros_like(gate, memory_format=torch.contiguous_format)
    if len(used):
        hidden.index_copy_(-1, used, rows(used).mul_(gate.index_select(-1, used)))
    return down(hidden)


def product_of_rows(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return the linear layer's output [..., N] in x's dtype for a weight [N, K] in float, or int8 with a scale."""
    if scale is None:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return cpu_decoding.linear_weight_only(x, weight, scale, bias)


@dataclass(frozen=True)
class Rows:
    """Int8 rows as `embedding_bag` reads them.

    Attributes:
        table: [K * P, N / P + 8], uint8: P parts of a row, one after the other, each code + 128, then 1.0 and -128.0.
        rows: K.
        columns: N.
    """

    table: Tensor
    rows: int
    columns: int

    @property
    def parts(self) -> int:
        """P."""
        return self.table.shape[0] // max(1, self.rows)

    def codes(self) -> Tensor:
        """Return the codes [K, N] in int8."""
        numbers = self.table[:, :-_TAIL].reshape(self.rows, self.columns)
        return (numbers ^ 128).view(torch.int8)


def pack_rows(codes: Tensor) -> Rows:
    """Return the int8 codes [K, N] as `linear_of_rows` reads them: 8 bytes more for each PART columns."""
    rows, columns = codes.shape
    parts = columns // PART if columns and columns % PART == 0 else 1
    table = torch.empty((rows * parts, columns // parts + _TAIL), dtype=torch.uint8)
    numbers = codes.contiguous().view(torch.uint8).view(rows * parts, columns // parts)
    torch.bitwise_xor(numbers, 128, out=table[:, :-_TAIL])
    table[:, -_TAIL:] = torch.tensor([1.0, -128.0]).view(torch.uint8)
    return Rows(table, rows, columns)


def linear_of_rows(
    x: Tensor, weight: Rows, weight_scale: Tensor, bias: Tensor | None, ordinary: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return `linear_sparse_input` of packed int8 rows, [..., N] in x's dtype, or `ordinary(x)` where that is faster.

    What is added up is x_k * (code + 128) - 128 * x_k, so that the error is (K + 4) * 2**-24 * 383 * sum |x_k| * scale
    at most, and not that of the sum of |x_k * code|.

    Args:
        x: [..., K], float32, bfloat16 or float16.
        weight: from `pack_rows`.
        weight_scale: [N, 1], any float dtype.
        bias: [N], any float dtype, or None.
        ordinary: the layer's product with all rows.
    """
    values = generic.tokens(x)
    found = _needed(values, max(CODES_OF_A_PRODUCT, CODES_OF_A_TOKEN * len(values)), torch.int8)
    if found is None or weight.table.numel() == 0:
        return ordinary(x)
    count("linear_sparse_input", torch.int8, "cpu")
    sums = _byte_bags(values, weight, found)
    return _finished(sums, weight_scale, bias, x.dtype).view(*x.shape[:-1], weight.columns)


def _needed(x: Tensor, rows: float, dtype: torch.dtype) -> Tensor | None:
    """Return where x [M, K] isn't zero, [R, 2] (of one token: [R]); None, which is counted, beyond rows * K of them."""
    tokens, in_features = x.shape
    few = rows >= tokens or int(torch.count_nonzero(x)) <= rows * in_features  # counting costs a tenth of finding
    if tokens and in_features and few:
        return x[0].nonzero().view(-1) if tokens == 1 else x.nonzero()
    count("linear_sparse_input, all rows", dtype, "cpu")
    return None


def _bags(x: Tensor, weight_t: Tensor, found: Tensor) -> Tensor:
    """Return the sums [M, N] in x's dtype of the rows of `weight_t` [K, N], contiguous, x's dtype."""
    out_features = weight_t.shape[1]
    if not found.numel():
        return x.new_zeros((x.shape[0], out_features))
    if x.shape[0] > 1:
        token, row = found.unbind(1)
        return F.embedding_bag(row, weight_t, _starts(token, len(x)), mode="sum", per_sample_weights=x[token, row])
    parts = torch.get_num_threads()
    weights = x[0].index_select(0, found)
    if parts == 1 or out_features % parts or out_features // parts < 64:
        start = found.new_zeros(1)
        return F.embedding_bag(found, weight_t, start, mode="sum", per_sample_weights=weights)
    # a bag has one thread: so each has a part of every row, which is a row of the weight seen with shorter ones
    rows = found * parts + torch.arange(parts).unsqueeze(1)
    narrow = weight_t.view(-1, out_features // parts)
    sums = F.embedding_bag(rows, narrow, mode="sum", per_sample_weights=weights.expand(parts, -1).contiguous())
    return sums.view(1, out_features)


def _byte_bags(x: Tensor, weight: Rows, found: Tensor) -> Tensor:
    """Return the sums [M, N] in float32 of x times codes."""
    parts, tokens = weight.parts, x.shape[0]
    if not found.numel():
        return torch.zeros((tokens, weight.columns))
    if tokens == 1:
        row, weights = found, x[0].index_select(0, found).float()
        ends = torch.arange(parts, dtype=torch.int32) * len(row)
        rows, weights = row * parts + torch.arange(parts).unsqueeze(1), weights.repeat(parts)
    else:
        token, row = found.unbind(1)
        weights, start = x[token, row].float(), _starts(token, tokens)
        # parts are outermost, then tokens: each part of each token is a bag
        ends = (torch.arange(parts).unsqueeze(1) * len(row) + start).view(-1).to(torch.int32)
        rows, weights = row * parts + torch.arange(parts).unsqueeze(1), weights.repeat(parts)
    sums: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        weight.table, rows.view(-1).to(torch.int32), ends, False, 0, False, weights, None, False
    )
    return sums.view(parts, tokens, -1).transpose(0, 1).reshape(tokens, weight.columns)


def _starts(token: Tensor, tokens: int) -> Tensor:
    """Return where each of M tokens' numbers begin, [M], in an ascending list of the token of each."""
    return F.pad(torch.bincount(token, minlength=tokens).cumsum(0), (1, 0))[:-1]


def _gathered_codes(x: Tensor, codes: Tensor) -> Tensor:
    """Return the sums [M, N] in float32 of x times int8 codes [K, N], of rows that any token needs."""
    used = (x[0] if len(x) == 1 else x.abs().amax(0)).nonzero().view(-1)
    sums = torch.zeros((x.shape[0], codes.shape[1]))
    for part in used.split(PART):  # type: ignore[no-untyped-call]
        sums.addmm_(x.index_select(1, part).float(), codes.index_select(0, part).float())
    return sums


def _finished(sums: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return sums * scale + bias, [M, N] in the dtype."""
    if scale is None and bias is None:
        return sums.to(dtype)
    out = sums.float()
    if scale is not None:
        out = out * scale.float().view(1, -1)
    if bias is not None:
        out = out + bias.float()
    return out.to(dtype)
