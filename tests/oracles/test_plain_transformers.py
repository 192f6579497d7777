"""Every recipe on every kind of model, as a process that has transformers and not quantkit loads what was written.

What compressed-tensors and bitsandbytes can say loads there, with the same weights bit for bit, and with logits whose
Kullback-Leibler divergence from ours is small beside that of ours from the float model's: a tenth where both round
alike (weights alone, FP8, static int8), and as much, times 1.5, where they don't (int8 by token or tensor, whose steps
differ; bitsandbytes, which computes in float16; experts, whose activations transformers leaves in float; models in
bfloat16, where x / scale is rounded; OPT, all of whose tokens get one scale there).

All the rest is refused there with an error and makes no model: quantkit's own format, which transformers doesn't know,
and int8 with int8 activations beside experts (in 8 bits or in float) that lie on disk one by one, which transformers
5.23 can't convert.

One process loads all checkpoints of a set. The first set has each recipe and each kind of model a few times, the other
(exhaustive) the remaining pairs.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from judging import divergence
from quantkit_kernels.formats import dequantize, dequantize_weight
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GptOssConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto import AutoModelForCausalLM

import quantkit
from quantkit.checkpoint import read_config
from quantkit.experts import quantized_experts
from quantkit.modules import QuantizedLinear
from quantkit.recipe import Recipe, load_recipe, recipe_names

pytest.importorskip("compressed_tensors", reason="install the extra `oracles`")
pytest.importorskip("bitsandbytes", reason="install the extra `oracles`")

SIZES = models.LLAMA | {"num_hidden_layers": 1, "head_dim": 32, "pad_token_id": 256}
MOE = SIZES | {"intermediate_size": 128, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
MOE |= {"moe_intermediate_size": 128}
OPT = {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
OPT |= {"vocab_size": models.VOCABULARY, "max_position_embeddings": 64}
ENDS = {"bos_token_id": 256, "eos_token_id": 256}
KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: models.llama_model(num_hidden_layers=1),
    "llama-biases": lambda: models.llama_model(num_hidden_layers=1, attention_bias=True, mlp_bias=True),
    "llama-tied-bf16": lambda: models.llama_model(torch.bfloat16, num_hidden_layers=1, tie_word_embeddings=True),
    "qwen2-biases": lambda: of(Qwen2Config(**{key: value for key, value in SIZES.items() if key != "head_dim"})),
    "qwen3-tied": lambda: of(Qwen3Config(**SIZES, tie_word_embeddings=True)),
    "opt": lambda: of(OPTConfig(**OPT, **ENDS, pad_token_id=1)),
    "gpt2": lambda: of(GPT2Config(n_embd=128, n_layer=1, n_head=4, n_positions=64, vocab_size=260, **ENDS)),
    "mixtral": lambda: of(MixtralConfig(**MOE)),
    "qwen3-moe": lambda: of(Qwen3MoeConfig(**MOE)),
    "gpt-oss": lambda: of(GptOssConfig(**MOE)),
}
RECIPES = (*recipe_names(), "w8a8-tensor")
OWN = {
    "w8a8-tensor": Recipe.of("w8a8:activation=tensor"),
    "w8a8-experts": Recipe.of("w8a8", include=["*experts*"]),
}
"""A scheme that no bundled recipe has, and one on experts alone."""
FIRST = {
    *zip(RECIPES, cycle(("llama-biases", "llama-tied-bf16", "qwen2-biases", "qwen3-tied", "opt")), strict=False),
    *[(recipe, kind) for kind in ("gpt2", "mixtral", "qwen3-moe", "gpt-oss") for recipe in ("w8a8", "fp8")],
    ("llm-int8", "gpt2"),
    ("llm-int8", "qwen3-moe"),
    ("int8", "mixtral"),
    ("fp8-static", "mixtral"),
}
ALONE = ("w8a8-experts", "gpt-oss")
REST = [(recipe, kind) for recipe in RECIPES for kind in KINDS if (recipe, kind) not in FIRST]
TOKENS = torch.randint(0, 256, (8, 48), generator=torch.Generator().manual_seed(0))

LOADER = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
tokens = load_file(sys.argv[1])["tokens"]
for folder in map(Path, sys.argv[2:]):
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    place = {"device_map": "cpu"} if method == "bitsandbytes" else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True, **place)
        found = {key: value.clone() for key, value in model.state_dict().items()}
        if method == "compressed-tensors":
            whole = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
            found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **whole).state_dict()
        with torch.inference_mode():
            logits = model.eval()(tokens).logits
        made = {f"weights.{key}": value.clone().contiguous() for key, value in found.items()}
        save_file(made | {"logits": logits.clone()}, folder / "plain.out")
        said = {"missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"])}
    except Exception as error:
        said = {"error": f"{type(error).__name__}: {error}"}
    (folder / "plain.json").write_text(json.dumps(said))
assert "quantkit" not in sys.modules
"""


def of(config: Any) -> Any:
    return models.randomized(AutoModelForCausalLM.from_config(config))


@dataclass(frozen=True)
class Case:
    """What was written, of which float model, and what a process without quantkit said of it."""

    source: Path
    folder: Path
    said: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return read_config(self.folder)["quantization_config"]

    @property
    def plain(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "plain.out")


Cases = dict[tuple[str, str], Case]


def load_plainly(folders: list[Path], scratch: Path) -> list[dict[str, Any]]:
    """What transformers alone makes of each folder, in a process of its own."""
    save_file({"tokens": TOKENS}, scratch / "tokens.safetensors")
    command = [sys.executable, "-c", LOADER, str(scratch / "tokens.safetensors"), *map(str, folders)]
    ran = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert ran.returncode == 0, ran.stderr[-2000:]
    return [json.loads((folder / "plain.json").read_text()) for folder in folders]


def written(pairs: list[tuple[str, str]], scratch: Path, calibration: dict[str, Any]) -> Cases:
    folders = {}
    for recipe, kind in pairs:
        source = scratch / kind
        if not source.exists():
            models.save(KINDS[kind](), source)
        steps = OWN[recipe] if recipe in OWN else load_recipe(recipe)
        out = scratch / f"{recipe}-{kind}"
        quantkit.quantize(source, out, recipe=steps, progress=False, **(calibration if steps.observes else {}))
        folders[recipe, kind] = out
    said = load_plainly(list(folders.values()), scratch)
    return {
        pair: Case(scratch / pair[1], folder, words)
        for (pair, folder), words in zip(folders.items(), said, strict=True)
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, calibration: dict[str, Any]) -> Cases:
    return written([*sorted(FIRST), ALONE], tmp_path_factory.mktemp("first"), calibration)


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory, calibration: dict[str, Any]) -> Cases:
    return written(REST, tmp_path_factory.mktemp("rest"), calibration)


@pytest.mark.parametrize("pair", sorted(FIRST), ids="-".join)
def test_a_recipe_on_a_kind_of_model(first: Cases, pair: tuple[str, str]) -> None:
    judge(first[pair])


@pytest.mark.xfail(raises=KeyError, strict=True, reason="transformers fills what it finds no tensor for at random")
def test_experts_alone_in_our_own_format_are_refused_by_plain_transformers(first: Cases) -> None:
    """Nothing in the file has a name that transformers looks for with a shape that it doesn't, so that it loads it."""
    judge(first[ALONE])


@pytest.mark.exhaustive
@pytest.mark.parametrize("pair", REST, ids="-".join)
def test_every_other_recipe_on_every_other_kind(rest: Cases, pair: tuple[str, str]) -> None:
    judge(rest[pair])


def judge(case: Case) -> None:
    """Assert that plain transformers has our weights and nearly our logits, or else made no model."""
    ours = quantkit.load(case.folder)
    has_experts = any(".experts." in name for name, _ in quantkit.load(case.source).named_parameters())
    is_foreign = case.config["quant_method"] == "quantkit"
    one_by_one = any(re.search(r"\.experts\.\d+\.", key) for key in models.read_tensors(case.folder))
    if is_foreign or (one_by_one and case.config.get("format") == "int-quantized"):
        said = case.said["error"]
        assert said.startswith("RuntimeError")
        assert ("ignore_mismatched_sizes" if is_foreign else "conversion of the weights") in said
        assert not (case.folder / "plain.out").exists()
        return
    assert case.said == {"missing": [], "unexpected": []}
    plain = case.plain
    same_weights(ours, {key.removeprefix("weights."): value for key, value in plain.items() if key != "logits"})
    same_logits(quantkit.load(case.source), ours, plain["logits"], has_experts)


def same_weights(ours: nn.Module, plain: dict[str, torch.Tensor]) -> None:
    """Decoded weights, codes of bitsandbytes, and all that is in float, bit for bit."""
    checked = set()
    for name, layer in ours.named_modules():
        if isinstance(layer, QuantizedLinear):
            if layer.format == "bitsandbytes":
                assert models.same(plain[f"{name}.SCB"], layer.get_buffer("SCB")), name
                weight = layer.get_buffer("weight")
            else:
                weight = dequantize_weight(*layer.codes_and_scale(), layer.scheme.weight_granularity)
            assert models.same(plain[f"{name}.weight"], weight), name
            checked.add(f"{name}.weight")
    for name, experts in quantized_experts(ours):
        assert models.same(plain[name], dequantize(experts.get_buffer("weight"), experts.get_buffer("weight_scale")))
        checked.add(name)
    assert checked
    for name, value in ours.named_parameters():
        assert models.same(plain[name], value), name


def same_logits(exact: nn.Module, ours: nn.Module, logits: torch.Tensor, has_experts: bool) -> None:
    """A divergence between both that is small beside what the compression costs."""
    scheme = next(layer.scheme for layer in ours.modules() if isinstance(layer, QuantizedLinear))
    steps = scheme.activation_dtype == "int8" and not scheme.is_static
    narrow = next(exact.parameters()).dtype != torch.float32
    one_scale = scheme.activation == "token" and exact.config.model_type == "opt"
    unlike = scheme.activation_dtype is not None and (steps or narrow or has_experts or one_scale)
    cost, apart = divergence(exact, ours, TOKENS), kl(ours, logits)
    assert cost > 0
    assert apart <= (1.5 if unlike else 0.1) * cost, f"{apart:.2e} beside {cost:.2e}"


def kl(model: nn.Module, logits: torch.Tensor) -> float:
    """The divergence of logits [B, T, V] from a model's, in nats a token."""
    with torch.inference_mode():
        p = torch.log_softmax(model(TOKENS).logits.double(), -1)
    q = torch.log_softmax(logits.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())
