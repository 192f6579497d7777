"""The step sparse24, from recipe to reload: what is pruned, that zeros stay zeros, and what is said of it."""

import json
from pathlib import Path

import mixtures
import models
import pytest
import torch
from quantkit_calibration import pruning
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import sparsity
from quantkit.checkpoint import Hub, open_folder
from quantkit.dequantization import dequantized
from quantkit.errors import RecipeError
from quantkit.pipeline import planned, prepare
from quantkit.recipe import Recipe, Step
from quantkit.sparsifying import Streams

CRITERIA = ["magnitude", "wanda", "sparsegpt"]
QUANTIZERS = ["w8a8", "fp8", "int8", "int4", "llm-int8", "w8a8:activation=tensor-static"]


def floats(folder):
    """The float tensors that a checkpoint of any format stands for, by name."""
    source = open_folder(folder, Hub(), lambda source: dequantized(source.weights, source.config, source.name))
    return {key: source.weights.get(key) for key in source.weights.tensors}


def weights(folder, kind="proj.weight"):
    found = {key: value for key, value in floats(folder).items() if key.endswith(kind) and value.ndim == 2}
    assert found
    return found


def prune(folder, output, *steps, data, **more):
    return quantkit.quantize(folder, output, steps=steps, progress=False, **data, **more)


class TestPatterns:
    @pytest.mark.parametrize("text", ["2:4", "4:8", "unstructured:0.5", "unstructured:.3", "64:2:8", "1:2:256"])
    def test_are_written_in_a_step(self, text):
        step = Step.parse(f"sparse24:criterion=wanda,pattern={text}")
        assert step.parameters["pattern"] == text
        assert Step.parse(str(step)) == step

    @pytest.mark.parametrize(
        "text",
        [
            "1:4",
            "unstructured",
            "unstructured:0",
            "unstructured:1.0",
            "unstructured:1e-3",
            *("64:1:8", "64:2:4", "64:2:10", "0:2:8", "64:2:512", "9999999:2:8", "64:2", "64:2:8 "),
        ],
    )
    def test_of_other_kinds_are_refused(self, text):
        with pytest.raises(RecipeError, match="pattern="):
            Step.parse(f"sparse24:pattern={text}")
        with pytest.raises(ValueError, match="no pattern"):
            sparsity.pattern_of(text)

    def test_are_seen_in_a_weight(self):
        assert sparsity.is_24(torch.tensor([[0, 1.0, 0, 2, 0, 0, 0, 5]]))
        assert not sparsity.is_24(torch.tensor([[0, 1.0, 3, 2, 0, 0, 0, 5]]))
        assert sparsity.has_groups(torch.tensor([[0, 1.0, 3, 2, 0, 0, 0, 5]]), 4, 8)
        assert not sparsity.is_24(torch.zeros(3, 6))
        assert sparsity.is_24(torch.zeros(6, 4).t(), in_axis=0)
        tiles = torch.zeros(4, 8)
        tiles[0, [0, 5]] = tiles[1, [0, 2]] = tiles[2, [6, 7]] = 1.0
        assert sparsity.has_tiles(tiles, 2, 8)
        assert not sparsity.has_tiles(tiles, 4, 8)  # five columns are in use
        tiles[1, 5] = 1.0
        assert not sparsity.has_tiles(tiles, 2, 8)
        assert sparsity.has_tiles(torch.zeros(8, 3).t(), 2, 8)
        assert not sparsity.has_tiles(torch.zeros(3, 9), 2, 8)


class TestRecipes:
    def test_pruning_comes_before_the_quantizer(self):
        with pytest.raises(RecipeError, match="write -m sparse24 before -m w8a8"):
            Recipe.of(["w8a8", "sparse24"])
        with pytest.raises(RecipeError, match="sparse24 is given 2 times"):
            Recipe.of(["sparse24", "sparse24:pattern=4:8"])

    def test_a_dampening_goes_with_sparsegpt(self):
        with pytest.raises(RecipeError, match=r"dampening=0.1 goes with criterion=sparsegpt"):
            Step.parse("sparse24:criterion=wanda,dampening=0.1")

    def test_only_magnitude_needs_no_data(self):
        assert [Recipe.of([f"sparse24:criterion={each}"]).observes for each in CRITERIA] == [False, True, True]

    def test_layers_whose_features_make_no_groups_are_named(self, tmp_path):
        folder = models.save(models.llama_model(intermediate_size=30), tmp_path / "odd")
        with pytest.raises(RecipeError, match=r"4 weights of a group do not divide .*down_proj \(30\)"):
            prepare(folder, steps=["sparse24"])
        plan, _ = prepare(folder, steps=["sparse24"], ignore=["*.down_proj"])
        assert not any("down_proj" in layer.name for layer in plan.pruned)
        assert any("down_proj" in left.module and "ignored" in left.reason for left in plan.left)

    def test_what_is_not_observed_is_pruned_by_magnitude_alone(self, model_folder, tmp_path):
        plan, _ = prepare(model_folder("llama"), steps=["sparse24"], include=["lm_head", "*.q_proj"])
        assert {left.module: left.reason for left in plan.left}["lm_head"].startswith("lies outside of the blocks")
        report = prune(
            model_folder("llama"), tmp_path / "out", "sparse24:criterion=magnitude", data={}, include=["lm_head"]
        )
        assert [layer.module for layer in report.pruned] == ["lm_head"]
        assert sparsity.is_24(floats(tmp_path / "out")["lm_head.weight"])


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured:0.4", "24:2:8"])
def test_magnitude_leaves_the_largest_as_they_were(model_folder, tmp_path, pattern):
    report = prune(model_folder("llama"), tmp_path / "out", f"sparse24:criterion=magnitude,pattern={pattern}", data={})
    before = load_file(model_folder("llama") / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for key, value in before.items():
        kept = torch.ones_like(value, dtype=torch.bool)
        if "_proj" in key:
            kept = pruning.magnitude(value, sparsity.pattern_of(pattern))
        assert torch.equal(after[key], value * kept), key
    assert {layer.criterion for layer in report.pruned} == {"magnitude"}
    assert all(layer.output_error is None and layer.weight_error > 0 for layer in report.pruned)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_the_first_block_is_pruned_by_what_the_float_model_feeds_it_with(
    model_folder, tmp_path, calibration, criterion
):
    """Inputs by hooks in transformers' own model; q, k, v, o, gate, up and down all see the dense block's activations.

    Wanda's weights are equal; SparseGPT's within rounding of its sums, which are of other cuts, with the same zeros.
    """
    out = tmp_path / "out"
    report = prune(model_folder("llama"), out, f"sparse24:criterion={criterion}", data=calibration)
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    source = open_folder(model_folder("llama"), Hub())
    windows = calibration_rows(source, calibration)
    met: dict[str, torch.Tensor] = {}
    for name, module in model.model.layers[0].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, args, name=name: met.update({name: args[0].flatten(0, 1)}))
    with torch.no_grad():
        model(input_ids=windows)
    after = load_file(out / "model.safetensors")
    assert len(met) == 7
    for name, x in met.items():
        weight = model.model.layers[0].get_submodule(name).weight.detach()
        made = after[f"model.layers.0.{name}.weight"]
        if criterion == "wanda":
            expected = pruning.pruned(weight, pruning.wanda(weight, x.double().norm(dim=0).float(), (2, 4)))
            assert torch.equal(made, expected), name
        else:
            expected = pruning.sparsegpt(weight, pruning.inverse_factor(x.double().t() @ x.double(), 0.01), (2, 4))
            differ = (made != 0) != (expected != 0)  # two scores that are equal but for rounding
            assert differ.float().mean() < 1e-3, name
            assert torch.allclose(made[~differ.any(1)], expected[~differ.any(1)], rtol=1e-3, atol=1e-4), name
        told = next(layer for layer in report.pruned if layer.module == f"model.layers.0.{name}")
        exact = (x @ (made - weight).t()).norm() / (x @ weight.t()).norm()
        assert told.output_error == pytest.approx(float(exact), rel=1e-3)
        assert told.sparsity == 0.5


def calibration_rows(source, calibration):
    from quantkit.pipeline import Data, calibration_data

    data = Data(calibration["dataset"], calibration["samples"], calibration["seq_len"], None)
    return calibration_data(source, source.folder, Recipe.of(["sparse24"]), data, Hub())[0]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("first", [[], ["smoothquant"]])
def test_zeros_survive_smoothing_and_quantization_exactly(model_folder, tmp_path, calibration, first, quantizer):
    step = "sparse24:criterion=wanda"
    prune(model_folder("llama"), tmp_path / "out", *first, step, quantizer, data=calibration)
    prune(model_folder("llama"), tmp_path / "float", *first, step, data=calibration)
    made, plain = weights(tmp_path / "out"), weights(tmp_path / "float")
    assert made.keys() == plain.keys()
    for key, value in made.items():
        assert sparsity.is_24(value), key
        if ".layers.0." in key:  # later blocks are fed by quantized ones, and may choose others
            assert (value[plain[key] == 0] == 0).all(), key
    ids = torch.randint(0, 250, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.isfinite(quantkit.load(tmp_path / "out")(input_ids=ids).logits).all()


def test_smoothing_may_come_after_pruning(model_folder, tmp_path, calibration):
    report = prune(model_folder("llama"), tmp_path / "out", "sparse24", "smoothquant", "w8a8", data=calibration)
    assert any(group.state == "folded" for group in report.groups)
    assert all(sparsity.is_24(value) for value in weights(tmp_path / "out").values())


def test_a_pruned_float_checkpoint_loads_with_transformers_and_gives_what_quantkit_gives(
    model_folder, tmp_path, calibration
):
    prune(model_folder("llama"), tmp_path / "out", "sparse24", data=calibration)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
        assert torch.equal(quantkit.load(tmp_path / "out")(input_ids=ids).logits, theirs)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_conv1d_is_pruned_along_its_in_features(model_folder, tmp_path, calibration, criterion):
    data = {} if criterion == "magnitude" else calibration
    prune(model_folder("gpt2"), tmp_path / "out", f"sparse24:criterion={criterion}", data=data)
    found = {k: v for k, v in floats(tmp_path / "out").items() if "c_" in k and k.endswith("weight")}
    assert len(found) == 8
    for key, value in found.items():
        assert sparsity.is_24(value, in_axis=0), key
        assert not sparsity.is_24(value), key


@pytest.mark.parametrize("quantizer", [[], ["int8"]])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_every_expert_is_pruned(tmp_path, calibration, name, criterion, quantizer):
    """Mixtral's lie one by one on disk, GPT-OSS's together and in x out."""
    folder = mixture(name, tmp_path)
    data = {} if criterion == "magnitude" else calibration
    report = prune(folder, tmp_path / "out", f"sparse24:criterion={criterion}", *quantizer, data=data)
    experts = {key: value for key, value in floats(tmp_path / "out").items() if "experts" in key and value.ndim > 1}
    experts = {key: value for key, value in experts.items() if "bias" not in key and "router" not in key}
    assert experts
    for key, value in experts.items():
        assert sparsity.is_24(value, in_axis=-2 if value.ndim == 3 else -1), key
    assert all(layer.sparsity == 0.5 for layer in report.pruned)


def mixture(name, tmp_path):
    torch.manual_seed(0)
    model = models.randomized(AutoModelForCausalLM.from_config(mixtures.CONFIGS[name]()))
    return models.save(model, tmp_path / name)


def test_streams_that_part_have_statistics_of_their_own():
    """Three weights meet the same, then one meets something else: exact sums for each, shared as long as may be."""
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(5, 4, generator=generator) for _ in range(4))
    streams = Streams("sparsegpt", 0)
    for x, who in ((a, "qkv"), (b, "qk"), (c, "v"), (d, "qkv")):
        for name in who:
            streams.see(name, None, x)
    grams = {name: streams.take(name, None).gram for name in "qkv"}
    assert grams["q"] is grams["k"]
    both = torch.cat([a, b, d])
    alone = torch.cat([a, c, d])
    assert torch.allclose(grams["q"].result(), both.t() @ both, rtol=1e-5, atol=1e-5)
    assert torch.allclose(grams["v"].result(), alone.t() @ alone, rtol=1e-5, atol=1e-5)
    assert streams.take("q", None) is None


def test_a_layer_that_met_nothing_is_pruned_by_magnitude_and_named():
    from quantkit.sparsifying import Pruner, Pruning

    pruner = Pruner(Pruning("sparsegpt", "2:4", 0.01), Streams("sparsegpt", 0))
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    made, report = pruner.parameter("layer", "weight", weight, 1)
    assert torch.equal(made, pruning.pruned(weight, pruning.magnitude(weight, (2, 4))))
    assert report.criterion == "magnitude"
    assert "layer met no calibration token" in pruner.notes("block")[0]


def test_what_it_cost_in_the_papers_is_said(model_folder, tmp_path, cli):
    assert "54.59" in cli("methods").stdout
    assert "sparse24 costs quality" in cli("quantize", "--help").stdout
    plan = cli("plan", model_folder("llama"), "-m", "sparse24")
    assert "54.59" in plan.stdout
    assert "14 linear layers to 2:4 by sparsegpt" in plan.stdout
    made = cli("quantize", model_folder("llama"), "-o", tmp_path / "out", "-m", "sparse24:criterion=magnitude")
    assert "50.0% of their weights are zero" in made.stdout
    assert "54.59" in (tmp_path / "out" / "README.md").read_text()
    report = json.loads((tmp_path / "out" / "quantkit_report.json").read_text())
    assert len(report["pruned"]) == 14
    assert any("54.59" in note for note in report["notes"])


@pytest.mark.exhaustive
def test_the_criteria_are_ordered_as_in_the_papers(data, tmp_path):
    """stories3M, calibrated on TinyStories: docs/sparsity.md has the figures."""
    stories, losses = Path(data) / "text" / "tinystories", []
    words = {"dataset": str(stories / "tinystories_train_sample_2M.txt"), "samples": 32}
    for criterion in ("sparsegpt", "wanda", "magnitude"):
        prune(data / "models" / "stories3M", tmp_path / criterion, f"sparse24:criterion={criterion}", data=words)
        found = quantkit.evaluate(
            tmp_path / criterion,
            str(stories / "tinystories_val.txt"),
            baseline=data / "models" / "stories3M",
            max_tokens=20_000,
            progress=False,
        )
        losses.append(found["kl_mean"])
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_statistics_are_in_the_memory_plan(model_folder, tmp_path, calibration, monkeypatch, name, criterion):
    """As many bytes as they really take at most: q, k and v share theirs where the plan saw that they do."""
    from quantkit import calibrated
    from quantkit.activity import activity
    from quantkit.footprint import _Blocks

    taken = []

    class Weighed(calibrated.Pruner):
        def __init__(self, how, streams):
            super().__init__(how, streams)
            streams._settle()
            streams_of_block = {id(stream): stream for stream in streams._found.values()}.values()
            taken.append(sum(bytes_of(stream) for stream in streams_of_block))

    monkeypatch.setattr(calibrated, "Pruner", Weighed)
    folder = model_folder(name)
    prune(folder, tmp_path / "out", f"sparse24:criterion={criterion}", data=calibration)
    source, plan, _ = planned(folder, steps=[f"sparse24:criterion={criterion}"])
    blocks = _Blocks(source, plan, torch.device("cpu"))
    assert blocks.pruning(activity(source.skeleton, plan.findings, 1, 32))[0] == 0  # without a criterion
    blocks.statistics_of = criterion
    told = blocks.pruning(activity(source.skeleton, plan.findings, 1, 32))[0]
    assert max(taken) <= told <= (1.0 if criterion == "sparsegpt" else 4.0) * max(taken)


def bytes_of(stream):
    if stream.gram is not None:
        return stream.gram.result().nbytes
    return stream.norm.result().nbytes * 2 + stream.sample.result().nbytes
