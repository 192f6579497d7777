"""`backend` reaches what runs through every door, and where it cannot be obeyed the user is told why."""

import re

import pytest
import torch
from quantkit_kernels.errors import KernelError

from quantkit import modules
from quantkit.benchmark import benchmark
from quantkit.errors import QuantkitError
from quantkit.evaluation import evaluate
from quantkit.generation import complete
from quantkit.loading import load
from quantkit.texts import Texts

TEXT = Texts("text", "text", "none", ("some words to read, and some more of them",))
EVALUATE = {"seq_len": 16, "device": "cpu", "progress": False}
BENCH = {"prompt_tokens": 4, "new_tokens": 1, "runs": 1, "device": "cpu", "progress": False}
OPS = {
    "w8a8": "linear_dynamic",
    "fp8": "linear_dynamic",
    "w8a8-static": "linear_tensor",
    "fp8-static": "linear_tensor",
    "fp8-block": "linear_block",
    "int8-g128": "linear_weight_only_packed",
    "int4": "linear_weight_only_packed",
    "fp8-weight-only": "linear_weight_only",
    "llm-int8": "linear_llm_int8",
}


@pytest.fixture(autouse=True)
def needs_triton():
    pytest.importorskip("triton", reason="Triton exists on Linux only")


def sentence(op: str) -> str:
    """What a user is told who asks for Triton on a CPU."""
    return (
        f"backend 'triton' cannot run {op} on device cpu: expected tensors on a CUDA device (on the CPU Triton runs "
        "only in its interpreter): use backend 'auto' or 'torch'"
    )


@pytest.mark.parametrize(("recipe", "op"), OPS.items())
@pytest.mark.parametrize("kept", [False, True])
def test_each_recipe_obeys_or_says_why(compressed, recipe, op, kept):
    """Also where the decoded weight is kept, which would run without the op."""
    ids = torch.arange(4)[None]
    with torch.no_grad():
        assert torch.equal(load(compressed(recipe), backend="torch")(ids).logits, load(compressed(recipe))(ids).logits)
        with pytest.raises(KernelError, match=f"^{re.escape(sentence(op))}$"):
            load(compressed(recipe), backend="triton", keep_decoded=kept)(ids)


def test_experts_obey_or_say_why(compressed):
    model = load(compressed("w8a8", "mixtral"), backend="triton")
    for module in model.modules():
        if isinstance(module, modules.QuantizedLinear):
            module.backend = "torch"
    with torch.no_grad(), pytest.raises(KernelError, match=f"^{re.escape(sentence('linear_dynamic'))}$"):
        model(torch.arange(4)[None])


def test_every_command_hands_it_on(cli, compressed, tmp_path):
    (tmp_path / "text.txt").write_text("some words to read, and some more of them")
    folder, end = compressed("w8a8"), ("--device", "cpu", "--backend", "triton")
    for words in (
        ("eval", folder, "--dataset", tmp_path / "text.txt", "--seq-len", 16),
        ("bench", folder, "--prompt-tokens", 4, "--new-tokens", 1, "--runs", 1),
        ("generate", folder, "--prompt", "ab", "--max-new-tokens", 2),
    ):
        result = cli(*words, *end)
        assert result.exit_code == 1, result.stdout
        assert result.stderr.splitlines()[-1] == f"Error: {sentence('linear_dynamic')}"
        assert result.stdout == ""


@pytest.mark.parametrize("asked", ["torch", "triton", "mkl"])
def test_a_model_in_memory_has_its_backend_already(compressed, model_folder, asked):
    model = load(compressed("w8a8"), backend="auto")
    expected = (
        "expected one of auto, torch, triton" if asked == "mkl" else f"was loaded with 'auto': load it with .*{asked}"
    )
    for measure in (
        lambda: evaluate(model, TEXT, backend=asked, **EVALUATE),
        lambda: evaluate(model_folder("llama"), TEXT, model, backend=asked, **EVALUATE),
        lambda: benchmark(model, backend=asked, **BENCH),
    ):
        with pytest.raises(QuantkitError, match=expected):
            measure()


def test_a_model_in_memory_that_has_the_backend_runs(compressed, model_folder):
    model, plain = load(compressed("w8a8"), backend="torch"), load(model_folder("llama"))
    result = evaluate(model, TEXT, plain, backend="torch", **EVALUATE)
    assert [each["backend"] for each in result["served"]] == ["cpu"]
    assert benchmark(model, backend="torch", **BENCH)["models"][0]["served"][0]["backend"] == "cpu"
    experts = load(compressed("w8a8", "mixtral"), backend="torch")
    assert evaluate(experts, TEXT, backend="torch", **EVALUATE)["served"]


@pytest.mark.parametrize("door", [load, lambda *a, **k: complete(*a, "ab", **k)])
def test_an_unknown_backend_is_refused_before_anything_is_read(compressed, door):
    with pytest.raises(QuantkitError, match="backend 'mkl' is unknown; use one of auto, torch, triton"):
        door(compressed("w8a8"), backend="mkl")
