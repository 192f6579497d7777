"""A model whose folder holds its own code: refused in one sentence, and with --trust-remote-code like any other."""

import ast
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import tiny
import torch
import unseen

from quantkit import evaluate, load, quantize
from quantkit.errors import CheckpointError

FILES = ("configuration_drift.py", "modeling_drift.py")
TEXT = "The quick brown fox jumps over the lazy dog, and back. " * 40
IDS = torch.randint(32, 250, (2, 16), generator=torch.Generator().manual_seed(0))


def write_code(folder: Path) -> None:
    """The model's code in two files, as folders have it: the configuration's, and the model's, which imports it."""
    code = Path(unseen.__file__).read_text(encoding="utf-8")
    body = ast.parse(code).body
    config = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == "DriftConfig")
    lines = code.splitlines(keepends=True)
    one, rest = lines[config.lineno - 1 : config.end_lineno], lines[: config.lineno - 1] + lines[config.end_lineno :]
    head = "from typing import Any\n\nfrom transformers import PreTrainedConfig\n\n\n"
    (folder / FILES[0]).write_text(head + "".join(one), encoding="utf-8")
    modeling = "".join(rest).replace(
        "from torch import Tensor", "from .configuration_drift import DriftConfig\nfrom torch import Tensor"
    )
    (folder / FILES[1]).write_text(modeling, encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where transformers copies a folder's code to and imports it from."""
    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(str(folder))
        yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the float model and its code; nothing in this process knows the model's name."""
    folder = tmp_path_factory.mktemp("remote") / "model"
    model = unseen.DriftForCausalLM(unseen.DriftConfig()).float()
    tiny.randomize(model)
    models.save(model.eval(), folder)
    write_code(folder)
    auto_map = {
        "AutoConfig": "configuration_drift.DriftConfig",
        "AutoModelForCausalLM": "modeling_drift.DriftForCausalLM",
    }
    return models.change_config(folder, auto_map=auto_map)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def floats() -> torch.Tensor:
    model = unseen.DriftForCausalLM(unseen.DriftConfig()).float()
    tiny.randomize(model)
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(IDS).logits
    return logits


def error(model: Any) -> float:
    expected = floats()
    with torch.inference_mode():
        logits = model(IDS).logits
    return float((logits - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm())


@pytest.mark.parametrize("command", ["quantize", "plan", "eval", "generate"])
def test_it_is_refused_in_one_sentence(
    command: str, source: Path, text: Path, copies: Path, mistake: Callable[..., str], tmp_path: Path
) -> None:
    folder = models.copy(source, tmp_path / "untrusted")
    words: dict[str, list[Any]] = {
        "quantize": ["-o", tmp_path / "out", "-m", "w8a8"],
        "plan": ["-m", "w8a8"],
        "eval": ["--dataset", text, "--seq-len", 16],
        "generate": ["--prompt", "ab"],
    }
    mistake(command, folder, *words[command], says=(str(folder), "--trust-remote-code"))
    assert not (tmp_path / "out").exists()
    assert not list(copies.rglob("untrusted*"))


def test_what_is_made_of_it_is_refused_as_well(source: Path, mistake: Callable[..., str], tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", steps=["int8"], trust_remote_code=True, progress=False)
    for words in (["inspect"], ["quantize", "-o", tmp_path / "two", "-m", "int8", "--dequantize"]):
        mistake(words[0], tmp_path / "out", *words[1:], says=(str(tmp_path / "out"), "--trust-remote-code"))
    again = tmp_path / "two"
    quantize(tmp_path / "out", again, steps=["int8"], dequantize=True, trust_remote_code=True, progress=False)
    assert error(load(again, trust_remote_code=True)) < 0.03


def test_from_python_as_well(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="trust"):
        quantize(source, tmp_path / "out", steps=["int8"], progress=False)
    with pytest.raises(CheckpointError, match="trust"):
        load(source)


@pytest.mark.parametrize(
    ("steps", "bound"), [(["smoothquant", "w8a8"], 0.05), (["int8"], 0.03), (["fp8"], 0.16), (["llm-int8"], 0.05)]
)
def test_with_trust_it_is_quantized_loaded_and_evaluated(
    steps: list[str], bound: float, source: Path, text: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / f"trusted-{steps[-1]}"
    data = ["--dataset", text, "--samples", 8] if len(steps) > 1 else []
    words = [word for step in steps for word in ("-m", step)]
    other = tmp_path / "other.txt"
    other.write_text("Some other words than those before, and some more of them. " * 10, encoding="utf-8")
    result = cli(
        "quantize",
        source,
        "-o",
        out,
        *words,
        *data,
        "--eval-dataset",
        other,
        "--seq-len",
        16,
        "--trust-remote-code",
        "--json",
    )
    assert result.exit_code == 0, result.stderr
    assert 0 < json.loads(result.stdout)["evaluation"]["kl_mean"] < 0.02
    for name in FILES:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((out / "config.json").read_text())["auto_map"]["AutoConfig"] == "configuration_drift.DriftConfig"
    with pytest.raises(CheckpointError, match="trust"):
        load(out)
    model = load(out, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    assert 1e-3 < error(model) < bound
    measured = evaluate(out, other, baseline=source, seq_len=32, trust_remote_code=True, progress=False)
    assert 0 < measured["kl_mean"] < 0.02
    checked = cli("inspect", out, "--trust-remote-code")
    assert checked.exit_code == 0, checked.stderr


def test_a_model_in_memory_of_such_code_is_quantized(source: Path, tmp_path: Path) -> None:
    model = load(source, trust_remote_code=True)
    report = quantize(model, tmp_path / "out", steps=["int8"], progress=False)
    again = quantize(source, tmp_path / "two", steps=["int8"], trust_remote_code=True, progress=False)
    assert report.layers == again.layers
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_a_model_in_memory_needs_no_name(source: Path, tmp_path: Path) -> None:
    """Its class is registered nowhere."""

    class Unnamed(unseen.DriftForCausalLM):
        pass

    model = Unnamed(unseen.DriftConfig()).float()
    tiny.randomize(model)
    report = quantize(model.eval(), tmp_path / "out", steps=["int8"], progress=False)
    quantize(source, tmp_path / "two", steps=["int8"], trust_remote_code=True, progress=False)
    assert report.notes == []
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
