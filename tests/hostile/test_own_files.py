"""quantkit's own files that are read back, and its own format: written by us, and by whoever else had the folder."""

import json

import hostile
import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import load
from quantkit.benchmark import _recorded_baseline
from quantkit.checkpoint import Hub
from quantkit.errors import CheckpointError, QuantkitError, RecipeError
from quantkit.evaluation import _refuse_calibration_data
from quantkit.inspection import inspect_checkpoint
from quantkit.recipe import load_recipe
from quantkit.texts.rows import Texts

NOT_JSON = [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"9" * 5000, b'{"a": 1, "a": 2}', b"null", b"[]", b"5"]
TEXTS = Texts("x", "text", "sha256:0", documents=("a",))


@pytest.fixture
def folder(compressed, tmp_path):
    return models.copy(compressed("w8a8"), tmp_path / "model")


@pytest.mark.parametrize("text", NOT_JSON)
def test_a_recipe_that_is_none_is_refused_or_unused(folder, text):
    path = folder / "quantkit_recipe.json"
    path.write_bytes(text)
    hostile.answer(lambda: _refuse_calibration_data(folder, Hub(), TEXTS))
    assert isinstance(hostile.answer(lambda: load_recipe(path)), RecipeError)


def test_every_place_of_a_recipe_may_hold_anything(folder):
    path = folder / "quantkit_recipe.json"
    right = json.loads(path.read_bytes()) | {"dataset": {"name": "x", "fingerprint": "sha256:1", "windows": 8}}

    def read(values):
        path.write_bytes(hostile.dumped(values))
        hostile.answer(lambda: load_recipe(path))
        _refuse_calibration_data(folder, Hub(), TEXTS)

    hostile.all_answers(right, read)


@pytest.mark.parametrize("text", NOT_JSON)
def test_a_report_that_is_none_is_refused_or_unused(folder, text):
    (folder / "quantkit_report.json").write_bytes(text)
    hostile.answer(lambda: _recorded_baseline(folder))


@pytest.mark.parametrize("model", [*hostile.ODD, "..", ".", "../model", "/"])
def test_a_report_may_name_any_model(folder, model):
    (folder / "quantkit_report.json").write_bytes(hostile.dumped({"model": model}))
    found = hostile.answer(lambda: _recorded_baseline(folder))
    assert isinstance(found, QuantkitError) or found[0] is None


# The native format, from the files to a model


@pytest.fixture(scope="module")
def native(compressed, tmp_path_factory):
    """Copies of a checkpoint in quantkit's own format, to be changed."""
    made = iter(range(10**6))
    base = tmp_path_factory.mktemp("native")
    return lambda: models.copy(compressed("w8a8", form="quantkit"), base / str(next(made)))


def reads(folder):
    """What reads a checkpoint: what they found, or said."""
    return [hostile.answer(call, seconds=20) for call in (lambda: load(folder), lambda: inspect_checkpoint(folder))]


def test_a_native_checkpoint_is_read(native):
    loaded, found = reads(native())
    assert loaded.config.quantization_config is not None
    assert found.problems == []


def few_changes(config):
    """Changed configs, one of each kind of value at each place, as opening a model takes a while."""
    odd = [None, True, -1, 10**30, float("nan"), "\x1b[31m", [], {}, ["re:(a|a)*$"], 2**63]
    return [value for number, value in enumerate(hostile.changed(config, odd)) if number % 9 == 0]


def test_every_place_of_a_native_config_may_hold_anything(native):
    folder = native()
    config = json.loads((folder / "config.json").read_bytes())
    stored = config["quantization_config"]
    stored["groups"][0]["modules"] = stored["groups"][0]["modules"][:2]  # few places
    for value in few_changes(stored):
        models.change_config(folder, quantization_config=value)
        reads(folder)


SHAPES = [(), (0,), (1,), (128,), (128, 1), (128, 32), (32, 128), (2, 2, 2)]
DTYPES = [torch.int8, torch.int32, torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.float8_e8m0fnu]


@settings(max_examples=25, deadline=None)
@given(
    leaf=st.sampled_from(["weight", "weight_scale"]),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    gone=st.booleans(),
)
def test_every_tensor_of_a_native_checkpoint_may_be_another(native, leaf, shape, dtype, gone):
    folder, key = native(), f"model.layers.0.self_attn.q_proj.{leaf}"

    def change(tensors):
        rest = {name: tensor for name, tensor in tensors.items() if name != key}
        return (
            rest
            if gone
            else rest
            | {
                key: torch.ones(shape, dtype=torch.float32).to(dtype)
                if dtype != torch.float8_e8m0fnu
                else torch.ones(shape, dtype=torch.uint8).view(dtype)
            }
        )

    models.change_tensors(folder, change)
    reads(folder)


@pytest.mark.parametrize("columns", [[-1, 3], [3, 3], [5, 3], [0, 10**9], [2**31 - 1, -(2**31)]])
def test_numbers_of_columns_that_are_none_are_refused(compressed, tmp_path, columns):
    """LLM.int8's columns in float, of which the files say where they go."""
    from quantkit import quantize

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 200, encoding="utf-8")
    source = models.save(models.llama_model(), tmp_path / "source")
    step = "llm-int8:threshold=0.5,outlier_weight=float"
    quantize(source, tmp_path / "out", steps=[step], dataset=str(text), samples=2, seq_len=32, progress=False)

    def change(tensors):
        key = next(name for name in tensors if name.endswith("outlier_columns") and tensors[name].numel() >= 2)
        changed = tensors[key].clone()
        changed[:2] = torch.tensor(columns, dtype=changed.dtype)
        return tensors | {key: changed}

    models.change_tensors(tmp_path / "out", change)
    assert inspect_checkpoint(tmp_path / "out").problems
    with pytest.raises(CheckpointError, match="ascending order"):
        load(tmp_path / "out")
