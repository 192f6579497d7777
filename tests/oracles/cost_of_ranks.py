"""Time and memory of a run that several processes share, beside what was foreseen: the figures of docs/distributed.md.

    python tests/oracles/cost_of_ranks.py [--ranks 1 2 4] [--recipes fp8 smoothquant+w8a8] [--json]

A random bf16 Llama of 47 million parameters in 4 blocks of 23 MB (hidden 1024, intermediate 2816, 8 heads, 4 key-value
heads, vocabulary 512) is compressed by 1, 2 and 4 processes with one thread each, which torchrun starts; calibrated on
32 windows of 256 tokens. Every number is that of the run's own log; results are held against each other, bit by bit.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import memory_of_compressing

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
BLOCKS, SAMPLES, SEQ_LEN = 4, 32, 256


def run(folder: Path, recipe: str, ranks: int) -> dict[str, Any]:
    """What one run took, and a hash of its weights."""
    output = folder / f"{recipe}-{ranks}"
    words = ["quantize", str(folder / "model"), "-o", str(output), "--quiet", "--max-shard-size", "1GB"]
    for step in recipe.split("+"):
        words += ["-m", step]
    if recipe != "fp8":
        words += ["--dataset", str(folder / "tokens.jsonl"), "--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "quantkit"]
    command = [sys.executable, *(launch if ranks > 1 else ["-m", "quantkit"]), *words]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    lines = [json.loads(line) for line in output.with_name(f"{output.name}.log.jsonl").read_text().splitlines()]
    report = json.loads((output / "quantkit_report.json").read_text())
    rows = [line["ranks"] for line in lines if line["event"] == "ranks"]
    digest = hashlib.sha256()
    for path in sorted(output.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return {
        "recipe": recipe,
        "ranks": ranks,
        "seconds": lines[-1]["elapsed"],
        "seconds_by_rank": [round(sum(row[rank]["seconds"] for row in rows), 1) for rank in range(ranks)]
        if rows
        else [],
        "peak_mb": [round(row["peak_memory_bytes"] / 1e6) for row in rows[-1]] if rows else [],
        "first_peak_mb": round(report["peak_memory_bytes"] / 1e6),
        "foreseen_mb": round(report["predicted_memory_bytes"] / 1e6),
        "weights": digest.hexdigest()[:16],
    }


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--recipes", nargs="+", default=["fp8", "smoothquant+w8a8"])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    memory_of_compressing.SIZES.update(SIZES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        memory_of_compressing.make_model(folder / "model", BLOCKS)
        rows = [run(folder, recipe, ranks) for recipe in given.recipes for ranks in given.ranks]
    same = {row["recipe"]: row["weights"] for row in rows}
    for row in rows:
        row["same"] = row["weights"] == same[row["recipe"]]
        if given.json:
            sys.stdout.write(json.dumps(row) + "\n")
            continue
        peaks = row["peak_mb"] or [row["first_peak_mb"]]
        sys.stdout.write(
            f"{row['recipe']}, {row['ranks']} processes: {row['seconds']:.1f} s, by rank {row['seconds_by_rank']}; "
            f"peaks {peaks} MB, foreseen {row['foreseen_mb']}; {'the same bits' if row['same'] else 'OTHER BITS'}\n"
        )


if __name__ == "__main__":
    main()
