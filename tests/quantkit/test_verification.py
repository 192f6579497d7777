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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.log.jsonl", "out.partial"]


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
    monkeypatch.setattr(compressed_tensors, "compress", lambda *words, **named: spoil(compress(*words, **named)))
    with pytest.raises(CheckpointError, match=says):
        quantize(model_folder("llama"), tmp_path / "out", steps=["w8a8"], progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.log.jsonl", "out.partial"]


@pytest.mark.parametrize(
    ("recipe", "form", "leaf"),
    [
        ("llm-int8", "bitsandbytes", "SCB"),
        ("fp8-block", "compressed_tensors", "weight_scale"),
        ("fp8-e5m2", "native", "weight_scale"),
        ("w8a8-static", "compressed_tensors", "input_scale"),
    ],
)
def test_every_kind_of_scale_is_checked(model_folder, calibration, tmp_path, monkeypatch, recipe, form, leaf):
    """Of the last block's layers, that the layers after don't stumble over it first."""
    from quantkit import formats, pipeline

    layout, data = getattr(formats, form), calibration if "static" in recipe else {}
    compress, shapes = layout.compress, []

    def spoiled(*words, **named):
        stored = compress(*words, **named)
        shapes.append(words[1].shape)
        return stored | {leaf: -stored[leaf]} if len(shapes) == 14 else stored

    monkeypatch.setattr(layout, "compress", spoiled)
    with pytest.raises(CheckpointError, match=r"a scale of model\.layers\.1\.\S+ is not a positive finite number"):
        pipeline.quantize(model_folder("llama"), tmp_path / "out", recipe=recipe, progress=False, **data)
    assert len(shapes) == 14
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.log.jsonl", "out.partial"]
