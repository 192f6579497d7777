"""Fixtures of the serving tests: a vLLM process, and checkpoints for it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving_models import REAL, build, compress
from vllm_process import VARIABLE, Ours, Vllm


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    """A vLLM process, its CPU build in an environment of its own."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"{VARIABLE} is not set: it names the Python of an environment with vLLM (docs/serving.md)")
    with Vllm(python, tmp_path_factory.mktemp("vllm")) as server:
        yield server


@pytest.fixture(scope="session")
def ours() -> Ours:
    """Our side's predictions."""
    return Ours()


@pytest.fixture(scope="session")
def float_model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """The folder of a float model: a real one's name, or a model type of which a tiny one is made."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name in REAL:
            return request.getfixturevalue("data") / "models" / name
        if name not in made:
            made[name] = build(name, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, float_model: Callable[[str], Path]) -> Callable[..., Path]:
    """The folder of a model compressed by steps."""
    made: dict[tuple[str, tuple[str, ...], str], Path] = {}

    def folder(name: str, *steps: str, form: str = "auto") -> Path:
        key = (name, steps, form)
        if key not in made:
            made[key] = compress(float_model(name), tmp_path_factory.mktemp("compressed"), steps, form)
        return made[key]

    return folder
