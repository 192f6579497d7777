"""Links and names that lead out of a model's folder; and the hub's cache, which is made of links."""

import json
import os

import models
import pytest

from quantkit import load, quantize
from quantkit.checkpoint import Hub, load_tokenizer, open_folder
from quantkit.errors import CheckpointError
from quantkit.inspection import inspect_checkpoint


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_text("do not copy", encoding="utf-8")
    return path


@pytest.fixture
def folder(model_folder, tmp_path):
    return models.copy(model_folder("llama"), tmp_path / "model")


def linked(folder, name, target):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    return folder


@pytest.mark.parametrize(
    "name", ["notes.txt", "LICENSE", "tokenizer.json", "special_tokens_map.json", ".hidden", "x.py"]
)
def test_a_link_that_leads_out_is_refused_and_nothing_copied(name, folder, secret, tmp_path):
    linked(folder, name, secret)
    calls = (
        lambda: quantize(folder, tmp_path / "out", steps=["int8"], progress=False),
        lambda: open_folder(folder, Hub()),
        lambda: inspect_checkpoint(folder),
        lambda: load_tokenizer(folder),
        lambda: load(folder),
    )
    for call in calls:
        with pytest.raises(CheckpointError, match=rf"{name} is a link to .*secret, outside .* copy"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["../secret", "../model/../secret", "inner/../../secret", "hop"])
def test_a_link_that_leads_out_by_a_detour_is_refused(target, folder, secret, tmp_path):
    (folder / "inner").mkdir()
    (folder / "hop").symlink_to("../secret")
    with pytest.raises(CheckpointError, match="is a link"):
        open_folder(linked(folder, "notes.txt", target), Hub())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_weights_and_config_are_no_exception(name, folder, model_folder):
    with pytest.raises(CheckpointError, match="is a link"):
        open_folder(linked(folder, name, model_folder("llama") / name), Hub())


def test_links_inside_of_the_folder_are_followed(folder, tmp_path):
    (folder / "really").mkdir()
    for name in ("model.safetensors", "LICENSE"):
        (folder / name).rename(folder / "really" / name)
        linked(folder, name, f"really/{name}")
    quantize(folder, tmp_path / "out", steps=["int8"], progress=False)
    assert (tmp_path / "out" / "LICENSE").read_text(encoding="utf-8") == "do what you like\n"
    assert not (tmp_path / "out" / "LICENSE").is_symlink()


def test_a_link_to_the_folder_itself_is_the_user_s_own(folder, tmp_path):
    (tmp_path / "alias").symlink_to(folder)
    assert open_folder(tmp_path / "alias", Hub()).weights.nbytes


def test_a_link_to_nothing_is_no_file(folder):
    assert open_folder(linked(folder, "notes.txt", "nowhere"), Hub()).weights.nbytes


def test_snapshots_of_the_hub_s_cache_are_links_to_blobs(folder, tmp_path, secret):
    """As huggingface_hub lays them out: `models--owner--name/snapshots/COMMIT/FILE` to `../../blobs/HASH`."""
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"{number:040x}", snapshot))
    quantize(snapshot, tmp_path / "out", steps=["int8"], progress=False)
    assert load(snapshot) is not None
    assert load_tokenizer(snapshot) is not None
    linked(snapshot, "notes.txt", secret)
    with pytest.raises(CheckpointError, match="is a link"):
        quantize(snapshot, tmp_path / "two", steps=["int8"], progress=False)


def test_no_file_is_read_that_is_none(folder):
    """Pipes and devices would never end."""
    os.mkfifo(folder / "notes.txt")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no"):
        open_folder(folder, Hub())


def test_an_index_of_a_pipe_is_refused(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match="missing"):
        open_folder(folder, Hub())
