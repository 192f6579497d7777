"""Which kernels served a model: counted where ops run, by model, op, dtype and backend."""

from collections import Counter

import pytest
import torch
from quantkit_kernels import backends, formats, ops
from quantkit_kernels.backends import Call, counted

from quantkit import modules
from quantkit.cli.evaluate import table
from quantkit.evaluation import evaluate
from quantkit.loading import load
from quantkit.served import calls_of, counting, rows
from quantkit.texts import Texts

LINEARS = 14
TEXT = Texts("text", "text", "none", (" ".join(f"{number} is no {number * number % 997}." for number in range(40)),))
WORDS = {"seq_len": 32, "max_tokens": 96, "batch_size": 1, "device": "cpu", "progress": False}
CPU_CALL = Call("linear_dynamic", torch.int8, "cpu")


def row(op, dtype, calls, backend="cpu"):
    return {"op": op, "dtype": dtype, "backend": backend, "calls": calls}


@pytest.mark.parametrize(
    ("recipe", "op", "dtype"),
    [
        ("w8a8", "linear_dynamic", "int8"),
        ("fp8-block", "linear_block", "float8_e4m3fn"),
        ("int4", "linear_weight_only_packed", "int32"),
        ("llm-int8", "linear_llm_int8", "int8"),
    ],
)
def test_evaluation_says_what_served_the_model(compressed, recipe, op, dtype):
    result = evaluate(compressed(recipe), TEXT, **WORDS)
    assert result["served"] == [row(op, dtype, 3 * LINEARS)]
    assert "baseline_served" not in result
    assert f"served {op} ({dtype}) on cpu: 42 calls" in " ".join(table(result).split())


def test_model_and_baseline_are_counted_apart(compressed, model_folder):
    result = evaluate(compressed("w8a8"), TEXT, compressed("fp8"), **WORDS)
    assert result["served"] == [row("linear_dynamic", "int8", 3 * LINEARS)]
    assert result["baseline_served"] == [row("linear_dynamic", "float8_e4m3fn", 3 * LINEARS)]
    assert "served baseline linear_dynamic (float8_e4m3fn) on cpu: 42 calls" in " ".join(table(result).split())
    result = evaluate(model_folder("llama"), TEXT, compressed("w8a8"), **WORDS)
    assert result["served"] == []
    assert result["baseline_served"] == [row("linear_dynamic", "int8", 3 * LINEARS)]


def test_products_of_experts_are_counted(compressed):
    """Two layers with four linears each in attention; beside them two products for every expert that a token chose."""
    model = load(compressed("w8a8", "mixtral"))
    counts = evaluate(model, TEXT, **WORDS)["served"]
    assert [each["op"] for each in counts] == ["linear_dynamic"]
    extra = counts[0]["calls"] - 3 * 2 * 4
    config = model.config
    assert 3 * 2 * 2 * config.num_experts_per_tok <= extra <= 3 * 2 * 2 * config.num_local_experts


def test_kept_decoded_weights_count_as_the_op_that_they_stand_for(compressed):
    model = load(compressed("int4"))
    modules.keep_decoded(model)
    with torch.no_grad(), counted() as calls:
        model(torch.arange(5)[None])
    assert calls == {Call("linear_weight_only_packed", torch.int32, "cpu"): LINEARS}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_are_counted_where_they_run(compressed, backend):
    model = load(compressed("w8a8"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        with counted() as first:
            compiled(ids)
        with counted() as second:
            compiled(ids)
        compiled(ids)
    assert first == second == {CPU_CALL: LINEARS}


def test_counters_nest_and_close():
    x = torch.ones(2, 8)
    codes, scale = formats.quantize_weight(x, torch.int8)
    with counted() as outer:
        ops.linear_dynamic(x, codes, scale, None)
        with counted() as inner, counted(inner):
            ops.linear_dynamic(x, codes, scale, None)
        with pytest.raises(ZeroDivisionError), counted():
            1 / 0  # noqa: B018
        ops.quantize_per_token(x, torch.int8)
    ops.linear_dynamic(x, codes, scale, None)
    assert inner == {CPU_CALL: 2}
    assert outer == {CPU_CALL: 2, Call("quantize_per_token", torch.int8, "torch"): 1}
    assert not backends._counting


def test_what_is_asked_and_what_is_refused_is_no_call():
    with counted() as calls:
        ops.select_backend("linear_dynamic", torch.int8, torch.device("cpu"), "auto")
        with pytest.raises(ops.KernelError):
            ops.linear_dynamic(torch.ones(2, 8), torch.ones(3, 8, dtype=torch.int8), torch.ones(3, 1), None, "mkl")
    assert not calls


def test_calls_outside_of_a_count_are_nobodys():
    one, other = torch.nn.Identity(), torch.nn.Identity()
    x = torch.ones(2, 8)
    with calls_of(one):
        ops.quantize_per_token(x, torch.int8)
    with counting(one, None, other, one) as counters:
        with calls_of(other):
            ops.quantize_per_token(x, torch.int8)
        with calls_of(torch.nn.Identity()):
            ops.quantize_per_token(x, torch.int8)
    call = Call("quantize_per_token", torch.int8, "torch")
    assert counters == [{}, {}, {call: 1}, {}]
    assert counters[0] is counters[3]


def test_rows_are_in_order_and_every_counter_has_its_column():
    first = {Call("b", torch.int8, "cpu"): 1, Call("a", torch.int8, "torch"): 2}
    second = {Call("a", torch.int8, "cpu"): 3}
    made = rows(calls_prefill=Counter(first), calls_step=Counter(second))
    assert [tuple(each.values()) for each in made] == [
        ("a", "int8", "cpu", 0, 3), ("a", "int8", "torch", 2, 0), ("b", "int8", "cpu", 1, 0),
    ]  # fmt: skip
    assert list(made[0]) == ["op", "dtype", "backend", "calls_prefill", "calls_step"]
