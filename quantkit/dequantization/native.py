"""The `quantkit` kind: quantkit's own format, whose codes lie in words (see `quantkit.formats.native`).

A row of words holds K rounded up to a multiple of 4, or of 8 with 4 bits: where that doesn't divide it, only a group
size or the model says K.
Experts that one parameter `O.P` holds together are stored a layer an expert, as `O.0.P`, and become `O.P` again; those
in x out are stored so, [K, N], with a scale [1, N]. Columns that LLM.int8 keeps in float lie beside the codes. Of 2:4
sparse weights only the kept ones are stored, and a row holds K / 2 so; these are out x in always, and only the scale
says [1, N] of a weight in x out.
"""

import re
from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch
from quantkit_kernels.formats import FLOAT_DTYPES, packed_words, unpack_int32
from torch import Tensor

from quantkit.dequantization.base import Part, Plan, Source, damaged, need, need_matrix, need_shape, runs, unknown
from quantkit.dequantization.grids import Block, Blocks, check_grid, scaled
from quantkit.dequantization.numbers import read_floats, scale_values
from quantkit.formats import native
from quantkit.formats.base import Layout
from quantkit.formats.places import PLACES, misplaced
from quantkit.scheme import BLOCK, Scheme

DESCRIPTION = "quantkit's own format"


def plan(source: Source) -> Plan:
    """The plan of a checkpoint of this kind.

    Raises:
        CheckpointError: another version of the format, codes without a scale, or shapes that don't fit.
    """
    layout = native.parse(source.stored)
    modules = {target for group in layout.groups for target in group.targets}
    made, experts = Plan(), dict[str, list[str]]()
    for key, info in source.weights.tensors.items():
        module = key.removesuffix(".weight")
        is_packed = info.dtype == torch.int32 or f"{module}.weight_indices" in source.weights.tensors
        if module == key or not is_packed:
            continue
        together = _together(source, module, modules)
        if together is not None:
            experts.setdefault(together, []).append(module)
        else:
            made.add(key, _part(source, key, [module], _scheme_of(layout, module, source.where)))
        made.dropped.add(f"{module}.input_scale")
    for name, members in experts.items():
        members.sort(key=lambda member: int(member.split(".")[-2]))
        if [int(member.split(".")[-2]) for member in members] != list(range(len(members))):
            raise damaged(source.where, f"experts of {name!r} are missing")
        made.add(name, _part(source, name, members, _scheme_of(layout, name, source.where)))
    return made


def _together(source: Source, module: str, modules: Collection[str]) -> str | None:
    """The float tensor that holds all experts of which a module is one, or None.

    Its name is the module's without the expert's number. The model tells that it has three axes, or else the config
    names it as what is quantized.
    """
    stem = re.sub(r"\.[0-9]{1,9}(\.[^.]+)$", r"\1", module)
    if stem == module or module in modules or f"{module}.weight" in source.shapes:
        return None
    names = (stem, f"{stem}.weight")
    found = next((name for name in names if len(source.shapes.get(name, ())) == 3), None)
    return found or next((name for name in names if name in modules), None)


def _part(source: Source, name: str, members: list[str], scheme: Scheme) -> Part:
    """The part of one layer, or of experts that make one parameter."""
    tensors, where = source.weights.tensors, source.where
    first = f"{members[0]}.weight"
    *lead, rows, words = need_matrix(tensors[first], first, where)
    if lead:
        raise damaged(where, f"{first!r} has the shape {list(tensors[first].shape)}, no matrix")
    if scheme.sparsity is not None:
        return _sparse_part(source, name, members, scheme, words)
    scale = need(source.weights, f"{members[0]}.weight_scale", first, where).shape
    columns = 32 // scheme.bits * words
    by_column = scheme.weight_granularity == "row" and len(scale) == 2 and scale[0] == 1 and scale != (rows, 1)
    if by_column:
        columns = scale[1]
    elif scheme.group_size is not None:
        columns = scheme.group_size * (scale[-1] if scale else 1)
    elif name in source.shapes:
        columns = source.shapes[name][-2 if name in source.transposed else -1]
    if packed_words(columns, scheme.bits) != words:
        raise damaged(where, f"{first!r} has {words} words a row, too few or many for K = {columns}")
    block = (rows, 1) if by_column else _block(scheme, rows, columns)
    for member in members:
        key = f"{member}.weight_scale"
        check_grid(need(source.weights, key, f"{member}.weight", where).shape, (rows, columns), block, key, where)
        if tensors[f"{member}.weight"].shape != (rows, words):
            raise damaged(where, f"{member!r} and {members[0]!r} have different shapes")
    is_fused = name != first
    keys = [f"{member}.{leaf}" for leaf in ("weight", "weight_scale") for member in members]
    shape = (len(members), rows, columns) if is_fused else (rows, columns)
    decoder = partial(_decode, scheme, (rows, columns), block)
    if scheme.outlier_columns is not None:
        kept = [f"{members[0]}.outlier_columns", f"{members[0]}.outlier_weight"]
        for key, expected in zip(kept, ((scheme.outlier_columns,), (rows, scheme.outlier_columns)), strict=True):
            need_shape(need(source.weights, key, first, where), expected, key, where)
        if tensors[kept[0]].dtype != torch.int32:
            raise damaged(where, f"{kept[0]!r} is {tensors[kept[0]].dtype} where torch.int32 is expected")
        return Part(shape, (*keys, *kept), partial(_with_columns, decoder, columns, kept[0], where))
    return Part(shape, tuple(keys), decoder)


def _sparse_part(source: Source, name: str, members: list[str], scheme: Scheme, words: int) -> Part:
    """The part of one layer of 2:4 sparse weights, or of experts that make one parameter."""
    tensors, where, first = source.weights.tensors, source.where, f"{members[0]}.weight"
    rows, per_word = tensors[first].shape[0], 1 if scheme.is_float else 32 // scheme.bits
    columns = 2 * per_word * words
    if scheme.tiles is not None:
        key = f"{members[0]}.weight_columns"
        shared = need_matrix(need(source.weights, key, first, where), key, where)[-1]
        columns = shared // 4 * scheme.tiles[1]
    if scheme.group_size is not None:
        scale = need(source.weights, f"{members[0]}.weight_scale", first, where).shape
        columns = scheme.group_size * (scale[-1] if scale else 1)
    turned = not scheme.is_float and _is_turned(source, members[0], rows)
    if scheme.group_size is None and name in source.shapes:
        columns = source.shapes[name][-2 if turned or name in source.transposed else -1]
    stored = native.tensor_specs(scheme, rows, columns, torch.bfloat16)
    block = _block(scheme, rows, columns)
    scales = ((columns, rows), (columns, 1)) if turned else ((rows, columns), block)
    places = [leaf for leaf in PLACES if leaf in stored]
    for member in members:
        for leaf in ("weight", *places):
            info = need(source.weights, f"{member}.{leaf}", f"{member}.weight", where)
            need_shape(info, stored[leaf].shape, f"{member}.{leaf}", where)
        info, spec = tensors[f"{member}.weight"], stored["weight"]
        if info.dtype not in (FLOAT_DTYPES if scheme.is_float else (spec.dtype,)):
            raise damaged(where, f"'{member}.weight' is {info.dtype}, which doesn't fit the scheme {scheme.label!r}")
        if not scheme.is_float:
            key = f"{member}.weight_scale"
            check_grid(need(source.weights, key, f"{member}.weight", where).shape, *scales, key, where)
    leaves = ("weight", *places, *(() if scheme.is_float else ("weight_scale",)))
    keys = tuple(f"{member}.{leaf}" for leaf in leaves for member in members)
    matrix = (columns, rows) if turned else (rows, columns)
    shape = (len(members), *matrix) if name != first else matrix
    decoder = partial(_decode_sparse, scheme, (rows, columns), block, leaves, where)
    return Part(shape, keys, partial(_turned, decoder, len(members)) if turned else decoder)


def _is_turned(source: Source, member: str, rows: int) -> bool:
    """Whether packed codes [N, K / 2] are those of a weight in x out, whose scale is stored so, [1, N]."""
    scale = need(source.weights, f"{member}.weight_scale", f"{member}.weight", source.where).shape
    return rows > 1 and tuple(scale) == (1, rows)


def _turned(decoder: Callable[..., Iterator[Tensor]], count: int, *tensors: Tensor) -> Iterator[Tensor]:
    """Yield the weights [K, N] of what the decoder makes of codes [N, K], one of `count` layers after the other."""
    leaves = len(tensors) // count
    for member in range(count):
        of = [tensors[place * count + member] for place in range(leaves)]
        yield torch.cat(list(decoder(*of))).t()


def _decode_sparse(
    scheme: Scheme, shape: tuple[int, int], block: Block, leaves: tuple[str, ...], where: str, *tensors: Tensor
) -> Iterator[Tensor]:
    """Yield what `_decode` does, of 2:4 sparse layers; weights in float as they are."""
    count = len(tensors) // len(leaves)
    for member in range(count):
        of = {leaf: tensors[place * count + member] for place, leaf in enumerate(leaves)}
        for leaf, dtype in (("weight_indices", torch.int32), ("weight_columns", torch.uint8)):
            said = leaf not in of or of[leaf].dtype == dtype
            wrong = misplaced(leaf, of[leaf], scheme, shape[1]) if said and leaf in of else None
            if not said or wrong is not None:
                raise damaged(where, f"a {leaf!r} {wrong or f'is {of[leaf].dtype}'}")
        codes, scale = native.decompress(scheme, of, shape[1])
        if scheme.is_float:
            yield from (codes[start:stop].float() for start, stop in runs(*shape))
        else:
            yield from scaled(codes, read_floats, shape, Blocks(scale_values(scale), shape, block))


def _scheme_of(layout: Layout, module: str, where: str) -> Scheme:
    """The scheme of the module; a checkpoint may leave out the model's prefix, which the config has."""
    found = layout.scheme_of(module)
    if found is not None:
        return found
    ends = {
        group.scheme
        for group in layout.groups
        for target in group.targets
        if target.endswith(f".{module}") or module.endswith(f".{target}")
    }
    schemes = ends or {group.scheme for group in layout.groups}
    if len(schemes) != 1:
        raise unknown(where, f"{module!r} is in codes, and no group of quantization_config names it")
    return schemes.pop()


def _block(scheme: Scheme, rows: int, columns: int) -> Block:
    """The rows and columns of a weight that share a scale."""
    if scheme.weight_granularity == "tensor":
        return rows, columns
    if scheme.weight_granularity == "block":
        return BLOCK, BLOCK
    return 1, scheme.group_size or columns


def _decode(scheme: Scheme, shape: tuple[int, int], block: Block, *tensors: Tensor) -> Iterator[Tensor]:
    """Yield code * scale, float32, of one layer after the other: exact for scales of 16 bits, else rounded once."""
    half = len(tensors) // 2
    for words, scale in zip(tensors[:half], tensors[half:], strict=True):
        if native.is_packed(scheme):
            codes = unpack_int32(words, scheme.bits, shape[1])
        else:
            codes = words.contiguous().view(getattr(torch, scheme.code_dtype))[:, : shape[1]]
        yield from scaled(codes, read_floats, shape, Blocks(scale_values(scale), shape, block))


def _with_columns(
    decoder: Callable[..., Iterator[Tensor]],
    in_features: int,
    key: str,
    where: str,
    words: Tensor,
    scale: Tensor,
    columns: Tensor,
    weight: Tensor,
) -> Iterator[Tensor]:
    """Yield what the decoder makes of the codes, with the columns of these numbers as they are stored in float."""
    if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < in_features:
        raise damaged(where, f"{key!r} names a column that the weight of {in_features} columns hasn't")
    start = 0
    for values in decoder(words, scale):
        stop = start + values.shape[0]
        values[:, columns.long()] = read_floats(weight[start:stop])
        start = stop
        yield values
