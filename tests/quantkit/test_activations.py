"""What a checkpoint says of its activations: read, refused, put into a model, and kept when it is saved."""

import copy
import io
import json

import models
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.activations import Activations, Output, ReLU, adapt, apply, carry_over, rectified, zeroed
from quantkit.errors import CheckpointError
from quantkit.formats import native
from quantkit.modules import QuantizedLinear

LAYER = "model.layers.0"
SAID = Activations(
    {
        f"{LAYER}.mlp.act_fn": Output(0.125, True, (f"{LAYER}.mlp.down_proj",)),
        f"{LAYER}.input_layernorm": Output(feeds=(f"{LAYER}.self_attn.q_proj",)),
        f"{LAYER}.mlp.up_proj": Output(),
    },
    {f"{LAYER}.mlp.up_proj": 0.25, f"{LAYER}.self_attn.o_proj": 0.5},
)
IDS = torch.arange(24).view(2, 12)


def by_hand(model: nn.Module) -> nn.Module:
    """The model with what SAID says, by torch's own hooks."""
    layer = model.model.layers[0]
    layer.mlp.act_fn.register_forward_hook(lambda _, args, __: torch.relu(args[0] - 0.125))
    layer.input_layernorm.register_forward_hook(lambda _, __, out: torch.relu(out))
    for linear, limit in ((layer.mlp.up_proj, 0.25), (layer.self_attn.o_proj, 0.5)):
        linear.register_forward_pre_hook(lambda _, args, t=limit: (torch.where(args[0].abs() < t, 0.0, args[0]),))
    layer.mlp.up_proj.register_forward_hook(lambda _, __, out: torch.relu(out))
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_functions_are_those_of_the_definition():
    x = torch.tensor([-2.0, -0.5, -0.0, 0.5, 1.0, float("nan")])
    assert rectified(x, 0.5)[:5].tolist() == [0.0, 0.0, 0.0, 0.0, 0.5]
    assert zeroed(x, 0.5)[:5].tolist() == [-2.0, -0.5, 0.0, 0.5, 1.0]
    assert rectified(x, 0.0)[5].isnan()
    assert zeroed(x, 0.5)[5].isnan()
    assert torch.equal(ReLU(0.25)(x[:5]), torch.relu(x[:5] - 0.25))


def test_a_model_does_what_is_said_and_keeps_its_names():
    model, exact = models.llama_model(), by_hand(models.llama_model())
    names = list(model.state_dict())
    apply(model, SAID)
    assert torch.equal(logits(model), logits(exact))
    assert list(model.state_dict()) == names
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    assert SAID.sparse_inputs(model) == [
        f"{LAYER}.self_attn.q_proj",
        f"{LAYER}.self_attn.o_proj",
        f"{LAYER}.mlp.up_proj",
        f"{LAYER}.mlp.down_proj",
    ]


def test_copies_pickles_and_compiled_models_do_the_same():
    model = models.llama_model()
    apply(model, SAID)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False)), expected)
    layer, x = model.model.layers[0], torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0))
    for module in (layer.mlp, layer.input_layernorm):
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), module(x))


def test_a_checkpoint_in_float_is_loaded_trained_and_saved(tmp_path):
    folder = models.llama(tmp_path / "model")
    config = json.loads(json.dumps(native.with_activations(None, SAID)))
    models.change_config(folder, quantization_config=config)
    expected = logits(by_hand(models.llama_model()))
    model = quantkit.load(folder, attention="transformers")
    assert torch.equal(logits(model), expected)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(theirs), expected)
    assert theirs.hf_quantizer.is_trainable
    assert logits(theirs.half()).dtype == torch.float16
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == config
    assert torch.equal(logits(quantkit.load(tmp_path / "again", attention="transformers")), expected)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    exact = by_hand(models.llama_model()).train()
    exact(input_ids=IDS, labels=IDS).loss.backward()
    for (name, ours), (_, other) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        assert torch.equal(ours.grad, other.grad), name


def test_packed_layers_keep_theirs(compressed, tmp_path):
    folder = models.copy(compressed("w8a8", form="quantkit"), tmp_path / "model")
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    plain = quantkit.load(folder, attention="transformers")
    models.change_config(folder, quantization_config=native.with_activations(stored, SAID))
    model = quantkit.load(folder, attention="transformers")
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert torch.equal(logits(model), logits(by_hand(plain)))
    assert not model.hf_quantizer.is_trainable
    model.model.layers[0].mlp.up_proj.half()
    assert model.model.layers[0].mlp.up_proj.get_buffer("weight").dtype == torch.int32


def test_a_layer_in_the_place_of_another_does_as_that_one_did():
    old, new = nn.Linear(4, 4), nn.Linear(4, 4)
    carry_over(old, new)
    assert type(new) is nn.Linear
    adapt(old, threshold=0.5)
    carry_over(old, new)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(new(x), nn.functional.linear(zeroed(x, 0.5), new.weight, new.bias))


def test_a_module_may_get_one_after_the_other():
    layer = nn.Linear(4, 4)
    adapt(layer, threshold=0.5)
    adapt(layer, shift=0.0)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), torch.relu(nn.functional.linear(zeroed(x, 0.5), layer.weight, layer.bias)))
    apply(nn.Sequential(layer), Activations(inputs={"0": 0.25}))
    assert layer.threshold == 0.25
    assert layer.shift == 0.0


def test_what_is_written_is_read_again():
    assert Activations.parse(json.loads(json.dumps(SAID.to_dict()))) == SAID
    assert Activations.parse({}) == Activations()
    assert not Activations()
    layout = native.parse(native.with_activations(None, SAID))
    assert layout.activations == SAID


WRONG = {
    "a list": ([], "activations of quantization_config"),
    "another key": ({"gates": {}}, "activations of quantization_config"),
    "no table": ({"outputs": 3}, "activations.outputs"),
    "a word": ({"outputs": {"a": "relu"}}, "activations.outputs of 'a'"),
    "another function": ({"outputs": {"a": {"function": "gelu"}}}, "'gelu'"),
    "a shift of words": ({"outputs": {"a": {"function": "relu", "shift": "1"}}}, "shift"),
    "a truth value": ({"outputs": {"a": {"function": "relu", "shift": True}}}, "shift"),
    "a huge shift": ({"outputs": {"a": {"function": "relu", "shift": 1e39}}}, "finite"),
    "no number": ({"inputs": {"a": {"threshold": float("nan")}}}, "finite"),
    "below zero": ({"inputs": {"a": {"threshold": -1.0}}}, "0 or more"),
    "no threshold": ({"inputs": {"a": {}}}, "activations.inputs of 'a'"),
    "replaces": ({"outputs": {"a": {"function": "relu", "replaces": 1}}}, "true or false"),
    "feeds": ({"outputs": {"a": {"function": "relu", "feeds": "b"}}}, "list of names"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_is_refused_in_a_sentence(name):
    values, words = WRONG[name]
    with pytest.raises(CheckpointError, match=words):
        native.parse({"version": 5, "groups": [], "activations": values})


def test_older_versions_have_none():
    with pytest.raises(CheckpointError, match="version 4, which has no activations"):
        native.parse({"version": 4, "groups": [], "activations": {}})


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (Activations({"model.layers.9.mlp.act_fn": Output(0.0, True)}), "which this model doesn't have"),
        (Activations({f"{LAYER}.mlp.up_proj": Output(0.0, True)}), "which has weights"),
        (Activations(inputs={f"{LAYER}.mlp.act_fn": 0.5}), "which is no linear layer"),
        (Activations(inputs={"model.embed_tokens": 0.5}), "which is no linear layer"),
        (Activations(inputs={"": 0.5}), "which this model doesn't have"),
    ],
)
def test_modules_must_be_what_they_are_said_to_be(tmp_path, said, words):
    folder = models.llama(tmp_path / "model")
    models.change_config(folder, quantization_config=native.with_activations(None, said))
    with pytest.raises(CheckpointError, match=words):
        quantkit.load(folder)
    model = models.llama_model()
    before = [type(module) for module in model.modules()]
    with pytest.raises(CheckpointError, match=words):
        apply(model, Activations({**SAID.outputs, **said.outputs}, said.inputs))
    assert [type(module) for module in model.modules()] == before
