"""What other software loses on a checkpoint that users have, as a ceiling for what we may lose.

stories3M, the first 120,000 characters of the TinyStories validation text. Calibration: the first half of their tokens;
evaluation: the second half; both in 60 windows of 256. KL divergence from the float model, of the same weights and
tokens in the other software: llm-compressor 0.14 (W8A8, SmoothQuant with W8A8, FP8 static and dynamic), bitsandbytes
0.50 (LLM.int8).
"""

import json
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.checkpoint import load_tokenizer
from quantkit.texts import Texts, tokenize

CEILINGS: dict[str, tuple[list[str], float, str]] = {
    "w8a8": (["w8a8"], 5.8e-3, "llm-compressor 5.8e-3"),
    "fp8": (["fp8"], 2.6e-2, "llm-compressor 2.6e-2"),
    "smoothquant+w8a8": (["smoothquant:alpha=0.5", "w8a8"], 5.2e-3, "llm-compressor 6.2e-3"),
    "smoothquant-auto+w8a8": (["smoothquant:alpha=auto", "w8a8"], 3.8e-3, "no other to compare with"),
    "llm-int8": (["llm-int8"], 3.4e-3, "bitsandbytes 3.4e-3"),
    "fp8-static": (["fp8:scheme=static"], 3.0e-2, "llm-compressor 3.0e-2"),
}
"""Steps, the most that we may lose, and what others lose."""


@pytest.fixture(scope="module")
def real(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Texts]:
    """The float model, the rows to calibrate on, and the tokens to evaluate on."""
    folder = data / "models" / "stories3M"
    text = (data / "text/tinystories/tinystories_val.txt").read_text(encoding="utf-8")[:120_000]
    ids = tokenize(Texts("stories", "text", "", documents=(text,)), load_tokenizer(folder)).ids
    half = len(ids) // 2
    rows = tmp_path_factory.mktemp("calibration") / "first_half.jsonl"
    rows.write_text(json.dumps({"input_ids": ids[:half].tolist()}) + "\n", encoding="utf-8")
    return folder, rows, Texts("second half", "tokens", "", token_ids=ids[half:])


@pytest.mark.parametrize("name", CEILINGS)
def test_loses_no_more_than_other_software(name: str, real: tuple[Path, Path, Texts], tmp_path: Path) -> None:
    folder, rows, tokens = real
    steps, ceiling, theirs = CEILINGS[name]
    observes = name.startswith("smoothquant") or "static" in name
    data: dict[str, Any] = {"dataset": f"{rows}:input_ids", "samples": 60, "seq_len": 256} if observes else {}
    report = quantkit.quantize(folder, tmp_path / "out", steps=steps, progress=False, **data)
    if observes:
        assert report.recipe["dataset"]["windows"] == 60
    result = quantkit.evaluate(tmp_path / "out", tokens, baseline=folder, seq_len=256, progress=False)
    assert result["protocol"] == "60 windows of 256 tokens that don't overlap"
    assert result["baseline_perplexity"] == pytest.approx(4.6306, abs=5e-4)
    print(f"{name}: KL {result['kl_mean']:.3e}, {theirs}")  # noqa: T201
    assert result["kl_mean"] <= ceiling
