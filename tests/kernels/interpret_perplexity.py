"""Program: tiny models evaluated with backend "triton", in Triton's interpreter, and with "torch".

Run by test_kernel_perplexity.py in a process of its own with TRITON_INTERPRET=1. Prints how many models agreed.

Each recipe is held to two things. For the same input, the two outputs of a layer differ by no more than `difference`
says. And the perplexities differ by no more than such differences do: |log perplexity| moves by less than it does in
any of `DRAWS` runs of the torch model whose outputs are moved by as much, up or down at random. (Rounding errors are
far smaller than their bound, so that the least of those movements is still more than theirs, whatever codes flip.)
Int8 in float32 is exact: there the perplexities are equal.
"""

import json
import math
import sys
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from quantkit_kernels.formats import dequantize_weight
from transformers import LlamaConfig, LlamaForCausalLM

from quantkit import evaluate, load, quantize
from quantkit.checkpoint import quiet_transformers
from quantkit.modules import QuantizedLinear
from quantkit.recipe import load_recipe

FP32, FP16 = torch.float32, torch.float16
RECIPES = {
    "w8a8": FP32,
    "w8a8-static": FP32,
    "fp8": FP32,
    "fp8-static": FP32,
    "fp8-block": FP32,
    "int8": FP16,
    "int4": FP16,
    "fp8-weight-only": FP16,
    "llm-int8": FP32,
}
EXACT = ("w8a8", "w8a8-static")
SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 61}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
WORDS = {"seq_len": 16, "max_tokens": 32, "device": "cpu", "progress": False}
LINEARS, DRAWS = 7, 4


def made(folder: Path, dtype: torch.dtype) -> Path:
    """The folder, with a random model in it; its norms have two features of outliers beyond 6."""
    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
            if "layernorm" in name:
                parameter[[5, 77]] *= 6
    model.to(dtype).save_pretrained(folder)
    return folder


def written(path: Path, seed: int) -> Path:
    """The path, of a data set with four rows of random tokens."""
    ids = torch.randint(SIZES["vocab_size"], (4, 16), generator=torch.Generator().manual_seed(seed)).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids), encoding="utf-8")
    return path


def difference(layer: QuantizedLinear, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """What two right outputs of a layer differ by at most, element by element.

    Each is off by K + 8 roundings of float32 of the sum of magnitudes, and one to its dtype; with weights alone in
    float16 also by those of decoding, to the scale's dtype and to x's, and one before a bias. Quantizing x adds at most
    a sixteenth to a number, or half of a step, a 254th of the largest one (LLM.int8 and int8: a 127th of 6 is less).
    """
    codes, scale = layer.codes_and_scale()
    weight = dequantize_weight(codes, scale.double(), layer.scheme.weight_granularity).abs()
    size = x.double().abs()
    if layer.scheme.activation_dtype is not None:
        size = size * (1 + 1 / 16) + size.amax() / 254
    rounding = (layer.in_features + 8) * 2.0**-24
    if x.dtype == FP16:
        rounding += 3 * 2.0**-11
    one = rounding * (size @ weight.t()) + torch.finfo(x.dtype).eps / 2 * out.double().abs()
    return 2 * one * 1.01


def compare_layers(model: Any, ids: torch.Tensor) -> int:
    """How many layers of a model on Triton's kernels gave what torch gives for the same input, each of them."""
    seen = 0

    def check(layer: QuantizedLinear, inputs: tuple[torch.Tensor], out: torch.Tensor) -> None:
        nonlocal seen
        layer.backend = "torch"
        expected = layer.forward(*inputs)
        layer.backend = "triton"
        bound = difference(layer, inputs[0], expected)
        error = (out.double() - expected.double()).abs()
        assert (error <= bound).all(), f"{layer}: {float((error / bound).max())} of the bound"
        assert bound.mean() < 0.05 * expected.double().abs().mean(), f"{layer}: the bound says nothing"
        seen += 1

    with ExitStack() as stack:
        for layer in layers(model):
            stack.callback(layer.register_forward_hook(check).remove)
        with torch.no_grad():
            model(ids)
    return seen


def layers(model: Any) -> list[QuantizedLinear]:
    """The packed layers."""
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def movement(model: Any, text: Path, perplexity: float) -> float:
    """The least that |log perplexity| moves by in `DRAWS` runs of a model whose outputs are moved by `difference`."""
    generator = torch.Generator().manual_seed(0)

    def move(layer: QuantizedLinear, inputs: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        sign = torch.randint(2, out.shape, generator=generator) * 2 - 1
        return (out.double() + sign * difference(layer, inputs[0], out)).to(out.dtype)

    for layer in layers(model):
        layer.register_forward_hook(move)
    moved = [evaluate(model, text, **WORDS)["perplexity"] for _ in range(DRAWS)]
    return min(abs(math.log(each / perplexity)) for each in moved)


def agree(recipe: str, home: Path, text: Path) -> None:
    """Raise AssertionError unless both backends say the same of a model, and each was what ran."""
    folder = home / recipe
    observed = (
        {"dataset": str(home / "calibration.jsonl"), "samples": 2, "seq_len": 16}
        if load_recipe(recipe).observes
        else {}
    )
    source = home / str(RECIPES[recipe]).removeprefix("torch.")
    quantize(source, folder, recipe=recipe, progress=False, **observed)
    results = {backend: evaluate(folder, text, backend=backend, **WORDS) for backend in ("torch", "triton")}
    for backend, result in results.items():
        rows = [(row["backend"], row["calls"]) for row in result["served"]]
        assert rows == [("cpu" if backend == "torch" else "triton", LINEARS)], f"{recipe}: {result['served']}"
    ours, theirs = results["triton"]["perplexity"], results["torch"]["perplexity"]
    assert compare_layers(load(folder, backend="triton"), torch.arange(16)[None]) == LINEARS
    if recipe in EXACT:
        assert ours == theirs, f"{recipe}: {ours} and {theirs}"
        return
    moved, limit = abs(math.log(ours / theirs)), movement(load(folder, backend="torch"), text, theirs)
    assert moved <= limit, f"{recipe}: the logarithm moved by {moved}, and {limit} at most is expected"
    assert limit < 0.05, f"{recipe}: {limit} says nothing"


def main() -> None:
    """Compare the recipes that are named, or all."""
    recipes = sys.argv[1:] or list(RECIPES)
    quiet_transformers()
    with tempfile.TemporaryDirectory() as name:
        home, text = Path(name), written(Path(name) / "text.jsonl", 1)
        written(home / "calibration.jsonl", 2)
        for dtype in (FP32, FP16):
            made(home / str(dtype).removeprefix("torch."), dtype)
        for recipe in recipes:
            agree(recipe, home, text)
    print(len(recipes), "models agree")  # noqa: T201 (what the test reads)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # NaN and infinity, inside the interpreter's numpy
        main()
