"""`quantkit plan` of a model on the hub: headers are read by range; the server's log shows that no weight is."""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_server
import models
import pytest
import torch
from hub_client import asked_bytes, contents, environment, header_length, said
from hub_server import Account, HubServer
from safetensors.torch import save_file

from quantkit.checkpoint import Hub, open_folder, open_headers, resolve
from quantkit.errors import CheckpointError
from quantkit.headers import HeaderReader, NoPartsError
from quantkit.shards import ShardReader, parse_header

NAME = "org/tiny"
STEPS = ("-m", "w8a8")
SMOOTH = ("-m", "smoothquant", "-m", "w8a8")
WEIGHTS = r"/(storage|resolve)/.*\.safetensors"


def planned(cli: Callable[..., Any], model: object, *words: str) -> str:
    """The plan as --json prints it, without the model's name, and what hangs on the machine and on this process."""
    result = cli("plan", model, *words, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count(json.dumps(str(model))) == 1
    text = result.stdout.replace(json.dumps(str(model)), '"the model"')
    return re.sub(r'"(seconds|formula|host_bytes|in use now)": .*', "", text)


# What is fetched


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("llama_sharded", SMOOTH),
        ("llama_bf16", ("--recipe", "fp8-block", "--ignore", "*.k_proj", "--ignore", "*.v_proj")),
        ("llama_second_name", STEPS),
        ("llama_unused", ("-m", "int8:group=128")),
        ("opt_short_names", SMOOTH),
        ("gpt2", STEPS),
        ("mixtral", SMOOTH),
        ("gpt_oss", ("-m", "fp8")),
    ],
)
def test_the_plan_is_that_of_the_folder_and_no_weight_is_fetched(
    server: HubServer,
    model_folder: Callable[[str], Path],
    cli: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    kind: str,
    words: tuple[str, ...],
) -> None:
    """Byte for byte; the models include those whose tensors are renamed, merged and split while they are loaded."""
    folder = model_folder(kind)
    files = contents(folder)
    server.add(NAME, files)
    assert planned(cli, NAME, *words) == planned(cli, folder, *words)
    shards = [file for file in files if file.endswith(".safetensors")]
    assert (len(shards) > 1) == (kind == "llama_sharded")
    fetched = asked_bytes(server, files)
    assert fetched == sum(header_length(files[file]) for file in shards)
    small = {file for file in ("config.json", "model.safetensors.index.json") if file in files}
    got = {path.rpartition("/")[2] for method, path, _ in server.requests if method == "GET" and "/resolve/" in path}
    assert got == small | set(shards)
    assert not list(Path(resolve_cache()).rglob("*.safetensors"))
    fetched += sum(len(files[file]) for file in small)
    missing = sum(map(len, files.values())) - sum(len(files[file]) for file in small)
    line = next(line for line in said(caplog) if "bytes fetched" in line)
    assert f"{fetched:,} bytes fetched, {missing:,} bytes of its files are not here" in line


def resolve_cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def test_the_command_says_on_stderr_what_was_fetched(
    server: HubServer, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    files = contents(model_folder("llama"))
    server.add(NAME, files)
    ran = subprocess.run(
        [sys.executable, "-m", "quantkit", "plan", NAME, "-m", "w8a8"],
        env=environment(server.endpoint, tmp_path / "child"),
        capture_output=True,
        text=True,
        check=True,
    )
    size = header_length(files["model.safetensors"]) + len(files["config.json"])
    assert ran.stdout.startswith(f"{NAME}: w8a8")
    assert ran.stderr.count("\n") == 1
    assert f"quantkit: {NAME} is read at commit" in ran.stderr
    assert f"{size:,} bytes fetched" in ran.stderr
    asked_bytes(server, files)


def test_a_private_model_is_read_with_its_token_which_stays_at_the_hub(
    server: HubServer, model_folder: Callable[[str], Path], mistake: Callable[..., str], cli: Callable[..., Any]
) -> None:
    """The server refuses a request to its storage that carries a token."""
    files = contents(model_folder("llama"))
    server.add(NAME, files, private=True)
    server.accounts["hf_member"] = Account("bob", organizations={"org": "write"})
    mistake("plan", NAME, "-m", "w8a8", says=("no org/tiny that can be seen without a token", "--token"))
    assert cli("plan", NAME, "-m", "w8a8", "--token", "hf_member").exit_code == 0
    assert asked_bytes(server, files)
    assert all(each["authorization"] == "Bearer hf_member" for each in server.asked("GET", "/resolve/"))


def test_a_gated_model_and_a_wrong_revision_are_one_sentence(
    server: HubServer, model_folder: Callable[[str], Path], mistake: Callable[..., str]
) -> None:
    server.add(NAME, model_folder("llama"), gated=True)
    mistake("plan", NAME, "-m", "w8a8", says=("org/tiny is gated", "accept its terms"))
    mistake("plan", NAME, "-m", "w8a8", "--revision", "v9", says=("no revision 'v9'", "--revision"))
    assert not server.asked("GET", "/storage/")


def test_a_revision_is_taken_at_the_commit_that_it_is(
    server: HubServer, model_folder: Callable[[str], Path], cli: Callable[..., Any]
) -> None:
    made = server.add(NAME, model_folder("gpt2"))
    made.refs["old"] = made.refs["main"]
    made.commit(contents(model_folder("llama")))
    assert planned(cli, NAME, *STEPS, "--revision", "old") == planned(cli, model_folder("gpt2"), *STEPS)
    assert planned(cli, NAME, *STEPS) == planned(cli, model_folder("llama"), *STEPS)


def test_what_is_in_the_cache_is_used_and_serves_offline(
    server: HubServer,
    model_folder: Callable[[str], Path],
    cli: Callable[..., Any],
    mistake: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = model_folder("llama_sharded")
    server.add(NAME, folder)
    cli("plan", NAME, *STEPS)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    mistake("plan", NAME, *STEPS, says=("HF_HUB_OFFLINE is set", "in the cache"))  # a plan leaves no model there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    resolve(NAME, Hub(progress=False))
    server.requests.clear()
    caplog.clear()
    expected = planned(cli, folder, *STEPS)
    assert planned(cli, NAME, *STEPS) == expected
    assert not server.asked("GET", "/resolve/|/storage/")
    server.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert planned(cli, NAME, *STEPS) == expected
    assert not server.requests
    assert not said(caplog)


def test_a_snapshot_that_lacks_a_shard_is_completed_by_its_header(
    server: HubServer, model_folder: Callable[[str], Path], cli: Callable[..., Any]
) -> None:
    folder = model_folder("llama_sharded")
    files = contents(folder)
    server.add(NAME, files)
    place = resolve(NAME, Hub(progress=False))
    shard = sorted(file for file in files if file.endswith(".safetensors"))[1]
    (place / shard).unlink()
    server.requests.clear()
    assert planned(cli, NAME, *STEPS) == planned(cli, folder, *STEPS)
    assert asked_bytes(server, files) == header_length(files[shard])


def test_code_comes_along_only_when_it_is_trusted(
    server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[..., str],
    cli: Callable[..., Any],
) -> None:
    import tiny
    import unseen

    copies = tmp_path / "modules"
    copies.mkdir()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(copies))
    monkeypatch.syspath_prepend(str(copies))
    model = unseen.DriftForCausalLM(unseen.DriftConfig()).float()
    tiny.randomize(model)
    folder = tmp_path / "model"
    models.save(model.eval(), folder)
    shutil.copyfile(unseen.__file__, folder / "drift.py")
    auto_map = {"AutoConfig": "drift.DriftConfig", "AutoModelForCausalLM": "drift.DriftForCausalLM"}
    files = contents(models.change_config(folder, auto_map=auto_map))
    server.add(NAME, files)
    mistake("plan", NAME, *STEPS, says=("runs code of its own", "--trust-remote-code"))
    assert not server.asked("GET", r"\.py$")
    assert planned(cli, NAME, *STEPS, "--trust-remote-code") == planned(cli, folder, *STEPS, "--trust-remote-code")
    asked_bytes(server, files)
    assert not server.asked("GET", "token")
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


# Headers


def test_a_header_of_any_length_is_read_to_its_last_byte(
    server: HubServer, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of 8 bytes and the header nothing is guessed: one longer than what others read first (100 kB) takes no more."""
    folder = models.copy(model_folder("llama"), tmp_path / "long")
    extra = {f"left.over.{number:05d}.{'x' * 100}": torch.zeros(1) for number in range(1000)}
    models.change_tensors(folder, lambda tensors: tensors | extra)
    files = contents(folder)
    assert header_length(files["model.safetensors"]) > 150_000
    server.add(NAME, files)
    source = open_headers(NAME, Hub(progress=False))
    assert isinstance(source.weights, HeaderReader)
    found = ShardReader(folder).tensors
    assert list(source.weights.tensors) == list(found)
    assert all(
        (info.shape, info.dtype, info.path.name) == (found[key].shape, found[key].dtype, found[key].path.name)
        for key, info in source.weights.tensors.items()
    )
    assert source.weights.nbytes == ShardReader(folder).nbytes
    assert asked_bytes(server, files) == header_length(files["model.safetensors"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: b"", "it has 0 bytes"),
        (lambda content: content[:5], "it has 5 bytes"),
        (lambda content: content[:500], "its header would take"),
        (lambda content: content[:-1], "bytes for them|bytes, and the file has"),
        (lambda content: content + b"\0", "the file has"),
        (lambda content: b"\xff" * 8 + content[8:], "its header would take"),
        (lambda content: content[:8] + b"[" + content[9:], "on the hub is truncated or damaged"),
        (lambda content: content.replace(b'"F32"', b'"F31"', 1), "dtype F31"),
    ],
)
def test_a_damaged_shard_is_one_sentence(
    server: HubServer,
    model_folder: Callable[[str], Path],
    mistake: Callable[..., str],
    damage: Callable[[bytes], bytes],
    words: str,
) -> None:
    files = contents(model_folder("llama"))
    server.add(NAME, files | {"model.safetensors": damage(files["model.safetensors"])})
    sentence = mistake("plan", NAME, "-m", "w8a8", says=("model.safetensors of org/tiny", "truncated or damaged"))
    assert re.search(words, sentence)


def test_a_shard_or_a_tensor_that_the_index_names_in_vain_is_told(
    server: HubServer, model_folder: Callable[[str], Path]
) -> None:
    def refused() -> str:
        with pytest.raises(CheckpointError) as caught:
            open_headers(NAME, Hub(progress=False))
        return str(caught.value)

    files = contents(model_folder("llama_sharded"))
    index = json.loads(files["model.safetensors.index.json"])
    first, *_, last = sorted(set(index["weight_map"].values()))
    made = server.add(NAME, {name: content for name, content in files.items() if name != last})
    assert f"shard {last} is missing from org/tiny on the hub" in refused()
    moved = next(key for key, shard in index["weight_map"].items() if shard == last)
    index["weight_map"][moved] = first
    made.commit(files | {"model.safetensors.index.json": json.dumps(index).encode()})
    assert f"it lacks tensor {moved!r}" in refused()
    made.commit({name: content for name, content in files.items() if "safetensors" not in name})
    assert "holds no model.safetensors and no model.safetensors.index.json" in refused()
    made.commit({name: content for name, content in files.items() if name != "config.json"})
    assert "has no config.json on the hub" in refused()


def test_headers_are_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    """Every dtype, no elements, no axes; the oracle is what `ShardReader` has of the file."""
    tensors = {
        "a": torch.zeros(3, 4, dtype=torch.float8_e4m3fn),
        "B": torch.zeros((), dtype=torch.bfloat16),
        "empty": torch.zeros(0, 5, dtype=torch.int64),
        "Z": torch.zeros(2, dtype=torch.bool),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "ä": torch.zeros(2, 6, dtype=torch.float4_e2m1fn_x2),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    content = path.read_bytes()
    end = header_length(content)
    found = parse_header(content[8:end], path, len(content) - end)
    assert found == ShardReader(tmp_path).tensors
    assert list(found) == list(ShardReader(tmp_path).tensors)


def entry(begin: int, end: int, shape: Any = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 4), "b": entry(0, 4)},  # two in one place
        {"a": entry(0, 8, (2,)), "b": entry(4, 8)},
        {"a": entry(0, 4), "b": entry(5, 9)},  # a hole
        {"a": entry(0, 4)},  # too little
        {"a": entry(0, 12, (3,))},  # too much
        {"a": entry(0, 8, (3,))},
        {"a": entry(0, 8, (-2,))},
        {"a": entry(0, 8, (2.0,))},
        {"a": entry(0, 8, (True, 2))},
        {"a": entry(0, 8, "2")},
        {"a": entry(8, 0, (2,))},
        {"a": entry(0, 8, (2,), "F30")},
        {"a": entry(0, 8, (15,), "F4")},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": [1, 2]},
        [],
        "a",
        None,
    ],
)
def test_a_header_that_safetensors_would_refuse_is_refused(header: Any, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(CheckpointError):
        ShardReader(tmp_path)
    with pytest.raises(ValueError, match=r"."):
        parse_header(text, tmp_path, 8)


def test_a_header_nested_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nested"):
        parse_header(b'{"a":' * 100_000, tmp_path, 8)


# Servers that don't do as they are asked


def test_a_server_without_ranges_is_refused_and_nothing_is_downloaded(
    server: HubServer,
    model_folder: Callable[[str], Path],
    mistake: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its answer is left at once: of a file that is larger than a connection's buffers most is never sent."""
    sent: list[int] = []

    def whole(self: Any, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(content), 2**16):
            self.wfile.write(content[start : start + 2**16])
            sent.append(len(content[start : start + 2**16]))

    monkeypatch.setattr(hub_server._Handler, "_ranged", whole)
    files = contents(model_folder("llama"))
    files["model.safetensors"] += bytes(64 * 2**20)
    server.add(NAME, files)
    mistake("plan", NAME, "-m", "w8a8", says=("only as a whole", "hf download org/tiny", "HF_ENDPOINT"))
    assert len(server.asked("GET", "/storage/")) == 1
    assert sum(sent) < 32 * 2**20
    assert not list(Path(resolve_cache()).rglob("*.safetensors"))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(
    server: HubServer,
    model_folder: Callable[[str], Path],
    cli: Callable[..., Any],
    mistake: Callable[..., str],
    impatient: list[float],
    caplog: pytest.LogCaptureFixture,
    status: int,
) -> None:
    folder = model_folder("llama")
    server.add(NAME, folder)
    server.fail("GET", "/storage/", times=2, status=status, headers={"Retry-After": "5"})
    assert planned(cli, NAME, *STEPS) == planned(cli, folder, *STEPS)
    assert impatient == [5, 5]
    assert said(caplog)[:2] == [f"the hub answers {status}; asking again in 5 s"] * 2
    server.fail("GET", "/storage/", status=status)
    mistake("plan", NAME, *STEPS, says=("model.safetensors of org/tiny cannot be read", f"status {status}", "later"))


def test_a_connection_that_breaks_is_made_again(
    server: HubServer,
    model_folder: Callable[[str], Path],
    cli: Callable[..., Any],
    mistake: Callable[..., str],
    impatient: list[float],
) -> None:
    folder = model_folder("llama")
    files = contents(folder)
    server.add(NAME, files)
    server.fail("GET", "/storage/", times=2, cut=5)
    assert planned(cli, NAME, *STEPS) == planned(cli, folder, *STEPS)
    asked_bytes(server, files)
    server.fail("GET", "/storage/", cut=5)
    mistake("plan", NAME, *STEPS, says=("model.safetensors of org/tiny cannot be read", "run it again"))


def test_without_an_answer_the_cache_serves_or_the_reason_is_told(
    server: HubServer,
    model_folder: Callable[[str], Path],
    cli: Callable[..., Any],
    mistake: Callable[..., str],
    impatient: list[float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = model_folder("llama")
    server.add(NAME, folder)
    server.fail("GET", "/api/models", status=503)
    mistake("plan", NAME, *STEPS, says=("it is not in the cache", "status 503"))
    server.faults.clear()
    resolve(NAME, Hub(progress=False))
    server.fail("GET", "/api/models", status=503)
    assert planned(cli, NAME, *STEPS) == planned(cli, folder, *STEPS)
    assert any("is taken from the cache" in line for line in said(caplog))


# What needs a weight


def test_a_compressed_model_is_planned_as_far_as_headers_say_what_it_is(
    server: HubServer, compressed: Callable[..., Path], cli: Callable[..., Any], mistake: Callable[..., str]
) -> None:
    """Packed int8 stores its shapes as tensors: the plan needs them, and says so."""
    files = contents(compressed("w8a8"))
    server.add(NAME, files)
    mistake("plan", NAME, "-m", "int8", says=("is compressed already", "--dequantize"))
    words = ("-m", "int8", "--dequantize")
    assert planned(cli, NAME, *words) == planned(cli, compressed("w8a8"), *words)
    asked_bytes(server, files)
    packed = contents(compressed("int8"))
    server.add("org/packed", packed)
    says = ("weight_shape", "of org/packed are needed", "only the headers", "hf download org/packed")
    mistake("plan", "org/packed", "-m", "w8a8", "--dequantize", says=says)
    resolve("org/packed", Hub(progress=False))
    words = ("-m", "w8a8", "--dequantize")
    assert planned(cli, "org/packed", *words) == planned(cli, compressed("int8"), *words)


def test_a_weight_cannot_be_read_from_headers(server: HubServer, model_folder: Callable[[str], Path]) -> None:
    server.add(NAME, model_folder("llama"))
    source = open_headers(NAME, Hub(progress=False))
    with pytest.raises(NoPartsError, match=re.escape("'lm_head.weight' of org/tiny are needed")):
        source.weights.get("lm_head.weight")


def test_a_folder_is_opened_as_ever(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    assert open_headers(folder, Hub()).weights.tensors == open_folder(folder, Hub()).weights.tensors
    assert models.same(
        open_headers(folder, Hub()).weights.get("lm_head.weight"), models.read_tensors(folder)["lm_head.weight"]
    )
