"""bitsandbytes as the judge: transformers loads what we store with it, and its layers multiply as ours do.

By hand first, then the whole way: what `quantize` writes goes through transformers and bitsandbytes, and what they
write through `quantkit.load`. Weights are the same bit for bit, each layer's output on the same inputs lies within a
bound that follows from the formats, and the Kullback-Leibler divergence from the float model is the same within 25 %
(logits can't be equal: bitsandbytes casts activations to float16, and codes that fall the other way make as large a
difference as the quantization itself).
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from judging import divergence
from safetensors.torch import save_file
from torch import nn

import quantkit
from quantkit.checkpoint import load_tokenizer
from quantkit.demo import model_path
from quantkit.formats import bitsandbytes
from quantkit.inspection import inspect_checkpoint
from quantkit.modules import QuantizedLinear, quantize_linear
from quantkit.scheme import Scheme
from quantkit.texts import read, tokenize

bnb = pytest.importorskip("bitsandbytes", reason="install bitsandbytes")

SCHEME = Scheme("int8", None, "int8", threshold=6.0)
LEFT = {
    "head": ["lm_head"],
    "none": [],
    "layers beside others of like names": ["lm_head", "model.layers.1.mlp.gate", "model.layers.1.mlp.up_proj"],
}


def stored(model: nn.Module, left: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """What our format stores for every linear layer but those left, by layer."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in left:
            found[name] = bitsandbytes.compress(SCHEME, *quantize_linear(module.weight.detach(), SCHEME))
    return found


def written(folder: Path, model: Any, left: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """A checkpoint in our hand: transformers' own config and float tensors, our quantized ones."""
    layers = stored(model, left)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    tensors |= {f"{name}.{leaf}": tensor for name, leaves in layers.items() for leaf, tensor in leaves.items()}
    config = json.loads(model.config.to_json_string())
    config["quantization_config"] = bitsandbytes.config(SCHEME, list(layers), left)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return layers


@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
def test_transformers_loads_what_we_store_and_leaves_what_we_leave(tmp_path: Path, left: list[str]) -> None:
    from transformers import AutoModelForCausalLM

    model = models.llama_model(torch.float16)
    layers = written(tmp_path, model, left)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map="cpu", dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    theirs = {name: module for name, module in loaded.named_modules() if isinstance(module, bnb.nn.Linear8bitLt)}
    assert set(theirs) == set(layers)
    for name, module in theirs.items():
        assert torch.equal(module.weight.data, layers[name]["weight"])
        assert torch.equal(module.weight.SCB, layers[name]["SCB"])
        assert module.state.threshold == SCHEME.threshold
    assert torch.isfinite(loaded(torch.arange(16).unsqueeze(0)).logits).all()


@pytest.mark.parametrize("outliers", [False, True])
def test_its_layer_gives_our_output(outliers: bool) -> None:
    """On float16 inputs, within: one step of a code where both round near a half (x * 127 / absmax within 127 * 2**-22
    of one), and float16's rounding of decoded outlier columns, of their product and of the sum, 2**-11 each.

    An outlier's feature holds nothing but outliers: bitsandbytes lets its other values widen a token's range, where the
    paper leaves out the whole feature.
    """
    features, out_features, tokens = 192, 64, 9
    generator = torch.Generator().manual_seed(7)
    linear = nn.Linear(features, out_features, bias=False, dtype=torch.float16)
    linear.weight.data = torch.randn(out_features, features, generator=generator).half()
    x = torch.randn(tokens, features, generator=generator).clamp(-5, 5).half()
    if outliers:
        x[:, [3, 100]] = 0
        x[2, 3], x[5, 100], x[6, 100] = 8.5, -30.0, 6.0
    kept = stored(nn.Sequential(linear), [])["0"]
    theirs = bnb.nn.Linear8bitLt(features, out_features, bias=False, has_fp16_weights=False, threshold=6.0).eval()
    weight = bnb.nn.Int8Params(kept["weight"].clone(), requires_grad=False, SCB=kept["SCB"].clone())
    theirs.weight = weight.to("cpu")  # as transformers does: it makes the codes known to the layer
    ours = QuantizedLinear(features, out_features, SCHEME, bitsandbytes, bias=False, dtype=torch.float16)
    ours.load_state_dict(copy.deepcopy(kept))
    wide = x.double() * (x.abs() >= 6).any(0)
    rest = x.double() - wide
    steps = rest.abs().amax(1, keepdim=True) / 127
    near_half = ((rest / steps) % 1 - 0.5).abs() <= 127 * 2**-22
    magnitudes = (kept["weight"].double() * kept["SCB"].double().unsqueeze(1) / 127).abs()
    bound = (steps * near_half) @ magnitudes.t() + 3 * 2**-11 * ((rest + wide).abs() @ magnitudes.t())
    with torch.no_grad():
        difference = (theirs(x).double() - ours(x).double()).abs()
    assert bool((difference <= bound).all())
    assert float(difference.max()) < 0.03 * float(ours(x).abs().max())


# The whole way

STEP = "llm-int8"
CASES = [(name, STEP) for name in ("demo", "llama", "llama_bf16", "llama_fp16", "llama_odd", "opt", "gpt2")]
CASES += [("llama", f"{STEP}:threshold=1.0"), ("opt", f"{STEP}:threshold=1.0"), ("gpt2", f"{STEP}:threshold=0.1")]
"""With few outliers or none, as in its paper, and with so low a threshold that most features have one."""


@pytest.fixture(scope="module")
def source(model_folder: Callable[[str], Path]) -> Callable[[str], Path]:
    """The folder of a float model."""
    return lambda name: model_path() if name == "demo" else model_folder(name)


def tokens_of(name: str) -> torch.Tensor:
    """Windows of text for the demo model, of anything for random models."""
    if name != "demo":
        return torch.randint(0, 256, (8, 60), generator=torch.Generator().manual_seed(0))
    return tokenize(read("demo"), load_tokenizer(model_path())).ids[-16 * 128 :].reshape(16, 128)


def through_bitsandbytes(folder: Path, **words: Any) -> nn.Module:
    """The model of a folder as transformers and bitsandbytes load it."""
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", dtype="auto", output_loading_info=True, **words
    )
    assert not any(info.values())
    return loaded.eval()


def layers_of(model: nn.Module, kind: type) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Codes and statistics, and all that is in float."""
    one, other = layers_of(ours, QuantizedLinear), layers_of(theirs, bnb.nn.Linear8bitLt)
    assert one.keys() == other.keys() != set()
    for name, layer in one.items():
        assert models.same(layer.get_buffer("weight"), other[name].weight.data)
        assert models.same(layer.get_buffer("SCB"), other[name].weight.SCB)
        assert layer.scheme.threshold == other[name].state.threshold
    floats = {name: value for name, value in theirs.named_parameters() if name.removesuffix(".weight") not in other}
    assert all(models.same(value, ours.get_parameter(name)) for name, value in floats.items())


def bound(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """How far the outputs for x [M, K], which float16 holds, may be apart: [M, N] in float64.

    Features that reach the threshold in some token are multiplied in float by both. Of the rest both round to half a
    step. The step here is the largest magnitude of the token's rest / 127, and there that of all its values below the
    threshold, also those that stand beside an outlier: where these are the same numbers, both codes are the same too
    unless x / step, with a few roundings of float32 in it, is within 127 * 2**-22 of a half. Then rounding: there the
    integer product, decoded outlier weights, their product and the sum go through float16, 2**-11 each (and 2**-25 of
    nothing); here the output is rounded to x's dtype, parts of it perhaps as well.
    """
    codes, scale = layer.codes_and_scale()
    weight, threshold = codes.double() * scale.double(), float(layer.scheme.threshold or 0.0)
    eps, x = torch.finfo(x.dtype).eps, x.double()
    outlying = (x.abs() >= threshold).any(0)
    rest, wide = x * ~outlying, x * outlying
    ours = rest.abs().amax(1, keepdim=True) / 127
    theirs = (x * (x.abs() < threshold)).abs().amax(1, keepdim=True) / 127
    near_half = ((rest / ours) % 1 - 0.5).abs() <= 127 * 2**-22
    apart = torch.where(ours == theirs, ours * near_half, (ours + theirs) / 2) * ~outlying
    moved = apart @ weight.abs().t()
    bias = layer.bias.double().abs() if layer.bias is not None else torch.zeros(1, dtype=torch.float64)
    size = (rest @ weight.t()).abs() + (ours / 2 * ~outlying) @ weight.abs().t() + wide.abs() @ weight.abs().t() + bias
    return moved + (4 * 2**-11 + 2 * eps) * size + 2**-24


def assert_same_products(ours: nn.Module, theirs: nn.Module, tokens: torch.Tensor) -> None:
    """Each layer's output on what reaches it here, as float16 holds it, within the bound."""
    seen: dict[str, torch.Tensor] = {}
    layers = layers_of(ours, QuantizedLinear)
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach()))
        for name, layer in layers.items()
    ]
    with torch.inference_mode():
        ours(tokens)
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            x = seen[name].reshape(-1, layer.in_features)
            x = x.half().to(x.dtype)
            difference = (layer(x).double() - theirs.get_submodule(name)(x).double()).abs()
            assert bool((difference <= bound(layer, x)).all()), name


def assert_same_loss(base: nn.Module, ours: nn.Module, theirs: nn.Module, tokens: torch.Tensor) -> None:
    one, other = divergence(base, ours, tokens), divergence(base, theirs, tokens)
    assert one > 0
    assert abs(other - one) <= 0.25 * one, f"KL {one:.3e} ours, {other:.3e} theirs"


@pytest.mark.parametrize(("name", "step"), CASES)
def test_what_quantize_wrote_is_loaded_and_loses_the_same(
    source: Callable[[str], Path], tmp_path: Path, name: str, step: str
) -> None:
    report = quantkit.quantize(source(name), tmp_path / "out", steps=[step], progress=False)
    assert report.format == "bitsandbytes"
    ours, theirs = quantkit.load(tmp_path / "out"), through_bitsandbytes(tmp_path / "out")
    tokens = tokens_of(name)
    assert_same_weights(ours, theirs)
    assert_same_products(ours, theirs, tokens[:2])
    assert_same_loss(quantkit.load(source(name)), ours, theirs, tokens)


def test_what_is_ignored_is_left_in_float_there_too(source: Callable[[str], Path], tmp_path: Path) -> None:
    quantkit.quantize(source("llama"), tmp_path / "out", steps=[STEP], ignore=["*.1.mlp.up_proj"], progress=False)
    ours, theirs = quantkit.load(tmp_path / "out"), through_bitsandbytes(tmp_path / "out")
    assert_same_weights(ours, theirs)
    assert type(theirs.get_submodule("model.layers.1.mlp.up_proj")) is nn.Linear
    assert len(layers_of(ours, QuantizedLinear)) == 13


@pytest.mark.parametrize("name", ["demo", "llama", "llama_tied", "opt", "gpt2", "gpt2_untied"])
def test_what_transformers_and_bitsandbytes_wrote_is_loaded_and_loses_the_same(
    source: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    from transformers import BitsAndBytesConfig

    theirs = through_bitsandbytes(source(name), quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, tokens = quantkit.load(tmp_path / "theirs"), tokens_of(name)
    assert_same_weights(ours, theirs)
    assert_same_products(ours, theirs, tokens[:2])
    assert_same_loss(quantkit.load(source(name)), ours, theirs, tokens)
    assert not inspect_checkpoint(tmp_path / "theirs").problems
    ours.save_pretrained(tmp_path / "again")
    assert_same_weights(quantkit.load(tmp_path / "again"), through_bitsandbytes(tmp_path / "again"))
