"""What compressing Llama 3.1 405B would take, by the plan's own formulas: the figures on paper of docs/distributed.md.

    python tests/oracles/plan_of_405b.py [--ranks 1 8 32] [--device cuda] [--json]

The model's config and the headers of its files are written, with sizes and no bytes (files with holes), and planned
as `quantkit plan` does. Only what its data flow is comes from a narrow twin with as many blocks, as a block in float32
would be 12.8 GB. No weight is there; what is said of the time rests on this machine's rates.
"""

import argparse
import json
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from quantkit import pipeline, planning
from quantkit.checkpoint import quiet_transformers
from quantkit.exploration import explore

SIZES = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "num_hidden_layers": 126,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
NARROW = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
RECIPES: list[list[str]] = [["fp8"], ["int4"], ["smoothquant", "w8a8"]]


def skeleton(config: Any) -> torch.nn.Module:
    """The model without values."""
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def write(folder: Path, config: Any) -> int:
    """Write config and files with holes; the bytes that the weights would take."""
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    parts: dict[str, dict[str, Any]] = {}
    for name, value in skeleton(config).named_parameters():
        part = name.split(".")[2] if name.startswith("model.layers.") else "outside"
        parts.setdefault(part, {})[name] = list(value.shape)
    weight_map, total = {}, 0
    for part, shapes in parts.items():
        header, end = {}, 0
        for name, shape in shapes.items():
            size = 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
            weight_map[name] = f"{part}.safetensors"
        text = json.dumps(header).encode()
        with (folder / f"{part}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def main() -> None:
    """Print what each recipe takes with so many processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    quiet_transformers()
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    narrow = transformers.LlamaConfig(**{**SIZES, **NARROW}, tie_word_embeddings=False)
    twin = skeleton(narrow)
    planning.explore = lambda _, **words: explore(twin, **words)
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), config)
        for steps in RECIPES:
            for ranks in given.ranks:
                _, _, budget = pipeline.foresee(name, steps=steps, device=given.device, ranks=ranks)
                if given.json:
                    sys.stdout.write(json.dumps({"steps": steps, "ranks": ranks, **budget.to_dict()}) + "\n")
                else:
                    text = "\n".join(budget.lines())
                    sys.stdout.write(f"{', '.join(steps)}, {ranks} processes, each on {given.device}:\n{text}\n")


if __name__ == "__main__":
    main()
