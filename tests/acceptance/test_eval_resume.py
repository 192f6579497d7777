"""A long evaluation that is stopped goes on by the same command, to the very numbers of one that wasn't."""

import json

import pytest
import torch

from quantkit import evaluate, evaluation, interruption
from quantkit.errors import CheckpointError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, kept anew after every batch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(interruption, "INTERVAL", 0.0)
    return tmp_path / "cache" / "quantkit" / "evaluations"


@pytest.fixture
def texts(tmp_path):
    """A stream of text, and passages."""
    rows = torch.randint(0, 60, (12, 24), generator=torch.Generator().manual_seed(1)).tolist()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


class Stopped(BaseException):
    """What a test stops an evaluation by, as a kill would: nothing can be done on the way out."""


def stop_after(monkeypatch, batches, error=Stopped):
    """Each evaluation reads so many batches and no more."""
    logits, left = evaluation._logits, [batches]

    def read(model, *arguments):
        if not left[0]:
            raise error
        left[0] -= 1
        return logits(model, *arguments)

    monkeypatch.setattr(evaluation, "_logits", read)
    return logits


WORDS = {"seq_len": 24, "batch_size": 2, "progress": False}


def numbers(result):
    own = ("seconds", "peak_memory_bytes", "resumed_after_batches")
    return {key: value for key, value in result.items() if key not in own}


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt])
@pytest.mark.parametrize("with_baseline", [False, True])
def test_it_goes_on_after_every_batch(model_folder, texts, cache, monkeypatch, caplog, with_baseline, error):
    model = model_folder("llama")
    words = WORDS | ({"baseline": model_folder("llama")} if with_baseline else {})
    whole = evaluate(model, texts, **words)
    assert not list(cache.glob("*"))
    stops = 0
    while True:
        logits = stop_after(monkeypatch, 2, error)
        try:
            result = evaluate(model, texts, **words)
            break
        except error:
            stops += 1
            assert len(list(cache.iterdir())) == 1
        finally:
            monkeypatch.setattr(evaluation, "_logits", logits)
    assert stops >= 2
    assert numbers(result) == numbers(whole)
    assert result["resumed_after_batches"] == stops * (1 if with_baseline else 2)
    assert "resumed_after_batches" not in whole
    assert "going on after batch 2, where this evaluation was stopped" in caplog.text or with_baseline
    assert not list(cache.iterdir())


def test_passages_too(model_folder, tmp_path, monkeypatch):
    model = model_folder("llama")
    folder = tmp_path / "lambada"
    folder.mkdir()
    rows = [{"text": f"the cat number {n} sat on the mat of the {n}"} for n in range(9)]
    (folder / "lambada_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"batch_size": 2, "progress": False, "data_dir": tmp_path, "baseline": model}
    whole = evaluate(model, "lambada", **words)
    logits = stop_after(monkeypatch, 4)
    with pytest.raises(Stopped):
        evaluate(model, "lambada", **words)
    monkeypatch.setattr(evaluation, "_logits", logits)
    assert numbers(evaluate(model, "lambada", **words)) == numbers(whole)


def test_another_evaluation_does_not_take_it_up(model_folder, texts, cache, monkeypatch, caplog):
    logits = stop_after(monkeypatch, 2)
    with pytest.raises(Stopped):
        evaluate(model_folder("llama"), texts, **WORDS)
    monkeypatch.setattr(evaluation, "_logits", logits)
    for changed in ({"max_tokens": 200}, {"batch_size": 1}, {"seq_len": 12}, {"baseline": model_folder("llama")}):
        evaluate(model_folder("llama"), texts, **WORDS | changed)
    evaluate(model_folder("gpt2"), texts, **WORDS)
    assert "going on" not in caplog.text
    assert len(list(cache.iterdir())) == 1


def test_restart_begins_anew(model_folder, texts, cache, monkeypatch, caplog):
    logits = stop_after(monkeypatch, 2)
    with pytest.raises(Stopped):
        evaluate(model_folder("llama"), texts, **WORDS)
    monkeypatch.setattr(evaluation, "_logits", logits)
    evaluate(model_folder("llama"), texts, restart=True, **WORDS)
    assert "going on" not in caplog.text
    assert not list(cache.iterdir())


def test_what_is_kept_and_damaged_is_refused(model_folder, texts, cache, monkeypatch):
    logits = stop_after(monkeypatch, 2)
    with pytest.raises(Stopped):
        evaluate(model_folder("llama"), texts, **WORDS)
    monkeypatch.setattr(evaluation, "_logits", logits)
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"is damaged .* give --restart to begin anew"):
        evaluate(model_folder("llama"), texts, **WORDS)


def test_where_nothing_can_be_kept_that_is_said_once_and_the_evaluation_goes_on(
    model_folder, texts, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = evaluate(model_folder("llama"), texts, **WORDS)
    assert result["tokens"] == 12 * 23
    assert caplog.text.count("what is evaluated is not kept, and begins anew if it is stopped") == 1
    assert "set XDG_CACHE_HOME to a folder of yours" in caplog.text


def test_a_model_in_memory_keeps_nothing(model_folder, texts, cache, monkeypatch):
    import quantkit

    model = quantkit.load(model_folder("llama"))
    stop_after(monkeypatch, 2, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, texts, **WORDS)
    assert not cache.exists()
