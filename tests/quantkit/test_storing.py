"""Pruned weights on disk: packed in quantkit's own format, or with their zeros in an ordinary one."""

import json

import mixtures
import models
import pytest
import torch
from quantkit_calibration import pruning
from quantkit_kernels import sparse24
from transformers import AutoModelForCausalLM

import quantkit
import quantkit.hf  # registers the format
import quantkit.transcoding
from quantkit import sparsity
from quantkit.checkpoint import Hub, open_folder, read_config
from quantkit.dequantization import dequantized
from quantkit.errors import CheckpointError, RecipeError
from quantkit.formats import native
from quantkit.inspection import inspect_checkpoint
from quantkit.modules import QuantizedLinear
from quantkit.naming import float_layout
from quantkit.pieces import compress_expert, expert_specs, stored_as
from quantkit.pipeline import prepare
from quantkit.scheme import Scheme

IDS = torch.arange(24).view(2, 12)
WANDA = "sparse24:criterion=wanda"
MAGNITUDE = "sparse24:criterion=magnitude"


def floats(folder):
    """The float tensors that a checkpoint of any format stands for, by name."""

    def decoded(source):
        shapes, transposed = float_layout(source)
        return dequantized(source.weights, source.config, source.name, shapes=shapes, transposed=transposed)

    source = open_folder(folder, Hub(), decoded)
    return {key: source.weights.get(key) for key in source.weights.tensors}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def write(folder, output, *steps, data=None, **more):
    return quantkit.quantize(folder, output, steps=steps, progress=False, **(data or {}), **more)


def folder_of(name, model_folder, tmp_path):
    if name not in mixtures.CONFIGS or name in models.BUILDERS:
        return model_folder(name)
    torch.manual_seed(0)
    model = models.randomized(AutoModelForCausalLM.from_config(mixtures.CONFIGS[name]()))
    return models.save(model, tmp_path / name)


@pytest.mark.parametrize(
    ("quantizer", "share"),
    [([], 9 / 16), (["int8"], 5 / 16), (["fp8:scheme=weight-only"], 5 / 16), (["w8a8"], 5 / 16), (["int4"], 3 / 16)],
)
@pytest.mark.parametrize("name", ["llama_bf16", "llama_fp16"])
def test_packed_weights_take_the_bytes_of_the_theory(model_folder, tmp_path, name, quantizer, share):
    """Two of four values and two places of 2 bits each, over four numbers of 16 bits; scales come on top."""
    quantizer = [f"{each}:group=channel" if each == "int4" else each for each in quantizer]
    report = write(model_folder(name), tmp_path / "out", MAGNITUDE, *quantizer, format="quantkit")
    model = quantkit.load(tmp_path / "out")
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) == len(report.layers) == 14
    for layer in layers:
        sizes = {leaf: layer.get_buffer(leaf).nbytes for leaf in layer.stored}
        weights = layer.in_features * layer.out_features
        assert (sizes["weight"] + sizes["weight_indices"]) / (2 * weights) == share
        assert sizes.get("weight_scale", 0) == (2 * layer.out_features if quantizer else 0)
    told = {told.module: told.bits_per_weight for told in report.layers}
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear))
    scales = 16 / layer.in_features if quantizer else 0
    assert told[name] == pytest.approx(16 * share + scales)


@pytest.mark.parametrize("quantizer", [[], ["int8"], ["fp8:scheme=weight-only"], ["w8a8"], ["int4:group=channel"]])
def test_vnm_weights_take_the_bytes_of_the_theory(model_folder, tmp_path, quantizer):
    """Castro et al. 2023: of M weights 2, each with its place in 2 bits, and 4 columns of a byte for V rows."""
    v, m = 32, 16
    write(model_folder("llama_bf16"), tmp_path / "out", f"{MAGNITUDE},pattern={v}:2:{m}", *quantizer, format="quantkit")
    model = quantkit.load(tmp_path / "out")
    bits = 16 if not quantizer else 4 if "int4" in quantizer[0] else 8
    for layer in (layer for layer in model.modules() if isinstance(layer, QuantizedLinear)):
        sizes = {leaf: layer.get_buffer(leaf).nbytes for leaf in layer.stored}
        rows, tiles = layer.out_features, layer.in_features // m
        assert sizes["weight"] == rows * -(-2 * tiles * bits // 32) * 4 if quantizer else rows * 2 * tiles * 2
        assert sizes["weight_indices"] == rows * -(-tiles // 8) * 4
        assert sizes["weight_columns"] == -(-rows // v) * 4 * tiles


CASES = [
    ("llama_bf16", [f"{WANDA},pattern=32:2:16"]),
    ("llama", ["smoothquant", f"{WANDA},pattern=64:2:8", "int8"]),
    ("llama", ["sparse24:pattern=24:2:8", "w8a8"]),
    ("gpt2", [f"{WANDA},pattern=16:2:8", "int4:group=channel"]),
    ("mixtral", [f"{WANDA},pattern=16:2:8", "int8"]),
    ("gpt_oss", [f"{WANDA},pattern=7:2:8", "fp8:dtype=e5m2"]),
    ("llama_bf16", ["smoothquant", WANDA]),
    ("llama_bf16", [WANDA, "smoothquant", "int8"]),
    ("llama", ["smoothquant", WANDA, "w8a8"]),
    ("llama", ["smoothquant", WANDA, "int4:group=channel"]),
    ("llama", [WANDA, "fp8"]),
    ("llama", [WANDA, "llm-int8"]),
    ("gpt2", ["sparse24:criterion=sparsegpt"]),
    ("gpt2", [WANDA, "w8a8:activation=tensor-static"]),
    ("mixtral", [WANDA, "int8"]),
    ("mixtral", [WANDA, "int4:group=channel"]),
    ("gpt_oss", ["sparse24:criterion=sparsegpt"]),
    ("gpt_oss", [WANDA, "fp8:dtype=e5m2"]),
    ("gpt_oss", [WANDA, "int4:group=channel"]),
]


@pytest.mark.parametrize(("name", "steps"), CASES)
def test_packed_or_with_zeros_the_weights_and_outputs_are_equal(model_folder, tmp_path, calibration, name, steps):
    """The very weights, masks and logits; by quantkit.load and AutoModel; and saved again with the same bytes."""
    folder = folder_of(name, model_folder, tmp_path)
    if "llm-int8" in steps:  # bitsandbytes has float32 scales as quantkit's own
        assert prepare(folder, steps=steps, format="dense")[0].layout.NAME == "bitsandbytes"
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    report = write(folder, packed, *steps, data=calibration, format="quantkit")
    plain = write(folder, dense, *steps, data=calibration, format="dense")
    assert report.bytes_after < plain.bytes_after
    made, expected = floats(packed), floats(dense)
    assert made.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(made[key], value), key
    out = logits(quantkit.load(packed, keep_decoded=False))
    assert torch.equal(out, logits(quantkit.load(dense)))
    kept = logits(quantkit.load(packed))  # weights as oneDNN orders them: sums in another order
    assert torch.allclose(kept.float(), out.float(), rtol=0, atol=0.02 * float(out.float().abs().max()))
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert torch.equal(logits(model), kept)
    model.save_pretrained(tmp_path / "again")
    before, after = models.read_tensors(packed), models.read_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(models.same(after[key], value) for key, value in before.items())
    assert inspect_checkpoint(packed).problems == []
    assert any("weight_indices" in key for key in before)


def test_zeros_are_written_unless_they_are_asked_to_be_packed(model_folder, tmp_path, cli):
    """`auto` is `dense`; the plan and the report say which it is, and the bytes of both."""
    sizes = {}
    for form in ("auto", "dense", "quantkit"):
        report = write(model_folder("llama"), tmp_path / form, MAGNITUDE, format=form)
        sizes[form] = report.bytes_after
        other = "dense" if form == "quantkit" else "quantkit"
        said = next(note for note in report.notes if "bytes of tensors" in note)
        assert f"{sizes[form]:,} bytes of tensors" in said
        assert f"--format {other}" in said
        text = cli("plan", model_folder("llama"), "-m", MAGNITUDE, "--format", form).stdout
        assert said in text
        assert f"{sizes[form]:,} bytes of tensors\n" in text
        assert ("packed     14 linear layers: 2:4 float" in text) == (form == "quantkit")
        assert ("packed     14 linear layers in float, 17.00 bits" in report.to_text()) == (form == "quantkit")
        card = (tmp_path / form / "README.md").read_text()
        assert ("packed linear layers, in float | 14" in card) == (form == "quantkit")
    assert sizes["auto"] == sizes["dense"] > sizes["quantkit"]
    assert models.read_tensors(tmp_path / "auto").keys() == models.read_tensors(model_folder("llama")).keys()
    assert "quantization_config" not in read_config(tmp_path / "dense")
    notes = [
        str(write(model_folder("llama"), tmp_path / f"to-{form}", MAGNITUDE, "w8a8", format=form).notes)
        for form in ("dense", "quantkit")
    ]
    assert f"they would take {report_bytes(tmp_path / 'to-quantkit'):,}" in notes[0]
    assert f"for other software too: {report_bytes(tmp_path / 'to-dense'):,}" in notes[1]
    assert "unpacked once" in notes[1]


def report_bytes(folder):
    return json.loads((folder / "quantkit_report.json").read_text())["bytes_after"]


@pytest.mark.parametrize(
    ("steps", "form", "says"),
    [
        (["w8a8"], "dense", "no step prunes; use --format auto"),
        ([f"{MAGNITUDE},pattern=64:2:20"], "quantkit", "20 weights of a group do not divide"),
        ([f"{MAGNITUDE},pattern=4:8"], "quantkit", "the pattern 4:8 has no packed form"),
        ([f"{MAGNITUDE},pattern=unstructured:0.5"], "quantkit", "has no packed form .*use --format dense"),
    ],
)
def test_what_there_is_nothing_for_is_refused(model_folder, steps, form, says):
    with pytest.raises(RecipeError, match=says):
        prepare(model_folder("llama"), steps=steps, format=form)


@pytest.mark.parametrize("step", ["llm-int8:outlier_weight=float,threshold=1.0", "int8"])
def test_what_is_never_packed_is_written_with_zeros_and_said(model_folder, tmp_path, calibration, step):
    pattern = "2:4" if step != "int8" else "4:8"
    steps = [f"{WANDA},pattern={pattern}", step]
    report = write(model_folder("llama"), tmp_path / "out", *steps, data=calibration, format="quantkit")
    assert any(note.startswith("zeros are written") for note in report.notes)
    assert not any("weight_indices" in key for key in models.read_tensors(tmp_path / "out"))
    keep, of = sparsity.GROUPS[pattern]
    decoded = {key: value for key, value in floats(tmp_path / "out").items() if "_proj" in key}
    assert all(sparsity.has_groups(value, keep, of) for value in decoded.values())


def test_layers_that_are_quantized_and_not_pruned_have_all_their_codes(model_folder, tmp_path, calibration):
    words = {"include": ["lm_head", "*_proj"], "format": "quantkit"}
    write(model_folder("llama"), tmp_path / "out", WANDA, "int8", data=calibration, **words)
    config = read_config(tmp_path / "out")["quantization_config"]
    assert config["version"] == 4
    assert [(len(each["modules"]), each["scheme"].get("sparsity")) for each in config["groups"]] in (
        [(14, "2:4"), (1, None)],
        [(1, None), (14, "2:4")],
    )
    assert "lm_head.weight_indices" not in models.read_tensors(tmp_path / "out")
    assert torch.isfinite(logits(quantkit.load(tmp_path / "out"))).all()
    assert inspect_checkpoint(tmp_path / "out").problems == []


def test_a_run_in_another_form_does_not_go_on(model_folder, tmp_path, monkeypatch):
    """GPT-2 in int8 is in quantkit's own format in both forms: what was begun packed isn't mixed with zeros."""
    from quantkit import pipeline

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "verify", stop)
        with pytest.raises(KeyboardInterrupt):
            write(model_folder("gpt2"), tmp_path / "out", MAGNITUDE, "int8", format="quantkit")
    with pytest.raises(CheckpointError, match="begun with another format"):
        write(model_folder("gpt2"), tmp_path / "out", MAGNITUDE, "int8", format="dense")
    report = write(model_folder("gpt2"), tmp_path / "out", MAGNITUDE, "int8", format="quantkit")
    assert report.verified["quantized"] == 8


def test_codes_without_a_product_are_unpacked_once(model_folder, tmp_path, monkeypatch):
    """W8A8 stays packed in the state dict; what the op takes is made in the first call, anew after a change."""
    write(model_folder("llama"), tmp_path / "out", MAGNITUDE, "w8a8", format="quantkit")
    model, calls, unpack = quantkit.load(tmp_path / "out"), [], sparse24.unpack
    monkeypatch.setattr(sparse24, "unpack", lambda *args: calls.append(1) or unpack(*args))
    first = logits(model)
    assert len(calls) == 14
    assert torch.equal(logits(model), first)
    assert len(calls) == 14
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert "model.layers.0.mlp.up_proj.weight_indices" in state
    model.model.layers[0].mlp.up_proj.weight_scale.mul_(2)
    assert not torch.equal(logits(model), first)
    assert len(calls) == 15


def test_damaged_places_of_experts_are_refused(model_folder, tmp_path):
    write(model_folder("mixtral"), tmp_path / "out", MAGNITUDE, "int8", format="quantkit")
    key = next(key for key in models.read_tensors(tmp_path / "out") if key.endswith("w1.weight_indices"))
    models.change_tensors(tmp_path / "out", lambda tensors: tensors | {key: torch.zeros_like(tensors[key])})
    assert inspect_checkpoint(tmp_path / "out").problems == [
        f"{key!r} does not say of every four weights where two are"
    ]
    with pytest.raises(CheckpointError, match="of every four weights"):
        quantkit.load(tmp_path / "out")


def test_vnm_weights_that_lie_in_parts_of_other_rows_keep_their_zeros(model_folder, tmp_path):
    """Mixtral's gate and up projection are pruned as one parameter of 2 N rows, which V must divide in both halves."""
    words = {"steps": [f"{MAGNITUDE},pattern=48:2:8", "int8"], "format": "quantkit"}
    plan, _ = prepare(model_folder("mixtral"), **words)
    experts = [target for target in plan.targets.values() if target.of_experts]
    assert {target.scheme.sparsity for target in experts if target.out_features % 48} == {None}
    assert any("keep their zeros: they lie in parts on disk" in note for note in plan.notes)
    report = write(model_folder("mixtral"), tmp_path / "out", *words["steps"], format="quantkit")
    assert torch.isfinite(logits(quantkit.load(tmp_path / "out"))).all()
    assert report.verified["quantized"] == len(plan.targets)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_damaged_columns_are_refused(model_folder, tmp_path, name):
    write(model_folder(name), tmp_path / "out", f"{MAGNITUDE},pattern=16:2:8", "int8", format="quantkit")
    tail = "w1.weight_columns" if name == "mixtral" else "q_proj.weight_columns"
    key = next(key for key in models.read_tensors(tmp_path / "out") if key.endswith(tail))
    models.change_tensors(tmp_path / "out", lambda tensors: tensors | {key: torch.full_like(tensors[key], 7)})
    assert inspect_checkpoint(tmp_path / "out").problems == [
        f"{key!r} does not name four of every 8 columns in ascending order"
    ]
    with pytest.raises(CheckpointError, match="four of every 8 columns"):
        quantkit.load(tmp_path / "out")
    with pytest.raises(CheckpointError, match="four of every 8 columns"):
        floats(tmp_path / "out")


def test_a_packed_checkpoint_becomes_dense_and_keeps_its_own_pattern(model_folder, tmp_path):
    write(model_folder("llama"), tmp_path / "out", f"{MAGNITUDE},pattern=16:2:8", format="quantkit")
    done = quantkit.transcoding.convert(tmp_path / "out", tmp_path / "dense", to="dense", progress=False)
    expected = floats(tmp_path / "out")
    made = models.read_tensors(tmp_path / "dense")
    assert all(torch.equal(made[key], value) for key, value in expected.items())
    assert all(sparsity.has_tiles(value, 16, 8) for key, value in made.items() if "_proj" in key)
    again = quantkit.transcoding.convert(tmp_path / "out", tmp_path / "again", to="quantkit", progress=False)
    assert again.bytes_after == done.bytes_before
    assert again.schemes == {"16:2:8 float -> 16:2:8 float": 14}


@pytest.mark.parametrize("pattern", ["2:4", "8:2:8"])
@pytest.mark.parametrize("transposed", [False, True])
def test_packed_experts_with_equal_axes_come_back_as_they_were(pattern, transposed):
    """A square weight's shape doesn't say which way it lies: the scale's does."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1, 127, (32, 32), dtype=torch.int8, generator=generator)
    codes = codes * pruning.magnitude(codes.float(), sparsity.pattern_of(pattern))
    scale, scheme = torch.rand(32, 1, generator=generator) + 0.1, Scheme("int8", sparsity=pattern)
    stored = compress_expert(native, scheme, codes, scale, transposed)
    specs = expert_specs(native, scheme, 32, 32, torch.float32, transposed)
    shapes = {leaf: (tuple(tensor.shape), tensor.dtype) for leaf, tensor in stored.items()}
    assert shapes == {leaf: (spec.shape, spec.dtype) for leaf, spec in specs.items()}
    place = stored_as(native, scheme, "layer.", shapes, [(32, 32, False), (32, 32, True)])
    made, its_scale, _ = place.decode(stored)
    assert torch.equal(made, codes.t() if transposed else codes)
    assert torch.equal(its_scale, scale.t() if transposed else scale)
    again = place.encode(made, its_scale, None)
    assert all(torch.equal(again[leaf], tensor) for leaf, tensor in stored.items())


def test_layers_that_are_split_while_they_are_loaded_are_packed(tiny_folder, tmp_path):
    """HRM stores q, k, v and a gate in one weight; its codes are packed in one tensor, and in float it isn't."""
    folder = tiny_folder("hrm_text")
    write(folder, tmp_path / "packed", MAGNITUDE, "int8", format="quantkit")
    write(folder, tmp_path / "dense", MAGNITUDE, "int8", format="dense")
    made, expected = floats(tmp_path / "packed"), floats(tmp_path / "dense")
    assert all(torch.equal(made[key], value) for key, value in expected.items())
    assert any("gqkv_proj.weight_indices" in key for key in models.read_tensors(tmp_path / "packed"))
    assert torch.equal(logits(quantkit.load(tmp_path / "packed")), logits(quantkit.load(tmp_path / "dense")))
    report = write(folder, tmp_path / "float", MAGNITUDE, format="quantkit")
    assert any("merged or split while it is loaded is packed only when" in note for note in report.notes)
    assert torch.isfinite(logits(quantkit.load(tmp_path / "float"))).all()
