"""How huggingface_hub is pointed at another hub, in this process or a child, and what it asked that hub for."""

import os
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import HubServer

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


def header_length(content: bytes) -> int:
    """Bytes of a safetensors file up to the end of its header."""
    return 8 + int(struct.unpack("<Q", content[:8])[0])


def asked_bytes(server: HubServer, files: dict[str, bytes]) -> int:
    """How many bytes of shards were asked for; fails when one of them lies beyond a header."""
    total = 0
    for method, path, headers in server.requests:
        file = path.rpartition("/")[2]
        if not file.endswith(".safetensors") or "/api/" in path:
            continue
        assert method == "GET", path
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", ""))
        assert match, f"{path} is asked for as a whole"
        first, last = map(int, match.groups())
        assert last < header_length(files[file]), f"{path} {match[0]} is weights"
        total += last + 1 - first if "/storage/" in path else 0
    return total


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What quantkit has warned of."""
    return [record.getMessage() for record in caplog.records if record.name == "quantkit"]
