"""What is read back from disk and differs from what was meant: an error, and nothing left."""

import json

import models
import pytest
import torch

from quantkit import quantize
from quantkit.checkpoint import read_config
from quantkit.errors import CheckpointError


def damage_before_verifying(monkeypatch, damage):
    from quantkit import pipeline

    verify = pipeline.verify

    def damaged(folder, *words, **named):
        damage(folder)
        return verify(folder, *words, **named)

    monkeypatch.setattr(pipeline, "verify", damaged)


def flip(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change(folder, key, value):
    config = read_config(folder)
    config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))


DAMAGES = {
    "bit": (flip, "differs from what was written"),
    "tensor": (
        lambda folder: models.change_tensors(
            folder, lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}
        ),
        "'model.norm.weight' is not where it should be",
    ),
    "more": (lambda folder: models.change_tensors(folder, lambda t: t | {"x": torch.zeros(1)}), "'x' is not where"),
    "scheme": (lambda folder: change(folder, "ignore", ["lm_head", "model.layers.1.mlp.up_proj"]), "another scheme"),
    "left": (lambda folder: change(folder, "ignore", []), "lm_head a scheme"),
    "truncated": (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "truncated"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_read_back_and_differs_is_an_error(model_folder, tmp_path, monkeypatch, name):
    damage, says = DAMAGES[name]
    damage_before_verifying(monkeypatch, damage)
    with pytest.raises(CheckpointError, match=says):
        quantize(model_folder("llama"), tmp_path / "out", steps=["w8a8"], progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: t | {"weight_scale": -t["weight_scale"]}, "not a positive finite number"),
        (lambda t: t | {"weight_scale": t["weight_scale"] * float("inf")}, "not a positive finite number"),
        (lambda t: t | {"weight_scale": t["weight_scale"].double()}, "weight_scale'.* has not the shape and dtype"),
        (lambda t: t | {"weight": t["weight"].to(torch.int16)}, "weight'.* has not the shape and dtype"),
        (lambda t: t | {"weight": t["weight"][:, 1:]}, "weight'.* has not the shape and dtype"),
        (lambda t: {"weight": t["weight"]}, "weight_scale'.* has not the shape and dtype"),
    ],
)
def test_a_method_that_stores_what_its_format_does_not_demand_is_found(
    model_folder, tmp_path, monkeypatch, spoil, says
):
    from quantkit.formats import compressed_tensors

    compress = compressed_tensors.compress
    monkeypatch.setattr(compressed_tensors, "compress", lambda *words: spoil(compress(*words)))
    with pytest.raises(CheckpointError, match=says):
        quantize(model_folder("llama"), tmp_path / "out", steps=["w8a8"], progress=False)
    assert not list(tmp_path.iterdir())
