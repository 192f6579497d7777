import models
import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from quantkit import formats
from quantkit.checkpoint import Hub, open_folder, open_model
from quantkit.errors import CheckpointError, RecipeError
from quantkit.planning import make_plan
from quantkit.recipe import Recipe

LLAMA_LEAVES = [f"self_attn.{leaf}_proj" for leaf in "qkvo"] + [f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")]
LLAMA_LINEARS = [f"model.layers.{number}.{leaf}" for number in (0, 1) for leaf in LLAMA_LEAVES]


def plan(folder, step="w8a8", **patterns):
    recipe = Recipe.of([step], **patterns)
    return make_plan(open_folder(folder, Hub()), recipe, formats.choose(recipe.scheme))


def quantized(made):
    return [target.module for target in made.targets.values()]


def left(made):
    return {item.module: item.reason for item in made.left}


def test_every_linear_layer_of_a_llama_but_the_head(model_folder):
    made = plan(model_folder("llama"))
    assert quantized(made) == LLAMA_LINEARS
    assert list(made.targets) == [f"{name}.weight" for name in LLAMA_LINEARS]
    assert left(made) == {
        "model.embed_tokens": "belongs to Embedding, which is no plain linear layer",
        "lm_head": "makes the logits; --include it to quantize it",
    }
    assert made.linears_left == ("lm_head",)
    assert (made.unused, made.renamed, made.patterns) == ((), {}, ())


def test_shapes_and_dtypes_are_the_weights_own(model_folder):
    made = plan(model_folder("llama_bf16"))
    target = made.targets["model.layers.0.self_attn.k_proj.weight"]
    assert (target.out_features, target.in_features, str(target.dtype)) == (64, 128, "torch.bfloat16")
    assert target.prefix == "model.layers.0.self_attn.k_proj."


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"ignore": ["*.down_proj"]}, [name for name in LLAMA_LINEARS if "down" not in name]),
        ({"include": ["*.mlp.*"]}, [name for name in LLAMA_LINEARS if "mlp" in name]),
        ({"include": ["*.mlp.*"], "ignore": ["re:.*layers.0"]}, LLAMA_LINEARS[11:]),
        ({"include": ["lm_head"]}, ["lm_head"]),
        ({"include": ["*"]}, [*LLAMA_LINEARS, "lm_head"]),
        ({"include": ["*"], "ignore": ["lm_head"]}, LLAMA_LINEARS),
    ],
)
def test_patterns_choose(model_folder, patterns, expected):
    made = plan(model_folder("llama"), **patterns)
    assert quantized(made) == expected
    assert set(made.linears_left) == {*LLAMA_LINEARS, "lm_head"} - set(expected)


def test_reasons_name_the_pattern_and_patterns_are_counted(model_folder):
    made = plan(model_folder("llama"), include=["*.mlp.*"], ignore=["*.down_proj", "re:.*up"])
    reasons = left(made)
    assert reasons["model.layers.0.mlp.down_proj"] == "ignored by '*.down_proj'"
    assert reasons["model.layers.1.mlp.up_proj"] == "ignored by 're:.*up'"
    assert reasons["model.layers.0.self_attn.q_proj"] == "no include pattern matches it"
    counts = {(match.kind, match.pattern): match.matched for match in made.patterns}
    assert counts == {("include", "*.mlp.*"): 6, ("ignore", "*.down_proj"): 2, ("ignore", "re:.*up"): 2}


def test_a_tied_head_stays_float_whatever_is_included(model_folder):
    for patterns in ({}, {"include": ["*"]}):
        made = plan(model_folder("llama_tied"), **patterns)
        assert quantized(made) == LLAMA_LINEARS
        assert left(made)["lm_head"] == "shares its weight with model.embed_tokens"


def test_nothing_to_quantize_is_refused(model_folder):
    for name, patterns in (("gpt2", {}), ("gpt2_untied", {}), ("gpt2", {"include": ["lm_head"]})):
        with pytest.raises(RecipeError, match=r"no linear layer of .*gpt2.* is left to quantize \("):
            plan(model_folder(name), **patterns)


def test_conv1d_layers_are_left_with_the_reason(model_folder):
    made = plan(model_folder("gpt2_untied"), include=["lm_head"])
    assert quantized(made) == ["lm_head"]
    assert left(made)["transformer.h.0.attn.c_attn"] == "belongs to Conv1D, which is no plain linear layer"


def test_experts_are_left_with_the_reason(model_folder):
    made = plan(model_folder("mixtral"))
    assert all("self_attn" in name for name in quantized(made))
    assert len(made.targets) == 8
    reason = left(made)["model.layers.0.mlp.experts.gate_up_proj"]
    assert "MixtralExperts" in reason
    assert "no plain linear" in reason


class Same(nn.Linear):
    """A linear layer under another name."""


class Doubled(nn.Linear):
    """A linear layer with a forward pass of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_forward_pass_of_its_own_stays_float_and_a_mere_subclass_does_not():
    model = models.llama_model()
    model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.gate_proj = Doubled(128, 256), Same(128, 256)
    recipe = Recipe.of(["w8a8"])
    made = make_plan(open_model(model), recipe, formats.choose(recipe.scheme))
    assert quantized(made) == [name for name in LLAMA_LINEARS if name != "model.layers.0.mlp.up_proj"]
    assert left(made)["model.layers.0.mlp.up_proj"] == "is a Doubled, whose forward pass is its own"
    assert "model.layers.0.mlp.up_proj" in made.linears_left


def test_names_without_the_prefix_are_kept_on_disk(model_folder):
    made = plan(model_folder("opt_short_names"))
    target = made.targets["decoder.layers.0.self_attn.q_proj.weight"]
    assert target.module == "model.decoder.layers.0.self_attn.q_proj"
    assert target.prefix == "decoder.layers.0.self_attn.q_proj."


def test_a_tensor_under_its_second_name_gets_the_first(model_folder):
    made = plan(model_folder("llama_second_name"))
    assert made.renamed == {"lm_head.weight": "model.embed_tokens.weight"}


def test_unused_keys_are_told(model_folder):
    made = plan(model_folder("llama_unused"))
    assert set(made.unused) == {"left.over", "model.layers.0.self_attn.rotary_emb.inv_freq"}


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_unused", "llama_sharded", "opt_short_names", "mixtral"])
def test_stages_hold_every_key_once_block_by_block(model_folder, name):
    source = open_folder(model_folder(name), Hub())
    made = plan(model_folder(name))
    keys = [key for stage in made.stages for key in stage.keys]
    assert sorted(keys) == sorted(source.weights.tensors)
    names = [stage.name for stage in made.stages]
    assert names[0] == "outside the blocks"
    assert [text.rpartition(".")[2] for text in names[1:]] == ["0", "1"]
    for stage in made.stages[1:]:
        assert all(f".{stage.name.rpartition('.')[2]}." in key for key in stage.keys)


@pytest.mark.parametrize("damage", ["norm", "linear", "expert", "shape"])
def test_an_incomplete_mixture_is_refused(model_folder, tmp_path, damage):
    """Experts are merged while they are loaded, and that must not hide what is missing."""
    folder = models.copy(model_folder("mixtral"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    expert = next(name for name in weights if ".experts.1." in name)
    if damage == "shape":
        weights[expert] = weights[expert][:-1].clone()
    else:
        names = {"norm": "model.norm.weight", "linear": "model.layers.1.self_attn.k_proj.weight", "expert": expert}
        del weights[names[damage]]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is incomplete: no tensor makes 'model"):
        plan(folder)
