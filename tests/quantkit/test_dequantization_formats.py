"""compressed-tensors, bitsandbytes and quantkit's own formats as floats, held against the software of each."""

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from dequantizing import decoded, fp8_codes, noise, opened, refused
from quantkit_kernels import formats as numbers
from quantkit_kernels.formats import pack_int32, quantize_weight
from torch import Tensor

from quantkit import formats
from quantkit.checkpoint import read_config
from quantkit.dequantization import dequantized
from quantkit.errors import CheckpointError
from quantkit.modules import quantize_linear
from quantkit.scheme import Scheme
from quantkit.shards import ShardReader

# ---- compressed-tensors


def ct(form: str, ignore: tuple[str, ...] = (), **weights: Any) -> dict[str, Any]:
    args = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False} | weights
    group = {"targets": ["Linear"], "format": form, "weights": args, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
    }


def package(form: str, stored: dict[str, Any]) -> tuple[Any, Any]:
    """compressed-tensors' own compressor and scheme."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme.model_validate(stored["config_groups"]["group_0"])
    return BaseCompressor.get_value_from_registry(form), scheme


CASES = [
    ("int-quantized", {"strategy": "channel"}, (9, 1)),
    ("int-quantized", {"strategy": "tensor"}, (1,)),
    ("int-quantized", {"strategy": "channel", "symmetric": False}, (9, 1)),
    ("float-quantized", {"type": "float", "strategy": "channel"}, (9, 1)),
    ("float-quantized", {"type": "float", "strategy": "tensor"}, (1,)),
    ("float-quantized", {"type": "float", "strategy": "block", "block_structure": [4, 32]}, (3, 3)),
    ("naive-quantized", {"type": "float", "strategy": "group", "group_size": 16}, (9, 6)),
    ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, (9, 3)),
    ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, (9, 3)),
    ("pack-quantized", {"num_bits": 3, "strategy": "channel", "symmetric": False}, (9, 1)),
    ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, (9, 1)),
    ("pack-quantized", {"num_bits": 8, "strategy": "tensor", "symmetric": False}, (1,)),
]


@pytest.mark.parametrize(("form", "weights", "shape"), CASES, ids=lambda value: str(value))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compressed_tensors_as_its_package_decompresses_it(
    form: str, weights: dict[str, Any], shape: tuple[int, ...], dtype: str
) -> None:
    stored = ct(form, **weights)
    compressor, scheme = package(form, stored)
    kind = getattr(torch, dtype)
    state: dict[str, Tensor] = {
        "weight": noise(9, 96, dtype=kind),
        "weight_scale": (noise(*shape, seed=1).abs() * 0.05 + 0.05).to(kind),
    }
    if weights.get("symmetric") is False:
        largest = 2 ** (weights.get("num_bits", 8) - 1)
        state["weight_zero_point"] = (noise(*shape, seed=2) * largest / 2).clamp(-largest, largest - 1).to(torch.int8)
    packed = compressor.compress(state, scheme)
    theirs = compressor.decompress(packed, scheme)["weight"]
    extra = {"input_scale": torch.ones(1), "input_zero_point": torch.zeros(1, dtype=torch.int8), "bias": noise(9)}
    made = decoded({f"m.a.{key}": value for key, value in (packed | extra).items()}, stored, dtype)
    assert set(made) == {"m.a.weight", "m.a.bias"}
    assert models.same(made["m.a.weight"], theirs)


@pytest.mark.parametrize("form", ["nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"])
def test_compressed_tensors_of_small_floats(form: str) -> None:
    """Against code * scale (/ global scale) in float64. Two float32 roundings: relative error under 2**-23 + 2**-46."""
    size = 16 if form.startswith("nvfp4") else 32
    strategy, bits = ("tensor_group" if size == 16 else "group"), (8 if "8" in form else 4)
    stored = ct(form, num_bits=bits, type="float", strategy=strategy, group_size=size)
    compressor, scheme = package(form, stored)
    state = {"weight": noise(6, 128), "weight_scale": noise(6, 128 // size, seed=1).abs() * 0.5 + 0.1}
    if size == 16:
        state["weight_scale"] = (state["weight_scale"] * 40).to(torch.float8_e4m3fn).float()
        state["weight_global_scale"] = torch.tensor([37.3])
    else:
        state["weight_scale"] = state["weight_scale"].log2().round().exp2()
    packed = compressor.compress(state, scheme)
    theirs = compressor.decompress(packed, scheme)["weight"].double()
    made = decoded({f"a.{key}": value for key, value in packed.items()}, stored)
    assert set(made) == {"a.weight"}
    exact = made["a.weight"].double()
    scale = state["weight_scale"].double() / (37.3 if size == 16 else 1)
    grid = exact / scale.repeat_interleave(size, 1)
    steps = (0, 0.5, 1, 1.5, 2, 3, 4, 6) if bits == 4 else numbers.decode(fp8_codes(254), torch.float64).abs().tolist()
    nearest = torch.tensor(sorted(set(steps)), dtype=torch.float64)
    distance = (grid.abs().unsqueeze(-1) - nearest).abs().amin(-1)
    # global scale 37.3 in float32, the quotient and the product: three roundings.
    assert bool((distance <= grid.abs() * 3.01 * 2**-24).all())
    # The package computes in bfloat16: scale, quotient and product, 2**-8 each at most (2**-9 for a nearest one).
    assert bool(((theirs - exact).abs() <= exact.abs() * 3.1 * 2**-8).all())


def test_compressed_tensors_with_an_activation_order() -> None:
    """`weight_g_idx` names the group of each column; compressed-tensors 0.20 dropped it, so a plain loop judges."""
    codes = (noise(5, 64) * 3).round().clamp(-8, 7).to(torch.int8)
    scale, zero = noise(5, 2, seed=1).abs() + 0.1, (noise(5, 2, seed=2) * 2).round().clamp(-8, 7).to(torch.int8)
    index = torch.randperm(64, generator=torch.Generator().manual_seed(3)) % 2
    stored = ct("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False, actorder="group")
    state = {
        "a.weight_packed": pack_int32(codes, 4),
        "a.weight_scale": scale,
        "a.weight_zero_point": pack_int32(zero.t().contiguous(), 4).view(1, 2),  # [2, 1] turned, as a file holds it
        "a.weight_g_idx": index.int(),
        "a.weight_shape": torch.tensor([5, 64]),
    }
    made = decoded(state, stored)["a.weight"]
    for column in range(64):
        group = int(index[column])
        assert torch.equal(made[:, column], (codes[:, column] - zero[:, group]).float() * scale[:, group])
    unset = decoded(state | {"a.weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}, stored)["a.weight"]
    plain = decoded({key: value for key, value in state.items() if "g_idx" not in key}, stored)["a.weight"]
    assert torch.equal(unset, plain)
    assert not torch.equal(made, plain)
    refused(state | {"a.weight_g_idx": index.int() + 1}, stored, "group 2 of 2")
    refused(state | {"a.weight_g_idx": index.float()}, stored, "whole numbers")


def test_compressed_tensors_groups_are_found_by_name_before_regex_before_class() -> None:
    stored = ct("pack-quantized", num_bits=8, strategy="channel")
    base = stored["config_groups"]["group_0"]
    for number, (targets, bits) in enumerate(((["re:.*experts.*"], 4), (["m.experts.0.down"], 2)), start=1):
        group = base | {"targets": targets, "weights": base["weights"] | {"num_bits": bits}}
        stored["config_groups"][f"group_{number}"] = group
    state = {}
    for name, bits in (("m.q", 8), ("m.experts.0.up", 4), ("m.experts.0.down", 2)):
        codes = (noise(3, 32) * 9).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
        state |= {f"{name}.weight_packed": pack_int32(codes, bits), f"{name}.weight_scale": torch.ones(3, 1)}
        state |= {f"{name}.weight_shape": torch.tensor([3, 32])}
        made = decoded(state, stored)
        assert torch.equal(made[f"{name}.weight"], codes.float())
    del stored["config_groups"]["group_0"]
    refused(state, stored, "'m.q'", "no group")
    stored["config_groups"] |= {"a": base, "b": base | {"weights": base["weights"] | {"num_bits": 4}}}
    refused(state, stored, "'m.q'", "groups by class")


def test_compressed_tensors_that_do_not_fit_are_told() -> None:
    stored = ct("pack-quantized", num_bits=4, strategy="group", group_size=32)
    codes, scale = torch.ones(4, 64, dtype=torch.int8), torch.ones(4, 2)
    words = pack_int32(codes, 4)
    good = {"a.weight_packed": words, "a.weight_scale": scale, "a.weight_shape": torch.tensor([4, 64])}
    assert torch.equal(decoded(good, stored)["a.weight"], codes.float())
    refused({"a.weight_packed": words}, stored, "a.weight_scale")
    refused(good | {"a.weight_scale": scale[:3]}, stored, "[3, 2] where [4, 2]")
    refused(good | {"a.weight_scale": scale[:, :1]}, stored, "[4, 1] where [4, 2]")
    refused(good | {"a.weight_shape": torch.tensor([4, 63])}, stored, "[4, 63]")
    refused(good | {"a.weight_zero_point": torch.zeros(2, 2, dtype=torch.int32)}, stored, "[2, 2] where [1, 2]")
    refused(good, ct("pack-quantized", num_bits=8, strategy="channel"), "words a row")
    refused(good, ct("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False), "zero_point")
    plain = {"a.weight": codes, "a.weight_scale": torch.ones(4, 1)}
    refused({"a.weight": codes}, ct("int-quantized", strategy="channel"), "a.weight_scale")
    refused(plain | {"a.weight": codes.float()}, ct("int-quantized", strategy="channel"), "not in codes")
    for scale in (torch.ones(3, 1), torch.ones(1, 4), torch.ones(())):
        refused(plain | {"a.weight_scale": scale}, ct("int-quantized", strategy="channel"), str(list(scale.shape)))
    short = decoded(plain | {"a.weight_scale": torch.ones(4)}, ct("int-quantized", group_size=-1))
    assert torch.equal(short["a.weight"], codes.float())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"sparsity_config": {"format": "sparse-bitmask"}}, "sparse-bitmask"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": {"g": 3}}, "'g'"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "token"}}}}, "token"),
    ],
    ids=str,
)
def test_compressed_tensors_that_are_not_decoded_are_told(changes: dict[str, Any], word: str) -> None:
    state = {"a.weight": torch.ones(4, 8, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1)}
    refused(state, ct("int-quantized", strategy="channel") | changes, word)
    for form in ("marlin-24", "mxfp6-pack-quantized", "mixed-precision", "dense", None):
        refused(state, ct(form, strategy="channel"), str(form))  # type: ignore[arg-type]


# ---- bitsandbytes

BNB = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bitsandbytes_int8(dtype: str) -> None:
    """Against code * SCB / 127 in float64: two float32 roundings. And within one unit of bitsandbytes itself."""
    functional = pytest.importorskip("bitsandbytes").functional
    weight = noise(7, 40, dtype=torch.float16)
    codes, absmax, _ = functional.int8_vectorwise_quant(weight)
    state = {"a.weight": codes, "a.SCB": absmax, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    made = decoded(state | {"a.bias": noise(7)}, {"load_in_8bit": True}, dtype)
    assert set(made) == {"a.weight", "a.bias"}
    exact = codes.double() * absmax.double().view(-1, 1) / 127
    unit = torch.finfo(getattr(torch, dtype)).eps / 2
    assert bool(((made["a.weight"].double() - exact).abs() <= exact.abs() * (unit + 2.01 * 2**-24)).all())
    theirs = functional.int8_vectorwise_dequant(codes, absmax)
    if dtype == "float32":
        assert torch.allclose(made["a.weight"], theirs, rtol=5 * 2**-24, atol=0)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_bitsandbytes_4bit(kind: str, nested: bool, storage: torch.dtype) -> None:
    """Bitsandbytes' own 4-bit numbers, equal bit for bit, in all dtypes, blocks that end within a row included."""
    functional = pytest.importorskip("bitsandbytes").functional
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = noise(60, 100, dtype=dtype)
        packed, state = functional.quantize_4bit(
            weight, quant_type=kind, compress_statistics=nested, quant_storage=storage
        )
        theirs = functional.dequantize_4bit(packed, state)
        tensors = {f"a.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        name = str(dtype).removeprefix("torch.")
        view, _, held = opened({"a.weight": packed} | tensors, {"quant_method": "bitsandbytes"}, name)
        assert held.read == [f"a.weight.quant_state.bitsandbytes__{kind}"]
        assert list(view.tensors) == ["a.weight"]
        ours = view.get("a.weight")
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)  # but for the sign of zero: bitsandbytes' FP4 has a -0 that its map lacks


@pytest.mark.parametrize("name", ["llama_bf16", "gpt2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_folders_that_transformers_writes_with_bitsandbytes(name: str, bits: int, tmp_path: Path) -> None:
    """Every tensor has the float model's name and shape, and quantized ones are those of the package, bit for bit.

    Int8 is within three float32 roundings before that of the dtype: the package multiplies by a decimal 1 / 127. Rows
    are whole blocks here: for some others (96 in blocks of 64) bitsandbytes 0.50 takes the wrong absmax on a CPU.
    """
    functional = pytest.importorskip("bitsandbytes").functional
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

    if name == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": models.VOCABULARY}
        folder = models.save(models.randomized(GPT2LMHeadModel(GPT2Config(**sizes))), tmp_path / name)
    else:
        folder = models.llama_bf16(tmp_path / name)
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantization = BitsAndBytesConfig(**(how if bits == 4 else {"load_in_8bit": True}))
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map="cpu", dtype="auto"
    )
    model.save_pretrained(tmp_path / "packed")
    layers = {key: layer for key, layer in model.named_modules() if type(layer).__module__.startswith("bitsandbytes")}
    assert layers
    turned = {f"{key}.weight" for key in layers} if name == "gpt2" else set()
    view, _ = dequantized(ShardReader(tmp_path / "packed"), read_config(tmp_path / "packed"), name, transposed=turned)
    floats = models.read_tensors(folder)
    assert {key: (info.shape, info.dtype) for key, info in view.tensors.items()} == {
        key: (tuple(tensor.shape), tensor.dtype) for key, tensor in floats.items()
    }
    for key, tensor in floats.items():
        made, layer = view.get(key), layers.get(key.removesuffix(".weight"))
        if layer is None or not key.endswith(".weight"):
            assert models.same(made, tensor)
            continue
        made = made.t() if key in turned else made
        if bits == 4:
            assert torch.equal(made, functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
        else:
            theirs = functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
            bound = torch.finfo(made.dtype).eps + 5 * 2**-24
            assert bool(((made.float() - theirs).abs() <= theirs.abs() * bound).all())


def test_bitsandbytes_that_does_not_fit_is_told() -> None:
    codes, absmax = torch.ones(4, 8, dtype=torch.int8), torch.ones(4)
    refused({"a.weight": codes}, BNB, "a.SCB")
    refused({"a.weight": codes, "a.SCB": absmax[:3]}, BNB, "[3] where [4]")
    turing = torch.tensor(2, dtype=torch.uint8)
    refused({"a.weight": codes, "a.SCB": absmax, "a.weight_format": turing}, BNB, "layout")
    four = {"a.weight": torch.zeros(64, 1, dtype=torch.uint8)}
    refused(four, BNB, "quant_state")
    said = {"shape": [8, 16], "blocksize": 64, "dtype": "float32", "quant_type": "nf4"}
    state = {"a.weight.absmax": torch.ones(2), "a.weight.quant_map": torch.linspace(-1, 1, 16)}

    def json_of(**changes: Any) -> dict[str, Tensor]:
        text = json.dumps(said | changes).encode()
        return {"a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8)}

    assert torch.equal(decoded(four | state | json_of(), BNB)["a.weight"], -torch.ones(8, 16))
    refused(four | state | json_of(shape=[8, 17]), BNB, "64 bytes where 68")
    refused(four | state | json_of(blocksize=32), BNB, "[2] where [4]")
    for wrong in (0, 63, "64", None, 64.0):
        refused(four | state | json_of(blocksize=wrong), BNB, f"blocks of {wrong!r}")
    refused(four | state | json_of(nested_blocksize=256, nested_offset=0.1), BNB, "nested_absmax")
    refused(
        four | state | {"a.weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}, BNB, "no quant"
    )


# ---- quantkit's own products, in all formats

SCHEMES = {
    "w8a8": Scheme("int8", activation_dtype="int8"),
    "int8 g16": Scheme("int8", 16),
    "int4 g16": Scheme("int4", 16),
    "int4": Scheme("int4"),
    "int8 tensor": Scheme("int8", activation_dtype="int8", weight_granularity="tensor"),
    "e4m3 block": Scheme("float8_e4m3fn", None, "float8_e4m3fn", weight_granularity="block", activation="group"),
    "e5m2": Scheme("float8_e5m2"),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", ["compressed-tensors", "quantkit", "bitsandbytes"])
def test_what_quantkit_writes(name: str, form: str, transposed: bool) -> None:
    scheme, layout = SCHEMES[name], formats.FORMATS[form]
    if layout.reason_against(scheme) is not None:
        return  # the format has no word for the scheme, as its own tests show
    weight = noise(144, 160, dtype=torch.bfloat16)
    codes, scale = quantize_linear(weight, scheme)
    tensors = layout.compress(scheme, codes, scale, transposed=transposed)
    stored = layout.config(scheme, ["m.a"], ["lm_head"])
    state = {f"m.a.{key}": value for key, value in tensors.items()} | {"lm_head.weight": weight}
    made = decoded(state, stored, "bfloat16", transposed={"m.a.weight"} if transposed else ())
    expected = numbers.dequantize_weight(codes, scale, scheme.weight_granularity)
    assert set(made) == {"m.a.weight", "lm_head.weight"}
    assert models.same(made["m.a.weight"], expected.t().contiguous() if transposed else expected)
    assert models.same(made["lm_head.weight"], weight)


def test_rows_of_quantkits_own_format_that_4_does_not_divide() -> None:
    layout, scheme = formats.FORMATS["quantkit"], Scheme("float8_e5m2")
    codes, scale = quantize_weight(noise(6, 51), torch.float8_e5m2)
    state = {f"a.{key}": value for key, value in layout.compress(scheme, codes, scale).items()}
    stored = layout.config(scheme, ["model.a"], [])
    made = decoded(state, stored, shapes={"a.weight": (6, 51)})["a.weight"]
    assert torch.equal(made, numbers.dequantize(codes, scale))
    assert decoded(state, stored)["a.weight"].shape == (6, 52)  # nothing in the file says 51
    with pytest.raises(CheckpointError, match="K = 60"):
        decoded(state, stored, shapes={"a.weight": (6, 60)})


def test_experts_of_quantkits_own_format_become_one_parameter_again() -> None:
    layout, scheme = formats.FORMATS["quantkit"], SCHEMES["w8a8"]
    codes, scale = quantize_weight(noise(11, 8, 16), torch.int8)
    state = {}
    for expert in reversed(range(11)):
        tensors = layout.compress(scheme, codes[expert], scale[expert])
        state |= {f"m.experts.{expert}.up.{key}": value for key, value in tensors.items()}
    stored = layout.config(scheme, ["m.experts.up"], [])
    expected = numbers.dequantize(codes, scale)
    assert torch.equal(decoded(state, stored)["m.experts.up"], expected)
    turned = decoded(state, stored, transposed={"m.experts.up"})
    assert torch.equal(turned["m.experts.up"], expected.mT)
    del state["m.experts.3.up.weight"]
    refused(state, stored, "experts of 'm.experts.up'")
