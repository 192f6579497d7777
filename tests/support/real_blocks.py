"""Blocks of tiny random models of transformers, and the groups that each must have, by its code."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.discovery import randomize_

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_shared_experts": 1,
}
MAMBA = {"state_size": 8, "time_step_rank": 4}
BAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}


def block_of(model_type: str, layer: int = 0, experts: str = "eager", **changes: Any) -> Call:
    """A block of a tiny model with random weights, and the arguments that the model calls it with."""
    sizes = changes if model_type.startswith(("gpt2", "mamba")) else SIZES | changes
    config = AutoConfig.for_model(model_type, **({"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2} | sizes))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    if MIXTRAL.keys() <= changes.keys() or DEEPSEEK.keys() <= changes.keys():
        model.set_experts_implementation(experts)
    randomize_(model, torch.Generator().manual_seed(0))
    members = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers)
    calls: list[Any] = []
    members[layer].register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    members[layer]._forward_pre_hooks.clear()
    return members[layer], *calls[0]


def rows(*names: str, axis: int = 1) -> dict[str, str]:
    return {f"{name}.weight": f"{axis}: +1" for name in names}


QKV = rows("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = rows("mlp.gate_proj", "mlp.up_proj")
V_TO_O = (16, {"self_attn.v_proj.weight": "0: -1", "self_attn.o_proj.weight": "1: +1"})
UP_TO_DOWN = (48, {"mlp.up_proj.weight": "0: -1", "mlp.down_proj.weight": "1: +1"})
EXPERTS_UP = {"mlp.experts.gate_up_proj": "1: -1", "mlp.experts.down_proj": "2: +1"}


def norm(name: str, consumers: dict[str, str], channels: int = 32, bias: bool = False, gain: str = "0: -1") -> Any:
    edits = {f"{name}.weight": gain} | ({f"{name}.bias": "0: -1"} if bias else {}) | consumers
    return {f"{name}.weight": (channels, edits)}


MLA = {
    **norm("self_attn.q_a_layernorm", rows("self_attn.q_b_proj"), 12),
    **norm("self_attn.kv_a_layernorm", rows("self_attn.kv_b_proj"), 16),
    "self_attn.kv_b_proj.weight": (48, {"self_attn.kv_b_proj.weight": "0: -1", "self_attn.o_proj.weight": "1: +1"}),
    **norm("input_layernorm", rows("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
}
PLUS_ONE = "0: -1, 1 + w"

EXPECTED: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "llama": (
        ("llama", 0),
        {},
        {
            **norm("input_layernorm", QKV),
            **norm("post_attention_layernorm", GATE_UP),
            "self_attn.v_proj.weight": V_TO_O,
            "mlp.up_proj.weight": UP_TO_DOWN,
        },
    ),
    "gemma": (
        ("gemma", 0),
        {"head_dim": 8},
        {
            **norm("input_layernorm", QKV, gain=PLUS_ONE),
            **norm("post_attention_layernorm", GATE_UP, gain=PLUS_ONE),
            "self_attn.v_proj.weight": V_TO_O,
            "mlp.up_proj.weight": UP_TO_DOWN,
        },
    ),
    "gpt2": (
        ("gpt2", 0),
        GPT2,
        {
            **norm("ln_1", rows("attn.c_attn", axis=0), bias=True),
            **norm("ln_2", rows("mlp.c_fc", axis=0), bias=True),
            "attn.c_attn.weight": (
                32,
                {"attn.c_attn.weight": "1: -1", "attn.c_attn.bias": "0: -1", "attn.c_proj.weight": "0: +1"},
            ),
        },
    ),
    "opt": (
        ("opt", 0),
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        {
            **norm("self_attn_layer_norm", QKV, bias=True),
            **norm("final_layer_norm", rows("fc1"), bias=True),
            "self_attn.v_proj.weight": (
                32,
                {
                    "self_attn.v_proj.weight": "0: -1",
                    "self_attn.v_proj.bias": "0: -1",
                    "self_attn.out_proj.weight": "1: +1",
                },
            ),
            "fc1.weight": (48, {"fc1.weight": "0: -1", "fc1.bias": "0: -1", "fc2.weight": "1: +1"}),
        },
    ),
    "gpt_neox": (
        ("gpt_neox", 0),
        {},
        {
            **norm("input_layernorm", rows("attention.query_key_value"), bias=True),
            **norm("post_attention_layernorm", rows("mlp.dense_h_to_4h"), bias=True),
            "attention.query_key_value.weight": (
                32,
                {
                    "attention.query_key_value.weight": "0: -1",
                    "attention.query_key_value.bias": "0: -1",
                    "attention.dense.weight": "1: +1",
                },
            ),
        },
    ),
    "phi3": (
        ("phi3", 0),
        {},
        {
            **norm("input_layernorm", rows("self_attn.qkv_proj")),
            **norm("post_attention_layernorm", rows("mlp.gate_up_proj")),
            "self_attn.qkv_proj.weight": (
                16,
                {"self_attn.qkv_proj.weight": "0: -1", "self_attn.o_proj.weight": "1: +1"},
            ),
            "mlp.gate_up_proj.weight": (48, {"mlp.gate_up_proj.weight": "0: -1", "mlp.down_proj.weight": "1: +1"}),
        },
    ),
    "falcon": (
        ("falcon", 0),
        {},
        {
            **norm("input_layernorm", rows("self_attention.query_key_value", "mlp.dense_h_to_4h"), bias=True),
            "self_attention.query_key_value.weight": (
                8,
                {"self_attention.query_key_value.weight": "0: -1", "self_attention.dense.weight": "1: +1"},
            ),
        },
    ),
    "mixtral": (
        ("mixtral", 0),
        MIXTRAL,
        {
            **norm("input_layernorm", QKV),
            **norm("post_attention_layernorm", rows("mlp.gate") | {"mlp.experts.gate_up_proj": "2: +1"}),
            "self_attn.v_proj.weight": V_TO_O,
            "mlp.experts.gate_up_proj": (48, EXPERTS_UP),
        },
    ),
    "deepseek dense": (
        ("deepseek_v3", 0),
        DEEPSEEK,
        {**MLA, **norm("post_attention_layernorm", GATE_UP), "mlp.up_proj.weight": UP_TO_DOWN},
    ),
    "deepseek experts": (
        ("deepseek_v3", 1),
        DEEPSEEK,
        {
            **MLA,
            **norm(
                "post_attention_layernorm",
                rows("mlp.gate", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
                | {"mlp.experts.gate_up_proj": "2: +1"},
            ),
            "mlp.experts.gate_up_proj": (24, EXPERTS_UP),
            "mlp.shared_experts.up_proj.weight": (
                24,
                {"mlp.shared_experts.up_proj.weight": "0: -1", "mlp.shared_experts.down_proj.weight": "1: +1"},
            ),
        },
    ),
    "olmo2": (("olmo2", 0), {}, {"self_attn.v_proj.weight": V_TO_O, "mlp.up_proj.weight": UP_TO_DOWN}),
    "nemotron": (
        ("nemotron", 0),
        {},
        {
            **norm("input_layernorm", QKV, bias=True, gain=PLUS_ONE),
            **norm("post_attention_layernorm", rows("mlp.up_proj"), bias=True, gain=PLUS_ONE),
            "self_attn.v_proj.weight": V_TO_O,
            "mlp.up_proj.weight": (48, {"mlp.up_proj.weight": "0: -1", "mlp.down_proj.weight": "1: +2"}),
        },
    ),
    "mamba": (
        ("mamba", 0),
        MAMBA,
        {
            **norm("norm", rows("mixer.in_proj")),
            "mixer.x_proj.weight": (4, {"mixer.x_proj.weight": "0: -1", "mixer.dt_proj.weight": "1: +1"}),
        },
    ),
    "bamba": (
        ("bamba", 0),
        BAMBA | {"attn_layer_indices": [1]},
        {
            **norm("input_layernorm", rows("mamba.in_proj")),
            **norm("mamba.norm", rows("mamba.out_proj"), 64),
            **norm("pre_ff_layernorm", rows("feed_forward.gate_proj", "feed_forward.up_proj")),
            "feed_forward.up_proj.weight": (
                48,
                {"feed_forward.up_proj.weight": "0: -1", "feed_forward.down_proj.weight": "1: +1"},
            ),
        },
    ),
}
