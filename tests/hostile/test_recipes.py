"""Steps, recipes and patterns from anywhere: an answer, or one sentence; and a regex ends."""

import time

import hostile
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import untrusted
from quantkit.errors import QuantkitError, RecipeError
from quantkit.methods import METHODS
from quantkit.recipe import LARGEST_RECIPE, Recipe, Step, load_recipe, matches
from quantkit.untrusted import fits, regex_trouble

RECIPE = {
    "steps": ["smoothquant:alpha=0.5", "w8a8"],
    "include": ["*.mlp.*"],
    "ignore": ["re:.*head"],
    "seed": 0,
    "dataset": {"name": "x", "fingerprint": "sha256:0"},
    "description": "d",
}
HEX = b"0x" + b"f" * 10_000  # TOML's, a number too long for Python to write in decimal


def used(values):
    """What a run does with a recipe."""
    recipe = Recipe.from_dict(values)
    recipe.to_json()
    recipe.to_toml()
    torch.Generator().manual_seed(recipe.seed)
    return recipe.scheme


def from_file(path, text):
    path.write_bytes(text)
    return hostile.answer(lambda: load_recipe(path))


step_texts = st.builds(
    "{}:{}={}".format,
    st.sampled_from(list(METHODS)) | hostile.texts,
    st.sampled_from(["alpha", "threshold", "group", "dtype", "activation"]) | hostile.texts,
    hostile.texts | st.sampled_from(["0.5", "1e999", "1e-999", "9" * 400, "٣", "-0", "inf", "nan"]),
)


@settings(max_examples=200, deadline=None)
@given(text=step_texts | hostile.texts)
def test_any_text_is_a_step_or_is_refused(text):
    step = hostile.answer(lambda: Step.parse(text))
    if not isinstance(step, QuantkitError):
        assert Step.parse(str(step)) == step


def test_every_place_of_a_recipe_may_hold_anything():
    objects = [value for value in hostile.changed(RECIPE) if isinstance(value, dict)]
    answers = [hostile.answer(lambda value=value: used(value)) for value in objects]
    assert 20 < sum(not isinstance(answer, QuantkitError) for answer in answers) < len(answers) - 100


@settings(max_examples=100, deadline=None)
@given(values=hostile.near(RECIPE))
def test_a_recipe_near_a_right_one_is_read_or_refused(tmp_path_factory, values):
    from_file(tmp_path_factory.mktemp("recipe") / "r.json", hostile.dumped(values))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**400])
def test_a_seed_that_torch_does_not_take_is_refused(seed):
    with pytest.raises(RecipeError, match="64 bits"):
        Recipe.of(["w8a8"], seed=seed)


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63), 0])
def test_every_seed_that_torch_takes_is_taken(seed):
    torch.Generator().manual_seed(Recipe.of(["w8a8"], seed=seed).seed)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b"a=" + b"[" * 100_000,
        b"steps=" + HEX,
        b'steps=["w8a8"]\nseed=' + HEX,
        b'steps=["w8a8"]\ndataset={a=' + HEX + b"}",
        b"steps=1979-05-27",
        b"\xff\xfe",
        b"",
        b"\0",
    ],
)
@pytest.mark.parametrize("ending", [".toml", ".json"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, ending):
    assert isinstance(from_file(tmp_path / f"r{ending}", text), RecipeError)


def test_a_file_that_is_far_too_large_is_not_read(tmp_path):
    path = tmp_path / "r.toml"
    with path.open("wb") as file:
        file.truncate(10**12)  # takes no room on disk
    with pytest.raises(RecipeError, match=f"{LARGEST_RECIPE:,}"):
        load_recipe(path)


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=60))
def test_any_bytes_are_a_recipe_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("recipe")
    for ending in (".toml", ".json"):
        from_file(folder / f"r{ending}", data)


@pytest.mark.parametrize("name", hostile.ODD_TEXT)
def test_a_name_of_no_recipe_is_refused(name):
    assert isinstance(hostile.answer(lambda: load_recipe(name)), RecipeError)


# Regexes


@pytest.mark.parametrize(
    "pattern",
    ["(a|a)*$", "(a|aa)*(a|a)*[^a]$", r"(x)\1*" * 50 + "y", "(a?){60}a{60}b", ".*.*.*.*.*.*.*.*x", "(a+)+$", "(.*)*x"],
)
def test_a_regex_ends(pattern, monkeypatch):
    """Python's own matcher takes longer than the universe on several of these."""
    monkeypatch.setattr(untrusted, "REGEX_SECONDS", 0.2)
    untrusted._timed.cache_clear()
    started = time.perf_counter()
    for name in ("a" * 500 + "b", "x" * 300):
        hostile.answer(lambda name=name: matches(f"re:{pattern}", name))
    assert time.perf_counter() - started < 3


def test_a_regex_has_its_seconds_for_all_names_together(monkeypatch):
    monkeypatch.setattr(untrusted, "REGEX_SECONDS", 0.2)
    untrusted._timed.cache_clear()
    started = time.perf_counter()
    names = ["a" * (length % 14) + "b" for length in range(10_000)]
    with pytest.raises(QuantkitError, match="takes more than"):
        [fits("(a|a)*$", name) for name in names]
    assert time.perf_counter() - started < 3


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:(?:(?:a{1000}){1000}){1000}){1000}",
        "a{2147483647}",
        "a{99999999999999999999}",
        "(?=(a{100}){99})b",
        "(" * 4000 + ")" * 4000,
        "x" * 20_000,
        "(?:foo){e<=2}",
        "(",
        "(?R)",
    ],
)
def test_a_regex_that_only_its_compiler_would_suffer_from_is_refused(pattern):
    before = hostile.peak_bytes()
    assert regex_trouble(pattern) is not None
    assert hostile.peak_bytes() - before < 200 * 2**20
    with pytest.raises(QuantkitError):
        fits(pattern, "a")


def test_usual_regexes_fit_as_in_python():
    import re

    names = [
        "model.layers.0.mlp.down_proj",
        "lm_head",
        "model.layers.11.self_attn.q_proj",
        "a.mlp.experts.3.up_proj",
        "",
    ]
    for pattern in (
        ".*head",
        r"model\.layers\.[0-9]+\.mlp",
        r".*layers\.1\d\..*(q|k|v)_proj$",
        "^(?!.*experts).*$",
        r"(?i)LM_.*",
        r".*experts\.\d{1,3}\.",
        "(?:model|a)(?<=\\w)\\.",
        "[[]|l",
        r"a\{0\}|lm",
        "",
    ):
        assert [fits(pattern, name) for name in names] == [re.match(pattern, name) is not None for name in names]
