"""Jobs whose runs are stopped and disturbed: two models of several shards, calibrated and not."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import models
import pytest
import torch
from forks import Forks, Job, appears, contents, partial
from transformers import MixtralConfig, MixtralForCausalLM

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
RECIPES = {
    "calibrated": ("-m", "smoothquant:alpha=auto", "-m", "w8a8"),
    "static": ("-m", "smoothquant", "-m", "w8a8:activation=tensor-static"),
    "plain": ("-m", "w8a8"),
}


def small(name: str, folder: Path) -> Path:
    """A tiny model in several files."""
    if name == "llama":
        return models.save(models.llama_model(**SIZES), folder, max_shard_size="30KB")
    config = MixtralConfig(
        **{**models.LLAMA, **SIZES, "num_hidden_layers": 2}, num_local_experts=2, num_experts_per_tok=1
    )
    return models.save(models.randomized(MixtralForCausalLM(config)), folder, max_shard_size="30KB")


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model in several files. Not to be changed: copy it."""
    made: dict[str, Path] = {}

    def source(name: str) -> Path:
        if name not in made:
            made[name] = small(name, tmp_path_factory.mktemp("faults") / name)
        return made[name]

    return source


@pytest.fixture(scope="session")
def forks(sources: Callable[[str], Path]) -> Iterator[Forks]:
    with Forks(sources("llama")) as running:
        yield running


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration data."""
    path = tmp_path_factory.mktemp("faults") / "rows.jsonl"
    ids = torch.randint(0, 60, (5, 24), generator=torch.Generator().manual_seed(1)).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def job(
    sources: Callable[[str], Path], forks: Forks, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Job]:
    """The job of a model and a recipe, run once without a fault; another model's folder may be given."""
    made: dict[object, Job] = {}

    def of(name: str = "llama", recipe: str = "plain", model: Path | None = None) -> Job:
        if (name, recipe, model) not in made:
            data = () if recipe == "plain" else ("--dataset", rows, "--samples", 5, "--seq-len", 24)
            words = (*RECIPES[recipe], *data, "--max-shard-size", "20KB")
            found = Job(forks, model or sources(name), words)
            output, times = tmp_path_factory.mktemp("whole") / "out", [time.monotonic()]
            child = found.start(output)
            for path in (partial(output), output):
                assert appears(path, output), child.wait().said
                times.append(time.monotonic())
            ended = child.wait()
            assert ended.status == 0, ended.said
            found.before, found.seconds = times[1] - times[0], times[2] - times[1]
            found.whole = contents(output)
            assert len([file for file in found.whole if file.endswith(".safetensors")]) > 2
            made[name, recipe, model] = found
        return made[name, recipe, model]

    return of
