"""The `bitsandbytes` kind: int8 by rows (LLM.int8) and the 4-bit NF4 and FP4 (QLoRA).

| stored | | |
| --- | --- | --- |
| `X.weight` | int8 [N, K] | `X.SCB` float32 [N]: the absmax of a row; value = code * (SCB / 127) |
| `X.weight_format` | uint8, 0 | rows as they are; other layouts of old GPU kernels are refused |
| `X.weight` | [bytes, 1] | two codes in a byte, the high nibble first, all rows in one run |
| `X.weight.absmax` | float32 [blocks] | value = map[code] * absmax of its block |
| `X.weight.quant_map` | float32 [16] | the values of the 16 codes |
| `X.weight.quant_state.bitsandbytes__nf4` | JSON in bytes | shape, block size, offset of a compressed absmax |
| `X.weight.nested_absmax`, `X.weight.nested_quant_map` | | with absmax uint8: absmax = map[code] * nested + offset |

The JSON tensors (some hundred bytes each) say the shapes and are read at once; everything else waits. Weights are
[out, in] in files, also where the model has them as [in, out] (GPT-2's).
Layout: bitsandbytes 0.50; arXiv:2208.07339 and arXiv:2305.14314.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantkit.dequantization.base import (
    PIECE,
    Part,
    Plan,
    Source,
    Tensors,
    damaged,
    is_count,
    need,
    need_matrix,
    need_shape,
    runs,
    unknown,
)
from quantkit.dequantization.numbers import pairs
from quantkit.untrusted import shown

DESCRIPTION = "int8, NF4 and FP4 of bitsandbytes"
STATE = ".quant_state.bitsandbytes__"
LONGEST_STATE = 2**16
"""Bytes of JSON."""


@dataclass(frozen=True)
class State:
    """What a 4-bit weight's JSON says: its shape, elements that share an absmax, and how absmax is stored itself."""

    shape: tuple[int, ...]
    block: int
    nested_block: int | None
    offset: float


def plan(source: Source) -> Plan:
    """The plan of a checkpoint of this kind.

    Raises:
        CheckpointError: codes without what scales them, or shapes that don't fit.
    """
    weights, where = source.weights, source.where
    made = Plan()
    states = {key.split(STATE)[0]: key for key in weights.tensors if STATE in key}
    for key, info in weights.tensors.items():
        if key in states:
            _add_4bit(made, weights, key, states[key], where)
        elif key.endswith(".weight") and info.dtype == torch.int8:
            _add_int8(made, weights, key, where)
        elif key.endswith(".weight") and info.dtype == torch.uint8:
            raise damaged(where, f"{key!r} is stored without its {key + STATE + 'nf4'!r}")
    for first, state in states.items():
        need(weights, first, state, where)
    return made


def _add_int8(made: Plan, weights: Tensors, key: str, where: str) -> None:
    """Take an int8 weight into the plan."""
    shape = need_matrix(weights.tensors[key], key, where)
    stem = key.removesuffix("weight")
    keys = [key, f"{stem}SCB"]
    if len(shape) != 2:
        raise damaged(where, f"{key!r} has the shape {list(shape)}, no matrix")
    need_shape(need(weights, keys[1], key, where), shape[:1], keys[1], where)
    if f"{stem}weight_format" in weights.tensors:
        keys.append(f"{stem}weight_format")
    made.add(key, Part(shape, tuple(keys), partial(_decode_int8, where, key)))


def _decode_int8(where: str, key: str, codes: Tensor, absmax: Tensor, layout: Tensor | None = None) -> Iterator[Tensor]:
    """Yield code * (absmax / 127), float32, rounded twice (relative error 2**-23)."""
    if layout is not None and bool((layout != 0).any()):
        raise unknown(where, f"{key!r} is stored in the layout {layout.tolist()} of an old GPU kernel, not in rows")
    scale = absmax.float().div(127).unsqueeze(1)
    for start, stop in runs(*codes.shape):
        yield codes[start:stop].float().mul_(scale[start:stop])


def _add_4bit(made: Plan, weights: Tensors, key: str, state_key: str, where: str) -> None:
    """Take a 4-bit weight into the plan."""
    stored = weights.tensors[state_key]
    if stored.dtype != torch.uint8 or len(stored.shape) != 1 or stored.nbytes > LONGEST_STATE:
        raise damaged(where, f"{state_key!r} is {stored.dtype} {list(stored.shape)}, no quant state")
    state = _read_state(weights.get(state_key), state_key, where)
    count, blocks = math.prod(state.shape), -(-math.prod(state.shape) // state.block)
    info = weights.tensors[key]
    if info.nbytes != -(-count // 2):
        raise damaged(where, f"{key!r} holds {info.nbytes} bytes where {-(-count // 2)} are expected")
    sizes = {f"{key}.absmax": blocks, f"{key}.quant_map": 16}
    if state.nested_block is not None:
        sizes |= {f"{key}.nested_absmax": -(-blocks // state.nested_block), f"{key}.nested_quant_map": 256}
    for name, size in sizes.items():
        need_shape(need(weights, name, key, where), (size,), name, where)
    absmax = weights.tensors[f"{key}.absmax"].dtype
    if (absmax == torch.uint8) != (state.nested_block is not None):
        raise damaged(where, f"{key + '.absmax'!r} is {absmax}, which is not what {state_key!r} says")
    made.add(key, Part(state.shape, (key, *sizes), partial(_decode_4bit, state)))
    made.dropped.add(state_key)


def _read_state(tensor: Tensor, key: str, where: str) -> State:
    """The quant state of JSON bytes, or CheckpointError when they are none."""
    try:
        values = json.loads(bytes(tensor.tolist()))
        shape, block = tuple(values["shape"]), values["blocksize"]
        nested = values.get("nested_blocksize")
        offset = float(values["nested_offset"]) if nested is not None else 0.0
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise damaged(where, f"{key!r} holds no quant state ({shown(error)})") from error
    numbers = [*shape, block, *([] if nested is None else [nested])]
    whole = all(map(is_count, numbers))
    if not shape or not whole or block % 2:
        raise damaged(where, f"{key!r} says shape {shown(list(shape))} in blocks of {shown(block)}")
    return State(shape, block, nested, offset)


def _decode_4bit(
    state: State,
    packed: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    nested_absmax: Tensor | None = None,
    nested_map: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield map[code] * absmax, float32, rounded once (absmax that is compressed itself: twice more)."""
    codes = packed.contiguous().view(torch.uint8).reshape(-1)
    scale = absmax.float()
    if nested_absmax is not None and nested_map is not None and state.nested_block is not None:
        spread = nested_absmax.float()[torch.arange(len(absmax)) // state.nested_block]
        scale = nested_map.float()[absmax.int()] * spread + state.offset
    table = pairs(quant_map.float(), high_first=True)
    count = math.prod(state.shape)
    step = max(1, PIECE // state.block) * state.block
    for start in range(0, count, step):
        stop = min(start + step, count)
        values = table.index_select(0, codes[start // 2 : -(-stop // 2)].int()).reshape(-1)[: stop - start]
        yield values * scale[torch.arange(start, stop) // state.block]
