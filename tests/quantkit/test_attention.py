"""quantkit's attention on a CPU, held against float64 and against transformers' own, and who gets it."""

import math
from types import SimpleNamespace

import models
import pytest
import torch
import transformers
from transformers import AttentionInterface

import quantkit
from quantkit import attention
from quantkit.benchmark import benchmark
from quantkit.cli.bench import table
from quantkit.errors import QuantkitError

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""The relative error of one rounding to nearest."""
DTYPES = list(UNIT)
HEADS = [(4, 4), (4, 2), (6, 1)]


def made(heads, kept, queries, keys, dtype, *, batch=2, size=16, seed=0):
    """Query, key and value, as transformers hands them over: views, the heads behind the tokens in memory."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, queries, heads, size), (batch, keys, kept, size), (batch, keys, kept, size)]
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def bound(query, key, value, mask, scale, dtype):
    """The exact output [B, M, H, D], and how far from it one in the dtype may lie.

    With u = 2**-24, D numbers a head and L keys. A score, a sum of D products that is scaled, is off by at most
    (D + 2) * u * |q| . |k| * scale (Higham 2002, section 3.1), which changes its exponential by that factor; exp itself
    and the sum of L of them, and the division, by (L + 8) * u. Weights may be rounded to the dtype once (U), and their
    sum with values has L more steps in float32; the result is rounded to the dtype once. All of it relative to the sum
    of weights times |value|, the factor of the scores counted twice, for numerator and denominator.
    """
    groups, unit, u = query.shape[1] // key.shape[1], UNIT[dtype], 2.0**-24
    q = query.double()
    k, v = (each.double().repeat_interleave(groups, dim=1) for each in (key, value))
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool) if mask is None else mask
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill_(~seen, -math.inf)
    weights = (q @ k.mT * scale + added).softmax(-1)
    exact, magnitude = weights @ v, weights @ v.abs()
    of_scores = (q.abs() @ k.abs().mT).amax() * scale * (q.shape[3] + 2) * u
    limit = magnitude * (2 * of_scores + (2 * k.shape[2] + 8) * u + unit + unit) * 1.01
    return exact.transpose(1, 2), limit.transpose(1, 2)


def refuse(*args, **words):
    raise AssertionError("transformers' own function was called")


def call(module_groups, tensors, mask=None, plain=refuse, **words):
    module = SimpleNamespace(num_key_value_groups=module_groups, is_causal=True)
    return attention.on_a_cpu(plain)(module, *tensors, mask, **words)[0]


def assert_within(found, exact, limit):
    assert ((found.double() - exact).abs() <= limit).all(), ((found.double() - exact).abs() / limit).max()


# One query


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kept"), HEADS)
@pytest.mark.parametrize("keys", [1, 7, 300])
def test_one_query_is_within_the_bound(dtype, heads, kept, keys):
    tensors = made(heads, kept, 1, keys, dtype)
    found = call(heads // kept, tensors, scaling=0.3)
    assert found.shape == (2, 1, heads, 16)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert_within(found, *bound(*tensors, None, 0.3, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kept"), HEADS)
@pytest.mark.parametrize("kind", ["padding", "a window", "a mask a head", "added"])
def test_one_query_with_a_mask_sees_what_the_mask_says(dtype, heads, kept, kind):
    tensors = made(heads, kept, 1, 40, dtype)
    seen = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    if kind == "padding":
        seen[1, :, :, :13] = False
    elif kind == "a window":
        seen[:, :, :, :-8] = False
    else:
        seen = torch.rand(2, heads, 1, 40, generator=torch.Generator().manual_seed(1)) < 0.5
        seen[..., -1] = True
    mask = seen if kind != "added" else torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)
    assert_within(call(heads // kept, tensors, mask), *bound(*tensors, seen, 0.25, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [1, 2 * 40 * 16 * 3, 1 << 19])
def test_heads_in_parts_give_the_same_bits(monkeypatch, dtype, limit):
    tensors = made(8, 8, 1, 40, dtype)
    mask = torch.rand(2, 8, 1, 40, generator=torch.Generator().manual_seed(1)) < 0.5
    whole = call(1, tensors, mask)
    monkeypatch.setattr(attention, "_AT_ONCE", limit)
    assert torch.equal(call(1, tensors, mask), whole)


# A prompt


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kept"), HEADS)
@pytest.mark.parametrize("queries", [65, 128, 200])
def test_a_prompt_in_parts_is_within_the_bound(dtype, heads, kept, queries):
    tensors = made(heads, kept, queries, queries, dtype)
    found = call(heads // kept, tensors, scaling=0.3)
    causal = torch.ones(queries, queries, dtype=torch.bool).tril()
    assert found.shape == (2, queries, heads, 16)
    assert_within(found, *bound(*tensors, causal, 0.3, dtype))


def test_keys_beyond_the_prompt_are_not_seen():
    """A static cache hands over more keys than there are tokens yet."""
    query, key, value = made(4, 2, 100, 130, torch.float32)
    found = call(2, (query, key, value))
    assert torch.equal(found, call(2, (query, key[:, :, :100], value[:, :, :100])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_transformers_own_but_for_rounding(dtype):
    """With two windows of the bound, one around each; the mutual distance says that masks and scales mean the same."""
    theirs = AttentionInterface()["sdpa"]
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    for queries, keys in ((1, 150), (150, 150), (90, 150)):
        tensors = made(4, 2, queries, keys, dtype)
        seen = torch.ones(queries, keys, dtype=torch.bool)
        if queries > 1:
            seen = seen.tril()
        _, limit = bound(*tensors, seen, 0.25, dtype)
        ours = call(2, tensors, scaling=None)
        other = theirs(module, *tensors, None)[0]
        assert ((ours.double() - other.double()).abs() <= 2 * limit).all()


# What is left to transformers


@pytest.mark.parametrize(
    ("words", "queries", "mask"),
    [
        ({"dropout": 0.1}, 1, False),
        ({"softcap": 30.0}, 1, False),
        ({"position_bias": torch.zeros(1)}, 1, False),
        ({"cache": object()}, 1, False),
        ({"s_aux": torch.zeros(4)}, 1, False),
        ({"is_causal": False}, 100, False),
        ({}, 100, True),
        ({}, 40, False),
        ({}, 1200, False),
    ],
)
def test_all_else_is_handed_on_as_it_came(words, queries, mask):
    tensors = made(4, 2, queries, queries, torch.bfloat16)
    given_mask = torch.ones(2, 1, queries, queries, dtype=torch.bool).tril() if mask else None
    seen = []

    def plain(module, *args, **rest):
        seen.append((args, rest))
        return tensors[0], None

    call(2, tensors, given_mask, plain, scaling=0.5, **words)
    [(args, rest)] = seen
    assert all(one is other for one, other in zip(args, (*tensors, given_mask), strict=True))
    assert rest == {"dropout": 0.0, "scaling": 0.5, "is_causal": None} | words


def test_gradients_and_unequal_heads_are_left_to_transformers():
    tensors = made(4, 2, 1, 40, torch.float32)
    called = []

    def plain(*args, **words):
        called.append(args)
        return tensors[0], None

    call(1, tensors, None, plain)
    call(2, (tensors[0].requires_grad_(), *tensors[1:]), None, plain)
    assert len(called) == 2
    with torch.no_grad():
        call(2, tensors)


def test_few_heads_for_many_threads_stay_whole(monkeypatch):
    tensors, called = made(4, 2, 100, 100, torch.float32), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    call(2, tensors, None, lambda *args, **words: called.append(args) or (tensors[0], None))
    assert called


# Who gets it


def test_a_loaded_model_has_it_and_says_so(compressed, model_folder):
    for folder in (compressed("w8a8", "llama"), model_folder("llama")):
        assert quantkit.load(folder).config._attn_implementation == "quantkit"
        assert quantkit.load(folder, attention="transformers").config._attn_implementation == "sdpa"
    with pytest.raises(QuantkitError, match="attention 'flash' is unknown; use one of auto, transformers"):
        quantkit.load(model_folder("llama"), attention="flash")


def test_it_is_not_saved(model_folder, tmp_path):
    quantkit.load(model_folder("llama")).save_pretrained(tmp_path / "again")
    assert "quantkit" not in (tmp_path / "again" / "config.json").read_text()


def test_a_float_model_is_transformers_but_for_rounding(model_folder):
    """A padded batch, a prompt of more than one part, and steps after it; in float32, errors of some 2**-24 a layer."""
    ours, theirs = (quantkit.load(model_folder("llama"), attention=word) for word in attention.CHOICES)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, models.VOCABULARY, (2, 150), generator=generator)
    padded = torch.ones_like(ids)
    padded[1, :20] = 0
    for mask in (None, padded):
        with torch.no_grad():
            logits = [
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids) if mask is None else mask,
                    max_new_tokens=4,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                    output_logits=True,
                    return_dict_in_generate=True,
                ).logits
                for model in (ours, theirs)
            ]
        for one, other in zip(*logits, strict=True):
            assert (one - other).abs().max() <= 2**-16 * other.abs().max()


def test_a_window_that_slides_is_kept(tmp_path):
    words = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MistralConfig(**words, num_key_value_heads=2, vocab_size=64, sliding_window=16)
    torch.manual_seed(0)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    ours, theirs = (quantkit.load(tmp_path, attention=word) for word in attention.CHOICES)
    assert ours.config._attn_implementation == "quantkit"
    ids = torch.arange(90)[None] % 64
    with torch.no_grad():
        one, other = ours(ids, use_cache=True), theirs(ids, use_cache=True)
        assert (one.logits - other.logits).abs().max() <= 2**-16 * other.logits.abs().max()
        one, other = (
            model(ids[:, :1], past_key_values=found.past_key_values) for model, found in ((ours, one), (theirs, other))
        )
    assert (one.logits - other.logits).abs().max() <= 2**-16 * other.logits.abs().max()


@pytest.mark.parametrize(
    ("source", "asks"),
    [
        ("x = 1", False),
        ("def f(config, kind='sdpa'): return kind", False),
        ("def f(config, *, kind: str = 'sdpa'): return kind", False),
        ("class A:\n  '''Runs sdpa.'''", False),
        ("if config._attn_implementation == 'sdpa': pass", True),
        ("if config._attn_implementation in ('eager', 'sdpa'): pass", True),
        ("KINDS = {'sdpa': 1}", True),
    ],
)
def test_code_that_asks_for_the_name_is_known(source, asks):
    assert attention.names_sdpa(source) == asks


def test_a_model_whose_code_asks_for_the_name_keeps_it(tmp_path):
    """Falcon's adds its mask in another place where the attention is sdpa."""
    words = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    transformers.FalconForCausalLM(transformers.FalconConfig(**words)).save_pretrained(tmp_path)
    assert quantkit.load(tmp_path).config._attn_implementation == "sdpa"


def test_bench_measures_the_baseline_as_transformers_runs_it(compressed, model_folder):
    words = {"prompt_tokens": 8, "new_tokens": 2, "runs": 1, "device": "cpu", "progress": False}
    result = benchmark(compressed("w8a8", "llama"), model_folder("llama"), baseline_dtype="float32", **words)
    assert [each["attention"] for each in result["models"]] == ["quantkit", "sdpa"]
    assert "attention quantkit, dynamic cache; baseline: attention sdpa" in table(result)
    with pytest.raises(QuantkitError, match="attention is 'flash': expected one of auto, transformers"):
        benchmark(compressed("w8a8", "llama"), attention="flash", **words)
