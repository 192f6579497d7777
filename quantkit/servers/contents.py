"""What a checkpoint holds, as a server meets it: layers by their names on disk, the groups of its config, its sizes."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint import Hub, Source, build_skeleton, compressed_as, output_head, read_config, resolve
from quantkit.errors import CheckpointError
from quantkit.linears import linear_modules
from quantkit.naming import names_of
from quantkit.servers.arguments import Group, Mistake, read_groups
from quantkit.shards import ShardReader, TensorInfo

CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
EXPERT = re.compile(r"(?P<owner>.*\.experts)\.(?P<number>\d+)\.(?P<leaf>[^.]+)")
"""How servers name an expert's layers (`FusedMoE.make_expert_params_mapping` in vLLM and SGLang)."""
PACKED = ("weight_packed", "bitmask", "compressed")
OF_CODES = (
    *PACKED,
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
    "SCB",
    "weight_format",
)
"""Names of tensors that only a layer of codes has."""
OF_CACHES = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point")


@dataclass(frozen=True)
class Layer:
    """A weight of the checkpoint with what lies beside it.

    Attributes:
        name: what its tensors' names begin with, on disk.
        module: the name of the model's module, or None where the model doesn't have it or isn't known.
        classes: the names of the module's class and its bases; empty where they aren't known.
        tensors: what is stored, by the last part of the names.
        out_features: N, or None where neither the model nor the tensors say it.
        in_features: K, likewise.
        transposed: whether the model has the weight as [K, N].
    """

    name: str
    module: str | None
    classes: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]
    out_features: int | None
    in_features: int | None
    transposed: bool

    @property
    def leaf(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]

    @property
    def is_compressed(self) -> bool:
        """Whether codes are stored for it, or something that only codes have."""
        weight = self.tensors.get("weight")
        return not self.tensors.keys().isdisjoint(OF_CODES) or (weight is not None and weight.dtype in CODES)

    @property
    def is_special(self) -> bool:
        """Whether it is a float layer of a class of its own, a router for one, that by class is a linear layer too."""
        return bool(self.classes) and self.classes[0] != "Linear" and not self.transposed and not self.is_compressed

    @property
    def expert(self) -> re.Match[str] | None:
        """The parts of its name if it is one expert's."""
        return EXPERT.fullmatch(self.name)

    @property
    def is_linear(self) -> bool:
        """Whether it is known to be a linear layer of the model; an expert's is one."""
        return "Linear" in self.classes or self.transposed or self.expert is not None


@dataclass(frozen=True)
class Contents:
    """A checkpoint.

    Attributes:
        name: what the user called it.
        config: its config.json.
        stored: its `quantization_config`, or None for a float one.
        method: the quant_method, or None for a float one.
        groups: of compressed-tensors.
        mistakes: what compressed-tensors refuses in the config.
        tensors: name to shape and dtype.
        layers: by their names on disk.
        unbuilt: why the model's classes aren't known, or None.
        unused: tensors that the model doesn't use, layers' own aside.
        head: the name on disk of the layer that makes the logits, or None.
        planned_experts: whether a checkpoint that is yet to be written quantizes a mixture's experts.
    """

    name: str
    config: Mapping[str, Any]
    stored: Mapping[str, Any] | None
    method: str | None
    groups: tuple[Group, ...]
    mistakes: tuple[Mistake, ...]
    tensors: Mapping[str, TensorInfo]
    layers: Mapping[str, Layer] = field(default_factory=dict)
    unbuilt: str | None = None
    unused: tuple[str, ...] = ()
    head: str | None = None
    planned_experts: bool = False

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The config of the language model, which a model of several parts nests."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, Mapping) else self.config

    @property
    def is_readable(self) -> bool:
        """Whether it is in compressed-tensors' format and its groups can be read; else rules of layers say nothing."""
        return self.method == "compressed-tensors" and all(mistake.of_group for mistake in self.mistakes)

    @property
    def ignore(self) -> tuple[str, ...]:
        """What the config leaves in float: class names, module names, or regexes after `re:`."""
        values = (self.stored or {}).get("ignore") or []
        return tuple(value for value in values if isinstance(value, str)) if isinstance(values, list) else ()

    @property
    def is_tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return bool(self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings", False)))

    def number(self, *names: str) -> int | None:
        """The first of these that the language model's config says as a positive whole number."""
        for name in names:
            value = self.text_config.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None

    @property
    def head_size(self) -> int | None:
        """Features of one attention head, or None where the config doesn't say."""
        given, hidden, heads = self.number("head_dim"), self.number("hidden_size", "n_embd"), self.heads
        return given or (hidden // heads if hidden and heads else None)

    @property
    def heads(self) -> int | None:
        """Attention heads, or None where the config doesn't say."""
        return self.number("num_attention_heads", "n_head")


def contents_of(checkpoint: str | Path, hub: Hub | None = None) -> Contents:
    """The contents of a folder or hub id, read from config and headers alone.

    Raises:
        CheckpointError: there is no config, or a shard is missing or damaged.
    """
    hub = hub or Hub()
    folder = resolve(checkpoint, hub)
    config, weights = read_config(folder), ShardReader(folder)
    base = of_config(config, str(checkpoint))
    try:
        skeleton = build_skeleton(folder, hub, weights)
    except CheckpointError as error:
        layers = {name: _layer(name, tensors, None, {}) for name, tensors in _by_layer(weights.tensors).items()}
        return _filled(base, weights.tensors, layers, str(error), (), None)
    layers, unused, head = _placed(Source(str(checkpoint), folder, config, skeleton, weights))
    return _filled(base, weights.tensors, layers, None, unused, head)


def of_config(config: Mapping[str, Any], name: str) -> Contents:
    """What config.json alone says of a checkpoint, as of one that is yet to be written."""
    nested = config.get("text_config")
    holders = (config, nested if isinstance(nested, Mapping) else {})
    keys = ("quantization_config", "compression_config")
    stored = next((holder[key] for holder in holders for key in keys if holder.get(key)), None)
    method = compressed_as(dict(config))
    stored = stored if isinstance(stored, Mapping) else None
    groups, mistakes = read_groups(stored or {}) if method == "compressed-tensors" else ([], [])
    return Contents(
        name, config, stored, None if method is None else str(method), tuple(groups), tuple(mistakes), tensors={}
    )


def _filled(
    base: Contents,
    tensors: Mapping[str, TensorInfo],
    layers: dict[str, Layer],
    unbuilt: str | None,
    unused: tuple[str, ...],
    head: str | None,
) -> Contents:
    if base.stored is not None and base.stored.get("kv_cache_scheme"):
        unused = tuple(key for key in unused if key.rpartition(".")[2] not in OF_CACHES)
    return replace(base, tensors=tensors, layers=layers, unbuilt=unbuilt, unused=unused, head=head)


def _by_layer(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of every layer with a weight of two axes, packed or not, by the layer's name."""
    found: defaultdict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for key, info in tensors.items():
        name, _, leaf = key.rpartition(".")
        found[name][leaf] = info
    return {
        name: leaves
        for name, leaves in found.items()
        if ("weight" in leaves and len(leaves["weight"].shape) == 2) or not leaves.keys().isdisjoint(PACKED)
    }


def _placed(source: Source) -> tuple[dict[str, Layer], tuple[str, ...], str | None]:
    """The layers as the model has them, what it doesn't use, and the name on disk of the layer of the logits."""
    tensors = source.weights.tensors
    by_layer = _by_layer(tensors)
    # The skeleton has float weights, so it is asked for the name that a layer's float weight would have.
    asked = Source(source.name, source.folder, source.config, source.skeleton, _Names(by_layer, tensors))
    origins = names_of(asked)
    linear = {name: (rows, columns, turned) for name, _, columns, rows, turned in linear_modules(source.skeleton)}
    modules = dict(source.skeleton.named_modules())
    layers, head = {}, output_head(source.skeleton)
    for name, leaves in by_layer.items():
        origin = origins[f"{name}.weight"]
        module = (origin.parameter or "").removesuffix(".weight")
        plain = module if not origin.converted and module in modules else None
        layers[name] = _layer(name, leaves, plain, linear, modules.get(plain or ""))
    own = {*OF_CODES, "weight", "bias"}
    owned = {f"{name}.{leaf}" for name, leaves in by_layer.items() for leaf in leaves if leaf in own}
    unused = tuple(key for key in tensors if key not in owned and origins[key].parameter is None)
    on_disk = next((layer.name for layer in layers.values() if head is not None and layer.module == head), None)
    return layers, unused, on_disk


class _Names:
    """Stands for a checkpoint whose layers are in float: their weights' names, and those of all other tensors."""

    nbytes = 0

    def __init__(self, layers: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = {f"{name}.weight": next(iter(tensors.values())) for name in layers} | dict(tensors)

    def get(self, name: str) -> torch.Tensor:
        """Nothing: no value is read."""
        raise KeyError(name)


def _layer(
    name: str,
    tensors: Mapping[str, TensorInfo],
    module: str | None,
    linear: Mapping[str, tuple[int, int, bool]],
    built: nn.Module | None = None,
) -> Layer:
    """One layer; its sizes are the model's where it has it, else what the tensors say."""
    classes = () if built is None else tuple(each.__name__ for each in type(built).__mro__ if each is not object)
    if module is not None and module in linear:
        rows, columns, turned = linear[module]
        return Layer(name, module, classes, tensors, rows, columns, turned)
    weight, packed = tensors.get("weight"), tensors.get("weight_packed")
    if packed is not None and len(packed.shape) == 2:
        return Layer(name, module, classes, tensors, packed.shape[0], None, False)
    if weight is not None and len(weight.shape) == 2:
        return Layer(name, module, classes, tensors, weight.shape[0], weight.shape[1], False)
    return Layer(name, module, classes, tensors, None, None, False)
