import contextlib
import copy
import dataclasses
import json

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import same
from schemes import E5M2, SCHEMES

from quantkit import formats
from quantkit.errors import CheckpointError, RecipeError
from quantkit.formats import FORMATS, bitsandbytes, compressed_tensors, native
from quantkit.modules import quantize_linear
from quantkit.scheme import Scheme

PAIRS = [
    pytest.param(form, scheme, id=f"{form.NAME}-{name}")
    for form in FORMATS.values()
    for name, scheme in SCHEMES.items()
    if form.reason_against(scheme) is None
]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def random_codes(scheme, out_features, in_features, seed):
    """Codes of every value that the dtype has (NaN's bytes too)."""
    generator, end = torch.Generator().manual_seed(seed), 1 << (scheme.bits - 1)
    raw = torch.randint(-end, end, (out_features, in_features), generator=generator, dtype=torch.int8)
    return raw.view(getattr(torch, scheme.code_dtype))


def scale_of(scheme, n, k, dtype, seed):
    """A scale as quantizing a weight [n, k] of this dtype would make it; LLM.int8's is some float32 number / 127."""
    shape = {"tensor": (1,), "block": (-(-n // 128), -(-k // 128))}.get(scheme.weight_granularity)
    scale = torch.rand(shape or (n, k // (scheme.group_size or k)), generator=torch.Generator().manual_seed(seed))
    return (scale + 2**-10) / 127 if scheme.threshold is not None else (scale + 2**-10).to(dtype)


@pytest.mark.parametrize(("form", "scheme"), PAIRS)
@pytest.mark.parametrize("transposed", [False, True])
@given(n=st.integers(1, 5), k=st.integers(1, 70), seed=st.integers(0, 2**31), dtype=st.sampled_from(FLOATS))
@example(n=129, k=256, seed=0, dtype=torch.bfloat16)
@settings(max_examples=15, deadline=None)
def test_what_is_compressed_decompresses_bit_for_bit(form, scheme, transposed, n, k, seed, dtype):
    k = k if scheme.group_size is None else k * scheme.group_size
    codes = random_codes(scheme, n, k, seed)
    scale = scale_of(scheme, n, k, dtype, seed)
    given = torch.tensor([seed / 2**31 + 2**-10]) if scheme.is_static else None
    stored = form.compress(scheme, codes, scale, given, transposed)
    back, back_scale = form.decompress(scheme, stored, k, transposed)
    assert same(back.contiguous(), codes)
    assert same(back_scale.to(scale.dtype), scale)
    specs = form.tensor_specs(scheme, n, k, dtype, transposed)
    assert set(stored) == set(specs)
    for name, tensor in stored.items():
        assert (tuple(tensor.shape), tensor.dtype) == (specs[name].shape, specs[name].dtype)
        assert specs[name].nbytes == tensor.nbytes
        assert tensor.is_contiguous()
    if given is not None:
        assert torch.equal(stored["input_scale"], given.to(dtype))


@pytest.mark.parametrize(("form", "scheme"), PAIRS)
def test_only_compressed_tensors_stores_bytes_as_the_model_has_them(form, scheme):
    (first, *_), (turned, *_) = (
        list(form.tensor_specs(scheme, 3, 256, torch.float16, transposed).values()) for transposed in (False, True)
    )
    turns = form is compressed_tensors and not form.is_packed(scheme)
    assert turned.shape == (first.shape[::-1] if turns else first.shape)


@pytest.mark.parametrize("form", [compressed_tensors, native])
def test_a_scale_of_activations_goes_with_static_activations(form):
    codes, scale = torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 1)
    with pytest.raises(ValueError, match="static activations"):
        form.compress(SCHEMES["w8a8-static"], codes, scale)
    with pytest.raises(ValueError, match="static activations"):
        form.compress(SCHEMES["w8a8"], codes, scale, torch.ones(1))


def test_a_stored_scale_of_activations_is_never_zero():
    codes, scale = torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 1, dtype=torch.float16)
    stored = native.compress(SCHEMES["w8a8-static"], codes, scale, torch.tensor(1e-9))
    assert stored["input_scale"].tolist() == [torch.finfo(torch.float16).tiny]


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


def test_words_of_four_bits_are_the_codes_plus_8_lowest_first():
    codes = torch.tensor([[-8, -7, 0, 7, 5, -1, 1, 2, 3]], dtype=torch.int8)
    expected = [sum((code + 8) << 4 * place for place, code in enumerate(codes[0, i : i + 8].tolist())) for i in (0, 8)]
    for form, leaf in ((compressed_tensors, "weight_packed"), (native, "weight")):
        words = form.compress(Scheme("int4"), codes, torch.ones(1, 1))[leaf]
        assert [word % 2**32 for word in words[0].tolist()] == expected


def test_a_native_checkpoint_is_written_in_the_oldest_version_that_holds_it():
    assert native.config(Scheme("int8"), ["q"], [])["version"] == 1
    assert native.config(SCHEMES["int4"], ["q"], [])["version"] == 3
    assert "outlier_columns" not in native.config(SCHEMES["int4"], ["q"], [])["groups"][0]["scheme"]


@pytest.mark.parametrize(("form", "scheme"), PAIRS)
def test_the_config_gives_the_scheme_back_and_none_for_what_is_left(form, scheme):
    quantized, left = ["a.q_proj", "a.k_proj"], ["lm_head", "a.router"]
    config = json.loads(json.dumps(form.config(scheme, quantized, left)))
    layout = form.parse(config)
    assert formats.of_config(config, "x") is form
    for module in quantized:
        found = layout.scheme_of(module)
        kept = dataclasses.replace(found, weight_range=scheme.weight_range, activation_range=scheme.activation_range)
        assert kept == scheme
    for module in left:
        assert layout.scheme_of(module) is None


def test_auto_takes_the_format_that_most_can_load():
    assert formats.choose(Scheme("int8")) is compressed_tensors
    assert formats.choose(Scheme("float8_e4m3fn")) is compressed_tensors
    assert formats.choose(Scheme("float8_e5m2")) is native
    assert formats.choose(Scheme("int8"), "quantkit") is native
    assert formats.choose(SCHEMES["w8a8"]) is compressed_tensors
    assert formats.choose(SCHEMES["int4"]) is compressed_tensors
    assert formats.choose(SCHEMES["int4"], "quantkit") is native
    assert formats.choose(SCHEMES["llm-int8"]) is bitsandbytes
    assert formats.choose(SCHEMES["llm-int8"], "quantkit") is native
    assert formats.choose(SCHEMES["fp8-block"]) is compressed_tensors
    assert formats.choose(SCHEMES["fp8-e5m2-block"]) is native


@pytest.mark.parametrize(
    ("scheme", "name", "says"),
    [
        (Scheme("float8_e5m2"), "compressed-tensors", "E5M2"),
        (Scheme("float8_e4m3fn", 128), "compressed-tensors", "groups"),
        (SCHEMES["llm-int8"], "compressed-tensors", "outlier"),
        (SCHEMES["int8"], "bitsandbytes", "LLM.int8"),
        (SCHEMES["w8a8"], "bitsandbytes", "LLM.int8"),
        (SCHEMES["int4"], "bitsandbytes", "LLM.int8"),
        (SCHEMES["fp8"], "bitsandbytes", "LLM.int8"),
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
    with pytest.raises(CheckpointError, match="compressed-tensors, bitsandbytes and quantkit"):
        formats.of_config(config, "here")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 6},
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
        {"version": 2, "groups": [{"scheme": {"weight_dtype": "int4"}, "modules": ["q"]}]},
        {"version": 3, "groups": [{"scheme": {"weight_dtype": "uint4"}, "modules": ["q"]}]},
        {"groups": [{"scheme": {"weight_dtype": "int8", "group_size": 0}, "modules": ["q"]}]},
        {"groups": [{"scheme": {"weight_dtype": "int8", "new": 1}, "modules": ["q"]}]},
    ],
)
def test_damaged_native_configs_are_refused(change):
    with pytest.raises(CheckpointError):
        native.parse(native.config(Scheme("int8"), ["q"], []) | change)


def test_a_native_config_from_before_there_were_granularities_is_read():
    scheme = {"weight_dtype": E5M2, "group_size": None, "activation_dtype": E5M2, "weight_range": "mse"}
    config = {"quant_method": "quantkit", "version": 1, "groups": [{"scheme": scheme, "modules": ["q"]}]}
    assert native.parse(config).scheme_of("q") == Scheme(E5M2, None, E5M2, "mse")


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
@settings(max_examples=200, deadline=None)
def test_any_config_is_read_or_is_a_checkpoint_error(form, data):
    scheme = SCHEMES["llm-int8"] if form is bitsandbytes else Scheme("int8")
    config = data.draw(damaged(form.config(scheme, ["q"], ["lm_head"])))
    try:
        layout = formats.of_config(config, "here").parse(config)
        scheme = layout.scheme_of("model.layers.0.q")
    except CheckpointError:
        return
    # bitsandbytes' threshold 0, which means that nothing is an outlier, is read and never written.
    assert scheme is None or scheme == SCHEMES["w8a8"] or form.reason_against(scheme) is None


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@given(config=st.dictionaries(st.text(max_size=4), json_values))
def test_any_json_object_is_refused_by_a_checkpoint_error(form, config):
    with contextlib.suppress(CheckpointError):
        form.parse({"version": native.VERSION, **config})


SPARSE = [
    Scheme("float", sparsity="2:4"),
    Scheme("int8", sparsity="2:4"),
    Scheme("int4", 4, sparsity="2:4"),
    Scheme("float8_e4m3fn", activation_dtype="float8_e4m3fn", sparsity="2:4"),
    Scheme("float8_e5m2", weight_granularity="tensor", sparsity="2:4"),
]


@pytest.mark.parametrize("scheme", SPARSE, ids=lambda scheme: scheme.label)
@pytest.mark.parametrize("in_features", [4, 12, 64, 100])
def test_sparse_codes_come_back_and_the_config_says_so(scheme: Scheme, in_features: int) -> None:
    """Version 4: shapes as the specification says, bytes as they were, and the config gives the scheme back."""
    weight = torch.randn(6, in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight.view(-1, 4)[:, ::3] = 0
    codes, scale = quantize_linear(weight, scheme)
    stored = native.compress(scheme, codes, scale)
    specs = native.tensor_specs(scheme, 6, in_features, torch.bfloat16)
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }
    found, found_scale = native.decompress(scheme, stored, in_features)
    assert torch.equal(found.float(), codes.float())
    assert torch.equal(found_scale, scale)
    config = native.config(scheme, ["q"], [])
    assert config["version"] == 4
    assert native.parse(config).scheme_of("q") == scheme
    with pytest.raises(CheckpointError, match="every weight is stored in version 1"):
        native.parse(config | {"version": 1})


def test_other_schemes_do_not_know_sparsity() -> None:
    assert "sparsity" not in native.config(SCHEMES["w8a8"], ["q"], [])["groups"][0]["scheme"]


@pytest.mark.parametrize("form", ["compressed-tensors", "bitsandbytes"])
def test_formats_of_others_do_not_pack_sparse_weights(form: str) -> None:
    with pytest.raises(RecipeError, match=f"format {form} cannot hold this recipe"):
        formats.choose(Scheme("int8", activation_dtype="int8", threshold=6.0, sparsity="2:4"), form)
    assert formats.choose(SPARSE[1]) is native


@pytest.mark.parametrize(
    "words",
    [
        {"weight_dtype": "float"},
        {"weight_dtype": "float", "sparsity": "2:4", "group_size": 32},
        {"weight_dtype": "int8", "sparsity": "4:8"},
        {"weight_dtype": "uint4", "sparsity": "2:4"},
    ],
)
def test_sparse_schemes_that_are_none_are_refused(words: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        Scheme(**words)
