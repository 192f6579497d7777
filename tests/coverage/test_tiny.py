"""The tiny models are fit to test with: their logits are finite, follow from the tokens and outlive a round trip."""

import re
from pathlib import Path

import pytest
import torch
from architectures import BUILDABLE, ENTRIES, UNBUILDABLE
from tiny import Unbuildable, build, inputs, save
from transformers import AutoModelForCausalLM

UNLIKE = (
    "llama",
    "gemma2",
    "gpt2",
    "opt",
    "bloom",
    "falcon",
    "gpt_neox",
    "phi3",
    "olmo2",
    "mixtral",
    "dbrx",
    "deepseek_v3",
    "gpt_oss",
    "llama4_text",
    "mamba",
    "rwkv",
    "jamba",
    "bamba",
    "qwen3_next",
    "recurrent_gemma",
    "mllama",
)


def entries(names: list[str]) -> list[object]:
    """The entries as parameters, all but the unlike ones marked exhaustive."""
    return [pytest.param(name, marks=() if name in UNLIKE else pytest.mark.exhaustive) for name in names]


@pytest.mark.parametrize("model_type", entries(BUILDABLE))
def test_logits_are_finite_and_follow_from_the_tokens(model_type: str) -> None:
    model = build(model_type)
    with torch.no_grad():
        one, other = (model(**inputs(model, seed=seed)).logits for seed in (0, 1))
    assert one.shape[:2] == (2, 16)
    assert one.isfinite().all()
    assert (one - other).abs().amax(-1).min() > 1e-3 * one.std()


@pytest.mark.parametrize("model_type", entries(BUILDABLE))
def test_a_round_trip_keeps_every_tensor_and_the_logits(model_type: str, tmp_path: Path) -> None:
    model = build(model_type)
    again, found = AutoModelForCausalLM.from_pretrained(
        save(model_type, tmp_path), dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values())
    assert type(again) is type(model)
    kept = again.state_dict()
    assert kept.keys() == model.state_dict().keys()
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, kept[name])] == []
    with torch.no_grad():
        before, after = (one.eval()(**inputs(model)).logits for one in (model, again))
    # Memory read from a file is aligned otherwise, so that a sum may be taken in another order.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", entries(BUILDABLE))
def test_no_parameter_is_zero_one_or_without_a_spread(model_type: str) -> None:
    for name, parameter in build(model_type).named_parameters():
        assert not ((parameter == 0) | (parameter == 1)).any(), name
        assert parameter.numel() == 1 or parameter.std() > 0.01, name


@pytest.mark.parametrize("model_type", UNBUILDABLE)
def test_an_unbuildable_entry_is_one_and_says_why(model_type: str) -> None:
    assert model_type in ENTRIES
    with pytest.raises(Unbuildable, match=re.escape(UNBUILDABLE[model_type])):
        build(model_type)
