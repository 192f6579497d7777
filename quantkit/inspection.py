"""inspect: what a checkpoint holds, tensor by tensor, held against what its config makes a loader expect."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit import formats
from quantkit.checkpoint import Hub, Source, build_skeleton, linears, names_of, read_config, resolve, tied_parameters
from quantkit.hf import quantized_layers, replace_linears
from quantkit.modules import QuantizedLinear
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
        """One screen."""
        lines = [f"{self.checkpoint}: {self.format}, {len(self.tensors)} tensors, {self.nbytes:,} bytes"]
        lines += [f"  {count.scheme:<40} {_counted(count)}" for count in self.schemes]
        lines += [f"  {dtype:<40} {size:,} bytes" for dtype, size in self.dtypes.items()]
        lines += [f"  problem: {problem}" for problem in self.problems]
        return "\n".join([*lines, "  no problem found" if not self.problems else f"  {len(self.problems)} problems"])


def _counted(count: SchemeCount) -> str:
    return f"{count.layers} linear layers, {count.weights:,} weights, {count.bits_per_weight:.2f} bits per weight"


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
    schemes = _schemes(source)
    return Inspection(str(checkpoint), name, weights.nbytes, dict(dtypes), schemes, tensors, _problems(source))


def _schemes(source: Source) -> list[SchemeCount]:
    """Every scheme with its counts, from the modules that a loader would make."""
    layers: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    bits: Counter[str] = Counter()
    for module in source.skeleton.modules():
        if isinstance(module, QuantizedLinear):
            label, size = module.scheme.label, module.in_features * module.out_features
            stored = sum(buffer.nbytes for buffer in module.buffers())
        elif isinstance(module, nn.Linear):
            label, size, stored = "float", module.weight.numel(), module.weight.nbytes
        else:
            continue
        layers[label] += 1
        weights[label] += size
        bits[label] += 8 * stored
    return [SchemeCount(label, layers[label], weights[label], bits[label] / weights[label]) for label in layers]


def _problems(source: Source) -> list[str]:
    """What a loader would stumble over."""
    origins = names_of(source)
    found, made = [], {origin.parameter for origin in origins.values()}
    tied = tied_parameters(source.skeleton)
    expected = source.skeleton.state_dict()
    made |= {tied.get(name, name) for name in made if name}
    converted = any(origin.converted for origin in origins.values())
    quantized = {f"{name}.{leaf}": layer for name, layer in quantized_layers(source.skeleton) for leaf in layer.stored}
    plain = {f"{name}.weight" for name, _ in linears(source.skeleton)}
    folders = {key.rpartition(".")[0] for key, origin in origins.items() if origin.parameter in {*quantized, *plain}}
    absent = [name for name in expected if name not in made and tied.get(name) not in made and not converted]
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
