import models
import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from quantkit import formats
from quantkit.checkpoint import Hub, open_folder, open_model
from quantkit.errors import CheckpointError, RecipeError
from quantkit.planning import make_plan, tensor_specs
from quantkit.recipe import Recipe

LLAMA_LEAVES = [f"self_attn.{leaf}_proj" for leaf in "qkvo"] + [f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")]
LLAMA_LINEARS = [f"model.layers.{number}.{leaf}" for number in (0, 1) for leaf in LLAMA_LEAVES]


def plan(folder, step="w8a8", layout="auto", **patterns):
    return make_plan(open_folder(folder, Hub()), Recipe.of([step], **patterns), layout)


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


@pytest.mark.parametrize(
    ("name", "patterns", "why"),
    [
        ("llama", {"ignore": ["*"]}, r"15 of 15: ignored by '\*'"),
        ("gpt2", {"include": ["lm_head"]}, "8 of 9: no include pattern matches it"),
        ("llama_tied", {"include": ["*"], "ignore": ["model.layers"]}, "14 of 15: ignored by 'model.layers'"),
    ],
)
def test_nothing_to_quantize_is_refused(model_folder, name, patterns, why):
    with pytest.raises(RecipeError, match=rf"no linear layer of .*{name}\d* is left to quantize \({why}\)"):
        plan(model_folder(name), **patterns)


GPT2_LEAVES = {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}
GPT2_LINEARS = {f"transformer.h.{number}.{leaf}": size for number in (0, 1) for leaf, size in GPT2_LEAVES.items()}


@pytest.mark.parametrize("layout", ["compressed-tensors", "quantkit"])
@pytest.mark.parametrize("name", ["gpt2", "gpt2_untied"])
def test_conv1d_layers_are_quantized_with_their_axes_told_apart(model_folder, name, layout):
    made = plan(model_folder(name), layout=layout)
    targets = made.targets.values()
    assert {target.module: (target.out_features, target.in_features) for target in targets} == GPT2_LINEARS
    assert all(target.transposed and target.whole and not target.experts for target in targets)
    assert made.linears_left == made.ignored == ("lm_head",)
    reason = {"gpt2": "shares its weight with transformer.wte", "gpt2_untied": "makes the logits; --include it"}[name]
    assert left(made)["lm_head"].startswith(reason)


def test_conv1d_layers_are_not_left_to_a_loader_that_takes_codes_for_weights(model_folder):
    """As transformers with compressed-tensors does; with bitsandbytes it knows them."""
    assert plan(model_folder("gpt2")).layout is formats.native
    assert plan(model_folder("gpt2"), "llm-int8").layout is formats.bitsandbytes
    asked = plan(model_folder("gpt2"), layout="compressed-tensors")
    assert asked.layout is formats.compressed_tensors
    assert any("takes their codes for weights" in note for note in asked.notes)
    assert not plan(model_folder("llama")).notes


def test_conv1d_layers_are_left_with_the_reason(model_folder):
    made = plan(model_folder("gpt2_untied"), include=["lm_head"])
    assert quantized(made) == ["lm_head"]
    assert left(made)["transformer.h.0.attn.c_attn"] == "no include pattern matches it"
    assert set(made.ignored) == set(GPT2_LINEARS)


MIXTRAL_ATTENTION = [f"model.layers.{number}.self_attn.{leaf}_proj" for number in (0, 1) for leaf in "qkvo"]
MIXTRAL_EXPERTS = {
    f"model.layers.{number}.block_sparse_moe.experts.{expert}.{leaf}.weight": (
        f"model.layers.{number}.mlp.experts.{'down' if leaf == 'w2' else 'gate_up'}_proj",
        (32, 48) if leaf == "w2" else (48, 32),
    )
    for number in (0, 1)
    for expert in range(4)
    for leaf in ("w1", "w2", "w3")
}


def test_experts_are_quantized_a_layer_each_where_the_checkpoint_holds_them_so(model_folder):
    made = plan(model_folder("mixtral"))
    assert made.layout is formats.compressed_tensors
    assert set(made.targets) == {f"{name}.weight" for name in MIXTRAL_ATTENTION} | MIXTRAL_EXPERTS.keys()
    for key, (parameter, size) in MIXTRAL_EXPERTS.items():
        target = made.targets[key]
        assert (target.modules, target.parameters) == ((parameter,), (parameter,))
        assert (target.out_features, target.in_features) == size
        assert target.of_experts
        assert not target.experts
        assert not target.whole
        assert target.prefixes == [key.removesuffix("weight")]
    assert left(made) == {
        "model.embed_tokens": "belongs to Embedding, which is no plain linear layer",
        "model.layers.0.mlp.gate": "its output chooses experts (topk)",
        "model.layers.1.mlp.gate": "its output chooses experts (topk)",
        "lm_head": "makes the logits; --include it to quantize it",
    }


def test_experts_in_one_tensor_are_written_a_layer_each_in_our_own_format(model_folder):
    made = plan(model_folder("gpt_oss"))
    assert made.layout is formats.native
    target = made.targets["model.layers.1.mlp.experts.down_proj"]
    assert (target.out_features, target.in_features, target.transposed, target.experts) == (32, 48, True, 4)
    assert target.prefixes == [f"model.layers.1.mlp.experts.{expert}.down_proj." for expert in range(4)]
    specs = tensor_specs(target, made.layout)
    assert {name.rpartition(".")[0] + "." for name in specs} == set(target.prefixes)
    assert left(made)["model.layers.0.mlp.router"] == "its output chooses experts (topk)"


@pytest.mark.parametrize(
    ("name", "step", "layout", "says"),
    [
        (
            "gpt_oss",
            "w8a8",
            "compressed-tensors",
            "compressed-tensors needs a layer an expert; --format quantkit has it",
        ),
        ("gpt_oss", "fp8:scheme=static", "auto", "experts have scales by row, and activations by token"),
        ("mixtral", "fp8:scheme=static", "auto", "experts have scales by row, and activations by token"),
        ("mixtral", "w8a8:activation=tensor-static", "auto", "experts have scales by row, and activations by token"),
        ("mixtral", "llm-int8", "auto", "bitsandbytes has no quantized experts; --format quantkit has"),
    ],
)
def test_experts_that_a_format_or_scheme_cannot_say_are_left_with_the_reason(model_folder, name, step, layout, says):
    made = plan(model_folder(name), step, layout)
    assert quantized(made) == MIXTRAL_ATTENTION
    for number in (0, 1):
        for leaf in ("gate_up_proj", "down_proj"):
            assert says in left(made)[f"model.layers.{number}.mlp.experts.{leaf}"]


def test_experts_that_are_left_are_ignored_under_every_name_that_they_have(model_folder):
    """A loader goes by their names in its own model, or on disk."""
    made = plan(model_folder("mixtral"), "fp8:scheme=static")
    parsed = formats.compressed_tensors.parse(
        formats.compressed_tensors.config(Recipe.of(["fp8:scheme=static"]).scheme, quantized(made), made.ignored)
    )
    for number in (0, 1):
        assert parsed.scheme_of(f"model.layers.{number}.self_attn.q_proj") is not None
        for owner in ("mlp", "block_sparse_moe"):
            assert parsed.scheme_of(f"model.layers.{number}.{owner}.experts.3.w1") is None


class Same(nn.Linear):
    """A linear layer under another name."""


class Doubled(nn.Linear):
    """A linear layer with a forward pass of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Spelled(nn.Linear):
    """A linear layer with a forward pass of its own."""

    def forward(self, x):
        return x @ self.weight.t() + self.bias


ODD = {"mlp.up_proj": Doubled, "mlp.gate_proj": Same, "self_attn.q_proj": Spelled}


@pytest.fixture
def odd_model():
    """A Llama whose first block has layers of other classes."""
    model = models.llama_model(attention_bias=True)
    for leaf, kind in ODD.items():
        old = model.get_submodule(f"model.layers.0.{leaf}")
        model.set_submodule(f"model.layers.0.{leaf}", kind(old.in_features, old.out_features, old.bias is not None))
    return model


def test_what_computes_something_else_stays_float_and_a_subclass_that_does_not_is_quantized(odd_model):
    made = make_plan(open_model(odd_model), Recipe.of(["w8a8"]))
    assert quantized(made) == [name for name in LLAMA_LINEARS if name != "model.layers.0.mlp.up_proj"]
    assert left(made)["model.layers.0.mlp.up_proj"] == "is multiplied as it stands, by no layer"
    assert made.linears_left == ("lm_head",)


def test_a_config_names_every_subclass_that_is_left(odd_model):
    """Other software goes by the class, so that it would take a scheme for what computes something else."""
    made = make_plan(open_model(odd_model), Recipe.of(["w8a8"]))
    assert set(made.ignored) == {"lm_head", "model.layers.0.mlp.up_proj"}


def test_bitsandbytes_gets_the_layers_that_its_loader_replaces(odd_model):
    """Those of torch's own class, and Conv1D."""
    made = make_plan(open_model(odd_model), Recipe.of(["llm-int8"]))
    odd = {f"model.layers.0.{leaf}" for leaf in ODD}
    why = "is of a class that transformers with bitsandbytes passes by; --format quantkit has it"
    assert set(quantized(made)) == set(LLAMA_LINEARS) - odd
    for name in odd - {"model.layers.0.mlp.up_proj"}:
        assert left(made)[name] == why
    assert set(made.ignored) == {*odd, "lm_head"}


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
