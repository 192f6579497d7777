import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import FalconConfig, FalconForCausalLM
from transformers.pytorch_utils import Conv1D

from quantkit.linears import linear_modules, linear_orientation


class Own(nn.Linear):
    """A linear layer with a forward pass of its own, which `compute` gives."""

    def __init__(self, compute, in_features=6, out_features=4, bias=True):
        super().__init__(in_features, out_features, bias=bias)
        self.compute = compute

    def forward(self, x):
        return self.compute(self, x)


def plain(layer, x):
    return x @ layer.weight.T + layer.bias


NOT_LINEAR = {
    "scaled": lambda layer, x: plain(layer, x) * 1.001,
    "an activation after": lambda layer, x: F.relu(plain(layer, x)),
    "the bias twice": lambda layer, x: plain(layer, x) + layer.bias,
    "no bias": lambda layer, x: x @ layer.weight.T,
    "two outputs": lambda layer, x: (plain(layer, x), x),
    "a residual": lambda layer, x: plain(layer, x) + x.sum(-1, keepdim=True),
    "float32 whatever comes in": lambda layer, x: F.linear(x.float(), layer.weight.float(), layer.bias.float()),
    "flat tokens": lambda layer, x: plain(layer, x.reshape(-1, x.shape[-1])),
    "another input's shape": lambda layer, x: plain(layer, x.reshape(-1, 3, 6)).sum(1),
    "an error": lambda layer, x: x.nonesuch,
}


def test_torchs_own_layers_are_told_without_a_run():
    layer = nn.Linear(6, 4, device="meta")
    layer.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    assert linear_orientation(layer) == "out_in"


@pytest.mark.parametrize(("sizes", "device"), [((6, 4), "cpu"), ((5, 5), "cpu"), ((6, 4), "meta"), ((5, 5), "meta")])
def test_a_layer_is_told_by_what_it_computes(sizes, device):
    with torch.device(device):
        conv, own = Conv1D(sizes[1], sizes[0]), Own(plain, *sizes)
        bare = Own(lambda layer, x: x @ layer.weight.T, *sizes, bias=False)
        swapped = Own(lambda layer, x: x @ layer.weight, *sizes, bias=False)
    assert linear_orientation(conv) == "in_out"
    assert linear_orientation(own) == linear_orientation(bare) == "out_in"
    assert linear_orientation(swapped) == "in_out"
    assert conv.weight.device.type == device


@pytest.mark.parametrize("name", NOT_LINEAR)
@pytest.mark.parametrize("sizes", [(6, 4), (6, 6)])
def test_what_computes_something_else_is_none(name, sizes):
    assert linear_orientation(Own(NOT_LINEAR[name], *sizes)) is None


def test_two_layers_of_a_class_are_told_apart_by_their_settings():
    class Scaled(nn.Linear):
        factor = 1

        def forward(self, x):
            return self.factor * super().forward(x)

    one, two = Scaled(6, 4), Scaled(6, 4)
    two.factor = 2
    assert (linear_orientation(one), linear_orientation(two)) == ("out_in", None)


def test_a_forward_pass_that_was_replaced_is_what_counts():
    layer = Own(plain)
    assert linear_orientation(layer) == "out_in"
    layer.forward = lambda x: plain(layer, x) * 2
    assert linear_orientation(layer) is None


@pytest.mark.parametrize(
    "module",
    [
        nn.Embedding(4, 6),
        nn.LayerNorm(6),
        nn.Conv1d(4, 6, 1),
        nn.Bilinear(4, 4, 6),
        nn.Sequential(nn.Linear(4, 4)),
        nn.Module(),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.MultiheadAttention(4, 1),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_none(module):
    assert linear_orientation(module) is None


def test_nothing_of_the_module_changes():
    layer = Own(plain).train()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    linear_orientation(layer)
    assert layer.training
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_the_layers_of_a_model_are_found_whatever_their_class():
    found = {name: rest for name, _, *rest in linear_modules(models.gpt2_model())}
    assert len(found) == 2 * 4 + 1
    assert found["transformer.h.1.attn.c_attn"] == [32, 96, True]
    assert found["transformer.h.0.mlp.c_proj"] == [128, 32, True]
    assert found["lm_head"] == [32, models.VOCABULARY, False]
    config = FalconConfig(vocab_size=models.VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    falcon = {name: rest for name, _, *rest in linear_modules(FalconForCausalLM(config))}
    assert falcon["transformer.h.0.mlp.dense_h_to_4h"] == [32, 128, False]
    assert len(falcon) == 4 + 1
    with torch.device("meta"):
        assert {name: rest for name, _, *rest in linear_modules(FalconForCausalLM(config))} == falcon
