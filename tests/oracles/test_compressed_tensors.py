"""compressed-tensors as the judge: its own loader reads what we wrote, and gets the same weights and the same loss.

For every recipe that is stored as compressed-tensors, on the bundled model and on the checkpoints of QUANTKIT_DATA:

- the weights that it decodes are ours, bit for bit;
- each linear layer, fed the same activations, gives the same output within a bound that follows from the formats;
- the Kullback-Leibler divergence of the whole model from the float model is ours within 25 %. (Logits of two right
  implementations can't be equal: a rounding that falls the other way moves a code by one step, and what that does
  downstream is as large as the quantization itself.)
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from quantkit_kernels.formats import dequantize
from torch import nn

import quantkit
from quantkit.checkpoint import load_tokenizer
from quantkit.demo import model_path
from quantkit.modules import QuantizedLinear
from quantkit.recipe import load_recipe, recipe_names
from quantkit.texts import read, tokenize

pytest.importorskip("compressed_tensors", reason="install the extra `oracles`")

MODELS = ("demo", "stories3M", "TinyStories-656K", "tensorforge-charopt")
TEXTS = {"tensorforge-charopt": "tinyshakespeare/input.txt"}
WINDOWS, SEQ_LEN = 16, 128
INDIVISIBLE = {("stories3M", "int8-g128")}  # its hidden size is 192


@dataclass
class Case:
    """A checkpoint of ours beside the float model, and tokens to run both on."""

    folder: Path
    recipe: str
    float_model: nn.Module
    ours: nn.Module
    tokens: torch.Tensor

    @property
    def layers(self) -> dict[str, QuantizedLinear]:
        found = {name: module for name, module in self.ours.named_modules() if isinstance(module, QuantizedLinear)}
        assert found
        return found


def _recipes() -> Iterator[tuple[str, str]]:
    for model in MODELS:
        for name in recipe_names():
            scheme = load_recipe(name).scheme
            if scheme is not None and scheme.weight_dtype != "float8_e5m2" and (model, name) not in INDIVISIBLE:
                yield model, name


@cache
def _float_model(folder: Path) -> nn.Module:
    return quantkit.load(folder)


@cache
def _tokens(folder: Path, texts: str) -> torch.Tensor:
    ids = tokenize(read(texts), load_tokenizer(folder)).ids
    return ids[-WINDOWS * SEQ_LEN :].reshape(WINDOWS, SEQ_LEN)


@pytest.fixture(scope="module", params=list(_recipes()), ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model, recipe = request.param
    folder, texts = model_path(), "demo"
    if model != "demo":
        root = os.environ.get("QUANTKIT_DATA")
        if not root:
            pytest.skip("QUANTKIT_DATA is not set: it names the folder with real checkpoints and texts")
        folder = Path(root) / "models" / model
        texts = str(Path(root) / "text" / TEXTS.get(model, "tinystories/tinystories_val.txt"))
    out = tmp_path_factory.mktemp(f"{model}-{recipe}") / "out"
    quantkit.quantize(folder, out, recipe=recipe, progress=False)
    return Case(out, recipe, _float_model(folder), quantkit.load(out), _tokens(folder, texts))


def _reference(folder: Path, *, decoded: bool) -> nn.Module:
    """The checkpoint through plain transformers: decoded once, or with activations quantized as it says."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    words: dict[str, Any] = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if decoded else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **words).eval()
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            _give_three_axes(module)
    return model


def _give_three_axes(layer: nn.Module) -> None:
    """Make the layer see tokens [M, K] as [1, M, K]: of two axes compressed-tensors takes both for the tokens', so that
    a layer whose model flattens its tokens (OPT's fc1) would get one scale for all of them, whatever the config says.
    """
    flat = []

    def before(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        flat.append(args[0].ndim == 2)
        return (args[0][None],) if flat[-1] else args

    def after(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        return out[0] if flat.pop() else out

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


def test_decodes_the_same_weights(case: Case) -> None:
    theirs = _reference(case.folder, decoded=True)
    for name, layer in case.layers.items():
        weight = theirs.get_submodule(name).weight
        decoded = dequantize(*layer.codes_and_scale())
        assert decoded.dtype == weight.dtype
        assert torch.equal(decoded, weight), name


def _inputs(model: nn.Module, names: set[str], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What reaches each layer of the float model."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].detach())
        )
        for name in names
    ]
    with torch.inference_mode():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def bound(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """How far two right implementations of the layer may be apart, for x [M, K]: [M, N] in float64.

    Both round an activation to within half a step. Int8: the step is absmax/127 here and absmax/127.5 there, so each
    errs by at most absmax/254. E4M3: half a unit in the last place is 2**-4 of a normal number (the scale rounds too:
    twice that is enough), and 2**-10 steps near zero. So the outputs differ by at most the sum over K of |w| times both
    errors. Then each rounds its result, and where it computes in a narrower dtype its operands and partial sums, by at
    most a few eps of the sum of |w||x|; float32 sums add K eps.
    """
    codes, scale = layer.codes_and_scale()
    weight, x = dequantize(codes, scale).double().abs(), x.double().abs()
    absmax = x.amax(-1, keepdim=True)
    if layer.scheme.activation_dtype is None:
        step = torch.zeros_like(x)
    elif layer.scheme.activation_dtype == "int8":
        step = (absmax / 127).expand_as(x)
    else:
        step = 4 * torch.maximum(x * 2.0**-4, absmax / 448 * 2.0**-10)
    bias = layer.bias.double().abs() if layer.bias is not None else torch.zeros(1, dtype=torch.float64)
    eps = torch.finfo(scale.dtype).eps
    rounding = 4 * eps + 2 * x.shape[-1] * torch.finfo(torch.float32).eps
    return step @ weight.T + rounding * (x @ weight.T + bias)


def test_each_layer_gives_the_same_output(case: Case) -> None:
    theirs = _reference(case.folder, decoded=False)
    inputs = _inputs(case.float_model, set(case.layers), case.tokens[:2])
    with torch.inference_mode():
        theirs(case.tokens[:1, :2])  # it decodes its weights at the first forward pass
        for name, layer in case.layers.items():
            x = inputs[name].reshape(-1, layer.in_features)
            difference = (layer(x).double() - theirs.get_submodule(name)(x).double()).abs()
            assert bool((difference <= bound(layer, x)).all()), name


def _kl(base: nn.Module, model: nn.Module, tokens: torch.Tensor) -> float:
    total = 0.0
    with torch.inference_mode():
        for batch in tokens.split(8):
            p = torch.log_softmax(base(batch).logits.double(), -1)
            q = torch.log_softmax(model(batch).logits.double(), -1)
            total += float((p.exp() * (p - q)).sum(-1).sum())
    return total / tokens.numel()


def test_loses_the_same(case: Case) -> None:
    ours = _kl(case.float_model, case.ours, case.tokens)
    theirs = _kl(case.float_model, _reference(case.folder, decoded=False), case.tokens)
    assert ours > 0
    assert abs(theirs - ours) <= 0.25 * ours, f"{case.recipe}: KL {ours:.3e} ours, {theirs:.3e} theirs"
