"""A tiny random model of any entry of transformers' table of causal language models.

The configuration is shrunk by the names that configurations share; `OVERRIDES` holds what names alone can't settle.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import models
import torch
from architectures import UNBUILDABLE
from models import VOCABULARY
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

END = 256


class Unbuildable(Exception):  # noqa: N818
    """An entry has no tiny model, and why."""


SHARED_NAMES: tuple[tuple[int, str], ...] = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input text_vocab_size decoder_vocab_size unpadded_vocab_size"),
    # widths
    (64, "hidden_size d_model n_embd dim emb_dim embedding_dim embedding_size word_embed_proj_dim lru_width"),
    (64, "input_embedding_size output_embedding_size hidden_size_global out_hidden_size backbone_hidden_size"),
    (64, "pronunciation_embed_dim shape_embed_dim attention_hidden_size"),
    (128, "intermediate_size ffn_dim dim_ff dff d_ff d_inner ffn_hidden_size n_inner decoder_ffn_dim encoder_ffn_dim"),
    (128, "feed_forward_size mlp_dim intermediate_size_mlp dense_intermediate_size mlp_hidden_size"),
    (64, "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"),
    (64, "moe_shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size router_hidden_size"),
    (32, "hidden_size_per_layer_input laurel_rank gated_norm_rank"),
    # depths, and how many of the first layers are of a kind
    (2, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers depth"),
    (2, "num_encoder_layers num_blocks conf_num_hidden_layers num_global_layers"),
    (1, "first_k_dense_replace num_dense_layers moe_layer_start_index max_window_layers moe_layer_end_index"),
    (0, "num_nextn_predict_layers"),
    # heads
    (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    (4, "attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"),
    (4, "linear_num_value_heads linear_num_heads conf_num_attention_heads"),
    (2, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads"),
    (2, "num_global_key_value_heads num_query_groups index_n_heads o_groups"),
    (16, "head_dim swa_head_dim linear_key_head_dim linear_value_head_dim d_head d_kv dim_head kv_channels"),
    (16, "attention_head_size attention_head_dim"),
    (32, "global_head_dim index_head_dim linear_head_dim"),
    (8, "rotary_dim"),
    (32, "kv_lora_rank q_lora_rank o_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim"),
    (64, "qk_head_dim"),
    # experts
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k zero_expert_num"),
    (1, "n_group num_expert_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    # recurrences
    (16, "mamba_d_state state_size ssm_state_size"),
    (4, "mamba_n_heads mamba_num_heads"),
    (32, "mamba_d_head mamba_head_dim mamba_headdim time_step_rank mamba_dt_rank"),
    (2, "mamba_n_groups n_groups mamba_ngroups n_mamba_heads"),
    (8, "mamba_chunk_size chunk_size"),
    (128, "mamba_d_ssm"),
    # reaches
    (256, "max_position_embeddings n_positions max_seq_len n_ctx context_length model_max_length"),
    (256, "max_target_positions max_source_positions original_max_position_embeddings"),
    (8, "sliding_window sliding_window_size attention_window_size window_size local_attention attention_chunk_size"),
    (8, "keep_window_size index_topk lsh_attn_chunk_length local_attn_chunk_length"),
    # tokens, pictures
    (END, "bos_token_id eos_token_id decoder_start_token_id forced_eos_token_id eod_token_id"),
    (32, "image_size crop_size"),
    (16, "patch_size"),
)
SIZES = {name: size for size, names in SHARED_NAMES for name in names.split()}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
NEEDED = {"num_key_value_heads", "head_dim", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"}
"""Sizes that are filled in where a configuration has none."""


ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
SLIDING, FULL, LINEAR, HYBRID = "sliding_attention", "full_attention", "linear_attention", "hybrid"

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"use_cache": False, "encoder_hash_byte_group_vocab": 64, "encoder_config.intermediate_size": 128},
    "cohere_compass_text": {"rope_parameters": {SLIDING: ROTARY, FULL: ROTARY}, "layer_types": [SLIDING, FULL]},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0, "ffn_config.moe_top_k": 2},
    "deepseek_v2": {"first_k_dense_replace": 1},
    "deepseek_v4": {
        "head_dim": 32,
        "qk_rope_head_dim": 16,
        "o_groups": 2,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "dots1": {"first_k_dense_replace": 1},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
        "global_head_dim": 32,
    },
    "gemma4": {"text_config.global_head_dim": 32},
    "gemma4_unified": {"text_config.global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "got_ocr2": {"vision_config.output_channels": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL]},
    "inkling2_text": {
        "n_layers_per_attn_res_block": 2,
        "num_hidden_layers": 3,
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
    },
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2_moe": {"layer_types": ["conv", FULL]},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "mamba2": {"head_dim": 32},
    "minimax_m3_vl_text": {"index_block_size": 4, "index_topk_blocks": 2},
    "mllama": {"text_config.num_hidden_layers": 3, "text_config.cross_attention_layers": [1]},
    "phi4_multimodal": {
        "audio_config.ext_pw_out_channel": 64,
        "audio_config.depthwise_separable_out_channel": 64,
        "audio_config.nemo_conv_channels": 64,
    },
    "qwen4_exp_text": {
        "eos_token_id": END,
        "hc_lowrank": 32,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"hash_seed": 0, "axial_pos_shape": (16, 16), "axial_pos_embds_dim": (32, 32)},
    "roc_bert": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"hidden_size": 128},
    "zamba": {"layers_block_type": [LINEAR, HYBRID, LINEAR, HYBRID], "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": [LINEAR, HYBRID, LINEAR, HYBRID], "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}
OVERRIDES["qwen4_exp"] = {f"text_config.{name}": value for name, value in OVERRIDES["qwen4_exp_text"].items()}
OVERRIDES["dots3_note_text"] = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 64,
    "swa_qk_nope_head_dim": 32,
    "swa_v_head_dim": 32,
}
OVERRIDES["dots3_note"] = {
    **{f"text_config.{name}": value for name, value in OVERRIDES["dots3_note_text"].items()},
    "vision_config.adapter_in_dim": 64,
    "vision_config.adapter_out_dim": 64,
    "audio_config.adapter_input_size": 64,
    "audio_config.adapter_out_dim": 64,
}
"""What an entry needs beside its shrunken sizes; `"a.b"` is attribute b of the part a."""


def shrunk(config: PreTrainedConfig, more: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a smaller configuration of the same class: sizes by their names, layers so that each kind stays.

    What the class derives for itself is left to it. `more` goes over all of it; `"a.b"` in there is attribute b of the
    part a.
    """
    names = config.attribute_map
    defaults = {names.get(field.name, field.name): field.default for field in dataclasses.fields(config)}
    values = {name: value for name, value in vars(config).items() if name in defaults}
    changed: dict[str, Any] = {}
    for name, value in values.items():
        derived = defaults[name] is None and value is not None and "expert" not in name
        if isinstance(value, PreTrainedConfig):
            inside = {key.partition(".")[2]: item for key, item in more.items() if key.startswith(f"{name}.")}
            changed[name] = type(value)(**shrunk(value, inside))
        elif name in SIZES:
            size = value != 0 and isinstance(value, int | list) and not isinstance(value, bool)
            if name in NEEDED or (size and not derived):
                changed[name] = 1 if value == 1 and "key_value" in name else SIZES[name]
        elif re.search(r"(_token_id|_token_index|_index|_id)$", name) and isinstance(value, int):
            changed[name] = value if value < 32 else VOCABULARY - 1
        elif name == "rope_parameters" and isinstance(value, dict) and not derived:
            changed[name] = short_reach(value)
    if values.get("kv_lora_rank"):  # latent attention has as many keys as queries
        changed["num_key_value_heads"] = changed["num_attention_heads"]
        if changed.get("head_dim"):
            changed["head_dim"] = changed["qk_rope_head_dim"]
    if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        changed["is_decoder"] = True
    return changed | cut_layers(values, changed) | {key: value for key, value in more.items() if "." not in key}


def short_reach(parameters: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters as they were, for every kind of layer, but trained on 64 tokens where they name a number."""
    made = {key: short_reach(value) if isinstance(value, dict) else value for key, value in parameters.items()}
    return made | ({"original_max_position_embeddings": 64} if "original_max_position_embeddings" in made else {})


def cut_layers(values: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """The number of layers, and the lists with an item a layer cut to layers that differ; nothing without lists."""
    counts = [name for name in LAYER_COUNTS if name in changed]
    layers = values[counts[0]] if counts else 0
    lists = {
        name: value
        for name, value in values.items()
        if isinstance(value, list | tuple)
        and len(value) == layers > 1
        and (name == "no_rope_layers" or all(isinstance(item, str | float) for item in value))
    }
    if not lists:
        return {}
    rows = list(zip(*lists.values(), strict=True))
    chosen = sorted(rows.index(row) for row in set(rows))
    if len(chosen) == 1:
        chosen = [0, 1]
    cut = {name: [value[number] for number in chosen] for name, value in lists.items()}
    return cut | dict.fromkeys(counts, len(chosen))


def configuration(model_type: str) -> PreTrainedConfig:
    """A small configuration of an entry."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**shrunk(kind(), OVERRIDES.get(model_type, {})))


BESIDE_START = re.compile(r"(A_log|D|Lambda|\w*(bias|scale)|time_\w+)$")
"""Parameters with two axes or more that mean something other than a matrix."""


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Every parameter drawn anew: matrices from N(0, 1 / features in), all else 0.1 N(0, 1) beside where it started.

    Buffers of the checkpoint that are named a bias and are 0 get 0.1 N(0, 1) too.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for owner in model.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2 or BESIDE_START.match(name):
                parameter += 0.1 * noise
            else:
                parameter.copy_(noise / features_in(owner, parameter) ** 0.5)
        for name, buffer in owner.named_buffers(recurse=False):
            if name.endswith(("bias", "biases")) and buffer.dim() == 1 and buffer.is_floating_point():
                buffer += 0.1 * torch.randn(buffer.shape, generator=generator) * (buffer == 0)


def features_in(owner: nn.Module, parameter: torch.Tensor) -> float:
    """How many products an output sums up; where either axis may be the input, the mean of both."""
    if isinstance(owner, nn.Linear | nn.Embedding):
        return parameter.shape[1]
    if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return parameter[0].numel()
    return (parameter.shape[-1] * parameter.shape[-2]) ** 0.5


def build(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of an entry, float32, in eval mode.

    Raises:
        Unbuildable: there is none, for the reason that `architectures.UNBUILDABLE` has.
    """
    if model_type in UNBUILDABLE:
        raise Unbuildable(UNBUILDABLE[model_type])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(configuration(model_type), dtype=torch.float32)
    randomize(model, seed)
    return model.eval()


def inputs(model: PreTrainedModel, batch: int = 2, length: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the model's forward takes, as keywords: tokens [batch, length], all of them bytes."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(32, 250, (batch, length), generator=generator)}


def save(model_type: str, folder: Path, seed: int = 0) -> Path:
    """The folder, with `build`'s model and a tokenizer, as `AutoModelForCausalLM.from_pretrained` reads it.

    Some entries hand their class a part of the configuration only, and that part alone names no causal model: such a
    folder gets the whole configuration.
    """
    model = build(model_type, seed)
    models.save(model, folder)
    if model.config.model_type not in CONFIG_MAPPING or type(model.config) not in AutoModelForCausalLM._model_mapping:
        whole = configuration(model_type)
        whole.architectures = [type(model).__name__]
        whole.save_pretrained(folder)
    return folder
