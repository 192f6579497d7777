import contextlib
import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import RecipeError
from quantkit.methods import METHODS, method_class
from quantkit.recipe import Recipe, Step, check_pattern, load_recipe, matches, recipe_names
from quantkit.scheme import Scheme

text_ = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
globs = text_.filter(lambda text: not text.startswith("re:"))
regexes = st.sampled_from(["re:.*", r"re:.*\.mlp\..*", "re:a|b", "re:[^x]+$"])


shares = st.floats(1e-3, 0.999).map("{:.6f}".format)
numbers = {
    "threshold": st.floats(1e-3, 1e3).map("{:.6f}".format),
    "alpha": st.floats(0, 1).map("{:.6f}".format),
    "dampening": shares,
    "pattern": shares.map("unstructured:{}".format),
    "shift": st.floats(-1000, 1000).map("{:.6f}".format) | shares.map("auto:{}".format),
    "target": shares,
}
QUANTIZERS = [name for name in METHODS if method_class(name).quantizes]


@st.composite
def steps(draw, names=tuple(METHODS)):
    """A step, with some of its parameters set to a choice or a number, that is none of the refused combinations."""
    name = draw(st.sampled_from(names))
    parameters = {}
    for parameter in draw(st.lists(st.sampled_from(method_class(name).parameters), unique=True)):
        values = st.sampled_from(parameter.choices)
        if parameter.name in numbers:
            values |= numbers[parameter.name]
        parameters[parameter.name] = draw(values)
    if "static" not in parameters.get("activation", "") + parameters.get("scheme", ""):
        parameters.pop("activation_range", None)
    if parameters.get("criterion", "sparsegpt") != "sparsegpt":
        parameters.pop("dampening", None)
    return Step(name, parameters)


@st.composite
def recipes(draw):
    patterns = st.lists(globs | regexes, max_size=3)
    whole = st.integers(min_value=-(2**63), max_value=2**63 - 1)
    chosen = draw(st.lists(st.sampled_from(["smoothquant", "sparse24"]), unique=True))
    transforms = [draw(steps((name,))) for name in chosen]
    quantizers = draw(st.lists(steps(QUANTIZERS), min_size=0 if transforms else 1, max_size=1))
    return Recipe.of([*transforms, *quantizers], draw(patterns), draw(patterns), draw(whole))


@given(steps())
def test_a_printed_step_parses_to_the_same_step(step):
    assert Step.parse(str(step)) == step
    assert set(step.parameters) == {parameter.name for parameter in method_class(step.name).parameters}


@given(steps())
def test_a_steps_defaults_are_the_first_choices(step):
    bare = Step.parse(step.name)
    assert bare.parameters == {p.name: p.choices[0] for p in method_class(step.name).parameters}


@given(recipes())
def test_recipes_survive_json(recipe):
    assert Recipe.from_dict(json.loads(recipe.to_json())) == recipe


@given(recipes())
def test_recipes_survive_toml(recipe):
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_recipes_survive_a_file(tmp_path, suffix):
    recipe = Recipe.of(["int8:group=128"], ["*.mlp.*", 're:"quoted"\t\x7f'], ["ü*"], 7)
    path = tmp_path / f"recipe.{suffix}"
    path.write_text(recipe.to_json() if suffix == "json" else recipe.to_toml(), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert load_recipe(str(path)) == recipe


def test_the_data_set_is_kept_in_json():
    recipe = Recipe((Step("w8a8"),), dataset={"name": "wikitext2", "split": "train"})
    assert Recipe.from_dict(json.loads(recipe.to_json())) == recipe


INT8, E4M3, E5M2 = "int8", "float8_e4m3fn", "float8_e5m2"
SCHEMES = {
    "w8a8": Scheme(INT8, None, INT8),
    "w8a8-mse": Scheme(INT8, None, INT8, "mse"),
    "w8a8-static": Scheme(INT8, None, INT8, activation="tensor-static"),
    "smoothquant-w8a8": Scheme(INT8, None, INT8),
    "smoothquant-auto-w8a8": Scheme(INT8, None, INT8),
    "llm-int8": Scheme(INT8, None, INT8, threshold=6.0),
    "int8": Scheme(INT8),
    "int8-g128": Scheme(INT8, 128),
    "int4": Scheme("int4", 128, weight_range="mse"),
    "int4-channel": Scheme("int4", weight_range="mse"),
    "fp8": Scheme(E4M3, None, E4M3),
    "fp8-static": Scheme(E4M3, None, E4M3, weight_granularity="tensor", activation="tensor-static"),
    "fp8-block": Scheme(E4M3, None, E4M3, weight_granularity="block", activation="group"),
    "fp8-weight-only": Scheme(E4M3),
    "fp8-e5m2": Scheme(E5M2, None, E5M2),
    "fp8-e5m2-weight-only": Scheme(E5M2),
}
OBSERVING = {"w8a8-static", "fp8-static", "smoothquant-w8a8", "smoothquant-auto-w8a8"}


def test_every_bundled_recipe_is_known_here():
    assert recipe_names() == sorted(SCHEMES)


@pytest.mark.parametrize("name", SCHEMES)
def test_bundled_recipes_give_their_scheme(name):
    recipe = load_recipe(name)
    assert recipe.scheme == SCHEMES[name]
    assert recipe.observes == (name in OBSERVING)
    alpha = {"smoothquant-w8a8": ["0.5"], "smoothquant-auto-w8a8": ["auto"]}
    assert [step.parameters["alpha"] for step in recipe.transforms] == alpha.get(name, [])
    assert (recipe.include, recipe.ignore, recipe.seed, recipe.dataset) == ((), (), 0, None)


def test_a_file_wins_over_no_bundled_name_of_the_same_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w8a8").write_text("steps = ['int8']", encoding="utf-8")
    assert load_recipe("w8a8").steps[0].name == "w8a8"
    assert load_recipe("./w8a8").steps[0].name == "int8"


BAD_STEPS = {
    "gptq": ("'gptq'", ", ".join(METHODS), "quantkit methods"),
    "": ("''", "w8a8"),
    "W8A8": ("'W8A8'", "w8a8"),
    "w8a8:": ("''", "key=value"),
    "w8a8:activation": ("'activation'", "key=value"),
    "w8a8:activation=": ("'activation='", "key=value"),
    "w8a8:=token": ("'=token'", "key=value"),
    "w8a8:activation=token,": ("''", "key=value"),
    "w8a8:group=128": ("'group'", "activation, weight_range"),
    "w8a8:activation=row": ("'row'", "activation=token|tensor|tensor-static"),
    "w8a8:activation_range=mse": ("'w8a8'", "activation_range=mse", "w8a8:activation=tensor-static"),
    "fp8:scheme=block,activation_range=percentile": ("'fp8'", "activation_range=percentile", "fp8:scheme=static"),
    "llm-int8:threshold=0": ("threshold='0'", "another positive number"),
    "llm-int8:threshold=-6": ("threshold='-6'", "threshold=6.0"),
    "smoothquant:alpha=1.5": ("alpha='1.5'", "0.5|auto, or a number from 0 to 1"),
    "smoothquant:alpha=Auto": ("alpha='Auto'", "auto"),
    "int8:group=64": ("'64'", "group=channel|128"),
    "int8:group=channel=x": ("'channel=x'", "group=channel|128"),
    "int8:group=128,group=128": ("'group'", "twice"),
    "fp8:dtype=e3m4": ("'e3m4'", "dtype=e4m3|e5m2"),
    "fp8 :dtype=e4m3": ("'fp8 '", "fp8"),
}


@pytest.mark.parametrize("text", BAD_STEPS)
def test_bad_steps_are_refused_with_value_expectation_and_remedy(text):
    with pytest.raises(RecipeError) as error:
        Step.parse(text)
    for word in BAD_STEPS[text]:
        assert word in str(error.value)


@given(st.text())
def test_any_text_is_a_step_or_a_recipe_error(text):
    with contextlib.suppress(RecipeError):
        step = Step.parse(text)
        assert Step.parse(str(step)) == step


def test_a_recipe_needs_a_step():
    with pytest.raises(RecipeError, match=r"at least one step.*-m STEP or --recipe"):
        Recipe(())


def test_two_quantizers_are_refused():
    with pytest.raises(RecipeError, match=r"w8a8 and int8.*one quantizer"):
        Recipe.of(["w8a8", "int8"])


def test_transforms_come_before_the_quantizer():
    recipe = Recipe.of(["smoothquant:alpha=0.75", "w8a8"])
    assert recipe.transforms == (Step("smoothquant", {"alpha": "0.75"}),)
    assert recipe.scheme == SCHEMES["w8a8"]
    assert recipe.observes
    with pytest.raises(RecipeError, match=r"smoothquant comes after w8a8.*-m smoothquant before -m w8a8"):
        Recipe.of(["w8a8", "smoothquant"])
    with pytest.raises(RecipeError, match="smoothquant comes after w8a8"):
        Recipe.of(["smoothquant", "w8a8", "smoothquant"])


def test_a_transform_is_given_once():
    with pytest.raises(RecipeError, match=r"smoothquant is given 2 times; give it once"):
        Recipe.of(["smoothquant", "smoothquant:alpha=auto", "w8a8"])


def test_a_transform_alone_is_a_recipe_without_a_scheme():
    recipe = Recipe.of(["smoothquant"])
    assert recipe.scheme is None
    assert recipe.observes


def test_a_quantizer_alone_has_no_transforms():
    assert Recipe.of(["w8a8"]).transforms == ()


BAD_PATTERNS = ["", "re:", "re:(", "re:[z-a]", "re:*", "re:(?P<n>a)(?P<n>b)", "re:a{99999999999999999999}"]


@pytest.mark.parametrize("pattern", BAD_PATTERNS)
@pytest.mark.parametrize("kind", ["include", "ignore"])
def test_bad_patterns_are_refused(pattern, kind):
    with pytest.raises(RecipeError, match="pattern"):
        Recipe.of(["w8a8"], **{kind: [pattern]})


@given(st.text())
def test_any_text_is_a_pattern_or_a_recipe_error(pattern):
    try:
        check_pattern(pattern)
    except RecipeError:
        return
    assert isinstance(matches(pattern, "model.layers.0.mlp.down_proj"), bool)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*.down_proj", "model.layers.0.mlp.down_proj", True),
        ("*.down_proj", "model.layers.0.mlp.down_project", False),
        ("model.layers.0", "model.layers.0.mlp.down_proj", True),
        ("*.mlp", "model.layers.0.mlp.down_proj", True),
        ("model.layers.1", "model.layers.11.mlp.down_proj", False),
        ("down_proj", "model.layers.0.mlp.down_proj", False),
        ("model.layers.?.mlp.*", "model.layers.1.mlp.up_proj", True),
        ("model.layers.?.mlp.*", "model.layers.11.mlp.up_proj", False),
        ("model.layers.[01].*", "model.layers.2.mlp", False),
        ("LM_HEAD", "lm_head", False),
        ("lm.head", "lm_head", False),
        ("re:lm.head", "lm_head", True),
        (r"re:model\.layers\.[01]\.", "model.layers.1.mlp.up_proj", True),
        (r"re:layers", "model.layers.1.mlp.up_proj", False),
        (r"re:.*up_proj$", "model.layers.1.mlp.up_proj", True),
        (r"re:.*up$", "model.layers.1.mlp.up_proj", False),
    ],
)
def test_patterns_are_globs_on_the_whole_name_or_regexes_from_its_start(pattern, name, expected):
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"step": ["w8a8"]}, ("'step'", "steps")),
        ({"steps": "w8a8"}, ("steps = 'w8a8'", "list of strings")),
        ({"steps": [1]}, ("steps = [1]", "list of strings")),
        ({"steps": ["w8a8"], "include": "x"}, ("include = 'x'", "list of strings")),
        ({"steps": ["w8a8"], "ignore": None}, ("ignore = None", "list of strings")),
        ({"steps": ["w8a8"], "seed": "1"}, ("seed = '1'", "whole number")),
        ({"steps": ["w8a8"], "seed": True}, ("seed = True", "whole number")),
        ({"steps": ["w8a8"], "seed": 1.5}, ("seed = 1.5", "whole number")),
        ({"steps": ["w8a8"], "dataset": "wikitext2"}, ("dataset = 'wikitext2'", "table")),
        ({"steps": []}, ("at least one step",)),
        ({}, ("at least one step",)),
    ],
)
def test_bad_recipe_values_are_refused(values, words):
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict(values)
    for word in words:
        assert word in str(error.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(["steps", "include", "ignore", "seed", "dataset", "description"], json_values)
    )
)
def test_any_json_is_a_recipe_or_a_recipe_error(values):
    try:
        recipe = Recipe.from_dict(values)
    except RecipeError:
        return
    recipe.to_json()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.toml", b"steps = ["),
        ("a.json", b"{"),
        ("a.json", b"[" * 100_000),
        ("a.json", b"[]"),
        ("a.json", b'"w8a8"'),
        ("a.toml", b"\xff\xfe"),
        ("a.toml", b"steps = ['nothing']"),
        ("a.toml", b"steps = ['w8a8']\ndataset = 2024-01-01"),
    ],
)
def test_damaged_recipe_files_are_refused_by_name(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["w8a9", "", "/nowhere/x.toml", "x" * 5000, "a\0b"])
def test_unknown_recipes_are_refused_with_the_names_there_are(name):
    with pytest.raises(RecipeError) as error:
        load_recipe(name)
    assert "w8a8-mse" in str(error.value)


def test_recipes_are_frozen():
    recipe = Recipe.of(["w8a8"])
    with pytest.raises(AttributeError):
        recipe.seed = 1
