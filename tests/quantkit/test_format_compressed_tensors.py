"""The compressed-tensors format: its own package reads what we write, and we read what llm-compressor writes."""

import copy

import pytest
import torch
from models import same
from quantkit_kernels.formats import dequantize_weight, quantize_per_group, quantize_per_tensor
from schemes import SCHEMES

from quantkit.errors import CheckpointError
from quantkit.formats import compressed_tensors
from quantkit.modules import quantize_linear
from quantkit.scheme import Scheme

NAMES = [name for name, scheme in SCHEMES.items() if compressed_tensors.reason_against(scheme) is None]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INT8, E4M3 = "int8", "float8_e4m3fn"


@pytest.mark.parametrize("name", NAMES)
def test_compressed_tensors_itself_accepts_the_config_and_knows_every_key(name):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.base import COMPRESSION_VERSION_NAME, SPARSITY_CONFIG_NAME, TRANSFORM_CONFIG_NAME

    scheme = SCHEMES[name]
    written = compressed_tensors.config(scheme, ["q"], ["lm_head"])
    config = quantization.QuantizationConfig.model_validate(copy.deepcopy(written))
    beside = {COMPRESSION_VERSION_NAME, SPARSITY_CONFIG_NAME, TRANSFORM_CONFIG_NAME}
    assert set(written) <= set(type(config).model_fields) | beside
    group = config.config_groups["group_0"]
    assert set(written["config_groups"]["group_0"]) <= set(type(group).model_fields)
    assert group.weights.num_bits == (4 if name.startswith("int4") else 8)
    assert group.weights.type == ("int" if scheme.code_dtype == "int8" else "float")
    assert group.weights.symmetric
    words = {"row": "channel"}.get(scheme.weight_granularity, scheme.weight_granularity)
    assert group.weights.strategy == (words if scheme.group_size is None else "group")
    assert group.weights.group_size == scheme.group_size
    assert group.weights.block_structure == ([128, 128] if scheme.weight_granularity == "block" else None)
    assert group.weights.dynamic is False
    inputs = group.input_activations
    assert (inputs is None) == (scheme.activation_dtype is None)
    if inputs is not None:
        assert inputs.strategy == scheme.activation.removesuffix("-static")
        assert inputs.dynamic is not scheme.is_static
        assert inputs.group_size == (128 if scheme.activation == "group" else None)
    assert config.ignore == ["lm_head"]
    assert str(getattr(config.format, "value", config.format)) == compressed_tensors.format_name(scheme)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_compressed_tensors_itself_decompresses_to_our_weight(name, dtype):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    scheme = SCHEMES[name]
    weight = torch.randn(192, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    granularity = scheme.weight_granularity
    codes, scale = quantize_linear(weight, scheme)
    config = QuantizationConfig.model_validate(compressed_tensors.config(scheme, ["q"], []))
    compressor = BaseCompressor.get_value_from_registry(compressed_tensors.format_name(scheme))
    given = torch.ones(1) if scheme.is_static else None
    stored = {name: tensor.clone() for name, tensor in compressed_tensors.compress(scheme, codes, scale, given).items()}
    theirs = compressor.decompress(stored, config.config_groups["group_0"])["weight"]
    assert same(theirs, dequantize_weight(codes, scale, granularity))


@pytest.mark.parametrize("name", ["w8a8-static", "fp8-static", "fp8-block"])
def test_compressed_tensors_itself_quantizes_activations_to_our_codes(name):
    """Equal to the last bit (the inputs stay above -127 steps: it saturates at -128, and quantkit at -127)."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    scheme = SCHEMES[name]
    config = QuantizationConfig.model_validate(compressed_tensors.config(scheme, ["q"], []))
    args = config.config_groups["group_0"].input_activations
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(2)).clamp(min=-2)
    dtype = getattr(torch, scheme.weight_dtype)
    if scheme.is_static:
        given = torch.tensor([2 / 127 if dtype == torch.int8 else 2 / 448])
        codes, scale = quantize_per_tensor(x, dtype, given)
        assert float(x.max()) > 2  # some saturate
        theirs = fake_quantize(x, given, None, args)
        ours = codes.float() * scale
    else:
        codes, scale = quantize_per_group(x, dtype, 128)
        theirs = fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1)), args)
        ours = codes.float() * scale.repeat_interleave(128, 1)
    assert torch.equal(theirs, ours)


def altered(**changes):
    """Our W8A16 config with changes: a dotted path to a value."""
    config = compressed_tensors.config(Scheme("int8", 128), ["q"], ["lm_head"])
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        place[leaf] = value
    return config


TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
GROUP = "config_groups__group_0__"
REFUSED = {
    "asymmetric": {GROUP + "weights__symmetric": False},
    "symmetric is text": {GROUP + "weights__symmetric": "yes"},
    "symmetric is a list": {GROUP + "weights__symmetric": [True]},
    "3 bits": {GROUP + "weights__num_bits": 3},
    "group size with another strategy": {GROUP + "weights__strategy": "token"},
    "dynamic weights": {GROUP + "weights__dynamic": True},
    "block without structure": {GROUP + "weights__strategy": "block"},
    "int8 in blocks": {GROUP + "weights__strategy": "block", GROUP + "weights__block_structure": [128, 128]},
    "structure without block": {GROUP + "weights__block_structure": [128, 128]},
    "fp8 in groups": {GROUP + "weights__type": "float", GROUP + "format": "naive-quantized"},
    "permuted columns": {GROUP + "weights__actorder": "group"},
    "group without size": {GROUP + "weights__group_size": None},
    "size is text": {GROUP + "weights__group_size": "128"},
    "size is half": {GROUP + "weights__group_size": 0.5},
    "size is -1": {GROUP + "weights__group_size": -1},
    "static activations and groups": {
        GROUP + "input_activations": {"num_bits": 8, "type": "int", "strategy": "tensor"}
    },
    "static by token": {
        GROUP + "weights__strategy": "channel",
        GROUP + "input_activations": TOKEN | {"dynamic": False},
    },
    "partly dynamic": {
        GROUP + "weights__strategy": "channel",
        GROUP + "input_activations": TOKEN | {"dynamic": "local"},
    },
    "other activations": {GROUP + "input_activations": TOKEN | {"num_bits": 4}},
    "groups of activations without blocks": {
        GROUP + "weights__strategy": "channel",
        GROUP + "input_activations": TOKEN | {"strategy": "group", "group_size": 128},
    },
    "asymmetric activations": {
        GROUP + "weights__strategy": "channel",
        GROUP + "format": "int-quantized",
        GROUP + "input_activations": TOKEN | {"symmetric": False},
    },
    "activations are no table": {GROUP + "input_activations": "int8"},
    "output activations": {GROUP + "output_activations": {"num_bits": 8}},
    "other storage": {GROUP + "format": "int-quantized"},
    "no weights": {GROUP + "weights": None},
    "no targets": {GROUP + "targets": None},
    "targets is text": {GROUP + "targets": "Linear"},
    "broken target": {GROUP + "targets": ["re:("]},
    "broken ignore": {"ignore": ["re:*"]},
    "ignore is text": {"ignore": "lm_head"},
    "ignore has numbers": {"ignore": [1]},
    "no groups": {"config_groups": None},
    "group is a list": {"config_groups": {"group_0": []}},
    "kv cache": {"kv_cache_scheme": {"num_bits": 8}},
    "sparse": {"sparsity_config": {"format": "sparse-24-bitmask"}},
    "transforms": {"transform_config": {"config_groups": {}}},
}


def test_the_unchanged_config_is_read():
    assert compressed_tensors.parse(altered()).scheme_of("q") == Scheme("int8", 128)


@pytest.mark.parametrize("name", REFUSED)
def test_what_compressed_tensors_can_say_and_we_do_not_read_is_refused(name):
    with pytest.raises(CheckpointError):
        compressed_tensors.parse(altered(**REFUSED[name]))


def group_of(weights, inputs=None, targets=("Linear",), **keys):
    """A config group with every key that llm-compressor writes."""
    every = {"num_bits": 8, "symmetric": True, "group_size": None, "block_structure": None, "dynamic": False}
    every |= {"actorder": None, "scale_dtype": None, "zp_dtype": None, "observer": "memoryless_minmax"}
    every |= {"observer_kwargs": {}}
    group = {"targets": list(targets), "weights": every | weights, "output_activations": None}
    return group | {"input_activations": None if inputs is None else every | inputs} | keys


def config_of(*groups, ignore=("lm_head",), **keys):
    named = {f"group_{number}": group for number, group in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "config_groups": named, "ignore": list(ignore), **keys}


INT, FLOAT = {"type": "int"}, {"type": "float"}
DYNAMIC = {"dynamic": True, "observer": None}
WRITTEN_ELSEWHERE = {
    "W8A8": (INT | {"strategy": "channel"}, INT | {"strategy": "token"} | DYNAMIC, "int-quantized"),
    "W8A8 static": (INT | {"strategy": "channel"}, INT | {"strategy": "tensor", "observer": "mse"}, "int-quantized"),
    "W8A8 by tensor": (INT | {"strategy": "tensor"}, INT | {"strategy": "tensor"} | DYNAMIC, "int-quantized"),
    "W8A16": (INT | {"strategy": "group", "group_size": 128, "actorder": "weight"}, None, "pack-quantized"),
    "W4A16": (INT | {"num_bits": 4, "strategy": "group", "group_size": 128}, None, "pack-quantized"),
    "W4A16_ASYM": (
        INT | {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 128},
        None,
        "pack-quantized",
    ),
    "FP8": (FLOAT | {"strategy": "tensor"}, FLOAT | {"strategy": "tensor"}, "float-quantized"),
    "FP8 without strategies": (FLOAT | {"strategy": None}, FLOAT | {"strategy": None}, "float-quantized"),
    "FP8_DYNAMIC": (FLOAT | {"strategy": "channel"}, FLOAT | {"strategy": "token"} | DYNAMIC, "float-quantized"),
    "channel by size": (INT | {"group_size": -1}, INT | {"strategy": "token"} | DYNAMIC, "int-quantized"),
    "FP8_BLOCK": (
        FLOAT | {"strategy": "block", "block_structure": [128, 128]},
        FLOAT | {"strategy": "group", "group_size": 128} | DYNAMIC,
        "float-quantized",
    ),
    "FP8_BLOCK of old": (
        FLOAT | {"strategy": "block", "block_structure": "128x128"},
        FLOAT | {"strategy": "group", "group_size": 128} | DYNAMIC,
        "float-quantized",
    ),
}
READ = {
    "W8A8": Scheme(INT8, None, INT8),
    "W8A8 static": Scheme(INT8, None, INT8, activation="tensor-static"),
    "W8A8 by tensor": Scheme(INT8, None, INT8, weight_granularity="tensor", activation="tensor"),
    "W8A16": Scheme(INT8, 128),
    "W4A16": Scheme("int4", 128),
    "W4A16_ASYM": Scheme("uint4", 128),
    "FP8": SCHEMES["fp8-static"],
    "FP8 without strategies": SCHEMES["fp8-static"],
    "FP8_DYNAMIC": SCHEMES["fp8"],
    "channel by size": SCHEMES["w8a8"],
    "FP8_BLOCK": SCHEMES["fp8-block"],
    "FP8_BLOCK of old": SCHEMES["fp8-block"],
}


@pytest.mark.parametrize("name", WRITTEN_ELSEWHERE)
@pytest.mark.parametrize("where", ["config", "group"])
@pytest.mark.parametrize("spelled", ["every key", "null left out", "defaults left out"])
def test_what_others_write_is_read(name, where, spelled):
    weights, inputs, form = WRITTEN_ELSEWHERE[name]
    group = group_of(weights, inputs)
    (group if where == "group" else {})["format"] = form
    for args in (group["weights"], group["input_activations"] or {}):
        for key in [key for key, value in args.items() if spelled != "every key" and value in (None, {})]:
            del args[key]
        if spelled == "defaults left out":
            for key, value in {"num_bits": 8, "symmetric": True, "dynamic": False, "type": "int"}.items():
                if args.get(key) == value:
                    del args[key]
    config = config_of(group, **({"format": form} if where == "config" else {}))
    quantization = pytest.importorskip("compressed_tensors.quantization")
    assert quantization.QuantizationConfig.model_validate(copy.deepcopy(config)) is not None
    layout = compressed_tensors.parse(config)
    assert layout.scheme_of("model.layers.0.mlp.up_proj") == READ[name]
    assert layout.scheme_of("lm_head") is None


def test_of_several_groups_the_most_exact_target_counts():
    """As in compressed-tensors: a module's own name, then the first regex in alphabetical order, then its class."""
    int8 = group_of(INT | {"strategy": "channel"}, INT | {"strategy": "token"} | DYNAMIC, format="int-quantized")
    fp8 = group_of(FLOAT | {"strategy": "channel"}, FLOAT | {"strategy": "token"} | DYNAMIC, format="float-quantized")
    packed = group_of(INT | {"strategy": "channel"}, format="pack-quantized")
    naive = group_of(FLOAT | {"strategy": "tensor"}, format="naive-quantized")
    config = config_of(
        int8 | {"targets": ["Linear"]},
        fp8 | {"targets": [r"re:.*\.down_proj"]},
        packed | {"targets": ["layers.0.down_proj", "re:.*up_proj"]},
        naive | {"targets": [r"re:.*\.(down|up)_proj$"]},
        ignore=["re:.*gate", "layers.9.up_proj"],
        format="mixed-precision",
    )
    expected = {
        "layers.0.q_proj": Scheme(INT8, None, INT8),
        "layers.0.down_proj": Scheme(INT8),
        "layers.1.down_proj": Scheme(E4M3, weight_granularity="tensor"),  # "(" sorts before "d"
        "layers.1.down_project": Scheme(E4M3, None, E4M3),
        "layers.1.up_proj": Scheme(E4M3, weight_granularity="tensor"),
        "up_proj": Scheme(INT8),
        "layers.9.up_proj": None,
        "layers.0.gate": None,
    }
    layout = compressed_tensors.parse(config)
    assert {name: layout.scheme_of(name) for name in expected} == expected
    assert layout.scheme_of("layers.0.q_proj", "Embedding") is None
    matching = pytest.importorskip("compressed_tensors.utils.match")
    every = {target: group for group in config["config_groups"].values() for target in group["targets"]}
    for name in expected:
        if not matching.is_match(name, torch.nn.Linear(1, 1), config["ignore"]):
            theirs = matching.match_targets(name, torch.nn.Linear(1, 1), every)[0]
            alone = compressed_tensors.parse(config_of(every[theirs])).scheme_of(name)
            assert alone == expected[name]
