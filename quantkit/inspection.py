"""inspect: what a checkpoint holds, tensor by tensor, held against what its config makes a loader expect."""

import copy
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit import formats
from quantkit.checkpoint import (
    Hub,
    Source,
    Tensors,
    build_skeleton,
    read_config,
    resolve,
    tied_parameters,
)
from quantkit.errors import CheckpointError
from quantkit.experts import put_experts, quantized_experts
from quantkit.formats.places import PLACES, misplaced
from quantkit.hf import (
    Conversions,
    has_any_float,
    put_layers,
    quantized_layers,
    replace_linears,
)
from quantkit.linears import linear_modules
from quantkit.naming import Origin, conversion_problems, names_of
from quantkit.planning import FLOAT_DTYPES
from quantkit.scheme import Scheme
from quantkit.shards import ShardReader, TensorInfo


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
    skeleton = build_skeleton(folder, hub, weights)
    stored, name, conversions, unfit = config.get("quantization_config"), "float", Conversions(()), list[str]()
    if stored is not None:
        layout = formats.of_config(stored, str(checkpoint))
        parsed, name = layout.parse(stored), layout.NAME
        try:
            parsed.activations.check(skeleton)
            conversions = put_layers(skeleton, layout, parsed, weights.tensors, "auto")
        except CheckpointError as error:  # what can be told of the tensors as they are is told all the same
            unfit = [str(error)]
            replace_linears(skeleton, layout, parsed, "auto")
    source = Source(str(checkpoint), folder, config, skeleton, weights)
    dtypes: Counter[str] = Counter()
    for info in weights.tensors.values():
        dtypes[str(info.dtype).removeprefix("torch.")] += info.nbytes
    tensors = {key: (str(t.dtype).removeprefix("torch."), list(t.shape)) for key, t in weights.tensors.items()}
    origins = {key: origin for key, origin in names_of(source).items() if key not in conversions.anchors}
    schemes = _schemes(source, origins, conversions)
    problems = unfit or [*_problems(source, origins, conversions), *_merged_problems(weights, conversions)]
    return Inspection(str(checkpoint), name, weights.nbytes, dict(dtypes), schemes, tensors, problems)


def _schemes(source: Source, origins: dict[str, Origin], conversions: Conversions) -> list[SchemeCount]:
    """Every scheme with its counts; layers that make a weight together are counted as they lie on disk."""
    tied, stored = tied_parameters(source.skeleton), source.weights.tensors
    taken: Counter[str] = Counter()
    for key, origin in origins.items():
        if origin.parameter is not None:
            taken[origin.parameter] += stored[key].nbytes
    by_first_name = {tied.get(name, name): size for name, size in taken.items()}
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def count(label: str, layers: int, weights: int, nbytes: int) -> None:
        counts[label].update(layers=layers, weights=weights, bits=8 * nbytes)

    for name, layer in quantized_layers(source.skeleton):
        names = [f"{name}.{leaf}" for leaf in layer.stored]
        if conversions.buffers.keys().isdisjoint(names):
            count(layer.scheme.label, 1, layer.in_features * layer.out_features, sum(map(taken.__getitem__, names)))
    for name, _, in_features, out_features, _ in linear_modules(source.skeleton):
        weight = f"{name}.weight"
        count("float", 1, in_features * out_features, by_first_name.get(tied.get(weight, weight), 0))
    for merged in conversions.merged.values():
        numbers = sum(math.prod(shape) for shape in merged.targets.values())
        nbytes = sum(stored[name].nbytes for name in merged.names())
        count(merged.scheme.label, len(merged.pieces), numbers, nbytes)
    return [SchemeCount(label, n["layers"], n["weights"], n["bits"] / n["weights"]) for label, n in counts.items()]


def _like(skeleton: nn.Module, model: nn.Module) -> None:
    """Put quantized layers and experts into a fresh model where the skeleton has them."""
    for name, layer in quantized_layers(skeleton):
        model.set_submodule(name, copy.deepcopy(layer))
    for name, experts in quantized_experts(skeleton):
        put_experts(model, name, copy.deepcopy(experts))


@dataclass(frozen=True)
class _Others:
    """The tensors of a checkpoint of these names alone."""

    weights: Tensors
    tensors: dict[str, TensorInfo]
    nbytes: int = 0

    def get(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self.weights.get(name)


def _absent(source: Source, origins: dict[str, Origin], conversions: Conversions) -> list[str]:
    """What no tensor makes, or transformers could not convert, but for what quantized tensors make together."""
    if any(origin.converted for origin in origins.values()):
        others = _Others(source.weights, {key: source.weights.tensors[key] for key in origins})
        found = conversion_problems(replace(source, weights=others), lambda model: _like(source.skeleton, model))
        elsewhere = {f"no tensor makes {name!r}" for name in conversions.buffers}
        return [problem for problem in found if problem not in elsewhere]
    tied = tied_parameters(source.skeleton)
    made = {origin.parameter for origin in origins.values()} | conversions.buffers.keys()
    made |= {tied.get(name, name) for name in made if name}
    names = [name for name in source.skeleton.state_dict() if name not in made and tied.get(name) not in made]
    return [f"no tensor makes {name!r}" for name in names]


def _problems(source: Source, origins: dict[str, Origin], conversions: Conversions) -> list[str]:
    """What a loader would stumble over among the tensors that each make one parameter or buffer."""
    found, expected = _absent(source, origins, conversions), source.skeleton.state_dict()
    layers = dict(quantized_layers(source.skeleton))
    quantized = {f"{name}.{leaf}" for name, layer in layers.items() for leaf in layer.stored}
    plain = {f"{name}.weight" for name, *_ in linear_modules(source.skeleton)}
    folders = {key.rpartition(".")[0] for key, origin in origins.items() if origin.parameter in {*quantized, *plain}}
    for key, origin in origins.items():
        info, name = source.weights.tensors[key], origin.parameter or ""
        want = expected.get(name)
        if origin.parameter is None and key.rpartition(".")[0] in folders and not key.endswith(".bias"):
            found.append(f"tensor {key!r} is not part of its layer's scheme")
        if want is None or origin.converted:
            continue
        if tuple(want.shape) != info.shape:
            found.append(f"tensor {key!r} is {list(info.shape)} where {list(want.shape)} is expected")
        elif name in quantized and not _is_dtype(info.dtype, want.dtype, key, layers[name.rpartition(".")[0]].scheme):
            found.append(f"tensor {key!r} is {info.dtype} where {want.dtype} is expected")
        elif name in quantized:
            layer = layers[name.rpartition(".")[0]]
            found += _wrong_values(key, source.weights, [layer.out_features, layer.in_features], layer.scheme)
        elif want.is_floating_point() and info.dtype not in (*FLOAT_DTYPES, torch.float64):
            found.append(f"tensor {key!r} is {info.dtype} where the config says that the layer is in float")
    return found


def _merged_problems(weights: Tensors, conversions: Conversions) -> list[str]:
    """What is wrong with values of tensors that make weights together; shapes and dtypes have been found right."""
    found = []
    for merged in conversions.merged.values():
        for piece, stored in zip(merged.pieces, merged.stored, strict=True):
            words = "weight_packed" if "weight_packed" in stored.leaves else "weight"
            shape = [weights.tensors[piece.prefix + words].shape[0], stored.columns]
            for leaf in stored.leaves:
                found += _wrong_values(piece.prefix + leaf, weights, shape, stored.scheme)
    return found


def _wrong_values(key: str, weights: Tensors, shape: list[int], scheme: Scheme) -> list[str]:
    """What is wrong with the values of a scale, or with what is stored about a layer [N, K] beside its numbers."""
    leaf = key.rpartition(".")[2]
    if leaf.endswith("scale") and not _positive(weights.get(key)):
        return [f"a scale in {key!r} is not a positive finite number"]
    if leaf == "SCB" and not _positive(weights.get(key), weights.get(f"{key.removesuffix(leaf)}weight")):
        return [f"a scale in {key!r} is not a positive finite number"]
    if leaf == "weight_shape" and weights.get(key).tolist() != shape:
        return [f"{key!r} says {weights.get(key).tolist()} where the layer is {shape}"]
    if leaf == "outlier_columns" and not _ascending(weights.get(key), shape[1]):
        return [f"{key!r} does not hold numbers of columns from 0 to {shape[1] - 1} in ascending order"]
    if leaf == "outlier_weight" and not bool(torch.isfinite(weights.get(key)).all()):
        return [f"{key!r} holds a number that is not finite"]
    if leaf in PLACES and (wrong := misplaced(leaf, weights.get(key), scheme, shape[1])) is not None:
        return [f"{key!r} {wrong}"]
    if leaf == "shape" and weights.get(key).flatten().tolist() != shape:
        return [f"{key!r} says {weights.get(key).flatten().tolist()} where the layer is {shape}"]
    if leaf == "weight_format" and int(weights.get(key)):
        return [f"{key!r} is {int(weights.get(key))} where 0, which means rows, is expected"]
    return []


def _ascending(columns: torch.Tensor, count: int) -> bool:
    """Whether these are numbers of columns below `count`, each once and in order."""
    bounded = torch.cat([columns.new_tensor([-1]), columns, columns.new_tensor([count])])
    return bool((bounded.diff() > 0).all())


def _is_dtype(found: torch.dtype, expected: torch.dtype, key: str, scheme: Scheme) -> bool:
    """Whether a tensor has its dtype; a scale, and what is in float, may have any float dtype that the ops take."""
    return found in FLOAT_DTYPES if has_any_float(key.rpartition(".")[2], scheme) else found == expected


def _positive(scale: torch.Tensor, codes: torch.Tensor | None = None) -> bool:
    """Whether scales are positive and finite; with codes, 0 will do for a row of zeros."""
    values = scale.float()
    right = values > 0 if codes is None else (values > 0) | ((values == 0) & (codes == 0).all(1))
    return bool((right & torch.isfinite(values)).all())
