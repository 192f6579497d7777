"""Every rule of a server against a checkpoint of ours that keeps it and a copy that breaks it.

Where a rule is transformers', the broken copy is given to transformers too, which must stumble over it.
"""

from dataclasses import dataclass
from pathlib import Path

import models
import pytest
import torch
from breaking import (
    Change,
    both,
    coded_layer,
    config,
    extra,
    float_layer,
    group,
    ignored,
    key,
    kv_cache,
    tensor,
    two_groups,
    without,
)
from quantkit_kernels.formats import dequantize_weight

from quantkit.servers import check
from quantkit.servers.findings import Finding, Verdict

DOWN = "model.layers.0.mlp.down_proj"
Q, K, V = (f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv")
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w2"


@dataclass(frozen=True)
class Row:
    """A rule: which server's, what breaks it in which checkpoint, and what must be said of what."""

    server: str
    change: Change
    where: str
    says: str
    recipe: str = "w8a8"
    model: str = "llama"
    severity: str = "error"
    hardware: tuple[str, ...] = ()
    parallel: int = 1
    form: str = "auto"


CPUS = ("cpu", "cpu-amx")
GPUS = ("sm75", "sm80", "sm89", "sm90", "sm100", "sm120")
VLLM = {
    "unknown argument": Row("vllm", group(weights={"observed": 1}), "weights.observed", "unknown keys are rejected"),
    "removed order": Row("vllm", group(weights={"actorder": "group"}), "weights.actorder", "removed"),
    "group needs weights": Row("vllm", group(weights=None), "group_0", "needs weights"),
    "unknown method": Row(
        "vllm", config(lambda c: c.update(quant_method="mine")), "quant_method", "no quantization method 'mine'"
    ),
    "sparsity": Row(
        "vllm",
        config(lambda c: c.update(sparsity_config={"format": "dense", "targets": ["Linear"]})),
        "sparsity_config",
        "removed",
    ),
    "transforms": Row(
        "vllm",
        config(lambda c: c.update(transform_config={"R1": {}})),
        "transform_config",
        "not checked",
        severity="warning",
    ),
    "int weights alone are packed": Row(
        "vllm", group(input_activations=None), "group_0", "must be stored as pack-quantized"
    ),
    "no scheme": Row("vllm", group(input_activations={"strategy": "tensor"}), "group_0", "no scheme for"),
    "foreign scheme": Row("vllm", group(weights={"num_bits": 4}), "group_0", "not checked", severity="warning"),
    "packed bits": Row("vllm", group(weights={"num_bits": 16}), "group_0", "2 to 8 bits", recipe="int8"),
    "marlin": Row(
        "vllm", group(weights={"group_size": 16}), "group_0", "Marlin takes", recipe="int8-g128", severity="note"
    ),
    "static blocks": Row(
        "vllm",
        group(input_activations={"strategy": "tensor", "group_size": None, "dynamic": False}),
        "group_0",
        "need dynamic activations",
        recipe="fp8-block",
    ),
    "dynamic by tensor": Row(
        "vllm",
        group(input_activations={"strategy": "tensor"}),
        "group_0",
        "a scale a token",
        recipe="fp8",
        severity="note",
    ),
    "fused members ignored apart": Row("vllm", ignored(Q), Q, "ignore names only q_proj"),
    "fused members of two schemes": Row("vllm", two_groups(Q, K), V, "its members have several"),
    "missing scale": Row("vllm", without(f"{DOWN}.weight_scale"), f"{DOWN}.weight_scale", "isn't stored"),
    "missing static scale": Row(
        "vllm", without(f"{DOWN}.input_scale"), f"{DOWN}.input_scale", "isn't stored", recipe="w8a8-static"
    ),
    "missing packed shape": Row(
        "vllm", without(f"{DOWN}.weight_shape"), f"{DOWN}.weight_shape", "isn't stored", recipe="int8"
    ),
    "wrong dtype": Row("vllm", tensor(f"{DOWN}.weight", lambda t: t.float()), f"{DOWN}.weight", "float32 where int8"),
    "wrong shape": Row(
        "vllm",
        tensor(f"{DOWN}.weight_scale", lambda t: t.flatten().contiguous()),
        f"{DOWN}.weight_scale",
        "[128] where [128, 1]",
    ),
    "wrong packed shape": Row(
        "vllm",
        tensor(f"{DOWN}.weight_packed", lambda t: t[:, 1:].contiguous()),
        f"{DOWN}.weight_packed",
        "[128, 63] where [128, 64]",
        recipe="int8",
    ),
    "group's scales": Row(
        "vllm",
        tensor(f"{DOWN}.weight_scale", lambda t: t[:, 1:].contiguous()),
        f"{DOWN}.weight_scale",
        "[128, 1] where [128, 2]",
        recipe="int8-g128",
    ),
    "extra tensor": Row(
        "vllm", extra(f"{DOWN}.weight_zero_point", 128, 1, dtype=torch.int8), "weight_zero_point", "no such tensor"
    ),
    "a float layer": Row("vllm", float_layer(DOWN), f"{DOWN}.weight", "float32 where int8"),
    "codes where ignored": Row("vllm", ignored(DOWN), DOWN, "leaves this layer in float"),
    "e5m2": Row(
        "vllm", tensor(f"{DOWN}.weight", lambda t: t.float().to(torch.float8_e5m2)), DOWN, "E5M2", recipe="fp8"
    ),
    "the head by its class": Row("vllm", coded_layer("lm_head"), "lm_head", "only where a target names it"),
    "a tied head": Row(
        "vllm",
        both(extra("lm_head.weight", 260, 128, dtype=torch.int8), extra("lm_head.weight_scale", 260, 1)),
        "lm_head",
        "its embedding",
        model="llama_tied",
    ),
    "cache of ints": Row("vllm", kv_cache(type="int"), "kv_cache_scheme", "floats of 8 bits"),
    "asymmetric cache": Row("vllm", kv_cache(symmetric=False), "kv_cache_scheme", "symmetric"),
    "cache without scales": Row("vllm", kv_cache(), "kv_cache_scheme", "takes 1", severity="warning"),
    "head size": Row(
        "vllm", key(head_dim=24), "head_dim", "24 features aren't served", severity="warning", hardware=CPUS
    ),
    "odd head size": Row(
        "vllm",
        key(head_dim=12),
        "head_dim",
        "FlashAttention",
        severity="note",
        hardware=("sm75", "sm80", "sm89", "sm90", "sm100", "sm120"),
    ),
    "heads over GPUs": Row(
        "vllm", key(num_attention_heads=6), "num_attention_heads", "6 attention heads don't divide by 4", parallel=4
    ),
    "cache heads over GPUs": Row(
        "vllm",
        key(num_attention_heads=6, num_key_value_heads=3),
        "num_key_value_heads",
        "don't divide one another",
        parallel=2,
    ),
    "features over GPUs": Row("vllm", key(intermediate_size=255), "intermediate_size", "255 features", parallel=2),
    "experts differ": Row("vllm", ignored(EXPERT), "experts", "same scheme", model="mixtral"),
    "codes of ignored experts": Row(
        "vllm", ignored("re:.*experts.*"), EXPERT, "leaves this layer in float", model="mixtral"
    ),
    "an expert's tensor": Row("vllm", without(f"{EXPERT}.weight_scale"), EXPERT, "isn't stored", model="mixtral"),
    "int8 experts by tensor": Row(
        "vllm", group(weights={"strategy": "tensor"}), "experts", "by channel", model="mixtral"
    ),
    "unused tensors": Row("vllm", extra("model.left.over", 3), "model.left.over", "refuses tensors", severity="note"),
    "unknown model": Row("vllm", key(model_type="none"), "config.json", "weren't checked", severity="note"),
}
VLLM |= {
    "a broken regex": Row("vllm", ignored("re:("), "ignore", "no regular expression"),
    "format": Row("vllm", group(format="dense"), "group_0", "no scheme for"),
    "activations that it passes by": Row(
        "vllm",
        group(input_activations={"strategy": "tensor", "symmetric": False, "dynamic": False}),
        "group_0",
        "weight-only here",
        recipe="fp8",
        severity="warning",
    ),
    "outputs": Row("vllm", group(output_activations={"num_bits": 8}), "group_0", "not checked", severity="warning"),
    "odd groups": Row(
        "vllm",
        group(weights={"group_size": 3, "num_bits": 4}),
        "group_0",
        "even size",
        recipe="int8-g128",
        severity="warning",
        hardware=CPUS,
    ),
    "other blocks": Row(
        "vllm",
        group(weights={"block_structure": [64, 64]}),
        "group_0",
        "128 x 128",
        recipe="fp8-block",
        severity="warning",
        hardware=GPUS,
    ),
    "blocks that don't divide": Row(
        "vllm", group(weights={"block_structure": [128, 96]}), DOWN, "don't divide by", recipe="fp8-block"
    ),
    "foreign experts": Row(
        "vllm", group(weights={"num_bits": 4}), "experts", "not checked", model="mixtral", severity="warning"
    ),
    "experts that aren't packed": Row(
        "vllm", group(format="int-quantized"), "group_0", "must be packed", recipe="int8", model="mixtral"
    ),
    "FP8 experts by tensor and token": Row(
        "vllm", group(weights={"strategy": "tensor"}), "experts", "by channel and token", recipe="fp8", model="mixtral"
    ),
    "experts without scheme": Row(
        "vllm", group(weights={"symmetric": False}), "experts", "no scheme for experts", model="mixtral"
    ),
    "head size of a cache": Row(
        "vllm", both(kv_cache(), key(head_dim=80)), "kv_cache_scheme", "32 divides", severity="warning", hardware=CPUS
    ),
    "no number of heads": Row(
        "vllm", key(num_attention_heads=None), "config.json", "says no number of heads", severity="note", parallel=2
    ),
}
VLLM["a head that is named"] = Row(
    "vllm",
    both(group(targets=["Linear", "lm_head"]), config(lambda c: c["ignore"].remove("lm_head"))),
    "lm_head.weight",
    "where int8",
)
SGLANG = {
    "a broken regex": Row("sglang", ignored("re:("), "ignore", "no regular expression"),
    "an expert's tensor": Row(
        "sglang", without(f"{EXPERT}.weight_scale"), EXPERT, "isn't stored", recipe="fp8", model="mixtral"
    ),
    "a head by block": Row(
        "sglang",
        both(
            coded_layer("lm_head"),
            group(targets=["Linear", "lm_head"]),
            config(lambda c: c["ignore"].remove("lm_head")),
        ),
        "lm_head",
        "by block",
        recipe="fp8-block",
    ),
    "unknown argument": Row("sglang", group(weights={"observed": 1}), "weights.observed", "unknown keys are rejected"),
    "unknown method": Row(
        "sglang", config(lambda c: c.update(quant_method="mine")), "quant_method", "no quantization method"
    ),
    "sparsity": Row(
        "sglang",
        config(
            lambda c: c.update(sparsity_config={"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"]})
        ),
        "sparsity_config",
        "2:4",
    ),
    "cache scheme": Row("sglang", kv_cache(dynamic=True), "kv_cache_scheme", "leaves it in float", severity="warning"),
    "group needs weights": Row("sglang", group(weights=None), "group_0", "needs weights"),
    "foreign scheme": Row(
        "sglang", group(weights={"num_bits": 4, "type": "float"}), "group_0", "not checked", severity="warning"
    ),
    "packed format": Row("sglang", group(format="int-quantized"), "group_0", "are packed", recipe="int8"),
    "marlin groups": Row(
        "sglang", group(weights={"group_size": 16}), "group_0", "groups of 32, 64 or 128", recipe="int8-g128"
    ),
    "format": Row("sglang", group(format="dense"), "group_0", "no scheme"),
    "no scheme": Row("sglang", group(input_activations={"strategy": "tensor"}), "group_0", "no scheme"),
    "nothing names a layer": Row("sglang", group(targets=["re:.*self_attn.*"]), DOWN, "no target names it"),
    "fused members ignored apart": Row("sglang", ignored(Q), Q, "ignore names only q_proj"),
    "fused by the end of a name": Row("sglang", ignored("self_attn.q_proj"), Q, "ignore names only q_proj"),
    "codes where ignored": Row("sglang", ignored(DOWN), DOWN, "leaves this layer in float"),
    "missing scale": Row("sglang", without(f"{DOWN}.weight_scale"), f"{DOWN}.weight_scale", "isn't stored"),
    "experts differ": Row("sglang", ignored(EXPERT), "experts", "same scheme", recipe="fp8", model="mixtral"),
    "experts without scheme": Row(
        "sglang", group(input_activations=None), "experts", "no scheme for experts", recipe="fp8", model="mixtral"
    ),
    "the head by its class": Row(
        "sglang",
        both(coded_layer("lm_head"), config(lambda c: c["ignore"].remove("lm_head"))),
        "lm_head",
        "only where a target names it",
    ),
    "an ignored head": Row("sglang", both(coded_layer("lm_head"), ignored("lm_head")), "lm_head", "ignore leaves it"),
    "heads over GPUs": Row(
        "sglang", key(num_attention_heads=6), "num_attention_heads", "don't divide by 4", parallel=4
    ),
    "unknown model": Row("sglang", key(model_type="none"), "config.json", "weren't checked", severity="note"),
}
TRANSFORMERS = {
    "a broken regex": Row("transformers", ignored("re:("), "ignore", "no regular expression"),
    "an expert's tensor": Row(
        "transformers", without(f"{EXPERT}.weight_scale"), EXPERT, "isn't stored", recipe="fp8", model="mixtral"
    ),
    "experts of the group that speaks of them": Row(
        "transformers", two_groups("re:.*experts.*"), EXPERT, "where [1] or", recipe="fp8", model="mixtral"
    ),
    "unknown argument": Row(
        "transformers", group(weights={"observed": 1}), "weights.observed", "unknown keys are rejected"
    ),
    "unknown key of a group": Row("transformers", group(extra=1), "group_0.extra", "unknown keys are rejected"),
    "unknown format": Row("transformers", group(format="mine"), "group_0.format", "no format"),
    "static by token": Row(
        "transformers", group(input_activations={"dynamic": False}), "input_activations.dynamic", "by token are dynamic"
    ),
    "activations by channel": Row(
        "transformers",
        group(input_activations={"strategy": "channel", "dynamic": False}),
        "input_activations.strategy",
        "can't be quantized by channel",
    ),
    "unknown method": Row(
        "transformers", config(lambda c: c.update(quant_method="mine")), "quant_method", "only warns"
    ),
    "status": Row(
        "transformers", config(lambda c: c.update(quantization_status="frozen")), "quantization_status", "'frozen'"
    ),
    "sparse tensors": Row("transformers", extra(f"{DOWN}.bitmask", 4, 4, dtype=torch.uint8), "sparsity_config", "2:4"),
    "asymmetric": Row("transformers", group(weights={"symmetric": False}), "group_0", "asymmetric", recipe="int8"),
    "missing scale": Row("transformers", without(f"{DOWN}.weight_scale"), f"{DOWN}.weight_scale", "isn't stored"),
    "extra tensor": Row(
        "transformers", extra(f"{DOWN}.weight_g_idx", 256), "weight_g_idx", "no such tensor", severity="warning"
    ),
    "the head isn't ignored": Row(
        "transformers", config(lambda c: c["ignore"].remove("lm_head")), "lm_head.weight", "float32 where int8"
    ),
    "codes where ignored": Row("transformers", ignored(DOWN), DOWN, "leaves this layer in float"),
    "codes that nothing names": Row(
        "transformers", group(targets=["re:.*self_attn.*"]), DOWN, "leaves this layer in float"
    ),
    "blocks that don't divide": Row(
        "transformers", group(weights={"block_structure": [128, 96]}), DOWN, "don't divide by 96", recipe="fp8-block"
    ),
    "experts in part": Row(
        "transformers", float_layer(EXPERT), "experts", "some experts are in float", recipe="fp8", model="mixtral"
    ),
    "skipped modules": Row(
        "transformers",
        config(lambda c: c["llm_int8_skip_modules"].append(DOWN)),
        DOWN,
        "leaves this layer in float",
        recipe="llm-int8",
    ),
    "modules not skipped": Row(
        "transformers", config(lambda c: c.update(llm_int8_skip_modules=["none"])), "lm_head", "SCB", recipe="llm-int8"
    ),
    "four bits of bitsandbytes": Row(
        "transformers",
        config(lambda c: c.update(load_in_8bit=False)),
        "quantization_config",
        "not checked",
        recipe="llm-int8",
        severity="warning",
    ),
    "unknown model": Row("transformers", key(model_type="none"), "config.json", "cannot build"),
    "unused tensors": Row("transformers", extra("model.left.over", 3), "model.left.over", "left out", severity="note"),
}
ROWS = {f"{row.server}-{name}": row for table in (VLLM, SGLANG, TRANSFORMERS) for name, row in table.items()}


def matching(verdict: Verdict, row: Row) -> list[Finding]:
    return [
        finding
        for finding in verdict.findings
        if finding.severity == row.severity and row.says in finding.rule and any(row.where in w for w in finding.where)
    ]


@pytest.mark.parametrize("name", ROWS)
def test_a_rule_that_is_broken_is_named(compressed, tmp_path, name):
    """The checkpoint that keeps it says nothing of it, and is served but for limits of hardware."""
    row = ROWS[name]
    source = compressed(row.recipe, row.model, row.form)
    good = check(source, row.server, tensor_parallel=row.parallel)
    assert matching(good, row) == []
    folder = models.copy(source, tmp_path / "model")
    row.change(folder)
    bad = check(folder, row.server, tensor_parallel=row.parallel)
    found = matching(bad, row)
    assert found, bad.to_text()
    assert all(finding.source and finding.hardware == row.hardware for finding in found)
    if row.severity == "error":
        assert bad.state == "refused"
        assert good.state == "served" or "mixtral" in row.model or row.recipe == "fp8-block"
        assert not row.hardware


def reads(folder: Path, module: str, weight: torch.Tensor) -> bool:
    """Whether plain transformers loads a folder, runs it, and gets this weight for a module, with nothing reported."""
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        scale = getattr(getattr(model.get_submodule(module), "weight", None), "SCB", None)  # bitsandbytes
        with torch.inference_mode():
            model(torch.arange(8)[None])  # compressed-tensors decodes at the first forward pass
        found = model.get_submodule(module).weight
        found = found if scale is None else found * (scale / 127)[:, None]
    except Exception:  # whatever a broken checkpoint does to transformers
        return False
    return not any(info.values()) and torch.allclose(found, weight, rtol=1e-5, atol=0)


LOADED = [
    name
    for name, row in ROWS.items()
    if row.server == "transformers" and row.severity == "error" and row.model == "llama"
]


@pytest.mark.parametrize("name", LOADED)
def test_transformers_stumbles_over_what_breaks_its_rules(compressed, tmp_path, name):
    """The copy isn't read as the original is: an error, something reported, or another weight."""
    row = ROWS[name]
    package = "bitsandbytes" if row.recipe == "llm-int8" else "compressed_tensors"
    pytest.importorskip(package, reason="install the extra `oracles`")
    source = compressed(row.recipe, row.model, row.form)
    weight = quantkit_weight(source)
    assert reads(source, DOWN, weight)
    folder = models.copy(source, tmp_path / "model")
    row.change(folder)
    assert not reads(folder, DOWN, weight)


def quantkit_weight(folder: Path) -> torch.Tensor:
    """The decoded weight of DOWN."""
    import quantkit

    layer = quantkit.load(folder).get_submodule(DOWN)
    return dequantize_weight(*layer.codes_and_scale(), layer.scheme.weight_granularity)
