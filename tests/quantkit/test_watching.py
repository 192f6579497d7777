"""What meets a weight, held against forward hooks and against routing done by hand."""

from collections import defaultdict

import pytest
import torch
from tiny import build, inputs
from torch import nn
from torch.nn import functional as F

from quantkit.checkpoint import use_plain_implementations
from quantkit.linears import linear_modules
from quantkit.watching import ForcedRouting, Latest, Watch, product_dtype


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


def parameter_of(seed):
    return nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)), requires_grad=False)


class TestStopping:
    def test_a_run_ends_at_the_last_product_which_is_not_computed(self):
        first, last, seen, done = parameter_of(0), parameter_of(1), Seen(), []

        def run():
            done.append(F.linear(X, first))
            done.append(F.linear(2 * X, last))

        watch = Watch({"first": (first, 1), "last": (last, 1)}, seen, stop=True)
        for _ in range(2):
            watch.of(run)
        assert [len(parts) for parts in seen.parts.values()] == [2, 2]
        assert torch.equal(seen.rows()["last", None][:6], 2 * X.reshape(-1, 5))
        assert len(done) == 2
        assert watch.met == {"first": 2, "last": 2}

    def test_what_is_left_of_a_run_is_seen_where_a_weight_has_met_nothing_yet(self):
        """In whatever order they come."""
        first, last, seen = parameter_of(0), parameter_of(1), Seen()
        watch = Watch({"first": (first, 1), "last": (last, 1)}, seen, stop=True)
        watch.of(lambda: (F.linear(X, first), F.linear(2 * X, first), F.linear(X, last)))
        assert [len(parts) for parts in seen.parts.values()] == [2, 1]

    def test_an_exception_of_the_model_comes_out(self):
        def run():
            raise RuntimeError("of the model")

        with pytest.raises(RuntimeError, match="of the model"):
            Watch({"p": (parameter_of(0), 1)}, Seen(), stop=True).of(run)

    @pytest.mark.parametrize(
        ("run", "expected"),
        [
            (lambda p: F.linear(X, p), True),
            (lambda p: (F.linear(X, p), F.linear(X, p)), False),
            (lambda p: (F.linear(X, p), F.linear(X[..., :3], p[:, :3])), False),
            (lambda p: p + 1, False),
        ],
        ids=["once", "twice", "and a part", "never"],
    )
    def test_it_is_for_weights_that_meet_one_product(self, run, expected):
        parameter = parameter_of(0)
        watch = Watch({"p": (parameter, 1)}, Seen())
        watch.of(lambda: run(parameter))
        assert watch.once_each == expected

    def test_and_for_none_of_several_experts(self):
        """Another batch may send tokens to another expert."""
        weight = nn.Parameter(torch.randn(3, 6, 5), requires_grad=False)
        watch = Watch({"p": (weight, 2)}, Seen())
        watch.of(lambda: F.linear(X, weight[1]))
        assert not watch.once_each


LOWER = {
    "linear": F.linear,
    "linear with bias": lambda x, p: F.linear(x, p, torch.full((6,), 0.3, dtype=x.dtype)),
    "matmul of the transpose": lambda x, p: x @ p.t(),
    "addmm": lambda x, p: torch.addmm(torch.full((6,), 0.3, dtype=x.dtype), x[0], p.t()),
    "the weight on the left": lambda x, p: p @ x[0].t(),
    "baddbmm": lambda x, p: torch.baddbmm(torch.ones(1, dtype=x.dtype), x, p.t().expand(2, 5, 6)),
    "some of the rows": lambda x, p: F.linear(x, p[2:4]),
}


class TestLowerProducts:
    @pytest.mark.parametrize("name", LOWER)
    def test_are_what_the_model_computes_in_that_dtype(self, name):
        """Bit for bit, and given in float32; what is seen is what came in, in float32."""
        run, seen, found = LOWER[name], Seen(), []
        parameter = nn.Parameter(PARAMETER.bfloat16().float(), requires_grad=False)
        watch = Watch({"p": (parameter, 1)}, seen, dtype=torch.bfloat16)
        for _ in range(2):  # the parameter is cast for the first
            watch.of(lambda: found.append(run(X, parameter)))
        expected = run(X.bfloat16(), parameter.bfloat16())
        assert found[0].dtype == torch.float32
        assert all(torch.equal(each, expected.float()) for each in found)
        assert not torch.equal(found[0], run(X, parameter))
        rows = seen.rows()["p", None]
        assert torch.equal(rows[: len(rows) // 2], X.reshape(-1, 5)[: len(rows) // 2])

    def test_of_experts_too(self):
        weight = nn.Parameter(torch.randn(3, 6, 5).bfloat16().float(), requires_grad=False)
        x, found = torch.randn(3, 4, 5), []
        watch = Watch({"p": (weight, 2)}, Seen(), dtype=torch.bfloat16)
        watch.of(lambda: found.extend([torch.bmm(x, weight.transpose(1, 2)), F.linear(x[2], weight[2])]))
        y, lower_weight = x.bfloat16(), weight.bfloat16()
        lower = [torch.bmm(y, lower_weight.transpose(1, 2)), F.linear(y[2], lower_weight[2])]
        assert all(torch.equal(one, other.float()) for one, other in zip(found, lower, strict=True))

    def test_other_products_and_other_dtypes_stay_as_they_are(self):
        parameter, other = parameter_of(0), parameter_of(1)
        double, found = nn.Parameter(parameter.double(), requires_grad=False), []
        watch = Watch({"p": (parameter, 1), "d": (double, 1)}, Seen(), dtype=torch.bfloat16)
        watch.of(lambda: found.extend([F.linear(X, other), F.linear(X.double(), double)]))
        assert torch.equal(found[0], F.linear(X, other))
        assert torch.equal(found[1], F.linear(X.double(), double))

    def test_they_are_for_weights_stored_so_where_the_device_has_them(self, monkeypatch):
        cpu = torch.device("cpu")
        for has in (True, False):
            monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
            assert product_dtype(torch.bfloat16, cpu) == (torch.bfloat16 if has else None)
            assert product_dtype(torch.float32, cpu) is None
            assert product_dtype(torch.float16, cpu) is None


class TestLatest:
    def test_one_tensor_is_worked_on_once_in_a_row(self):
        calls = []
        latest = Latest(lambda x: calls.append(x.sum().item()) or len(calls))
        x, y = torch.ones(2, 3), torch.ones(2, 3)
        found = [latest(x), latest(x.view(2, 3)), latest(y), latest(x), latest(x[:1]), latest(x.t())]
        assert found == [1, 1, 2, 3, 4, 5]

    def test_what_was_written_to_is_another(self):
        latest = Latest(lambda x: x.sum().item())
        x = torch.ones(3)
        assert latest(x) == 3
        x[0] = 5
        assert latest(x) == 7

    def test_memory_that_was_used_again_is_another(self):
        """A tensor may come to lie where one lay that is gone."""
        latest, places = Latest(lambda x: x[0].item()), set()
        for value in range(20):
            x = torch.full((5000,), float(value))
            places.add(x.data_ptr())
            assert latest(x) == value
            del x
        assert len(places) < 20

    def test_in_inference_mode_nothing_is_known_of_writes(self):
        latest = Latest(lambda x: x.sum().item())
        with torch.inference_mode():
            x = torch.ones(3)
            assert latest(x) == 3
            x[0] = 5
            assert latest(x) == 7


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
