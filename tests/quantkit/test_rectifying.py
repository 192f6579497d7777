"""Where discovery finds room for a relu: MLPs by their data flow, whatever they are called, and norms before layers."""

import math

import models
import pytest
import torch
from odd_block import OddBlock
from torch import nn
from torch.nn import functional as F

from quantkit.checkpoint import Hub, open_folder
from quantkit.discovery import Activation, Norm, discover, randomize_, rectifiable
from quantkit.discovery.rectifying import is_activation, is_norm, is_relu, rectifies
from quantkit.exploration import explore

HIDDEN = 16


class Plain(nn.Module):
    """A residual MLP; what a test makes of it is in `middle`."""

    def __init__(self, middle, act=None) -> None:
        super().__init__()
        self.before, self.one, self.two = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 24), nn.Linear(HIDDEN, 24)
        self.last, self.act, self.middle = nn.Linear(24, HIDDEN), act or nn.SiLU(), middle

    def forward(self, x):
        return x + self.last(self.middle(self, self.before(x)))


class Straight(nn.Module):
    """What a subclass doesn't know to be an activation."""

    def forward(self, x):
        return 3 * x + 1


class Composite(nn.Module):
    """An activation of several operations, one in place."""

    def forward(self, x):
        return (x * torch.sigmoid(1.7 * x)).add_(0.0)


def found(block):
    block = block.eval()
    randomize_(block, torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in block.state_dict().items()}
    kinds = [type(module) for module in block.modules()]
    args = (torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1)),)
    seen = rectifiable(block, args, {}, discover(block, args, {}, groups=False).linears)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert [type(module) for module in block.modules()] == kinds
    return seen


NORM = Norm("before", ("one.weight",))
BOTH = Norm("before", ("one.weight", "two.weight"))


@pytest.mark.parametrize(
    ("middle", "act", "expected", "norm"),
    [
        (lambda m, x: m.act(m.one(x)), None, Activation("act", ("last.weight",), ("one.weight",)), NORM),
        (lambda m, x: m.act(m.one(x)), Composite(), Activation("act", ("last.weight",), ("one.weight",)), NORM),
        (
            lambda m, x: m.act(m.one(x)),
            nn.ReLU(inplace=True),
            Activation("act", ("last.weight",), ("one.weight",), is_relu=True, rectifies=True),
            NORM,
        ),
        (
            lambda m, x: m.act(m.one(x)) * m.two(x),
            nn.GELU(),
            Activation("act", ("last.weight",), ("one.weight",), True, ("two",)),
            BOTH,
        ),
        (
            lambda m, x: m.act(m.one(x)[..., :12]).repeat(1, 1, 2) * m.one(x),
            None,
            None,
            NORM,
        ),
        (
            lambda m, x: F.pad(m.act(m.one(x)[..., :12]) * m.one(x)[..., 12:], (0, 12)),
            None,
            None,
            NORM,
        ),
        (lambda m, x: m.act(m.one(x)), Straight(), None, NORM),
        (lambda m, x: F.silu(m.one(x)), None, None, NORM),
    ],
    ids=["plain", "composite", "relu in place", "gated", "repeated", "padded", "not an activation", "inline"],
)
def test_an_mlp_is_found_by_its_data_flow(middle, act, expected, norm):
    seen = found(Plain(middle, act))
    assert list(seen.activations) == ([] if expected is None else [expected])
    assert list(seen.norms) == [norm]


@pytest.mark.parametrize(
    ("middle", "name", "words"),
    [
        (lambda m, x: F.silu(m.one(x)), "last.weight", "code of its own (silu), not in a module"),
        (lambda m, x: torch.tanh(m.one(x)) * m.two(x), "last.weight", "code of its own (tanh)"),
        (lambda m, x: m.act(m.one(m.act(x))), "act", "it is given what is no linear layer's output"),
        (lambda m, x: m.act(m.one(x)) * x.mean(-1, keepdim=True), "act", "its output is mixed with"),
        (lambda m, x: torch.tanh(m.act(m.one(x))), "act", "a second activation (tanh)"),
    ],
)
def test_what_is_no_mlp_with_a_module_has_a_reason(middle, name, words):
    seen = found(Plain(middle))
    assert not seen.activations
    assert words in seen.unchanged[name]


def test_a_norm_whose_output_goes_elsewhere_has_a_reason():
    seen = found(Plain(lambda m, x: m.act(m.one(x) + x.mean())))
    assert not seen.norms
    assert seen.unchanged["before"] == "its output also goes elsewhere (mean)"


def test_modules_are_told_apart_by_what_they_compute():
    kinds = [nn.SiLU(), nn.GELU(approximate="tanh"), nn.ReLU(), nn.Sigmoid(), nn.Hardtanh(), Composite()]
    assert all(is_activation(kind, 3) for kind in kinds)
    others = [nn.Identity(), Straight(), nn.Softmax(-1), nn.LayerNorm(257, elementwise_affine=False), nn.PReLU()]
    assert not any(is_activation(other.eval(), 3) for other in [*others, nn.Dropout(0.5)])
    assert [is_relu(kind, 3) for kind in kinds] == [False, False, True, False, False, False]
    assert rectifies(nn.ReLU(), 3)
    assert not rectifies(nn.SiLU(), 3)
    x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0))
    assert is_norm(nn.LayerNorm(HIDDEN), x)
    assert is_norm(nn.RMSNorm(HIDDEN), x)
    assert not any(is_norm(other, x) for other in (nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Tanh(), nn.Identity()))


def test_the_odd_block_has_no_module_for_its_activations():
    block = OddBlock().eval()
    randomize_(block, torch.Generator().manual_seed(0))
    args = (torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)),)
    seen = rectifiable(block, args, {}, discover(block, args, {}, groups=False).linears)
    assert not seen.activations
    assert {name for name, why in seen.unchanged.items() if "code of its own" in why} == {
        "shrink.weight",
        "chooser.narrow",
    }
    assert next(norm.module for norm in seen.norms) == "alpha"


def test_a_list_of_experts_without_a_token_is_like_the_others():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(HIDDEN)
            self.parts = nn.ModuleList(nn.ModuleDict(self.part()) for _ in range(3))

        @staticmethod
        def part():
            return {"up": nn.Linear(HIDDEN, 24), "act": nn.SiLU(), "down": nn.Linear(24, HIDDEN)}

        def forward(self, x):
            y = self.norm(x)
            for part in self.parts[:2]:
                x = x + part["down"](part["act"](part["up"](y)))
            return x

    seen = found(Experts())
    expected = [Activation(f"parts.{i}.act", (f"parts.{i}.down.weight",), (f"parts.{i}.up.weight",)) for i in range(3)]
    assert sorted(seen.activations, key=lambda each: each.module) == expected


EXPECTED = {
    "llama": ("mlp.act_fn", True, ("mlp.up_proj",), 2),
    "opt": ("activation_fn", False, (), 2),
    "gpt2": ("mlp.act", False, (), 2),
    "mixtral": ("mlp.experts.act_fn", True, (), 2),
    "phi": ("mlp.activation_fn", False, (), 1),
    "phi3": ("mlp.activation_fn", True, ("mlp.gate_up_proj",), 2),
    "bloom": ("mlp.gelu_impl", False, (), 2),
    "gemma2": ("mlp.act_fn", True, ("mlp.up_proj",), 2),
    "olmo2": ("mlp.act_fn", True, ("mlp.up_proj",), 0),
    "gpt_oss": None,
    "bitnet": None,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_models_of_transformers(model_folder, tiny_folder, name):
    folder = model_folder(name) if name in models.BUILDERS else tiny_folder(name)
    findings = explore(open_folder(folder, Hub()).skeleton, groups=False, activations=True)
    assert not findings.untraced
    structure = findings.structures[0]
    if EXPECTED[name] is None:
        assert not structure.activations
        assert structure.unchanged
        return
    module, gated, ups, norms = EXPECTED[name]
    assert [(each.module, each.gated, each.ups) for each in structure.activations] == [(module, gated, ups)]
    assert len(structure.norms) == norms
    assert not structure.unchanged
    assert math.isclose(sum(each.is_relu for each in structure.activations), name == "opt")
