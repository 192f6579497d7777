"""What reusing the neurons of the last tokens costs: perplexity by the length of the runs, a table and JSON.

    python kernels/bench/reusing.py MODEL --dataset text.txt --runs 4 8 16 32

The model reads windows of text as it would have generated them token by token, with the neurons of the first G tokens
reused for the next G and so on (`quantkit.skipping.reusing.as_if_reused`): every second run of G tokens leaves out the
neurons that the run before it didn't use. Beside the perplexity over all tokens there is that of the tokens that are
predicted in runs with reused neurons, and the plain model's on the same tokens.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from quantkit import load
from quantkit.checkpoint import load_tokenizer
from quantkit.pairing import context_length
from quantkit.skipping import reusing
from quantkit.texts import read, tokenize


def losses(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Return the negative log likelihood of each token of the windows but the first, [windows, length - 1]."""
    found = []
    for window in windows.split(8):
        logits = model(input_ids=window, use_cache=False).logits[:, :-1].float()
        found.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="none"))
    return torch.cat(found)


def measure(model: Any, windows: torch.Tensor, runs: list[int]) -> list[dict[str, Any]]:
    """Return a record for the plain model and for each length of runs."""
    plain = losses(model, windows)
    records = [{"run": 0, "perplexity": math.exp(plain.mean()), "kept": 1.0}]
    place = torch.arange(windows.shape[1] - 1)
    for run in runs:
        with reusing.as_if_reused(model, run) as reused:
            changed = losses(model, windows)
        reuses = place // run % 2 == 1
        records.append(
            {
                "run": run,
                "perplexity": math.exp(changed.mean()),
                "in_reusing_runs": math.exp(changed[:, reuses].mean()),
                "plain_there": math.exp(plain[:, reuses].mean()),
                "kept": reused.share,
            }
        )
    return records


def main() -> None:
    """Measure, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True, help="as for `quantkit eval`")
    parser.add_argument("--runs", nargs="+", type=int, default=[4, 8, 16, 32], metavar="G")
    parser.add_argument("--max-tokens", type=int, default=20000)
    parser.add_argument("--length", type=int, help="tokens of a window; by default the model's context, at most 512")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    model = load(options.model)
    length = options.length or min(512, context_length(model) or 512)
    tokenizer = load_tokenizer(options.model)
    ids = tokenize(read(options.dataset), tokenizer, limit=options.max_tokens).ids[: options.max_tokens]
    windows = ids[: len(ids) // length * length].view(-1, length)
    with torch.inference_mode():
        records = measure(model, windows, options.runs)
    sys.stdout.write(f"{options.model}, {windows.numel():,} tokens in windows of {length}\n")
    for each in records:
        there = (
            f"; in reusing runs {each['in_reusing_runs']:.3f}, plain {each['plain_there']:.3f}" if each["run"] else ""
        )
        sys.stdout.write(f"  G {each['run']:2}: {each['perplexity']:.3f}, {each['kept']:.1%} of neurons kept{there}\n")
    if options.json is not None:
        options.json.write_text(json.dumps({"tokens": windows.numel(), "length": length, "records": records}, indent=1))


if __name__ == "__main__":
    main()
