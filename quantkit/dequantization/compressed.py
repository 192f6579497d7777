"""The `compressed-tensors` kind, by what is stored of a module `X` (shapes for a weight [N, K] with G scales a row).

| formats | stored | value |
| --- | --- | --- |
| int-, float-, naive-, mxfp8-quantized | `X.weight` int8, E4M3 or E5M2 [N, K] | (code - zero) * scale |
| pack-quantized | `X.weight_packed` int32 [N, K*bits/32], `X.weight_shape` int64 [2] | (code - zero) * scale |
| nvfp4-pack-quantized | `X.weight_packed` uint8 [N, K/2], `X.weight_global_scale` [1] | E2M1 * (scale / global) |
| mxfp4-pack-quantized | `X.weight_packed` uint8 [N, K/2] | E2M1 * scale |
| sparse-24-bitmask | `X.compressed` codes or float [N, K/2], `X.bitmask` uint8 [N, K/8] | code * scale, or as it is |

`X.weight_scale` is what the scheme's strategy says: [1] (tensor), [N, 1] (channel), [N, G] (group), or [ceil(N/n),
ceil(K/k)] (block n x k); bytes are powers of two. `X.weight_zero_point` has the scale's shape, or is packed along N as
int32. `X.weight_g_idx` [K] names the group of every column. Scales and zero points of activations are dropped. A weight
that the model has as [K, N] (GPT-2's) is stored so where codes are stored one by one, and [N, K] where they are packed.
Of 2:4 sparse weights the bits, the lowest first, say which two of every four are stored; the others are 0.
`X.weight_shape` is read at once only where the packed width and the scales leave K open. Layout: compressed-tensors
0.20, and its earlier releases for `weight_g_idx`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from quantkit_kernels import sparse24
from quantkit_kernels.formats import FLOAT_DTYPES as FLOATS
from quantkit_kernels.formats import packed_words, unpack_int32
from torch import Tensor

from quantkit.dequantization.base import (
    Part,
    Plan,
    Source,
    Tensors,
    damaged,
    need,
    need_matrix,
    need_shape,
    runs,
    unknown,
)
from quantkit.dequantization.grids import Block, Blocks, check_grid, grid, scaled
from quantkit.dequantization.numbers import FP8_DTYPES, e2m1, read_floats, scale_values
from quantkit.dequantization.schemes import Weights, scheme_finder

DESCRIPTION = "compressed-tensors (int, float, packed, NVFP4 and MXFP4 weights)"
FLOAT = Weights(16, "float", True, "tensor", 0, (1, 1), False)
"""What stands for the scheme of weights that are in float, and have no scale."""
LONGEST_SHAPE = 8
"""Axes of a weight."""
OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
OF_CACHES = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point")
OF_WEIGHTS = ("weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "weight_global_scale")


@dataclass(frozen=True)
class Module:
    """A compressed module: its name, and how its weights are made."""

    name: str
    scheme: Weights
    source: Source

    @property
    def weights(self) -> Tensors:
        """The checkpoint's tensors."""
        return self.source.weights

    @property
    def where(self) -> str:
        """What the user called the checkpoint."""
        return self.source.where

    @property
    def is_turned(self) -> bool:
        """Whether its weight is [K, N] in the model."""
        return self.key("weight") in self.source.transposed

    def key(self, leaf: str) -> str:
        """The name of one of its tensors."""
        return f"{self.name}.{leaf}"

    def has(self, leaf: str) -> bool:
        """Whether that tensor is stored."""
        return self.key(leaf) in self.weights.tensors


def plan(source: Source) -> Plan:
    """The plan of a checkpoint of this kind.

    Raises:
        CheckpointError: a format or scheme that isn't decoded here, codes without scales, or shapes that don't fit.
    """
    weights, stored, where = source.weights, source.stored, source.where
    find = scheme_finder(stored, where)
    made = Plan()
    for key, info in weights.tensors.items():
        name, _, leaf = key.rpartition(".")
        if leaf == "compressed":
            _add_sparse(made, Module(name, find(name) if f"{name}.weight_scale" in weights.tensors else FLOAT, source))
            continue
        is_code = leaf == "weight" and info.dtype in (torch.int8, *FP8_DTYPES)
        if not is_code and leaf != "weight_packed":
            continue
        module = Module(name, find(name), source)
        need(weights, module.key("weight_scale"), key, where)
        if is_code:
            part = _plain(module)
        elif info.dtype == torch.int32:
            part = _packed(module)
        else:
            part = _packed_floats(module)
        made.add(module.key("weight"), part)
        made.dropped.update(module.key(leaf) for leaf in (*OF_WEIGHTS, *OF_ACTIVATIONS))
    caches = OF_CACHES if stored.get("kv_cache_scheme") else ()
    for key in weights.tensors:
        leaf = key.rpartition(".")[2]
        if leaf in caches:
            made.dropped.add(key)
        if leaf == "weight_scale" and key not in made.dropped:
            raise unknown(where, f"{key!r} is stored beside a weight that is not in codes")
    return made


def _add_sparse(made: Plan, module: Module) -> None:
    """Take the part of a 2:4 sparse weight, in codes or in float, into the plan."""
    key, where = module.key("compressed"), module.where
    info = module.weights.tensors[key]
    rows, half = need_matrix(info, key, where)
    shape, has_scale = (rows, 2 * half), module.has("weight_scale")
    fits = info.dtype in (torch.int8, *FP8_DTYPES) if has_scale else info.dtype in FLOATS
    if not fits or shape[1] % 4:
        raise unknown(
            where, f"{key!r} is {info.dtype} {list(info.shape)} {'beside' if has_scale else 'without'} a scale"
        )
    mask = need(module.weights, module.key("bitmask"), key, where)
    need_shape(mask, (rows, -(-shape[1] // 8)), module.key("bitmask"), where)
    names = _scaling(module, shape, packed=False) if has_scale else {}
    keys = (key, module.key("bitmask"), *names.values())
    made.add(module.key("weight"), Part(shape, keys, partial(_decode_sparse, module, shape, list(names))))
    made.dropped.update(module.key(leaf) for leaf in ("shape", *OF_WEIGHTS, *OF_ACTIVATIONS))


def _decode_sparse(
    module: Module, shape: tuple[int, int], leaves: list[str], values: Tensor, mask: Tensor, *others: Tensor
) -> Iterator[Tensor]:
    """Yield what `_decode_ints` does of the codes with their zeros; numbers in float as they are, in float32."""
    try:
        codes = sparse24.unpack(values, sparse24.indices_of_bitmask(mask, shape[1]), shape[1])
    except ValueError as error:
        raise damaged(module.where, f"{module.key('bitmask')!r} doesn't fit it ({error})") from error
    if leaves:
        yield from _decode_ints(module, shape, leaves, codes, *others)
    else:
        yield from (codes[start:stop].float() for start, stop in runs(*shape))


def _block(scheme: Weights, shape: tuple[int, ...]) -> Block:
    """The rows and columns of a weight that share a scale."""
    rows, columns = shape[-2:]
    if scheme.strategy == "block":
        return scheme.block
    return {"tensor": (rows, columns), "channel": (1, columns)}.get(scheme.strategy, (1, scheme.group_size))


def _plain(module: Module) -> Part:
    """The part of codes that are stored one by one."""
    key = module.key("weight")
    shape = need_matrix(module.weights.tensors[key], key, module.where)
    shape = (*shape[:-2], shape[-1], shape[-2]) if module.is_turned else shape
    names = _scaling(module, shape, packed=False)
    return Part(shape, (key, *names.values()), partial(_decode_ints, module, shape, list(names)))


def _packed(module: Module) -> Part:
    """The part of integers that are packed into words of 32 bits."""
    key, scheme = module.key("weight_packed"), module.scheme
    words = need_matrix(module.weights.tensors[key], key, module.where)
    if scheme.kind != "int":
        raise damaged(module.where, f"{key!r} is int32, which config.json calls {scheme.kind}")
    scale = module.weights.tensors[module.key("weight_scale")].shape
    columns = scale[-1] * scheme.group_size if scheme.strategy == "group" and scale else 0
    if packed_words(columns, scheme.bits) != words[-1]:
        columns = _stored_shape(module)[-1]
    if packed_words(columns, scheme.bits) != words[-1]:
        raise damaged(module.where, f"{key!r} has {words[-1]} words a row, too few or many for K = {columns}")
    shape = (*words[:-1], columns)
    names = _scaling(module, shape, packed=True)
    if module.has("weight_shape"):
        _check_stored_shape(module)
        names["weight_shape"] = module.key("weight_shape")
    return Part(shape, (key, *names.values()), partial(_decode_ints, module, shape, list(names)))


def _stored_shape(module: Module) -> list[int]:
    """The float weight's shape as the checkpoint says it."""
    key = module.key("weight_shape")
    need(module.weights, key, module.key("weight_packed"), module.where)
    _check_stored_shape(module)
    sizes: list[int] = module.weights.get(key).flatten().tolist()
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise damaged(module.where, f"{key!r} is {sizes}, no shape")
    return sizes


def _check_stored_shape(module: Module) -> None:
    """Return nothing; raise CheckpointError when what is stored as a shape is more than a few whole numbers."""
    key = module.key("weight_shape")
    info = module.weights.tensors[key]
    if info.dtype not in (torch.int32, torch.int64) or math.prod(info.shape) > LONGEST_SHAPE:
        raise damaged(module.where, f"{key!r} is {info.dtype} {list(info.shape)}, no shape")


def _scaling(module: Module, shape: tuple[int, ...], *, packed: bool) -> dict[str, str]:
    """What turns codes into values, by leaf name, after a look at the shapes."""
    block, where = _block(module.scheme, shape), module.where
    names = {
        leaf: module.key(leaf) for leaf in ("weight_scale", "weight_zero_point", "weight_g_idx") if module.has(leaf)
    }
    tensors = module.weights.tensors
    check_grid(tensors[names["weight_scale"]].shape, shape, block, names["weight_scale"], where)
    if "weight_zero_point" in names:
        zero, key = tensors[names["weight_zero_point"]], names["weight_zero_point"]
        if packed and zero.dtype == torch.int32:
            *lead, rows, groups = grid(shape, block)
            need_shape(zero, (*lead, packed_words(rows, module.scheme.bits), groups), key, where)
        else:
            check_grid(zero.shape, shape, block, key, where)
    elif not module.scheme.symmetric:
        raise damaged(where, f"{names['weight_scale']!r} is asymmetric and stored without its weight_zero_point")
    if "weight_g_idx" in names:
        need_shape(tensors[names["weight_g_idx"]], (shape[-1],), names["weight_g_idx"], where)
        if tensors[names["weight_g_idx"]].dtype not in (torch.int32, torch.int64):
            raise damaged(where, f"{names['weight_g_idx']!r} is no list of whole numbers")
    return names


def _decode_ints(
    module: Module, shape: tuple[int, ...], leaves: list[str], codes: Tensor, *others: Tensor
) -> Iterator[Tensor]:
    """Yield (code - zero) * scale, float32: exact for scales of 16 bits, else rounded once."""
    of, bits = dict(zip(leaves, others, strict=True)), module.scheme.bits
    block = _block(module.scheme, shape)
    if "weight_shape" in of and of["weight_shape"].flatten().tolist() != list(shape):
        said = of["weight_shape"].flatten().tolist()
        raise damaged(module.where, f"{module.key('weight_shape')!r} is {said} where {list(shape)} is expected")
    places = _places(module, of["weight_g_idx"], grid(shape, block)[-1]) if "weight_g_idx" in of else None
    zero = None
    if "weight_zero_point" in of:
        points = of["weight_zero_point"]
        if codes.dtype == torch.int32 and points.dtype == torch.int32:
            rows = grid(shape, block)[-2]
            words = points.mT.clone(memory_format=torch.contiguous_format)  # strides too, of a single word
            points = unpack_int32(words, bits, rows).mT
        zero = Blocks(points.float(), shape, block, places)
    codes = codes.mT if module.is_turned and codes.dtype != torch.int32 else codes
    read = read_floats
    if codes.dtype == torch.int32:
        read = partial(_unpacked, bits, shape[-1])
    yield from scaled(codes, read, shape, Blocks(scale_values(of["weight_scale"]), shape, block, places), zero)


def _unpacked(bits: int, columns: int, words: Tensor) -> Tensor:
    return unpack_int32(words, bits, columns).float()


def _places(module: Module, index: Tensor, groups: int) -> Tensor | None:
    """The group of every column, or None when they lie in order (an index that was never set holds -1)."""
    if bool((index < 0).any()):
        return None
    if int(index.max()) >= groups:
        raise damaged(module.where, f"{module.key('weight_g_idx')!r} names group {int(index.max())} of {groups}")
    return index.long()


def _packed_floats(module: Module) -> Part:
    """The part of E2M1 codes, two in a byte."""
    key, scheme = module.key("weight_packed"), module.scheme
    info = module.weights.tensors[key]
    if info.dtype != torch.uint8 or scheme.kind != "float" or scheme.bits != 4 or scheme.strategy != "group":
        raise unknown(
            module.where,
            f"{key!r} is {info.dtype}, and {scheme.bits} bits {scheme.kind} by {scheme.strategy} are not decoded so",
        )
    *lead, width = need_matrix(info, key, module.where)
    shape = (*lead, 2 * width)
    keys = [key, module.key("weight_scale")]
    check_grid(module.weights.tensors[keys[1]].shape, shape, _block(scheme, shape), keys[1], module.where)
    if module.has("weight_global_scale"):
        keys.append(module.key("weight_global_scale"))
        check_grid(module.weights.tensors[keys[2]].shape, shape, (shape[-2], shape[-1]), keys[2], module.where)
    elif scheme.has_global:
        raise damaged(module.where, f"{key!r} is stored without its {module.key('weight_global_scale')!r}")
    return Part(shape, tuple(keys), partial(_decode_floats, shape, _block(scheme, shape)))


def _decode_floats(
    shape: tuple[int, ...], block: Block, codes: Tensor, scale: Tensor, whole: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield E2M1 * (scale / global scale), float32, rounded twice; without a global scale exact."""
    numbers = scale_values(scale)
    if whole is not None:
        numbers = numbers / whole.float().reshape(*shape[:-2], 1, 1)
    yield from scaled(codes, e2m1, shape, Blocks(numbers, shape, block))
