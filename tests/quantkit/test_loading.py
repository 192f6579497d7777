import functools
import json

import models
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from quantkit import formats, load
from quantkit.checkpoint import read_config
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.linears import linear_modules
from quantkit.modules import QuantizedLinear, quantize_linear
from quantkit.recipe import recipe_names
from quantkit.scheme import Scheme
from quantkit.shards import ShardReader

IDS = torch.arange(10)[None] * 7 % 256
W8A8 = Scheme("int8", activation_dtype="int8")
CASES = [(recipe, "llama") for recipe in recipe_names()]
CASES += [("w8a8", name) for name in ("llama_tied", "llama_bf16", "llama_fp16", "llama_odd", "llama_unused", "opt")]
CASES += [("w8a8", "llama_second_name"), ("w8a8", "opt_short_names"), ("w8a8", "mixtral"), ("fp8", "llama_bf16")]
CASES += [("fp8-e5m2", "llama_odd"), ("fp8-e5m2", "llama_bf16"), ("int8", "llama_odd"), ("fp8-e5m2", "opt_short_names")]
CASES += [(recipe, "mixtral") for recipe in ("int8", "int4-channel", "fp8", "w8a8-static", "llm-int8")]
CASES += [(recipe, "gpt2") for recipe in ("w8a8", "int8", "int4-channel", "fp8-static", "llm-int8")]
CASES += [("int4-channel", name) for name in ("llama_odd", "gpt_oss")]
CASES += [("w8a8", "gpt_oss"), ("int8", "gpt_oss"), ("llm-int8", "opt"), ("fp8-static", "opt"), ("w8a8", "gpt2_untied")]
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
    # Experts that are merged while they are loaded are held against the disk in test_conversion.py.
    assert set(layers) == {layer["module"] for layer in report["layers"] if ".experts." not in layer["module"]}
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
        weight = dequantize(codes, scale)
        model.get_submodule(name).weight.data = weight.t() if layer.transposed else weight
    return model


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_second_name", "llama_odd", "opt", "opt_short_names"])
@pytest.mark.parametrize("recipe", ["int8", "int4-channel", "fp8-e5m2-weight-only"])
def test_weights_alone_give_the_logits_of_the_decoded_model(loaded, model_folder, recipe, name):
    """Exactly: the op decodes a weight and multiplies as an ordinary layer does."""
    model = loaded(recipe, name)
    with torch.no_grad():
        expected = decoded_model(model, model_folder(name))(IDS).logits
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("recipe", ["int8", "int4-channel", "fp8-e5m2-weight-only"])
def test_weights_in_x_out_alone_give_the_products_of_the_decoded_model(loaded, model_folder, recipe):
    """Float32, each layer on the same random inputs: Conv1D sums the same K products and the bias in an order of its
    own, so that both are within (K + 1) * 2**-24 of the sum of magnitudes of the real number."""
    model = loaded(recipe, "gpt2")
    exact = decoded_model(model, model_folder("gpt2"))
    generator = torch.Generator().manual_seed(0)
    for name, layer in layers_of(model).items():
        assert layer.transposed
        theirs, x = exact.get_submodule(name), torch.randn(5, layer.in_features, generator=generator)
        with torch.no_grad():
            size = x.abs() @ theirs.weight.abs() + theirs.bias.abs()
            bound = 2 * (layer.in_features + 1) * 2**-24 * size
            assert bool(((layer(x) - theirs(x)).abs() <= bound).all())


@pytest.mark.parametrize("recipe", ["w8a8", "int8-g128", "fp8", "fp8-e5m2", "fp8-static", "fp8-block", "llm-int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_another_dtype_is_for_what_is_not_compressed(compressed, recipe, dtype):
    folder = compressed(recipe, "llama_bf16")
    model, tensors = load(folder, dtype=dtype), models.read_tensors(folder)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == expected
    for name, layer in layers_of(model).items():
        assert all(models.same(layer.get_buffer(leaf), tensors[f"{name}.{leaf}"]) for leaf in layer.stored)
    assert model(IDS).logits.dtype == expected


@pytest.mark.parametrize("recipe", ["w8a8", "int8-g128", "fp8", "fp8-e5m2", "fp8-static", "fp8-block", "llm-int8"])
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


@pytest.mark.parametrize("recipe", ["w8a8", "int8", "fp8-e5m2-weight-only", "w8a8-static", "fp8-block", "llm-int8"])
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


def quantized_by_hand(model, folder, form, scheme=W8A8):
    """The model in a folder, with each linear layer of its blocks quantized, and the codes and scales by layer."""
    model.save_pretrained(folder)
    layout, tensors, expected, left = formats.FORMATS[form], models.read_tensors(folder), {}, []
    for name, module, _, _, transposed in linear_modules(model):
        if f"{name}.weight" not in tensors or "lm_head" in name:
            left.append(name)
            continue
        weight = tensors.pop(f"{name}.weight")
        expected[name] = quantize_linear(weight.t().contiguous() if transposed else weight, scheme)
        stored = layout.compress(scheme, *expected[name], transposed=transposed)
        tensors |= {f"{name}.{leaf}": tensor.contiguous().clone() for leaf, tensor in stored.items()}
        assert module.weight.shape == weight.shape
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    models.change_config(folder, quantization_config=layout.config(scheme, list(expected), left))
    return expected


def falcon():
    return models.randomized(
        FalconForCausalLM(FalconConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    )


@pytest.mark.parametrize("form", ["compressed-tensors", "quantkit"])
@pytest.mark.parametrize("build", [models.gpt2_model, falcon])
def test_layers_that_are_none_of_torchs_own_class_are_loaded_and_saved(tmp_path, build, form):
    """GPT-2's Conv1D, whose weight is in x out, and Falcon's subclass of nn.Linear. The codes are those of the disk,
    and the logits those of a model whose layers are put in by hand."""
    model = build()
    expected = quantized_by_hand(model, tmp_path / "model", form)
    made = load(tmp_path / "model")
    layers = layers_of(made)
    assert layers.keys() == expected.keys()
    assert len(layers) == 8
    for name, layer in layers.items():
        codes, scale = layer.codes_and_scale()
        assert torch.equal(codes, expected[name][0])
        assert torch.equal(scale, expected[name][1])
        by_hand = QuantizedLinear(
            layer.in_features,
            layer.out_features,
            W8A8,
            formats.native,
            bias=layer.bias is not None,
            dtype=torch.float32,
        )
        for leaf, tensor in formats.native.compress(W8A8, *expected[name]).items():
            by_hand.get_buffer(leaf).copy_(tensor)
        if layer.bias is not None:
            by_hand.bias = model.get_submodule(name).bias
        model.set_submodule(name, by_hand)
    with torch.no_grad():
        assert torch.equal(made(IDS).logits, model(IDS).logits)
    made.save_pretrained(tmp_path / "again")
    before, after = models.read_tensors(tmp_path / "model"), models.read_tensors(tmp_path / "again")
    assert after.keys() == before.keys()
    assert all(models.same(tensor, before[key]) for key, tensor in after.items())


def test_a_model_that_reads_images_too_is_loaded_as_such(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 8, "patch_size": 4, "model_type": "clip_vision_model", "projection_dim": 32}
    config = LlavaConfig(
        text_config=LlamaConfig(**sizes, vocab_size=260, bos_token_id=1, eos_token_id=1),
        vision_config=vision,
        image_token_index=259,
    )
    model = models.randomized(LlavaForConditionalGeneration(config))
    model.save_pretrained(tmp_path / "float")
    keys = [key for key in models.read_tensors(tmp_path / "float") if key.endswith("down_proj.weight")]
    assert len(keys) == 1
    tensors = models.read_tensors(tmp_path / "float")
    codes, scale = quantize_linear(tensors.pop(keys[0]), W8A8)
    tensors |= {keys[0]: codes, keys[0].replace("weight", "weight_scale"): scale}
    save_file(tensors, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    left = [name for name, *_ in linear_modules(model) if not name.endswith("down_proj")]
    config = formats.compressed_tensors.config(W8A8, [], left)
    made = load(models.change_config(tmp_path / "float", quantization_config=config))
    assert type(made) is LlavaForConditionalGeneration
    (layer,) = layers_of(made).values()
    assert torch.equal(layer.codes_and_scale()[0], codes)
    assert bool(torch.isfinite(made(IDS).logits).all())


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
        ("fp8-static", f"{LAYER}.weight_scale"),
        ("w8a8-static", f"{LAYER}.input_scale"),
        ("llm-int8", f"{LAYER}.SCB"),
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
        ("fp8-static", f"{LAYER}.weight_scale", lambda t: t.expand(256, 1)),
        ("fp8-block", f"{LAYER}.weight_scale", lambda t: t[:1]),
        ("w8a8-static", f"{LAYER}.input_scale", lambda t: t.expand(2)),
        ("llm-int8", f"{LAYER}.SCB", lambda t: t[1:]),
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
        ("w8a8-static", f"{LAYER}.input_scale", torch.int32),
        ("llm-int8", f"{LAYER}.SCB", torch.float16),
    ],
)
def test_a_tensor_of_another_dtype_is_refused(damaged, recipe, key, dtype):
    with pytest.raises(CheckpointError, match=r"up_proj"):
        load(damaged(lambda tensors: tensors | {key: tensors[key].float().to(dtype)}, recipe))


@pytest.mark.parametrize("config", [{"quant_method": "gptq"}, {"quant_method": "bitsandbytes"}, "int8", {}])
def test_other_quant_methods_are_refused(model_folder, tmp_path, config):
    folder = models.change_config(models.copy(model_folder("llama"), tmp_path / "model"), quantization_config=config)
    with pytest.raises(CheckpointError, match=r"cannot read|doesn't read"):
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
