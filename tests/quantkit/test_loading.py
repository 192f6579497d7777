import functools
import json

import models
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from quantkit import load
from quantkit.checkpoint import read_config
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.modules import QuantizedLinear
from quantkit.recipe import recipe_names
from quantkit.shards import ShardReader

IDS = torch.arange(10)[None] * 7 % 256
CASES = [(recipe, "llama") for recipe in recipe_names()]
CASES += [("w8a8", name) for name in ("llama_tied", "llama_bf16", "llama_fp16", "llama_odd", "llama_unused", "opt")]
CASES += [("w8a8", "llama_second_name"), ("w8a8", "opt_short_names"), ("w8a8", "mixtral"), ("fp8", "llama_bf16")]
CASES += [("fp8-e5m2", "llama_odd"), ("fp8-e5m2", "llama_bf16"), ("int8", "llama_odd"), ("fp8-e5m2", "opt_short_names")]
SOME = [case for case in CASES if case[1] != "llama" or "mse" not in case[0]]
SOME = [case for case in SOME if case[1] not in ("llama_fp16", "llama_bf16", "llama_second_name", "opt")]


@pytest.fixture(scope="module")
def loaded(compressed):
    """Loads a compressed tiny model once. Not to be changed."""
    return functools.cache(lambda recipe, name="llama": load(compressed(recipe, name)))


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize(("recipe", "name"), CASES)
def test_layers_are_packed_and_bit_equal_to_the_disk(compressed, loaded, recipe, name):
    folder = compressed(recipe, name)
    tensors, report = models.read_tensors(folder), json.loads((folder / "quantkit_report.json").read_text())
    model = loaded(recipe, name)
    layers = layers_of(model)
    assert not model.training
    assert set(layers) == {layer["module"] for layer in report["layers"]}
    held = on_disk = 0
    for module, layer in layers.items():
        prefix = module.removeprefix("model.") if name == "opt_short_names" else module
        for leaf in layer.stored:
            tensor = tensors[f"{prefix}.{leaf}"]
            assert models.same(layer.get_buffer(leaf), tensor)
            held, on_disk = held + layer.get_buffer(leaf).nbytes, on_disk + tensor.nbytes
    assert held == on_disk > 0
    assert not any(isinstance(module, nn.Linear) for key, module in model.named_modules() if key in layers)
    others = {key: tensor for key, tensor in model.state_dict().items() if key.rpartition(".")[0] not in layers}
    for key, tensor in others.items():
        if key in tensors:
            assert models.same(tensor, tensors[key]), key


@pytest.mark.parametrize(("recipe", "name"), SOME)
def test_a_loaded_model_generates(loaded, recipe, name):
    model = loaded(recipe, name)
    out = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=256, eos_token_id=None)
    assert out.shape == (1, 14)
    logits = model(IDS).logits
    assert bool(torch.isfinite(logits).all())
    assert torch.equal(out[:, 10], logits[:, -1].argmax(-1))


@pytest.mark.parametrize(("recipe", "name"), SOME)
def test_what_is_saved_again_is_what_was_loaded(compressed, loaded, tmp_path, recipe, name):
    folder = compressed(recipe, name)
    loaded(recipe, name).save_pretrained(tmp_path / "again")
    before, after = models.read_tensors(folder), models.read_tensors(tmp_path / "again")
    if name == "llama_unused":
        before = {key: tensor for key, tensor in before.items() if "inv_freq" not in key and key != "left.over"}
    if name == "opt_short_names":
        before = {f"model.{key}": tensor for key, tensor in before.items()}
    assert set(after) == set(before)
    assert all(models.same(tensor, before[key]) for key, tensor in after.items())
    stored = read_config(tmp_path / "again")["quantization_config"]
    assert stored == read_config(folder)["quantization_config"]
    logits = load(tmp_path / "again")(IDS).logits
    assert torch.equal(logits, loaded(recipe, name)(IDS).logits)


def decoded_model(compressed, source):
    """The float model whose weights are the decoded ones: an ordinary load, then every weight put in its place."""
    from quantkit_kernels.formats import dequantize

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    for name, layer in layers_of(compressed).items():
        codes, scale = layer.codes_and_scale()
        model.get_submodule(name).weight.data = dequantize(codes, scale)
    return model


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_second_name", "llama_odd", "opt", "opt_short_names"])
@pytest.mark.parametrize("recipe", ["int8", "fp8-e5m2-weight-only"])
def test_weights_alone_give_the_logits_of_the_decoded_model(loaded, model_folder, recipe, name):
    """Exactly: the op decodes a weight and multiplies as an ordinary layer does."""
    model = loaded(recipe, name)
    with torch.no_grad():
        expected = decoded_model(model, model_folder(name))(IDS).logits
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("recipe", ["w8a8", "int8-g128", "fp8", "fp8-e5m2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_another_dtype_is_for_what_is_not_compressed(compressed, recipe, dtype):
    folder = compressed(recipe, "llama_bf16")
    model, tensors = load(folder, dtype=dtype), models.read_tensors(folder)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == expected
    for name, layer in layers_of(model).items():
        assert all(models.same(layer.get_buffer(leaf), tensors[f"{name}.{leaf}"]) for leaf in layer.stored)
    assert model(IDS).logits.dtype == expected


@pytest.mark.parametrize("recipe", ["w8a8", "int8-g128", "fp8", "fp8-e5m2"])
def test_a_change_of_dtype_leaves_codes_and_scales(compressed, recipe):
    model = load(compressed(recipe))
    before = {
        (n, leaf): layer.get_buffer(leaf).clone() for n, layer in layers_of(model).items() for leaf in layer.stored
    }
    model.to(torch.float16).to(torch.bfloat16)
    with pytest.raises(ValueError, match="not supported for quantized model"):
        model.half()  # transformers' own word for every compressed model
    assert model.model.norm.weight.dtype == torch.bfloat16
    for name, layer in layers_of(model).items():
        assert all(models.same(layer.get_buffer(leaf), before[name, leaf]) for leaf in layer.stored)
    assert model(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", ["w8a8", "int8", "fp8-e5m2-weight-only"])
def test_a_compiled_model_is_bit_equal(loaded, recipe):
    model = loaded(recipe)
    with torch.no_grad():
        eager = model(IDS).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(IDS).logits
    assert torch.equal(compiled, eager)


def test_a_float_checkpoint_gives_the_plain_model(model_folder):
    model = load(model_folder("llama"))
    assert not layers_of(model)
    assert torch.equal(model(IDS).logits, LlamaForCausalLM.from_pretrained(model_folder("llama"))(IDS).logits)


def test_a_sharded_result_is_loaded(model_folder, tmp_path, compressed):
    from quantkit import quantize

    quantize(model_folder("llama"), tmp_path / "out", steps=["w8a8"], max_shard_size="200KB", progress=False)
    assert torch.equal(load(tmp_path / "out")(IDS).logits, load(compressed("w8a8"))(IDS).logits)


# What is refused


def test_a_single_file_beside_an_index_is_the_one_that_transformers_takes(model_folder, tmp_path):
    folder = models.copy(model_folder("llama_sharded"), tmp_path / "model")
    halves = {key: tensor / 2 for key, tensor in models.read_tensors(folder).items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    reader, theirs = ShardReader(folder), AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert set(reader.tensors) == set(theirs)
    assert all(models.same(reader.get(key), tensor) for key, tensor in theirs.items())


@pytest.fixture
def damaged(compressed, tmp_path):
    """A copy of a compressed tiny Llama with its tensors changed."""

    def make(change, recipe="w8a8"):
        return models.change_tensors(models.copy(compressed(recipe), tmp_path / "model"), change)

    return make


LAYER = "model.layers.1.mlp.up_proj"


def without(key):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key}


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ("w8a8", f"{LAYER}.weight_scale"),
        ("w8a8", f"{LAYER}.weight"),
        ("int8", f"{LAYER}.weight_packed"),
        ("int8", f"{LAYER}.weight_shape"),
        ("fp8-e5m2", f"{LAYER}.weight_scale"),
        ("w8a8", "model.norm.weight"),
        ("w8a8", "lm_head.weight"),
    ],
)
def test_a_missing_tensor_is_refused_by_name(damaged, recipe, key):
    with pytest.raises(CheckpointError) as error:
        load(damaged(without(key), recipe))
    assert key in str(error.value)


@pytest.mark.parametrize("leaf", ["weight_zero_point", "weight_g_idx", "input_scale", "weight_global_scale"])
@pytest.mark.parametrize("recipe", ["w8a8", "int8"])
def test_a_tensor_that_the_scheme_does_not_know_is_refused(damaged, recipe, leaf):
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.{leaf}.* is not part of the scheme"):
        load(damaged(lambda tensors: tensors | {f"{LAYER}.{leaf}": torch.ones(1)}, recipe))


@pytest.mark.parametrize(
    ("recipe", "key", "change"),
    [
        ("w8a8", f"{LAYER}.weight", lambda t: t[1:]),
        ("w8a8", f"{LAYER}.weight_scale", lambda t: t[1:]),
        ("w8a8", f"{LAYER}.weight_scale", lambda t: t.view(-1)),
        ("int8", f"{LAYER}.weight_packed", lambda t: t[:, 1:]),
        ("int8-g128", f"{LAYER}.weight_scale", lambda t: torch.cat([t, t], 1)),
        ("fp8-e5m2", f"{LAYER}.weight", lambda t: t[:, 1:]),
    ],
)
def test_a_tensor_of_another_shape_is_refused(damaged, recipe, key, change):
    with pytest.raises(CheckpointError, match=r"up_proj|shape|size"):
        load(damaged(lambda tensors: tensors | {key: change(tensors[key]).contiguous()}, recipe))


@pytest.mark.parametrize(
    ("recipe", "key", "dtype"),
    [
        ("w8a8", f"{LAYER}.weight", torch.float32),
        ("w8a8", f"{LAYER}.weight", torch.int16),
        ("w8a8", f"{LAYER}.weight_scale", torch.int32),
        ("fp8", f"{LAYER}.weight", torch.int8),
        ("fp8", f"{LAYER}.weight", torch.float8_e5m2),
        ("int8", f"{LAYER}.weight_packed", torch.int64),
    ],
)
def test_a_tensor_of_another_dtype_is_refused(damaged, recipe, key, dtype):
    with pytest.raises(CheckpointError, match=r"up_proj"):
        load(damaged(lambda tensors: tensors | {key: tensors[key].float().to(dtype)}, recipe))


@pytest.mark.parametrize("config", [{"quant_method": "gptq"}, {"quant_method": "bitsandbytes"}, "int8", {}])
def test_other_quant_methods_are_refused(model_folder, tmp_path, config):
    folder = models.change_config(models.copy(model_folder("llama"), tmp_path / "model"), quantization_config=config)
    with pytest.raises(CheckpointError, match="cannot read"):
        load(folder)


def test_a_config_that_names_no_layer_is_refused(compressed, tmp_path):
    folder = models.copy(compressed("fp8-e5m2"), tmp_path / "model")
    config = read_config(folder)["quantization_config"]
    config["groups"][0]["modules"] = ["model.nonesuch"]
    models.change_config(folder, quantization_config=config)
    with pytest.raises(CheckpointError, match="names no linear layer"):
        load(folder)


@pytest.mark.parametrize("recipe", ["w8a8", "fp8", "int8"])
def test_a_layer_that_the_config_forgets_is_refused(compressed, tmp_path, recipe):
    """Else its codes would run as weights: FP8 ones are cast to float without a word."""
    folder = models.copy(compressed(recipe), tmp_path / "model")
    config = read_config(folder)["quantization_config"]
    config["ignore"].append(LAYER)
    models.change_config(folder, quantization_config=config)
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.weight"):
        load(folder)


def test_float_weights_under_a_config_that_says_compressed_are_refused(model_folder, compressed, tmp_path):
    folder = models.copy(model_folder("llama"), tmp_path / "model")
    models.change_config(folder, quantization_config=read_config(compressed("w8a8"))["quantization_config"])
    with pytest.raises(CheckpointError):
        load(folder)


def test_damaged_shards_are_refused_by_name(compressed, tmp_path):
    folder = models.copy(compressed("w8a8"), tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load(folder)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"device": "tpu"}, "'tpu'.*auto, cpu"),
        ({"device": "cuda:99"}, "'cuda:99'"),
        ({"backend": "cuda"}, "'cuda'.*auto, torch, triton"),
        ({"dtype": "int8"}, "'int8'.*float32"),
        ({"dtype": torch.int8}, "int8.*float32"),
    ],
)
def test_unknown_words_are_refused(compressed, words, says):
    with pytest.raises(QuantkitError, match=says):
        load(compressed("w8a8"), **words)
