"""What meets a weight, held against forward hooks and against routing done by hand."""

from collections import defaultdict

import pytest
import torch
from tiny import build, inputs
from torch import nn
from torch.nn import functional as F

from quantkit.checkpoint import use_plain_implementations
from quantkit.linears import linear_modules
from quantkit.watching import ForcedRouting, Watch


class Seen:
    """What a watch told: rows [n, K] by parameter and expert, in their order."""

    def __init__(self) -> None:
        self.parts = defaultdict(list)

    def __call__(self, name, expert, x):
        self.parts[name, expert].append(x.reshape(-1, x.shape[-1]).clone())

    def rows(self):
        return {key: torch.cat(parts) for key, parts in self.parts.items()}


def watched(run, parameters):
    """What is seen of these parameters, by name with their axis, while a function runs; and what it gives."""
    seen = Seen()
    with torch.no_grad(), Watch(parameters, seen):
        result = run()
    return seen.rows(), result


def plain(model_type):
    model = build(model_type)
    use_plain_implementations(model)
    return model


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "falcon", "gemma2", "mamba", "jamba", "hrm_text"])
def test_a_layers_inputs_are_those_of_a_forward_hook(model_type):
    """Also of GPT-2's layers in x out, and of a model that runs its layers more than once."""
    model, hooked, parameters = plain(model_type), Seen(), {}
    for name, module, _, _, transposed in linear_modules(model):
        parameters[name] = (module.weight, 0 if transposed else 1)
        module.register_forward_pre_hook(lambda _, args, name=name: hooked(name, None, args[0]))
    found, logits = watched(lambda: model(**inputs(model)).logits, parameters)
    expected = hooked.rows()
    if model_type in ("mamba", "jamba"):  # one weight is multiplied by code that doesn't call its layer
        alone = {key for key in found if key not in expected}
        assert {name.rpartition(".")[2] for name, _ in alone} == {"dt_proj"}
        found = {key: value for key, value in found.items() if key not in alone}
    assert len(expected) > 6
    assert_equal(found, expected)
    with torch.no_grad():
        assert torch.equal(logits, model(**inputs(model)).logits)


def experts_of(model):
    return {name: value for name, value in model.named_parameters() if name.endswith("experts.gate_up_proj")}


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "qwen3_next", "gpt_oss"])
def test_an_experts_inputs_are_the_tokens_that_its_router_sent(model_type):
    """Known by the expert's number, in both layouts of the parameter; of the second product too."""
    model = plain(model_type)
    axis = 1 if model_type == "gpt_oss" else 2
    parameters, expected = {}, {}
    for name, weight in experts_of(model).items():
        owner = name.rpartition(".")[0]
        parameters[name] = (weight, axis)
        parameters[f"{owner}.down_proj"] = (model.get_parameter(f"{owner}.down_proj"), axis)

        def note(module, args, kwargs, name=name, weight=weight):
            x, chosen = (list(args) + list(kwargs.values()))[:2]
            for expert in range(len(weight)):
                _, sent = torch.where((chosen == expert).t())  # as first choice, then as second
                if len(sent):
                    expected[name, expert] = x.reshape(-1, x.shape[-1])[sent]

        model.get_submodule(owner).register_forward_pre_hook(note, with_kwargs=True)
    found, _ = watched(lambda: model(**inputs(model)), parameters)
    first = {key: value for key, value in found.items() if key[0].endswith("gate_up_proj")}
    assert len(first) >= 4
    assert_equal(first, expected)
    for (name, expert), rows in first.items():
        after = found[name.replace("gate_up", "down"), expert]
        assert len(after) == len(rows)
        if model_type != "gpt_oss":
            with torch.no_grad():
                gate, up = F.linear(rows, parameters[name][0][expert]).chunk(2, -1)
            assert torch.equal(after, F.silu(gate) * up)


def test_experts_that_are_multiplied_all_at_once():
    """Llama 4 gives each expert every token, as one batched product."""
    model, expected, parameters = plain("llama4_text"), {}, {}
    for name, weight in experts_of(model).items():
        parameters[name] = (weight, 1)

        def note(_, args, name=name, weight=weight):
            for expert, rows in enumerate(args[0].reshape(len(weight), -1, weight.shape[1])):
                expected[name, expert] = rows

        model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(note)
    found, _ = watched(lambda: model(**inputs(model)), parameters)
    assert len(found) == 4
    assert_equal(found, expected)


PARAMETER = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
ONES = torch.ones(4, 6)
PRODUCTS = {
    "linear": (1, X, lambda p: F.linear(X, p)),
    "linear with bias": (1, X, lambda p: F.linear(X, p, torch.ones(6))),
    "matmul of the transpose": (1, X, lambda p: X @ p.t()),
    "in x out": (0, ONES, lambda p: ONES @ p),
    "addmm": (0, ONES, lambda p: torch.addmm(torch.ones(5), ONES, p)),
    "the weight on the left": (1, X[0], lambda p: p @ X[0].t()),
    "einsum": (1, X, lambda p: torch.einsum("btk,nk->btn", X, p)),
    "baddbmm": (1, X, lambda p: torch.baddbmm(torch.ones(1), X, p.t().expand(2, 5, 6))),
    "some of the rows": (1, X, lambda p: F.linear(X, p[2:4])),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_that_a_model_may_write(name):
    axis, activations, run = PRODUCTS[name]
    parameter = nn.Parameter(PARAMETER.clone(), requires_grad=False)
    found, _ = watched(lambda: run(parameter), {"p": (parameter, axis)})
    assert_equal(found, {("p", None): activations.reshape(-1, activations.shape[-1])})


def test_what_is_not_a_product_with_all_of_k_is_passed_by():
    """A part of K meets a part of the activations; sums and lookups are no products; other weights aren't watched."""
    parameter, other = (nn.Parameter(PARAMETER.clone(), requires_grad=False) for _ in range(2))

    def run():
        F.linear(X[..., :3], parameter[:, :3])
        F.linear(X, other)
        F.embedding(torch.tensor([0, 1]), parameter)
        return parameter + 1

    found, _ = watched(run, {"p": (parameter, 1)})
    assert found == {}


def test_a_product_of_all_experts_and_one_of_one():
    weight = nn.Parameter(torch.randn(3, 6, 5), requires_grad=False)
    x = torch.randn(3, 4, 5)
    found, _ = watched(lambda: torch.bmm(x, weight.transpose(1, 2)), {"p": (weight, 2)})
    assert_equal(found, {("p", expert): x[expert] for expert in range(3)})
    found, _ = watched(lambda: (x[0] @ weight[2].t(), F.linear(x[1], weight[0])), {"p": (weight, 2)})
    assert_equal(found, {("p", 2): x[0], ("p", 0): x[1]})


class TestForcedRouting:
    @pytest.mark.parametrize(
        ("chosen", "expected"), [([2], {2, 0}), ([3, 1], {3, 1}), ([1, 2, 3], {1, 2}), ([], {0, 1})]
    )
    @pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "qwen3_next", "gpt_oss"])
    def test_every_token_goes_to_the_chosen_experts(self, model_type, chosen, expected):
        """Filled up, or cut, to as many as the router chooses: two."""
        model = plain(model_type)
        axis = 1 if model_type == "gpt_oss" else 2
        parameters = {name: (value, axis) for name, value in experts_of(model).items()}
        with ForcedRouting(4, chosen) as routing:
            found, _ = watched(lambda: model(**inputs(model)), parameters)
        assert routing.taken
        assert {expert for _, expert in found} == expected
        assert {len(rows) for rows in found.values()} == {32}

    def test_the_output_is_that_of_the_chosen_experts_with_their_own_scores(self):
        """Mixtral's sum over two experts, weighted by their share of the softmax (arXiv:2401.04088), as a loop."""
        block = plain("mixtral").model.layers[0].mlp
        x = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            free = block(x)
            with ForcedRouting(4, [3, 1]):
                found = block(x)
            scores = F.linear(x[0], block.gate.weight).softmax(-1)[:, [3, 1]]
            shares = scores / scores.sum(-1, keepdim=True)
            expected = torch.zeros(8, 64)
            for column, expert in enumerate((3, 1)):
                gate, up = F.linear(x[0], block.experts.gate_up_proj[expert]).chunk(2, -1)
                y = F.linear(F.silu(gate) * up, block.experts.down_proj[expert])
                expected += shares[:, column, None] * y
        # Sums of at most 128 terms near 1, in another order.
        torch.testing.assert_close(found[0], expected, rtol=0, atol=128 * 2**-23)
        assert not torch.allclose(free, found, atol=1e-2)

    @pytest.mark.parametrize("model_type", ["llama", "phimoe"])
    def test_without_a_choice_of_the_best_nothing_is_forced(self, model_type):
        """A dense model has no experts; Phi's router takes the maximum twice."""
        model = plain(model_type)
        with torch.no_grad():
            expected = model(**inputs(model)).logits
            with ForcedRouting(4, [2]) as routing:
                found = model(**inputs(model)).logits
        assert not routing.taken
        assert torch.equal(found, expected)

    def test_other_choices_are_left_alone(self):
        """Of another number of scores, and where all are chosen."""
        scores = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
        with ForcedRouting(4, [0]) as routing:
            assert torch.equal(scores.topk(4).indices, scores.argsort(-1, descending=True))
            assert torch.equal(scores[:, :3].topk(1).indices[:, 0], scores[:, :3].argmax(-1))
            assert not routing.taken
            values, indices = scores.topk(2)
        assert routing.taken
        assert indices.tolist() == [[0, 1]] * 5
        assert torch.equal(values, scores[:, :2])
