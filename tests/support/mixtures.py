"""Tiny mixtures of experts, in memory and written quantized by hand: no part of the pipeline is used."""

import copy
import re
from pathlib import Path
from typing import Any

import models
import torch
from quantkit_kernels.formats import dequantize
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    DbrxConfig,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.models.auto import AutoModelForCausalLM

from quantkit import formats
from quantkit.experts import QuantizedExperts, put_experts, quantize_experts, use_packed_experts
from quantkit.modules import quantize_linear
from quantkit.pieces import compress_expert
from quantkit.scheme import Scheme

SIZES: dict[str, Any] = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
LATENT |= {"head_dim": 8}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES | {"num_experts": 4, "moe_intermediate_size": 24}),
    "deepseek_v3": lambda: DeepseekV3Config(
        **SIZES | LATENT | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24},
        first_k_dense_replace=1,
    ),
    "gpt_oss": lambda: GptOssConfig(**SIZES),
    "gpt_oss_square": lambda: GptOssConfig(**SIZES | {"intermediate_size": 32}),
    "llama4": lambda: Llama4TextConfig(**SIZES | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}),
    "granitemoe": lambda: GraniteMoeConfig(**SIZES),
    "dbrx": lambda: DbrxConfig(
        d_model=32,
        n_heads=2,
        n_layers=2,
        max_seq_len=64,
        vocab_size=models.VOCABULARY,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    ),
}
OUT_IN = {r"experts\.(gate_up|down)_proj$": 2}
EXPERTS = {
    "mixtral": OUT_IN,
    "qwen3_moe": OUT_IN,
    "deepseek_v3": OUT_IN,
    "granitemoe": OUT_IN,
    "gpt_oss": {r"experts\.(gate_up|down)_proj$": 1},
    "gpt_oss_square": {r"experts\.(gate_up|down)_proj$": 1},
    "llama4": {r"experts\.(gate_up|down)_proj$": 1},
    "dbrx": {r"experts\.mlp\.[wv]1$": 2, r"experts\.mlp\.w2$": 1},
}
"""Parameters that hold experts, to the axis of their in features, experts on axis 0 (DBRX: 48 rows an expert)."""
FUSED = {
    "gpt_oss": EXPERTS["gpt_oss"],
    "gpt_oss_square": EXPERTS["gpt_oss"],
    "llama4": EXPERTS["llama4"],
    "granitemoe": {r"(input|output)_linear\.weight$": 2},
    "dbrx": EXPERTS["dbrx"],
}
"""Checkpoint keys that hold all experts together; the other models' hold one expert each."""


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model."""
    return models.randomized(AutoModelForCausalLM.from_config(CONFIGS[name]()), dtype)


def in_axis(name: str, parameter: str, table: dict[str, dict[str, int]]) -> int | None:
    """The axis of the in features of a parameter or key that holds experts, or None for another."""
    return next((axis for pattern, axis in table.get(name, {}).items() if re.search(pattern, parameter)), None)


def by_expert(parameter: torch.Tensor) -> torch.Tensor:
    """[E, A, B], of a parameter that may hold the experts one below the other."""
    return parameter.view(-1, 48, 32) if parameter.ndim == 2 else parameter


def quantized(name: str, model: PreTrainedModel, scheme: Scheme) -> PreTrainedModel:
    """A copy of the model with packed experts."""
    made = copy.deepcopy(model)
    for parameter, value in model.named_parameters():
        axis = in_axis(name, parameter, EXPERTS)
        if axis is not None:
            codes, scale = quantize_experts(by_expert(value.detach()), scheme, axis)
            put_experts(made, parameter, QuantizedExperts(codes, scale, axis, scheme))
    use_packed_experts(made)
    return made


def decoded(name: str, model: PreTrainedModel, scheme: Scheme) -> PreTrainedModel:
    """A copy of the model whose experts are the decoded ones, in float."""
    made = copy.deepcopy(model)
    for parameter, value in made.named_parameters():
        axis = in_axis(name, parameter, EXPERTS)
        if axis is not None:
            codes, scale = quantize_experts(by_expert(value.detach()), scheme, axis)
            value.data = decoded_experts(codes, scale, axis).reshape(value.shape)
    for module in made.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"
    return made


def decoded_experts(codes: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    """The float weights [E, A, B]."""
    if axis == 2:
        return dequantize(codes, scale)
    return dequantize(codes.transpose(1, 2), scale.transpose(1, 2)).transpose(1, 2)


def write(name: str, model: PreTrainedModel, folder: Path, scheme: Scheme, form: str = "auto") -> Path:
    """The model in a folder, with its experts quantized one by one; everything else in float."""
    model.save_pretrained(folder)
    layout = formats.choose(scheme, form)
    tensors: dict[str, torch.Tensor] = {}
    modules = []
    for key, value in load_file(folder / "model.safetensors").items():
        layers = {}
        axis = in_axis(name, key, FUSED)
        if axis is not None:
            owner, _, leaf = key.removesuffix(".weight").rpartition(".")
            layers = {f"{owner}.{e}.{leaf}": (part, axis == 1) for e, part in enumerate(by_expert(value))}
        elif re.search(r"experts\.\d+\.\w+\.weight$", key):
            layers = {key.removesuffix(".weight"): (value, False)}
        for layer, (part, transposed) in layers.items():
            codes, scale = quantize_linear(part.t().contiguous() if transposed else part, scheme)
            stored = compress_expert(layout, scheme, codes, scale, transposed)
            tensors |= {f"{layer}.{leaf}": tensor for leaf, tensor in stored.items()}
            modules.append(layer)
        if not layers:
            tensors[key] = value
    save_file({key: value.clone() for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    left = [each for each, module in model.named_modules() if isinstance(module, nn.Linear)]
    return models.change_config(folder, quantization_config=layout.config(scheme, modules, left))
