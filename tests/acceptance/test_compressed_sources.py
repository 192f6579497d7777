"""Sources that are compressed already: refused by name, and with --dequantize as good as their float weights.

The oracle is exact: each compressed folder is written or decoded here by hand, its float weights go into an ordinary
folder, and quantizing the one with --dequantize gives the bytes that quantizing the other gives.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mixtures
import models
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit import load, quantize
from quantkit.checkpoint import read_config

Tensors = dict[str, Tensor]
TEXT = "The quick brown fox jumps over the lazy dog, and back. " * 40
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def write(source: Path, folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """A copy of a folder with other tensors, and with values of its config changed."""
    models.copy(source, folder)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return models.change_config(folder, **config)


# How each kind is stored: written by hand


def fp8_blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E4M3 codes [N, K], float32 scales [ceil(N/128), ceil(K/128)], and the weight that they stand for."""
    rows, columns = weight.shape
    codes, decoded = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scale = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scale[i, j] = weight[place].float().abs().max() / 448
            codes[place] = (weight[place].float() / scale[i, j]).to(torch.float8_e4m3fn)
            decoded[place] = (codes[place].float() * scale[i, j]).to(weight.dtype)
    return codes, scale, decoded


def store_fp8(tensors: Tensors) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """DeepSeek's FP8 of all linear layers, the float tensors that it stands for, and what config.json says."""
    stored, floats = dict(tensors), dict(tensors)
    for key, value in tensors.items():
        if key.endswith("proj.weight"):
            stored[key], stored[f"{key}_scale_inv"], floats[key] = fp8_blocks(value)
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return stored, floats, config


def mxfp4_blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks [E, N, K/32, 16], powers of two [E, N, K/32], and the weight [E, K, N] that they stand for."""
    wide = weight.mT.float().unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(wide.abs().amax(-1))).clamp(-100, 100) - 2
    values = wide / torch.exp2(exponent).unsqueeze(-1)
    codes = (values.unsqueeze(-1) - E2M1).abs().argmin(-1)
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    decoded = (E2M1[codes] * torch.exp2(exponent).unsqueeze(-1)).flatten(-2).mT
    return blocks.to(torch.uint8), (exponent + 127).to(torch.uint8), decoded.contiguous().to(weight.dtype)


def store_mxfp4(tensors: Tensors) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """gpt-oss' MXFP4 of its experts."""
    stored, floats = dict(tensors), dict(tensors)
    for key, value in tensors.items():
        if value.ndim == 3:
            del stored[key]
            stored[f"{key}_blocks"], stored[f"{key}_scales"], floats[key] = mxfp4_blocks(value)
    return stored, floats, {"quant_method": "mxfp4"}


# What quantkit itself writes: decoded by hand


def by_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [N, K] times scales [N, G], rounded once."""
    wide = scale.float().repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
    return (codes.float() * wide).to(dtype)


def decode(folder: Path, floats: Tensors) -> Tensors:
    """The float tensors that a folder of compressed-tensors, bitsandbytes or quantkit's own format stands for."""
    stored, found = models.read_tensors(folder), dict(floats)
    for key, value in floats.items():
        stem, conv1d = key.removesuffix("weight"), ".c_" in key  # GPT-2's weights are [K, N]
        if key not in stored and f"{stem}weight_packed" not in stored:
            parts = [experts_layer(stored, stem, e) for e in range(len(value))]
            found[key] = torch.stack([one_layer(stored, part, value[e], False) for e, part in enumerate(parts)])
        elif any(f"{stem}{leaf}" in stored for leaf in ("SCB", "weight_scale")):
            found[key] = one_layer(stored, stem, value, conv1d)
    return found


def experts_layer(stored: Tensors, stem: str, number: int) -> str:
    """What the names of one expert's tensors begin with: its number stands before the last part of the name."""
    owner, _, leaf = stem.removesuffix(".").rpartition(".")
    assert f"{owner}.{number}.{leaf}.weight" in stored
    return f"{owner}.{number}.{leaf}."


def one_layer(stored: Tensors, stem: str, like: Tensor, conv1d: bool) -> Tensor:
    """The float weight of one layer, of the shape and dtype of `like`."""
    if f"{stem}SCB" in stored:
        rows = by_rows(stored[f"{stem}weight"], stored[f"{stem}SCB"].div(127)[:, None], like.dtype)
        return rows.t() if conv1d else rows
    scale, columns = stored[f"{stem}weight_scale"], like.shape[0 if conv1d else 1]
    if f"{stem}weight_packed" in stored:
        codes = stored[f"{stem}weight_packed"].view(torch.uint8)[:, :columns].to(torch.int16) - 128
    elif stored[f"{stem}weight"].dtype == torch.int32:
        codes = stored[f"{stem}weight"].view(torch.int8)[:, :columns]
    else:
        codes = stored[f"{stem}weight"].t() if conv1d else stored[f"{stem}weight"]
    if scale.shape == (1, like.shape[1]):  # experts in x out
        return (codes.float() * scale.float()).to(like.dtype)
    rows = by_rows(codes, scale, like.dtype)
    return rows.t() if conv1d else rows


def quantized_both_ways(compressed: Path, floats: Path, folder: Path, **words: Any) -> None:
    """Quantize a compressed folder with dequantize, and the float one, and hold the results against one another."""
    one = quantize(compressed, folder / "one", dequantize=True, progress=False, **words)
    two = quantize(floats, folder / "two", progress=False, **words)
    assert len(one.layers) == len(two.layers) > 0
    assert one.layers == two.layers
    assert read_config(folder / "one") == read_config(folder / "two")
    ours, theirs = models.read_tensors(folder / "one"), models.read_tensors(folder / "two")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert models.same(ours[key], value), key
    assert (folder / "one/model.safetensors").read_bytes() == (folder / "two/model.safetensors").read_bytes()


BY_HAND: dict[str, tuple[str, Callable[[Tensors], tuple[Tensors, Tensors, dict[str, Any]]]]] = {
    "fp8": ("llama_bf16", store_fp8),
    "fp8-deepseek": ("deepseek_v3", store_fp8),
    "mxfp4": ("gpt_oss", store_mxfp4),
}


@pytest.fixture(scope="module")
def by_hand(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]
) -> Callable[[str], tuple[Path, Path]]:
    """A compressed folder of a kind, written by hand, and the folder of its float weights."""
    made: dict[str, tuple[Path, Path]] = {}

    def folders(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            name, store = BY_HAND[kind]
            place = tmp_path_factory.mktemp(kind)
            source = model_folder(name) if name.startswith("llama") else tiny.save(name, place / "source")
            stored, floats, config = store(models.read_tensors(source))
            assert len(stored) > len(floats)
            compressed = write(source, place / "compressed", stored, quantization_config=config)
            made[kind] = compressed, write(source, place / "float", floats)
        return made[kind]

    return folders


@pytest.mark.parametrize("kind", BY_HAND)
@pytest.mark.parametrize("step", ["w8a8", "llm-int8", "fp8"])
def test_what_others_compressed_is_quantized_as_its_float_weights(
    kind: str, step: str, by_hand: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    quantized_both_ways(*by_hand(kind), tmp_path, steps=[step])


@pytest.mark.parametrize("kind", BY_HAND)
def test_a_compressed_source_is_refused_by_name_with_the_remedy(
    kind: str,
    by_hand: Callable[[str], tuple[Path, Path]],
    cli: Callable[..., Any],
    mistake: Callable[..., str],
    tmp_path: Path,
) -> None:
    folder, method = by_hand(kind)[0], BY_HAND[kind][0]
    method = read_config(folder)["quantization_config"]["quant_method"]
    mistake("quantize", folder, "-o", tmp_path / "out", "-m", "int8", says=(str(folder), repr(method), "--dequantize"))
    assert not list(tmp_path.iterdir())
    result = cli("quantize", folder, "-o", tmp_path / "out", "-m", "int8", "--dequantize")
    assert result.exit_code == 0, result.stderr
    model = load(tmp_path / "out")
    with torch.inference_mode():
        assert bool(torch.isfinite(model(torch.arange(32, 64)[None]).logits).all())


def test_smoothing_reads_a_compressed_source_block_by_block(
    by_hand: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    words: dict[str, Any] = {"dataset": str(text), "samples": 8, "seq_len": 16}
    for kind in ("fp8", "mxfp4"):
        (tmp_path / kind).mkdir()
        quantized_both_ways(*by_hand(kind), tmp_path / kind, steps=["smoothquant", "w8a8"], **words)


OWN = [
    ("llama_bf16", "w8a8", "auto"),
    ("llama_odd", "int8", "auto"),
    ("llama_bf16", "int8:group=128", "auto"),
    ("llama_odd", "w8a8", "quantkit"),
    ("llama_bf16", "llm-int8", "auto"),
    ("llama_odd", "llm-int8", "quantkit"),
    ("opt_short_names", "w8a8", "auto"),
    ("gpt2", "w8a8", "compressed-tensors"),
    ("gpt2", "int8", "compressed-tensors"),
    ("gpt2", "llm-int8", "auto"),
    ("gpt2", "int8", "quantkit"),
    ("mixtral", "w8a8", "auto"),
    ("mixtral", "int8", "auto"),
    ("mixtral", "llm-int8", "auto"),
    ("mixtral", "llm-int8", "quantkit"),
    ("gpt_oss", "int8", "quantkit"),
    ("gpt_oss_square", "w8a8", "quantkit"),
    ("granitemoe", "w8a8", "quantkit"),
    ("deepseek_v3", "w8a8", "auto"),
]
"""Models and what quantkit compresses them to; the second half of each pair is quantkit's own output."""


@pytest.fixture(scope="module")
def mixture_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny mixture of experts of `mixtures`."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = models.save(mixtures.build(name), tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.mark.parametrize(("name", "step", "form"), OWN)
def test_what_quantkit_compressed_is_quantized_as_its_float_weights(
    name: str,
    step: str,
    form: str,
    model_folder: Callable[[str], Path],
    mixture_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = mixture_folder(name) if name in mixtures.CONFIGS else model_folder(name)
    quantize(source, tmp_path / "compressed", steps=[step], format=form, progress=False)
    floats = models.read_tensors(source)
    decoded = decode(tmp_path / "compressed", floats)
    assert any(not torch.equal(value, floats[key]) for key, value in decoded.items())
    write(source, tmp_path / "float", decoded)
    quantized_both_ways(tmp_path / "compressed", tmp_path / "float", tmp_path, steps=["fp8"], format="quantkit")


def test_what_cannot_be_loaded_is_no_baseline(
    by_hand: Callable[[str], tuple[Path, Path]],
    compressed: Callable[..., Path],
    mistake: Callable[..., str],
    tmp_path: Path,
) -> None:
    """DeepSeek's FP8 isn't loaded here, so that a result could not be held against it: said before the work."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    words = ["-o", tmp_path / "out", "-m", "int8", "--dequantize", "--eval-dataset", text, "--seq-len", 16]
    mistake("quantize", by_hand("fp8")[0], *words, says=("'fp8'",))
    assert not (tmp_path / "out").exists()
    report = quantize(
        compressed("int8"), tmp_path / "out", steps=["w8a8"], dequantize=True, eval_dataset=str(text), seq_len=16
    )
    assert report.evaluation is not None
    assert 0 < report.evaluation["kl_mean"] < 0.1


def test_a_float_source_needs_no_dequantize(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(model_folder("llama"), tmp_path / "one", steps=["w8a8"], progress=False)
    quantize(model_folder("llama"), tmp_path / "two", steps=["w8a8"], dequantize=True, progress=False)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_a_plan_for_a_compressed_source(
    by_hand: Callable[[str], tuple[Path, Path]], cli: Callable[..., Any], mistake: Callable[..., str]
) -> None:
    compressed, floats = by_hand("mxfp4")
    mistake("plan", compressed, "-m", "int8", says=("'mxfp4'", "--dequantize"))
    ours, theirs = (
        json.loads(cli("plan", folder, "-m", "int8", "--json", *words).stdout)
        for folder, words in ((compressed, ["--dequantize"]), (floats, []))
    )
    apart = ("model", "budget")  # what is read of each has its own size
    assert {key: value for key, value in ours.items() if key not in apart} == {
        key: value for key, value in theirs.items() if key not in apart
    }
