"""Models to be served: tiny random ones that are sure of something, and ways to break a checkpoint.

Random weights as a library draws them predict all tokens alike, and then nothing shows a wrong one. Here every linear
layer's output is as large as its input, so that attention and MLP change the hidden states by as much as the embedding
made them, and the logits spread by `SPREAD`.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

import quantkit
import quantkit.demo

VOCABULARY = 2048
SPREAD = 3.0
"""Standard deviation of the logits of a position."""
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
UNTIED = {"tie_word_embeddings": False}
SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
TINY: dict[str, dict[str, Any]] = {
    "llama": UNTIED,
    "qwen2": UNTIED,
    "qwen3": UNTIED,
    "gemma": {},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "opt": {**UNTIED, "word_embed_proj_dim": 128, "ffn_dim": 256, "pad_token_id": 1},
    "phi3": {**UNTIED, "original_max_position_embeddings": 256},
    "gpt2": {},
    "gpt_neox": UNTIED,
    "mixtral": {**UNTIED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**UNTIED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
}
"""What a model type's configuration needs beside `SIZES`."""
REAL = ("stories3M", "tensorforge-charopt")
"""Models of the data folder; every other name is a model type of which a tiny one is made."""
MODELS = [*REAL, "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt", "phi3"]
"""What is compared under every scheme."""
SCHEMES = {
    "w8a8": ["w8a8"],
    "w8a8 static": ["w8a8:activation=tensor-static"],
    "smoothquant w8a8": ["smoothquant", "w8a8"],
    "fp8": ["fp8"],
}
"""What vLLM's CPU build serves, and the steps that make it."""
TEXT = (
    "Once upon a time there was a little girl called Lily. She liked to play in the park with her dog Max. One day "
    "they found a big red ball under a tree. 'Look, Max, what a nice ball!' said Lily. They played all day long, and "
    "when the sun went down they went home and told Mom about it. Mom smiled and gave them some cake. "
)


def build(name: str, folder: Path, **changes: Any) -> Path:
    """The folder, with a tiny random model of this type in bfloat16 and the bundled model's tokenizer."""
    config = AutoConfig.for_model(name, **{**SIZES, **TINY.get(name, {}), **changes})
    model = spread(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    model.generation_config = GenerationConfig(eos_token_id=0)
    model.to(torch.bfloat16).save_pretrained(folder)
    source = Path(quantkit.demo.__file__).parent / "model"
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, folder / file)
    return folder


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """The model with every parameter drawn anew so that its logits spread, and no norm or bias is 1 or 0."""
    generator = torch.Generator().manual_seed(0)
    head = model.get_output_embeddings().weight
    embeddings = {id(model.get_input_embeddings().weight), id(head)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in embeddings:
                parameter.copy_(noise / parameter.shape[1] ** 0.5 if model.config.tie_word_embeddings else noise)
            elif parameter.ndim > 1:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.2 * noise)
        if model.config.tie_word_embeddings:
            # With random signs, or a tied model would be sure of one thing: the token that it has just read.
            gains = [gain for name, gain in model.named_parameters() if name.endswith(("norm.weight", "ln_f.weight"))]
            gains[-1].add_(SPREAD * torch.randn(gains[-1].shape, generator=generator).sign() - 1)
        else:
            tokens = torch.randint(0, VOCABULARY, (1, 128), generator=generator)
            head.mul_(SPREAD / model(tokens).logits.std(-1).mean())
    return model.eval()


def compress(folder: Path, scratch: Path, steps: Sequence[str], form: str = "auto") -> Path:
    """The folder of the model compressed by these steps, below `scratch`.

    Steps that observe are calibrated on half of the tokens that the server will be asked about, so that static ranges
    fit, and still some activations lie beyond them.
    """
    rows, output = scratch / "rows.jsonl", scratch / "output"
    half = prompts(folder)[::2]
    rows.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in half), encoding="utf-8")
    observes = any("smoothquant" in step or "static" in step for step in steps)
    data = {"dataset": str(rows), "samples": len(half), "seq_len": len(half[0])} if observes else {}
    quantkit.quantize(folder, output, steps=list(steps), format=form, progress=False, **data)
    return output


def prompts(folder: Path, count: int = 4, length: int = 32) -> list[list[int]]:
    """Token ids of a short text by the folder's own tokenizer, cut into `count` prompts."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT * 3, add_special_tokens=False)["input_ids"]
    return [ids[start : start + length] for start in range(0, count * length, length)]


def broken(folder: Path, output: Path, how: str) -> Path:
    """The output folder: a compressed checkpoint's copy with one thing wrong."""
    shutil.copytree(folder, output)
    tensors = load_file(folder / "model.safetensors")
    changed = BREAKAGES[how](tensors, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    assert changed, f"nothing to break by {how}"
    save_file({**tensors, **changed}, output / "model.safetensors", metadata={"format": "pt"})
    return output


def _interleaved_heads(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Rows of q and k in the order of the original Llama: pairs of a rotation side by side."""
    width = config["head_dim"]
    order = torch.arange(width).view(2, width // 2).t().reshape(-1)
    changed = {}
    for key, value in tensors.items():
        if ".q_proj." in key or ".k_proj." in key:
            heads = value.view(-1, width, *value.shape[1:])
            changed[key] = heads[:, order].reshape(value.shape).contiguous()
    return changed


def _swapped_scales(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One block's gate and up projections with one another's weight scales."""
    del config
    gate, up = (f"model.layers.1.mlp.{name}_proj.weight_scale" for name in ("gate", "up"))
    return {gate: tensors[up], up: tensors[gate]}


def _large_scale(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One linear layer of one block with scales of 128/127 of what they are: absmax over 127 taken as over 126."""
    del config
    key = "model.layers.1.self_attn.o_proj.weight_scale"
    return {key: tensors[key] * (128 / 127)}


def _shifted_rows(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One linear layer of one block whose scales belong to the rows before them."""
    del config
    key = "model.layers.1.mlp.down_proj.weight_scale"
    return {key: tensors[key].roll(1, 0)}


BREAKAGES = {
    "heads interleaved": _interleaved_heads,
    "scales swapped": _swapped_scales,
    "scales a row off": _shifted_rows,
    "scales 1 % large": _large_scale,
}
"""What can go wrong in a checkpoint that still loads."""
