"""The bitsandbytes format: bitsandbytes and transformers agree with what we write, and we read what they write."""

import re

import pytest
import torch
from quantkit_kernels.formats import quantize_weight

from quantkit.errors import CheckpointError
from quantkit.formats import bitsandbytes
from quantkit.scheme import Scheme

LLM_INT8 = Scheme("int8", None, "int8", threshold=6.0)
MODULES = ["layers.0.mlp.gate_proj", "layers.10.mlp.up_proj", "layers.1.attn.head", "layers.0.q_proj"]


def quantized(weight):
    """Codes and stored tensors of a weight."""
    codes, scale = quantize_weight(weight.float(), torch.int8)
    return codes, bitsandbytes.compress(LLM_INT8, codes, scale)


@pytest.mark.parametrize("exponent", [2, 127, 200])
def test_every_largest_magnitude_comes_back_as_the_same_scale(exponent):
    """All 2**23 mantissas of an exponent; SCB is at most one float32 beside the magnitude it stands for."""
    bits = torch.arange(2**23, dtype=torch.int32) + (exponent << 23)
    largest = bits.view(torch.float32)
    scale = (largest / 127.0).clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    stored = bitsandbytes.compress(LLM_INT8, torch.zeros(1, 1, dtype=torch.int8), scale)
    back = bitsandbytes.decompress(LLM_INT8, stored, 1)[1]
    assert torch.equal(back, scale)
    if exponent > 8:
        assert int((stored["SCB"].view(torch.int32) - bits).abs().max()) <= 1


def test_the_largest_float32_stays_finite():
    weight = torch.full((1, 2), torch.finfo(torch.float32).max)
    codes, stored = quantized(weight)
    assert stored["SCB"].tolist() == [torch.finfo(torch.float32).max]
    assert codes.tolist() == [[127, 127]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_and_statistics_are_bitsandbytes_own_but_for_ties(dtype):
    """Both round w * 127 / absmax, each with two float32 roundings of relative 2**-24 on the way: where they differ,
    the exact number is within 127 * 2**-22 of a half. (A bfloat16 weight is often half the largest one, at 63.5)."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(3)).to(dtype)
    theirs, statistics, _ = functional.int8_vectorwise_quant(weight.clone())
    codes, stored = quantized(weight)
    exact = weight.double() * 127 / weight.double().abs().amax(1, keepdim=True)
    tie = ((exact - exact.floor()) - 0.5).abs() <= 127 * 2.0**-22
    different = theirs != codes
    assert bool((different <= tie).all())
    assert float(tie.float().mean()) < 1e-2
    assert bool(((stored["SCB"] - statistics).abs() <= statistics * 2.0**-23).all())


def test_a_row_of_zeros_stays_zeros():
    codes, stored = quantized(torch.zeros(2, 8))
    assert not codes.any()
    assert stored["SCB"].tolist() == [127.0, 127.0]


@pytest.mark.parametrize(
    "left",
    [
        [],
        ["lm_head"],
        ["head"],
        ["layers.0.mlp.gate", "lm_head"],
        ["layers.1"],
        ["layers.0"],
        ["layer.", "layers.(x)", "a b"],
    ],
)
def test_transformers_leaves_just_what_is_left(left):
    """Also a name that is the end or the beginning of a quantized layer's."""
    should = pytest.importorskip("transformers.quantizers.quantizers_utils").should_convert_module
    patterns = bitsandbytes.config(LLM_INT8, MODULES, left)["llm_int8_skip_modules"]
    assert [name for name in MODULES if not should(name, patterns)] == []
    assert [name for name in left if should(name, patterns)] == []
    layout = bitsandbytes.parse(bitsandbytes.config(LLM_INT8, MODULES, left))
    assert [layout.scheme_of(name) for name in MODULES] == [LLM_INT8] * len(MODULES)
    assert [layout.scheme_of(name) for name in left] == [None] * len(left)
    assert not layout.spares_head


def test_a_reader_that_takes_a_pattern_for_the_beginning_of_a_name_skips_no_more():
    """Readers before transformers 5.23 did so."""
    patterns = bitsandbytes.config(LLM_INT8, MODULES, ["layers.0.mlp.gate", "layers.1"])["llm_int8_skip_modules"]
    assert not any(re.match(pattern, name) for pattern in patterns for name in MODULES)
    assert all(any(re.match(pattern, name) for pattern in patterns) for name in ("layers.0.mlp.gate", "layers.1"))


@pytest.mark.parametrize(
    "pattern",
    ["lm_head", "layers.1", "layers.*", "proj", "mlp.gate", "layers.0.mlp", r"layers\.\d+\.mlp", "^layers.0$", ""],
)
def test_patterns_of_others_mean_what_they_mean_in_transformers(pattern):
    should = pytest.importorskip("transformers.quantizers.quantizers_utils").should_convert_module
    layout = bitsandbytes.parse({"load_in_8bit": True, "llm_int8_skip_modules": [pattern]})
    for name in (*MODULES, "lm_head", "model.lm_head", "layers.1.mlp.gate", "layers.11.k_proj", "layers.0"):
        assert (layout.scheme_of(name) is not None) == should(name, [pattern])
        assert bitsandbytes.skips(name, [pattern]) != should(name, [pattern])


def test_the_config_is_transformers_own_to_the_key():
    config_class = pytest.importorskip("transformers").BitsAndBytesConfig
    scheme = Scheme("int8", None, "int8", threshold=4)
    theirs = config_class(load_in_8bit=True, llm_int8_threshold=4.0, llm_int8_skip_modules=["lm_head"]).to_dict()
    theirs["quant_method"] = theirs["quant_method"].value
    written = bitsandbytes.config(scheme, MODULES, ["lm_head"])
    assert written == theirs
    assert bitsandbytes.parse(theirs).scheme_of(MODULES[0]) == scheme


def test_what_a_config_leaves_out_is_transformers_default():
    layout = bitsandbytes.parse({"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert layout.scheme_of("q") == LLM_INT8
    assert layout.spares_head
    assert bitsandbytes.parse({"_load_in_8bit": True, "llm_int8_skip_modules": None}).spares_head


def test_a_threshold_of_zero_means_no_outliers():
    layout = bitsandbytes.parse({"load_in_8bit": True, "llm_int8_threshold": 0.0})
    assert layout.scheme_of("q") == Scheme("int8", None, "int8")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"load_in_8bit": False, "load_in_4bit": True}, "4-bit"),
        ({"load_in_4bit": True}, "4-bit"),
        ({"load_in_8bit": None}, "no int8"),
        ({"load_in_8bit": "true"}, "no int8"),
        ({"llm_int8_has_fp16_weight": True}, "no int8"),
        ({"llm_int8_threshold": "6"}, "'6'"),
        ({"llm_int8_threshold": True}, "True"),
        ({"llm_int8_threshold": -1.0}, "-1.0"),
        ({"llm_int8_threshold": float("nan")}, "nan"),
        ({"llm_int8_threshold": float("inf")}, "inf"),
        ({"llm_int8_threshold": None}, "None"),
        ({"llm_int8_skip_modules": "lm_head"}, "'lm_head'"),
        ({"llm_int8_skip_modules": [1]}, "[1]"),
        ({"llm_int8_skip_modules": ["("]}, "regular expression"),
    ],
)
def test_what_cannot_be_read_is_refused(change, says):
    with pytest.raises(CheckpointError) as error:
        bitsandbytes.parse(bitsandbytes.config(LLM_INT8, MODULES, ["lm_head"]) | change)
    assert says in str(error.value)
