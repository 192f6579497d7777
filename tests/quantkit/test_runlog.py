"""The log of a run: a JSON line for everything that happens, beside the output."""

import json
from datetime import datetime

import pytest

from quantkit import pipeline, quantize
from quantkit.errors import CheckpointError
from quantkit.runlog import RunLog, log_path

BOTH = ["smoothquant", "w8a8"]


def lines(output):
    return [json.loads(line) for line in log_path(output).read_text().splitlines()]


def test_every_block_and_step_has_a_line(model_folder, calibration, tmp_path):
    report = quantize(model_folder("llama"), tmp_path / "out", steps=BOTH, progress=False, **calibration)
    found = lines(tmp_path / "out")
    assert [line["event"] for line in found if line["event"] != "step"] == [
        "start",
        "stage",
        "stage",
        "stage",
        "finish",
    ]
    assert found[0]["recipe"]["steps"] == report.recipe["steps"]
    assert found[0]["memory"]["host_bytes"] == report.predicted_memory_bytes
    steps = [(line["stage"], line["step"]) for line in found if line["event"] == "step"]
    blocks = [f"model.layers.{n}" for n in range(2)]
    assert steps == [(block, step) for block in blocks for step in ("smoothquant", "compress")] + [
        ("all", "write"),
        ("all", "verify"),
    ]
    stages = {line["stage"]: line for line in found if line["event"] == "stage"}
    assert [stages[block]["layers"] for block in blocks] == [7, 7]
    for line in found:
        assert datetime.fromisoformat(line["time"]).tzinfo is not None
        assert line["peak_memory_bytes"] > 10**7
    assert [line["elapsed"] for line in found] == sorted(line["elapsed"] for line in found)
    parts = [line["seconds"] for line in found if line["event"] == "stage"]
    assert 0 < sum(parts) <= found[-1]["seconds"]
    assert found[-1]["layers"] == 14
    assert found[-1]["bytes"] == report.bytes_after


def test_an_error_is_its_last_line_and_the_next_run_goes_on_below(model_folder, calibration, tmp_path, monkeypatch):
    verify = pipeline.verify

    def fail(*_, **__):
        raise CheckpointError("nothing is right")

    monkeypatch.setattr(pipeline, "verify", fail)
    words = {"steps": BOTH, "progress": False, **calibration}
    with pytest.raises(CheckpointError):
        quantize(model_folder("llama"), tmp_path / "out", **words)
    found = lines(tmp_path / "out")
    assert found[-1]["event"] == "error"
    assert (found[-1]["kind"], found[-1]["message"]) == ("CheckpointError", "nothing is right")
    monkeypatch.setattr(pipeline, "verify", verify)
    quantize(model_folder("llama"), tmp_path / "out", **words)
    after = lines(tmp_path / "out")
    assert after[: len(found)] == found
    assert after[len(found)]["event"] == "resume"
    assert after[len(found)]["records"] == 3
    assert after[-1]["event"] == "finish"


def test_what_leaves_nothing_leaves_no_log(model_folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise CheckpointError("at once")

    monkeypatch.setattr(pipeline, "compress_stage", fail)
    with pytest.raises(CheckpointError):
        quantize(model_folder("llama"), tmp_path / "out", steps=["w8a8"], progress=False)
    assert not list(tmp_path.iterdir())


def test_warnings_are_in_it_whatever_the_terminal_shows(tmp_path):
    import logging

    with RunLog(tmp_path / "log.jsonl", anew=True):
        logging.getLogger("quantkit").warning("mind the %s", "gap")
        logging.getLogger("other").warning("not ours")
    (line,) = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (line["event"], line["message"]) == ("warning", "mind the gap")


def test_a_line_that_was_cut_off_is_ended_first(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "sta')
    with RunLog(path, anew=False) as log:
        log.write("resume")
    first, second = path.read_text().splitlines()
    assert first == '{"event": "sta'
    assert json.loads(second)["event"] == "resume"
    with RunLog(path, anew=True) as log:
        log.write("start")
    assert len(path.read_text().splitlines()) == 1


def test_a_log_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"log\.jsonl"):
        RunLog(tmp_path / "nowhere" / "log.jsonl", anew=True)
