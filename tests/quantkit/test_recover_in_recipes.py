"""A recipe with a recover step: transforms, training and quantizer, each of which goes on where it was stopped."""

import json

import pytest
import torch

from quantkit import quantize, recover, staging
from quantkit.errors import QuantkitError
from quantkit.recipe import Recipe
from quantkit.recovery.training import Training
from quantkit.shards import ShardReader
from quantkit.staging import split

SPARSE = "sparse24:criterion=wanda"
RECOVER = "recover:tokens=512,batch=128,lr=0.003,distill=0.5"


class StoppedError(BaseException):
    """What a test stops a run by."""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    said = " ".join(f"{number} is no {number * number % 997}." for number in range(60))
    (folder / "train.txt").write_text(said, encoding="utf-8")
    return {"dataset": str(folder / "train.txt"), "seq_len": 32, "samples": 4, "progress": False}


def tensors(folder):
    reader = ShardReader(folder)
    return {name: reader.get(name) for name in reader.tensors}


def test_stages():
    recipe = Recipe.of(["smoothquant", "sparse24", "recover:tokens=2M", "recover:tokens=1M", "w8a8"])
    assert [[step.name for step in stage] for stage in split(recipe)] == [
        ["smoothquant", "sparse24"],
        ["recover"],
        ["recover"],
        ["w8a8"],
    ]


def test_a_recipe_is_its_stages_one_after_the_other(tmp_path, model_folder, words):
    """Bit for bit what three commands make."""
    report = quantize(model_folder(), tmp_path / "out", steps=[SPARSE, RECOVER, "int8"], **words)
    quantize(model_folder(), tmp_path / "one", steps=[SPARSE], **words)
    more = {"tokens": 512, "batch_tokens": 128, "learning_rate": "0.003", "distill": 0.5, "teacher": model_folder()}
    data = {name: words[name] for name in ("dataset", "seq_len", "progress")}
    recover(tmp_path / "one", tmp_path / "two", **data, **more)
    quantize(tmp_path / "two", tmp_path / "three", steps=["int8"], progress=False)
    expected, found = tensors(tmp_path / "three"), tensors(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert report.recovery.tokens == 512
    assert len(report.pruned) == len(report.layers) == 14
    assert [step.partition(":")[0] for step in report.recipe["steps"]] == ["sparse24", "recover", "int8"]
    assert json.loads(json.dumps(report.to_dict())) == json.loads(
        (tmp_path / "out" / "quantkit_report.json").read_text(encoding="utf-8")
    )
    recipe = json.loads((tmp_path / "out" / "quantkit_recipe.json").read_text(encoding="utf-8"))
    assert recipe == report.recipe
    assert recipe["dataset"]["name"] == words["dataset"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (tmp_path / "three").iterdir()}
    assert not list(tmp_path.glob("out.partial*"))
    events = [json.loads(line)["event"] for line in (tmp_path / "out.log.jsonl").read_text().splitlines()]
    assert events.count("start") == events.count("finish") == 3
    assert "after the transform" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "recovered | " in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model_folder, words):
    """What a run that nothing stops makes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    quantize(model_folder(), output, steps=[SPARSE, RECOVER, "int8"], **words)
    return output


@pytest.mark.parametrize("stop", ["training", pytest.param("quantizer", marks=pytest.mark.exhaustive), "end"])
def test_every_stage_goes_on_where_it_was_stopped(tmp_path, model_folder, words, whole, monkeypatch, stop):
    with monkeypatch.context() as patch:
        if stop == "training":
            keep = Training._keep

            def die(self, state, optimizer):
                keep(self, state, optimizer)
                raise StoppedError

            patch.setattr(Training, "_keep", die)
        elif stop == "quantizer":

            def dies(*_, **__):
                raise StoppedError

            patch.setattr("quantkit.pipeline.verify", dies)
            with pytest.raises(StoppedError):  # of the transform
                quantize(model_folder(), tmp_path / "out", steps=[SPARSE, RECOVER, "int8"], **words)
            patch.undo()
            count, compress = [0], staging.pipeline.quantize

            def second(*arguments, **more):
                count[0] += 1
                if count[0] == 2:
                    raise StoppedError
                return compress(*arguments, **more)

            patch.setattr(staging.pipeline, "quantize", second)
        else:
            patch.setattr(staging._Staged, "_finish", lambda *_: (_ for _ in ()).throw(StoppedError()))
        with pytest.raises(StoppedError):
            quantize(model_folder(), tmp_path / "out", steps=[SPARSE, RECOVER, "int8"], **words)
    assert (tmp_path / "out.partial").is_dir()
    quantize(model_folder(), tmp_path / "out", steps=[SPARSE, RECOVER, "int8"], **words)
    one, two = tensors(whole), tensors(tmp_path / "out")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not (tmp_path / "out.partial").exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {p.name for p in whole.iterdir()}


def test_the_option_puts_the_step_behind_the_transforms(tmp_path, model_folder, words, cli):
    (tmp_path / "held.txt").write_text(" ".join(f"{n} is no {n * n % 997}." for n in range(60, 90)), encoding="utf-8")
    options = ("--dataset", words["dataset"], "--seq-len", "32", "--samples", "4", "--recover", "8192", "--quiet")
    options = (*options, "--eval-dataset", tmp_path / "held.txt")
    result = cli("quantize", model_folder(), "-o", tmp_path / "out", "-m", SPARSE, "-m", "int8", *options)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "quantkit_report.json").read_text(encoding="utf-8"))
    found = report["recovery"]["perplexity"]
    assert found["original"] == report["evaluation"]["baseline_perplexity"]
    assert found["recovered"] < min(found["original"], found["transformed"])  # the tiny model was never trained
    assert report["evaluation"]["perplexity"] == pytest.approx(found["recovered"], rel=0.1)
    recipe = json.loads((tmp_path / "out" / "quantkit_recipe.json").read_text(encoding="utf-8"))
    assert [step.partition(":")[0] for step in recipe["steps"]] == ["sparse24", "recover", "int8"]
    assert "tokens=8192" in recipe["steps"][1]
    assert "distill=0.5" in recipe["steps"][1]


def test_what_cannot_be(tmp_path, model_folder, words):
    with pytest.raises(QuantkitError, match="give --dataset SPEC"):
        quantize(model_folder(), tmp_path / "out", steps=[RECOVER])
    with pytest.raises(QuantkitError, match="leave one of them out"):
        quantize(model_folder(), tmp_path / "out", steps=[RECOVER], recover="2M", **words)
    with pytest.raises(QuantkitError, match="comes after int8"):
        quantize(model_folder(), tmp_path / "out", steps=["int8", RECOVER], **words)
    with pytest.raises(QuantkitError, match="seq_len is 100"):
        quantize(model_folder(), tmp_path / "out", steps=[RECOVER], **words | {"seq_len": 100})
    assert not list(tmp_path.iterdir())
