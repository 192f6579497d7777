import copy
import os
import subprocess
import sys

import models
import pytest
import torch
from transformers import AutoModelForCausalLM

import quantkit.hf
from quantkit import load
from quantkit.checkpoint import read_config
from quantkit.hf import QuantkitConfig
from quantkit.modules import QuantizedLinear

IDS = torch.arange(10)[None]
NATIVE = ["fp8-e5m2", "fp8-e5m2-weight-only"]
EVERY = ["w8a8", "int8", "int4", "int4-channel", "fp8", "w8a8-static", "fp8-static", "fp8-block", "llm-int8"]


@pytest.mark.parametrize("recipe", NATIVE)
def test_transformers_loads_our_own_format(compressed, recipe):
    assert quantkit.hf
    model = AutoModelForCausalLM.from_pretrained(compressed(recipe))
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
    assert torch.equal(model(IDS).logits, load(compressed(recipe))(IDS).logits)


@pytest.mark.parametrize("recipe", EVERY)
def test_our_own_format_can_hold_every_scheme(compressed, recipe):
    """LLM.int8 as well: the scale that bitsandbytes' statistic stands for comes back bit for bit."""
    model = AutoModelForCausalLM.from_pretrained(compressed(recipe, form="quantkit"))
    assert torch.equal(model(IDS).logits, load(compressed(recipe))(IDS).logits)


def test_transformers_saves_what_it_loaded(compressed, tmp_path):
    folder = compressed("fp8-e5m2")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    before, after = models.read_tensors(folder), models.read_tensors(tmp_path / "again")
    assert set(before) == set(after)
    assert all(models.same(before[key], after[key]) for key in before)
    assert read_config(folder)["quantization_config"] == read_config(tmp_path / "again")["quantization_config"]


def test_without_the_import_a_load_fails_and_runs_no_codes_as_weights(compressed):
    """In a process of its own: transformers warns of the unknown method, then meets a weight of another shape."""
    code = (
        "import sys, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print('LOADED', model)\n"
    )
    command = [sys.executable, "-P", "-c", code, str(compressed("fp8-e5m2"))]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, check=False)
    assert result.returncode != 0
    assert "LOADED" not in result.stdout
    assert "RuntimeError" in result.stderr
    assert "MISMATCH" in result.stderr


def test_the_config_object_is_what_is_on_disk(compressed):
    stored = read_config(compressed("fp8-e5m2"))["quantization_config"]
    made = QuantkitConfig.from_dict(copy.deepcopy(stored))
    assert made.to_dict() == stored
    assert made.to_diff_dict() == stored
    made.to_dict()["groups"].clear()
    assert made.to_dict() == stored
    wrapped = QuantkitConfig.from_dict(QuantkitConfig.wrapped(stored, "torch"))
    assert (wrapped.to_dict(), wrapped.backend) == (stored, "torch")


@pytest.mark.parametrize("recipe", ["w8a8", "int8", "int4", "fp8-static", "fp8-block", "llm-int8", *NATIVE])
def test_a_loaded_model_can_be_copied_and_pickled(compressed, tmp_path, recipe):
    model = load(compressed(recipe))
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(other(IDS).logits, model(IDS).logits)
