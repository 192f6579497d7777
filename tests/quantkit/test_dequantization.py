"""DeepSeek's FP8 and gpt-oss' MXFP4 as floats, the view that reads them, and whole folders that transformers opens."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
from dequantizing import Held, decoded, fp8_codes, noise, opened, refused
from quantkit_kernels import formats as numbers
from quantkit_kernels.formats import quantize_weight
from safetensors.torch import save_file
from torch import Tensor

from quantkit.checkpoint import read_config
from quantkit.dequantization import KINDS, dequantized
from quantkit.errors import CheckpointError
from quantkit.shards import ShardReader, TensorInfo


def by_blocks(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Code times the scale of its block, a block at a time, in float64."""
    made = codes.double()
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            part = slice(row * block[0], (row + 1) * block[0]), slice(column * block[1], (column + 1) * block[1])
            made[part] *= scale[row, column].double()
    return made


# ---- DeepSeek's FP8

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (200, 300), (5, 7)])
def test_fp8_blocks_with_ragged_edges(shape: tuple[int, int]) -> None:
    codes = fp8_codes(*shape)
    scale = noise(-(-shape[0] // 128), -(-shape[1] // 128)).abs() + 0.1
    made = decoded({"a.weight": codes, "a.weight_scale_inv": scale}, FP8)
    assert set(made) == {"a.weight"}
    assert torch.equal(made["a.weight"], by_blocks(codes, scale, (128, 128)).float())


def test_fp8_rounds_once_to_the_dtype_of_the_config_and_bfloat16_without_one() -> None:
    codes, scale = fp8_codes(256, 256), noise(2, 2).abs() + 0.1
    state = {"a.weight": codes, "a.weight_scale_inv": scale}
    exact = by_blocks(codes, scale, (128, 128)).float()
    for said, dtype in ((None, torch.bfloat16), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        assert models.same(decoded(state, FP8, said)["a.weight"], exact.to(dtype))
    nested = {"text_config": {"torch_dtype": "float16", "quantization_config": FP8}, "quantization_config": FP8}
    view, config = dequantized(Held(state), nested, "MODEL")
    assert models.same(view.get("a.weight"), exact.half())
    assert config == {"text_config": {"torch_dtype": "float16"}}


@pytest.mark.parametrize("experts", [(), (3,)])
@pytest.mark.parametrize("kind", ["float", "e8m0", "bytes", "fp4"])
def test_fp8_as_transformers_dequantizes_it(kind: str, experts: tuple[int, ...]) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    name, scale_name = ("e.gate_up_proj", "e.gate_up_proj_scale_inv") if experts else ("a.weight", "a.weight_scale_inv")
    codes = fp8_codes(*experts, 256, 384)
    scale = noise(*experts, 2, 3).abs() + 0.1
    if kind != "float":
        powers = torch.arange(100, 100 + scale.numel(), dtype=torch.uint8).view(scale.shape)
        scale = powers if kind == "bytes" else powers.view(torch.float8_e8m0fnu)
    if kind == "fp4":
        codes = (
            torch.arange(256, dtype=torch.uint8).repeat(192).view(256, 192).expand(*experts, 256, 192).view(torch.int8)
        )
        scale = torch.arange(100, 112, dtype=torch.uint8).expand(*experts, 256, 12).contiguous()
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
    ours = decoded({name: codes, scale_name: scale}, FP8, "bfloat16")
    assert set(ours) == {name}
    assert models.same(ours[name], theirs)


def test_fp8_per_tensor_under_every_name() -> None:
    codes, one = fp8_codes(3, 8), torch.tensor(0.37)
    expected = (codes.double() * one.double()).float()
    stored = FP8 | {"weight_block_size": None, "activation_scheme": "static"}
    for scale in (one, one.view(1), one.view(1, 1)):
        for name in ("a.weight_scale_inv", "a.weight_scale", "a.scale", "a.qscale_weight"):
            state = {"a.weight": codes, name: scale, "a.activation_scale": one, "a.bias": noise(3)}
            made = decoded(state, stored)
            assert set(made) == {"a.weight", "a.bias"}
            assert torch.equal(made["a.weight"], expected)
    # One number for an embedding in a checkpoint of blocks.
    assert torch.equal(decoded({"a.weight": codes, "a.weight_scale": one.view(1)}, FP8)["a.weight"], expected)
    # An expert's own, and two rows of scales for the halves of gate and up.
    each = torch.tensor([0.5, 2.0])
    fused, experts = fp8_codes(2, 6, 8), {"gate_up_proj_activation_scale": each}
    for scale in (each, each.view(2, 1, 1)):
        made = decoded({"gate_up_proj": fused, "gate_up_proj_scale_inv": scale} | experts, stored)
        assert set(made) == {"gate_up_proj"}
        assert torch.equal(made["gate_up_proj"], fused.float() * each.view(2, 1, 1))
    halves = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    for config in (stored, FP8):
        made = decoded({"gate_up_proj": fused, "gate_up_proj_scale_inv": halves}, config)
        assert torch.equal(made["gate_up_proj"], fused.float() * halves.repeat_interleave(3, 1))


def test_fp8_that_does_not_fit_is_told() -> None:
    codes, scale = fp8_codes(256, 384), torch.ones(2, 3)
    for state, words in (
        ({"a.weight": codes}, "'a.weight_scale_inv'"),
        ({"a.weight": codes, "a.weight_scale_inv": scale[:1]}, "[1, 3] where [2, 3]"),
        ({"a.weight": codes, "a.weight_scale_inv": scale[:1, :1]}, "[1, 1] where [2, 3]"),
        ({"a.weight": codes, "a.weight_scale_inv": scale.t()}, "[3, 2] where [2, 3]"),
        ({"a.weight": codes.float(), "a.weight_scale_inv": scale}, "torch.float32"),
        ({"b.weight": codes.float(), "a.weight_scale_inv": scale}, "without the weight"),
        ({"a.weight": codes.flatten(), "a.weight_scale_inv": scale}, "no matrix"),
        ({"a.weight": codes[:0], "a.weight_scale_inv": scale}, "no matrix"),
    ):
        refused(state, FP8, words)
    for block in ([128], "128", [0, 128], [128, 1.5]):
        refused(
            {"a.weight": codes, "a.weight_scale_inv": scale}, FP8 | {"weight_block_size": block}, "weight_block_size"
        )


# ---- gpt-oss' MXFP4


def packed_experts(experts: int = 2, rows: int = 6, groups: int = 3) -> dict[str, Tensor]:
    """Every byte, and exponents from small to large, that bfloat16 holds."""
    count = experts * rows * groups
    blocks = torch.arange(count * 16).remainder(256).to(torch.uint8).view(experts, rows, groups, 16)
    scales = torch.linspace(2, 252, count).to(torch.uint8).view(experts, rows, groups)
    return {"e.down_proj_blocks": blocks, "e.down_proj_scales": scales}


MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mxfp4_as_transformers_converts_it(dtype: str) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    state = packed_experts()
    theirs = convert_moe_packed_tensors(*state.values(), dtype=getattr(torch, dtype))
    made = decoded(state | {"e.down_proj_bias": noise(2, 6)}, MXFP4, dtype)
    assert set(made) == {"e.down_proj", "e.down_proj_bias"}
    assert made["e.down_proj"].shape == (2, 96, 6)
    assert models.same(made["e.down_proj"], theirs)


def test_mxfp4_is_what_the_specification_says() -> None:
    """The low nibble first; a sign, two bits of exponent, one of fraction; 255 is NaN and 0 is 2**-127."""
    blocks = torch.zeros(1, 1, 3, 16, dtype=torch.uint8)
    blocks[..., 0] = 0xB2  # 1.0, then -1.5
    state = {"w_blocks": blocks, "w_scales": torch.tensor([[[0, 128, 255]]], dtype=torch.uint8)}
    made = decoded(state, MXFP4)["w"].flatten()
    assert made[:3].tolist() == [2.0**-127, -1.5 * 2.0**-127, 0.0]
    assert made[32:35].tolist() == [2.0, -3.0, 0.0]
    assert made[64:].isnan().all()


def test_mxfp4_that_does_not_fit_is_told() -> None:
    state = packed_experts()
    blocks, scales = state.values()
    refused({"w_blocks": blocks}, MXFP4, "w_scales")
    refused({"w_scales": scales}, MXFP4, "w_blocks")
    refused({"w_blocks": blocks, "w_scales": scales[..., :-1]}, MXFP4, "[2, 6, 2] where [2, 6, 3]")
    refused({"w_blocks": blocks[..., :-1], "w_scales": scales}, MXFP4, "K/32, 16")
    refused({"w_blocks": blocks, "w_scales": scales.float()}, MXFP4, "torch.float32")


# ---- the view itself


def test_nothing_is_read_before_it_is_asked_for_and_then_only_what_it_is_made_of() -> None:
    state = {
        "b.weight": fp8_codes(256, 128),
        "norm.weight": noise(4, dtype=torch.bfloat16),
        "b.weight_scale_inv": torch.ones(2, 1),
        "c.weight": fp8_codes(128, 128),
        "c.weight_scale_inv": torch.ones(1, 1),
    }
    view, _, held = opened(state, FP8, "bfloat16")
    assert list(view.tensors) == ["b.weight", "norm.weight", "c.weight"]
    assert view.tensors["b.weight"] == TensorInfo(Path("model.safetensors"), (256, 128), torch.bfloat16)
    assert view.nbytes == 2 * (256 * 128 + 128 * 128 + 4)
    assert held.read == []
    view.get("b.weight")
    assert held.read == ["b.weight", "b.weight_scale_inv"]
    assert view.get("norm.weight") is state["norm.weight"]
    assert held.read == ["b.weight", "b.weight_scale_inv", "norm.weight"]
    with pytest.raises(KeyError):
        view.get("b.weight_scale_inv")


def test_the_config_is_a_copy_without_the_compression_and_nothing_else_changes() -> None:
    config = {"quantization_config": FP8, "dtype": "bfloat16", "rope": {"factor": 2}}
    before = copy.deepcopy(config)
    _, made = dequantized(Held({"a.weight": fp8_codes(2, 2), "a.weight_scale_inv": torch.ones(1, 1)}), config, "MODEL")
    assert config == before
    assert made == {"dtype": "bfloat16", "rope": {"factor": 2}}
    assert made["rope"] is not config["rope"]


def test_large_weights_are_decoded_in_pieces_that_join(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale = fp8_codes(2, 300, 200), noise(2, 3, 2).abs() + 0.1
    whole = decoded({"up_proj": codes, "up_proj_scale_inv": scale}, FP8)["up_proj"]
    monkeypatch.setattr("quantkit.dequantization.base.PIECE", 7 * 200 + 3)
    pieces = decoded({"up_proj": codes, "up_proj_scale_inv": scale}, FP8)["up_proj"]
    assert torch.equal(whole, pieces)
    assert torch.equal(whole[1], by_blocks(codes[1], scale[1], (128, 128)).float())


def test_what_cannot_be_dequantized_is_refused_by_name() -> None:
    state = {"a.qweight": torch.zeros(4, 4, dtype=torch.int32)}
    for method in ("gptq", "awq", "gguf", None, 7):
        refused(state, {"quant_method": method, "bits": 4}, repr(method), *KINDS)
    refused(state, "gptq", "'gptq'")
    for method in KINDS:
        with pytest.raises(CheckpointError):
            decoded(state, {"quant_method": method})
    refused({"a.weight": noise(4, 4)}, FP8, "no tensor of it is")
    refused({"a.weight": fp8_codes(4, 4), "a.weight_scale_inv": torch.ones(1, 1)}, FP8, "int4", dtype="int4")
    with pytest.raises(CheckpointError, match="leave --dequantize out"):
        dequantized(Held(state), {"model_type": "llama"}, "MODEL")


# ---- end to end


def written(folder: Path, target: Path) -> Path:
    """The float checkpoint that a compressed folder stands for."""
    view, config = dequantized(ShardReader(folder), read_config(folder), str(folder))
    target.mkdir()
    save_file({name: view.get(name) for name in view.tensors}, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(torch.arange(20).view(1, 20)).logits


def quantized_reference(folder: Path, compressed: Path, target: Path, change: Callable[[Tensor], Tensor]) -> Path:
    """A copy of a float folder in which those weights are changed that the compressed folder holds a scale for."""
    models.copy(folder, target)
    stored = models.read_tensors(compressed)
    return models.change_tensors(
        target,
        lambda tensors: {
            key: change(value) if f"{key.removesuffix('weight')}weight_scale" in stored else value
            for key, value in tensors.items()
        },
    )


@pytest.mark.parametrize("recipe", ["w8a8", "int8", "fp8"])
@pytest.mark.parametrize("name", ["llama_bf16", "mixtral"])
def test_a_compressed_folder_opens_as_the_float_model_that_it_stands_for(
    recipe: str, name: str, compressed: Callable[..., Path], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    dtype = torch.float8_e4m3fn if recipe == "fp8" else torch.int8
    folder = compressed(recipe, name)
    made = written(folder, tmp_path / "float")
    reference = quantized_reference(
        model_folder(name),
        folder,
        tmp_path / "reference",
        lambda weight: numbers.dequantize(*quantize_weight(weight, dtype)),
    )
    ours, theirs = models.read_tensors(made), models.read_tensors(reference)
    assert set(ours) == set(theirs)
    assert all(models.same(ours[key], theirs[key]) for key in ours)
    assert torch.equal(logits(made), logits(reference))


def test_a_gpt_oss_folder_opens_as_transformers_opens_it(tmp_path: Path) -> None:
    """Transformers dequantizes MXFP4 itself without a GPU; our float folder gives its logits, bit for bit."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 32,
    }
    sizes |= {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64}
    model = models.randomized(GptOssForCausalLM(GptOssConfig(**sizes)), torch.bfloat16)
    model.save_pretrained(tmp_path / "mxfp4")

    def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for number, (key, value) in enumerate(tensors.items()):
            if not key.endswith(("gate_up_proj", "down_proj")):
                made[key] = value
                continue
            experts, columns, rows = value.shape
            draw = torch.Generator().manual_seed(number)
            shape = (experts, rows, columns // 32)
            made[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=draw, dtype=torch.uint8)
            made[f"{key}_scales"] = torch.randint(119, 124, shape, generator=draw, dtype=torch.uint8)
        return made

    models.change_tensors(tmp_path / "mxfp4", packed)
    models.change_config(tmp_path / "mxfp4", quantization_config=MXFP4 | {"dequantize": True})
    assert torch.equal(logits(written(tmp_path / "mxfp4", tmp_path / "float")), logits(tmp_path / "mxfp4"))


def test_an_fp8_folder_opens_as_transformers_opens_it(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Transformers dequantizes FP8 itself without a GPU; our float folder gives its logits, bit for bit."""
    folder = models.copy(model_folder("llama_bf16"), tmp_path / "fp8")

    def coded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        made = dict(tensors)
        for key in [key for key in tensors if "proj" in key]:
            rows, columns = tensors[key].shape
            tiles = tensors[key].float().reshape(rows // 64, 64, columns // 64, 64)
            scale = tiles.abs().amax((1, 3)) / 448
            made[key] = (tiles / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
            made[f"{key}_scale_inv"] = scale
        return made

    models.change_tensors(folder, coded)
    models.change_config(folder, quantization_config=FP8 | {"weight_block_size": [64, 64]})
    made = written(folder, tmp_path / "float")
    assert models.read_tensors(made)["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert torch.equal(logits(made), logits(folder))


def test_a_truncated_scale_is_told_before_anything_is_read(compressed: Callable[..., Path], tmp_path: Path) -> None:
    folder = models.copy(compressed("w8a8", "llama_bf16"), tmp_path / "damaged")
    key = "model.layers.1.mlp.up_proj.weight_scale"
    models.change_tensors(folder, lambda tensors: tensors | {key: tensors[key][:-1]})
    with pytest.raises(CheckpointError, match=r"\[255, 1\] where \[256, 1\] is expected.*download it again"):
        written(folder, tmp_path / "float")
