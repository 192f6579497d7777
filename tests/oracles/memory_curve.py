"""How memory grows with a model's size: random models with equal blocks, compressed one after another.

    python tests/oracles/memory_curve.py [--blocks 5 21 64] [--plot docs/images/memory.svg] [--json]

A bf16 Llama with blocks of 94 MB (hidden 2048, intermediate 5632, 16 heads, 8 key-value heads, vocabulary 512) is
written with 5, 21 and 64 blocks: about 0.5, 2 and 6 GB, and up to 9 GB on disk with the result. Each is compressed by
SmoothQuant and W8A8 on 16 windows of 256 tokens in a process of its own; the figures are those of its report. The plot
needs matplotlib.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
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
    rows = torch.randint(3, SIZES["vocab_size"], (SAMPLES, SEQ_LEN), generator=generator).tolist()
    lines = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows)
    (folder.parent / "tokens.jsonl").write_text(lines, encoding="utf-8")
    return total


def measure(blocks: int, threads: int) -> dict[str, Any]:
    """What compressing a model of so many blocks took."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "model", Path(scratch) / "out"
        folder.mkdir()
        size = make_model(folder, blocks)
        command = [sys.executable, "-m", "quantkit", "quantize", str(folder), "-o", str(out)]
        command += ["-m", "smoothquant", "-m", "w8a8", "--dataset", str(folder.parent / "tokens.jsonl")]
        command += ["--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN), "--json"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise SystemExit(ran.stderr[-4000:])
        report = json.loads(ran.stdout)
        shutil.rmtree(out)
    return {
        "blocks": blocks,
        "model_bytes": size,
        "peak_memory_bytes": report["peak_memory_bytes"],
        "predicted_memory_bytes": report["predicted_memory_bytes"],
        "seconds": report["seconds"],
    }


def table(found: list[dict[str, Any]]) -> str:
    """The rows of docs/memory.md."""
    head = "| blocks | model, MB | peak, MB | of the smallest | predicted, MB | of the peak |"
    lines = [head, "| --- |" + " --- |" * 5]
    least = found[0]["peak_memory_bytes"]
    for row in found:
        peak, predicted = row["peak_memory_bytes"], row["predicted_memory_bytes"]
        lines.append(
            f"| {row['blocks']} | {row['model_bytes'] / 1e6:,.0f} | {peak / 1e6:,.0f} | {peak / least:.3f} "
            f"| {predicted / 1e6:,.0f} | {predicted / peak:.3f} |"
        )
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
    parser = argparse.ArgumentParser(description="How memory grows with a model's size.")
    parser.add_argument("--blocks", type=int, nargs="+", default=[5, 21, 64], help="blocks of each model (5 21 64)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (2)")
    parser.add_argument("--plot", type=Path, help="draw the curve to this file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    found = []
    for blocks in options.blocks:
        found.append(measure(blocks, options.threads))
        sys.stderr.write(json.dumps(found[-1]) + "\n")
    if options.plot:
        plot(found, options.plot)
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if options.json else table(found))


if __name__ == "__main__":
    main()
