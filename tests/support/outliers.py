"""Copies of real models with the same function and outlier channels, as large language models have them.

A few channels of every norm's gain are multiplied by a power of two, and the columns of the weights that read them
divided by it. Products of floats keep every bit under that, so the copy's logits are the model's own; but its
activations have a few channels many times as large as the rest, which is what makes large models hard to quantize
(Dettmers et al. 2022, arXiv:2208.07339; Xiao et al. 2022, arXiv:2211.10438). Which parameters go together is found by
quantkit's discovery, so any model with a norm that folds will do.

    python tests/support/outliers.py MODEL --text SPEC --calibration SPEC

prints what each recipe loses on the model and on such a copy (docs/outliers.md).
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.checkpoint import Hub, open_folder
from quantkit.discovery import Group, apply_group
from quantkit.exploration import explore

FACTORS = (32.0, 64.0)
"""What the outlier channels are multiplied by, in turn."""
CHANNELS = 8
"""Outlier channels of each norm."""

RECIPES: dict[str, list[str]] = {
    "w8a8, one static scale": ["w8a8:activation=tensor-static"],
    "w8a8, a scale a token": ["w8a8"],
    "smoothquant + w8a8, a scale a token": ["smoothquant:alpha=0.5", "w8a8"],
    "int8 weights only": ["int8"],
    "llm-int8 in bitsandbytes' format": ["llm-int8"],
    "llm-int8, outlier columns in float": ["llm-int8:outlier_weight=float"],
}
SAMPLES, SEQ_LEN, MAX_TOKENS = 32, 256, 8192
"""Calibration windows, tokens of a window, and tokens to evaluate on."""


def outlier_copy(
    model: Path, output: Path, factors: Sequence[float] = FACTORS, channels: int = CHANNELS, seed: int = 0
) -> dict[str, dict[int, float]]:
    """By the full name of a norm's gain the channels that were made outliers, each with its factor.

    The copy is written to `output`.

    Args:
        model: a folder with a float model.
        output: a folder that doesn't exist yet.
        factors: powers of two, for the chosen channels in turn.
        channels: how many channels of each norm.
        seed: of their choice.

    Raises:
        ValueError: the model has no norm that folds.
    """
    findings = explore(open_folder(model, Hub()).skeleton)
    made: nn.Module = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, dict[int, float]] = {}
    for number, structure in findings.structures.items():
        name = f"{findings.blocks}.{number}"
        for group in (group for group in structure.groups if group.kind == "norm"):
            picked = torch.randperm(group.channels, generator=generator)[:channels].tolist()
            outliers = {channel: factors[place % len(factors)] for place, channel in enumerate(picked)}
            put_outliers(made.get_submodule(name), group, outliers)
            chosen[f"{name}.{group.name}"] = outliers
    if not chosen:
        raise ValueError(f"{model} has no norm whose channels can be scaled")
    shutil.copytree(model, output, ignore=shutil.ignore_patterns("*.safetensors*"))
    made.save_pretrained(output)
    return chosen


def put_outliers(block: nn.Module, group: Group, outliers: dict[int, float]) -> None:
    """Multiply these channels of a group's producers by their factors, and divide the columns that read them."""
    scale = torch.ones(group.channels)
    for channel, factor in outliers.items():
        scale[channel] = 1 / factor
    names = {edit.parameter for edit in (*group.producers, *group.consumers)}
    with torch.no_grad():
        for path, value in apply_group({path: block.get_parameter(path) for path in names}, group, scale).items():
            block.get_parameter(path).copy_(value)


def losses(
    model: Path, text: str, calibration: str, folder: Path, max_tokens: int = MAX_TOKENS
) -> dict[str, dict[str, Any]]:
    """By recipe what `evaluate` says of the compressed model on a text, the float model being its baseline.

    Args:
        model: a folder with a float model.
        text: the SPEC of the text to evaluate on.
        calibration: that of the text to calibrate on.
        folder: takes the compressed models, under numbers.
        max_tokens: how many of its tokens are read.
    """
    found = {}
    for number, (name, steps) in enumerate(RECIPES.items()):
        output = folder / str(number)
        observes = any(word in step for step in steps for word in ("smoothquant", "static", "float"))
        data = {"dataset": calibration, "samples": SAMPLES, "seq_len": SEQ_LEN} if observes else {}
        report = quantkit.quantize(model, output, steps=steps, progress=False, **data)
        found[name] = quantkit.evaluate(
            output, text, baseline=model, seq_len=SEQ_LEN, max_tokens=max_tokens, progress=False
        )
        found[name]["format"] = report.format
    return found


def table(model: Path, text: str, calibration: str) -> str:
    """The losses on a model and on its copy, as a Markdown table."""
    lines = ["| recipe | as it is | with outliers |", "| --- | ---: | ---: |"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        outlier_copy(model, folder / "copy")
        plain = losses(model, text, calibration, folder / "plain")
        large = losses(folder / "copy", text, calibration, folder / "large")
    first = next(iter(RECIPES))
    floats = (f"{result[first]['baseline_perplexity']:.3f}" for result in (plain, large))
    lines.append(f"| float | {' | '.join(floats)} |")
    for name in RECIPES:
        cells = (f"{each[name]['perplexity']:.3f} ({_change(each[name])})" for each in (plain, large))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _change(result: dict[str, Any]) -> str:
    """The change of the perplexity in percent, or how many times as large it is."""
    ratio = result["perplexity"] / result["baseline_perplexity"]
    return f"{ratio:.1f} times" if ratio >= 2 else f"{100 * (ratio - 1):+.2f} %"


def main() -> None:
    """Print the table of a model."""
    parser = argparse.ArgumentParser(description="What recipes lose on a model, and on a copy with outlier channels.")
    parser.add_argument("model", type=Path, help="a folder with a float model")
    parser.add_argument("--text", required=True, help="the SPEC of the text to evaluate on")
    parser.add_argument("--calibration", required=True, help="the SPEC of the text to calibrate on")
    given = parser.parse_args()
    sys.stdout.write(table(given.model, given.text, given.calibration) + "\n")


if __name__ == "__main__":
    main()
