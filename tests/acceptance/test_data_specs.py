"""What --dataset takes for calibration, through the command line: every SPEC, and every mistake with one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import models
import pytest

from quantkit import evaluate, quantize
from quantkit.errors import DataError

STEPS = ("-m", "smoothquant", "-m", "w8a8")
SIZES = ("--samples", 6, "--seq-len", 16)
ROWS = [f"The quick brown fox number {number} jumps over {number} lazy dogs, and back. " * 3 for number in range(9)]
JOINED = "\n\n".join(ROWS)
OTHER = "Some other words than those before, and some more of them. " * 10


def token_ids() -> list[int]:
    """The tokens of the joined rows, as the tiny models' tokenizer has them."""
    ids: list[int] = models.tokenizer()(JOINED)["input_ids"]
    return ids


def conversation(text: str) -> list[dict[str, str]]:
    """Two messages that the tiny template renders as the text."""
    return [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[20:]}]


def write_txt(folder: Path) -> list[Any]:
    (folder / "rows.txt").write_text(JOINED, encoding="utf-8")
    return [folder / "rows.txt"]


def write_jsonl(folder: Path) -> list[Any]:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS), encoding="utf-8")
    return [folder / "rows.jsonl"]


def write_field(folder: Path) -> list[Any]:
    lines = "".join(json.dumps({"text": "not this", "story": row}) + "\n" for row in ROWS)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    return [f"{folder / 'rows.jsonl'}:story"]


def write_chat(folder: Path) -> list[Any]:
    lines = "".join(json.dumps({"messages": conversation(row)}) + "\n" for row in ROWS)
    (folder / "chat.jsonl").write_text(lines, encoding="utf-8")
    return [folder / "chat.jsonl"]


def write_json(folder: Path) -> list[Any]:
    (folder / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    return [folder / "rows.json"]


def write_parquet(folder: Path) -> list[Any]:
    datasets.Dataset.from_dict({"text": ROWS, "other": list(range(len(ROWS)))}).to_parquet(folder / "rows.parquet")
    return [folder / "rows.parquet"]


def write_saved(folder: Path) -> list[Any]:
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(folder / "saved")
    return [folder / "saved"]


def write_splits(folder: Path) -> list[Any]:
    """The training split is what one calibrates on."""
    made = {"train": datasets.Dataset.from_dict({"text": ROWS}), "test": datasets.Dataset.from_dict({"text": ["no"]})}
    datasets.DatasetDict(made).save_to_disk(folder / "splits")
    return [folder / "splits"]


def write_tokens(folder: Path) -> list[Any]:
    ids = token_ids()
    rows = [ids[start : start + 50] for start in range(0, len(ids), 50)]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(folder / "tokens")
    return [folder / "tokens"]


def write_known(folder: Path) -> list[Any]:
    (folder / "sets/ptb").mkdir(parents=True)
    lines = "".join(json.dumps({"text": row}) + "\n" for row in ROWS)
    (folder / "sets/ptb/ptb_train.jsonl").write_text(lines, encoding="utf-8")
    (folder / "sets/ptb/ptb_test.jsonl").write_text(json.dumps({"text": "no"}) + "\n", encoding="utf-8")
    return ["ptb", "--data-dir", folder / "sets"]


SPECS: dict[str, Callable[[Path], list[Any]]] = {
    "txt": write_txt,
    "jsonl": write_jsonl,
    "a field of jsonl": write_field,
    "conversations": write_chat,
    "json": write_json,
    "parquet": write_parquet,
    "a saved folder": write_saved,
    "a saved folder with splits": write_splits,
    "rows of tokens": write_tokens,
    "a known name": write_known,
}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]) -> Path:
    """What the plain text gives."""
    folder = tmp_path_factory.mktemp("calibrated")
    quantize(
        model_folder("llama"),
        folder / "out",
        steps=["smoothquant", "w8a8"],
        dataset=str(write_txt(folder)[0]),
        samples=6,
        seq_len=16,
        progress=False,
    )
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", SPECS)
def test_every_spec_gives_what_the_same_text_gives(
    kind: str, calibrated: Path, model_folder: Callable[[str], Path], cli: Callable[..., Any], tmp_path: Path
) -> None:
    """Bit for bit: the tokens are the same, and so are the windows that the seed chooses."""
    words = SPECS[kind](tmp_path)
    result = cli("quantize", model_folder("llama"), "-o", tmp_path / "out", *STEPS, *SIZES, "--dataset", *words)
    assert result.exit_code == 0, result.stderr
    assert weights(tmp_path / "out") == weights(calibrated / "out")
    recipe = json.loads((tmp_path / "out/quantkit_recipe.json").read_text())
    assert recipe["dataset"]["windows"] == 6
    assert recipe["dataset"]["seq_len"] == 16
    assert recipe["dataset"]["fingerprint"].startswith("sha256:")


def test_rows_of_tokens_need_no_tokenizer(
    calibrated: Path,
    model_folder: Callable[[str], Path],
    cli: Callable[..., Any],
    mistake: Callable[..., str],
    tmp_path: Path,
) -> None:
    folder = models.copy(model_folder("llama"), tmp_path / "model")
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    words = ["quantize", folder, "-o", tmp_path / "out", *STEPS, *SIZES, "--dataset"]
    mistake(*words, *write_txt(tmp_path), says=("no tokenizer", "input_ids"))
    result = cli(*words, *write_tokens(tmp_path))
    assert result.exit_code == 0, result.stderr
    assert weights(tmp_path / "out") == weights(calibrated / "out")


def test_the_seed_decides(
    calibrated: Path, model_folder: Callable[[str], Path], cli: Callable[..., Any], tmp_path: Path
) -> None:
    spec = write_txt(tmp_path)
    for number, seed in enumerate((0, 0, 1, 2, 2)):
        out = tmp_path / f"out{number}"
        result = cli("quantize", model_folder("llama"), "-o", out, *STEPS, *SIZES, "--dataset", *spec, "--seed", seed)
        assert result.exit_code == 0, result.stderr
    made = [weights(tmp_path / f"out{number}") for number in range(5)]
    assert made[0] == made[1] == weights(calibrated / "out")
    assert made[3] == made[4]
    assert len(set(made)) == 3


def test_a_search_is_seeded_as_well(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    spec = str(write_txt(tmp_path)[0])
    for name in ("one", "two"):
        steps = ["smoothquant:alpha=auto", "fp8:scheme=static,activation_range=percentile"]
        words: dict[str, Any] = {"dataset": spec, "samples": 4, "seq_len": 16, "progress": False}
        quantize(model_folder("llama"), tmp_path / name, steps=steps, **words)
    for path in (tmp_path / "one").iterdir():
        if path.name != "quantkit_report.json":
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


# Mistakes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], ("smoothquant", "--dataset SPEC")),
        (["--dataset", "{}/none.txt"], ("none.txt", "doesn't exist")),
        (["--dataset", "nothing"], ("'nothing' is no known data set", "org/name")),
        (["--dataset", "{}/rows.jsonl:none"], ("no field 'none'", "text, story")),
        (["--dataset", "{}/short.txt"], ("short.txt has 9 tokens", "--seq-len")),
        (["--dataset", "{}/empty.txt"], ("empty.txt",)),
        (["--dataset", "{}/rows.csv"], (".csv", ".jsonl")),
        (["--dataset", "{}/large.jsonl"], ("token id 300", "vocabulary of 260")),
        (["--dataset", "{}/long.txt", "--seq-len", "65"], ("seq_len is 65", "64 tokens")),
        (["--dataset", "ptb", "--data-dir", "{}/absent"], ("absent/ptb doesn't exist",)),
    ],
)
def test_mistakes(
    words: list[str],
    says: tuple[str, ...],
    model_folder: Callable[[str], Path],
    mistake: Callable[..., str],
    tmp_path: Path,
) -> None:
    write_field(tmp_path)
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    (tmp_path / "long.txt").write_text(JOINED, encoding="utf-8")
    (tmp_path / "rows.csv").write_text("text\nwords\n", encoding="utf-8")
    (tmp_path / "large.jsonl").write_text(json.dumps({"input_ids": [300] * 64}) + "\n", encoding="utf-8")
    before = {path.name for path in tmp_path.iterdir()}
    filled = [word.format(tmp_path) for word in words]
    mistake("quantize", model_folder("llama"), "-o", tmp_path / "out", *STEPS, *filled, says=says)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_too_few_windows_are_told_and_data_that_nothing_observes_too(
    model_folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture, cli: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "little.txt").write_text("x" * 70, encoding="utf-8")
    spec = ["--dataset", tmp_path / "little.txt"]
    result = cli("quantize", model_folder("llama"), "-o", tmp_path / "few", *STEPS, *SIZES, *spec)
    assert result.exit_code == 0, result.stderr
    assert f"{tmp_path / 'little.txt'} holds 4 windows of 16 tokens, not 6" in caplog.text
    assert json.loads((tmp_path / "few/quantkit_recipe.json").read_text())["dataset"]["windows"] == 4
    caplog.clear()
    result = cli("quantize", model_folder("llama"), "-o", tmp_path / "unused", "-m", "w8a8", *spec)
    assert result.exit_code == 0, result.stderr
    assert "unused" in caplog.text
    assert json.loads((tmp_path / "unused/quantkit_recipe.json").read_text())["dataset"] is None


def test_warnings_reach_the_screen(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """In a process of its own, as a user sees them."""
    (tmp_path / "little.txt").write_text("x" * 70, encoding="utf-8")
    words = ["quantize", model_folder("llama"), "-o", tmp_path / "out", *STEPS, *SIZES, "--dataset"]
    program = [sys.executable, "-m", "quantkit", *map(str, words), tmp_path / "little.txt"]
    ran = subprocess.run(program, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "holds 4 windows of 16 tokens, not 6" in ran.stderr


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "a saved folder"])
def test_the_text_of_calibration_is_no_text_of_evaluation(
    kind: str, calibrated: Path, mistake: Callable[..., str], tmp_path: Path
) -> None:
    """Whatever file it comes in; another text is."""
    out, (spec,) = calibrated / "out", SPECS[kind](tmp_path)
    mistake("eval", out, "--dataset", spec, "--seq-len", 16, says=("calibrated with", "another split or file"))
    with pytest.raises(DataError, match="calibrated with"):
        evaluate(out, str(spec), seq_len=16, progress=False)
    other = tmp_path / "other.txt"
    other.write_text(OTHER, encoding="utf-8")
    assert evaluate(out, other, seq_len=16, progress=False)["perplexity"] > 1


def test_calibration_and_evaluation_in_one_command(
    model_folder: Callable[[str], Path], cli: Callable[..., Any], mistake: Callable[..., str], tmp_path: Path
) -> None:
    """On the same text it is refused before the work; else the result is in the report."""
    spec = write_txt(tmp_path)[0]
    words = ["quantize", model_folder("llama"), "-o", tmp_path / "out", *STEPS, *SIZES, "--dataset", spec]
    mistake(*words, "--eval-dataset", spec, says=("text to calibrate with", "another split or file"))
    assert not (tmp_path / "out").exists()
    other = tmp_path / "other.txt"
    other.write_text(OTHER, encoding="utf-8")
    result = cli(*words, "--eval-dataset", other, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert 0 < report["evaluation"]["kl_mean"] < 0.1
    assert report["evaluation"]["protocol"].endswith("windows of 16 tokens that don't overlap")
