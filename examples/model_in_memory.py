"""Compress a model that is in memory, measure what was lost, and compile the result.

python examples/model_in_memory.py
"""

import tempfile
from pathlib import Path

import torch

import quantkit
from quantkit.checkpoint import load_tokenizer
from quantkit.demo import model_path


def main() -> None:
    """Print what int8 weights in groups of 128 cost, and that a compiled model gives the same logits."""
    model, tokenizer = quantkit.load(model_path()), load_tokenizer(model_path())
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "int8"
        quantkit.quantize(model, output, steps=["int8:group=128"], tokenizer=tokenizer, ignore=["*.down_proj"])
        result = quantkit.evaluate(output, "demo", baseline=model, max_tokens=4096)
        print(f"perplexity {result['perplexity']:.4f}, float {result['baseline_perplexity']:.4f}")
        print(f"KL {result['kl_mean']:.2e}, first choice agrees {result['top1_agreement']:.2%}")
        compressed = quantkit.load(output)
        ids = torch.arange(2, 34)[None]
        with torch.inference_mode():
            compiled = torch.compile(compressed, backend="aot_eager")
            print("compiled equals eager:", torch.equal(compiled(ids).logits, compressed(ids).logits))


if __name__ == "__main__":
    main()
