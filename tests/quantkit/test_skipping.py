"""Layers that read only what their input needs: found by what meets them, the same within rounding, and told."""

import copy

import pytest
import torch
import torch.nn.functional as F
from quantkit_kernels.backends import counted as counted_ops
from torch import nn

import quantkit
from quantkit import activations, skipping
from quantkit.generation import complete
from quantkit.skipping import gating

PROMPT = "ROMEO:\n"


@pytest.fixture(scope="module")
def relu_llama(tmp_path_factory):
    """A random Llama with relu in its gated MLPs, in a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("relu")
    LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_act="relu", **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def charopt(data):
    """The OPT with relu, between two linear layers of a decoder layer."""
    return data / "models" / "tensorforge-charopt"


def thinned(model, shift=0.6):
    """Return the model with its relus shifted, so that few neurons are active."""
    for layer in model.model.layers:
        layer.mlp.act_fn = activations.ReLU(shift * 0.1)
    return model


def steps(model, ids, prompt=4):
    """Return the logits of each token, those after the prompt token by token with the model's cache."""
    with torch.inference_mode():
        out = model(input_ids=ids[:, :prompt], use_cache=True)
        found = [out.logits]
        for place in range(prompt, ids.shape[1]):
            out = model(input_ids=ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return torch.cat(found, 1)


def ids_for(model, length=24, batch=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


# Finding


class Mlp(nn.Module):
    """An MLP whose forward pass is `hidden` of its two layers' outputs."""

    def __init__(self, hidden, function=None):
        super().__init__()
        self.last, self.b, self.a = nn.Linear(32, 16), nn.Linear(16, 32), nn.Linear(16, 32)
        self.f = function or nn.ReLU()
        self.hidden = hidden

    def forward(self, x):
        return self.last(self.hidden(self, x))


@pytest.mark.parametrize(
    ("hidden", "expected"),
    [
        (lambda m, x: m.f(m.a(x)) * m.b(x), ("a", "b", "f")),
        (lambda m, x: m.a(x) * m.f(m.b(x)), ("b", "a", "f")),
        (lambda m, x: F.relu(m.a(x)) * m.b(x), ("a", "b", None)),
        (lambda m, x: m.f(m.a(x)) + m.b(x), None),
        (lambda m, x: m.f(m.a(x)) * m.b(x) * 2, None),
        (lambda m, x: m.f(m.a(x)) * m.b(x * 2), None),
        (lambda m, x: m.f(m.a(m.f(x))) * m.b(x), None),
        (lambda m, x: F.gelu(m.a(x)) * m.b(x), None),
    ],
)
def test_a_gated_mlp_is_proven_and_others_are_not_taken_for_one(hidden, expected):
    found = gating.gated_parts(Mlp(hidden), {"last": 32, "b": 16, "a": 16})
    assert found == (expected and gating.Parts(*expected[:2], "last", expected[2]))


def test_what_comes_after_the_last_layer_counts():
    class Scaled(Mlp):
        def forward(self, x):
            return super().forward(x) * 0.5

    assert gating.gated_parts(Scaled(lambda m, x: m.f(m.a(x)) * m.b(x)), {"last": 32, "b": 16, "a": 16}) is None


@pytest.mark.parametrize(
    ("function", "expected"),
    [(nn.ReLU(), True), (nn.SiLU(), True), (activations.ReLU(0.5), True), (activations.ReLU(-0.5), False),
     (nn.Softmax(-1), False), (nn.Sigmoid(), False)],
)  # fmt: skip
def test_functions_that_leave_zeros(function, expected):
    assert gating.leaves_zeros(function) is expected


def test_layers_are_found_by_what_meets_them(relu_llama, charopt, model_folder):
    found = skipping.sparse_inputs(quantkit.load(charopt))
    assert [each.name for each in found] == [f"model.decoder.layers.{i}.fc2" for i in range(5)]
    assert all(0.8 < each.zeros < 1 and each.feeders == (each.name.replace("fc2", "fc1"),) for each in found)
    found = skipping.sparse_inputs(quantkit.load(relu_llama))
    mlps = [f"model.layers.{i}.mlp" for i in range(2)]
    assert [(each.name, each.gated) for each in found] == [(f"{mlp}.down_proj", mlp) for mlp in mlps]
    assert [each.feeders for each in found] == [(f"{mlp}.gate_proj", f"{mlp}.up_proj") for mlp in mlps]
    assert skipping.sparse_inputs(quantkit.load(model_folder("llama"))) == []


def test_a_norm_with_relu_behind_it_makes_the_layers_that_it_feeds_sparse(relu_llama):
    model = quantkit.load(relu_llama)
    for layer in model.model.layers:
        activations.adapt(layer.input_layernorm, shift=0.0)
    plain, skips = model, copy.deepcopy(model)
    found = [each.name for each in skipping.skip_zeros(skips)]
    assert [name.rpartition(".")[2] for name in found[:4]] == ["q_proj", "k_proj", "v_proj", "down_proj"]
    ids = ids_for(model)
    torch.testing.assert_close(steps(skips, ids), steps(plain, ids), rtol=1e-4, atol=1e-5)


# The same within rounding


def test_greedy_text_is_the_same_and_the_rows_are_counted(charopt):
    said: list[str] = []
    plain = complete(charopt, PROMPT, max_new_tokens=48, device="cpu")
    assert complete(charopt, PROMPT, max_new_tokens=48, device="cpu", skip_zeros=True, tell=said.append) == plain
    (line,) = said
    assert line.startswith("zeros: 9")
    assert line.endswith("% of the rows of 5 layers weren't read at decode")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_plain_model(relu_llama, dtype, batch):
    plain = thinned(quantkit.load(relu_llama, dtype=dtype))
    skips = copy.deepcopy(plain)
    assert all(each.gated for each in skipping.skip_zeros(skips))
    ids = ids_for(plain, batch=batch)
    with counted_ops() as calls:
        found = steps(skips, ids)
    expected = steps(plain, ids)
    bound = 1e-5 if dtype == torch.float32 else 2.0**-5
    assert (found - expected).abs().max() <= bound * expected.abs().max()
    assert "mlp_sparse" in {call.op for call in calls}


def test_neurons_without_a_gate_are_not_read(relu_llama):
    """NaN times zero is NaN: what is read of them reaches the logits."""
    skips = quantkit.load(relu_llama, skip_zeros=True)
    mlp = skips.model.layers[0].mlp
    x = torch.randn(1, 1, 64)
    with torch.inference_mode():
        mlp.act_fn = activations.ReLU(float(mlp.gate_proj(x).flatten().sort().values[-20]))
        unread = mlp.act_fn(mlp.gate_proj(x)).flatten() == 0
        expected = mlp(x)
        mlp.up_proj.weight[unread] = torch.nan
        mlp.down_proj.weight[:, unread] = torch.nan
        assert int(unread.sum()) == 173
        assert torch.equal(mlp(x), expected)
        assert mlp(x.expand(1, 9, 64)).isnan().all()  # many tokens are one product


def test_int8_weights(relu_llama, tmp_path):
    quantkit.quantize(relu_llama, tmp_path / "int8", steps=["int8"], progress=False)
    plain, skips = (thinned(quantkit.load(tmp_path / "int8", skip_zeros=skip), 1.5) for skip in (False, True))
    ids = ids_for(plain)
    with counted_ops() as calls, skipping.counted() as read:
        found = steps(skips, ids)
    expected = steps(plain, ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert {(call.op, call.dtype) for call in calls} >= {
        ("mlp_sparse", torch.int8), ("linear_sparse_input", torch.int8)
    }  # fmt: skip
    assert read.share > 0.6
    assert len(read.layers) == 2
    assert torch.equal(skips.state_dict()["lm_head.weight"], plain.state_dict()["lm_head.weight"])


def test_a_threshold_before_the_layer_is_obeyed(charopt):
    plain = quantkit.load(charopt)
    before = skipping.sparse_inputs(plain)
    for layer in plain.model.decoder.layers:
        activations.adapt(layer.fc2, threshold=0.3)
    skips = copy.deepcopy(plain)
    found = skipping.skip_zeros(skips)
    assert all(each.zeros > one.zeros for each, one in zip(found, before, strict=True))
    assert all(isinstance(layer.fc2, activations.Adapted) for layer in skips.model.decoder.layers)
    ids = ids_for(plain)
    torch.testing.assert_close(steps(skips, ids), steps(plain, ids), rtol=1e-4, atol=1e-4)


def test_weights_copies_and_files_stay_what_they_were(relu_llama, tmp_path):
    plain, skips = quantkit.load(relu_llama), quantkit.load(relu_llama, skip_zeros=True)
    down = skips.model.layers[0].mlp.down_proj
    assert isinstance(down, nn.Linear)
    assert down.weight.t().is_contiguous()
    assert down.weight.untyped_storage().nbytes() == down.weight.nbytes
    for (name, one), (other, two) in zip(plain.state_dict().items(), skips.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(one, two)
    ids = ids_for(plain)
    twin = copy.deepcopy(skips)
    expected = steps(skips, ids)
    torch.testing.assert_close(steps(twin, ids), expected, rtol=1e-5, atol=1e-6)  # memory may be aligned otherwise
    with torch.no_grad():
        twin.model.layers[0].mlp.down_proj.weight.zero_()
    assert (steps(twin, ids) - expected).abs().max() > 1e-2
    assert torch.equal(steps(skips, ids), expected)
    skips.save_pretrained(tmp_path / "saved")
    saved = quantkit.load(tmp_path / "saved")
    assert all(torch.equal(one, two) for one, two in zip(saved.parameters(), plain.parameters(), strict=True))
    assert [each.name for each in skipping.skip_zeros(skips)] == [each.name for each in skipping.sparse_inputs(plain)]
    assert torch.equal(steps(skips, ids), expected)


def test_gradients_go_through_the_plain_layers(relu_llama):
    plain, skips = quantkit.load(relu_llama), quantkit.load(relu_llama, skip_zeros=True)
    ids = ids_for(plain, 1)
    for model in (plain, skips):
        model(input_ids=ids, labels=ids.expand(1, 1)).logits.square().sum().backward()
    for one, two in zip(plain.parameters(), skips.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


# What stays as it is


def test_layers_that_cannot_skip_say_why(relu_llama, tmp_path, caplog):
    quantkit.quantize(relu_llama, tmp_path / "w8a8", steps=["w8a8"], progress=False)
    model = quantkit.load(tmp_path / "w8a8", skip_zeros=True)
    assert "skip_zeros leaves 2 of 2 layers" in caplog.text
    assert caplog.text.strip().endswith("as they are: its activations are quantized, too")
    assert not any(isinstance(module, skipping.Skipping) for module in model.modules())
    model = quantkit.load(relu_llama)
    first, second = model.model.layers
    second.mlp.down_proj.weight = first.mlp.down_proj.weight
    assert {each.reason for each in skipping.skip_zeros(model)} == {"another module has the same weight"}


def test_a_model_without_zeros_is_told_of(model_folder, caplog):
    quantkit.load(model_folder("llama"), skip_zeros=True)
    assert "skip_zeros is unused: no linear layer of" in caplog.text


def test_counts_of_several_contexts_and_of_none(relu_llama):
    skips = quantkit.load(relu_llama, skip_zeros=True)
    ids = ids_for(skips, 6)
    with skipping.counted() as outer:
        with skipping.counted() as inner:
            steps(skips, ids)
        steps(skips, ids)
    assert (outer.rows, outer.zeros) == (2 * inner.rows, 2 * inner.zeros)
    assert inner.rows == 2 * 192 * 2  # two steps of two layers; the prompt's four tokens aren't single ones
    assert 0.3 < inner.share < 0.7
    steps(skips, ids)
    assert outer.rows == 2 * inner.rows
    assert skipping._counting == []
