"""LLM.int8 with outlier columns of the weight in float (`llm-int8:outlier_weight=float`), from recipe to reload.

Oracle of the product: the slow float64 reference of linear_llm_int8 on what is left of x, plus the float64 product of
the kept columns. Of the choice of columns: hooks in transformers' own model. Of the whole: with all columns kept it is
the float model, with none it is `llm-int8`.
"""

import json
from pathlib import Path

import models
import pytest
import torch
from quantkit_kernels import reference
from quantkit_kernels.formats import dequantize
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.checkpoint import Hub, open_folder
from quantkit.dequantization import dequantized
from quantkit.errors import CheckpointError, QuantkitError, RecipeError
from quantkit.formats import bitsandbytes, choose, compressed_tensors, native
from quantkit.hf import quantized_layers
from quantkit.inspection import inspect_checkpoint
from quantkit.modules import QuantizedLinear, quantize_linear
from quantkit.pipeline import prepare
from quantkit.report import Report
from quantkit.scheme import Scheme
from quantkit.texts import read, tokenize

STEP = "llm-int8:threshold=3.0,outlier_weight=float"
KEPT = Scheme("int8", None, "int8", threshold=6.0, outlier_columns=0)
IDS = torch.randint(32, 250, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_folder, calibration) -> tuple[Path, Report]:
    """The tiny Llama with its columns from 3.0 in float, and the report."""
    output = tmp_path_factory.mktemp("columns") / "out"
    return output, quantkit.quantize(model_folder("llama"), output, steps=[STEP], progress=False, **calibration)


def layer(columns, dtype=torch.float32, n=13, k=70, bias=True):
    """A layer with random weights of which these columns are large and in float, and its float weight [N, K]."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator)
    weight[:, columns] *= 50
    weight, columns = weight.to(dtype), torch.tensor(columns, dtype=torch.long)
    scheme = Scheme("int8", None, "int8", threshold=6.0, outlier_columns=len(columns))
    codes, scale = quantize_linear(weight.index_fill(1, columns, 0.0), scheme)
    made = QuantizedLinear(k, n, scheme, native, bias=bias, dtype=dtype)
    for name, tensor in native.compress(scheme, codes, scale, outliers=(columns, weight[:, columns])).items():
        made.get_buffer(name).copy_(tensor)
    if bias:
        made.bias.data = torch.randn(n, generator=generator).to(dtype)
    return made, weight


@pytest.mark.parametrize("largest", [100.0, 5.9])
@pytest.mark.parametrize("columns", [[], [3], [0, 8, 69]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_product_is_llm_int8_of_the_rest_and_a_float_product_of_the_columns(columns, dtype, largest):
    """Float32: K + O + 8 roundings of the sum of magnitudes (those of linear_llm_int8's own test, and the float sums of
    the columns); then a single rounding to x's dtype. The columns set no token's scale, also where they stay below the
    threshold."""
    made, weight = layer(columns, dtype)
    x = torch.randn(2, 9, 70, generator=torch.Generator().manual_seed(1))
    x[..., columns] = (30 * x[..., columns]).clamp(-largest, largest)
    x[0, 2, 5] = 11.0  # an outlier that calibration hasn't seen: LLM.int8 finds it
    x = x.to(dtype)
    out = made(x)
    assert out.dtype == dtype
    rest = x.index_fill(-1, torch.tensor(columns, dtype=torch.long), 0.0).view(18, 70)
    codes, scale = made.codes_and_scale()
    expected = reference.linear_llm_int8(rest, codes, scale, made.bias, 6.0)
    flat = x.view(18, 70).double()
    expected += flat[:, columns] @ weight[:, columns].double().t()
    magnitude = flat.abs() @ weight.double().abs().t() + made.bias.double().abs()
    float32_error = (70 + len(columns) + 8) * 2.0**-24 * 1.02 * magnitude
    bound = float32_error + torch.finfo(dtype).eps / 2 * (expected.abs() + float32_error)
    assert ((out.view(18, 13).double() - expected).abs() <= bound).all()


def test_columns_in_float_lose_nothing_however_large_they_are():
    """Only the columns are not zero in x: the layer gives the float product, where LLM.int8 alone is far off."""
    made, weight = layer([3, 40], bias=False)
    x = torch.zeros(4, 70)
    x[:, [3, 40]] = 100 * torch.randn(4, 2, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(made(x), x @ weight.t(), rtol=1e-6)


def test_a_change_of_dtype_leaves_the_columns_and_a_copy_computes_the_same(tmp_path):
    made, _ = layer([3, 40])
    before = {name: value.clone() for name, value in made.state_dict().items()}
    moved = made.half()
    assert all(models.same(moved.state_dict()[name], before[name]) for name in made.stored)
    torch.save(made.state_dict(), tmp_path / "state")
    other = QuantizedLinear(70, 13, made.scheme, native, bias=True, dtype=torch.float32)
    other.half().load_state_dict(torch.load(tmp_path / "state"))
    x = torch.randn(3, 70).half()
    assert torch.equal(other(x), made(x))


def test_it_compiles_to_the_same_numbers():
    made, _ = layer([3, 40])
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(torch.compile(made, backend="aot_eager", fullgraph=True)(x), made(x), rtol=1e-6, atol=1e-6)


# The format


def test_only_quantkits_own_format_can_say_it():
    assert choose(KEPT) is native
    for form in (bitsandbytes, compressed_tensors):
        assert form.reason_against(KEPT)
    with pytest.raises(RecipeError, match="no column"):
        choose(KEPT, "bitsandbytes")


def test_columns_go_with_a_scheme_that_has_them():
    codes, scale = torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 1)
    outliers = torch.tensor([1]), torch.ones(2, 1)
    with pytest.raises(ValueError, match="columns in float"):
        native.compress(KEPT, codes, scale)
    with pytest.raises(ValueError, match="columns in float"):
        native.compress(Scheme("int8"), codes, scale, outliers=outliers)


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_a_number_of_columns_is_one(value):
    with pytest.raises(RecipeError, match="outlier_columns"):
        Scheme("int8", None, "int8", threshold=6.0, outlier_columns=value)
    with pytest.raises(RecipeError, match="outlier_columns"):
        Scheme("int8", outlier_columns=1)


def test_the_config_says_how_many_columns_each_layer_has_and_is_version_2_only_then():
    config = json.loads(json.dumps(native.config(KEPT, ["a", "b", "c"], [], {"a": 4, "b": 0, "c": 4})))
    assert config["version"] == 2
    assert [group["modules"] for group in config["groups"]] == [["b"], ["a", "c"]]
    found = native.parse(config)
    assert [found.scheme_of(name).outlier_columns for name in "abc"] == [4, 0, 4]
    for scheme in (Scheme("int8"), Scheme("int8", None, "int8", threshold=6.0)):
        plain = native.config(scheme, ["a"], [])
        assert plain["version"] == 1
        assert "outlier_columns" not in plain["groups"][0]["scheme"]
        assert native.parse(plain).scheme_of("a") == scheme


# The whole


def test_the_columns_are_those_that_calibration_data_reached(made, model_folder, calibration):
    """What meets each block's first layers, seen by hooks: in the float model for the first block, and for the next in
    the compressed one, whose outputs the next block was calibrated with."""
    folder, _ = made
    floats = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)
    found = dict(quantized_layers(quantkit.load(folder, dtype=torch.float32)))
    for number, model in enumerate((floats, quantkit.load(folder, dtype=torch.float32))):
        name = f"model.layers.{number}.self_attn.q_proj"
        largest = torch.zeros(128)

        def see(_, inputs, largest=largest):
            torch.maximum(largest, inputs[0].detach().abs().flatten(0, 1).amax(0), out=largest)

        hook = model.get_submodule(name).register_forward_pre_hook(see)
        with torch.no_grad():
            model(input_ids=windows_of(calibration, folder))
        hook.remove()
        columns = (largest >= 3.0).nonzero().flatten()
        assert 0 < len(columns) < 128
        assert found[name].outlier_columns.tolist() == columns.tolist()


def windows_of(calibration, folder):
    """The calibration windows, which the recipe beside the checkpoint names: here all of the text's windows."""
    from quantkit_calibration.data import calibration_windows

    from quantkit.checkpoint import load_tokenizer
    from quantkit.pipeline import CHOICE

    texts = read(calibration["dataset"], purpose="calibration")
    samples, length = calibration["samples"], calibration["seq_len"]
    ids = tokenize(texts, load_tokenizer(folder), limit=CHOICE * samples * length).ids
    return calibration_windows(ids, samples, length, torch.Generator().manual_seed(0))


def test_what_is_stored_is_the_weight_itself_and_codes_of_the_rest(made, model_folder):
    folder, _ = made
    weights, stored = models.read_tensors(model_folder("llama")), models.read_tensors(folder)
    counts = set()
    for name, module in quantized_layers(quantkit.load(folder)):
        weight, columns = weights[f"{name}.weight"], stored[f"{name}.outlier_columns"].long()
        counts.add(len(columns))
        assert models.same(stored[f"{name}.outlier_weight"], weight[:, columns].contiguous())
        codes, scale = module.codes_and_scale()
        rest = weight.index_fill(1, columns, 0.0)
        assert not codes[:, columns].any()
        assert torch.equal(scale.flatten(), rest.abs().amax(1) / 127)
        assert ((dequantize(codes, scale) - rest).abs() <= scale / 2 * 1.0001).all()
    assert len(counts) > 1, "the layers have different numbers of columns, or the test says little"


def test_with_all_columns_in_float_it_is_the_float_model(tmp_path, model_folder, calibration):
    step = "llm-int8:threshold=1e-9,outlier_weight=float"
    quantkit.quantize(model_folder("llama"), tmp_path / "out", steps=[step], progress=False, **calibration)
    with torch.no_grad():
        logits = quantkit.load(tmp_path / "out")(IDS).logits
        expected = quantkit.load(model_folder("llama"))(IDS).logits
    assert torch.allclose(logits, expected, atol=1e-5 * float(expected.abs().max()))


def test_with_no_column_in_float_it_is_llm_int8(tmp_path, model_folder, calibration):
    common = {"progress": False, "format": "quantkit"}
    steps = ["llm-int8:threshold=1e9,outlier_weight=float"]
    report = quantkit.quantize(model_folder("llama"), tmp_path / "kept", steps=steps, **common, **calibration)
    assert {each.outlier_columns for each in report.layers} == {0}
    quantkit.quantize(model_folder("llama"), tmp_path / "plain", steps=["llm-int8:threshold=1e9"], **common)
    with torch.no_grad():
        one, other = (quantkit.load(tmp_path / name)(IDS).logits for name in ("kept", "plain"))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "threshold"), [("llama_bf16", 2), ("llama_odd", 2), ("gpt2", 0.2), ("opt_short_names", 2)]
)
def test_other_models_reload_and_are_saved_again_byte_for_byte(tmp_path, model_folder, calibration, name, threshold):
    step = f"llm-int8:threshold={threshold},outlier_weight=float"
    report = quantkit.quantize(model_folder(name), tmp_path / "out", steps=[step], progress=False, **calibration)
    assert any(each.outlier_columns for each in report.layers)
    model = quantkit.load(tmp_path / "out")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, other(IDS).logits)
    model.save_pretrained(tmp_path / "again")
    one, two = models.read_tensors(tmp_path / "out"), models.read_tensors(tmp_path / "again")
    named = {key.removeprefix("model."): value for key, value in two.items()}
    assert all(models.same(value, named[key.removeprefix("model.")]) for key, value in one.items() if "outlier" in key)
    assert inspect_checkpoint(tmp_path / "out").problems == []


def test_the_report_and_the_inspection_say_what_stays_in_float(made):
    folder, report = made
    total = sum(each.outlier_columns for each in report.layers)
    assert f"{total:,} columns of outliers" in report.to_text()
    told = json.loads((folder / "quantkit_report.json").read_text(encoding="utf-8"))
    assert [each["outlier_columns"] for each in told["layers"]] == [each.outlier_columns for each in report.layers]
    stored = models.read_tensors(folder)
    for each in report.layers:
        parts = [value for key, value in stored.items() if key.startswith(f"{each.module}.")]
        assert each.bits_per_weight == 8 * sum(part.nbytes for part in parts) / (each.shape[0] * each.shape[1])
    (count,) = [each for each in inspect_checkpoint(folder).schemes if each.scheme != "float"]
    assert count.scheme == "int8, activations per token, outliers from 3 in float, their weights too"
    assert count.bits_per_weight == pytest.approx(report.bits_per_weight)


def test_it_is_turned_into_float_again(made, model_folder):
    folder, _ = made
    source = open_folder(folder, Hub(), lambda source: dequantized(source.weights, source.config, source.name))
    weights = models.read_tensors(model_folder("llama"))
    assert set(source.weights.tensors) == set(weights)
    for name, module in quantized_layers(quantkit.load(folder)):
        columns, weight = module.outlier_columns.long(), weights[f"{name}.weight"]
        decoded = source.weights.get(f"{name}.weight")
        assert torch.equal(decoded[:, columns], weight[:, columns])
        assert ((decoded - weight).abs() <= module.weight_scale / 2 * 1.0001).all()


# What can't be had


def test_it_needs_data(mistake, model_folder, tmp_path):
    mistake("quantize", model_folder("llama"), "-o", tmp_path / "out", "-m", STEP, says=("needs data", "--dataset"))


def test_what_is_not_observed_stays_in_float_and_is_named(model_folder):
    plan, _ = prepare(model_folder("mixtral"), steps=[STEP], include=["*"])
    reasons = {left.module: left.reason for left in plan.left}
    assert "outside of the blocks" in reasons["lm_head"]
    experts = [module for module in reasons if "experts" in module]
    assert experts
    assert all("experts have scales by row" in reasons[module] for module in experts)
    assert any("on top of the planned size" in note for note in plan.notes)


@pytest.mark.parametrize("damage", ["order", "range", "nan", "shape"])
def test_damaged_columns_are_found(made, tmp_path, damage):
    folder = models.copy(made[0], tmp_path / "damaged")

    def change(tensors):
        name = next(key.rpartition(".")[0] for key, v in tensors.items() if "outlier_columns" in key and len(v) > 1)
        columns, weight = tensors[f"{name}.outlier_columns"], tensors[f"{name}.outlier_weight"]
        if damage == "order":
            tensors[f"{name}.outlier_columns"] = columns.flip(0)
        elif damage == "range":
            columns[-1] = 10**6
        elif damage == "nan":
            weight[0, 0] = float("nan")
        else:
            tensors[f"{name}.outlier_columns"] = columns[1:].clone()
        return tensors

    models.change_tensors(folder, change)
    assert inspect_checkpoint(folder).problems
    if damage == "shape":
        with pytest.raises(QuantkitError):
            quantkit.load(folder)
    if damage == "range":
        source = open_folder(folder, Hub(), lambda source: dequantized(source.weights, source.config, source.name))
        with pytest.raises(CheckpointError, match="names a column"):
            list(map(source.weights.get, source.weights.tensors))
