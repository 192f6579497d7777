"""What calibration reads: windows of the data's first tokens, chosen by the recipe's seed; and its progress."""

import json
import logging

import models
import pytest
import torch

from quantkit import quantize
from quantkit.checkpoint import Hub
from quantkit.errors import DataError
from quantkit.pipeline import CHOICE, Data, calibration_data, open_source
from quantkit.progress import Steps
from quantkit.recipe import Recipe


@pytest.fixture
def text(tmp_path):
    """8,000 digits, and so as many tokens: the numbers from 0000 to 1999."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number:04d}" for number in range(2000)), encoding="utf-8")
    return path


def windows_of(folder, spec, samples=4, seq_len=8, seed=0, model=None):
    source = open_source(folder if model is None else model, Hub(), None, dequantize=False)
    recipe = Recipe.of(["smoothquant", "w8a8"], seed=seed)
    return calibration_data(source, folder, recipe, Data(str(spec), samples, seq_len, None), Hub())


def as_text(windows):
    """Digits, of tokens that are bytes."""
    return ["".join(models.tokenizer().convert_ids_to_tokens(window)) for window in windows.tolist()]


def test_windows_do_not_overlap_and_come_from_the_start(model_folder, text):
    """The stream is cut every 8 tokens, and the choice is among 16 times as many windows as are asked for."""
    windows, _ = windows_of(model_folder("llama"), text)
    assert windows.shape == (4, 8)
    assert windows.dtype == torch.int64
    content = text.read_text()
    cut = [content[start : start + 8] for start in range(0, len(content), 8)]
    places = [cut.index(window) for window in as_text(windows)]
    assert places == sorted(set(places))
    assert max(places) < CHOICE * 4
    assert max(cut.index(window) for window in as_text(windows_of(model_folder("llama"), text, samples=40)[0])) > 64


def test_the_seed_chooses(model_folder, text):
    found = [windows_of(model_folder("llama"), text, seed=seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_recipe_remembers_what_was_read(model_folder, text):
    _, recipe = windows_of(model_folder("llama"), text)
    assert recipe.dataset["name"] == str(text)
    assert (recipe.dataset["windows"], recipe.dataset["seq_len"]) == (4, 8)
    assert recipe.dataset["fingerprint"]
    text.write_text(text.read_text()[::-1], encoding="utf-8")
    assert windows_of(model_folder("llama"), text)[1].dataset["fingerprint"] != recipe.dataset["fingerprint"]


def test_too_few_windows_are_told(model_folder, text, caplog):
    text.write_text("0123456789" * 3, encoding="utf-8")
    with caplog.at_level(logging.WARNING, "quantkit"):
        windows, recipe = windows_of(model_folder("llama"), text)
    assert windows.shape == (3, 8)
    assert recipe.dataset["windows"] == 3
    assert f"{text} holds 3 windows of 8 tokens, not 4" in caplog.text


def test_less_than_a_window_is_refused(model_folder, text):
    text.write_text("0123456", encoding="utf-8")
    with pytest.raises(DataError, match="has 7 tokens, less than one window of seq_len 8: give more text"):
        windows_of(model_folder("llama"), text)


def test_the_length_is_the_models_context_and_no_more(model_folder, text):
    assert windows_of(model_folder("llama"), text, seq_len=None)[0].shape == (4, 64)
    with pytest.raises(DataError, match=r"seq_len is 65 and .* reads at most 64 tokens"):
        windows_of(model_folder("llama"), text, seq_len=65)


def test_tokens_need_no_tokenizer_and_must_be_the_models(model_folder, tmp_path):
    path = tmp_path / "tokens.jsonl"
    path.write_text(json.dumps({"input_ids": list(range(100, 132))}) + "\n", encoding="utf-8")
    windows, _ = windows_of(model_folder("llama"), path)
    assert windows.tolist() == [list(range(start, start + 8)) for start in (100, 108, 116, 124)]
    path.write_text(json.dumps({"input_ids": [1, 2, 3, 4, 5, 6, 7, 260]}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"token id 260 .* a vocabulary of 260"):
        windows_of(model_folder("llama"), path)


def test_a_model_in_memory_has_its_tokenizer_or_none(text):
    model = models.llama_model()
    with pytest.raises(DataError, match="has no tokenizer"):
        windows_of(model, text, model=model)
    source = open_source(model, Hub(), models.tokenizer(), dequantize=False)
    data = Data(str(text), 4, 8, None)
    assert calibration_data(source, model, Recipe.of(["w8a8"]), data, Hub())[0].shape == (4, 8)


def test_what_was_read_is_stored_beside_the_model(model_folder, text, tmp_path):
    options = {"dataset": str(text), "samples": 2, "seq_len": 8, "seed": 3, "progress": False}
    report = quantize(model_folder("llama"), tmp_path / "out", steps=["smoothquant"], **options)
    stored = json.loads((tmp_path / "out" / "quantkit_recipe.json").read_text())
    assert stored == report.recipe
    assert (stored["seed"], stored["dataset"]["windows"]) == (3, 2)


class TestSteps:
    def test_what_is_done_is_counted(self, capsys):
        with Steps("quantizing", 3, "block") as steps:
            for _ in range(3):
                steps.advance()
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("quantizing: 3/3 block, ")
        assert captured.err.count("\n") == 1

    def test_more_than_all_is_all(self, capsys):
        with Steps("quantizing", 2, "block") as steps:
            for _ in range(5):
                steps.advance()
        assert capsys.readouterr().err.startswith("quantizing: 2/2 block, ")

    def test_an_error_comes_out_and_nothing_is_said_to_be_done(self, capsys):
        def work():
            with Steps("quantizing", 3, "block") as steps:
                steps.advance()
                raise ValueError("no luck")

        with pytest.raises(ValueError, match="no luck"):
            work()
        assert "3/3" not in capsys.readouterr().err

    def test_disabled_says_nothing(self, capsys):
        with Steps("quantizing", 3, "block", disable=True) as steps:
            steps.advance()
        assert capsys.readouterr().err == ""

    def test_nothing_to_do(self, capsys):
        with Steps("quantizing", 0, "block") as steps:
            steps.advance()
        assert capsys.readouterr().err.startswith("quantizing: 0/0 block")

    def test_a_pipeline_counts_every_stage(self, model_folder, text, tmp_path, capsys):
        """Two blocks and what lies outside, calibrated or not."""
        options = {"dataset": str(text), "samples": 2, "seq_len": 8}
        quantize(model_folder("llama"), tmp_path / "one", steps=["smoothquant", "w8a8"], **options)
        quantize(model_folder("llama"), tmp_path / "two", steps=["w8a8"])
        assert capsys.readouterr().err.count("quantizing: 3/3 block") == 2
