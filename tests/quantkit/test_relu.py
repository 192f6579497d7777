"""The steps relu and activation-threshold, from recipe to reload: what is changed, where that is said, the report."""

import json

import mixtures
import models
import pytest
import torch
from quantkit_calibration.activity import Zeros
from torch import nn
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.checkpoint import Hub, open_folder
from quantkit.errors import CheckpointError, RecipeError
from quantkit.journal import Journal
from quantkit.modules import QuantizedLinear
from quantkit.pipeline import Data, calibration_data, planned, prepare
from quantkit.recipe import Recipe, Step
from quantkit.sparse_inputs import input_sparsity

IDS = torch.arange(24).view(2, 12)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def load(folder):
    return quantkit.load(folder, attention="transformers")


def change(folder, output, *steps, data=None, **more):
    return quantkit.quantize(folder, output, steps=steps, progress=False, **(data or {}), **more)


def config_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def windows_of(folder, calibration):
    data = Data(calibration["dataset"], calibration["samples"], calibration["seq_len"], None)
    return calibration_data(open_folder(folder, Hub()), folder, Recipe.of(["relu"]), data, Hub())[0]


def hooked(folder, rectify=(), replace=(), shift=0.0):
    """Transformers' own model, in which hooks have the last word on what modules of these names give."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in model.named_modules():
        if name.endswith(replace) and replace:
            module.register_forward_hook(lambda _, args, __: torch.relu(args[0] - shift))
        elif name.endswith(rectify) and rectify:
            module.register_forward_hook(lambda _, __, output: torch.relu(output))
    return model


class TestRecipes:
    @pytest.mark.parametrize("shift", ["0", "auto", "auto:0.75", "0.5", "-1", "1000"])
    def test_shifts_are_written_in_a_step(self, shift):
        step = Step.parse(f"relu:shift={shift},stage=2")
        assert step.parameters["shift"] == shift
        assert Step.parse(str(step)) == step
        assert Recipe.of([step]).observes == shift.startswith("auto")

    @pytest.mark.parametrize("shift", ["auto:", "auto:1", "auto:1.5", "1e3", "nan", "1001", "--1"])
    def test_of_other_kinds_are_refused(self, shift):
        with pytest.raises(RecipeError, match="shift="):
            Step.parse(f"relu:shift={shift}")

    def test_thresholds_need_data_and_come_after_smoothing(self, model_folder, tmp_path):
        with pytest.raises(RecipeError, match="write -m smoothquant before -m activation-threshold"):
            Recipe.of(["activation-threshold", "smoothquant"])
        with pytest.raises(RecipeError, match="needs data"):
            change(model_folder("llama"), tmp_path / "out", "activation-threshold")
        with pytest.raises(RecipeError, match="target="):
            Step.parse("activation-threshold:target=1")

    def test_a_format_that_cannot_say_it_is_refused(self, model_folder):
        with pytest.raises(RecipeError, match=r"compressed-tensors cannot say what relu:stage=2.*--format auto"):
            prepare(model_folder("llama"), steps=["relu:stage=2", "w8a8"], format="compressed-tensors")
        plan, _ = prepare(model_folder("llama"), steps=["relu", "w8a8"], format="compressed-tensors")
        assert plan.layout.NAME == "compressed-tensors"
        plan, _ = prepare(model_folder("llama"), steps=["relu:stage=2", "w8a8"])
        assert plan.layout.NAME == "quantkit"
        assert any("version 5" in note for note in plan.notes)

    @pytest.mark.parametrize(
        ("name", "step", "words"),
        [
            ("opt", "relu", "it is relu already"),
            ("gpt2", "relu:variant=drelu", "nothing is multiplied with its output"),
            ("mixtral", "relu:variant=drelu", "a module of its own"),
            ("gpt_oss", "relu", r"code of its own \(clamp\), not in a module"),
        ],
    )
    def test_a_model_with_nothing_to_change_is_refused(self, model_folder, name, step, words):
        with pytest.raises(RecipeError, match=words):
            prepare(model_folder(name), steps=[step])

    def test_patterns_leave_mlps_alone(self, model_folder, tmp_path):
        folder = model_folder("llama")
        report = change(folder, tmp_path / "out", "relu", ignore=["*.0.mlp.down_proj"])
        assert [each.module for each in report.activations] == ["model.layers.1.mlp.act_fn"]
        assert any("ignored by '*.0.mlp.down_proj'" in note for note in report.notes)
        assert config_of(tmp_path / "out")["hidden_act"] == "silu"  # a key would change both
        expected = hooked(folder, replace=("1.mlp.act_fn",))
        assert torch.equal(logits(load(tmp_path / "out")), logits(expected))


CONFIGS = {
    "llama": ("hidden_act", "mlp.act_fn"),
    "gpt2": ("activation_function", "mlp.act"),
    "mixtral": ("hidden_act", "mlp.experts.act_fn"),
    "gemma2": ("hidden_activation", "mlp.act_fn"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_stage_one_is_a_word_in_the_config_where_there_is_one(model_folder, tiny_folder, tmp_path, name):
    """Plain transformers loads it, and gives what it gives for the source with relu in the MLPs."""
    folder = model_folder(name) if name in models.BUILDERS else tiny_folder(name)
    key, module = CONFIGS[name]
    report = change(folder, tmp_path / "out", "relu")
    config = config_of(tmp_path / "out")
    assert "quantization_config" not in config
    assert {name for name, value in config.items() if value == "relu"} >= {key}
    assert report.format == "float"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = logits(hooked(folder, replace=(module,)))
    assert torch.equal(logits(theirs), expected)
    assert torch.equal(logits(load(tmp_path / "out")), expected)
    assert not torch.equal(expected, logits(AutoModelForCausalLM.from_pretrained(folder)))


def test_an_activation_that_no_key_names_is_recorded(tiny_folder, tmp_path):
    change(tiny_folder("bloom"), tmp_path / "out", "relu")
    assert config_of(tmp_path / "out")["quantization_config"]["version"] == 5
    expected = hooked(tiny_folder("bloom"), replace=("mlp.gelu_impl",))
    assert torch.equal(logits(load(tmp_path / "out")), logits(expected))


STEPS = {
    "relu:stage=2": {"replace": ("act_fn",), "rectify": ("layernorm",)},
    "relu:shift=0.25": {"replace": ("act_fn",), "shift": 0.25},
    "relu:stage=2,variant=drelu,shift=-0.5": {
        "replace": ("act_fn",),
        "rectify": ("layernorm", "up_proj"),
        "shift": -0.5,
    },
}


@pytest.mark.parametrize("step", STEPS)
def test_what_no_config_can_say_is_recorded(model_folder, tmp_path, step):
    folder, out = model_folder("llama"), tmp_path / "out"
    change(folder, out, step)
    assert config_of(out)["hidden_act"] == "silu"
    expected = logits(hooked(folder, **STEPS[step]))
    assert torch.equal(logits(load(out)), expected)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), expected)


def test_a_fused_up_projection_gets_its_drelu(tiny_folder, tmp_path):
    change(tiny_folder("phi3"), tmp_path / "out", "relu:variant=drelu")
    expected = hooked(tiny_folder("phi3"), replace=("activation_fn",), rectify=("gate_up_proj",))
    assert torch.equal(logits(load(tmp_path / "out")), logits(expected))
    with pytest.raises(RecipeError, match="no shift below 0"):
        prepare(tiny_folder("phi3"), steps=["relu:variant=drelu,shift=-1"])


def met(model, windows, name):
    """What a module of a model is given, for all windows."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=windows)
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("share", [0.6])
def test_a_shift_turns_its_share_of_every_mlp_off(model_folder, tmp_path, calibration, share):
    """In the second block, too, which is fed by the changed first one."""
    folder, out = model_folder("llama"), tmp_path / "out"
    report = change(folder, out, f"relu:shift=auto:{share}", data=calibration)
    windows, model = windows_of(folder, calibration), load(out)
    for number, each in enumerate(report.activations):
        given = met(model, windows, f"model.layers.{number}.mlp.act_fn")
        assert float((given <= each.value).float().mean()) == pytest.approx(share, abs=0.005)
    assert [layer.after["1"] for layer in report.sparsity if "down_proj" in layer.module] == pytest.approx(
        [share, share], abs=0.005
    )


def test_a_shift_is_never_below_zero(model_folder, tmp_path, calibration):
    report = change(model_folder("llama"), tmp_path / "out", "relu:shift=auto:0.2", data=calibration)
    assert [each.value for each in report.activations] == [0.0, 0.0]


@pytest.mark.parametrize("target", [0.5])
def test_a_threshold_zeroes_its_share(model_folder, tmp_path, calibration, target):
    folder, out = model_folder("llama"), tmp_path / "out"
    report = change(folder, out, f"activation-threshold:target={target}", data=calibration)
    limits = {each.module: each.value for each in report.activations}
    assert len(limits) == 14
    model, windows = load(out), windows_of(folder, calibration)
    for number in range(2):  # what q, k and v meet isn't changed by other thresholds of their block
        name = f"model.layers.{number}.self_attn.q_proj"
        x = met(model, windows, name)
        assert float((x.abs() < limits[name]).float().mean()) == pytest.approx(target, abs=0.005)
        assert limits[name] == limits[name.replace("q_proj", "v_proj")]
    exact = AutoModelForCausalLM.from_pretrained(folder)
    for name, limit in limits.items():
        exact.get_submodule(name).register_forward_pre_hook(
            lambda _, args, t=limit: (torch.where(args[0].abs() < t, 0.0, args[0]),)
        )
    assert torch.equal(logits(model), logits(exact))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_report_counts_what_a_loop_over_the_model_counts(model_folder, tmp_path, calibration, name):
    """Zeros by hooks in the finished model, over the same windows; and the formula of what they spare."""
    folder, out = model_folder(name), tmp_path / "out"
    report = change(folder, out, "relu:stage=2", data=calibration)
    windows, model = windows_of(folder, calibration), load(out)
    layers = {layer.module: layer for layer in report.sparsity}
    linear = {name for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)}
    assert {f"model.layers.{name}" for name in linear} <= set(layers)
    for module in linear:
        told, zeros = layers[f"model.layers.{module}"], Zeros(windows.shape[1])
        zeros.update(met(model, windows, f"model.layers.{module}"))
        expected = {str(gamma): share for gamma, share in zeros.result().items()}
        assert told.after == pytest.approx(expected, abs=2e-3), module  # sums of another order turn a few signs
        assert max(told.before.values()) < 0.01
        assert told.load == 1
        assert told.shape == tuple(model.get_submodule(f"model.layers.{module}").weight.shape)
        assert told.flops == 2 * told.shape[0] * told.shape[1]
        assert told.nbytes == 4 * told.shape[0] * told.shape[1]
    if name == "mixtral":
        down = layers["model.layers.0.mlp.experts.down_proj"]
        assert down.load == 2  # experts a token
        assert set(down.after) == {"1"}
        assert down.after["1"] > 0.4
    saved = json.loads((out / "quantkit_report.json").read_text())
    spared = sum(layer.flops * layer.after["1"] for layer in report.sparsity)
    assert saved["decode"]["flops_spared"] == pytest.approx(spared)
    assert saved["decode"]["flops"] == sum(layer.flops for layer in report.sparsity)
    assert f"{spared / saved['decode']['flops']:.1%} of the blocks' linear layers" in report.to_text()
    assert "relu behind 4 norms" in (out / "README.md").read_text()


@pytest.mark.parametrize("first", [["relu:stage=2", "smoothquant"], ["smoothquant", "activation-threshold"]])
def test_a_quantizer_follows(model_folder, tmp_path, calibration, first):
    """The second block's static ranges are of what it meets in the finished model, behind the changed first one."""
    out, folder = tmp_path / "out", model_folder("llama")
    report = change(folder, out, *first, "w8a8:activation=tensor-static", data=calibration)
    model, windows = load(out), windows_of(folder, calibration)
    assert report.format == "quantkit"
    told = config_of(out)["quantization_config"]
    assert told["version"] == 5
    assert bool(told["activations"]["inputs"]) == ("activation-threshold" in first)
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        layer = model.model.layers[1].get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        largest = met(model, windows, f"model.layers.1.{name}").abs().amax()
        if name.startswith("self_attn"):  # what is before it in its block isn't quantized
            assert torch.allclose(layer.input_scale * 127, largest, rtol=1e-3), name
        else:
            assert torch.allclose(layer.input_scale * 127, largest, rtol=0.1), name
    folded = [group for group in report.groups if group.kind == "norm" and group.state == "folded"]
    assert len(folded) == 4
    assert {layer.weight_bits for layer in report.sparsity} == {8.0}


def test_pruning_sees_what_relu_leaves(model_folder, tmp_path, calibration):
    out = tmp_path / "out"
    report = change(model_folder("llama"), out, "relu:stage=2", "sparse24:criterion=wanda", "int8", data=calibration)
    assert len(report.pruned) == 14
    assert torch.isfinite(logits(load(out))).all()


class Stopped(BaseException):
    pass


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("llama", ["relu:stage=2,shift=auto", "smoothquant", "activation-threshold", "w8a8"]),
        ("mixtral", ["relu:shift=auto,stage=2", "int8"]),
    ],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(model_folder, tmp_path, calibration, monkeypatch, name, steps):
    whole = change(model_folder(name), tmp_path / "whole", *steps, data=calibration)
    commit, left = Journal.commit, [0]

    def stop(self, *arguments):
        if not left[0]:
            raise Stopped
        left[0] -= 1
        commit(self, *arguments)

    monkeypatch.setattr(Journal, "commit", stop)
    for _ in range(2):
        left[0] = 1
        with pytest.raises(Stopped):
            change(model_folder(name), tmp_path / "out", *steps, data=calibration)
    left[0] = 9
    again = change(model_folder(name), tmp_path / "out", *steps, data=calibration)
    assert again.activations == whole.activations
    assert again.sparsity == whole.sparsity
    for file in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_remote_code_with_an_activation_inline_is_refused(tmp_path):
    import unseen

    model = models.randomized(unseen.DriftForCausalLM(unseen.DriftConfig()))
    with pytest.raises(RecipeError, match=r"code of its own \(silu\), not in a module"):
        quantkit.quantize(model, tmp_path / "out", steps=["relu"], progress=False)


def test_without_data_the_report_has_no_zeros_and_the_bytes_are_the_same(model_folder, tmp_path, calibration):
    one = change(model_folder("llama"), tmp_path / "one", "relu:stage=2")
    other = change(model_folder("llama"), tmp_path / "other", "relu:stage=2", data=calibration)
    assert not one.sparsity
    assert other.sparsity
    assert one.activations == other.activations
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_a_model_in_float_that_says_something_of_its_activations_goes_on_as_any_other(
    model_folder, tmp_path, calibration
):
    """What is quantized in two runs has the bytes of what is quantized in one: ranges are of the changed block."""
    change(model_folder("llama"), tmp_path / "float", "relu:stage=2")
    steps = ["w8a8:activation=tensor-static"]
    change(tmp_path / "float", tmp_path / "two", *steps, data=calibration)
    change(model_folder("llama"), tmp_path / "one", "relu:stage=2", *steps, data=calibration)
    one, two = config_of(tmp_path / "one"), config_of(tmp_path / "two")
    assert two["quantization_config"] == one["quantization_config"]
    file = "model.safetensors"
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    with pytest.raises(RecipeError, match="cannot say what the model does to activations"):
        change(tmp_path / "float", tmp_path / "other", "w8a8", format="compressed-tensors")
    with pytest.raises(RecipeError, match="it is relu already"):
        change(tmp_path / "float", tmp_path / "other", "relu")
    change(tmp_path / "float", tmp_path / "more", "relu:variant=drelu")
    expected = hooked(model_folder("llama"), replace=("act_fn",), rectify=("layernorm", "up_proj"))
    assert torch.equal(logits(load(tmp_path / "more")), logits(expected))
    limited = change(tmp_path / "float", tmp_path / "limited", "activation-threshold", data=calibration)
    assert len(limited.activations) == 14
    said = config_of(tmp_path / "limited")["quantization_config"]["activations"]
    assert len(said["outputs"]) == 6
    assert len(said["inputs"]) == 14


def test_what_is_said_of_activations_is_kept_or_refused_when_a_checkpoint_is_converted(model_folder, tmp_path):
    change(model_folder("llama"), tmp_path / "out", "relu:stage=2", "w8a8")
    quantkit.convert(tmp_path / "out", tmp_path / "dense", to="dense")
    same = torch.nn.functional.cosine_similarity(
        logits(load(tmp_path / "dense")).flatten(), logits(load(tmp_path / "out")).flatten(), dim=0
    )
    assert same > 0.999
    assert config_of(tmp_path / "dense")["quantization_config"]["groups"] == []
    with pytest.raises(CheckpointError, match="which compressed-tensors cannot"):
        quantkit.convert(tmp_path / "out", tmp_path / "converted", to="compressed-tensors")
    again = change(tmp_path / "out", tmp_path / "again", "int8", dequantize=True)
    assert again.format == "quantkit"
    assert len(config_of(tmp_path / "again")["quantization_config"]["activations"]["outputs"]) == 6


def test_experts_have_no_threshold_and_the_report_says_so(tmp_path, calibration):
    torch.manual_seed(0)
    model = models.randomized(AutoModelForCausalLM.from_config(mixtures.CONFIGS["mixtral"]()))
    report = change(models.save(model, tmp_path / "m"), tmp_path / "out", "activation-threshold", data=calibration)
    assert not any("experts" in each.module for each in report.activations)
    assert any("it can have no threshold" in note for note in report.notes)


def test_zeros_are_counted_in_any_model(model_folder, tmp_path, calibration, cli):
    found = input_sparsity(model_folder("opt"), calibration["dataset"], samples=4, seq_len=32)
    zeros = {layer.module: layer.after["1"] for layer in found.layers}
    assert len(zeros) == 12
    assert all(0.2 < share < 0.8 for name, share in zeros.items() if name.endswith("fc2"))
    assert all(share < 0.01 for name, share in zeros.items() if not name.endswith("fc2"))
    mixture = input_sparsity(model_folder("mixtral"), calibration["dataset"], samples=2, seq_len=32)
    assert {layer.load for layer in mixture.layers if "experts" in layer.module} == {2.0}
    change(model_folder("llama"), tmp_path / "out", "activation-threshold:target=0.5", data=calibration)
    told = json.loads(
        cli("sparsity", tmp_path / "out", "--dataset", calibration["dataset"], "--seq-len", 32, "--json").stdout
    )
    assert all(0.4 < layer["zeros"]["1"] < 0.6 for layer in told["layers"])
    assert told["decode"]["flops_spared"] == pytest.approx(0.5 * told["decode"]["flops"], rel=0.1)
    text = cli("sparsity", model_folder("opt"), "--dataset", calibration["dataset"], "--seq-len", 32).stdout
    assert "fc2: " in text


def test_the_statistics_are_in_the_memory_plan(model_folder):
    from quantkit.footprint import footprint

    found = []
    for step in ("relu", "activation-threshold"):
        source, plan, recipe = planned(model_folder("llama"), steps=[step])
        blocks = footprint(source, plan, recipe, (8, 32), torch.device("cpu")).parts
        found.append(blocks["statistics"])
    assert found[1] - found[0] >= 7 * 2**19  # a histogram for each layer of a block
