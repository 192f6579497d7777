"""demonstrate(): every recipe on the bundled model, compressed, evaluated and tabulated."""

import tempfile
from pathlib import Path
from typing import Any

from quantkit.checkpoint import load_tokenizer
from quantkit.demo import model_path
from quantkit.evaluation import check_text, evaluate
from quantkit.loading import load
from quantkit.output import refuse_existing
from quantkit.pipeline import quantize
from quantkit.progress import track
from quantkit.recipe import load_recipe, recipe_names
from quantkit.texts import read

CALIBRATION: dict[str, Any] = {"dataset": "demo", "samples": 64, "seq_len": 256}
"""What recipes that observe activations see: windows of the text that the demo model was trained on."""


def demonstrate(
    output: str | Path | None = None, *, max_tokens: int = 32768, device: str = "auto"
) -> list[dict[str, Any]]:
    """One row a recipe, the float model's first; the checkpoints stay in `output` if it is given.

    Raises:
        QuantkitError: `output` holds something already, this Python carries no documentation to evaluate on, or
            `max_tokens` is less than a window. All of it is found out before anything is compressed.
    """
    kept = None if output is None else refuse_existing(output)
    texts = read("demo")
    baseline, tokenizer = load(model_path(), device=device), load_tokenizer(model_path())
    check_text(texts, tokenizer, baseline, "the demo model", max_tokens=max_tokens)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = kept or Path(temporary)
        names = recipe_names()
        for name in track(names, "recipes", len(names), "recipe"):
            data = CALIBRATION if load_recipe(name).observes else {}
            report = quantize(model_path(), folder / name, recipe=name, device=device, progress=False, **data)
            result = evaluate(
                folder / name,
                texts,
                baseline=baseline,
                tokenizer=tokenizer,
                max_tokens=max_tokens,
                device=device,
                progress=False,
            )
            if not rows:
                rows.append(_float_row(result, report.bytes_before))
            rows.append(
                {
                    "recipe": name,
                    "bits_per_weight": report.bits_per_weight,
                    "bytes": report.bytes_after,
                    "perplexity": result["perplexity"],
                    "perplexity_stderr": result["perplexity_stderr"],
                    "kl_mean": result["kl_mean"],
                    "top1_agreement": result["top1_agreement"],
                    "quantize_seconds": report.seconds,
                    "eval_seconds": result["seconds"],
                }
            )
    return rows


def _float_row(result: dict[str, Any], nbytes: int) -> dict[str, Any]:
    return {
        "recipe": "float",
        "bits_per_weight": 16.0,
        "bytes": nbytes,
        "perplexity": result["baseline_perplexity"],
        "perplexity_stderr": result["baseline_perplexity_stderr"],
    }
