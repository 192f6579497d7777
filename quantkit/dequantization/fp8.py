"""The `fp8` kind: DeepSeek's weights in FP8 with a scale for each 128 x 128, as transformers reads and writes it.

| stored | shape | becomes |
| --- | --- | --- |
| `X.weight` | E4M3 or E5M2 [N, K] | `X.weight`: code * scale |
| `X.weight_scale_inv` (`weight_scale`, `scale`, `qscale_weight`) | [ceil(N/128), ceil(K/128)], or one | dropped |
| `X.gate_up_proj` and other fused experts | [E, N, K] | `X.gate_up_proj` |
| `X.gate_up_proj_scale_inv` | [E, ceil(N/128), ceil(K/128)], or one a matrix | dropped |
| `X.weight`, two E2M1 in a byte (DeepSeek V4's experts) | int8 [N, K/2] | `X.weight` [N, K] |
| its scale, for 32 neighbours | E8M0 [N, K/32] | dropped |
| `activation_scale` and its like | | dropped |

Every scale multiplies, whatever its name. Scales are floats, or powers of two in a byte (`scale_fmt` ue8m0). Block
sizes are config.json's `weight_block_size`; null is a scale a matrix. Layout: transformers 5.23
(`integrations/finegrained_fp8`), DeepSeek-V3 (arXiv:2412.19437, section 3.3.2).
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from quantkit.dequantization.base import Part, Plan, Source, damaged, is_count, need_matrix, unknown
from quantkit.dequantization.grids import Block, Blocks, check_grid, scaled
from quantkit.dequantization.numbers import FP8_DTYPES, PACKED_DTYPES, e2m1, read_floats, scale_values
from quantkit.untrusted import shown

DESCRIPTION = "FP8 in blocks or per tensor, as of DeepSeek"
MX_BLOCK = (1, 32)


def plan(source: Source) -> Plan:
    """The plan of a checkpoint of this kind.

    Raises:
        CheckpointError: a weight without a scale or a scale without a weight, shapes that don't fit, or a block size
            that is none.
    """
    weights, where = source.weights, source.where
    block = _block_size(source.stored, where)
    made = Plan()
    for key, info in weights.tensors.items():
        scale = next((name for name in scale_names(key) if name in weights.tensors), None)
        is_code = info.dtype in FP8_DTYPES
        if scale is None and is_code:
            raise damaged(where, f"{key!r} is {info.dtype} and stored without its {scale_names(key)[0]!r}")
        if scale is None:
            continue
        if not is_code and info.dtype not in PACKED_DTYPES:
            raise damaged(where, f"{key!r} is {info.dtype} and stored beside {scale!r}, which scales FP8")
        *lead, width = need_matrix(info, key, where)
        shape = (*lead, width if is_code else 2 * width)
        chosen = _block_of(weights.tensors[scale].shape, shape, block) if is_code else MX_BLOCK
        check_grid(weights.tensors[scale].shape, shape, chosen, scale, where)
        made.add(key, Part(shape, (key, scale), partial(_decode, shape, chosen)))
        made.dropped.update(name for name in _activation_names(key) if name in weights.tensors)
    for key in weights.tensors:
        if key.endswith("_scale_inv") and key not in made.dropped:
            raise damaged(where, f"{key!r} is stored without the weight that it scales")
    return made


def scale_names(key: str) -> list[str]:
    """The names under which the scale of a weight may be stored, the usual one first."""
    names = [f"{key}_scale_inv", f"{key}_scale"]
    if key.endswith(".weight"):
        stem = key.removesuffix("weight")
        names += [f"{stem}scale", f"{stem}qscale_weight"]
    return names


def _activation_names(key: str) -> list[str]:
    """The names under which a scale of a layer's activations may be stored."""
    if not key.endswith(".weight"):
        return [f"{key}_activation_scale"]
    stem = key.removesuffix("weight")
    return [stem + name for name in ("activation_scale", "input_scale", "qscale_act")]


def _block_size(stored: Mapping[str, Any], where: str) -> Block | None:
    """Rows and columns of a block, or None for a scale a matrix."""
    value = stored.get("weight_block_size", [128, 128])
    if value is None:
        return None
    sizes = list(value) if isinstance(value, (list, tuple)) else []
    if len(sizes) != 2 or not all(map(is_count, sizes)):
        raise unknown(where, f"weight_block_size is {shown(value)}, not two positive whole numbers or null")
    return sizes[0], sizes[1]


def _block_of(stored: tuple[int, ...], shape: tuple[int, ...], block: Block | None) -> Block:
    """The block of a weight: the config's, a matrix for lone scales, or a half of fused gate and up.

    transformers keeps two rows of scales for the fused gate and up projections of experts, also where one block would
    hold them both (`_alloc_expert_proj`).
    """
    rows, columns = shape[-2:]
    chosen = (rows, columns) if block is None or len(stored) < 2 else block
    halves = len(shape) > 2 and len(stored) == len(shape) and stored[-2] == 2 and rows <= chosen[0] and rows % 2 == 0
    return (rows // 2, chosen[1]) if halves else chosen


def _decode(shape: tuple[int, ...], block: Block, codes: Tensor, scale: Tensor) -> Iterator[Tensor]:
    """Yield code * scale, float32: exact for scales of 16 bits or powers of two, else rounded once."""
    read = read_floats if codes.dtype in FP8_DTYPES else e2m1
    yield from scaled(codes, read, shape, Blocks(scale_values(scale), shape, block))
