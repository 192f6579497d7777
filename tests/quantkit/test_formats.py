import contextlib
import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import same
from quantkit_kernels.formats import dequantize, quantize_weight

from quantkit import formats
from quantkit.errors import CheckpointError, RecipeError
from quantkit.formats import FORMATS, compressed_tensors, native
from quantkit.recipe import load_recipe, recipe_names
from quantkit.scheme import Scheme

SCHEMES = {name: load_recipe(name).scheme for name in recipe_names()} | {"int8-g1": Scheme("int8", 1)}
PAIRS = [
    pytest.param(form, scheme, id=f"{form.NAME}-{name}")
    for form in FORMATS.values()
    for name, scheme in SCHEMES.items()
    if form.reason_against(scheme) is None
]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def random_codes(scheme, out_features, in_features, seed):
    """Codes of every value that the dtype has (NaN's bytes too), and scales."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(-128, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    return raw.view(getattr(torch, scheme.weight_dtype))


@pytest.mark.parametrize(("form", "scheme"), PAIRS)
@given(n=st.integers(1, 5), k=st.integers(1, 70), seed=st.integers(0, 2**31), dtype=st.sampled_from(FLOATS))
@settings(max_examples=25)
def test_what_is_compressed_decompresses_bit_for_bit(form, scheme, n, k, seed, dtype):
    k = k if scheme.group_size is None else k * scheme.group_size
    codes = random_codes(scheme, n, k, seed)
    scale = torch.rand(n, k // (scheme.group_size or k), generator=torch.Generator().manual_seed(seed)).to(dtype)
    stored = form.compress(scheme, codes, scale)
    back, back_scale = form.decompress(scheme, stored, k)
    assert same(back, codes)
    assert same(back_scale, scale)
    specs = form.tensor_specs(scheme, n, k, dtype)
    assert set(stored) == set(specs)
    for name, tensor in stored.items():
        assert (tuple(tensor.shape), tensor.dtype) == (specs[name].shape, specs[name].dtype)
        assert specs[name].nbytes == tensor.nbytes
        assert tensor.is_contiguous()


def test_packed_words_are_the_codes_plus_128_lowest_first():
    codes = torch.tensor([[-128, -127, 0, 127, 5]], dtype=torch.int8)
    packed = compressed_tensors.compress(Scheme("int8"), codes, torch.ones(1, 1))["weight_packed"]
    values = [code + 128 for code in codes[0].tolist()]
    words = [sum(value << 8 * place for place, value in enumerate(values[i : i + 4])) for i in (0, 4)]
    assert [word % 2**32 for word in packed[0].tolist()] == words


def test_native_words_are_the_bytes_of_the_codes_lowest_first():
    codes = torch.tensor([[-128, -1, 0, 127, 5]], dtype=torch.int8)
    words = native.compress(Scheme("int8"), codes, torch.ones(1, 1))["weight"]
    values = [code % 256 for code in codes[0].tolist()]
    expected = [sum(value << 8 * place for place, value in enumerate(values[i : i + 4])) for i in (0, 4)]
    assert [word % 2**32 for word in words[0].tolist()] == expected


@pytest.mark.parametrize(("form", "scheme"), PAIRS)
def test_the_config_gives_the_scheme_back_and_none_for_what_is_left(form, scheme):
    quantized, left = ["a.q_proj", "a.k_proj"], ["lm_head", "a.router"]
    config = json.loads(json.dumps(form.config(scheme, quantized, left)))
    layout = form.parse(config)
    assert formats.of_config(config, "x") is form
    for module in quantized:
        found = layout.scheme_of(module)
        assert (found.weight_dtype, found.group_size, found.activation_dtype) == (
            scheme.weight_dtype,
            scheme.group_size,
            scheme.activation_dtype,
        )
    for module in left:
        assert layout.scheme_of(module) is None


CT_PAIRS = [pair for pair in PAIRS if pair.values[0] is compressed_tensors]


@pytest.mark.parametrize(("form", "scheme"), CT_PAIRS)
def test_compressed_tensors_itself_accepts_the_config_and_knows_every_key(form, scheme):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.base import COMPRESSION_VERSION_NAME, SPARSITY_CONFIG_NAME, TRANSFORM_CONFIG_NAME

    written = form.config(scheme, ["q"], ["lm_head"])
    config = quantization.QuantizationConfig.model_validate(copy.deepcopy(written))
    beside = {COMPRESSION_VERSION_NAME, SPARSITY_CONFIG_NAME, TRANSFORM_CONFIG_NAME}
    assert set(written) <= set(type(config).model_fields) | beside
    group = config.config_groups["group_0"]
    assert set(written["config_groups"]["group_0"]) <= set(type(group).model_fields)
    assert group.weights.num_bits == 8
    assert group.weights.type == ("int" if scheme.weight_dtype == "int8" else "float")
    assert group.weights.strategy == ("channel" if scheme.group_size is None else "group")
    assert group.weights.group_size == scheme.group_size
    assert (group.input_activations is None) == (scheme.activation_dtype is None)
    assert config.ignore == ["lm_head"]
    assert str(getattr(config.format, "value", config.format)) == form.format_name(scheme)


@pytest.mark.parametrize(("form", "scheme"), CT_PAIRS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_compressed_tensors_itself_decompresses_to_our_weight(form, scheme, dtype):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes, scale = quantize_weight(weight, getattr(torch, scheme.weight_dtype), scheme.group_size, scheme.weight_range)
    config = QuantizationConfig.model_validate(form.config(scheme, ["q"], []))
    compressor = BaseCompressor.get_value_from_registry(form.format_name(scheme))
    stored = {name: tensor.clone() for name, tensor in form.compress(scheme, codes, scale).items()}
    theirs = compressor.decompress(stored, config.config_groups["group_0"])["weight"]
    assert same(theirs, dequantize(codes, scale))


def test_auto_takes_the_format_that_most_can_load():
    assert formats.choose(Scheme("int8")) is compressed_tensors
    assert formats.choose(Scheme("float8_e4m3fn")) is compressed_tensors
    assert formats.choose(Scheme("float8_e5m2")) is native
    assert formats.choose(Scheme("int8"), "quantkit") is native


@pytest.mark.parametrize(
    ("scheme", "name", "says"),
    [
        (Scheme("float8_e5m2"), "compressed-tensors", "E5M2"),
        (Scheme("float8_e4m3fn", 128), "compressed-tensors", "groups"),
        (Scheme("int8"), "gguf", "'gguf'"),
    ],
)
def test_a_format_that_cannot_say_a_scheme_is_refused(scheme, name, says):
    with pytest.raises(RecipeError) as error:
        formats.choose(scheme, name)
    assert says in str(error.value)
    assert "auto" in str(error.value)


def test_what_no_other_format_can_say_is_native():
    assert formats.choose(Scheme("float8_e5m2", 128)) is native


@pytest.mark.parametrize("config", [{}, {"quant_method": "gptq"}, {"quant_method": ["x"]}, "int8", 5, ["x"], None])
def test_unknown_methods_are_refused(config):
    with pytest.raises(CheckpointError, match="compressed-tensors and quantkit"):
        formats.of_config(config, "here")


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


GROUP = "config_groups__group_0__"
REFUSED = {
    "asymmetric": {GROUP + "weights__symmetric": False},
    "4 bits": {GROUP + "weights__num_bits": 4},
    "tensor": {GROUP + "weights__strategy": "tensor"},
    "block": {GROUP + "weights__strategy": "block"},
    "permuted columns": {GROUP + "weights__actorder": "group"},
    "group without size": {GROUP + "weights__group_size": None},
    "size is text": {GROUP + "weights__group_size": "128"},
    "size is half": {GROUP + "weights__group_size": 0.5},
    "size is -1": {GROUP + "weights__group_size": -1},
    "static activations": {GROUP + "input_activations": {"num_bits": 8, "type": "int", "strategy": "tensor"}},
    "other activations": {
        GROUP + "input_activations": {"num_bits": 4, "type": "int", "strategy": "token", "dynamic": True}
    },
    "asymmetric activations": {
        GROUP + "weights__strategy": "channel",
        GROUP + "format": "int-quantized",
        GROUP + "input_activations": {
            "num_bits": 8,
            "type": "int",
            "strategy": "token",
            "dynamic": True,
            "symmetric": False,
        },
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


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": None},
        {"groups": None},
        {"groups": 5},
        {"groups": {}},
        {"groups": [5]},
        {"groups": [{}]},
        {"groups": [{"scheme": {"weight_dtype": "int8"}}]},
        {"groups": [{"scheme": {"weight_dtype": "int8"}, "modules": "q"}]},
        {"groups": [{"scheme": {"weight_dtype": "int8"}, "modules": [1]}]},
        {"groups": [{"scheme": {"weight_dtype": "int4"}, "modules": ["q"]}]},
        {"groups": [{"scheme": {"weight_dtype": "int8", "group_size": 0}, "modules": ["q"]}]},
        {"groups": [{"scheme": {"weight_dtype": "int8", "new": 1}, "modules": ["q"]}]},
    ],
)
def test_damaged_native_configs_are_refused(change):
    with pytest.raises(CheckpointError):
        native.parse(native.config(Scheme("int8"), ["q"], []) | change)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
words = st.sampled_from(
    ["int", "float", "channel", "group", "token", "int8", "Linear", "re:(", "re:.*", "int-quantized"]
)
json_values = st.recursive(
    scalars | words | st.sampled_from([8, 128, True]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, config):
    """A config of ours in which the value at some places is another."""
    config = copy.deepcopy(config)
    for _ in range(draw(st.integers(1, 3))):
        place = config
        while True:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if isinstance(place[key], (dict, list)) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            place[key] = draw(json_values)
            break
    return config


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@given(data=st.data())
@settings(max_examples=200)
def test_any_config_is_read_or_is_a_checkpoint_error(form, data):
    config = data.draw(damaged(form.config(Scheme("int8"), ["q"], ["lm_head"])))
    try:
        layout = formats.of_config(config, "here").parse(config)
        scheme = layout.scheme_of("model.layers.0.q")
    except CheckpointError:
        return
    assert scheme is None or form.reason_against(scheme) is None


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@given(config=st.dictionaries(st.text(max_size=4), json_values))
def test_any_json_object_is_refused_by_a_checkpoint_error(form, config):
    with contextlib.suppress(CheckpointError):
        form.parse({"version": native.VERSION, **config})
