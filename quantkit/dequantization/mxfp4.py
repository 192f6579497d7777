"""The `mxfp4` kind: gpt-oss, whose experts are E2M1 with a power of two for each 32 neighbours along the in features.

`X_blocks` uint8 [E, N, K/32, 16] (two values in a byte, the low nibble first) and `X_scales` uint8 [E, N, K/32] become
`X` [E, K, N], the layout of the float checkpoint. Layout: transformers 5.23 (`integrations/mxfp4`); numbers: OCP MX
1.0.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.dequantization.base import Part, Plan, Source, damaged, need, need_shape
from quantkit.dequantization.numbers import e2m1, e8m0

DESCRIPTION = "MXFP4, as of gpt-oss"
BYTES = 16


def plan(source: Source) -> Plan:
    """The plan of a checkpoint of this kind.

    Raises:
        CheckpointError: blocks without scales or scales without blocks, or shapes and dtypes that don't fit.
    """
    weights, where = source.weights, source.where
    made = Plan()
    for key, info in weights.tensors.items():
        name = key.removesuffix("_blocks")
        if name == key:
            continue
        if info.dtype != torch.uint8 or len(info.shape) != 4 or info.shape[-1] != BYTES or 0 in info.shape:
            raise damaged(
                where, f"{key!r} is {info.dtype} {list(info.shape)} where uint8 [E, N, K/32, {BYTES}] is expected"
            )
        experts, rows, groups, _ = info.shape
        scales = f"{name}_scales"
        need_shape(need(weights, scales, key, where), (experts, rows, groups), scales, where)
        if weights.tensors[scales].dtype != torch.uint8:
            raise damaged(where, f"{scales!r} is {weights.tensors[scales].dtype} where uint8 is expected")
        made.add(name, Part((experts, groups * 2 * BYTES, rows), (key, scales), _decode))
    for key in weights.tensors:
        if key.endswith("_scales") and key not in made.dropped:
            raise damaged(where, f"{key!r} is stored without its {key.removesuffix('_scales') + '_blocks'!r}")
    return made


def _decode(blocks: Tensor, scales: Tensor) -> Iterator[Tensor]:
    """Yield value * 2**(scale - 127), [K, N] of one expert at a time; exact in float32."""
    for expert, exponents in zip(blocks, scales, strict=True):
        values = e2m1(expert).mul_(e8m0(exponents).unsqueeze(-1))
        yield values.flatten(-2).t()
