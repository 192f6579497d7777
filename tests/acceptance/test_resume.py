"""A run that is stopped, however it is, goes on by the same command, to the very bytes of one that wasn't."""

import json

import models
import pytest
import torch

from quantkit import quantize
from quantkit.journal import STATE, Journal

RECIPES = {
    "w8a8": ["w8a8"],
    "smoothquant": ["smoothquant:alpha=auto", "w8a8"],
    "static": ["smoothquant", "w8a8:activation=tensor-static"],
    "sparse": ["sparse24:criterion=sparsegpt"],
    "sparse-w8a8": ["smoothquant", "sparse24:criterion=wanda", "w8a8"],
    "sparse-int8": ["sparse24:criterion=sparsegpt,pattern=unstructured:0.5", "smoothquant", "int8"],
    "packed": ["sparse24:criterion=sparsegpt", "smoothquant"],
    "packed-w8a8": ["sparse24:criterion=wanda", "w8a8"],
    "outlier-columns": ["llm-int8:outlier_weight=float,threshold=1.0"],
}


class Stopped(BaseException):
    """What a test stops a run by."""


def contents(folder):
    """Every file's bytes, but for the report's seconds and memory."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    report = json.loads(found.pop("quantkit_report.json"))
    for key in ("seconds", "peak_memory_bytes", "predicted_memory_bytes"):
        del report[key]
    return found | {"quantkit_report.json": report}


@pytest.fixture(params=["llama", "mixtral", "gpt2"])
def model(request, tmp_path):
    made = getattr(models, request.param)(tmp_path / "model")
    rows = torch.randint(0, 60, (6, 24), generator=torch.Generator().manual_seed(1)).tolist()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return made


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_is_stopped_after_every_block(model, tmp_path, monkeypatch, recipe):
    words = {"steps": RECIPES[recipe], "progress": False, "max_shard_size": "1KB"}
    calibrated = recipe != "w8a8"
    if calibrated:
        words |= {"dataset": str(tmp_path / "rows.jsonl"), "samples": 5, "seq_len": 24}
    if recipe.startswith("packed"):
        words["format"] = "quantkit"
    quantize(model, tmp_path / "whole", **words)
    commit, left = Journal.commit, [0]

    def stop_at_the_second(self, *arguments):
        if left[0] == 0:
            raise Stopped
        left[0] -= 1
        commit(self, *arguments)

    monkeypatch.setattr(Journal, "commit", stop_at_the_second)
    stops = 0
    while True:
        left[0] = 1 if calibrated else 1 + stops  # without calibration small stages share a file
        try:
            quantize(model, tmp_path / "out", **words)
            break
        except Stopped:
            stops += 1
            assert not (tmp_path / "out").exists()
    assert stops >= (2 if calibrated else 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out" / STATE).exists()
