"""The rules of plain transformers 5.23 with compressed-tensors 0.20 and bitsandbytes 0.50, on any hardware."""

from collections.abc import Iterator
from importlib.metadata import version

import torch

from quantkit.formats.bitsandbytes import skips
from quantkit.servers import matching, shapes, tensors
from quantkit.servers.arguments import Group
from quantkit.servers.contents import Contents, Layer
from quantkit.servers.findings import HARDWARE, Finding

NAME, VERSION = "transformers", "5.23"
PLATFORMS = tuple(HARDWARE)
READ = f"read in transformers {VERSION}"
LOADER = f"{READ} and compressed-tensors 0.20"
SEEN = f"seen with transformers {VERSION} and compressed-tensors 0.20"
METHODS = frozenset(
    {
        "awq",
        "bitsandbytes",
        "gptq",
        "aqlm",
        "quanto",
        "quark",
        "fouroversix",
        "fp_quant",
        "eetq",
        "higgs",
        "hqq",
        "compressed-tensors",
        "fbgemm_fp8",
        "torchao",
        "bitnet",
        "vptq",
        "spqr",
        "fp8",
        "gguf",
        "nvfp4",
        "mxfp8",
        "auto-round",
        "mxfp4",
        "metal",
        "sinq",
        "gemma",
    }
)
"""`AUTO_QUANTIZATION_CONFIG_MAPPING` of quantizers/auto.py."""


def findings(contents: Contents, tensor_parallel: int = 1) -> Iterator[Finding]:
    """What `from_pretrained` would make of a checkpoint; of one that only has a config, what follows from that."""
    del tensor_parallel  # its tensor parallelism was not looked at
    yield from _method(contents)
    if contents.method == "compressed-tensors":
        yield from _config(contents)
    if contents.is_readable:
        yield from _layers(contents)
        yield from _experts(contents)
    if contents.method == "bitsandbytes":
        yield from _bitsandbytes(contents)
    if contents.tensors:
        yield from _model(contents)


def _method(contents: Contents) -> Iterator[Finding]:
    """Whether it knows the format, and what it needs for it."""
    where, source = ("quantization_config.quant_method",), f"{READ}, quantizers/auto.py"
    if contents.method == "compressed-tensors":
        yield Finding("note", where, "it needs the package compressed-tensors", source)
    elif contents.method == "bitsandbytes":
        yield Finding("note", where, "it needs the packages bitsandbytes and accelerate", source)
    elif contents.method == "quantkit":
        rule = "transformers only warns of this format and then fails on packed weights; `import quantkit.hf` first"
        yield Finding("error", where, rule, source)
    elif contents.method is not None and contents.method not in METHODS:
        rule = f"transformers only warns that it doesn't know {contents.method!r}, and then takes codes for weights"
        yield Finding("error", where, rule, source)


def _config(contents: Contents) -> Iterator[Finding]:
    """What compressed-tensors refuses in the config, and what it passes by."""
    for mistake in contents.mistakes:
        where = (f"quantization_config.{mistake.key}",)
        yield Finding("error", where, mistake.sentence, "read in compressed-tensors 0.20, quantization/")
    stored = contents.stored or {}
    if stored.get("quantization_status") != "compressed":
        rule = f"only `compressed` makes it decode weights, not {stored.get('quantization_status')!r}"
        yield Finding("error", ("quantization_config.quantization_status",), rule, LOADER)
    if any(key.rpartition(".")[2] in ("bitmask", "compressed") for key in contents.tensors):
        rule = "2:4 sparse tensors went with compressed-tensors 0.15; write a dense checkpoint with zeros in it"
        yield Finding("error", ("quantization_config.sparsity_config",), rule, LOADER)
    for group in contents.groups:
        weights = group.weights
        if weights is not None and group.format == "pack-quantized" and not weights.symmetric:
            rule = "asymmetric packed weights fail by default (shape of zero points) and load with dequantize=True"
            yield Finding("error", (f"config_groups.{group.name}",), rule, SEEN)


def _layers(contents: Contents) -> Iterator[Finding]:
    """Whether every layer holds what compressed-tensors expects of a module of its class and name."""
    for layer in contents.layers.values():
        if layer.expert is not None:
            continue
        choice = matching.in_compressed_tensors(layer, contents)
        group = choice.group
        if group is None or group.weights is None:
            yield from _left_alone(layer, choice)
        elif layer.classes or layer.is_compressed:
            yield from _stored(layer, group)


def _left_alone(layer: Layer, choice: matching.Choice) -> Iterator[Finding]:
    """A layer that compressed-tensors passes by must be in float."""
    if not layer.is_compressed:
        return
    rule = "codes are stored, and the config leaves this layer in float (no target names it, or ignore does)"
    if layer.transposed and not choice.ignored:
        rule = "it passes Conv1D layers by and takes codes for weights; load it with quantkit, or serve it with vLLM"
    yield Finding("error", (layer.name,), rule, SEEN)


def _stored(layer: Layer, group: Group) -> Iterator[Finding]:
    """Whether a layer's tensors are those of its group; what is stored beside them is only reported as unexpected."""
    for key, sentence, kind in tensors.problems(group, layer):
        yield Finding("warning" if kind == "extra" else "error", (key,), sentence, LOADER)
    weights = group.weights
    if weights is None or layer.in_features is None:
        return
    wide = weights.block[1] if weights.block is not None else weights.group_size or 1
    if wide > 1 and layer.in_features % wide:
        rule = f"its {layer.in_features} in features don't divide by {wide}, and decoding fails"
        yield Finding("error", (layer.name,), rule, SEEN)


def _experts(contents: Contents) -> Iterator[Finding]:
    """A mixture's experts: decoded while they are merged, all with one group."""
    if not contents.groups:
        return
    source = f"{READ}, integrations/compressed_tensors.py"
    group = _experts_group(contents)
    owners = ["experts"] if contents.planned_experts else []
    for owner, members in shapes.experts(contents).items():
        compressed = [layer for layer in members if layer.is_compressed]
        owners += [owner] if compressed else []
        if 0 < len(compressed) < len(members):
            yield Finding("error", (owner,), "some experts are in float and some aren't, and they are merged", source)
        for layer in compressed:
            for key, sentence, kind in tensors.problems(group, layer):
                yield Finding("warning" if kind == "extra" else "error", (key,), sentence, LOADER)
    is_fp8 = group.weights is not None and group.weights.type == "float" and group.weights.num_bits == 8
    if owners and not is_fp8 and group.format != "pack-quantized":
        rule = f"experts stored as {group.format} end in conversion errors; quantkit loads them"
        yield Finding("error", tuple(owners), rule, SEEN)


def _experts_group(contents: Contents) -> Group:
    """The group that it decodes experts with: the first whose regex speaks of experts, else the first of a class."""
    for group in contents.groups:
        if any(target.startswith("re:") and "experts" in target for target in group.targets):
            return group
    classes = [g for g in contents.groups if any(not target.startswith("re:") for target in g.targets)]
    return (classes or list(contents.groups))[0]


def _bitsandbytes(contents: Contents) -> Iterator[Finding]:
    """Int8 layers of bitsandbytes: which are replaced, and what they must hold."""
    stored = contents.stored or {}
    if stored.get("load_in_4bit") or not stored.get("load_in_8bit"):
        rule = "quantkit knows no rules for bitsandbytes but load_in_8bit: not checked"
        yield Finding("warning", ("quantization_config",), rule, "this check")
        return
    skipped = stored.get("llm_int8_skip_modules")
    patterns = [value for value in skipped if isinstance(value, str)] if isinstance(skipped, list) else None
    source = f"{READ}, integrations/bitsandbytes.py"
    for layer in contents.layers.values():
        if layer.module is None or not (layer.transposed or "Linear" in layer.classes):
            continue
        is_left = skips(layer.module, patterns) if patterns is not None else layer.name == contents.head
        weight = layer.tensors.get("weight")
        if is_left and layer.is_compressed:
            rule = "codes are stored, and llm_int8_skip_modules leaves this layer in float"
            yield Finding("error", (layer.name,), rule, source)
        elif not is_left and (weight is None or weight.dtype != torch.int8 or "SCB" not in layer.tensors):
            rule = "an int8 `weight` and `SCB` are expected; name the layer in llm_int8_skip_modules"
            yield Finding("error", (layer.name,), rule, source)


def _model(contents: Contents) -> Iterator[Finding]:
    """Whether the model's class is known and has these tensors."""
    installed = f"seen with transformers {version('transformers')}"
    if contents.unbuilt is not None:
        yield Finding("error", ("config.json",), contents.unbuilt, installed)

    if contents.unused:
        rule = "the model doesn't use these: they are reported as unexpected and left out"
        yield Finding("note", contents.unused, rule, installed)
