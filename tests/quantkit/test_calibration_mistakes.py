"""Bad calibration data: one sentence that names value, expectation and remedy, and nothing left on disk."""

import models
import pytest

from quantkit.recipe import load_recipe, recipe_names
from quantkit.shards import ShardReader

OBSERVING = [name for name in recipe_names() if load_recipe(name).observes]


@pytest.fixture
def refused(mistake, model_folder, tmp_path, monkeypatch):
    """Runs `quantkit quantize` with a recipe that observes; it must fail before any weight is read."""

    def get(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(ShardReader, "get", get)

    def run(*words, says, recipe="w8a8-static", model=None):
        model = model or model_folder("llama")
        sentence = mistake("quantize", model, "-o", tmp_path / "out", "--recipe", recipe, *words, says=says)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
        return sentence

    return run


@pytest.fixture
def text(tmp_path):
    """A text of 400 tokens."""
    path = tmp_path / "text.txt"
    path.write_text("a b c d " * 50)
    return path


def test_the_recipes_that_observe():
    assert OBSERVING == ["fp8-static", "smoothquant-auto-w8a8", "smoothquant-w8a8", "w8a8-static"]


@pytest.mark.parametrize("recipe", OBSERVING)
def test_data_that_is_needed_and_not_given(refused, recipe):
    step = str(load_recipe(recipe).steps[0])
    refused(recipe=recipe, says=(step, "observes activations and needs data", "--dataset SPEC"))


def test_a_data_set_that_does_not_exist(refused, tmp_path):
    refused("--dataset", tmp_path / "no.txt", says=("no.txt",))


@pytest.mark.parametrize("length", [None, 48])
def test_less_text_than_one_window(refused, tmp_path, length):
    (tmp_path / "short.txt").write_text("too short")
    words = () if length is None else ("--seq-len", length)
    says = ("short.txt has 9 tokens", f"seq_len {length or 64}", "smaller --seq-len")
    refused("--dataset", tmp_path / "short.txt", *words, says=says)


def test_a_window_longer_than_the_context(refused, text):
    refused("--dataset", text, "--seq-len", 65, says=("65", "64"))


def test_a_text_and_no_tokenizer(refused, model_folder, tmp_path, text):
    folder = models.copy(model_folder("llama"), tmp_path / "model")
    for path in folder.glob("token*"):
        path.unlink()
    refused("--dataset", text, model=folder, says=("tokenizer",))


def test_fewer_windows_than_asked_for_are_told(cli, model_folder, tmp_path, text, caplog):
    words = ("--recipe", "w8a8-static", "--dataset", text, "--seq-len", 64, "--samples", 100)
    result = cli("quantize", model_folder("llama"), "-o", tmp_path / "out", *words)
    assert result.exit_code == 0, result.stderr
    assert "text.txt holds 6 windows of 64 tokens, not 100" in caplog.text
