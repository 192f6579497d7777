import models
import pytest

from quantkit.errors import CheckpointError, DataError
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
