"""Which keys are quantized, in which format, as which tensors; and what a format or scheme leaves in float."""

import mixtures
import models
import pytest
from transformers import GptOssConfig
from transformers.models.auto import AutoModelForCausalLM

from quantkit import formats, quantize
from quantkit.checkpoint import open_model
from quantkit.errors import RecipeError
from quantkit.planning import make_plan, tensor_specs
from quantkit.recipe import Recipe

STATIC = "w8a8:activation=tensor-static"
GQKV = "model.L_module.layers.0.attn.gqkv_proj.weight"
ATTENTION = [f"model.L_module.layers.0.self_attn.{leaf}_proj" for leaf in ("gate", "q", "k", "v")]


def plan(source, *steps, layout="auto", **patterns):
    return make_plan(source, Recipe.of(steps or ["w8a8"], **patterns), layout)


def left(made):
    return {item.module: item.reason for item in made.left}


class TestFormat:
    @pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text"])
    @pytest.mark.parametrize("step", ["w8a8", "fp8", "int8"])
    def test_experts_in_one_tensor_choose_quantkits_own(self, tiny_source, model_type, step):
        made = plan(tiny_source(model_type), step)
        assert made.layout is formats.native
        held = {target.module: target for target in made.targets.values() if target.of_experts}
        assert {target.experts for target in held.values()} == {4}
        assert {name.rpartition(".")[2] for name in held} == {"gate_up_proj", "down_proj"}

    @pytest.mark.parametrize("form", ["compressed-tensors", "bitsandbytes"])
    def test_other_formats_leave_them_with_the_reason(self, tiny_source, form):
        made = plan(tiny_source("gpt_oss"), "llm-int8" if form == "bitsandbytes" else "w8a8", layout=form)
        assert form == made.layout.NAME
        reason = left(made)["model.layers.0.mlp.experts.down_proj"]
        assert "--format quantkit" in reason
        assert form in reason
        assert {target.of_experts for target in made.targets.values()} == {False}
        ignored = [name for name in made.ignored if name.startswith("re:")]
        assert bool(ignored) == (form == "compressed-tensors")
        assert all("experts" in name for name in ignored)

    def test_experts_by_layer_go_into_compressed_tensors_but_not_into_bitsandbytes(self, tiny_source):
        source = tiny_source("mixtral")
        made = plan(source)
        assert made.layout is formats.compressed_tensors
        assert sum(target.of_experts for target in made.targets.values()) == 2 * 4 * 3
        made = plan(source, "llm-int8")
        assert made.layout is formats.bitsandbytes
        assert left(made)["model.layers.0.mlp.experts.down_proj"].startswith("bitsandbytes has no quantized experts")

    def test_where_they_are_ignored_the_first_format_will_do(self, tiny_source):
        made = plan(tiny_source("gpt_oss"), ignore=["*.experts.*"])
        assert made.layout is formats.compressed_tensors

    def test_scales_that_are_not_by_row_leave_experts(self, tiny_source):
        made = plan(tiny_source("gpt_oss"), "fp8:scheme=static")
        assert made.layout is formats.compressed_tensors
        assert left(made)["model.layers.1.mlp.experts.gate_up_proj"].startswith("experts have scales by row")

    def test_in_x_out_experts_have_no_groups(self):
        config = GptOssConfig(**mixtures.SIZES | {"hidden_size": 128, "intermediate_size": 128, "head_dim": 64})
        made = plan(open_model(models.randomized(AutoModelForCausalLM.from_config(config))), "int8:group=128")
        assert "have no groups; use group=channel" in left(made)["model.layers.0.mlp.experts.down_proj"]
        assert len(made.targets) == 8

    def test_a_class_that_bitsandbytes_passes_by(self, tiny_source):
        """Falcon's layers are of a subclass: quantkit's own format has them, and `auto` knows."""
        source = tiny_source("falcon")
        assert plan(source, "llm-int8").layout is formats.native
        with pytest.raises(RecipeError, match=r"8 of 9: is of a class that transformers with bitsandbytes passes by"):
            plan(source, "llm-int8", layout="bitsandbytes")
        assert plan(source).layout is formats.compressed_tensors

    def test_layers_in_x_out_choose_quantkits_own_where_others_misread_them(self, tiny_source):
        """GPT-2's: transformers takes compressed-tensors' codes of Conv1D for weights, but has bitsandbytes' right."""
        source = tiny_source("gpt2")
        assert plan(source).layout is formats.native
        assert plan(source, layout="compressed-tensors").layout is formats.compressed_tensors
        assert plan(source, "llm-int8").layout is formats.bitsandbytes

    def test_a_split_tensor_is_none_for_bitsandbytes(self, tiny_source):
        reasons = left(plan(tiny_source("hrm_text"), "llm-int8", layout="bitsandbytes"))
        assert "bitsandbytes cannot do" in reasons[ATTENTION[1]]

    def test_nothing_to_quantize_is_a_plan_without_a_format(self, tiny_source):
        made = plan(tiny_source("llama"), "smoothquant")
        assert (made.layout, made.targets, made.quantized) == (None, {}, ())
        assert left(made)["model.layers.0.mlp.up_proj"] == "the recipe quantizes nothing"


class TestStatic:
    def test_outside_of_the_blocks_nothing_is_observed(self, tiny_source):
        made = plan(tiny_source("llama"), STATIC, include=["*"])
        assert left(made)["lm_head"] == "lies outside of the blocks, where no activation is observed"
        assert len(made.targets) == 14
        assert "lm_head" not in left(plan(tiny_source("llama"), "w8a8", include=["*"]))

    def test_nor_in_another_list_of_blocks(self, tiny_source):
        made = plan(tiny_source("hrm_text"), STATIC)
        assert {target.module.split(".")[1] for target in made.targets.values()} == {"L_module"}
        assert "outside of the blocks" in left(made)["model.H_module.layers.0.mlp.up_proj"]

    def test_nor_in_a_block_that_a_text_never_reaches(self, tiny_source):
        """Mllama's blocks of cross attention wait for a picture."""
        made = plan(tiny_source("mllama"), STATIC)
        (idle,) = made.findings.idle
        reasons = left(made)
        inside = [name for name in reasons if name.startswith(f"{made.findings.blocks}.{idle}.")]
        assert len(inside) >= 7
        assert {reasons[name] for name in inside} == {
            "does not run when the model reads text, so that no activation is observed"
        }


class TestSharedKeys:
    def test_one_target_stands_for_all_layers_of_a_tensor(self, tiny_source):
        source = tiny_source("hrm_text")
        target = plan(source).targets[GQKV]
        assert sorted(target.modules) == sorted(ATTENTION)
        assert sorted(target.parameters) == sorted(f"{name}.weight" for name in ATTENTION)
        assert (target.out_features, target.in_features) == source.weights.tensors[GQKV].shape == (256, 64)
        assert (target.whole, target.of_experts, target.experts, target.transposed) == (False, False, 0, False)
        assert target.prefixes == [GQKV.removesuffix("weight")]

    @pytest.mark.parametrize("member", ATTENTION)
    def test_one_that_is_ignored_keeps_the_others_in_float(self, tiny_source, member):
        made = plan(tiny_source("hrm_text"), ignore=[member])
        assert GQKV not in made.targets
        reasons = left(made)
        assert reasons[member] == f"ignored by {member!r}"
        for other in set(ATTENTION) - {member}:
            assert reasons[other] == f"shares its tensor on disk with {member}.weight, which stays in float"
        assert len(made.targets) == 15

    def test_one_key_of_several_is_not_a_whole_parameter(self, tiny_source):
        made = plan(tiny_source("mixtral"))
        experts = [target for target in made.targets.values() if target.of_experts]
        assert {target.whole for target in experts} == {False}
        assert {target.experts for target in experts} == {0}
        assert {target.whole for target in made.targets.values() if not target.of_experts} == {True}


class TestNames:
    def test_experts_of_one_tensor_are_written_a_layer_each(self, tiny_source):
        target = plan(tiny_source("gpt_oss")).targets["model.layers.0.mlp.experts.gate_up_proj"]
        assert target.prefixes == [f"model.layers.0.mlp.experts.{expert}.gate_up_proj." for expert in range(4)]
        assert target.prefix == target.prefixes[0]
        assert (target.out_features, target.in_features, target.transposed) == (256, 64, True)

    def test_a_key_that_ends_in_weight_loses_it(self, tiny_source):
        target = plan(tiny_source("gpt2")).targets["transformer.h.0.attn.c_attn.weight"]
        assert target.prefixes == ["transformer.h.0.attn.c_attn."]
        assert (target.module, target.out_features, target.in_features) == ("transformer.h.0.attn.c_attn", 192, 64)


@pytest.mark.parametrize(
    ("model_type", "step"),
    [("gpt_oss", "w8a8"), ("hrm_text", "fp8"), ("gpt2", "llm-int8"), ("mixtral", "int8"), ("llama4_text", "fp8")],
)
def test_specs_are_what_is_written(tiny_folder, tiny_source, tmp_path, model_type, step):
    """Every tensor of the finished checkpoint is one of the plan's, with its shape and dtype, or a copied key."""
    made = plan(tiny_source(model_type), step)
    expected = {key: (info.shape, info.dtype) for key, info in tiny_source(model_type).weights.tensors.items()}
    for key, target in made.targets.items():
        del expected[key]
        for name, spec in tensor_specs(target, made.layout).items():
            assert name not in expected
            expected[name] = (spec.shape, spec.dtype)
    report = quantize(tiny_folder(model_type), tmp_path / "out", steps=[step], progress=False)
    written = models.read_tensors(tmp_path / "out")
    assert {name: (tuple(value.shape), value.dtype) for name, value in written.items()} == expected
    assert made.output_bytes == report.bytes_after == sum(value.nbytes for value in written.values())


class TestIndivisible:
    def test_every_layer_that_a_group_does_not_divide_is_named(self, tiny_source):
        source = tiny_source("llama")
        with pytest.raises(
            RecipeError, match=r"group size 128 does not divide .* of 12 layers: .*; --ignore"
        ) as caught:
            plan(source, "int8:group=128")
        named = str(caught.value).partition(": ")[2].partition(";")[0].split(", ")
        leaves = [f"self_attn.{leaf}_proj" for leaf in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj"]
        assert sorted(named) == sorted(f"model.layers.{i}.{leaf} (64)" for i in (0, 1) for leaf in leaves)
        ignored = ["*.self_attn.*", "*.gate_proj", "*.up_proj"]
        assert len(plan(source, "int8:group=128", ignore=ignored).targets) == 2

    def test_and_those_of_a_block(self, tiny_source):
        with pytest.raises(RecipeError, match=r"block size 128 does not divide .* of 12 layers") as caught:
            plan(tiny_source("llama"), "fp8:scheme=block")
        assert str(caught.value).endswith("--ignore them, or use another scheme")

    def test_experts_are_named_and_counted_once(self, tiny_source):
        """Mixtral's gate and up projections lie in eight keys."""
        with pytest.raises(RecipeError, match=r"group size 128 does not divide .* of 10 layers") as caught:
            plan(tiny_source("mixtral"), "int8:group=128")
        assert str(caught.value).count("model.layers.0.mlp.experts.gate_up_proj") == 1


class TestWhatStaticSchemesLeave:
    @pytest.mark.parametrize("model_type", ["bart", "whisper", "trocr", "prophetnet"])
    def test_layers_that_text_never_reaches_are_left_before_any_work(self, tiny_folder, tmp_path, model_type):
        """The decoder's cross attention has no encoder to look at."""
        text = tmp_path / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
        data = {"dataset": str(text), "samples": 2, "seq_len": 16, "progress": False}
        report = quantize(tiny_folder(model_type), tmp_path / "out", steps=[STATIC], **data)
        reasons = {item.reason for item in report.left_alone if ".k" in item.module or "key" in item.module}
        assert reasons == {"meets no activation when the model reads text, so that none is observed"}
        assert report.layers

    def test_tensors_that_are_split_on_the_way_have_scales_by_row_or_none(self, tiny_source):
        """One scale of the whole is no scale of its parts."""
        reasons = left(plan(tiny_source("hrm_text"), "fp8:scheme=static"))
        assert all("only scales by row" in reasons[name] for name in ATTENTION)
