"""Every tiny architecture through the real pipeline: quantize, reload, compare with float. Writes JSON lines.

    python tests/coverage/run.py OUT.jsonl [MODEL_TYPE ...]

A line an architecture and recipe. Architectures that OUT holds already are left out, so that a run can be continued.
"""

import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "support")]

RECIPES: dict[str, list[str]] = {
    "smoothquant+w8a8": ["smoothquant", "w8a8"],
    "fp8": ["fp8"],
    "int8": ["int8"],
    "llm-int8": ["llm-int8"],
}
CALIBRATION = {"samples": 8, "seq_len": 16}


def measure(model_type: str, names: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """What each recipe does to the tiny model of one architecture."""
    import torch
    from tiny import Unbuildable, inputs, save

    import quantkit
    from quantkit.checkpoint import quiet_transformers
    from quantkit.errors import QuantkitError

    torch.set_num_threads(1)
    quiet_transformers()
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "float"
        try:
            save(model_type, source)
        except Unbuildable as error:
            yield {"model_type": model_type, "recipe": None, "unbuildable": str(error)}
            return
        text = Path(temporary) / "text.txt"
        text.write_text("The quick brown fox jumps over the lazy dog, and back. " * 40, encoding="utf-8")
        base = quantkit.load(source, dtype="float32")
        batch = inputs(base)
        with torch.no_grad():
            expected = base(**batch).logits.double()
        parameters = sum(p.numel() for p in base.parameters())
        for name in names or RECIPES:
            started = time.monotonic()
            row: dict[str, Any] = {"model_type": model_type, "recipe": name}
            try:
                row |= _one(source, Path(temporary) / name, RECIPES[name], text, batch, expected, parameters)
            except QuantkitError as error:
                row |= {"refused": " ".join(str(error).split())}
            except Exception:
                row |= {"failed": traceback.format_exc()[-2000:]}
            yield row | {"seconds": round(time.monotonic() - started, 2)}


def _one(
    source: Path, out: Path, steps: list[str], text: Path, batch: Any, expected: Any, parameters: int
) -> dict[str, Any]:
    """Compress, reload and compare."""
    import torch

    import quantkit

    data: dict[str, Any] = {"dataset": str(text), **CALIBRATION} if "smoothquant" in steps else {}
    report = quantkit.quantize(source, out, steps=steps, progress=False, **data)
    model = quantkit.load(out)
    with torch.no_grad():
        logits = model(**batch).logits.double()
    error = relative(logits, expected)
    noise = _noise(source, out, steps, batch, expected)
    decoded = _decoded(out, batch, logits) if steps == ["int8"] else None
    states: dict[str, int] = {}
    for group in report.groups:
        if group.state != "refused" or group.kind == "norm":
            key = f"{group.kind} {group.state}"
            states[key] = states.get(key, 0) + 1
    return {
        "format": report.format,
        "error": error,
        "noise": noise,
        "decoded": decoded,
        "plain": _plain(out, report.format, batch, expected),
        "kl": _kl(expected, logits),
        "quantized": sum(n * k for n, k in (layer.shape for layer in report.layers)) / parameters,
        "layers": len(report.layers),
        "groups": states,
        "refused_norms": sorted({g.reason for g in report.groups if g.state == "refused" and g.kind == "norm"}),
        "undone": [f"{g.block}.{g.producer}: {g.reason} ({g.error})" for g in report.groups if g.state == "undone"],
        "left": sorted({item.reason for item in report.left_alone}),
        "notes": report.notes,
    }


def relative(logits: Any, expected: Any) -> float:
    """The norm of the difference over that of the expected logits about their mean."""
    return float((logits - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm())


def _logits(folder: Path, batch: Any) -> Any:
    """Logits of a float checkpoint, in float64."""
    import torch

    import quantkit

    with torch.no_grad():
        return quantkit.load(folder, dtype="float32")(**batch).logits.double()


def _noise(source: Path, out: Path, steps: list[str], batch: Any, expected: Any) -> float:
    """What random rounding errors cost the float model: the error that 8 bits explain.

    Every weight that was quantized is moved by a random share of half a step of its own number format (int8: the row's
    absmax / 127; E4M3: an eighth of the power of two below the number), and by sqrt(2) of it where activations are
    quantized too, which err by as much. The mean of three draws.
    """
    import torch
    from models import read_tensors
    from safetensors.torch import save_file

    before, after = read_tensors(source), read_tensors(out)
    errors = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for key, value in before.items():
            tensors[key] = value
            if value.ndim > 1 and (key not in after or not after[key].is_floating_point() or after[key].itemsize == 1):
                step = value.abs().amax(-1, keepdim=True) / 127
                if "fp8" in steps:
                    step = torch.exp2(torch.floor(torch.log2(value.abs().clamp(min=1e-30)))) / 8
                noise = torch.rand(value.shape, generator=generator) - 0.5
                tensors[key] = value + noise * step * (1.0 if steps == ["int8"] else 2**0.5)
        with tempfile.TemporaryDirectory() as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
            save_file(tensors, Path(temporary) / "model.safetensors", metadata={"format": "pt"})
            errors.append(relative(_logits(Path(temporary), batch), expected))
    return sum(errors) / len(errors)


def _decoded(out: Path, batch: Any, logits: Any) -> float:
    """How far the packed model is from the float model with its decoded weights, which transformers loads."""
    from safetensors.torch import save_file

    from quantkit.checkpoint import Hub
    from quantkit.pipeline import open_source

    opened = open_source(out, Hub(), None, dequantize=True)
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "config.json").write_text(json.dumps(opened.config))
        tensors = {key: opened.weights.get(key).clone() for key in opened.weights.tensors}
        save_file(tensors, Path(temporary) / "model.safetensors", metadata={"format": "pt"})
        return relative(logits, _logits(Path(temporary), batch))


def _plain(out: Path, form: str, batch: Any, expected: Any) -> dict[str, Any] | None:
    """What plain transformers makes of the checkpoint: its error, or why it fails; None for our own format."""
    import torch
    from transformers import AutoModelForCausalLM

    if form == "quantkit":
        return None
    try:
        words = {"device_map": "cpu"} if form == "bitsandbytes" else {}
        model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto", **words)
        lost = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind] or ())
        if lost:
            return {"reason": f"{len(lost)} tensors are not found or don't fit, {lost[0]} first"}
        with torch.no_grad():
            return {"error": relative(model.eval()(**batch).logits.double(), expected)}
    except Exception as error:
        return {"reason": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def _kl(expected: Any, logits: Any) -> float:
    p, q = expected.log_softmax(-1), logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def rows_of(model_type: str) -> list[dict[str, Any]]:
    """`measure`'s rows; for a process pool."""
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        return list(measure(model_type))
    except Exception:
        return [{"model_type": model_type, "recipe": None, "failed": traceback.format_exc()[-2000:]}]


def main() -> None:
    """Run what is missing from the output."""
    from architectures import ENTRIES

    out = Path(sys.argv[1])
    done = {json.loads(line)["model_type"] for line in out.read_text().splitlines()} if out.exists() else set()
    wanted = [entry for entry in sys.argv[2:] or ENTRIES if entry not in done]
    with get_context("spawn").Pool(2, maxtasksperchild=12) as pool, out.open("a") as file:
        for number, rows in enumerate(pool.imap(rows_of, wanted), 1):
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            print(f"{number}/{len(wanted)} {rows[0]['model_type']}", file=sys.stderr)


if __name__ == "__main__":
    main()
