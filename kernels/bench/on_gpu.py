"""All that needs a GPU, in one program: the tests of the kernels, their timings, and a whole model's.

    python kernels/bench/on_gpu.py --steps tests bench model

Each step writes its part of kernels/results/NAME.json, NAME being the card's, when it is done, and leaves the others'
parts as they are. While the bench runs its lines lie in NAME.jsonl, so that what was measured outlives an interruption.

- tests: tests/gpu, every op against float64 on every backend, opcheck, CUDA graphs, every shipped configuration.
- bench: what `quantkit bench-kernels --json` says of --shapes, --tokens and --ops.
- model: a model of Llama-3-8B's shape with random weights, compressed by each of --recipes, beside bfloat16, by what
  `quantkit bench` measures with, the cache static and compiled: decoding at batch 1, 8 and 64, and a prefill of 2048.

The exit code is 1 where a test failed or an op of ours had no time.
"""

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [str(ROOT / folder) for folder in (".", "kernels", "calibration", "eval")]
sys.path[:0] = SOURCES  # a checkout that is not installed will do

import torch  # noqa: E402

RECIPES = ("w8a8", "fp8", "int8", "int4", "llm-int8")
SIZES = {
    "8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 260,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
}
"""Configs of random models; tiny is for trying this program out."""
TASKS = ((1, 2048, 64), (8, 128, 64), (64, 128, 64))
"""Batch, tokens of a prompt, and steps after it."""


Keep = Callable[[dict[str, Any]], None]
"""Writes what a step has found so far."""


def tests(options: argparse.Namespace, keep_so_far: Keep) -> dict[str, Any]:
    """Return how the tests of the kernels on this GPU went; all skipped is not well."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-rs", "-p", "no:cacheprovider"]
    path = os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=False
    )
    sys.stdout.write(ran.stdout)
    lines = ran.stdout.strip().splitlines() or [""]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"said": lines[-1], "failed": failed, "ok": ran.returncode == 0 and " passed" in lines[-1]}


def bench(options: argparse.Namespace, keep_so_far: Keep) -> dict[str, Any]:
    """Return what the kernels' benchmark measured, and write each line as it comes."""
    from quantkit_kernels.benchmarks import cpu_clock, shapes, table

    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    cache = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else cpu_clock.last_cache_bytes()
    partial, heading = options.output / f"{name_of(options.device)}.jsonl", ""

    def said(record: dict[str, Any]) -> None:
        nonlocal heading
        with partial.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if table.heading(record) != heading:
            heading = table.heading(record)
            sys.stdout.write(f"\n{heading}\n")
        sys.stdout.write(table.line(record) + "\n")
        sys.stdout.flush()

    partial.unlink(missing_ok=True)
    torch.manual_seed(0)
    result = table.measure(
        table.Bench(device, seconds=options.seconds, cache_bytes=cache),
        shapes.parsed(options.shapes),
        options.tokens,
        options.ops,
        said,
        None if options.minutes is None else time.monotonic() + 60 * options.minutes,
    )
    sys.stdout.write(f"\n{table.introduction(result)}\n")
    partial.unlink(missing_ok=True)
    return {**result, "ok": not result["failed"]}


def model(options: argparse.Namespace, keep_so_far: Keep) -> dict[str, Any]:
    """Return what `quantkit.benchmark` says of a random model compressed by each recipe, beside the float one."""
    from quantkit import quantize
    from quantkit.benchmark import benchmark
    from quantkit.checkpoint import quiet_transformers

    quiet_transformers()
    options.work.mkdir(parents=True, exist_ok=True)
    folder = options.work / f"random-{options.size}-{options.layers or SIZES[options.size]['num_hidden_layers']}"
    if not (folder / "config.json").exists():
        write_random_model(folder, options)
    found: dict[str, Any] = {"size": options.size, "layers": options.layers, "results": [], "ok": True}
    for recipe in options.recipes:
        compressed = options.work / f"{folder.name}-{recipe}"
        shutil.rmtree(compressed, ignore_errors=True)
        quantize(folder, compressed, recipe=recipe, device=options.device, progress=False)
        for batch, prompt_tokens, new_tokens in TASKS:
            result = benchmark(
                compressed,
                folder,
                batch=batch,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                runs=options.runs,
                baseline_dtype="bfloat16",
                cache="static" if options.device.startswith("cuda") else "auto",
                device=options.device,
                progress=False,
            )
            found["results"].append({"recipe": recipe, **result})
            keep_so_far(found)
            ratios = {key: round(found["ratio"], 3) for key, found in result["ratios"].items()}
            sys.stdout.write(f"{recipe}, batch {batch}, prompt {prompt_tokens}: {ratios} of bfloat16\n")
            sys.stdout.flush()
        shutil.rmtree(compressed)
    return found


def write_random_model(folder: Path, options: argparse.Namespace) -> None:
    """Write a Llama of the size with random bfloat16 weights: as fast as any other, and nothing to download."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SIZES[options.size])
    if options.layers:
        config.num_hidden_layers = options.layers
    torch.manual_seed(0)
    with torch.device(options.device):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder, max_shard_size="4GB")
    del made
    if options.device.startswith("cuda"):
        torch.cuda.empty_cache()


def name_of(device: str) -> str:
    """Return the card's name as a file is called: lower case, words joined by hyphens."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def keep(path: Path, part: str, result: dict[str, Any]) -> None:
    """Put a step's result into the file, a record on a line, and leave the other steps' as they are."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[part] = result
    text = re.sub(r"\n {4,}|\n {3}(?=[]}])", " ", json.dumps(known, indent=1)) + "\n"
    beside = path.with_suffix(".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


STEPS = {"tests": tests, "bench": bench, "model": model}


def arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--output", type=Path, default=ROOT / "kernels" / "results", metavar="DIR")
    parser.add_argument("--device", default="cuda", help="cpu is for trying this program out")
    parser.add_argument("--shapes", nargs="+", default=["Llama-3-8B"], help="of the bench: models, NxK or NxKxE")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 512, 2048, 8192])
    parser.add_argument("--ops", nargs="+", default=[], help="of the bench, all by default")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each line of the bench")
    parser.add_argument("--minutes", type=float, help="begin no line of the bench after so long")
    parser.add_argument("--size", choices=SIZES, default="8B", help="of the model")
    parser.add_argument("--layers", type=int, help="of the model, if not all")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="what the model is compressed by")
    parser.add_argument("--runs", type=int, default=3, help="of each model")
    parser.add_argument("--work", type=Path, default=Path("/tmp/quantkit-on-gpu"), help="where models are written")
    return parser.parse_args()


def main() -> None:
    """Take the steps, and write what they found."""
    options = arguments()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: run this on a machine with a GPU, or try it out with --device cpu")
    options.output.mkdir(parents=True, exist_ok=True)
    path, ok = options.output / f"{name_of(options.device)}.json", True
    for step in options.steps:
        sys.stdout.write(f"== {step}\n")
        sys.stdout.flush()
        result = STEPS[step](options, functools.partial(keep, path, step))
        keep(path, step, result)
        ok = ok and result["ok"]
    sys.stdout.write(f"written to {path}\n")
    if not ok:
        sys.exit("a test failed, or an op has no time: see above")


if __name__ == "__main__":
    main()
