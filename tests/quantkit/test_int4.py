"""The step int4 from a model to its logits: plans, formats, kinds of layers, and what it costs."""

import json

import models
import pytest
import torch
from quantkit_kernels import cpu_int4
from quantkit_kernels.errors import KernelError
from quantkit_kernels.formats import dequantize

import quantkit
from quantkit import formats
from quantkit.checkpoint import Hub, open_folder, read_config
from quantkit.demo import model_path
from quantkit.errors import RecipeError
from quantkit.experts import quantized_experts
from quantkit.modules import QuantizedLinear, keep_decoded
from quantkit.planning import make_plan
from quantkit.recipe import Recipe, Step
from quantkit.servers import check

IDS = torch.arange(10)[None] * 7 % 256
CHANNEL = "int4:group=channel"


def plan(source, *steps, layout="auto", **patterns):
    return make_plan(source, Recipe.of(steps, **patterns), layout)


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def quantized(folder, out, *steps, **options):
    quantkit.quantize(folder, out, steps=list(steps), progress=False, **options)
    return quantkit.load(out)


def test_groups_of_128_and_least_squares_are_the_defaults():
    assert str(Step.parse("int4")) == "int4:group=128,weight_range=mse"
    assert Recipe.of("int4").scheme == Recipe.of("int4:group=128").scheme
    with pytest.raises(RecipeError, match=r"group=128\|channel"):
        Step.parse("int4:group=64")


def test_in_features_that_128_does_not_divide_are_refused_by_name(model_folder):
    source = open_folder(model_folder("llama_odd"), Hub())
    with pytest.raises(RecipeError, match="group size 128 does not divide") as caught:
        plan(source, "int4")
    assert "model.layers.0.mlp.down_proj (51)" in str(caught.value)
    assert "group=channel" in str(caught.value)
    assert plan(source, CHANNEL).layout is formats.compressed_tensors
    some = plan(open_folder(model_folder("llama"), Hub()), "int4", include=["*.down_proj"])
    assert {target.in_features % 128 for target in some.targets.values()} == {0}


def test_experts_in_x_out_have_no_groups_and_stay_in_float_with_the_reason(tiny_source):
    ignored = [f"*{leaf}_proj" for leaf in "qkvo"]
    with pytest.raises(RecipeError, match="no groups; use group=channel"):
        plan(tiny_source("gpt_oss"), "int4", ignore=ignored)


@pytest.mark.parametrize("form", ["bitsandbytes", "compressed-tensors"])
def test_other_formats_say_what_they_cannot_hold(model_folder, form):
    source = open_folder(model_folder("gpt_oss"), Hub())
    if form == "bitsandbytes":
        with pytest.raises(RecipeError, match=r"LLM\.int8 alone"):
            plan(source, CHANNEL, layout=form)
        return
    made = plan(source, CHANNEL, layout=form)
    reasons = {item.module: item.reason for item in made.left}
    assert "--format quantkit" in reasons["model.layers.0.mlp.experts.down_proj"]


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss"])
def test_conv1d_and_experts_in_one_tensor_are_quantkits_own_in_version_3(model_folder, tmp_path, name):
    model = quantized(model_folder(name), tmp_path / "out", CHANNEL)
    stored = read_config(tmp_path / "out")["quantization_config"]
    assert (stored["quant_method"], stored["version"]) == ("quantkit", 3)
    tensors, exact = models.read_tensors(tmp_path / "out"), quantkit.load(model_folder(name))
    for path, layer in layers_of(model).items():
        assert layer.op == "linear_weight_only_packed"
        assert tensors[f"{path}.weight"].shape == (layer.out_features, -(-layer.in_features // 8))
        weight = exact.get_submodule(path).weight
        assert apart(dequantize(*layer.codes_and_scale()), weight.t() if layer.transposed else weight) < 0.2
    for path, experts in quantized_experts(model):
        decoded = experts.get_buffer("weight").float() * experts.get_buffer("weight_scale").float()
        assert apart(decoded, exact.get_parameter(path)) < 0.2
    assert sum(1 for _ in quantized_experts(model)) == (4 if name == "gpt_oss" else 0)
    assert bool(model(IDS).logits.isfinite().all())


def apart(decoded, weight):
    """How far a decoded weight is from the float one, of its norm: 4 bits by row cost some 10 %."""
    return float((decoded.float() - weight.float()).norm() / weight.float().norm())


def test_a_layer_of_one_row(tiny_folder, tmp_path):
    """Qwen2-MoE's shared expert has a gate of one out feature."""
    name = "model.layers.0.mlp.shared_expert_gate"
    model = quantized(tiny_folder("qwen2_moe"), tmp_path / "out", CHANNEL, include=[name])
    (layer,) = layers_of(model).values()
    assert layer.out_features == 1
    exact = quantkit.load(tiny_folder("qwen2_moe")).get_submodule(name)
    assert apart(dequantize(*layer.codes_and_scale()), exact.weight) < 0.2
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), torch.nn.functional.linear(x, dequantize(*layer.codes_and_scale())))


@pytest.mark.parametrize("form", ["compressed-tensors", "quantkit"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_save_and_dequantize_give_the_same_weights(model_folder, tmp_path, form, name):
    model = quantized(model_folder(name), tmp_path / "out", CHANNEL, format=form)
    model.save_pretrained(tmp_path / "again")
    before, after = models.read_tensors(tmp_path / "out"), models.read_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(models.same(before[key], after[key]) for key in before)
    quantkit.quantize(
        tmp_path / "out", tmp_path / "int8", steps=["int8"], dequantize=True, progress=False, format="quantkit"
    )
    finer = quantkit.load(tmp_path / "int8")
    for path, layer in layers_of(model).items():
        assert apart(dequantize(*finer.get_submodule(path).codes_and_scale()), dequantize(*layer.codes_and_scale())) < (
            0.01
        )


def test_a_kept_weight_gives_the_same_logits(compressed):
    model = quantkit.load(compressed("int4"))
    with torch.no_grad():
        expected = model(IDS).logits
        assert keep_decoded(model) == sum(each.in_features * each.out_features for each in layers_of(model).values())
        assert torch.allclose(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_smoothing_comes_before_it(model_folder, tmp_path, calibration):
    quantized(model_folder("llama"), tmp_path / "out", "smoothquant", "int4", **calibration)
    report = json.loads((tmp_path / "out" / "quantkit_report.json").read_text())
    assert {layer["scheme"] for layer in report["layers"]} == {"int4 g128"}
    assert any(group["state"] == "folded" for group in report["groups"])


def test_the_command_line_takes_the_demo_model_through_and_says_what_it_costs(cli, tmp_path):
    """Least squares lose less than absmax in Kullback-Leibler divergence, and both some 50 times as much as 8 bits."""
    kl = {}
    for step in ("int4", "int4:weight_range=absmax", "int8"):
        out = tmp_path / step.replace(":", "-")
        result = cli("quantize", model_path(), "-o", out, "-m", step)
        assert result.exit_code == 0, result.output
        found = quantkit.evaluate(out, "demo", baseline=model_path(), seq_len=128, max_tokens=2048, progress=False)
        kl[step] = found["kl_mean"]
    assert 0.01 < kl["int4"] < 0.9 * kl["int4:weight_range=absmax"]
    assert kl["int8"] * 20 < kl["int4"] < 0.06
    config = read_config(tmp_path / "int4")["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (config["format"], weights["num_bits"], weights["group_size"]) == ("pack-quantized", 4, 128)


@pytest.mark.parametrize(("server", "hardware"), [("vllm", "cpu"), ("vllm", "sm90"), ("sglang", "sm90")])
def test_by_their_rules_servers_take_it(compressed, server, hardware):
    """Nothing is found against the scheme or a tensor; the tiny model's sizes are no matter of 4 bits."""
    for recipe in ("int4", "int4-channel"):
        verdict = check(compressed(recipe), server, hardware)
        against = [each.rule for each in verdict.findings if each.severity in ("error", "warning")]
        assert [rule for rule in against if "features" not in rule] == []


def test_plain_transformers_takes_it_and_bits_of_8_are_what_a_cpu_of_vllm_refuses(compressed):
    assert not [each for each in check(compressed("int4"), "transformers").findings if each.severity == "error"]
    rules = [each.rule for each in check(compressed("int8"), "vllm", "cpu").findings]
    assert any("need 4 bits" in rule for rule in rules)


def layer_of(form, bias=True, rows=32, dtype=torch.bfloat16):
    """A packed layer of random codes, activations for it, and the float64 output."""
    scheme, layout = Recipe.of(CHANNEL).scheme, formats.FORMATS[form]
    made = QuantizedLinear(64, rows, scheme, layout, bias=bias, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-8, 8, (rows, 64), dtype=torch.int8, generator=generator)
    scale = (torch.rand(rows, 1, generator=generator) + 0.1).to(dtype)
    made.load_state_dict(layout.compress(scheme, codes, scale) | ({"bias": torch.ones(rows)} if bias else {}))
    x = torch.randn(3, 64, generator=generator).to(dtype)
    return made, x, x.double() @ dequantize(codes, scale.double()).t() + bias


@pytest.mark.parametrize("form", ["quantkit", "compressed-tensors"])
def test_on_a_cpu_codes_are_reordered_once_and_what_is_stored_stays(form, monkeypatch):
    made, x, exact = layer_of(form)
    before, calls, given = {k: v.clone() for k, v in made.state_dict().items()}, [], cpu_int4.repack
    monkeypatch.setattr(cpu_int4, "repack", lambda *words: calls.append(words) or given(*words))
    for _ in range(3):
        assert torch.allclose(made(x).double(), exact, rtol=2**-7, atol=1e-2)
    assert len(calls) == 1
    assert made.state_dict().keys() == before.keys()
    assert all(torch.equal(made.state_dict()[key], value) for key, value in before.items())
    with torch.no_grad():
        made.get_buffer("weight_scale").mul_(2)
    assert torch.allclose(made(x).double() - 1, 2 * (exact - 1), rtol=2**-7, atol=2e-2)
    assert len(calls) == 2


@pytest.mark.parametrize("change", [{"rows": 24}, {"dtype": torch.float32}])
def test_what_the_reordered_kernel_cannot_take_is_decoded(change, monkeypatch):
    monkeypatch.setattr(cpu_int4, "repack", lambda *_: pytest.fail("reordered"))
    made, x, exact = layer_of("quantkit", **change)
    assert torch.allclose(made(x).double(), exact, rtol=2**-7, atol=0.5)  # weights are rounded to bfloat16, too


def test_many_tokens_are_decoded_for_and_an_order_is_obeyed(monkeypatch):
    monkeypatch.setattr(cpu_int4, "repack", lambda *_: pytest.fail("reordered"))
    made, _, _ = layer_of("quantkit")
    assert made(torch.ones(cpu_int4.TOKENS + 1, 64).bfloat16()).isfinite().all()
    made.backend = "triton"
    with pytest.raises(KernelError):
        made(torch.ones(1, 64).bfloat16())
