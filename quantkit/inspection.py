"""inspect: what a checkpoint holds, tensor by tensor, held against what its config makes a loader expect."""

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit import formats
from quantkit.checkpoint import (
    Hub,
    Source,
    build_skeleton,
    linears,
    read_config,
    resolve,
    tied_parameters,
)
from quantkit.hf import quantized_layers, replace_linears
from quantkit.modules import QuantizedLinear
from quantkit.naming import Origin, conversion_problems, names_of
from quantkit.planning import FLOAT_DTYPES
from quantkit.shards import ShardReader


@dataclass(frozen=True)
class SchemeCount:
    """How many linear layers and weights have a scheme, and what a weight takes."""

    scheme: str
    layers: int
    weights: int
    bits_per_weight: float


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        format: its quant_method, or `float`.
        dtypes: bytes by dtype of the stored tensors.
        schemes: every scheme with its counts; float linear layers are counted as `float`.
        tensors: name, dtype and shape of every tensor.
        problems: what a loader would stumble over, one sentence each.
    """

    checkpoint: str
    format: str
    nbytes: int
    dtypes: dict[str, int]
    schemes: list[SchemeCount]
    tensors: dict[str, tuple[str, list[int]]]
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def to_text(self) -> str:
        """One screen: numbers that repeat in tensors' names are collapsed, as in `layers.{0..5}.mlp.weight`."""
        lines = [f"{self.checkpoint}: {self.format}, {len(self.tensors)} tensors, {self.nbytes:,} bytes"]
        lines += [f"  {count.scheme:<40} {_counted(count)}" for count in self.schemes]
        lines += [f"  {dtype:<40} {size:,} bytes" for dtype, size in self.dtypes.items()]
        lines += [f"  {line}" for line in _listed(self.tensors)]
        lines += [f"  problem: {problem}" for problem in self.problems]
        return "\n".join([*lines, "  no problem found" if not self.problems else f"  {len(self.problems)} problems"])


def _counted(count: SchemeCount) -> str:
    return f"{count.layers} linear layers, {count.weights:,} weights, {count.bits_per_weight:.2f} bits per weight"


def _listed(tensors: dict[str, tuple[str, list[int]]]) -> list[str]:
    """A line for all tensors whose names differ in numbers only: their names, dtype and shape."""
    alike: defaultdict[tuple[str, str], set[tuple[int, ...]]] = defaultdict(set)
    for name, (dtype, shape) in tensors.items():
        parts = name.split(".")
        numbers = tuple(int(part) for part in parts if _is_number(part))
        pattern = ".".join("{}" if _is_number(part) else part.replace("{", "{{").replace("}", "}}") for part in parts)
        alike[pattern, f"{dtype} {shape}"].add(numbers)
    lines = [
        (pattern.format(*map(_ranges, block)), kind)
        for (pattern, kind), numbers in alike.items()
        for block in _blocks(numbers)
    ]
    width = max((len(name) for name, _ in lines), default=0)
    return [f"{name:<{width}} {kind}" for name, kind in sorted(lines)]


def _is_number(part: str) -> bool:
    """Whether a part of a name is a number as Python writes it, so that it can be written back."""
    return re.fullmatch("0|[1-9][0-9]{0,17}", part) is not None


def _blocks(indices: Iterable[tuple[int, ...]]) -> list[tuple[list[int], ...]]:
    """Lists of numbers, one list a position, whose products together are just these indices."""
    by_first: defaultdict[int, set[tuple[int, ...]]] = defaultdict(set)
    for first, *rest in filter(None, indices):
        by_first[first].add(tuple(rest))
    firsts_of: defaultdict[frozenset[tuple[int, ...]], list[int]] = defaultdict(list)
    for first in sorted(by_first):
        firsts_of[frozenset(by_first[first])].append(first)
    return [(firsts, *block) for rests, firsts in firsts_of.items() for block in _blocks(rests)] or [()]


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as `7`, `{0..5}` or `{0..5,7}`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


def inspect_checkpoint(checkpoint: str | Path, hub: Hub | None = None) -> Inspection:
    """What a folder or hub id holds, read from headers; of the tensors only scales are read.

    Raises:
        CheckpointError: it can't be opened at all, or is in a format that quantkit doesn't read.
    """
    hub = hub or Hub()
    folder = resolve(checkpoint, hub)
    config = read_config(folder)
    weights = ShardReader(folder)
    skeleton = build_skeleton(folder, hub)
    stored, name = config.get("quantization_config"), "float"
    if stored is not None:
        layout = formats.of_config(stored, str(checkpoint))
        replace_linears(skeleton, layout, layout.parse(stored), "auto")
        name = layout.NAME
    source = Source(str(checkpoint), folder, config, skeleton, weights)
    dtypes: Counter[str] = Counter()
    for info in weights.tensors.values():
        dtypes[str(info.dtype).removeprefix("torch.")] += info.nbytes
    tensors = {key: (str(t.dtype).removeprefix("torch."), list(t.shape)) for key, t in weights.tensors.items()}
    origins = names_of(source)
    schemes = _schemes(source, origins)
    return Inspection(str(checkpoint), name, weights.nbytes, dict(dtypes), schemes, tensors, _problems(source, origins))


def _schemes(source: Source, origins: dict[str, Origin]) -> list[SchemeCount]:
    """Every scheme with its counts: layers as a loader would make them, bytes as they are stored."""
    tied = tied_parameters(source.skeleton)
    taken: Counter[str] = Counter()
    for key, origin in origins.items():
        if origin.parameter is not None:
            taken[origin.parameter] += source.weights.tensors[key].nbytes
    by_first_name = {tied.get(name, name): size for name, size in taken.items()}
    layers: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    bits: Counter[str] = Counter()
    for name, module in source.skeleton.named_modules():
        if isinstance(module, QuantizedLinear):
            label, leaves = module.scheme.label, list(module.stored)
        elif isinstance(module, nn.Linear):
            label, leaves = "float", ["weight"]
        else:
            continue
        names = [f"{name}.{leaf}" for leaf in leaves]
        layers[label] += 1
        weights[label] += module.in_features * module.out_features
        bits[label] += 8 * sum(by_first_name.get(tied.get(full, full), 0) for full in names)
    return [SchemeCount(label, layers[label], weights[label], bits[label] / weights[label]) for label in layers]


def _like(skeleton: nn.Module, model: nn.Module) -> None:
    """Put quantized layers into a fresh model where the skeleton has them."""
    for name, layer in quantized_layers(skeleton):
        model.set_submodule(name, copy.deepcopy(layer))


def _problems(source: Source, origins: dict[str, Origin]) -> list[str]:
    """What a loader would stumble over."""
    found, made = [], {origin.parameter for origin in origins.values()}
    tied = tied_parameters(source.skeleton)
    expected = source.skeleton.state_dict()
    made |= {tied.get(name, name) for name in made if name}
    converted = any(origin.converted for origin in origins.values())
    quantized = {f"{name}.{leaf}": layer for name, layer in quantized_layers(source.skeleton) for leaf in layer.stored}
    plain = {f"{name}.weight" for name, _ in linears(source.skeleton)}
    folders = {key.rpartition(".")[0] for key, origin in origins.items() if origin.parameter in {*quantized, *plain}}
    if converted:
        found += conversion_problems(source, lambda model: _like(source.skeleton, model))
    else:
        absent = [name for name in expected if name not in made and tied.get(name) not in made]
        found += [f"no tensor makes {name!r}" for name in absent]
    for key, origin in origins.items():
        info = source.weights.tensors[key]
        want = expected.get(origin.parameter or "")
        if origin.parameter is None and key.rpartition(".")[0] in folders and not key.endswith(".bias"):
            found.append(f"tensor {key!r} is not part of its layer's scheme")
        if want is None or origin.converted:
            continue
        if tuple(want.shape) != info.shape:
            found.append(f"tensor {key!r} is {list(info.shape)} where {list(want.shape)} is expected")
        elif origin.parameter in quantized and not _is_dtype(info.dtype, want.dtype, key):
            found.append(f"tensor {key!r} is {info.dtype} where {want.dtype} is expected")
        elif origin.parameter in plain and info.dtype not in (*FLOAT_DTYPES, torch.float64):
            found.append(f"tensor {key!r} is {info.dtype} where the config says that the layer is in float")
        elif origin.parameter in quantized:
            found += _wrong_values(key, source.weights.get, quantized[origin.parameter])
    return found


def _wrong_values(key: str, get: Callable[[str], torch.Tensor], layer: QuantizedLinear) -> list[str]:
    """What is wrong with the values of a scale or a stored shape."""
    if key.endswith("scale") and not _positive(get(key)):
        return [f"a scale in {key!r} is not a positive finite number"]
    shape = [layer.out_features, layer.in_features]
    if key.endswith("weight_shape") and get(key).tolist() != shape:
        return [f"{key!r} says {get(key).tolist()} where the layer is {shape}"]
    return []


def _is_dtype(found: torch.dtype, expected: torch.dtype, key: str) -> bool:
    """Whether a tensor has its dtype; a scale may have any float dtype that the ops take."""
    return found in FLOAT_DTYPES if key.endswith("scale") else found == expected


def _positive(scale: torch.Tensor) -> bool:
    values = scale.float()
    return bool(((values > 0) & torch.isfinite(values)).all())
