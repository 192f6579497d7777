"""Models that look at pictures: the language model is quantized, what sees stays as it is, and pictures still work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import tiny
import torch
from papers import Rounded, agree, relative, rounded_weight
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    MllamaConfig,
    PreTrainedModel,
    Qwen2VLConfig,
    SiglipVisionConfig,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from quantkit import evaluate, load, quantize
from quantkit.modules import QuantizedLinear

TEXT = "The quick brown fox jumps over the lazy dog, and back. " * 40
IMAGE = 259
SEES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
READS: dict[str, Any] = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gemma3": lambda: Gemma3Config(
        text_config=Gemma3TextConfig(**READS, layer_types=["sliding_attention", "full_attention"], sliding_window=8),
        vision_config=SiglipVisionConfig(**SEES, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        boi_token_id=257,
        eoi_token_id=258,
        tie_word_embeddings=True,
    ),
    "llava": lambda: LlavaConfig(
        text_config=LlamaConfig(**READS),
        vision_config=CLIPVisionConfig(**SEES, projection_dim=32),
        image_token_index=IMAGE,
        image_seq_length=4,
    ),
    "qwen2_vl": lambda: Qwen2VLConfig(
        text_config={key: value for key, value in READS.items() if key != "head_dim"} | {"rope_parameters": MROPE},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 16},
        image_token_id=IMAGE,
        video_token_id=258,
        vision_start_token_id=257,
        vision_end_token_id=255,
    ),
    "mllama": lambda: MllamaConfig(
        text_config=MllamaTextConfig(
            **{key: value for key, value in READS.items() if key != "head_dim"} | {"num_hidden_layers": 3},
            cross_attention_layers=[1],
        ),
        vision_config=MllamaVisionConfig(
            **{key: value for key, value in SEES.items() if key != "num_attention_heads"},
            attention_heads=2,
            num_global_layers=1,
            max_num_tiles=1,
            supported_aspect_ratios=[[1, 1]],
            intermediate_layers_indices=[0, 1],
            vision_output_dim=96,
        ),
    ),
}
BLOCKS = "model.language_model.layers"
IDS = torch.randint(32, 250, (1, 12), generator=torch.Generator().manual_seed(0))
PICTURE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def build(name: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(CONFIGS[name](), dtype=torch.float32)
    tiny.randomize(model)
    return model.eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = models.save(build(name), tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path]
) -> Callable[[str, str], tuple[Path, Any]]:
    done: dict[tuple[str, str], tuple[Path, Any]] = {}
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(TEXT, encoding="utf-8")

    def run(name: str, recipe: str) -> tuple[Path, Any]:
        if (name, recipe) not in done:
            folder = tmp_path_factory.mktemp("compressed") / "out"
            steps = recipe.split("+")
            data: dict[str, Any] = {"dataset": str(text), "samples": 8, "seq_len": 16} if len(steps) > 1 else {}
            done[name, recipe] = folder, quantize(source(name), folder, steps=steps, progress=False, **data)
        return done[name, recipe]

    return run


def inputs(name: str, picture: bool) -> dict[str, Tensor]:
    """Token ids; with a picture, the places of its four patches and what a processor would make of it."""
    if not picture:
        return {"input_ids": IDS}
    if name == "mllama":  # pictures are looked at by layers of their own
        tile = {"aspect_ratio_ids": torch.ones(1, 1).long(), "aspect_ratio_mask": torch.ones(1, 1, 1).long()}
        looks = {"cross_attention_mask": torch.ones(1, IDS.shape[1], 1, 1).long()}
        return {"input_ids": IDS, "pixel_values": PICTURE[:, None, None], **tile, **looks}
    ids = IDS.clone()
    ids[0, 3:7] = IMAGE
    made = {"input_ids": ids, "pixel_values": PICTURE}
    if name == "gemma3":
        made["token_type_ids"] = (ids == IMAGE).long()
    if name == "qwen2_vl":
        patches = torch.randn(16, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(1))
        kinds = (ids == IMAGE).long()
        made |= {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": kinds}
    return made


def logits_of(name: str, model: Any, picture: bool) -> Tensor:
    given, dtype = inputs(name, picture), model.get_input_embeddings().weight.dtype
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
    with torch.inference_mode():
        logits: Tensor = model(**given).logits
    return logits


def decoder_layers(model: nn.Module) -> set[str]:
    return {
        key
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear) and key.startswith(f"{BLOCKS}.")
    }


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("recipe", ["smoothquant+w8a8", "int8", "fp8", "llm-int8"])
def test_the_language_model_is_quantized_and_the_rest_named(
    name: str, recipe: str, source: Callable[[str], Path], made: Callable[[str, str], tuple[Path, Any]]
) -> None:
    folder, report = made(name, recipe)
    model = build(name)
    decoder = decoder_layers(model)
    assert len(decoder) == 7 * len(model.get_submodule(BLOCKS))
    assert {layer.module for layer in report.layers} == decoder
    reasons = {item.module: item.reason for item in report.left_alone}
    outside = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)} - decoder
    assert outside <= reasons.keys()
    for key in outside - {"lm_head"}:
        assert reasons[key] == "does not run when the model reads text", key
    before, after = models.read_tensors(source(name)), models.read_tensors(folder)
    seeing = [key for key in before if "vision" in key or "visual" in key or "projector" in key]
    assert len(seeing) > 10
    assert all(models.same(before[key], after[key]) for key in seeing)
    if "smoothquant" in recipe:
        folded = {group.producer for group in report.groups if group.state == "folded"}
        assert {"input_layernorm.weight", "self_attn.v_proj.weight", "mlp.up_proj.weight"} <= folded


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("recipe", ["w8a8", "int8", "fp8"])
def test_logits_are_those_of_the_papers_equations(
    name: str, recipe: str, source: Callable[[str], Path], made: Callable[[str, str], tuple[Path, Any]]
) -> None:
    """With text, and with a picture."""
    model = load(made(name, recipe)[0])
    assert type(model) is type(build(name))
    assert {key for key, m in model.named_modules() if isinstance(m, QuantizedLinear)} == decoder_layers(model)
    reference = AutoModelForImageTextToText.from_pretrained(source(name)).double()
    weights = [reference.get_submodule(key).weight for key in decoder_layers(reference)]
    with torch.no_grad():
        for weight in weights:
            weight.copy_(rounded_weight(weight, recipe))
    plain, seen = load(source(name)), []
    for picture in (False, True):
        with Rounded(recipe, weights):
            expected = logits_of(name, reference, picture)
        seen.append(logits_of(name, model, picture))
        assert agree(seen[-1], expected, logits_of(name, plain, picture), recipe)
    assert relative(*seen) > 0.02


@pytest.mark.parametrize("name", CONFIGS)
def test_smoothing_leaves_the_function_as_it_is(name: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    words: dict[str, Any] = {"dataset": str(text), "samples": 8, "seq_len": 16, "progress": False}
    quantize(source(name), tmp_path / "out", steps=["smoothquant"], **words)
    model, floats = load(tmp_path / "out"), load(source(name))
    for picture in (False, True):
        assert relative(logits_of(name, model, picture), logits_of(name, floats, picture)) < 1e-5


def test_what_runs_with_pictures_alone_is_told(
    source: Callable[[str], Path], made: Callable[[str, str], tuple[Path, Any]], tmp_path: Path
) -> None:
    """Mllama's cross attention doesn't run on a text: it has no static range, and what needs none is uncalibrated."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    words: dict[str, Any] = {"dataset": str(text), "samples": 8, "seq_len": 16, "progress": False}
    report = quantize(source("mllama"), tmp_path / "out", steps=["w8a8:activation=tensor-static"], **words)
    left = {item.module: item.reason for item in report.left_alone if item.module.startswith(f"{BLOCKS}.")}
    assert left.keys() == {name for name in decoder_layers(build("mllama")) if name.startswith(f"{BLOCKS}.1.")}
    assert all("does not run when the model reads text" in reason for reason in left.values())
    _, report = made("mllama", "smoothquant+w8a8")
    assert any(f"{BLOCKS}.1 does not run" in note for note in report.notes)


@pytest.mark.parametrize("name", CONFIGS)
def test_they_are_written_back_and_evaluated(
    name: str, source: Callable[[str], Path], made: Callable[[str, str], tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = made(name, "smoothquant+w8a8")
    load(folder).save_pretrained(tmp_path / "again")
    after, again = models.read_tensors(folder), models.read_tensors(tmp_path / "again")
    assert again.keys() == after.keys()
    assert all(models.same(value, again[key]) for key, value in after.items())
    other = tmp_path / "other.txt"
    other.write_text("Some other words than those before, and some more of them. " * 10, encoding="utf-8")
    result = evaluate(folder, other, baseline=source(name), seq_len=32, progress=False)
    assert 0 < result["kl_mean"] < 0.02


def test_a_compressed_one_that_says_so_in_its_language_models_config(
    made: Callable[[str, str], tuple[Path, Any]], mistake: Callable[..., str], tmp_path: Path
) -> None:
    """Some checkpoints have `quantization_config` inside of `text_config`."""
    folder = models.copy(made("llava", "int8")[0], tmp_path / "nested")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    mistake("quantize", folder, "-o", tmp_path / "out", "-m", "int8", says=(str(folder), "--dequantize"))
    quantize(folder, tmp_path / "one", steps=["fp8"], dequantize=True, progress=False)
    quantize(made("llava", "int8")[0], tmp_path / "two", steps=["fp8"], dequantize=True, progress=False)
    ours, theirs = models.read_tensors(tmp_path / "one"), models.read_tensors(tmp_path / "two")
    assert all(models.same(value, ours[key]) for key, value in theirs.items())
    assert "quantization_config" not in json.loads((tmp_path / "one/config.json").read_text())["text_config"]
