"""What `quantize` finds out about a model on the hub before it downloads it, held against the server's log."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hub_server
import pytest
from hub_client import asked_bytes, contents, do_not_wait, header_length, said
from hub_server import HubServer

from quantkit import quantize
from quantkit.budget import disk_bytes
from quantkit.errors import QuantkitError
from quantkit.pipeline import planned

NAME = "org/tiny"
OTHERS = ("config.json", "tokenizer.json", "LICENSE")


def weights(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name.endswith(".safetensors")}


def refused(output: Path, **words: Any) -> str:
    with pytest.raises(QuantkitError) as caught:
        quantize(NAME, output, progress=False, **words)
    assert not output.exists()
    return str(caught.value)


def test_what_cannot_be_done_is_told_before_a_weight_is_fetched(
    server: HubServer, model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder("llama_odd")
    files = contents(folder)
    server.add(NAME, files)
    out = tmp_path / "out"
    assert "block size 128 does not divide the in features of 14 layers" in refused(out, recipe="fp8-block")
    assert "matches none of the" in refused(out, steps=["w8a8"], ignore=["nothing"])
    needed = disk_bytes(*planned(folder, steps=["w8a8"])[:2])
    usage = SimpleNamespace(total=needed, used=0, free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert f"no space: the result takes {needed:,} bytes" in refused(out, steps=["w8a8"])
    assert asked_bytes(server, files) == 3 * header_length(files["model.safetensors"])
    assert not server.asked("GET", "tokenizer")


@pytest.mark.parametrize("kind", ["llama", "llama_sharded", "mixtral"])
def test_then_the_model_is_downloaded_once_and_the_result_is_that_of_the_folder(
    server: HubServer,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    files = contents(model_folder(kind))
    server.add(NAME, files)
    quantize(NAME, tmp_path / "one", steps=["w8a8"], progress=False)
    assert "by config and headers" in said(caplog)[0]
    whole = [each for each in server.asked("GET", r"/storage/.*\.safetensors") if "range" not in each]
    assert len(whole) == sum(name.endswith(".safetensors") for name in files)
    quantize(model_folder(kind), tmp_path / "two", steps=["w8a8"], progress=False)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert all((tmp_path / "one" / name).read_bytes() == files[name] for name in OTHERS[1:])
    server.requests.clear()
    caplog.clear()
    quantize(NAME, tmp_path / "three", steps=["w8a8"], progress=False)
    assert not server.asked("GET", "/resolve/|/storage/")
    assert len(server.asked("GET", "/api/models")) == 1
    assert not said(caplog)
    assert weights(tmp_path / "three") == weights(tmp_path / "two")


def test_weights_in_the_cache_without_the_other_files_are_not_taken_for_the_model(
    server: HubServer, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from huggingface_hub import hf_hub_download

    files = contents(model_folder("llama"))
    server.add(NAME, files)
    for file in ("config.json", "model.safetensors"):
        hf_hub_download(NAME, file)
    server.requests.clear()
    quantize(NAME, tmp_path / "out", steps=["w8a8"], progress=False)
    assert all((tmp_path / "out" / name).read_bytes() == files[name] for name in OTHERS[1:])
    assert not server.asked("GET", "safetensors")


def test_without_ranges_it_is_downloaded_first_and_that_is_said(
    server: HubServer,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    send = hub_server._Handler._send
    monkeypatch.setattr(
        hub_server._Handler, "_ranged", lambda self, content, headers: send(self, 200, content, headers)
    )
    server.add(NAME, model_folder("llama"))
    quantize(NAME, tmp_path / "out", steps=["w8a8"], progress=False)
    line = next(line for line in said(caplog) if "is checked after the download, not before" in line)
    assert "only as a whole" in line
    quantize(model_folder("llama"), tmp_path / "two", steps=["w8a8"], progress=False)
    assert weights(tmp_path / "out") == weights(tmp_path / "two")


def test_a_compressed_model_whose_headers_do_not_tell_is_downloaded_first(
    server: HubServer, compressed: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.add(NAME, compressed("int8"))
    quantize(NAME, tmp_path / "out", steps=["w8a8"], dequantize=True, progress=False)
    assert any("is checked after the download, not before" in line for line in said(caplog))


def test_the_cache_stands_in_with_one_line(
    server: HubServer,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    do_not_wait(monkeypatch)
    server.add(NAME, model_folder("llama"))
    quantize(NAME, tmp_path / "one", steps=["w8a8"], progress=False)
    caplog.clear()
    server.fail("GET", "/api/models", status=503)
    quantize(NAME, tmp_path / "two", steps=["w8a8"], progress=False)
    assert sum("is taken from the cache" in line for line in said(caplog)) == 1
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
