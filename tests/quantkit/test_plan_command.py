"""`quantkit plan`: what `quantize` would do, without a weight being read."""

import json

import models
import pytest

from quantkit import quantize
from quantkit.explanation import plan_to_dict
from quantkit.pipeline import prepare
from quantkit.shards import ShardReader

SMOOTH = ["-m", "smoothquant", "-m", "w8a8"]


@pytest.fixture
def unread(monkeypatch):
    """Reading a weight fails."""

    def get(self, name):
        raise AssertionError(f"{name} is read")

    monkeypatch.setattr(ShardReader, "get", get)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gpt_oss", "hrm_text"])
def test_no_weight_is_read_and_nothing_written(unread, cli, tiny_folder, tmp_path, monkeypatch, model_type):
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tiny_folder(model_type).iterdir()}
    result = cli("plan", tiny_folder(model_type), *SMOOTH)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{tiny_folder(model_type)}: smoothquant")
    assert "linear layers: int8, activations per token" in result.stdout
    assert {path.name: path.stat().st_mtime_ns for path in tiny_folder(model_type).iterdir()} == before
    assert list(tmp_path.iterdir()) == []


def test_explain_adds_the_groups(cli, tiny_folder):
    short, long = cli("plan", tiny_folder("llama"), *SMOOTH), cli("plan", tiny_folder("llama"), *SMOOTH, "--explain")
    group = (
        "norm input_layernorm.weight, 64 channels -> self_attn.k_proj.weight, self_attn.q_proj.weight, "
        "self_attn.v_proj.weight"
    )
    assert "8 groups found" in short.stdout
    assert group not in short.stdout
    assert "model.layers: blocks 0 to 1\n" in long.stdout
    assert f"\n  {group}\n" in long.stdout


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_json_is_the_whole_plan(unread, cli, tiny_folder, model_type):
    result = cli("plan", tiny_folder(model_type), *SMOOTH, "--json")
    assert result.exit_code == 0, result.stderr
    made, recipe = prepare(tiny_folder(model_type), steps=["smoothquant", "w8a8"])
    told = json.loads(result.stdout)
    assert set(told.pop("budget")) == {"bytes_before", "bytes_after", "disk", "memory", "time"}
    assert told == plan_to_dict(made, recipe, str(tiny_folder(model_type)))


@pytest.mark.parametrize(
    ("model_type", "words", "arguments"),
    [
        ("mixtral", ["-m", "int8"], {"steps": ["int8"]}),
        ("hrm_text", ["-m", "w8a8"], {"steps": ["w8a8"]}),
        ("gpt2", ["--recipe", "llm-int8"], {"recipe": "llm-int8"}),
        (
            "gpt_oss",
            ["-m", "fp8", "--format", "compressed-tensors"],
            {"steps": ["fp8"], "format": "compressed-tensors"},
        ),
        (
            "llama",
            ["-m", "w8a8", "--include", "*.mlp.*", "--include", "lm_head", "--ignore", "*.down_proj"],
            {"steps": ["w8a8"], "include": ["*.mlp.*", "lm_head"], "ignore": ["*.down_proj"]},
        ),
    ],
)
def test_quantize_does_what_the_plan_says(cli, tiny_folder, tmp_path, model_type, words, arguments):
    """The same layers, reasons, patterns and format, and as many bytes."""
    plan = json.loads(cli("plan", tiny_folder(model_type), *words, "--json").stdout)
    report = quantize(tiny_folder(model_type), tmp_path / "out", progress=False, **arguments).to_dict()
    assert plan["format"] == report["format"]
    assert plan["output_bytes"] == report["bytes_after"]
    assert plan["recipe"] == report["recipe"]
    assert plan["left_alone"] == [
        {"module": item["module"], "shape": list(item["shape"]), "reason": item["reason"]}
        for item in report["left_alone"]
    ]
    assert sum(target["experts"] or 1 for target in plan["targets"]) == len(report["layers"])
    tensors = models.read_tensors(tmp_path / "out")
    for target in plan["targets"]:
        stem = target["key"].removesuffix(".weight")
        assert target["experts"] or f"{stem}.weight" in tensors or f"{stem}.weight_packed" in tensors
        assert not target["experts"] or target["key"] not in tensors


def test_a_compressed_model_is_planned_when_it_is_to_be_turned_into_float(cli, mistake, compressed):
    folder = compressed("int8")
    mistake("plan", folder, "-m", "w8a8", says=("is compressed already", "--dequantize"))
    result = cli("plan", folder, "-m", "w8a8", "--dequantize", "--json")
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["targets"]) == 14


def test_mistakes_are_one_sentence(mistake, tiny_folder, model_folder, tmp_path):
    folder = tiny_folder("llama")
    mistake("plan", folder, says=("at least one step",))
    mistake("plan", folder, "-m", "w8a8", "--ignore", "nothing", says=("'nothing'", "matches none of the 15"))
    mistake("plan", folder, "-m", "int8:group=128", says=("group size 128 does not divide", "12 layers"))
    mistake("plan", folder, "-m", "w8a8", "--recipe", "w8a8", says=("not both",))
    mistake("plan", folder, "-m", "fp8:dtype=e5m2", "--format", "compressed-tensors", says=("cannot hold this recipe",))
    mistake("plan", tmp_path / "none", "-m", "w8a8", says=("does not exist",))
    mistake("plan", model_folder("bert"), "-m", "w8a8", says=("not a causal language model",))


class TestPrepare:
    def test_a_model_in_memory_is_planned_and_not_changed(self):
        model = models.llama_model()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        made, recipe = prepare(model, steps="smoothquant", ignore="*.down_proj")
        assert (made.layout, [str(step) for step in recipe.steps]) == (None, ["smoothquant:alpha=0.5"])
        assert recipe.ignore == ("*.down_proj",)
        assert all(models.same(value, before[name]) for name, value in model.state_dict().items())

    def test_patterns_are_added_to_a_recipe(self, tiny_folder):
        made, recipe = prepare(tiny_folder("llama"), recipe="w8a8", include=["*.mlp.*"])
        assert recipe.include == ("*.mlp.*",)
        assert len(made.targets) == 6
