"""What must be stored for a layer of a group: names, shapes and dtypes, as the parameters that a server makes."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch

from quantkit.servers.arguments import Arguments, Group
from quantkit.servers.contents import Layer
from quantkit.shards import TensorInfo

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODES = {"int": torch.int8, "float": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Expected:
    """A tensor that a server looks for: the shapes that it may have (None for a size that isn't known), its dtypes."""

    shapes: tuple[tuple[int | None, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    def reason_against(self, info: TensorInfo) -> str | None:
        """Why this isn't the tensor, or None."""
        if info.dtype not in self.dtypes:
            return f"{_short(info.dtype)} where {' or '.join(map(_short, self.dtypes))} is expected"
        if not any(_agree(info.shape, shape) for shape in self.shapes):
            return f"{list(info.shape)} where {' or '.join(map(_sizes, self.shapes))} is expected"
        return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sizes(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def _agree(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(found) == len(wanted) and all(b is None or a == b for a, b in zip(found, wanted, strict=True))


def expected(group: Group, layer: Layer) -> dict[str, Expected] | None:
    """What must be stored for a layer of this group, or None where quantkit doesn't know."""
    weights = group.weights
    if weights is None:
        return None
    if group.format == "pack-quantized" and weights.type == "int":
        return _packed(weights, layer) | _of_inputs(group.inputs)
    if weights.num_bits != 8 or group.format not in ("int-quantized", "float-quantized", "naive-quantized"):
        return None
    shape = (layer.out_features, layer.in_features)
    wanted = {
        "weight": Expected((shape[::-1] if layer.transposed else shape,), (CODES[weights.type],)),
        "weight_scale": Expected(scale_shapes(weights, layer), FLOATS),
    }
    if not weights.symmetric:
        wanted["weight_zero_point"] = Expected(scale_shapes(weights, layer), (torch.int8,))
    return wanted | _of_inputs(group.inputs)


def scale_shapes(weights: Arguments, layer: Layer) -> tuple[tuple[int | None, ...], ...]:
    """The shapes that a weight's scale may have."""
    rows, columns = layer.out_features, layer.in_features
    if weights.strategy == "tensor":
        return ((1,), (), (1, 1))
    if weights.strategy == "block" and weights.block is not None:
        high, wide = weights.block
        return ((None if rows is None else ceil(rows / high), None if columns is None else ceil(columns / wide)),)
    if weights.strategy == "group" and weights.group_size:
        return ((rows, None if columns is None else ceil(columns / weights.group_size)),)
    return ((rows, 1),)


def _packed(weights: Arguments, layer: Layer) -> dict[str, Expected]:
    """Codes in words of 32 bits along K, the same way round in every model."""
    rows, columns = layer.out_features, layer.in_features
    words = None if columns is None else ceil(columns * weights.num_bits / 32)
    wanted = {
        "weight_packed": Expected(((rows, words),), (torch.int32,)),
        "weight_scale": Expected(scale_shapes(weights, layer), FLOATS),
        "weight_shape": Expected(((2,),), (torch.int64, torch.int32)),
    }
    if not weights.symmetric:
        groups = scale_shapes(weights, layer)[0][1]
        packed_rows = None if rows is None else ceil(rows * weights.num_bits / 32)
        wanted["weight_zero_point"] = Expected(((packed_rows, groups),), (torch.int32,))
    return wanted


def _of_inputs(inputs: Arguments | None) -> dict[str, Expected]:
    """The stored scale of static activations."""
    if inputs is None or inputs.dynamic or inputs.strategy != "tensor":
        return {}
    wanted = {"input_scale": Expected(((1,), (), (1, 1)), FLOATS)}
    if not inputs.symmetric:
        wanted["input_zero_point"] = Expected(((1,), (), (1, 1)), (torch.int8,))
    return wanted


def problems(group: Group, layer: Layer) -> Iterator[tuple[str, str, str]]:
    """Every tensor that isn't as it must be: its name, a sentence, and `missing`, `wrong` or `extra`."""
    wanted = expected(group, layer)
    for leaf, each in (wanted or {}).items():
        key = f"{layer.name}.{leaf}"
        if leaf not in layer.tensors:
            yield key, f"it isn't stored, and the config asks for it ({group.label})", "missing"
            continue
        reason = each.reason_against(layer.tensors[leaf])
        if reason is not None:
            yield key, f"it is {reason} ({group.label})", "wrong"
    if wanted is not None:
        for leaf in sorted(layer.tensors.keys() - wanted.keys() - {"bias"}):
            yield f"{layer.name}.{leaf}", f"the scheme has no such tensor ({group.label})", "extra"
