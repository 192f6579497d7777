"""Decoding on a CPU with and without reading what zeros multiply, end to end and side by side: a table, and JSON.

    OMP_NUM_THREADS=2 python kernels/bench/skipping.py --json kernels/results/skipping-NAME.json

A random model of Llama's shape whose gated MLPs have relu(gate - shift): each layer's shift is chosen such that the
wanted share of its gates is zero. For each share, the same model runs as it is (`F.linear`, all rows) and with
`quantkit.skipping.skip_zeros`, with weights in bfloat16 (or --dtype) and in int8: one token after the other, after the
same prompt. The models take turns; a time is the median of the steps of a run, and a ratio that of two such medians,
of which the table has the median over the runs and the spread. The share of rows that weren't read is counted in a run
of its own, and the logits of the two must agree within rounding, or there is no time.

At a share s of zeros a third and 2 (1 - s) thirds of an MLP are read. "could be" is what that would give if a step took
the time of reading its weights, and nothing else took any.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quantkit_kernels.benchmarks.cpu_clock import machine
from torch import nn

from quantkit import load, quantize, skipping
from quantkit.activations import ReLU

SIZES = {
    "deep": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "wide": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 6, "num_attention_heads": 16},
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
}
"""Configs of random models: two of 377 million parameters, and tiny, for trying this program out."""
AGREE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""How far logits may be apart, relative to the largest, after all layers' roundings."""


def build(size: str, folder: Path, dtype: torch.dtype) -> None:
    """Write a random model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    words = {"vocab_size": 512, "num_key_value_heads": SIZES[size]["num_attention_heads"] // 2}
    words |= {"max_position_embeddings": 1024, "hidden_act": "relu", "dtype": dtype}
    LlamaForCausalLM(LlamaConfig(**SIZES[size], **words)).to(dtype).save_pretrained(folder)


def mlps(model: nn.Module) -> list[nn.Module]:
    """Return the MLPs of the model."""
    return [layer.mlp for layer in model.model.layers]


def nbytes(module: nn.Module) -> int:
    """Return the bytes of a module's weights."""
    return sum(each.nbytes for each in (*module.parameters(), *module.buffers()))


def shifts_for(model: nn.Module, share: float, ids: torch.Tensor) -> list[float]:
    """Return for each layer the shift with which that share of the gates of these tokens is zero, in one pass."""
    found: list[float] = []

    def choose(mlp: nn.Module) -> Callable[..., None]:
        def hook(gate: nn.Module, args: Any, output: torch.Tensor) -> None:
            mlp.act_fn.shift = float(output.float().flatten().kthvalue(max(1, int(share * output.numel()))).values)
            found.append(mlp.act_fn.shift)

        return hook

    hooks = [mlp.gate_proj.register_forward_hook(choose(mlp)) for mlp in mlps(model)]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def set_shifts(model: nn.Module, shifts: list[float]) -> None:
    """Put shifts into a model's activations."""
    for mlp, shift in zip(mlps(model), shifts, strict=True):
        mlp.act_fn.shift = shift


def decode(model: nn.Module, ids: torch.Tensor, steps: int) -> tuple[float, torch.Tensor]:
    """Return the median seconds of a step after the prompt, and the last step's logits."""
    out = model(input_ids=ids[:, :-steps], use_cache=True)
    times = []
    for step in range(ids.shape[1] - steps, ids.shape[1]):
        begun = time.perf_counter()
        out = model(input_ids=ids[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
        times.append(time.perf_counter() - begun)
    return statistics.median(times), out.logits[0, -1].float()


def models(options: argparse.Namespace, dtype: torch.dtype) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return the models as they are and those that skip zeros, each by the kind of its weights."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {options.dtype: Path(scratch) / "float", "int8": Path(scratch) / "int8"}
        build(options.size, folders[options.dtype], dtype)
        if options.int8:
            quantize(folders[options.dtype], folders["int8"], steps=["int8"], progress=False)
        else:
            del folders["int8"]
        dense = {name: load(folder) for name, folder in folders.items()}
    for model in dense.values():
        for mlp in mlps(model):
            mlp.act_fn = ReLU()
    skips = {name: copy.deepcopy(model) for name, model in dense.items()}
    for model in skips.values():
        found = skipping.skip_zeros(model)
        assert all(each.gated for each in found), found
    return dense, skips


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a record for each share and kind of weights, and write a line for each as it comes."""
    dtype = getattr(torch, options.dtype)
    dense, skips = models(options, dtype)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(512, (1, options.prompt + options.steps), generator=generator)
    records = []
    with torch.inference_mode():
        for share in options.shares:
            shifts = shifts_for(dense[options.dtype], share, ids)
            for model in (*dense.values(), *skips.values()):
                set_shifts(model, shifts)
            for name in dense:
                records.append(beside(name, share, dense[name], skips[name], ids, options, AGREE[dtype]))
                sys.stdout.write(line(records[-1]) + "\n")
                sys.stdout.flush()
    return records


def beside(
    name: str,
    share: float,
    dense: nn.Module,
    skips: nn.Module,
    ids: torch.Tensor,
    options: argparse.Namespace,
    apart: float,
) -> dict[str, Any]:
    """Return the record of one share and one kind of weights."""
    with skipping.counted() as read:
        _, logits = decode(skips, ids, options.steps)
    _, expected = decode(dense, ids, options.steps)
    wrong = float((logits - expected).abs().max() / expected.abs().max())
    record = {"weights": name, "share": share, "not_read": round(read.share, 4), "apart": round(wrong, 5)}
    if not wrong <= apart:
        return {**record, "ratio": None}
    runs = [(decode(dense, ids, options.steps)[0], decode(skips, ids, options.steps)[0]) for _ in range(options.rounds)]
    ratios = sorted(before / after for before, after in runs)
    in_mlps = sum(map(nbytes, mlps(dense)))
    whole = sum(map(nbytes, dense.model.layers)) + nbytes(dense.lm_head)
    return {
        **record,
        "dense_ms": round(1000 * statistics.median(before for before, _ in runs), 2),
        "skipping_ms": round(1000 * statistics.median(after for _, after in runs), 2),
        "ratio": round(statistics.median(ratios), 2),
        "least": round(ratios[0], 2),
        "most": round(ratios[-1], 2),
        "could_be": round(whole / (whole - in_mlps * 2 / 3 * read.share), 2),
    }


def line(record: dict[str, Any]) -> str:
    """Return a record on a line."""
    start = f"{record['weights']:9} {record['share']:5.0%} of gates zero, {record['not_read']:6.1%} not read"
    if record["ratio"] is None:
        return f"{start}: WRONG, logits {record['apart']:.2g} apart, not timed"
    return (
        f"{start}: {record['dense_ms']:7.2f} -> {record['skipping_ms']:7.2f} ms a token, {record['ratio']:5.2f}x "
        f"({record['least']:.2f} to {record['most']:.2f}), could be {record['could_be']:.2f}x"
    )


def main() -> None:
    """Measure, and write the records where asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="deep")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the float model")
    parser.add_argument("--no-int8", dest="int8", action="store_false", help="leave out int8 weights")
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[0.0, 0.5, 0.8, 0.9, 0.95], help="zeros of the gates"
    )
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the machine and the records")
    options = parser.parse_args()
    here = machine()
    sys.stdout.write(json.dumps(here) + "\n")
    records = measure(options)
    if options.json is not None:
        known = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else []
        known.append({"machine": here, "size": options.size, "dtype": options.dtype, "records": records})
        options.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if any(record["ratio"] is None for record in records):
        sys.exit("logits are too far apart: there is no time")


if __name__ == "__main__":
    main()
