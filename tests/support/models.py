"""Tiny random models and tokenizers in a folder: one builder a kind, each the smallest that shows what it is for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 260
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes, and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    made.chat_template = CHAT_TEMPLATE
    return made


def randomized(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model with every parameter drawn anew, norms and biases too, so that nothing is 0 or 1 by accident."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_norm else 0.1 * noise)
    return model.to(dtype).eval()


def llama_model(dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A Llama with grouped queries, in memory."""
    config = LlamaConfig(**{**LLAMA, "tie_word_embeddings": False, **changes})
    return randomized(LlamaForCausalLM(config), dtype)


def save(model: PreTrainedModel, folder: Path, **how: Any) -> Path:
    """The folder, with the model, a tokenizer and the files that come with a model."""
    model.generation_config = GenerationConfig(eos_token_id=256, max_length=50)
    model.save_pretrained(folder, **how)
    tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("do what you like\n", encoding="utf-8")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The source's own card\n", encoding="utf-8")
    return folder


def llama(folder: Path) -> Path:
    """Float32, untied, one file."""
    return save(llama_model(), folder)


def llama_tied(folder: Path) -> Path:
    """The output layer is the embedding."""
    return save(llama_model(tie_word_embeddings=True), folder)


def llama_bf16(folder: Path) -> Path:
    """As `llama`, in bfloat16."""
    return save(llama_model(torch.bfloat16), folder)


def llama_fp16(folder: Path) -> Path:
    """As `llama`, in float16."""
    return save(llama_model(torch.float16), folder)


def llama_odd(folder: Path) -> Path:
    """In features that neither 4 nor 128 divides, and linear layers with a bias."""
    sizes = {"hidden_size": 36, "intermediate_size": 51, "num_attention_heads": 2, "num_key_value_heads": 1}
    return save(llama_model(**sizes, attention_bias=True, mlp_bias=True), folder)


def llama_sharded(folder: Path) -> Path:
    """As `llama`, in several files with an index."""
    return save(llama_model(), folder, max_shard_size="300KB")


def llama_unused(folder: Path) -> Path:
    """As `llama`, with two tensors that the model doesn't use, one of them in the first block."""
    llama(folder)
    frequencies = torch.linspace(0, 1, 16)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": frequencies, "left.over": torch.tensor([float("nan")])}
    return change_tensors(folder, lambda tensors: tensors | extra)


def llama_second_name(folder: Path) -> Path:
    """Tied, and the checkpoint holds the shared tensor under the name of its second use only."""
    llama_tied(folder)
    rename = {"model.embed_tokens.weight": "lm_head.weight"}
    return change_tensors(folder, lambda tensors: {rename.get(key, key): value for key, value in tensors.items()})


def opt(folder: Path) -> Path:
    """Biases everywhere, tied, `final_layer_norm`s."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=1,
    )
    return save(randomized(OPTForCausalLM(config)), folder)


def opt_short_names(folder: Path) -> Path:
    """As `opt`, with names as old checkpoints have them: without the prefix `model.`."""
    opt(folder)
    return change_tensors(folder, lambda tensors: {k.removeprefix("model."): v for k, v in tensors.items()})


def gpt2_model(**changes: Any) -> PreTrainedModel:
    """A GPT-2, in memory: its layers are Conv1D, whose weights are in x out."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY}
    return randomized(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=256, **changes)))


def gpt2(folder: Path) -> Path:
    """Tied, in x out."""
    return save(gpt2_model(), folder)


def gpt2_untied(folder: Path) -> Path:
    """As `gpt2`, with an output layer of its own, which is a plain linear layer."""
    return save(gpt2_model(tie_word_embeddings=False), folder)


def mixtral(folder: Path) -> Path:
    """A mixture of experts: fused parameters in the model, a linear layer an expert on disk."""
    sizes = {**LLAMA, "hidden_size": 32, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}
    return save(randomized(MixtralForCausalLM(MixtralConfig(**sizes))), folder)


def gpt_oss(folder: Path) -> Path:
    """A mixture of experts that lie together in one tensor, in x out, in the model and on disk."""
    sizes = {**LLAMA, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "num_local_experts": 4}
    return save(randomized(GptOssForCausalLM(GptOssConfig(**sizes, num_experts_per_tok=2))), folder)


def bert(folder: Path) -> Path:
    """No causal model."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return save(randomized(BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes))), folder)


BUILDERS: dict[str, Callable[[Path], Path]] = {
    builder.__name__: builder
    for builder in (
        llama,
        llama_tied,
        llama_bf16,
        llama_fp16,
        llama_odd,
        llama_sharded,
        llama_unused,
        llama_second_name,
        opt,
        opt_short_names,
        gpt2,
        gpt2_untied,
        mixtral,
        gpt_oss,
        bert,
    )
}


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file of a folder, read with safetensors itself."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def change_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], file: str = "model.safetensors"
) -> Path:
    """The folder, with the tensors of one of its files changed."""
    path = folder / file
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    save_file(change(tensors), path, metadata={"format": "pt"})
    return folder


def change_config(folder: Path, **values: Any) -> Path:
    """The folder, with values of its config.json changed."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | values), encoding="utf-8")
    return folder


def copy(folder: Path, target: Path) -> Path:
    """A copy of a folder, to be changed."""
    shutil.copytree(folder, target)
    return target


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)
