"""Writes the checkpoints in tests/oracles/fixtures with the software of others, and what that software makes of them.

    python tests/oracles/make_fixtures.py FIXTURE...     (or the name of a writer, for all that it writes)

Each writer wants an environment of its own (`pip install llmcompressor==0.14.0.1`, or the oracles of pyproject.toml;
for `sparse-24-bitmask` compressed-tensors 0.14.0.1, the last release that writes it), and none of them needs quantkit.
A fixture is a folder as its writer saved it, and beside it `<name>.expected.safetensors`:

    tokens            int64 [1, 8]
    logits            float32 [1, 8, V]: the decoded weights in a float32 model, activations in float
    logits_quantized  the same with activations (not a cache) quantized as it says, where transformers can do that

Its metadata holds, as JSON, the versions, and by tensor name the start of the SHA-256 of every weight that was decoded
by the writer's own code. All models are tiny and random: nothing here is anybody's.
"""

import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

FOLDER = Path(__file__).parent / "fixtures"
WRITERS = {
    "llm-compressor": ("llmcompressor", "compressed-tensors", "transformers", "torch"),
    "compressed-tensors": ("compressed-tensors", "transformers", "torch"),
    "sparse-24-bitmask": ("compressed-tensors", "transformers", "torch"),
    "bitsandbytes": ("bitsandbytes", "transformers", "torch"),
}
"""The packages whose versions are noted for each."""
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": True,
}
WIDE = SMALL | {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4}
"""For groups and blocks of 128."""
DEEP = SMALL | {"num_hidden_layers": 2}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
MOE = SMALL | EXPERTS | {"intermediate_size": 32, "moe_intermediate_size": 32}
HEAD = ("lm_head",)


def llama(sizes: dict[str, Any] = SMALL, **changes: Any) -> LlamaConfig:
    return LlamaConfig(**sizes | changes)


def qwen2() -> Qwen2Config:
    """With biases, and an output layer of its own."""
    sizes = {key: value for key, value in SMALL.items() if key != "head_dim"}
    return Qwen2Config(**sizes | {"tie_word_embeddings": False})


def qwen3() -> Qwen3Config:
    return Qwen3Config(**SMALL)


def opt() -> OPTConfig:
    """With biases; its MLP sees activations of two axes."""
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96, "vocab_size": 64, "num_hidden_layers": 1}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return OPTConfig(**sizes, num_attention_heads=2, max_position_embeddings=32, **ids)


def mixtral() -> MixtralConfig:
    return MixtralConfig(**MOE)


def qwen3_moe() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**MOE)


@dataclass(frozen=True)
class Fixture:
    """What is written: by whom, of which model, and how."""

    writer: str
    config: Callable[[], Any]
    how: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16


def arguments(**words: Any) -> dict[str, Any]:
    """Quantization arguments of compressed-tensors."""
    return {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, **words}


FLOAT = {"type": "float"}
TOKEN = {"strategy": "token", "dynamic": True}
INT8 = {"weights": arguments(strategy="channel"), "input_activations": arguments(**TOKEN)}
FP8 = {"weights": arguments(**FLOAT, strategy="channel"), "input_activations": arguments(**FLOAT, **TOKEN)}


def groups(*found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Config groups, of Linear where they don't say of what."""
    return {f"group_{number}": {"targets": ["Linear"]} | group for number, group in enumerate(found)}


llmc, direct = partial(Fixture, "llm-compressor"), partial(Fixture, "compressed-tensors")
sparse = partial(Fixture, "sparse-24-bitmask")
STATIC = {"weights": INT8["weights"], "input_activations": arguments(strategy="tensor", observer="static_minmax")}
CACHE = arguments(**FLOAT, strategy="tensor", observer="static_minmax")
GROUPS_OF_32 = arguments(num_bits=4, strategy="group", group_size=32)
ROUTERS = (*HEAD, "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$")
FIXTURES = {
    "w8a8": llmc(llama, {"scheme": "W8A8"}),
    "w8a8-static": llmc(qwen2, {"config_groups": groups(STATIC)}),
    "fp8-dynamic": llmc(qwen3, {"scheme": "FP8_DYNAMIC"}),
    "fp8-static": llmc(llama, {"scheme": "FP8"}, torch.float16),
    "fp8-block": llmc(partial(llama, WIDE), {"scheme": "FP8_BLOCK"}),
    "fp8-kv-cache": llmc(llama, {"scheme": "FP8", "kv_cache_scheme": CACHE}),
    "w8a16-channel": llmc(opt, {"config_groups": groups({"weights": INT8["weights"]})}, torch.float32),
    "w8a16-g128": llmc(partial(llama, WIDE), {"scheme": "W8A16"}),
    "w4a16": llmc(partial(llama, WIDE), {"scheme": "W4A16"}),
    "w4a16-asymmetric": llmc(
        partial(llama, mlp_bias=True), {"config_groups": groups({"weights": GROUPS_OF_32 | {"symmetric": False}})}
    ),
    "w4a16-gptq": llmc(llama, {"config_groups": groups({"weights": GROUPS_OF_32}), "gptq": True}),
    "smoothquant-w8a8": llmc(llama, {"scheme": "W8A8", "smoothing_strength": 0.5}),
    "moe-mixtral": llmc(mixtral, {"scheme": "FP8_DYNAMIC", "ignore": ROUTERS}),
    "moe-fp8": llmc(qwen3_moe, {"scheme": "FP8_DYNAMIC", "ignore": ROUTERS}, torch.float32),
    "moe-w8a8": llmc(qwen3_moe, {"scheme": "W8A8", "ignore": ROUTERS}),
    "moe-w4a16": llmc(
        qwen3_moe, {"config_groups": groups({"weights": GROUPS_OF_32}), "ignore": ROUTERS}, torch.float32
    ),
    "mixed": llmc(
        partial(llama, DEEP),
        {
            "config_groups": groups(
                INT8 | {"targets": [r"re:.*self_attn\.(q|k|v|o)_proj$"]}, FP8 | {"targets": [r"re:.*mlp\..*_proj$"]}
            ),
            "ignore": (*HEAD, "model.layers.1.mlp.down_proj", r"re:.*layers\.0\.self_attn\.o_proj"),
        },
    ),
    "naive-quantized": direct(llama, groups({"weights": FP8["weights"], "format": "naive-quantized"})),
    "float-quantized": direct(
        qwen2,
        groups(
            {
                "weights": arguments(**FLOAT, strategy="tensor"),
                "input_activations": FP8["input_activations"],
                "format": "float-quantized",
            }
        ),
    ),
    "int-quantized": direct(
        llama,
        groups(
            {
                "weights": arguments(strategy="tensor"),
                "input_activations": arguments(strategy="tensor", dynamic=True),
                "format": "int-quantized",
            }
        ),
        torch.float32,
    ),
    "pack-quantized": direct(
        llama, groups({"weights": arguments(strategy="group", group_size=32), "format": "pack-quantized"})
    ),
    "sparse24-bf16": sparse(llama),
    "sparse24-int8": sparse(qwen2, groups(INT8 | {"format": "int-quantized"})),
    "sparse24-fp8": sparse(llama, groups(FP8 | {"format": "float-quantized"}), torch.float16),
    "bitsandbytes": Fixture("bitsandbytes", qwen2, dtype=torch.float16),
    "bitsandbytes-opt": Fixture("bitsandbytes", opt, {"llm_int8_threshold": 2.0}, torch.float16),
}


def build(name: str) -> PreTrainedModel:
    """The random float model of a fixture; its name is the seed. Some in features are large in every token."""
    fixture = FIXTURES[name]
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]))
    model = AutoModelForCausalLM.from_config(fixture.config())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in key and key.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
                parameter[::29] *= 6
            else:
                parameter.copy_(0.15 * noise)
    return model.to(fixture.dtype).eval()


def tokens(name: str, count: int, length: int) -> torch.Tensor:
    """Random tokens [count, length]."""
    return torch.randint(2, 64, (count, length), generator=torch.Generator().manual_seed(len(name)))


def with_llm_compressor(name: str, folder: Path) -> None:
    """Through `oneshot`, calibrated on random tokens."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from torch.utils.data import DataLoader

    how = {"targets": ["Linear"], "ignore": HEAD} | FIXTURES[name].how
    how["ignore"] = list(how["ignore"])
    recipe: list[Any] = []
    if "smoothing_strength" in how:
        recipe.append(SmoothQuantModifier(smoothing_strength=how.pop("smoothing_strength")))
    recipe.append((GPTQModifier if how.pop("gptq", False) else QuantizationModifier)(**how))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens(name + "data", 8, 24)]
    data = DataLoader(rows, batch_size=1)
    with tempfile.TemporaryDirectory() as source:
        build(name).save_pretrained(source)
        # `oneshot` insists on a tokenizer, which isn't used, nor saved.
        words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<end>": 1})), pad_token="<end>")
        model = oneshot(model=source, tokenizer=words, dataset=data, recipe=recipe, pipeline="sequential")
        model.save_pretrained(folder, save_compressed=True)


def with_compressed_tensors(name: str, folder: Path) -> None:
    """Through its own compressor, with the largest magnitude as the range."""
    from compressed_tensors.compressors import ModelCompressor

    model = build(name)
    apply_groups(name, model)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def apply_groups(name: str, model: PreTrainedModel) -> None:
    """Give a model's layers the schemes of a fixture's groups, and scales from the largest magnitudes."""
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    found = FIXTURES[name].how
    config = QuantizationConfig(
        config_groups=found,
        ignore=list(HEAD),
        format=found["group_0"]["format"],
        quantization_status=QuantizationStatus.FROZEN,
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        weight, args = module.weight.detach(), scheme.weights
        runs = {"tensor": (1, -1), "channel": (len(weight), -1), "group": (-1, args.group_size or 1)}
        values = weight.reshape(runs[getattr(args.strategy, "value", args.strategy)])
        scale, _ = calculate_qparams(values.amin(1, keepdim=True), values.amax(1, keepdim=True), args)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))


def with_bitmasks(name: str, folder: Path) -> None:
    """Through the compressor of 2:4 sparse weights that compressed-tensors had: the two largest of four are kept."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.config import Sparse24BitMaskConfig

    model = build(name)
    with torch.no_grad():
        for key, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and key not in HEAD:
                runs = module.weight.view(-1, 4)
                runs.scatter_(1, runs.abs().topk(2, dim=1, largest=False).indices, 0.0)
                module.weight[0, :4] = 0.0  # zeros that are stored as well
    if FIXTURES[name].how:
        apply_groups(name, model)
    config = Sparse24BitMaskConfig(targets=["Linear"], ignore=list(HEAD), global_sparsity=0.5)
    compressor = ModelCompressor.from_pretrained_model(model, sparsity_config_or_format=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def with_bitsandbytes(name: str, folder: Path) -> None:
    """Through transformers, which saves what bitsandbytes makes of a float model."""
    from transformers import BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as float_folder:
        build(name).save_pretrained(float_folder)
        config = BitsAndBytesConfig(load_in_8bit=True, **FIXTURES[name].how)
        model = AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=config, device_map="cpu")
    model.save_pretrained(folder)


def decoded(folder: Path, writer: str) -> dict[str, torch.Tensor]:
    """Every compressed weight by the name of its float tensor, decoded by the writer's own code."""
    stored = load_file(folder / "model.safetensors")
    if writer == "bitsandbytes":
        from bitsandbytes.functional import int8_vectorwise_dequant

        layers = [key.removesuffix(".SCB") for key in stored if key.endswith(".SCB")]
        # transformers rounds it to the model's dtype, as `model.dequantize()` does
        return {
            f"{layer}.weight": int8_vectorwise_dequant(stored[f"{layer}.weight"], stored[f"{layer}.SCB"]).half()
            for layer in layers
        }
    if writer == "sparse-24-bitmask":
        return decoded_bitmasks(folder, stored)
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_targets

    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    known = ("config_groups", "ignore", "format", "kv_cache_scheme", "quantization_status")
    config = QuantizationConfig.model_validate({key: said[key] for key in known if key in said})
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    found = {}
    for layer in [key.removesuffix(".weight_scale") for key in stored if key.endswith(".weight_scale")]:
        own = {key.rpartition(".")[2]: value for key, value in stored.items() if key.startswith(f"{layer}.")}
        scheme = schemes[match_targets(layer, torch.nn.Linear(1, 1), schemes)[0]]
        form = scheme.format or config.format
        compressor = BaseCompressor.get_value_from_registry(getattr(form, "value", form))
        found[f"{layer}.weight"] = compressor.decompress(own, scheme)["weight"]
    return found


def decoded_bitmasks(folder: Path, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same of a 2:4 sparse checkpoint, whose codes are unpacked first."""
    from compressed_tensors.compressors import sparse24_bitmask_decompress
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    found = {}
    for layer in [key.removesuffix(".bitmask") for key in stored if key.endswith(".bitmask")]:
        values, mask, shape = (stored[f"{layer}.{leaf}"] for leaf in ("compressed", "bitmask", "shape"))
        is_fp8 = values.dtype == torch.float8_e4m3fn
        raw = values.view(torch.int8) if is_fp8 else values
        weight = sparse24_bitmask_decompress(raw, mask, shape.flatten().tolist()).view(values.dtype)
        scale = stored.get(f"{layer}.weight_scale")
        found[f"{layer}.weight"] = weight if scale is None else dequantize(weight, scale)
    return found


OWN_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""What Mixtral's layers are called that llm-compressor saves by names of its own: nothing else reads these."""


def own_name(found: re.Match[str]) -> str:
    """The name of a layer in a float checkpoint."""
    return OWN_NAMES.get(found[0], found[0])


def float_folder(folder: Path, weights: dict[str, torch.Tensor], out: Path) -> None:
    """A float checkpoint of the decoded weights."""
    layers = {key.removesuffix(".weight") for key in weights}
    stored = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in stored.items() if key.rpartition(".")[0] not in layers or key.endswith("bias")}
    kept = {key: value for key, value in kept.items() if not key.endswith((".k_scale", ".v_scale"))}
    made = {key: value.contiguous() for key, value in (kept | weights).items()}
    if any("block_sparse_moe" in key for key in made):
        made = {re.sub(r"(?<=\.)\w+_proj(?=\.weight)", own_name, key): value for key, value in made.items()}
    save_file(made, out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")


def with_float_cache(folder: Path, out: Path) -> Path:
    """A copy of a checkpoint whose keys and values are not to be quantized."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"].pop("kv_cache_scheme", None)
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


def logits(folder: Path, ids: torch.Tensor, **words: Any) -> torch.Tensor:
    """Logits of the model of a folder, in float32."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", output_loading_info=True, **words)
    if info["missing_keys"]:
        raise RuntimeError(f"transformers finds nothing for {sorted(info['missing_keys'])[0]}")
    with torch.inference_mode():
        return model.eval()(ids).logits.float()


def expected(name: str, folder: Path) -> None:
    """Write what the writer makes of a fixture beside it."""
    writer, ids = FIXTURES[name].writer, tokens(name, 1, 8)
    weights = decoded(folder, writer)
    with tempfile.TemporaryDirectory() as made:
        float_folder(folder, weights, Path(made))
        found = {"tokens": ids, "logits": logits(Path(made), ids, dtype=torch.float32)}
    try:
        # bitsandbytes computes in float16 whatever comes in, and of OPT in nothing else
        dtype = torch.float16 if writer == "bitsandbytes" else torch.float32
        with tempfile.TemporaryDirectory() as made:
            found["logits_quantized"] = logits(with_float_cache(folder, Path(made)), ids, dtype=dtype)
        failure = None
    except Exception as error:  # whatever transformers can't load of what its own ecosystem wrote
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    about = {
        "command": f"python tests/oracles/make_fixtures.py {name}",
        "versions": {package: version(package) for package in WRITERS[writer]},
        "transformers fails": failure,
        "weights": {
            key: hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
            for key, value in sorted(weights.items())
        },
    }
    save_file(found, FOLDER / f"{name}.expected.safetensors", {"about": json.dumps(about)})


def main(words: list[str]) -> None:
    """Write the fixtures of these names, or of these writers."""
    makers = {
        "llm-compressor": with_llm_compressor,
        "compressed-tensors": with_compressed_tensors,
        "sparse-24-bitmask": with_bitmasks,
        "bitsandbytes": with_bitsandbytes,
    }
    for name in [name for name, fixture in FIXTURES.items() if {name, fixture.writer} & set(words)]:
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        makers[FIXTURES[name].writer](name, folder)
        for path in folder.iterdir():
            path.chmod(0o644)
        expected(name, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
