"""bitsandbytes as the judge: transformers loads what we store with it, and its layers multiply as ours do."""

import copy
import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from quantkit.formats import bitsandbytes
from quantkit.modules import QuantizedLinear, quantize_linear
from quantkit.scheme import Scheme

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
