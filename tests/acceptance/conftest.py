"""A small hub in this process, that huggingface_hub is pointed to."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import do_not_wait, point_to
from hub_server import HubServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as running:
        point_to(running.endpoint, monkeypatch, tmp_path / "home")
        yield running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    return do_not_wait(monkeypatch)
