"""Which linear layers a model has, where they lie, and why each that stays in float does."""

import models
import pytest
from safetensors.torch import load_file, save_file
from tiny import build, configuration
from torch import nn
from transformers import AutoModelForCausalLM

from quantkit.candidates import candidates_of
from quantkit.checkpoint import Hub, open_folder, open_model, tied_parameters
from quantkit.exploration import explore
from quantkit.naming import Names
from quantkit.planning import make_plan
from quantkit.recipe import Recipe


def found_in(source):
    names = Names(source)
    return {each.name: each for each in candidates_of(source, names, explore(source.skeleton, groups=False))}


def left(source, *steps, layout="auto", **patterns):
    """The reasons of all that stays in float."""
    plan = make_plan(source, Recipe.of(steps or ["w8a8"], **patterns), layout)
    return {item.module: item.reason for item in plan.left}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon", "mixtral", "gpt_oss", "hrm_text"])
def test_sizes_axes_and_keys_are_those_of_the_products(tiny_folder, tiny_source, model_type):
    """The parameter read along `in_axis` is the matrix [N, K] that the keys hold, one after another."""
    source = tiny_source(model_type)
    parameters = AutoModelForCausalLM.from_pretrained(tiny_folder(model_type)).state_dict()
    tied = tied_parameters(source.skeleton)
    for candidate in found_in(source).values():
        if candidate.parameter in tied:
            continue
        weight = parameters[candidate.parameter]
        matrices = weight.movedim(candidate.in_axis, -1)
        sizes = (candidate.out_features, candidate.in_features)
        assert tuple(matrices.shape) == ((candidate.experts, *sizes) if candidate.experts else sizes)
        rows = {row.tobytes() for row in matrices.reshape(-1, candidate.in_features).contiguous().numpy()}
        stored = set()
        for key, transposed in candidate.keys.items():
            tensor = source.weights.get(key)
            tensor = tensor.transpose(-1, -2) if transposed else tensor
            stored |= {row.tobytes() for row in tensor.reshape(-1, candidate.in_features).contiguous().numpy()}
        assert candidate.keys
        assert rows <= stored
        assert rows == stored or model_type == "hrm_text"


def test_conv1d_layers_are_in_x_out(tiny_source):
    found = found_in(tiny_source("gpt2"))["transformer.h.0.attn.c_attn"]
    assert (found.out_features, found.in_features, found.transposed, found.in_axis) == (192, 64, True, 0)
    assert found.keys == {"transformer.h.0.attn.c_attn.weight": True}
    assert (found.special, found.experts, found.fused, found.converted) == (False, 0, False, False)


def test_experts_by_layer_and_together(tiny_source):
    merged = found_in(tiny_source("mixtral"))["model.layers.1.mlp.experts.gate_up_proj"]
    assert (merged.experts, merged.transposed, merged.in_axis, merged.fused) == (4, False, 2, False)
    assert len(merged.keys) == 8
    assert set(merged.keys.values()) == {False}
    assert merged.owners == ["model.layers.1.block_sparse_moe.experts", "model.layers.1.mlp.experts"]
    together = found_in(tiny_source("gpt_oss"))["model.layers.1.mlp.experts.gate_up_proj"]
    assert (together.experts, together.transposed, together.in_axis, together.fused) == (4, True, 1, True)
    assert together.keys == {"model.layers.1.mlp.experts.gate_up_proj": True}
    assert together.owners == ["model.layers.1.mlp.experts"]


def test_every_layer_once_and_experts_last(tiny_source):
    for model_type in ("jamba", "deepseek_v3", "kimi_linear", "qwen3_next"):
        source = tiny_source(model_type)
        found = found_in(source)
        modules = [name for name, module in source.skeleton.named_modules() if isinstance(module, nn.Linear)]
        assert [name for name in found if not found[name].experts] == modules
        experts = [name for name, value in source.skeleton.named_parameters() if value.ndim == 3 and "experts" in name]
        assert [name for name in found if found[name].experts] == experts


def test_a_layer_of_a_class_of_its_own_is_special(tiny_source):
    found = found_in(tiny_source("falcon"))
    assert {each.special for name, each in found.items() if name != "lm_head"} == {True}
    assert {each.special for each in found_in(tiny_source("llama")).values()} == {False}


class TestReasons:
    @pytest.mark.parametrize("model_type", ["mixtral", "jamba", "gpt_oss", "afmoe"])
    def test_routers(self, tiny_source, model_type):
        reasons = left(tiny_source(model_type))
        routers = {name: reason for name, reason in reasons.items() if name.endswith((".gate", ".router"))}
        assert routers
        assert all("chooses experts (topk)" in reason for reason in routers.values())

    def test_the_head_unless_it_is_included(self, tiny_source):
        source = tiny_source("llama")
        assert left(source)["lm_head"] == "makes the logits; --include it to quantize it"
        assert "lm_head" not in left(source, include=["*"])

    @pytest.mark.parametrize("include", [[], ["*"]])
    def test_ties_whatever_is_included(self, tiny_source, include):
        assert "shares its weight with transformer.wte" in left(tiny_source("gpt2"), include=include)["lm_head"]
        reasons = left(tiny_source("zamba2"), include=include)
        first, second = (f"model.layers.{i}.shared_transformer.self_attn.q_proj" for i in (1, 3))
        assert reasons[second] == f"shares its weight with {first}"
        assert reasons[first] == "shares its weight with another layer"

    def test_patterns(self, tiny_source):
        reasons = left(tiny_source("mixtral"), include=["*.self_attn.*", "*.experts.*"], ignore=["*.0.mlp.experts.*"])
        assert reasons["model.layers.0.mlp.experts.down_proj"] == "ignored by '*.0.mlp.experts.*'"
        assert reasons["lm_head"] == "no include pattern matches it"
        assert "model.layers.1.mlp.experts.down_proj" not in reasons

    def test_a_weight_that_other_code_reads(self, tiny_source):
        assert "other code reads" in left(tiny_source("mamba"))["backbone.layers.1.mixer.dt_proj"]

    def test_what_does_not_run_on_a_text(self, tiny_source):
        source = tiny_source("gemma3")
        reasons = left(source)
        towers = [name for name in found_in(source) if "vision_tower" in name]
        assert len(towers) > 10
        assert {reasons[name] for name in towers} == {"does not run when the model reads text"}
        assert not [name for name in found_in(source) if "language_model" in name and name in reasons]

    def test_what_did_not_run_is_not_held_against_it_where_the_pass_ended_early(self):
        class Stumbling(type(build("gemma3"))):
            def forward(self, **arguments):
                raise RuntimeError("no luck")

        Stumbling.__name__ = "Gemma3ForConditionalGeneration"
        plan = make_plan(open_model(Stumbling(configuration("gemma3")).eval()), Recipe.of(["w8a8"]))
        assert any("vision_tower" in target.module for target in plan.targets.values())
        assert any("ended early: RuntimeError: no luck" in note for note in plan.notes)

    def test_other_dtypes_than_floats_of_two_or_four_bytes(self, model_folder, tmp_path):
        folder = models.copy(model_folder("llama"), tmp_path / "model")
        weights = load_file(folder / "model.safetensors")
        key = "model.layers.0.mlp.up_proj.weight"
        weights[key] = weights[key].double()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        reasons = left(open_folder(folder, Hub()))
        assert reasons["model.layers.0.mlp.up_proj"] == "its weight is stored as torch.float64"
        assert len(reasons) == 3

    def test_parts_of_rows_on_disk(self, tiny_source, monkeypatch):
        """A parameter whose keys hold no whole rows has no place for scales."""
        pieces = Names.pieces
        monkeypatch.setattr(
            Names, "pieces", lambda self, name, axis: None if "down" in name else pieces(self, name, axis)
        )
        reasons = left(tiny_source("mixtral"))
        expected = "its weight is merged or changed while the checkpoint is loaded"
        assert reasons["model.layers.0.mlp.experts.down_proj"] == expected
        assert "model.layers.0.mlp.experts.gate_up_proj" not in reasons


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "opt", "falcon", "mixtral", "deepseek_v3", "gpt_oss", "jamba", "mamba", "gemma3"]
)
def test_every_matrix_of_the_model_is_quantized_or_left_with_a_reason(tiny_source, model_type):
    source = tiny_source(model_type)
    plan = make_plan(source, Recipe.of(["int8"]))
    quantized = {candidate.parameter for candidate in plan.quantized}
    reasons = {item.module: item for item in plan.left}
    assert all(item.reason for item in plan.left)
    shapes = {name: p.shape for name, p in source.skeleton.named_parameters(remove_duplicate=False) if p.ndim > 1}
    for name, shape in shapes.items():
        label = name.removesuffix(".weight")
        assert (name in quantized) != (label in reasons), name
        if label in reasons:
            assert reasons[label].shape == tuple(shape)
    assert len(quantized) + len(reasons) == len(shapes)
