import json
import math

import models
import pytest

from quantkit.checkpoint import load_tokenizer
from quantkit.errors import CheckpointError, DataError, QuantkitError
from quantkit.generation import complete


def test_the_likeliest_tokens_follow_the_prompt(compressed):
    text = complete(compressed("w8a8"), "ab", max_new_tokens=5, device="cpu")
    assert text.startswith("ab")
    assert text == complete(compressed("w8a8"), "ab", max_new_tokens=5, device="cpu")


def test_sampling_follows_its_seed(model_folder):
    words = {"max_new_tokens": 12, "temperature": 5.0, "device": "cpu"}
    texts = [complete(model_folder("llama"), "ab", seed=seed, **words) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_model_without_tokenizer_or_a_prompt_without_tokens_is_refused(model_folder, tmp_path):
    with pytest.raises(DataError, match="the prompt '' has no token"):
        complete(model_folder("llama"), "", device="cpu")
    folder = models.copy(model_folder("llama"), tmp_path / "model")
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        complete(folder, "ab", device="cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0: expected at least 1"),
        ({"temperature": math.nan}, "temperature is nan: expected 0,"),
        ({"temperature": math.inf}, "temperature is inf: expected 0,"),
        ({"temperature": 1e-9}, r"temperature is 1e-09: expected 0, .* of at least 0\.001"),
        ({"temperature": -1.0}, r"temperature is -1\.0: expected 0,"),
        ({"seed": -1}, r"seed is -1: expected 0 to 2\*\*63 - 1"),
        ({"seed": 2**63}, r"seed is 9223372036854775808: expected 0 to 2\*\*63 - 1"),
    ],
)
def test_what_is_out_of_range_is_refused_before_the_model_is_read(words, message):
    with pytest.raises(QuantkitError, match=message):
        complete("nowhere", "ab", device="cpu", **words)


def test_the_bounds_themselves_are_taken(model_folder):
    for words in ({"temperature": 1e-3}, {"seed": 2**63 - 1, "temperature": 1.0}):
        assert complete(model_folder("llama"), "ab", max_new_tokens=2, device="cpu", **words).startswith("ab")


def test_prompt_and_new_tokens_fit_the_context(model_folder):
    folder = model_folder("llama")
    prompt = len(load_tokenizer(folder)("ab")["input_ids"])
    context = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    assert complete(folder, "ab", max_new_tokens=context - prompt, device="cpu")
    message = f"the prompt has {prompt} tokens and max_new_tokens is {context}, {context + prompt} together, and .*"
    with pytest.raises(DataError, match=f"{message} at most {context}: choose {context - prompt} new tokens or less"):
        complete(folder, "ab", max_new_tokens=context, device="cpu")
    with pytest.raises(DataError, match=f"at most {context}: give a prompt of fewer than {context} tokens"):
        complete(folder, "ab " * context, max_new_tokens=1, device="cpu")
