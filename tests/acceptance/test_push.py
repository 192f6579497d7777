"""Checkpoints that go to the hub, held against a server on this machine that speaks its API."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import yaml
from hub_client import contents, environment
from hub_server import Account, HubServer

from quantkit import load, push, quantize
from quantkit.errors import QuantkitError
from quantkit.shards import ShardReader

REPO = "alice/compressed"
TOKEN = "hf_alice"


@pytest.fixture
def out(compressed: Callable[..., Path], tmp_path: Path) -> Path:
    """A finished checkpoint, which may be changed."""
    return models.copy(compressed("w8a8", "llama"), tmp_path / "out")


def refused(folder: Path, repo: str = REPO, **words: Any) -> str:
    """The one sentence with which a push is refused."""
    with pytest.raises(QuantkitError) as caught:
        push(folder, repo, progress=False, **words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_the_remedy(sentence: str, folder: Path, cli: Callable[..., Any]) -> Any:
    """Run the command that a sentence ends with, with the token that the user has."""
    words = shlex.split(sentence[sentence.index("quantkit push") :].replace(" --token TOKEN", f" --token {TOKEN}"))
    assert words[:3] == ["quantkit", "push", str(folder)]
    result = cli(*words[1:])
    assert result.exit_code == 0, result.output
    return result


# Before the work begins

REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"push_to_hub": "alice/a--b"}, "'alice/a--b' is no name that the hub allows"),
    "no token": ({"token": None}, f"pushing to {REPO} takes a token and there is none; make one that may write at"),
    "bad token": ({"token": "hf_wrong"}, "does not accept the token of --token (status 401); make one at"),
    "reader": ({"token": "hf_reader"}, "the token of --token may only read; give a --token that may write"),
    "fine": ({"token": "hf_fine"}, "the token of --token may not write to repositories of alice; give it that right"),
    "stranger": (
        {"push_to_hub": "bob/x"},
        "the token of --token belongs to alice, who cannot make bob/x; push to a repository of alice, lab, readers",
    ),
    "role": ({"push_to_hub": "readers/x"}, "alice may only read in readers; ask there for the role write, or push to"),
    "foreign": ({"push_to_hub": "bob/taken"}, "does not allow this to the token of --token (You don't have the rights"),
    "gated": ({"push_to_hub": "bob/hidden"}, "who cannot make bob/hidden"),
    "public": (
        {"push_to_hub": "alice/public", "private": True},
        "alice/public exists and is public; make it private in its settings, or push to another",
    ),
    "weights": (
        {"push_to_hub": "alice/full"},
        "alice/full holds other weights already (model.safetensors); push to another repository, or give "
        "--replace-weights",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_push_that_cannot_be_is_refused_before_the_work(
    server: HubServer, model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """No weight is read, nothing is written, and nothing on the hub is made or changed."""
    organizations = {"lab": "write", "readers": "read"}
    server.accounts = {
        TOKEN: Account(organizations=organizations),
        "hf_reader": Account(role="read"),
        "hf_fine": Account(role="fineGrained", scopes=("lab",), organizations=organizations),
    }
    server.add("bob/taken", {".gitattributes": b""})
    server.add("bob/hidden", {".gitattributes": b""}, private=True)
    server.add("alice/public", {".gitattributes": b""})
    server.add("alice/full", {"model.safetensors": b"other"})
    monkeypatch.setattr(ShardReader, "get", lambda *_: pytest.fail("a weight was read"))
    words, says = REFUSALS[case]
    asked = {"push_to_hub": REPO, "token": TOKEN, **words}
    with pytest.raises(QuantkitError) as caught:
        quantize(model_folder("llama"), tmp_path / "new", steps=["w8a8"], progress=False, **asked)
    assert says in str(caught.value)
    assert "hf_" not in str(caught.value)
    assert not (tmp_path / "new").exists()
    assert {method for method, _, _ in server.requests} <= {"GET", "HEAD"}


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("whoami", 500, "has an error of its own (status 500); run it again later"),
        ("whoami", 429, "is asked too often (status 429)"),
        ("/api/models", 503, "has an error of its own (status 503)"),
    ],
)
def test_a_hub_in_trouble_is_told_before_the_work(
    server: HubServer,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    impatient: list[float],
    path: str,
    status: int,
    says: str,
) -> None:
    server.fail("GET", path, status=status)
    with pytest.raises(QuantkitError, match="cannot push to alice/compressed") as caught:
        quantize(model_folder("llama"), tmp_path / "new", steps=["int8"], push_to_hub=REPO, token=TOKEN)
    assert says in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_offline_is_told_before_the_work(
    server: HubServer, model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(QuantkitError, match="HF_HUB_OFFLINE is set, and nothing can be pushed to the hub; unset it"):
        quantize(model_folder("llama"), tmp_path / "new", steps=["int8"], push_to_hub=REPO, token=TOKEN)


@pytest.mark.parametrize("token", ["hf_alice", "hf_fine", "hf_member"])
def test_tokens_that_may_write(server: HubServer, out: Path, token: str) -> None:
    server.accounts["hf_fine"] = Account("carol", role="fineGrained", scopes=("carol", "lab"))
    server.accounts["hf_member"] = Account("bob", organizations={"lab": "write"})
    repo = {"hf_alice": "alice/x", "hf_fine": "carol/x", "hf_member": "lab/x"}[token]
    push(out, repo, token=token, progress=False)
    assert contents(out).items() <= server.repositories["model", repo].files.items()


def test_a_mirror_that_cannot_say_who_may_write_is_believed_at_the_commit(server: HubServer, out: Path) -> None:
    server.add(REPO, {".gitattributes": b""})
    server.fail("GET", "auth-check/write", status=404)
    assert push(out, REPO, token=TOKEN, progress=False)["repo"] == REPO


# What arrives


def test_quantize_pushes_what_it_wrote(
    server: HubServer, model_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.add("org/source", model_folder("llama"))
    words: dict[str, Any] = {"push_to_hub": REPO, "private": True, "token": TOKEN, "commit_message": "As promised"}
    report = quantize("org/source", tmp_path / "new", steps=["int8:group=128"], **words)
    made = server.repositories["model", REPO]
    files = contents(tmp_path / "new")
    assert files.items() <= made.files.items()
    assert set(made.files) == {*files, ".gitattributes"}
    assert made.private
    assert made.messages == ["", "As promised"]
    pushed = report.pushed
    assert pushed is not None
    size = sum(map(len, files.values()))
    assert pushed["files"] == {name: len(content) for name, content in files.items()}
    assert (pushed["bytes"], pushed["commit"]) == (size, made.refs["main"])
    assert f"pushing {len(files)} files, {size:,} bytes, to {REPO}" in capsys.readouterr().err
    line = f"pushed     {len(files)} files, {size:,} bytes, to {server.endpoint}/{REPO} at commit {made.refs['main']}"
    assert line in report.to_text()
    front = yaml.safe_load(made.files["README.md"].decode().split("---\n")[1])
    assert front == {
        "library_name": "transformers",
        "base_model": "org/source",
        "base_model_relation": "quantized",
        "license": "mit",
        "tags": ["quantkit", "compressed-tensors", "int8"],
    }
    source = server.repositories["model", "org/source"].refs["main"]
    assert f"Made from `org/source` (commit `{source}`) by quantkit" in made.files["README.md"].decode()


def test_the_card_of_a_folders_model_names_no_path(server: HubServer, out: Path) -> None:
    push(out, REPO, token=TOKEN, progress=False)
    card = server.repositories["model", REPO].files["README.md"].decode()
    assert "/tmp" not in card
    assert "base_model" not in card


def test_a_name_alone_is_one_of_the_accounts_own(server: HubServer, out: Path) -> None:
    pushed = push(out, "compressed", token=TOKEN, progress=False)
    assert (pushed["repo"], pushed["url"]) == (REPO, f"{server.endpoint}/{REPO}")


def test_a_renamed_repository_is_followed(server: HubServer, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.add(REPO, {".gitattributes": b""})
    server.renamed["alice/old"] = REPO
    assert push(out, "alice/old", token=TOKEN, progress=False)["repo"] == REPO
    assert f"alice/old is called {REPO} now" in caplog.text


def test_hidden_files_stay(server: HubServer, out: Path) -> None:
    (out / ".cache").mkdir()
    (out / ".cache" / "x").write_text("x")
    (out / ".hidden").write_text("x")
    (out / "more").mkdir()
    (out / "more" / "note.txt").write_text("x")
    assert "more/note.txt" in push(out, REPO, token=TOKEN, progress=False)["files"]
    assert {".cache/x", ".hidden"}.isdisjoint(server.repositories["model", REPO].files)


def test_other_weights_make_room_only_when_asked(server: HubServer, out: Path) -> None:
    """Weights of an earlier checkpoint that stayed behind would be read together with these."""
    old = {"model-00001-of-00002.safetensors": b"1", "model-00002-of-00002.safetensors": b"2", "notes.txt": b"mine"}
    made = server.add(REPO, {**old, "model.safetensors.index.json": b"{}", "README.md": b"old"})
    sentence = refused(out, token=TOKEN)
    assert f"{REPO} holds other weights already (model-00001-of-00002.safetensors and 2 more)" in sentence
    assert len(made.commits) == 1
    pushed = push(out, REPO, token=TOKEN, replace_weights=True, progress=False)
    assert pushed["removed"] == sorted([*list(old)[:2], "model.safetensors.index.json"])
    assert made.files == {**contents(out), "notes.txt": b"mine"}
    assert list(made.commits) == [next(iter(made.commits)), pushed["commit"]]


def test_a_second_push_sends_only_what_changed(server: HubServer, out: Path) -> None:
    first = push(out, REPO, token=TOKEN, progress=False)
    assert push(out, REPO, token=TOKEN, progress=False)["commit"] == first["commit"]
    (out / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    server.requests.clear()
    assert push(out, REPO, token=TOKEN, progress=False)["commit"] != first["commit"]
    assert not server.asked("PUT", "")
    assert server.repositories["model", REPO].files["README.md"].endswith(b"# Mine\n")


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "all"])
def test_what_is_no_whole_checkpoint_is_not_sent(server: HubServer, out: Path, damage: str) -> None:
    if damage == "all":
        out = out / "nothing"
    else:
        (out / damage).unlink()
    with pytest.raises(QuantkitError, match=str(out)):
        push(out, REPO, token=TOKEN)
    assert not server.requests


# Uploads that fail


FAULTS: dict[str, tuple[tuple[str, str], dict[str, Any], str]] = {
    "make": (("POST", "/api/repos/create"), {"status": 403, "text": "over quota"}, "(over quota)"),
    "list": (("POST", "/preupload/"), {"status": 500}, "has an error of its own (status 500); run it again later"),
    "batch": (("POST", "/objects/batch"), {"status": 429}, "is asked too often (status 429)"),
    "store": (("PUT", "/storage/"), {"status": 503}, "has an error of its own (status 503)"),
    "verify": (("POST", "/objects/verify"), {"status": 403}, "does not allow this to the token of --token"),
    "card": (("POST", "/api/validate-yaml"), {"status": 500}, "has an error of its own (status 500)"),
    "commit": (("POST", "/commit/"), {"status": 502}, "has an error of its own (status 502)"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_an_upload_that_fails_loses_nothing_and_goes_on(
    server: HubServer,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    impatient: list[float],
    cli: Callable[..., Any],
    case: str,
) -> None:
    """OUT is whole; the command in the message, run when the hub is well again, brings all of it there."""
    (method, path), how, says = FAULTS[case]
    fault = server.fail(method, path, **how)
    target = tmp_path / "a folder"
    with pytest.raises(QuantkitError) as caught:
        quantize(model_folder("llama"), target, steps=["int8"], push_to_hub=REPO, token=TOKEN, progress=False)
    sentence = str(caught.value)
    assert f"{target} is whole but was not pushed to {REPO}: {server.endpoint}" in sentence
    assert says in sentence
    assert TOKEN not in sentence
    assert cli("inspect", target).exit_code == 0
    fault.times = 0
    already = set(server.objects)
    server.requests.clear()
    run_the_remedy(sentence, target, cli)
    assert contents(target).items() <= server.repositories["model", REPO].files.items()
    sent_again = {Path(path).name for method, path, _ in server.requests if method == "PUT"} & already
    assert not sent_again


def test_a_card_that_the_hub_refuses_is_mended_and_pushed(
    server: HubServer, out: Path, cli: Callable[..., Any]
) -> None:
    text = (out / "README.md").read_text()
    (out / "README.md").write_text(text.replace("license: mit", "license: unheard-of"))
    sentence = refused(out, token=TOKEN)
    assert "the hub refuses the first lines of README.md" in sentence
    assert "'unheard-of'" in sentence
    assert "model.safetensors" not in server.repositories["model", REPO].files
    (out / "README.md").write_text(text)
    run_the_remedy(sentence, out, cli)


def test_a_commit_that_lacks_something_is_noticed(
    server: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held against a hub that keeps another file than it was sent: shorter, or of the same length."""
    made = server.add(REPO, {".gitattributes": b""})
    commit = made.commit
    size = (out / "model.safetensors").stat().st_size
    for name, kept in {"tokenizer.json": b"cut", "model.safetensors": bytes(size)}.items():
        monkeypatch.setattr(made, "commit", lambda files, *words, new={name: kept}: commit({**files, **new}, *words))
        sentence = refused(out, token=TOKEN, replace_weights=True)
        assert f"{REPO} holds another file of {len(kept):,} bytes for {name}" in sentence


def test_a_commit_that_cannot_be_looked_at_is_told(server: HubServer, out: Path, impatient: list[float]) -> None:
    fault = server.fail("GET", "/api/models/.*/revision/", status=504)
    sentence = refused(out, token=TOKEN)
    made = server.repositories["model", REPO]
    assert f"{REPO} has it at commit {made.refs['main']}, but that could not be looked at" in sentence
    fault.times = 0
    assert push(out, REPO, token=TOKEN, progress=False)["commit"] == made.refs["main"]


def test_an_upload_that_is_interrupted_says_how_to_go_on(
    server: HubServer,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cli: Callable[..., Any],
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.create_commit", interrupt)
        result = cli("push", out, REPO, "--token", TOKEN, "--private")
    assert result.exit_code == 130
    said = next(record.getMessage() for record in caplog.records if "was not pushed" in record.getMessage())
    run_the_remedy(said, out, cli)
    assert server.repositories["model", REPO].private


def test_an_evaluation_that_fails_leaves_it_to_be_pushed(
    server: HubServer,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cli: Callable[..., Any],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise QuantkitError("on purpose")

    monkeypatch.setattr("quantkit.evaluation.evaluate", fail)
    (tmp_path / "text.txt").write_text("Some words, and others. " * 100)
    words = {"eval_dataset": str(tmp_path / "text.txt"), "seq_len": 32, "push_to_hub": REPO, "token": TOKEN}
    with pytest.raises(QuantkitError, match="evaluation failed: on purpose; it was not pushed") as caught:
        quantize(model_folder("llama"), tmp_path / "new", steps=["int8"], progress=False, **words)
    assert ("model", REPO) not in server.repositories
    run_the_remedy(str(caught.value), tmp_path / "new", cli)


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_the_bars_of_huggingface_hub_are_left_as_they_were(shown: bool, before: bool) -> None:
    from huggingface_hub import utils

    from quantkit.publishing import _bars

    hidden = utils.are_progress_bars_disabled()
    change = {True: utils.enable_progress_bars, False: utils.disable_progress_bars}
    try:
        change[before]()
        with _bars(shown):
            assert utils.are_progress_bars_disabled() is not shown
        assert utils.are_progress_bars_disabled() is not before
    finally:
        change[not hidden]()


# Through the command line


def test_from_the_hub_and_back_and_loaded_from_there(
    server: HubServer, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A child process with nothing but the environment; then the model is loaded from the hub by its name."""
    server.add("org/source", model_folder("llama"))
    code = "from quantkit.cli import main; main()"
    target = tmp_path / "new"
    words = ["quantize", "org/source", "-o", str(target), "-m", "w8a8", "--push-to-hub", REPO, "--json"]
    ran = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment(server.endpoint, tmp_path / "child", HF_TOKEN=TOKEN),
    )
    assert ran.returncode == 0, ran.stderr
    files = contents(target)
    assert json.loads(ran.stdout)["pushed"]["files"] == {name: len(content) for name, content in files.items()}
    snapshot = next((tmp_path / "child" / "hub" / "models--org--source" / "snapshots").iterdir())
    assert contents(snapshot) == contents(model_folder("llama"))
    assert any(line.startswith("downloading org/source: 2/2 MB") for line in ran.stderr.splitlines()), ran.stderr
    label = f"pushing {len(files)} files, {sum(map(len, files.values())):,} bytes, to {REPO}: "
    assert any(line.startswith(label) for line in ran.stderr.splitlines()), ran.stderr
    ids = torch.arange(24).reshape(1, 24)
    with torch.no_grad():
        here, there = load(target)(ids).logits, load(REPO, cache_dir=str(tmp_path / "cache"))(ids).logits
    assert torch.equal(here, there)
