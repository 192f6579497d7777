"""Mixtures of experts from a float folder to logits: what lies on disk, what lies in memory, and what comes out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixtures
import models
import pytest
import torch
from papers import Rounded, agree, relative, rounded_weight
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from quantkit import load, quantize
from quantkit.experts import QuantizedExperts
from quantkit.modules import QuantizedLinear

NAMES = ("mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3")
RECIPES = {
    "w8a8": ("w8a8", "auto"),
    "int8": ("int8", "auto"),
    "fp8": ("fp8", "auto"),
    "llm-int8": ("llm-int8", "quantkit"),
}
EXPERTS, LAYERS = 4, 2
IN_OUT = ("gpt_oss",)
"""Models whose parameters hold K before N."""
FUSED = ("gpt_oss",)
"""Models with all experts in one tensor on disk."""
IDS = torch.randint(32, 250, (1, 6), generator=torch.Generator().manual_seed(0))


def outlying(model: PreTrainedModel) -> PreTrainedModel:
    """The model with one channel behind each norm that is far larger than others."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name and "a_layernorm" not in name:
                parameter[3] = 12.0
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = models.save(outlying(mixtures.build(name)), tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path]
) -> Callable[[str, str], tuple[Path, Any]]:
    done: dict[tuple[str, str], tuple[Path, Any]] = {}

    def run(name: str, recipe: str) -> tuple[Path, Any]:
        if (name, recipe) not in done:
            step, form = RECIPES[recipe]
            folder = tmp_path_factory.mktemp("compressed") / f"{name}-{recipe}"
            done[name, recipe] = folder, quantize(source(name), folder, steps=[step], format=form, progress=False)
        return done[name, recipe]

    return run


def packed_parameters(name: str, model: nn.Module) -> dict[str, int]:
    """The model's parameters that hold experts, with the axis of their in features."""
    return {
        key: 1 if name in IN_OUT else 2
        for key, parameter in model.named_parameters()
        if parameter.ndim == 3 and parameter.shape[0] == EXPERTS
    }


def reference(name: str, folder: Path, recipe: str) -> tuple[PreTrainedModel, list[Tensor]]:
    """The float model in float64 with weights rounded by hand, and those weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").double()
    weights = []
    with torch.no_grad():
        for key, axis in packed_parameters(name, model).items():
            weights.append((model.get_parameter(key), axis))
        for key, module in model.named_modules():
            if isinstance(module, nn.Linear) and key != "lm_head":
                weights.append((module.weight, 1))
        for weight, axis in weights:
            weight.copy_(rounded_weight(weight, recipe, axis))
    return model.eval(), [weight for weight, _ in weights]


def logits_of(model: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(IDS).logits
    return logits


LOST = {"w8a8": 0.045, "int8": 0.03, "fp8": 0.15, "llm-int8": 0.05}
"""What eight bits may cost; seen are at most 0.035, 0.021, 0.111 and 0.036."""


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_papers_equations(
    name: str, recipe: str, source: Callable[[str], Path], made: Callable[[str, str], tuple[Path, Any]]
) -> None:
    folder, report = made(name, recipe)
    model, weights = reference(name, source(name), recipe)
    with Rounded(recipe, weights) as mode:
        expected = logits_of(model)
    assert bool(mode.products) == (recipe != "int8")
    assert bool(mode.outliers) == (recipe == "llm-int8")
    ours = logits_of(load(folder))
    floats = logits_of(AutoModelForCausalLM.from_pretrained(source(name)))
    assert agree(ours, expected, floats, recipe)
    assert 1e-3 < relative(ours, floats) < LOST[recipe]
    assert not report.notes


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_on_disk_each_expert_is_a_layer_and_nothing_is_lost(
    name: str, recipe: str, source: Callable[[str], Path], made: Callable[[str, str], tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, report = made(name, recipe)
    before, after = models.read_tensors(source(name)), models.read_tensors(folder)
    matrices = {key for key, value in before.items() if value.ndim > 1}
    left = {item.module for item in report.left_alone}
    layers = {layer.module for layer in report.layers}
    assert not layers & left
    apart = set()
    for key in matrices:
        stem = key.removesuffix(".weight")
        if before[key].ndim == 3:
            owner, _, leaf = key.rpartition(".")
            assert name in FUSED
            assert key not in after
            apart |= {f"{owner}.{expert}.{leaf}" for expert in range(EXPERTS)}
        elif f"{stem}.weight_scale" in after:
            apart.add(stem)
        else:
            assert models.same(before[key], after[key])
    assert layers == apart
    assert report.format == ("quantkit" if name in FUSED or recipe == "llm-int8" else "compressed-tensors")
    experts = [layer for layer in layers if ".experts." in layer]
    assert len(experts) == EXPERTS * mixture_layers(name) * (2 if name in FUSED else 3)
    load(folder).save_pretrained(tmp_path / "again")
    again = models.read_tensors(tmp_path / "again")
    assert again.keys() == after.keys()
    assert all(models.same(value, again[key]) for key, value in after.items())


def mixture_layers(name: str) -> int:
    return LAYERS - 1 if name == "deepseek_v3" else LAYERS


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_in_memory_no_tensor_holds_all_experts_in_float(
    name: str, recipe: str, made: Callable[[str, str], tuple[Path, Any]]
) -> None:
    """Nothing that a forward pass allocates is larger than one expert in float32, while a parameter holds four."""
    model = load(made(name, recipe)[0])
    assert not packed_parameters(name, model)
    held = {key: module for key, module in model.named_modules() if isinstance(module, QuantizedExperts)}
    assert len(held) == 2 * mixture_layers(name)
    for module in held.values():
        codes, scale = module.get_buffer("weight"), module.get_buffer("weight_scale")
        assert codes.itemsize == 1
        assert scale.numel() == EXPERTS * codes.shape[2 if name in IN_OUT else 1]
    assert {key for key, p in model.named_parameters() if p.ndim > 1 and "layers" in key} == {
        f"model.layers.{number}.mlp.{'router' if name == 'gpt_oss' else 'gate'}.weight"
        for number in range(LAYERS - mixture_layers(name), LAYERS)
    } | {key for key, p in model.named_parameters() if "bias" in key and p.ndim > 1}
    ids = IDS[:, :2]
    with torch.inference_mode():
        model(ids)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            model(ids)
    largest = max(event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
    one = 4 * max(module.get_buffer("weight")[0].numel() for module in held.values())
    assert 0 < largest <= one


USUAL = {"input_layernorm.weight", "post_attention_layernorm.weight"}
SMOOTHED = {
    "mixtral": {*USUAL, "self_attn.v_proj.weight", "mlp.experts.gate_up_proj"},
    "qwen3_moe": {*USUAL, "self_attn.v_proj.weight", "mlp.experts.gate_up_proj"},
    "gpt_oss": {*USUAL, "self_attn.v_proj.weight"},  # it adds 1 to what its up projection gives
    "deepseek_v3": {*USUAL, "self_attn.q_a_layernorm.weight", "self_attn.kv_a_layernorm.weight"}
    | {"self_attn.kv_b_proj.weight", "mlp.experts.gate_up_proj", "mlp.shared_experts.up_proj.weight"},
}
"""What is divided in the last block."""


@pytest.mark.parametrize("name", NAMES)
def test_smoothing_leaves_the_function_as_it_is(name: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and back. " * 40, encoding="utf-8")
    words: dict[str, Any] = {"dataset": str(text), "samples": 8, "seq_len": 16, "progress": False}
    report = quantize(source(name), tmp_path / "out", steps=["smoothquant"], **words)
    last = f"model.layers.{LAYERS - 1}"
    folded = {group.producer for group in report.groups if group.block == last and group.state == "folded"}
    assert folded == SMOOTHED[name]
    assert relative(logits_of(load(tmp_path / "out")), logits_of(load(source(name)))) < 1e-5
    before, after = models.read_tensors(source(name)), models.read_tensors(tmp_path / "out")
    assert {key: (value.shape, value.dtype) for key, value in before.items()} == {
        key: (value.shape, value.dtype) for key, value in after.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_it_generates(name: str, made: Callable[[str, str], tuple[Path, Any]]) -> None:
    """Greedily, with a cache, as without one."""
    model = load(made(name, "w8a8")[0])
    cached = model.generate(IDS, max_new_tokens=6, do_sample=False)
    plain = model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False)
    assert cached.shape[1] == IDS.shape[1] + 6 or int(cached[0, -1]) == 256
    assert torch.equal(cached, plain)


def test_groups_of_128(tmp_path: Path) -> None:
    sizes = mixtures.SIZES | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}
    folder = models.save(models.randomized(AutoModelForCausalLM.from_config(MixtralConfig(**sizes))), tmp_path / "m")
    report = quantize(folder, tmp_path / "out", steps=["int8:group=128"], progress=False)
    assert report.format == "compressed-tensors"
    assert len(report.layers) == LAYERS * (4 + 3 * EXPERTS)
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 3 or key.endswith("_proj.weight"):
                parameter.copy_(rounded_weight(parameter, "int8", -1, 128))
    assert relative(logits_of(load(tmp_path / "out")), logits_of(model)) < 1e-5
    for layer in load(tmp_path / "out").modules():
        if isinstance(layer, QuantizedExperts):
            assert layer.get_buffer("weight_scale").shape[-1] == layer.get_buffer("weight").shape[-1] // 128
        elif isinstance(layer, QuantizedLinear):
            assert layer.get_buffer("weight_scale").shape[1] == layer.in_features // 128


def test_what_experts_cannot_have_is_said(source: Callable[[str], Path], tmp_path: Path) -> None:
    """Blocks and static scales are for plain layers; bitsandbytes has no experts."""
    report = quantize(source("mixtral"), tmp_path / "bnb", steps=["llm-int8"], progress=False)
    experts = {item.module: item.reason for item in report.left_alone if ".experts." in item.module}
    assert len(experts) == 2 * LAYERS
    assert all("bitsandbytes has no quantized experts" in reason for reason in experts.values())
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and back. " * 40, encoding="utf-8")
    words: dict[str, Any] = {"dataset": str(text), "samples": 4, "seq_len": 16, "progress": False}
    report = quantize(source("qwen3_moe"), tmp_path / "static", steps=["fp8:scheme=static"], **words)
    experts = {item.module: item.reason for item in report.left_alone if ".experts." in item.module}
    assert len(experts) == 2 * LAYERS
    assert all("scales by row" in reason for reason in experts.values())
    assert len(report.layers) == 4 * LAYERS
    assert relative(logits_of(load(tmp_path / "static")), logits_of(load(source("qwen3_moe")))) < 0.2
