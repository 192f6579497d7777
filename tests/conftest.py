"""Fixtures of all tests: tiny models and their compressed copies, made once a session."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # as many processes as processors: each has its share of them
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

if TYPE_CHECKING:
    from click.testing import Result


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real checkpoints and texts: models/<name>/ and text/<name>/."""
    folder = os.environ.get("QUANTKIT_DATA")
    if not folder:
        pytest.skip("QUANTKIT_DATA is not set: it names the folder with real checkpoints and texts")
    return Path(folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the tiny model of a name in `models.BUILDERS`. Not to be changed: copy it."""
    made: dict[str, Path] = {}

    def folder(name: str = "llama") -> Path:
        import models

        if name not in made:
            made[name] = models.BUILDERS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `quantize` is told of calibration data for the tiny models: 8 windows of 32 of a text's bytes."""
    path = tmp_path_factory.mktemp("calibration") / "text.txt"
    path.write_text(" ".join(f"{number} is no {number * number % 997}." for number in range(400)), encoding="utf-8")
    return {"dataset": str(path), "samples": 8, "seq_len": 32}


@pytest.fixture(scope="session")
def compressed(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path], calibration: dict[str, Any]
) -> Callable[..., Path]:
    """The folder of a tiny model compressed by a bundled recipe, with data where it observes. Copy it to change it."""
    from quantkit import quantize
    from quantkit.recipe import load_recipe

    made: dict[tuple[str, str, str], Path] = {}

    def folder(recipe: str = "w8a8", name: str = "llama", form: str = "auto") -> Path:
        if (recipe, name, form) not in made:
            output = tmp_path_factory.mktemp("compressed") / f"{recipe}-{name}"
            data = calibration if load_recipe(recipe).observes else {}
            quantize(model_folder(name), output, recipe=recipe, format=form, progress=False, **data)
            made[recipe, name, form] = output
        return made[recipe, name, form]

    return folder


@pytest.fixture
def cli() -> Callable[..., "Result"]:
    """Runs the command line in this process."""
    from click.testing import CliRunner

    from quantkit.cli import main

    return lambda *words: CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def mistake(cli: Callable[..., "Result"]) -> Callable[..., str]:
    """Runs a command line that must fail, and gives its one sentence, which holds all the words asked for."""

    def run(*words: object, says: tuple[str, ...] = ()) -> str:
        result = cli(*words)
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == 1
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        progress = ("quantizing: ", "verifying: ")
        lines = [line for line in result.stderr.splitlines() if not line.startswith(progress)]
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("Error: ")
        for word in says:
            assert word in lines[0], f"{word!r} is not in {lines[0]!r}"
        return lines[0]

    return run
