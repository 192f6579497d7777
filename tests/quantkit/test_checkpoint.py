import contextlib
import json

import models
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from quantkit.checkpoint import (
    Hub,
    MemoryTensors,
    build_skeleton,
    decoder_blocks,
    linears,
    load_tokenizer,
    open_folder,
    open_model,
    output_head,
    read_config,
    refuse_unfit,
    resolve,
    tied_parameters,
)
from quantkit.errors import CheckpointError
from quantkit.naming import names_of

HUB = Hub()


def test_a_skeleton_has_no_weights_but_real_buffers(model_folder):
    skeleton = build_skeleton(model_folder("llama"), HUB)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    loaded = LlamaForCausalLM.from_pretrained(model_folder("llama"))
    real = dict(loaded.named_buffers())
    buffers = dict(skeleton.named_buffers())
    assert set(buffers) == set(real)
    assert all(models.same(buffers[name], real[name]) for name in real)
    assert {name: tuple(p.shape) for name, p in skeleton.named_parameters()} == {
        name: tuple(p.shape) for name, p in loaded.named_parameters()
    }


@pytest.mark.parametrize(
    ("name", "blocks", "count", "head", "tied"),
    [
        ("llama", "model.layers", 2, "lm_head", {}),
        ("llama_tied", "model.layers", 2, "lm_head", {"lm_head.weight": "model.embed_tokens.weight"}),
        ("opt", "model.decoder.layers", 2, "lm_head", {"lm_head.weight": "model.decoder.embed_tokens.weight"}),
        ("gpt2", "transformer.h", 2, "lm_head", {"lm_head.weight": "transformer.wte.weight"}),
        ("gpt2_untied", "transformer.h", 2, "lm_head", {}),
        ("mixtral", "model.layers", 2, "lm_head", {}),
    ],
)
def test_blocks_head_and_ties_are_found_from_the_model(model_folder, name, blocks, count, head, tied):
    skeleton = build_skeleton(model_folder(name), HUB)
    assert decoder_blocks(skeleton) == (blocks, count)
    assert output_head(skeleton) == head
    assert tied_parameters(skeleton) == tied


def test_a_model_without_a_list_of_layers_is_refused():
    with pytest.raises(CheckpointError, match="Sequential has no list of layers"):
        decoder_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_linear_layers_and_their_subclasses_count():
    class Own(nn.Linear):
        """A linear layer of a model's own."""

    model = nn.ModuleDict(
        {"plain": nn.Linear(2, 2), "own": Own(2, 2), "norm": nn.LayerNorm(2), "no": nn.Bilinear(2, 2, 2)}
    )
    assert [name for name, _ in linears(model)] == ["plain", "own"]


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_sharded", "llama_second_name", "opt", "gpt2"])
def test_every_key_makes_the_parameter_of_its_name(model_folder, name):
    source = open_folder(model_folder(name), HUB)
    origins = names_of(source)
    assert set(origins) == set(source.weights.tensors)
    assert all(origin.parameter == key and not origin.converted for key, origin in origins.items())


def test_names_without_the_prefix_find_their_parameters(model_folder):
    origins = names_of(open_folder(model_folder("opt_short_names"), HUB))
    assert origins["decoder.layers.1.fc1.weight"].parameter == "model.decoder.layers.1.fc1.weight"


def test_unused_keys_make_nothing_and_experts_are_merged(model_folder):
    origins = names_of(open_folder(model_folder("llama_unused"), HUB))
    unused = {key for key, origin in origins.items() if origin.parameter is None}
    assert unused == {"left.over", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    origins = names_of(open_folder(model_folder("mixtral"), HUB))
    merged = {origin.parameter for origin in origins.values() if origin.converted}
    assert merged == {
        f"model.layers.{number}.mlp.experts.{leaf}" for number in (0, 1) for leaf in ("gate_up_proj", "down_proj")
    }


@pytest.mark.parametrize("name", ["llama", "llama_tied", "opt", "gpt2", "mixtral"])
def test_a_model_in_memory_has_the_tensors_of_its_checkpoint(model_folder, name):
    model = AutoModelForCausalLM.from_pretrained(model_folder(name))
    weights, stored = MemoryTensors(model), models.read_tensors(model_folder(name))
    assert set(weights.tensors) == set(stored)
    assert all(models.same(weights.get(key), tensor) for key, tensor in stored.items())
    assert weights.nbytes == sum(tensor.nbytes for tensor in stored.values())


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(CheckpointError, match="Linear is no transformers PreTrainedModel"):
        open_model(nn.Linear(2, 2))


def test_a_compressed_model_in_memory_is_refused(compressed):
    from quantkit import load

    with pytest.raises(CheckpointError, match="compressed already"):
        open_model(load(compressed("w8a8")))


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", "[" * 100_000, b"\xff\xfe"])
def test_a_config_that_is_none_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "compressed already.*'gptq'"),
        ({"quantization_config": "int8"}, "compressed already.*'int8'"),
        ({"compression_config": {"format": "x"}}, "compressed already"),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": 5}, "architectures"),
        ({"architectures": [5]}, "architectures"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}, "model_type": "own"}, "--trust-remote-code"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}, "model_type": []}, "--trust-remote-code"),
    ],
)
def test_models_that_cannot_be_compressed_are_refused(config, says):
    with pytest.raises(CheckpointError, match=says):
        refuse_unfit(config, "here", HUB)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": None, "auto_map": None, "quantization_config": None},
        {"architectures": ["LlamaForCausalLM"]},
        {"auto_map": 5, "architectures": ["LlamaForCausalLM"]},
        {"auto_map": {"AutoModelForCausalLM": "x.Y"}, "model_type": "llama"},
    ],
)
def test_models_that_can_are_not(config):
    refuse_unfit(config, "here", HUB)


json_values = st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=4) | st.just([])
KEYS = ["hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "model_type", "rope_scaling"]
KEYS += ["architectures", "hidden_act", "vocab_size", "dtype", "tie_word_embeddings", "rope_parameters", "auto_map"]


@given(changes=st.dictionaries(st.sampled_from(KEYS), json_values | st.dictionaries(st.text(max_size=4), json_values)))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_config_opens_or_is_a_checkpoint_error(tmp_path, model_folder, changes):
    config = read_config(model_folder("llama")) | changes
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    (tmp_path / "model.safetensors").hardlink_to(model_folder("llama") / "model.safetensors")
    with contextlib.suppress(CheckpointError):
        open_folder(tmp_path, HUB)


@pytest.mark.parametrize(
    "name", ["x" * 5000, "a/" + "x" * 300, "~nobody-of-this-name/x", "a\0b", "", "/", "./x", "gpt2"]
)
def test_what_is_no_folder_is_refused_by_name(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError):
        read_config(resolve(name, HUB))


def test_a_tokenizer_is_loaded_or_none_or_an_error(model_folder, tmp_path):
    assert load_tokenizer(model_folder("llama"))("ab")["input_ids"] == models.tokenizer()("ab")["input_ids"]
    folder = models.copy(model_folder("llama"), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert load_tokenizer(folder) is None
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer in .*model cannot be loaded"):
        load_tokenizer(folder)


def test_a_device_other_than_the_cpu_is_read_to_the_cpu():
    model = models.llama_model()
    assert all(MemoryTensors(model).get(key).device == torch.device("cpu") for key in MemoryTensors(model).tensors)
