"""The memory that compressing takes, foreseen and measured: the figures of docs/memory.md.

    python tests/oracles/memory_of_compressing.py [--blocks 5 21 64] [--plot docs/images/memory.svg] [--json]
    python tests/oracles/memory_of_compressing.py --recipes [--json]

A bf16 Llama with blocks of 94 MB (hidden 2048, intermediate 5632, 16 heads, 8 key-value heads, vocabulary 512) is
written with 5, 21 and 64 blocks: about 0.5, 2 and 6 GB, and up to 9 GB on disk with the result. Each is compressed by
SmoothQuant and W8A8 on 16 windows of 256 tokens. With --recipes the smallest is compressed by several recipes instead,
on 32 windows of 256 tokens, and under limits. Every run is a process of its own, and the figures are those of its
report. The plot needs matplotlib.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 512,
}
SAMPLES, SEQ_LEN = 16, 256
BOTH = ["smoothquant", "w8a8"]
RECIPES: list[tuple[list[str], str | None]] = [
    (["fp8"], None),
    (["w8a8:weight_range=mse"], None),
    (["int8:group=128,weight_range=mse"], None),
    (["int4"], None),
    (BOTH, None),
    (["smoothquant:alpha=auto", "w8a8"], None),
    (["w8a8:activation=tensor-static"], None),
    (["llm-int8:outlier_weight=float"], None),
    (BOTH, "1090MB"),
    (BOTH, "1040MB"),
]
"""Recipes, and the limits that they are given."""


def make_model(folder: Path, blocks: int) -> int:
    """Write a model, block by block, and rows of token ids beside it; the bytes of its weights."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=blocks, tie_word_embeddings=False)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in transformers.LlamaForCausalLM(config).named_parameters()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if name.startswith("model.layers.") else "outside"
        parts.setdefault(part, []).append(name)
    generator = torch.Generator().manual_seed(0)
    weight_map, total = {}, 0
    for part, names in parts.items():
        tensors = {}
        for name in names:
            value = torch.ones(shapes[name]) if len(shapes[name]) == 1 else torch.empty(shapes[name])
            if value.ndim > 1:
                value.normal_(0.0, 0.02, generator=generator)
            tensors[name] = value.to(torch.bfloat16)
            total += tensors[name].nbytes
        save_file(tensors, folder / f"{part}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, f"{part}.safetensors")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    rows = torch.randint(3, SIZES["vocab_size"], (32, SEQ_LEN), generator=generator).tolist()
    lines = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows)
    (folder.parent / "tokens.jsonl").write_text(lines, encoding="utf-8")
    return total


def run(folder: Path, steps: list[str], limit: str | None, windows: tuple[int, int], threads: int) -> dict[str, Any]:
    """What compressing a model took, by its report."""
    out = folder.parent / "out"
    command = [sys.executable, "-m", "quantkit", "quantize", str(folder), "-o", str(out), "--json", "--quiet"]
    command += [word for step in steps for word in ("-m", step)] + ([] if limit is None else ["--max-memory", limit])
    command += [
        "--dataset",
        str(folder.parent / "tokens.jsonl"),
        "--samples",
        str(windows[0]),
        "--seq-len",
        str(windows[1]),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(ran.stderr[-4000:])
    report = json.loads(ran.stdout)
    shutil.rmtree(out)
    found = {key: report[key] for key in ("peak_memory_bytes", "predicted_memory_bytes", "seconds")}
    sys.stderr.write(f"{', '.join(steps)}: {found}\n")
    return found


def curve(blocks: Sequence[int], threads: int) -> list[dict[str, Any]]:
    """What models of so many blocks took."""
    found = []
    for count in blocks:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            size = make_model(folder, count)
            taken = run(folder, BOTH, None, (SAMPLES, SEQ_LEN), threads)
        found.append({"model": f"{count} blocks, {size / 1e6:,.0f} MB", "model_bytes": size} | taken)
    return found


def recipes(threads: int) -> list[dict[str, Any]]:
    """What the recipes took."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        make_model(folder, 5)
        return [
            {"model": ", ".join(steps) + (f", --max-memory {limit}" if limit else "")}
            | run(folder, steps, limit, (32, 256), threads)
            for steps, limit in RECIPES
        ]


def table(found: list[dict[str, Any]]) -> str:
    """The rows of docs/memory.md."""
    lines = ["| run | foreseen, MB | measured, MB | foreseen / measured | seconds |", "| --- | --- | --- | --- | --- |"]
    for row in found:
        peak, predicted = row["peak_memory_bytes"], row["predicted_memory_bytes"]
        figures = f"{predicted / 1e6:,.0f} | {peak / 1e6:,.0f} | {predicted / peak:.2f} | {row['seconds']:.0f}"
        lines.append(f"| {row['model']} | {figures} |")
    return "\n".join(lines) + "\n"


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Draw peak and prediction over the model's size."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "quantkit"  # the same figures give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    sizes = [row["model_bytes"] / 1e9 for row in found]
    axes.plot(sizes, sizes, ":", color="gray", label="the model")
    axes.plot(sizes, [row["predicted_memory_bytes"] / 1e9 for row in found], "--s", label="predicted peak")
    axes.plot(sizes, [row["peak_memory_bytes"] / 1e9 for row in found], "-o", label="measured peak (VmHWM)")
    axes.set(xlabel="bytes of weights, GB", ylabel="memory, GB", title="SmoothQuant + W8A8, blocks of 94 MB")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="The memory that compressing takes, foreseen and measured.")
    parser.add_argument("--blocks", type=int, nargs="+", default=[5, 21, 64], help="blocks of each model (5 21 64)")
    parser.add_argument("--recipes", action="store_true", help="several recipes on the smallest model instead")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (2)")
    parser.add_argument("--plot", type=Path, help="draw the curve to this file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    found = recipes(options.threads) if options.recipes else curve(options.blocks, options.threads)
    if options.plot:
        plot(found, options.plot)
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if options.json else table(found))


if __name__ == "__main__":
    main()
