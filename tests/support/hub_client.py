"""How huggingface_hub is pointed at another hub: in this process, or by the environment of a child process."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

PREFIXES = ("HF_", "HUGGING", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Let huggingface_hub use a hub and a home of its own, as if HF_ENDPOINT and HF_HOME had been set before it ran."""
    for name in list(os.environ):
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)
    home.mkdir()
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", endpoint)
    url = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)


def do_not_wait(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited before each new try, by quantkit and by huggingface_hub."""
    waited: list[float] = []
    clock = SimpleNamespace(sleep=waited.append)
    for module in ("quantkit.hub", "huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", clock)
    return waited


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """The environment of a child process that uses a hub and a home of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(PREFIXES)}
    words = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**kept, **words, "OMP_NUM_THREADS": "1", **more}
