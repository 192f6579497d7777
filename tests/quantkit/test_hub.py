"""Hub ids: found in huggingface_hub's cache by revision, and refused in one sentence when they can't be had."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.demo import model_path

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache as huggingface_hub lays it out, holding org/tiny at two revisions."""
    folder = tmp_path_factory.mktemp("cache")
    repo = folder / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    for name, commit in COMMITS.items():
        shutil.copytree(model_path(), repo / "snapshots" / commit)
        (repo / "refs" / name).write_text(commit)
        (repo / "snapshots" / commit / "which.txt").write_text(name)
    return folder


def _run(cache: Path, output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from quantkit.cli import main; main()", "quantize", "org/tiny", "-o", str(output)]
    command += ["-m", "int8", "--cache-dir", str(cache), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(("arguments", "expected"), [((), "main"), (("--revision", "v1"), "v1")])
def test_takes_the_revision_from_the_cache(
    cache: Path, tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    ran = _run(cache, tmp_path / "out", *arguments)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out" / "which.txt").read_text() == expected
    assert "org/tiny" in (tmp_path / "out" / "README.md").read_text()


def test_says_in_one_sentence_what_cannot_be_had(cache: Path, tmp_path: Path) -> None:
    ran = _run(cache, tmp_path / "out", "--revision", "v2")
    assert ran.returncode == 1
    assert len(ran.stderr.strip().splitlines()) == 1, ran.stderr
    assert "org/tiny" in ran.stderr
    assert not (tmp_path / "out").exists()
