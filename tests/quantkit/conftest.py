"""Tiny models of other architectures than those of `models.BUILDERS`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.checkpoint import Hub, Source, open_folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the tiny model of any entry of transformers' table. Not to be changed: copy it."""
    made: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        from tiny import save

        if model_type not in made:
            made[model_type] = save(model_type, tmp_path_factory.mktemp(model_type))
        return made[model_type]

    return folder


@pytest.fixture
def tiny_source(tiny_folder: Callable[[str], Path]) -> Callable[[str], Source]:
    """The source of such a model, opened anew."""
    return lambda model_type: open_folder(tiny_folder(model_type), Hub())
