"""Data sets of the hub, fetched by `datasets` from a server on this machine that speaks the hub's API.

`datasets` reads HF_ENDPOINT when it is imported: each of the two child processes here asks for everything at once.
"""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from hub_client import environment
from hub_server import HubServer

from quantkit.texts import read

ROWS = [f"The quick brown fox number {number} jumps over {number} lazy dogs. " for number in range(9)]
CARD = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: data/train-*.parquet
  - split: test
    path: data/test-*.parquet
---
"""
ASK = """
import json, sys
from quantkit.errors import DataError
from quantkit.texts import read

for line in sys.argv[1:]:
    spec, purpose, token = line.split("|")
    try:
        texts = read(spec, purpose=purpose, token=token or None)
        print(json.dumps([texts.name, texts.fingerprint]))
    except DataError as error:
        print(json.dumps(["", str(error)]))
"""
ONLINE = [
    "org/texts|calibration|",
    "org/texts:small:test|evaluation|",
    "org/texts:none:train|calibration|",
    "org/texts:small:dev|calibration|",
    "org/none|calibration|",
    "alice/own|calibration|",
    "alice/own|calibration|hf_alice",
    "alice/gated|calibration|hf_alice",
]
OFFLINE = [*ONLINE[:2], "alice/own|calibration|", "org/other|evaluation|"]


def parquet(rows: list[str]) -> bytes:
    made = io.BytesIO()
    datasets.Dataset.from_dict({"text": rows}).to_parquet(made)
    return made.getvalue()


def lines(rows: list[str]) -> bytes:
    return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        files = {"data/train-0.parquet": parquet(ROWS), "data/test-0.parquet": parquet(ROWS[:3])}
        running.add("org/texts", {"README.md": CARD.encode(), **files}, "dataset")
        running.add(
            "alice/own", {"train.jsonl": lines(ROWS[::-1]), "test.jsonl": lines(["no"])}, "dataset", private=True
        )
        running.add("alice/gated", {"train.jsonl": lines(ROWS)}, "dataset", gated=True)
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def asked(server: HubServer, home: Path, questions: list[str], **more: str) -> dict[str, list[str]]:
    """What `read` gives in a child process: by question its name and fingerprint, or nothing and the error."""
    ran = subprocess.run(
        [sys.executable, "-c", ASK, *questions],
        capture_output=True,
        text=True,
        check=False,
        env=environment(server.endpoint, home, **more),
    )
    assert ran.returncode == 0, ran.stderr
    return dict(zip(questions, map(json.loads, ran.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def online(server: HubServer, home: Path) -> dict[str, list[str]]:
    return asked(server, home, ONLINE)


@pytest.fixture(scope="module")
def offline(server: HubServer, home: Path, online: Any) -> tuple[dict[str, list[str]], int]:
    """What is given offline, after what was given online, and how many requests that took."""
    before = len(server.requests)
    return asked(server, home, OFFLINE, HF_HUB_OFFLINE="1"), len(server.requests) - before


def fingerprint(rows: list[str], folder: Path) -> str:
    """That of the same rows in a file."""
    (folder / "rows.jsonl").write_bytes(lines(rows))
    return read(folder / "rows.jsonl").fingerprint


def test_a_split_is_chosen_by_purpose_and_named_in_full(online: dict[str, list[str]], tmp_path: Path) -> None:
    assert online["org/texts|calibration|"] == ["org/texts:small:train", fingerprint(ROWS, tmp_path)]
    assert online["org/texts:small:test|evaluation|"] == ["org/texts:small:test", fingerprint(ROWS[:3], tmp_path)]


def test_a_private_one_takes_the_token(online: dict[str, list[str]], tmp_path: Path) -> None:
    expected = ["alice/own:default:train", fingerprint(ROWS[::-1], tmp_path)]
    assert online["alice/own|calibration|hf_alice"] == expected


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ("org/texts:none:train|calibration|", ("'none' not found", "check it against org/name[:config[:split]]")),
        ("org/texts:small:dev|calibration|", ('Unknown split "dev"', "['train', 'test']")),
        ("org/none|calibration|", ("'org/none' doesn't exist", "check its name")),
        ("alice/own|calibration|", ("give --token if alice/own is private or gated",)),
        ("alice/gated|calibration|hf_alice", ("gated", "ask for access and give --token")),
    ],
)
def test_what_cannot_be_had_is_told(online: dict[str, list[str]], question: str, says: tuple[str, ...]) -> None:
    name, sentence = online[question]
    assert name == ""
    assert sentence.startswith(question.split("|")[0] + " can't be had from the hub (")
    assert "\n" not in sentence
    for words in says:
        assert words in sentence


def test_what_was_fetched_serves_offline(
    online: dict[str, list[str]], offline: tuple[dict[str, list[str]], int], tmp_path: Path
) -> None:
    found, requests = offline
    assert requests == 0
    for question in OFFLINE[:2]:
        assert found[question] == online[question]
    assert found["alice/own|calibration|"] == online["alice/own|calibration|hf_alice"]


def test_what_was_not_fetched_is_told_offline(offline: tuple[dict[str, list[str]], int]) -> None:
    name, sentence = offline[0]["org/other|evaluation|"]
    assert name == ""
    assert "org/other can't be had from the hub" in sentence
    assert "unset HF_HUB_OFFLINE to fetch it once, or give a file" in sentence
