"""Models that come from the hub, held against a server on this machine that speaks its API.

huggingface_hub runs in this process, pointed at the server; test_push has a child process that HF_ENDPOINT, HF_HOME and
HF_TOKEN point there.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from hub_client import contents
from hub_server import Account, HubServer

from quantkit.checkpoint import Hub, resolve
from quantkit.errors import CheckpointError
from quantkit.shards import ShardReader

NAME = "org/tiny"


@pytest.fixture
def folder(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama")


def refused(name: str = NAME, **how: str) -> str:
    """The one sentence with which a model is refused."""
    with pytest.raises(CheckpointError) as caught:
        resolve(name, Hub(**how))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert name in sentence
    return sentence


# What comes


def test_all_files_come_as_they_are_and_other_weights_stay_there(server: HubServer, folder: Path) -> None:
    files = contents(folder)
    server.add(NAME, files | {"pytorch_model.bin": b"pickle", "onnx/model.onnx": b"onnx", "flax.msgpack": b"flax"})
    assert contents(resolve(NAME, Hub())) == files
    assert not server.asked("GET", "pytorch_model|onnx|flax")


@pytest.mark.parametrize("asked", ["branch", "tag/one", "commit"])
def test_a_revision_is_a_branch_a_tag_or_a_commit(server: HubServer, folder: Path, asked: str) -> None:
    made = server.add(NAME, contents(folder) | {"which.txt": b"old"})
    old = made.refs["main"]
    made.refs |= {"branch": old, "tag/one": old}
    made.commit(contents(folder) | {"which.txt": b"new"})
    assert (resolve(NAME, Hub()) / "which.txt").read_bytes() == b"new"
    found = resolve(NAME, Hub(revision=old if asked == "commit" else asked))
    assert (found / "which.txt").read_bytes() == b"old"
    assert found.name == old


def test_what_is_in_the_cache_is_not_fetched_again_and_serves_offline(
    server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.add(NAME, folder)
    first = resolve(NAME, Hub())
    server.requests.clear()
    assert resolve(NAME, Hub()) == first
    assert not server.asked("GET", "/resolve/|/storage/")
    server.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve(NAME, Hub()) == first
    assert not server.requests
    assert not [record for record in caplog.records if record.name == "quantkit"]


@pytest.mark.parametrize("how", ["busy", "gone"])
def test_without_an_answer_the_cache_serves_and_says_so(
    server: HubServer,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    impatient: list[float],
    how: str,
) -> None:
    made = server.add(NAME, folder)
    first = resolve(NAME, Hub())
    made.commit(contents(folder) | {"which.txt": b"new"})
    if how == "busy":
        server.fail("GET", "/api/models", status=503)
    else:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING):
        assert resolve(NAME, Hub()) == first
    said = [record.getMessage() for record in caplog.records if record.name == "quantkit"][-1]
    assert f"{NAME} is taken from the cache at commit {first.name}" in said


@pytest.mark.parametrize(("how", "words"), [({"token": "hf_wrong"}, "does not accept"), ({"revision": "v9"}, "v9")])
def test_a_refusal_of_the_hub_is_not_hidden_by_the_cache(
    server: HubServer, folder: Path, how: dict[str, str], words: str
) -> None:
    server.add(NAME, folder)
    resolve(NAME, Hub())
    assert words in refused(**how)


def test_a_half_snapshot_is_not_taken_for_a_whole_one(
    server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(NAME, folder)
    server.fail("GET", "/storage/", status=404)
    assert "cannot be downloaded" in refused()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "it is not whole in the cache" in refused()


def test_a_renamed_model_is_found(server: HubServer, folder: Path) -> None:
    server.add(NAME, folder)
    server.renamed["org/old"] = NAME
    assert contents(resolve("org/old", Hub())) == contents(folder)


def test_a_token_goes_to_the_hub_and_never_to_its_storage(server: HubServer, folder: Path) -> None:
    """The server refuses a request to its storage that carries a token."""
    server.add(NAME, folder, private=True)
    server.accounts["hf_member"] = Account("bob", organizations={"org": "write"})
    assert contents(resolve(NAME, Hub(token="hf_member"))) == contents(folder)
    assert all(headers["authorization"] == "Bearer hf_member" for headers in server.asked("HEAD", "/resolve/"))


def test_a_listing_of_many_pages_is_read_to_its_end(server: HubServer, folder: Path) -> None:
    server.page = 2
    server.add(NAME, folder)
    assert contents(resolve(NAME, Hub())) == contents(folder)


def test_the_server_serves_ranges_as_huggingface_hub_reads_headers(server: HubServer, folder: Path) -> None:
    """A header read by range requests alone has every tensor that is in the file."""
    server.add(NAME, folder)
    metadata = huggingface_hub.HfApi(endpoint=server.endpoint).get_safetensors_metadata(NAME)
    read = {name: tuple(info.shape) for file in metadata.files_metadata.values() for name, info in file.tensors.items()}
    assert read == {name: info.shape for name, info in ShardReader(folder).tensors.items()}
    assert all("range" in headers for headers in server.asked("GET", "/storage/"))


# Connections that break


def test_a_connection_that_breaks_goes_on_where_it_stopped(
    server: HubServer, folder: Path, impatient: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came in whole pieces is kept: of 10 MiB ordinarily, here of 1 KiB."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    server.add(NAME, folder)
    server.fail("GET", "/storage/", times=1, cut=100_000)
    assert contents(resolve(NAME, Hub())) == contents(folder)
    first, second = server.asked("GET", "/storage/")
    assert "range" not in first
    assert second["range"] == f"bytes={100_000 // 1024 * 1024}-"


def test_a_connection_that_keeps_breaking_is_told_and_what_came_is_kept(
    server: HubServer, folder: Path, impatient: list[float]
) -> None:
    server.add(NAME, folder)
    fault = server.fail("GET", "/storage/", cut=0)
    sentence = refused()
    assert "run it again" in sentence
    fault.times = 0
    server.requests.clear()
    assert contents(resolve(NAME, Hub())) == contents(folder)
    fetched = {Path(path).name for method, path, _ in server.requests if method == "GET" and "/api/" not in path}
    assert fetched == {"model.safetensors"}


def test_the_hub_is_asked_again_when_it_is_busy(
    server: HubServer, folder: Path, impatient: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    server.add(NAME, folder)
    server.fail("GET", "/api/models", times=1, status=503)
    server.fail("GET", "/api/models", times=1, status=429, headers={"Retry-After": "3"})
    assert contents(resolve(NAME, Hub())) == contents(folder)
    assert impatient[:2] == [1, 3]
    assert [record.getMessage() for record in caplog.records if record.name == "quantkit"] == [
        "the hub answers 503; asking again in 1 s",
        "the hub answers 429; asking again in 3 s",
    ]


# What is refused, and that its remedy works


def test_an_unknown_model(server: HubServer, folder: Path) -> None:
    assert f"{server.endpoint} has no {NAME} that can be seen without a token; check the name" in refused()
    assert "that can be seen with the token of --token" in refused(token="hf_alice")
    server.add(NAME, folder)
    assert resolve(NAME, Hub())


def test_an_unknown_revision(server: HubServer, folder: Path) -> None:
    server.add(NAME, folder)
    assert f"{NAME} has no revision 'v9'; give a branch, tag or commit" in refused(revision="v9")


def test_a_private_model_takes_a_token(server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("alice/own", folder, private=True)
    assert "give --token if it is private" in refused("alice/own")
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    assert contents(resolve("alice/own", Hub())) == contents(folder)


def test_a_gated_model_takes_a_token_of_someone_who_was_let_in(server: HubServer, folder: Path) -> None:
    server.add(NAME, folder, gated=True)
    where = f"accept its terms at {server.endpoint}/{NAME}"
    assert f"{NAME} is gated and no token is given; {where} and give --token" in refused()
    sentence = refused(token="hf_alice")
    assert f"the account of the token of --token has not been let in; {where} or give another" in sentence
    server.accounts["hf_alice"] = Account(granted=(NAME,))
    assert contents(resolve(NAME, Hub(token="hf_alice"))) == contents(folder)


@pytest.mark.parametrize(
    ("place", "words"), [("argument", "the token of --token"), ("environment", "HF_TOKEN"), ("file", "hf auth login")]
)
def test_a_bad_token_is_told_by_where_it_comes_from_and_not_shown(
    server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, words: str
) -> None:
    server.add(NAME, folder)
    if place == "environment":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    if place == "file":
        Path(huggingface_hub.constants.HF_TOKEN_PATH).write_text("hf_wrong")
    sentence = refused(token="hf_wrong") if place == "argument" else refused()
    assert words in sentence
    assert f"make one at {server.endpoint}/settings/tokens" in sentence
    assert "hf_wrong" not in sentence


def test_offline_without_a_cache(server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(NAME, folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sentence = refused(revision="v1")
    assert f"{NAME} is no folder, and the hub does not give it: its revision v1 is not in the cache" in sentence
    assert "HF_HUB_OFFLINE is set; unset it" in sentence
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert resolve(NAME, Hub())


@pytest.mark.parametrize("claimed", [10, 10**7])
def test_a_file_of_another_size_than_announced(server: HubServer, folder: Path, claimed: int) -> None:
    server.add(NAME, folder)
    fault = server.fail("HEAD", "model.safetensors", size=claimed)
    sentence = refused()
    size = (folder / "model.safetensors").stat().st_size
    assert f"file should be of size {claimed} but has size {size}" in sentence
    assert sentence.endswith("run it again")
    fault.times = 0
    assert contents(resolve(NAME, Hub())) == contents(folder)


@pytest.mark.parametrize(
    ("path", "status", "headers", "words"),
    [
        ("/api/models", 503, {}, "has an error of its own (status 503); run it again later"),
        ("/api/models", 429, {"RateLimit": '"api";r=0;t=55'}, "is asked too often (status 429); run it again in 55 s"),
        ("/storage/", 500, {}, "has an error of its own (status 500); run it again later"),
        ("/storage/", 429, {"Retry-After": "2"}, "is asked too often (status 429); run it again in 2 s"),
        ("/storage/", 403, {}, "does not allow this to an anonymous user (on purpose); give a --token that may do it"),
        ("/storage/", 418, {}, "answers 418 (on purpose)"),
    ],
)
def test_an_answer_that_stays_an_error(
    server: HubServer, folder: Path, impatient: list[float], path: str, status: int, headers: dict[str, str], words: str
) -> None:
    server.add(NAME, folder)
    fault = server.fail("GET", path, status=status, headers=headers)
    assert f"{server.endpoint} {words}" in refused()
    fault.times = 0
    assert contents(resolve(NAME, Hub())) == contents(folder)


def test_a_hub_that_cannot_be_reached(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    sentence = refused()
    assert f"{NAME} is no folder, and the hub does not give it: it is not in the cache" in sentence
    assert "http://127.0.0.1:9 cannot be reached" in sentence
    assert "check the network, HF_ENDPOINT and HTTPS_PROXY" in sentence


def test_an_endpoint_that_is_no_hub(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"{server.endpoint}/elsewhere")
    assert "answers 404" in refused()


@pytest.mark.parametrize("name", ["org/-bad", "org/a--b", "org/name.git", "org/ä"])
def test_a_name_that_the_hub_does_not_allow(server: HubServer, name: str) -> None:
    assert f"{name!r} is no name that the hub allows" in refused(name)
    assert not server.requests
