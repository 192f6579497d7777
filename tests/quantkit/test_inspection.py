import itertools
import json
import re
import subprocess
import sys

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit import quantize
from quantkit.checkpoint import read_config
from quantkit.inspection import _listed, inspect_checkpoint
from quantkit.recipe import recipe_names

LAYER = "model.layers.1.mlp.up_proj"
CLEAN = [(recipe, "llama") for recipe in recipe_names()]
CLEAN += [("w8a8", n) for n in ("llama_tied", "llama_bf16", "llama_odd", "llama_unused", "llama_second_name", "opt")]
CLEAN += [("w8a8", "opt_short_names"), ("fp8-e5m2", "llama_odd"), ("int8", "llama_odd"), ("fp8-static", "opt")]
CLEAN += [(recipe, "mixtral") for recipe in ("w8a8", "int8", "fp8", "w8a8-static", "llm-int8", "smoothquant-w8a8")]
CLEAN += [(recipe, "gpt2") for recipe in ("w8a8", "int8", "fp8-static", "llm-int8", "fp8-e5m2")]
CLEAN += [("w8a8", "gpt2", "compressed-tensors"), ("int8", "gpt2_untied", "compressed-tensors")]
CLEAN += [("int4-channel", name) for name in ("llama_odd", "mixtral", "gpt2", "gpt_oss")]
CLEAN += [("int4", "llama", "quantkit"), ("int4-channel", "gpt2_untied", "compressed-tensors")]
CLEAN += [("llm-int8", "opt"), ("llm-int8", "llama_bf16"), ("llm-int8", "mixtral", "quantkit")]
CLEAN += [(recipe, "gpt_oss") for recipe in ("w8a8", "int8", "fp8", "llm-int8", "fp8-static")]


@pytest.mark.parametrize("case", CLEAN, ids="-".join)
def test_what_quantize_wrote_has_no_problem_and_the_reports_numbers(compressed, case):
    folder = compressed(*case)
    found, report = inspect_checkpoint(folder), json.loads((folder / "quantkit_report.json").read_text())
    tensors = models.read_tensors(folder)
    assert found.problems == []
    assert found.format == report["format"]
    assert found.nbytes == report["bytes_after"] == sum(tensor.nbytes for tensor in tensors.values())
    assert found.tensors == {
        key: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for key, tensor in tensors.items()
    }
    assert sum(found.dtypes.values()) == found.nbytes
    counts = {count.scheme: count for count in found.schemes}
    count = counts[report["layers"][0]["scheme"]]
    assert count.layers == len(report["layers"])
    assert count.weights == sum(layer["shape"][0] * layer["shape"][1] for layer in report["layers"])
    assert count.bits_per_weight == pytest.approx(report["bits_per_weight"], rel=1e-12)


def test_layers_that_make_a_weight_together_are_counted_as_they_lie_on_disk(tiny_folder, tmp_path):
    """HRM's checkpoints hold the gate and up layers of an MLP in one tensor, which the model splits in two."""
    report = quantize(tiny_folder("hrm_text"), tmp_path / "out", steps=["w8a8"], progress=False)
    found = inspect_checkpoint(tmp_path / "out")
    assert found.problems == []
    assert [count.layers for count in found.schemes if count.scheme != "float"] == [len(report.layers)]
    assert found.schemes[0].bits_per_weight == pytest.approx(report.bits_per_weight, rel=1e-12)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_sharded", "llama_unused", "opt", "gpt2", "mixtral"])
def test_a_float_checkpoint_has_no_problem(model_folder, name):
    found = inspect_checkpoint(model_folder(name))
    assert (found.format, found.problems) == ("float", [])


def test_a_bf16_checkpoints_float_layers_take_16_bits(model_folder):
    found = inspect_checkpoint(model_folder("llama_bf16"))
    assert [(count.scheme, count.layers, count.bits_per_weight) for count in found.schemes] == [("float", 15, 16.0)]


@pytest.mark.parametrize("name", ["llama_bf16", "llama_second_name"])
def test_bits_are_those_of_the_files_whatever_dtype_the_config_says(model_folder, tmp_path, name):
    folder = models.copy(model_folder(name), tmp_path / "model")
    bits = [(count.layers, count.bits_per_weight) for count in inspect_checkpoint(folder).schemes]
    for dtype in (None, "float16", "float64"):
        models.change_config(folder, dtype=dtype)
        found = inspect_checkpoint(folder)
        assert [(count.layers, count.bits_per_weight) for count in found.schemes] == bits
        assert found.problems == []


def test_an_unused_tensor_of_a_rare_dtype_does_no_harm(cli, model_folder, tmp_path):
    extra = {"left.over": torch.arange(5).to(torch.uint32), "left.e8m0": torch.ones(3).to(torch.float8_e8m0fnu)}
    folder = models.change_tensors(models.copy(model_folder(), tmp_path / "model"), lambda tensors: tensors | extra)
    assert inspect_checkpoint(folder).problems == []
    assert cli("quantize", folder, "-o", tmp_path / "out", "-m", "w8a8").exit_code == 0
    written = models.read_tensors(tmp_path / "out")
    assert all(models.same(written[key], tensor) for key, tensor in extra.items())
    assert inspect_checkpoint(tmp_path / "out").problems == []


# The listing


def expanded(line):
    """The tensors that a line of the listing stands for, by a reading of its own."""
    name, _, kind = line.strip().partition(" ")
    places = []
    for part in name.split("."):
        places.append([])
        for run in part.strip("{}").replace("..", "-").split(",") if part.startswith("{") else [part]:
            first, dash, last = run.partition("-") if part.startswith("{") else (run, "", "")
            places[-1] += [str(n) for n in range(int(first), int(last) + 1)] if dash else [first]
    return {".".join(parts): kind.strip() for parts in itertools.product(*places)}


def listing(tensors):
    return [re.sub(r"\.\.(?=\d)", "-", line) for line in _listed(tensors)]


def kinds(tensors):
    return {name: f"{dtype} {shape}" for name, (dtype, shape) in tensors.items()}


def test_the_text_lists_every_tensor_with_blocks_collapsed(cli, compressed):
    folder = compressed("w8a8")
    text = cli("inspect", folder).stdout
    assert re.search(r"^  model\.layers\.\{0\.\.1\}\.mlp\.up_proj\.weight +int8 \[256, 128\]$", text, re.MULTILINE)
    assert re.search(r"^  model\.norm\.weight +float32 \[128\]$", text, re.MULTILINE)
    assert len(text.splitlines()) < 30


def test_experts_are_collapsed_too_and_what_differs_has_lines_of_its_own():
    same = {f"l.{i}.e.{j}.w": ("int8", [4, 4]) for i in range(5) for j in range(3)}
    assert _listed(same) == ["l.{0..4}.e.{0..2}.w int8 [4, 4]"]
    other = same | {"l.3.e.1.w": ("float32", [4, 4])}
    assert _listed(other) == [
        "l.3.e.1.w             float32 [4, 4]",
        "l.3.e.{0,2}.w         int8 [4, 4]",
        "l.{0..2,4}.e.{0..2}.w int8 [4, 4]",
    ]


@given(
    st.dictionaries(
        st.lists(st.sampled_from(["0", "1", "2", "3", "10", "01", "w"]), min_size=1, max_size=4).map(".".join),
        st.tuples(st.sampled_from(["int8", "float32"]), st.just([1])),
    )
)
def test_the_listing_stands_for_just_the_tensors(tensors):
    found = [expanded(line) for line in listing(tensors)]
    assert sum(map(len, found)) == len(tensors)
    assert {name: kind for one in found for name, kind in one.items()} == kinds(tensors)


@pytest.mark.parametrize("module", ["quantkit", "quantkit.cli"])
def test_python_runs_the_command_line(module, tmp_path):
    command = [sys.executable, "-m", module, "inspect", str(tmp_path / "none")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ")
    assert "none does not exist" in result.stderr


def spoiled(key, change):
    return lambda tensors: tensors | {key: change(tensors[key])}


def dropped(key):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key}


def one_value(value):
    def change(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    return change


SCALE, WEIGHT, INPUT = f"{LAYER}.weight_scale", f"{LAYER}.weight", f"{LAYER}.input_scale"
SCB, TILES = f"{LAYER}.SCB", f"{LAYER}.weight_format"
TAMPERINGS = {
    "scale dropped": ("w8a8", dropped(SCALE), f"no tensor makes '{SCALE}'"),
    "weight dropped": ("w8a8", dropped(WEIGHT), f"no tensor makes '{WEIGHT}'"),
    "packed dropped": ("int8", dropped(f"{LAYER}.weight_packed"), "weight_packed"),
    "shape dropped": ("int8", dropped(f"{LAYER}.weight_shape"), "weight_shape"),
    "norm dropped": ("w8a8", dropped("model.norm.weight"), "'model.norm.weight'"),
    "weight in float": ("w8a8", spoiled(WEIGHT, torch.Tensor.float), f"'{WEIGHT}' is torch.float32"),
    "weight in uint8": ("w8a8", spoiled(WEIGHT, lambda t: t.view(torch.uint8)), "torch.uint8 where torch.int8"),
    "other fp8": ("fp8", spoiled(WEIGHT, lambda t: t.view(torch.float8_e5m2)), "torch.float8_e5m2 where"),
    "scale in int": ("w8a8", spoiled(SCALE, lambda t: torch.ones_like(t, dtype=torch.int32)), "torch.int32 where"),
    "scale in double": ("w8a8", spoiled(SCALE, torch.Tensor.double), "torch.float64 where"),
    "scale's shape": ("w8a8", spoiled(SCALE, lambda t: t.view(-1)), "[256] where [256, 1]"),
    "weight's shape": ("w8a8", spoiled(WEIGHT, lambda t: t[:, 1:].contiguous()), "[256, 127] where [256, 128]"),
    "native weight's shape": ("fp8-e5m2", spoiled(WEIGHT, lambda t: t[:, 1:].contiguous()), "[256, 31]"),
    "scale negative": ("w8a8", spoiled(SCALE, one_value(-1.0)), f"a scale in '{SCALE}' is not"),
    "scale zero": ("w8a8", spoiled(SCALE, one_value(0.0)), f"a scale in '{SCALE}' is not"),
    "scale NaN": ("int8-g128", spoiled(SCALE, one_value(float("nan"))), f"a scale in '{SCALE}' is not"),
    "scale infinite": ("fp8-e5m2", spoiled(SCALE, one_value(float("inf"))), f"a scale in '{SCALE}' is not"),
    "stored shape": ("int8", spoiled(f"{LAYER}.weight_shape", lambda t: t.flip(0)), "says [128, 256]"),
    "zero point": ("int8", lambda t: t | {f"{LAYER}.weight_zero_point": torch.ones(1)}, "not part of its layer's"),
    "static scale dropped": ("w8a8-static", dropped(INPUT), f"no tensor makes '{INPUT}'"),
    "static scale zero": ("fp8-static", spoiled(INPUT, one_value(0.0)), f"a scale in '{INPUT}' is not"),
    "static scale's shape": ("w8a8-static", spoiled(INPUT, lambda t: t[0]), "[] where [1] is expected"),
    "tensor's scale by row": ("fp8-static", spoiled(SCALE, lambda t: t.repeat(256, 1)), "[256, 1] where [1]"),
    "block scale negative": ("fp8-block", spoiled(SCALE, one_value(-1.0)), f"a scale in '{SCALE}' is not"),
    "SCB dropped": ("llm-int8", dropped(SCB), f"no tensor makes '{SCB}'"),
    "SCB negative": ("llm-int8", spoiled(SCB, one_value(-1.0)), f"a scale in '{SCB}' is not"),
    "SCB zero": ("llm-int8", spoiled(SCB, one_value(0.0)), f"a scale in '{SCB}' is not"),
    "SCB in half": ("llm-int8", spoiled(SCB, torch.Tensor.half), "torch.float16 where torch.float32"),
    "tiled weight": ("llm-int8", spoiled(TILES, one_value(1)), f"'{TILES}' is 1 where 0"),
}
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2"
EXPERT_TAMPERINGS = {
    "scale dropped": ("w8a8", dropped(f"{EXPERT}.weight_scale"), f"'{EXPERT}.weight_scale' is missing"),
    "weight dropped": ("w8a8", dropped(f"{EXPERT}.weight"), f"'{EXPERT}.weight' is missing"),
    "scale negative": ("fp8", spoiled(f"{EXPERT}.weight_scale", one_value(-1.0)), f"'{EXPERT}.weight_scale' is not"),
    "stored shape": ("int8", spoiled(f"{EXPERT}.weight_shape", lambda t: t.flip(0)), "says [48, 32] where"),
    "zero point": ("int8", lambda t: t | {f"{EXPERT}.weight_zero_point": torch.ones(1)}, "is not part of the scheme"),
    "norm dropped": ("w8a8", dropped("model.norm.weight"), "no tensor makes 'model.norm.weight'"),
    "other layer's scale dropped": (
        "w8a8",
        dropped("model.layers.0.self_attn.q_proj.weight_scale"),
        "no tensor makes 'model.layers.0.self_attn.q_proj.weight_scale'",
    ),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_every_tampering_is_found_and_exits_1(cli, compressed, tmp_path, name):
    recipe, change, says = TAMPERINGS[name]
    folder = models.change_tensors(models.copy(compressed(recipe), tmp_path / "model"), change)
    problems = inspect_checkpoint(folder).problems
    assert len(problems) == 1
    assert says in problems[0]
    result = cli("inspect", folder)
    assert result.exit_code == 1
    assert f"problem: {problems[0]}" in result.stdout
    assert result.stderr == ""
    assert json.loads(cli("inspect", folder, "--json").stdout)["problems"] == problems


@pytest.mark.parametrize("name", EXPERT_TAMPERINGS)
def test_a_tampering_with_a_mixture_is_found(compressed, tmp_path, name):
    """Experts are merged while they are loaded, and that must not hide what is missing."""
    recipe, change, says = EXPERT_TAMPERINGS[name]
    folder = models.copy(compressed(recipe, "mixtral"), tmp_path / "model")
    assert not inspect_checkpoint(folder).problems
    (problem,) = inspect_checkpoint(models.change_tensors(folder, change)).problems
    assert says in problem


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("model.norm.weight", "no tensor makes 'model.norm.weight'"),
        (
            "model.layers.0.self_attn.q_proj.input_scale",
            "no tensor makes 'model.layers.0.self_attn.q_proj.input_scale'",
        ),
        (f"{EXPERT}.weight", "'model.layers.1.mlp.experts.down_proj' is [3, 32, 48] where [4, 32, 48] is expected"),
        (f"{EXPERT[:-1]}1.weight", "no tensor makes 'model.layers.1.mlp.experts.gate_up_proj'"),
    ],
)
def test_a_mixture_whose_experts_are_in_float_has_a_problem(compressed, tmp_path, key, says):
    folder = models.copy(compressed("w8a8-static", "mixtral"), tmp_path / "model")
    assert not inspect_checkpoint(folder).problems
    assert inspect_checkpoint(models.change_tensors(folder, dropped(key))).problems[0] == says


def test_a_row_of_zeros_in_bitsandbytes_format_is_no_problem(compressed, tmp_path):
    """Its largest magnitude is 0."""

    def clear(tensors):
        tensors[SCB][5], tensors[WEIGHT][5] = 0, 0
        return tensors

    folder = models.change_tensors(models.copy(compressed("llm-int8"), tmp_path / "model"), clear)
    assert not inspect_checkpoint(folder).problems


def test_a_tampered_config_is_found(compressed, tmp_path):
    folder = models.copy(compressed("w8a8"), tmp_path / "model")
    config = read_config(folder)["quantization_config"]
    config["ignore"].append(LAYER)
    models.change_config(folder, quantization_config=config)
    assert inspect_checkpoint(folder).problems
    config["ignore"] = []
    models.change_config(folder, quantization_config=config)
    assert inspect_checkpoint(folder).problems
