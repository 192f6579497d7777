"""A plan in words and as data: everything is in it."""

import json

import pytest

from quantkit.checkpoint import Hub, open_folder
from quantkit.discovery import Edit, Group, LinearUse, Refusal, Structure
from quantkit.explanation import plan_to_dict, plan_to_text
from quantkit.exploration import Findings
from quantkit.planning import LeftAlone, Plan, make_plan
from quantkit.recipe import Recipe

BOTH = ["smoothquant", "w8a8"]


def planned(source, *steps, **patterns):
    recipe = Recipe.of(steps or BOTH, **patterns)
    return make_plan(source, recipe), recipe


def as_dict(source, *steps, **patterns):
    """Through JSON and back."""
    made, recipe = planned(source, *steps, **patterns)
    return made, json.loads(json.dumps(plan_to_dict(made, recipe, "the/model"), allow_nan=False))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gpt_oss", "hrm_text", "jamba", "gemma3"])
def test_the_dictionary_names_every_matrix_and_every_group(tiny_source, model_type):
    source = tiny_source(model_type)
    made, found = as_dict(source)
    named = {module for target in found["targets"] for module in target["modules"]}
    named |= {item["module"] for item in found["left_alone"]}
    matrices = {name for name, p in source.skeleton.named_parameters(remove_duplicate=False) if p.ndim > 1}
    assert named == {name.removesuffix(".weight") for name in matrices}
    assert all(item["reason"] for item in found["left_alone"])
    assert {target["key"]: target["shape"] for target in found["targets"]} == {
        key: [target.out_features, target.in_features] for key, target in made.targets.items()
    }
    groups = [(group["block"], group["producer"]) for group in found["groups"]]
    structures = made.findings.structures
    assert groups == [
        (f"{found['blocks']}.{i}", group.name) for i in sorted(structures) for group in structures[i].groups
    ]
    assert len(groups) == len(set(groups)) > 1
    refused = [(each["block"], each["parameter"], each["kind"]) for each in found["refused"]]
    assert len(refused) == sum(len(structure.refusals) for structure in structures.values()) == len(set(refused))
    assert all(each["reason"] for each in found["refused"])


def test_the_dictionary_says_what_it_is_of(tiny_source):
    made, found = as_dict(tiny_source("llama"), *BOTH, ignore=["*.down_proj"])
    assert found["model"] == "the/model"
    assert found["recipe"]["steps"][0] == "smoothquant:alpha=0.5"
    assert found["recipe"]["ignore"] == ["*.down_proj"]
    assert found["format"] == "compressed-tensors"
    assert found["output_bytes"] == made.output_bytes
    assert found["targets"][0]["scheme"] == "int8, activations per token"
    assert {target["experts"] for target in found["targets"]} == {0}
    assert as_dict(tiny_source("llama"), "smoothquant")[1]["format"] == "float"


@pytest.mark.parametrize(("model_type", "plus_one"), [("llama", False), ("gemma2", True)])
def test_a_group_says_what_is_divided_and_multiplied(tiny_source, model_type, plus_one):
    _, found = as_dict(tiny_source(model_type))
    group = next(group for group in found["groups"] if group["producer"] == "input_layernorm.weight")
    assert group == {
        "block": "model.layers.0",
        "producer": "input_layernorm.weight",
        "kind": "norm",
        "channels": 64,
        "divides": ["input_layernorm.weight"],
        "multiplies": [f"self_attn.{leaf}_proj.weight" for leaf in "kqv"],
        "one_plus_weight": plus_one,
        "proven": False,
    }


def test_experts_are_counted_as_layers(tiny_source):
    made, recipe = planned(tiny_source("gpt_oss"))
    assert "\n  quantized  24 linear layers: int8, activations per token\n" in plan_to_text(
        made, recipe, "m", explain=False
    )
    _, found = as_dict(tiny_source("gpt_oss"))
    assert sorted({target["experts"] for target in found["targets"]}) == [0, 4]


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "jamba", "gemma3", "opt"])
def test_the_text_has_every_reason_and_with_detail_every_parameter(tiny_source, model_type):
    made, recipe = planned(tiny_source(model_type))
    short, long = (plan_to_text(made, recipe, "m", explain=explain) for explain in (False, True))
    assert long.startswith(short)
    for item in made.left:
        (line,) = [line for line in short.splitlines() if line.endswith(f": {item.reason}")]
        assert line.startswith("  left alone ")
    assert f"{made.output_bytes:,} bytes" in short
    detail = long.removeprefix(short)
    for structure in made.findings.structures.values():
        for group in structure.groups:
            assert f"{group.kind} {group.name}" in detail
            assert all(edit.parameter in detail for edit in (*group.producers, *group.consumers))
        for each in structure.refusals:
            assert f"no group at {each.kind} {each.parameter}: {each.reason}" in detail
        for name in (*(use.parameter for use in structure.linears), *structure.others):
            assert name in detail


def made_plan(source, **changes):
    made = make_plan(source, Recipe.of(["w8a8"]))
    return Plan(**{**vars(made), **changes})


def test_long_lists_are_cut_and_blocks_that_are_alike_told_together(tiny_source):
    """Blocks 0, 2, 3 and 4 are alike, block 1 is another."""
    edit = Edit("norm.weight", 0, (0, 1), -1, 1.0)
    bias, weight = Edit("norm.bias", 0, (0, 1), -1), Edit("up.weight", 1, (0, 1), 1)
    group = Group("norm.weight", "norm", 2, (edit, bias), (weight,))
    experts = LinearUse("experts.up", 2, 1, 0)
    router = LinearUse("gate.weight", 1, 0, None, "router", "it chooses")
    refusal = Refusal("other.weight", "linear", "it cannot")
    one = Structure((group,), (refusal,), (experts, router), {"conv.weight": "conv"})
    findings = Findings("layers", 5, {0: one, 1: Structure((), (), (experts,), {}), 2: one, 3: one, 4: one})
    left = tuple(LeftAlone(f"module{number}", (2, 2), "because") for number in range(5))
    source = tiny_source("llama")
    made = made_plan(source, findings=findings, left=left, unused=("a", "b"), notes=("a note",))
    lines = plan_to_text(made, Recipe.of(["w8a8"]), "the/model", explain=True).splitlines()
    assert lines[0] == (
        "the/model: w8a8:activation=token,weight_range=absmax,activation_range=absmax, as compressed-tensors"
    )
    assert "  left alone module0, module1, module2 and 2 more: because" in lines
    assert "  copied, though the model does not use them: a, b" in lines
    assert "  smoothing  4 groups found (each is proven on the weights when it is folded)" in lines
    assert "  note: a note" in lines
    assert lines[lines.index("layers: blocks 0, 2 to 4") :] == [
        "layers: blocks 0, 2 to 4",
        "  norm norm.weight (with norm.bias), multiplies by 1 + weight, 2 channels -> up.weight",
        "  no group at linear other.weight: it cannot",
        "  experts experts.up",
        "  router gate.weight: it chooses",
        "  other conv.weight: conv",
        "layers: block 1",
        "  experts experts.up",
    ]


def test_nothing_is_said_of_what_is_not_there(model_folder):
    made = make_plan(open_folder(model_folder("llama"), Hub()), Recipe.of(["w8a8"]))
    text = plan_to_text(made, Recipe.of(["w8a8"]), "m", explain=False)
    assert not [word for word in ("smoothing", "copied", "note:") if word in text]
