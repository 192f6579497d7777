import copy
import json

import mixtures
import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, HrmTextConfig

from quantkit import formats, load
from quantkit.errors import CheckpointError, RecipeError
from quantkit.experts import QuantizedExperts, quantized_experts
from quantkit.modules import QuantizedLinear, quantize_linear
from quantkit.pieces import compress_expert, expert_specs
from quantkit.scheme import Scheme

IDS = torch.arange(20).view(2, 10) * 7 % 256
E4M3 = "float8_e4m3fn"
INT8, W8A8 = Scheme("int8"), Scheme("int8", activation_dtype="int8")
FP8, FP8_ONLY, E5M2 = Scheme(E4M3, activation_dtype=E4M3), Scheme(E4M3), Scheme("float8_e5m2")
CASES = [("mixtral", scheme, "auto") for scheme in (INT8, W8A8, FP8, FP8_ONLY, E5M2, Scheme("int8", 16))]
CASES += [
    ("mixtral", scheme, "quantkit") for scheme in (INT8, FP8, Scheme("int8", activation_dtype="int8", threshold=6.0))
]
CASES += [(name, scheme, "quantkit") for name in mixtures.FUSED for scheme in (INT8, FP8)]
CASES += [("qwen3_moe", W8A8, "auto"), ("deepseek_v3", FP8, "auto"), ("deepseek_v3", INT8, "auto")]


def label(case):
    return f"{case[0]}-{case[1].label}-{case[2]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a quantized mixture, written by hand, and the float model. Not to be changed."""
    made = {}

    def make(name="mixtral", scheme=W8A8, form="auto"):
        if (name, scheme, form) not in made:
            model = mixtures.build(name)
            path = tmp_path_factory.mktemp("mixture") / name
            made[name, scheme, form] = (mixtures.write(name, model, path, scheme, form), model)
        return made[name, scheme, form]

    return make


@pytest.mark.parametrize("case", CASES, ids=label)
def test_what_is_loaded_is_what_would_be_in_memory(folder, case):
    """Bit for bit: each row is quantized by itself, wherever the experts are merged."""
    name, scheme, _ = case
    path, model = folder(*case)
    made, expected = load(path), mixtures.quantized(name, model, scheme)
    packed = dict(quantized_experts(made))
    assert packed.keys() == dict(quantized_experts(expected)).keys() != set()
    for parameter, ours in quantized_experts(expected):
        assert packed[parameter].in_axis == ours.in_axis
        assert packed[parameter].scheme.label == scheme.label
        assert all(models.same(value, ours.get_buffer(leaf)) for leaf, value in packed[parameter].named_buffers())
    with torch.no_grad():
        assert torch.equal(made(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_what_is_saved_again_is_what_was_loaded(folder, tmp_path, case):
    path, _ = folder(*case)
    made = load(path)
    for model, again in ((made, tmp_path / "again"), (copy.deepcopy(made), tmp_path / "copy")):
        model.save_pretrained(again)
        before, after = models.read_tensors(path), models.read_tensors(again)
        assert after.keys() == before.keys()
        assert all(models.same(tensor, before[key]) for key, tensor in after.items())
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(IDS).logits, made(IDS).logits)


def test_a_model_is_saved_in_shards_and_loaded_from_them(folder, tmp_path):
    made = load(folder()[0])
    made.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 3
    assert torch.equal(load(tmp_path / "again")(IDS).logits, made(IDS).logits)


def test_transformers_loads_our_own_format(folder):
    path, _ = folder("gpt_oss", INT8, "quantkit")
    made = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    packed = [module for module in made.modules() if isinstance(module, QuantizedExperts)]
    assert len(packed) == 4
    assert {each.get_buffer("weight_scale").dtype for each in packed} == {torch.float32}
    assert {each.dtype for each in packed} == {torch.bfloat16}
    assert made(IDS).logits.dtype == torch.bfloat16


def test_a_model_generates(folder):
    out = load(folder()[0]).generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape == (2, 13)


def test_a_loaded_model_can_be_pickled_and_saved(folder, tmp_path):
    path, _ = folder()
    torch.save(load(path), tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False).save_pretrained(tmp_path / "again")
    before, after = models.read_tensors(path), models.read_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(models.same(tensor, before[key]) for key, tensor in after.items())


def changed(source, target, change):
    return models.change_tensors(models.copy(source, target), change)


def test_experts_of_one_block_can_stay_in_float(folder, tmp_path):
    path, model = folder()
    model.save_pretrained(tmp_path / "float")
    plain = load_file(tmp_path / "float" / "model.safetensors")
    ours = ".layers.0.block_sparse_moe.experts."

    def mix(tensors):
        return {k: v for k, v in tensors.items() if ours not in k} | {k: v for k, v in plain.items() if ours in k}

    mixed = changed(path, tmp_path / "mixed", mix)
    made = load(mixed)
    assert {name.split(".")[2] for name, _ in quantized_experts(made)} == {"1"}
    made.save_pretrained(tmp_path / "again")
    before, after = models.read_tensors(mixed), models.read_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(models.same(tensor, before[key]) for key, tensor in after.items())


# Static activations, and a scale for all of a weight, as others write them


def by_tensor(tensors, seed=0):
    """FP8 experts with one scale each, and one for the activations of gate and up, and of down."""
    found = dict(tensors)
    for key, value in tensors.items():
        if key.endswith("weight_scale"):
            prefix = key.removesuffix("weight_scale")
            expert, part = prefix.split(".")[-3:-1]
            found[key] = value[:1, 0].contiguous()
            found[prefix + "input_scale"] = torch.tensor([0.01 * (1 + int(expert)) + 0.005 * (part == "w2")])
    return found


@pytest.fixture
def static(folder, tmp_path):
    path = changed(folder(scheme=FP8)[0], tmp_path / "static", by_tensor)
    scheme = Scheme(E4M3, None, E4M3, weight_granularity="tensor", activation="tensor-static")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    return models.change_config(
        path, quantization_config=formats.compressed_tensors.config(scheme, [], config["ignore"])
    )


def test_static_scales_of_experts_are_loaded_and_saved(static, tmp_path):
    made, tensors = load(static), models.read_tensors(static)
    packed = made.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(packed.get_buffer("input_scale"), torch.tensor([0.01, 0.02, 0.03, 0.04]))
    prefix = "model.layers.0.block_sparse_moe.experts.2"
    rows = packed.get_buffer("weight_scale")[2].view(2, -1)
    expected = torch.stack([tensors[f"{prefix}.{part}.weight_scale"] for part in ("w1", "w3")])
    assert torch.equal(rows, expected.expand_as(rows))
    assert bool(torch.isfinite(made(IDS).logits).all())
    made.save_pretrained(tmp_path / "again")
    after = models.read_tensors(tmp_path / "again")
    assert after.keys() == tensors.keys()
    assert all(models.same(tensor, tensors[key]) for key, tensor in after.items())


def test_activations_of_gate_and_up_must_have_one_scale(static):
    key = "model.layers.0.block_sparse_moe.experts.2.w3.input_scale"
    models.change_tensors(static, lambda tensors: tensors | {key: torch.tensor([0.5])})
    with pytest.raises(CheckpointError, match=r"layers\.0.*different scales of the same activations"):
        load(static)


# Layers that are split or merged while a checkpoint is loaded


@pytest.mark.parametrize("scheme", [INT8, W8A8, FP8, E5M2], ids=lambda scheme: scheme.label)
def test_a_layer_that_is_split_while_it_is_loaded_keeps_its_rows(tmp_path, scheme):
    """HRM stores q, k, v and a gate in one weight: the packed parts decode to the parts of the decoded weight."""
    sizes = {key: mixtures.SIZES[key] for key in mixtures.SIZES if "expert" not in key and key != "head_dim"}
    model = models.randomized(AutoModelForCausalLM.from_config(HrmTextConfig(**sizes, head_dim=16)))
    model.save_pretrained(tmp_path / "model")
    layout, tensors = formats.choose(scheme), {}
    for key, value in load_file(tmp_path / "model" / "model.safetensors").items():
        if key.endswith(("gqkv_proj.weight", "gate_up_proj.weight")):
            stored = layout.compress(scheme, *quantize_linear(value, scheme))
            tensors |= {key.removesuffix("weight") + leaf: each for leaf, each in stored.items()}
        else:
            tensors[key] = value
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    split = ("self_attn.q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = layout.config(
        scheme, [n for n in linears if n.endswith(split)], [n for n in linears if not n.endswith(split)]
    )
    models.change_config(tmp_path / "model", quantization_config=config)
    made = load(tmp_path / "model")
    layers = {name: module for name, module in made.named_modules() if isinstance(module, QuantizedLinear)}
    assert layers.keys() == {name for name in linears if name.endswith(split)}
    for name, layer in layers.items():
        codes, scale = quantize_linear(model.get_submodule(name).weight.detach(), scheme)
        ours, its_scale = layer.codes_and_scale()
        assert torch.equal(ours.float(), codes.float())
        assert torch.equal(its_scale, scale)
    made.save_pretrained(tmp_path / "again")
    after = models.read_tensors(tmp_path / "again")
    assert after.keys() == tensors.keys()
    assert all(models.same(tensor, tensors[key]) for key, tensor in after.items())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scheme", [INT8, FP8, E5M2, Scheme("int8", 16)], ids=lambda scheme: scheme.label)
def test_an_expert_is_stored_as_it_is_said(scheme, transposed):
    """In the parameter's own layout: the scale's shape says which, also where both axes are equally long."""
    codes, scale = quantize_linear(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)), scheme)
    layout, size = formats.native, (32, 32, torch.float32)
    if transposed and scheme.group_size is not None:
        with pytest.raises(RecipeError, match="no groups of 16"):
            expert_specs(layout, scheme, *size, transposed)
        return
    stored, specs = (
        compress_expert(layout, scheme, codes, scale, transposed),
        expert_specs(layout, scheme, *size, transposed),
    )
    assert {leaf: (tuple(t.shape), t.dtype) for leaf, t in stored.items()} == {
        leaf: (spec.shape, spec.dtype) for leaf, spec in specs.items()
    }
    assert stored["weight_scale"].shape == ((1, 32) if transposed else scale.shape)
    words = stored["weight"].view(codes.dtype)
    assert torch.equal(words.float(), (codes.t() if transposed else codes).float())


# What is refused

EXPERT = "model.layers.1.block_sparse_moe.experts.2"


def without(key):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key}


@pytest.mark.parametrize(
    ("scheme", "leaf"),
    [(W8A8, "w1.weight_scale"), (W8A8, "w2.weight"), (INT8, "w3.weight_packed"), (INT8, "w3.weight_shape")],
)
def test_a_missing_tensor_is_refused_by_name(folder, tmp_path, scheme, leaf):
    path = changed(folder(scheme=scheme)[0], tmp_path / "model", without(f"{EXPERT}.{leaf}"))
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert f"{EXPERT}.{leaf}" in str(error.value)
    assert "missing" in str(error.value)


def test_a_missing_expert_is_refused(folder, tmp_path):
    path = changed(folder()[0], tmp_path / "model", lambda t: {k: v for k, v in t.items() if f"{EXPERT}." not in k})
    with pytest.raises(CheckpointError, match=r"experts\.\w+' is \[4, .* in the model.* make \[3, "):
        load(path)


def test_a_missing_bias_of_experts_is_refused_by_name(folder, tmp_path):
    """What is missing is drawn by the model's own code before it is refused: that passes packed experts by."""
    key = "model.layers.1.mlp.experts.gate_up_proj_bias"
    path = changed(folder("gpt_oss", INT8, "quantkit")[0], tmp_path / "model", without(key))
    with pytest.raises(CheckpointError, match=f"missing keys, {key}"):
        load(path)


@pytest.mark.parametrize("leaf", ["weight_zero_point", "weight_g_idx", "input_scale"])
def test_a_tensor_that_the_scheme_does_not_know_is_refused(folder, tmp_path, leaf):
    extra = {f"{EXPERT}.w1.{leaf}": torch.ones(1)}
    path = changed(folder()[0], tmp_path / "model", lambda tensors: tensors | extra)
    with pytest.raises(CheckpointError, match=rf"{EXPERT}\.w1\.{leaf}' is not part of the scheme"):
        load(path)


@pytest.mark.parametrize(
    ("leaf", "change"),
    [
        ("w1.weight", lambda t: t[:, 1:]),
        ("w2.weight", lambda t: t[1:]),
        ("w2.weight_scale", lambda t: t[1:]),
        ("w2.weight_scale", lambda t: t.view(-1)),
        ("w1.weight", lambda t: t.float()),
        ("w1.weight", lambda t: t.to(torch.float8_e4m3fn)),
        ("w1.weight_scale", lambda t: t.int()),
    ],
)
def test_a_tensor_of_another_shape_or_dtype_is_refused(folder, tmp_path, leaf, change):
    key = f"{EXPERT}.{leaf}"
    path = changed(folder()[0], tmp_path / "model", lambda t: t | {key: change(t[key]).contiguous()})
    with pytest.raises(CheckpointError, match=r"layers\.1\."):
        load(path)


def test_rows_that_lack_in_all_experts_are_refused(folder, tmp_path):
    def change(tensors):
        cut = [key for key in tensors if ".layers.1." in key and ".w1." in key]
        return tensors | {key: tensors[key][1:].contiguous() for key in cut}

    with pytest.raises(CheckpointError, match=r"gate_up_proj' is \[4, 96, 32\] in the model.* make \[4, 95, 32\]"):
        load(changed(folder()[0], tmp_path / "model", change))


@pytest.mark.parametrize("form", ["auto", "quantkit"])
def test_experts_that_the_config_forgets_are_refused(folder, tmp_path, form):
    """Else their codes would run as weights."""
    path = models.copy(folder(form=form)[0], tmp_path / "model")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    if form == "auto":
        config["ignore"].append("re:.*experts.*")
    else:
        config["groups"][0]["modules"] = ["model.layers.0.self_attn.q_proj"]
    models.change_config(path, quantization_config=config)
    with pytest.raises(CheckpointError, match="gives no scheme"):
        load(path)


def test_quantized_experts_without_a_config_are_refused(folder, tmp_path):
    path = models.copy(folder()[0], tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1\.weight_scale.*is not part of the scheme"):
        load(path)
