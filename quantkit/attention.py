"""Attention on a CPU: `scaled_dot_product_attention`, called such that it is fast there.

It is what transformers' `sdpa` computes, by the same function of torch. On a CPU that function (torch 2.13)

- multiplies a single query in half precision number by number. In bfloat16 the queries that share a key go in as rows
  of one product; where each has keys of its own, and in float16, it runs in float32, a few heads at a time;
- takes keys in blocks of 512, also those that causal attention leaves out. Up to so many tokens twice the needed are
  multiplied; so queries go in a part at a time, each with the keys up to its last one.

Everything else (masks over several queries, a paged cache, a bias of positions, dropout, gradients, other devices,
compiling) is left to transformers' own function. So is what isn't `sdpa`: nothing here is used for a model that
transformers gives another attention, such as one with sinks or a cap on its scores.

B prompts, H heads, G of them for each of H / G heads of keys, M queries, L keys, D numbers a head.
"""

import ast
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "quantkit"
"""What transformers calls it (`config._attn_implementation`)."""
CHOICES = ("auto", "transformers")

Function = Callable[..., tuple[Tensor, Tensor | None]]
"""What transformers calls: (module, query [B, H, M, D], key [B, H / G, L, D], value, mask, ...) -> [B, M, H, D]."""

PART = 64
"""So many queries go in at a time, of prompts of more than that up to `MOST`: beyond, blocks of keys are small beside
the prompt."""
MOST = 1024
_AT_ONCE = 1 << 19
"""So many numbers of keys are converted to float32 at a time: two MiB."""


def on_a_cpu(plain: Function) -> Function:
    """The attention function for transformers' registry; `plain` is its `sdpa`, which runs wherever this one doesn't.

    Results differ from `plain`'s by rounding. With one query in float32: weights aren't rounded to the dtype of the
    keys, as `plain` does, and the result is, once, like `plain`'s. All else: float32 sums are added in another order.
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **words: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not dropout and not any(words.get(name) is not None for name in _OTHERS):
            causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
            if _fits(module, query, key, value):
                if query.shape[2] == 1 and (attention_mask is None or attention_mask.ndim == 4):
                    return one_query(query, key, value, attention_mask, scaling), None
                if attention_mask is None and causal and _gains_in_parts(query, key):
                    return causal_in_parts(query, key, value, scaling), None
        given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **words}
        return plain(module, query, key, value, attention_mask, **given)

    return attention


_OTHERS = ("softcap", "position_bias", "cache", "s_aux")
"""What changes what attention is: `plain` knows it, or refuses it."""


def _fits(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether these are plain tensors on a CPU, without a gradient, as many heads as the module says."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if not (query.is_cpu and key.is_cpu and value.is_cpu):
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    groups = getattr(module, "num_key_value_groups", 1)
    return (
        query.dtype == key.dtype == value.dtype
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[1] == groups * key.shape[1] == groups * value.shape[1]
    )


def _gains_in_parts(query: Tensor, key: Tensor) -> bool:
    """Whether parts save more than their calls cost, and leave each thread enough to do."""
    batch, heads, queries, _ = query.shape
    return PART < queries <= min(MOST, key.shape[2]) and batch * heads >= 2 * torch.get_num_threads()


def one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """The output [B, 1, H, D] of one query a head, [B, H, 1, D].

    Args:
        query: [B, H, 1, D].
        key: [B, H / G, L, D], in the query's dtype.
        value: as `key`.
        mask: [B or 1, H or 1, 1, L], True (or added) where a key counts; or None for all of them.
        scaling: what scores are multiplied with; None for 1 / sqrt(D).
    """
    batch, heads = query.shape[:2]
    kept = key.shape[1]
    rows = query.reshape(batch, kept, heads // kept, -1)
    if mask is not None and mask.shape[1] != 1:
        mask = mask.reshape(mask.shape[0], kept, heads // kept, -1)
    if query.dtype == torch.float16 or (query.dtype == torch.bfloat16 and heads == kept):
        out = _in_float32(rows, key, value, mask, scaling)
    else:
        out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, 1, heads, -1)


def _in_float32(rows: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """The output [B, H / G, G, D], computed in float32, some heads at a time: what is converted stays in cache."""
    batch, kept, keys, size = key.shape
    step = max(1, _AT_ONCE // max(1, batch * keys * size))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    parts = []
    for start in range(0, kept, step):
        part = slice(start, start + step)
        own = mask if mask is None or mask.shape[1] == 1 else mask[:, part]
        query, keys32, values32 = rows[:, part].float(), key[:, part].float(), value[:, part].float()
        found = F.scaled_dot_product_attention(query, keys32, values32, attn_mask=own, scale=scaling)
        parts.append(found.to(rows.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def causal_in_parts(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """The output [B, M, H, D] of causal attention, query m seeing the keys 0 to m, `PART` queries at a time."""
    shared = query.shape[1] != key.shape[1]
    parts = []
    for start in range(0, query.shape[2], PART):
        end = min(start + PART, query.shape[2])
        mask = torch.full((end - start, end), -math.inf, dtype=query.dtype).triu_(1 + start)
        found = F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, :end],
            value[:, :, :end],
            attn_mask=mask,
            scale=scaling,
            enable_gqa=shared,
        )
        parts.append(found.transpose(1, 2))
    return torch.cat(parts, dim=1)


def names_sdpa(source: str) -> bool:
    """Whether a module's code asks for the attention's name: it holds "sdpa" other than as a parameter's default.

    Some models do more or less beside attention where that is `sdpa`, so that its name may not be another's.
    """
    if "sdpa" not in source:
        return False
    tree = ast.parse(source)
    defaults = {id(each) for node in ast.walk(tree) for each in _defaults(node)}
    return any(
        isinstance(node, ast.Constant) and node.value == "sdpa" and id(node) not in defaults for node in ast.walk(tree)
    )


def _defaults(node: ast.AST) -> Iterator[ast.AST]:
    """What a function's parameters have as defaults."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        yield from node.args.defaults
        yield from (each for each in node.args.kw_defaults if each is not None)
