"""The rules of SGLang 0.5.23, read in its wheel; nothing here was seen running."""

from collections.abc import Iterator

from quantkit.servers import matching, shapes, tensors
from quantkit.servers.arguments import Arguments, Group
from quantkit.servers.contents import Contents, Layer
from quantkit.servers.findings import GPUS, Finding
from quantkit.servers.shapes import Fusion, Linear
from quantkit.servers.vllm_schemes import is_fp8, is_int8

NAME, VERSION = "SGLang", "0.5.23"
PLATFORMS = GPUS
READ = f"read in SGLang {VERSION}"
SCHEMES = f"{READ}, compressed_tensors.py"
FUSIONS = (
    Fusion("qkv_proj", ("q_proj", "k_proj", "v_proj"), surely=True),
    Fusion("gate_up_proj", ("gate_proj", "up_proj"), surely=True),
    Fusion("fused_qkv_a_proj_with_mqa", ("q_a_proj", "kv_a_proj_with_mqa")),
    Fusion("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    Fusion("in_proj_ba", ("in_proj_b", "in_proj_a")),
)
"""`packed_modules_mapping` of its model classes; the first two are in 37 and 40 of them, the others in one or two."""
METHODS = frozenset(
    {
        "fp8",
        "mxfp8",
        "minimax_m3_nvfp4",
        "blockwise_int8",
        "modelopt",
        "modelopt_fp8",
        "modelopt_fp4",
        "nvfp4_online",
        "modelopt_mixed",
        "w8a8_int8",
        "w8a8_fp8",
        "awq",
        "awq_marlin",
        "bitsandbytes",
        "gguf",
        "gptq_marlin",
        "moe_wna16",
        "compressed-tensors",
        "w4afp8",
        "petit_nvfp4",
        "quark",
        "quark_mxfp4",
        "auto-round",
        "auto-round-int8",
        "modelslim",
        "quark_int4fp8_moe",
        "humming",
        "mxfp_w4a8",
        "mxfp4",
    }
)
"""`BASE_QUANTIZATION_METHODS` of quantization/__init__.py."""
ACTIVATION_FORMATS = ("naive-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "pack-quantized")
MARLIN_GROUPS = (-1, 32, 64, 128)
BLACKWELL = ("sm100", "sm120")
OLD = ("sm75", "sm80")


def findings(contents: Contents, tensor_parallel: int = 1) -> Iterator[Finding]:
    """What SGLang would say of a checkpoint; of one that only has a config, what follows from that."""
    if contents.method is not None and contents.method not in METHODS:
        rule = f"SGLang has no quantization method {contents.method!r}; use a recipe that compressed-tensors can say"
        yield Finding("error", ("quantization_config.quant_method",), rule, f"{READ}, quantization/__init__.py")
    yield from shapes.attention(contents, tensor_parallel, f"{READ}, models/llama.py")
    if contents.method == "compressed-tensors":
        yield from _config(contents)
    if contents.is_readable:
        for group in contents.groups:
            yield from of_linear(group)
        yield from _layers(contents, tensor_parallel)
        yield from _experts(contents)
        yield from _head(contents)
    if contents.tensors:
        names = contents.config.get("architectures") or ["none"]
        rule = f"whether SGLang knows {names[0]} wasn't checked: its list of models isn't here"
        yield Finding("note", ("config.json architectures",), rule, "this check")
        if contents.unbuilt is not None:
            rule = f"the model's layers aren't known, so that float ones weren't checked: {contents.unbuilt}"
            yield Finding("note", ("config.json",), rule, "this check")


def _config(contents: Contents) -> Iterator[Finding]:
    """What its reader of the config refuses, or passes by."""
    for mistake in contents.mistakes:
        if not mistake.of_group:
            where = (f"quantization_config.{mistake.key}",)
            yield Finding("error", where, mistake.sentence, "read in compressed-tensors 0.18, quant_args.py")
    stored = contents.stored or {}
    sparsity = stored.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("targets") and sparsity.get("sparsity_structure") == "2:4":
        rule = "2:4 sparsity isn't supported; write a dense checkpoint with zeros in it"
        yield Finding("error", ("quantization_config.sparsity_config",), rule, SCHEMES)
    scheme = stored.get("kv_cache_scheme")
    if isinstance(scheme, dict) and scheme:
        told = {key: scheme.get(key) for key in ("type", "num_bits", "strategy")}
        served = told == {"type": "float", "num_bits": 8, "strategy": "tensor"} and scheme.get("symmetric", True)
        if not served or scheme.get("dynamic", False):
            rule = "only static symmetric FP8 by tensor is known for the cache: SGLang leaves it in float"
            yield Finding("warning", ("quantization_config.kv_cache_scheme",), rule, SCHEMES)


def of_linear(group: Group) -> Iterator[Finding]:
    """What SGLang does with linear layers of a group."""
    weights, inputs, where = group.weights, group.inputs, f"config_groups.{group.name}"

    def finding(severity: str, rule: str, source: str, *hardware: str) -> Finding:
        return Finding(severity, (where,), rule, source, hardware)

    if weights is None:
        yield finding("error", "a group needs weights", SCHEMES)
    elif weights.num_bits == 4 and weights.type == "float":
        yield finding("warning", f"quantkit knows no rules for this scheme ({group.label}): not checked", SCHEMES)
    elif weights.type == "int" and inputs is None and weights.strategy in ("channel", "group"):
        yield from _packed(group, weights, where)
    elif group.format not in ACTIVATION_FORMATS:
        yield finding("error", f"SGLang has no scheme for {group.label}", SCHEMES)
    elif is_fp8(weights, inputs):
        yield from _fp8(weights, where)
    elif weights.type == "float" and weights.strategy in ("tensor", "channel") and weights.symmetric:
        rule = "FP8 weights with float activations need SM80"
        yield finding("warning", rule, f"{READ}, compressed_tensors_w8a16_fp8.py", "sm75")
    elif is_int8(weights, inputs):
        yield from _int8(inputs, where)
    else:
        yield finding("error", f"SGLang has no scheme for {group.label}", SCHEMES)


def _packed(group: Group, weights: Arguments, where: str) -> Iterator[Finding]:
    source = f"{READ}, compressed_tensors_wNa16.py"
    size = -1 if weights.group_size is None else weights.group_size
    if group.format != "pack-quantized" or weights.num_bits not in (4, 8):
        rule = f"int weights with float activations are packed, 4 or 8 bits, not {weights.num_bits} as {group.format}"
        yield Finding("error", (where,), rule, SCHEMES)
        return
    yield Finding("warning", (where,), "packed weights need SM80", source, ("sm75",))
    if size not in MARLIN_GROUPS:
        rule = f"Marlin takes groups of 32, 64 or 128, or none, not {size}"
        yield Finding("error", (where,), rule, f"{READ}, marlin_utils.py")


def _fp8(weights: Arguments, where: str) -> Iterator[Finding]:
    source = f"{READ}, compressed_tensors_w8a8_fp8.py"
    if weights.strategy == "block":
        rule = "FP8 by block needs SM89: the weight-only way below has no blocks"
        yield Finding("warning", (where,), rule, source, OLD)
        return
    yield Finding("warning", (where,), "FP8 needs SM80", source, ("sm75",))
    rule = "without FP8 products the weights are read by Marlin and activations stay in float"
    yield Finding("note", (where,), rule, SCHEMES, ("sm80",))


def _int8(inputs: Arguments | None, where: str) -> Iterator[Finding]:
    source = f"{READ}, compressed_tensors_w8a8_int8.py"
    yield Finding("warning", (where,), "int8 W8A8 needs SM80", source, ("sm75",))
    rule = "sgl-kernel has no int8 product here (int8_scaled_mm: SM75 to SM90)"
    yield Finding("warning", (where,), rule, f"{source}; SGLang pull request 28137", BLACKWELL)
    if inputs is not None and not inputs.dynamic:
        rule = "the stored scales of activations go unused: they get a scale a token"
        yield Finding("warning", (where,), rule, source)


def _layers(contents: Contents, tensor_parallel: int) -> Iterator[Finding]:
    """Whether every linear layer holds what the config says, and the members of fused ones agree."""
    for linear in shapes.linears(contents, FUSIONS):
        choice = matching.in_sglang([member.name for member in linear.members], linear.name, contents)
        severity = "error" if linear.surely else "warning"
        where = tuple(member.name for member in linear.members)
        if isinstance(choice, str):
            known = bool(linear.members[0].classes) or linear.members[0].is_compressed
            if known:
                rule = f"{linear.leaf} is one layer in SGLang, of one group or ignored as a whole: {choice}"
                yield Finding(severity, where, rule, f"{READ}, compressed_tensors/utils.py")
            continue
        if not linear.surely:
            continue
        yield from _by_fused_name(linear, choice, contents)
        for layer in linear.members:
            yield from _stored(layer, choice.group)
        if choice.group is not None:
            yield from shapes.sizes(linear, choice.group, tensor_parallel, f"{READ}, fp8_utils.py and marlin_utils.py")
            yield from _marlin_sizes(linear, choice.group)


def _by_fused_name(linear: Linear, choice: matching.Choice, contents: Contents) -> Iterator[Finding]:
    """Members that are named and the fused layer isn't: Llama's class, for one, doesn't say which members it has."""
    if len(linear.members) == 1 or not choice.ignored:
        return
    if not any(matching.fits_end(linear.name, target) for target in contents.ignore):
        rule = (
            f"only members of {linear.leaf} are ignored; model classes without packed_modules_mapping, such as "
            "LlamaForCausalLM, look for the fused name alone and take it for quantized: add it to ignore"
        )
        yield Finding("warning", tuple(each.name for each in linear.members), rule, f"{READ}, model_loader/loader.py")


def _stored(layer: Layer, group: Group | None) -> Iterator[Finding]:
    """Whether a layer's tensors are those of its group."""
    if group is None or group.weights is None:
        if layer.is_compressed:
            rule = "codes are stored, and the config leaves this layer in float (ignore names it)"
            yield Finding("error", (layer.name,), rule, SCHEMES)
        return
    if layer.is_special:
        rule = "by its class it is a linear layer, and it is in float: if SGLang quantizes it, ignore must name it"
        yield Finding("warning", (layer.name,), f"{rule} (not checked)", SCHEMES)
        return
    for key, sentence, _ in tensors.problems(group, layer):
        yield Finding("error", (key,), sentence, f"{READ}, compressed_tensors/schemes")
    if layer.transposed and "weight" in layer.tensors and layer.leaf not in shapes.TURNED:
        rule = "the model has this weight as [in, out], and SGLang turns only GPT-2's: not checked"
        yield Finding("warning", (layer.name,), rule, f"{READ}, models/gpt2.py")


def _marlin_sizes(linear: Linear, group: Group) -> Iterator[Finding]:
    """Sizes that Marlin takes for packed weights."""
    columns = linear.members[0].in_features
    rows = [member.out_features for member in linear.members]
    if group.format != "pack-quantized" or columns is None or None in rows:
        return
    if columns % 128 or sum(count or 0 for count in rows) % 64:
        rule = (
            "Marlin needs in features that 128 divides and out features that 64 divides; SGLang asks this and goes on "
            "whatever the answer: what follows wasn't checked"
        )
        yield Finding("warning", (linear.name,), rule, f"{READ}, compressed_tensors_wNa16.py")


def _experts(contents: Contents) -> Iterator[Finding]:
    """What it makes of a mixture's experts."""

    def choose(layer: Layer) -> Group | None:
        choice = matching.in_sglang([layer.name], layer.name, contents)
        return choice.group if isinstance(choice, matching.Choice) else None

    used = {group.name: group for group in contents.groups if contents.planned_experts}
    for owner, members in shapes.experts(contents).items():
        yield from shapes.same_scheme(contents, owner, members, choose, SCHEMES)
        for layer in members:
            group = choose(layer)
            if group is not None and group.weights is not None:
                used[group.name] = group
                for key, sentence, _ in tensors.problems(group, layer):
                    yield Finding("error", (key,), sentence, SCHEMES)
    for group in used.values():
        weights, inputs, where = group.weights, group.inputs, (f"config_groups.{group.name} (experts)",)
        if weights is None or is_fp8(weights, inputs):
            continue
        if is_int8(weights, inputs):
            yield Finding("error", where, "int8 experts are there for NPUs only", SCHEMES)
        elif weights.type != "int" or inputs is not None or group.format != "pack-quantized":
            yield Finding("error", where, f"SGLang has no scheme for experts with {group.label}", SCHEMES)


def _head(contents: Contents) -> Iterator[Finding]:
    """The layer of the logits: only a target that names it quantizes it."""
    layer = contents.layers.get(contents.head or "")
    if layer is None or not layer.is_compressed:
        return
    if any(matching.fits_end(layer.name, target) for target in contents.ignore):
        yield Finding("error", (layer.name,), "codes are stored, and ignore leaves it in float", SCHEMES)
        return
    groups = matching.by_target(contents.groups)
    named = next((target for target in groups if matching.fits_end(layer.name, target)), None)
    if named is None:
        rule = "codes are stored, and SGLang quantizes the output layer only where a target names it (not its class)"
        yield Finding("error", (layer.name,), rule, SCHEMES)
    elif groups[named].weights is not None and groups[named].weights.block is not None:  # type: ignore[union-attr]
        yield Finding("error", (layer.name,), "the output layer can't be quantized by block", SCHEMES)
