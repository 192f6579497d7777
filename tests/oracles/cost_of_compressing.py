"""What compressing costs, ours and llm-compressor's on one model in one run: the figures of docs/cost.md.

    python tests/oracles/cost_of_compressing.py --llmcompressor-python VENV/bin/python [--json]

A random bf16 Llama of 284 million parameters and rows of random token ids are written to a temporary folder (1.5 GB
with the results). Each tool compresses it in a process of its own, ours and theirs in turn. Counted are the seconds
from when everything is imported until the checkpoint is durably on disk (the files of both are synced), and the peak
memory of the process with the imports (VmHWM). Within that time ours also proves its folds and reads its checkpoint
back. Both checkpoints must hold the same tensors, by name, shape and dtype.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

METHODS = ("smoothquant+w8a8", "fp8-dynamic")
PASS = "one forward pass"
FLOORS = {f"batch {size}": size for size in (1, 2)}
"""The rows of `--floor`: windows at once in the pass of the plain float model."""
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 512,
}
SAMPLES, SEQ_LEN = 32, 256


def make_model(folder: Path) -> None:
    """Write the model, a tokenizer that knows a word a token, and the rows of token ids."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(**SIZES, max_position_embeddings=2048, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(SIZES["vocab_size"])}, unk_token="w0")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), pad_token="w0")
    tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, SIZES["vocab_size"], (SAMPLES, SEQ_LEN), generator=generator).tolist()
    lines = [json.dumps({"input_ids": row}) + "\n" for row in rows]
    (folder.parent / "tokens.jsonl").write_text("".join(lines), encoding="utf-8")


def ours(method: str, folder: Path, out: Path) -> dict[str, Any]:
    """Compress with quantkit."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from quantkit.pipeline import quantize

    if method == "fp8-dynamic":
        words: dict[str, Any] = {"steps": ["fp8"]}
    else:
        words = {"steps": ["smoothquant:alpha=0.5", "w8a8"], "dataset": str(folder.parent / "tokens.jsonl")}
        words |= {"samples": SAMPLES, "seq_len": SEQ_LEN}
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    before, started = peak_bytes(), time.monotonic()
    quantize(folder, out, progress=False, **words)
    sync(out)
    return {"seconds": time.monotonic() - started, "imports_bytes": before}


def floor(folder: Path, batch: int) -> dict[str, Any]:
    """One plain forward pass of the float model over all windows: what no way of calibrating once can fall below."""
    import torch
    import transformers

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").model
    lines = (folder.parent / "tokens.jsonl").read_text(encoding="utf-8").splitlines()
    ids = torch.tensor([json.loads(line)["input_ids"] for line in lines])
    before, started = peak_bytes(), time.monotonic()
    with torch.inference_mode():
        for windows in ids.split(batch):
            model(input_ids=windows, use_cache=False)
    return {"seconds": time.monotonic() - started, "imports_bytes": before}


def theirs(method: str, folder: Path, out: Path, batch_size: int) -> dict[str, Any]:
    """Compress with llm-compressor, as its examples do."""
    import datasets
    import torch
    import transformers.models.llama.modeling_llama
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    before, started = peak_bytes(), time.monotonic()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if method == "fp8-dynamic":
        recipe = [QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])]
        oneshot(model=model, recipe=recipe)
    else:
        recipe = [
            SmoothQuantModifier(smoothing_strength=0.5),
            QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ]
        lines = (folder.parent / "tokens.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) | {"attention_mask": [1] * SEQ_LEN} for line in lines]
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=datasets.Dataset.from_list(rows),
            recipe=recipe,
            max_seq_length=SEQ_LEN,
            num_calibration_samples=SAMPLES,
            batch_size=batch_size,
        )
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)
    sync(out)
    return {"seconds": time.monotonic() - started, "imports_bytes": before}


def sync(folder: Path) -> None:
    """Make the files of a folder durable."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def peak_bytes() -> int:
    """The most memory that this process has held."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def child(tool: str, method: str, folder: Path, out: Path, batch_size: int) -> None:
    """Do one tool's work and print what it cost as the last line."""
    if method == PASS:
        result = floor(folder, FLOORS[tool])
        sys.stdout.write("\n" + json.dumps(result | {"peak_bytes": peak_bytes()}) + "\n")
        return
    result = ours(method, folder, out) if tool == "ours" else theirs(method, folder, out, batch_size)
    sys.stdout.write("\n" + json.dumps(result | {"peak_bytes": peak_bytes()}) + "\n")


def run(python: str, tool: str, method: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What one tool's work cost, in a process of its own."""
    threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        out = Path(scratch) / "out"
        os.sync()  # what was written before is not this run's to wait for
        command = [python, str(Path(__file__).resolve()), "--child", tool, method, str(folder), str(out)]
        ran = subprocess.run(
            [*command, "--batch-size", str(options.batch_size)],
            env=os.environ | threads | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode:
            raise SystemExit(f"{tool}, {method}:\n{ran.stdout[-2000:]}{ran.stderr[-4000:]}")
        result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
        return result | {"tensors": specs(out)}


def specs(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor of a checkpoint, from the headers."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        found |= {name: (each["dtype"], each["shape"]) for name, each in header.items() if name != "__metadata__"}
    return found


def measure(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Median seconds and largest peak by method and tool, the tools in turn."""
    pythons = {"ours": sys.executable, "llm-compressor": options.llmcompressor_python}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make_model(folder)
        for turn in range(options.runs):
            for method in options.method or METHODS:
                for tool, python in pythons.items():
                    if python:
                        result = run(python, tool, method, folder, options)
                        found.setdefault(method, {}).setdefault(tool, []).append(result)
                        said = f"{result['seconds']:.1f} s, {result['peak_bytes'] / 1e6:,.0f} MB"
                        sys.stderr.write(f"run {turn + 1}/{options.runs} {method} {tool}: {said}\n")
            for rows in FLOORS if options.floor else ():
                result = run(sys.executable, rows, PASS, folder, options)
                found.setdefault(PASS, {}).setdefault(rows, []).append(result)
                sys.stderr.write(f"run {turn + 1}/{options.runs} {PASS}, {rows}: {result['seconds']:.1f} s\n")
    return {
        method: {
            tool: {
                "seconds": statistics.median(each["seconds"] for each in results),
                "peak_bytes": max(each["peak_bytes"] for each in results),
                "imports_bytes": max(each["imports_bytes"] for each in results),
                "tensors": len(results[0]["tensors"]),
                "same_tensors": method == PASS or results[0]["tensors"] == by_tool["ours"][0]["tensors"],
            }
            for tool, results in by_tool.items()
        }
        for method, by_tool in found.items()
    }


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """The rows of docs/cost.md."""
    lines = [
        "| method | tool | seconds | ratio | peak, MB | after the imports, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method, by_tool in found.items():
        base = found.get(METHODS[0] if method == PASS else method, {}).get("llm-compressor")
        for tool, cost in by_tool.items():
            ratio = f"{cost['seconds'] / base['seconds']:.2f}" if base else ""
            peaks = f"{cost['peak_bytes'] / 1e6:,.0f} | {cost['imports_bytes'] / 1e6:,.0f}"
            lines.append(f"| {method} | {tool} | {cost['seconds']:.1f} | {ratio} | {peaks} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="What compressing costs, ours and llm-compressor's.")
    parser.add_argument("--llmcompressor-python", help="the Python of an environment with llm-compressor 0.14")
    parser.add_argument("--method", action="append", choices=METHODS, help="only this one (may be repeated)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (2)")
    parser.add_argument("--runs", type=int, default=1, help="times each tool does each method (1)")
    parser.add_argument("--batch-size", type=int, default=1, help="llm-compressor's batch_size (1, its default)")
    parser.add_argument("--floor", action="store_true", help="also time one plain forward pass over the windows")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        tool, method, folder, out = options.child
        return child(tool, method, Path(folder), Path(out), options.batch_size)
    found = measure(options)
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if options.json else table(found))
    different = [
        method for method, by_tool in found.items() if not all(cost["same_tensors"] for cost in by_tool.values())
    ]
    if different:
        raise SystemExit(f"the checkpoints of {', '.join(different)} hold different tensors")
    return None


if __name__ == "__main__":
    main()
