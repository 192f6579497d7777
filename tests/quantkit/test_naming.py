"""Keys to parameters and back, held against what transformers itself loads and saves."""

from dataclasses import replace

import models
import pytest
from transformers import AutoModelForCausalLM

from quantkit import quantize
from quantkit.checkpoint import Hub, open_folder, open_model
from quantkit.errors import CheckpointError
from quantkit.naming import Names, float_layout, names_of
from quantkit.shards import ShardReader

CONVERTED = ["mixtral", "hrm_text", "deepseek_v3", "kimi_linear"]
"""Models whose tensors are merged or split while they are loaded."""

W = "model.layers.0.block_sparse_moe.experts"
EXPERTS = "model.layers.0.mlp.experts"


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not models.same(found[name], value)] == []


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "deepseek_v4", *CONVERTED])
def test_all_keys_make_what_from_pretrained_loads(tiny_folder, tiny_source, model_type):
    """DeepSeek 4 has a renaming of old names that would take a new name for one."""
    source = tiny_source(model_type)
    made = Names(source).parameters(source.weights.tensors, source.weights.get)
    assert_same(made, AutoModelForCausalLM.from_pretrained(tiny_folder(model_type)).state_dict())


@pytest.mark.parametrize("model_type", CONVERTED)
def test_the_models_are_converted_indeed(tiny_source, model_type):
    origins = Names(tiny_source(model_type)).origins
    assert any(origin.converted for origin in origins.values())


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", *CONVERTED])
def test_parameters_are_written_as_the_files_tensors(tiny_folder, tiny_source, model_type):
    """What `save_pretrained` writes is read with safetensors itself."""
    source = tiny_source(model_type)
    names = Names(source)
    loaded = AutoModelForCausalLM.from_pretrained(tiny_folder(model_type)).state_dict()
    assert_same(names.written(loaded), models.read_tensors(tiny_folder(model_type)))
    assert "_weight_conversions" not in vars(source.skeleton)


@pytest.mark.parametrize("model_type", CONVERTED)
def test_a_block_is_read_and_written_by_itself(tiny_folder, tiny_source, model_type):
    source = tiny_source(model_type)
    names, tensors = Names(source), models.read_tensors(tiny_folder(model_type))
    expected = AutoModelForCausalLM.from_pretrained(tiny_folder(model_type)).state_dict()
    keys = [key for key in tensors if ".layers.1." in key]
    made = names.parameters(keys, source.weights.get)
    assert_same(made, {name: value for name, value in expected.items() if ".layers.1." in name})
    assert_same(names.written(made), {key: tensors[key] for key in keys})


def test_names_without_the_prefix_and_back(model_folder):
    source = open_folder(model_folder("opt_short_names"), Hub())
    names = Names(source)
    made = names.parameters(source.weights.tensors, source.weights.get)
    expected = AutoModelForCausalLM.from_pretrained(model_folder("opt_short_names")).state_dict()
    del expected["lm_head.weight"]  # tied: the file has it once
    assert_same(made, expected)
    assert_same(names.written(made), models.read_tensors(model_folder("opt_short_names")))


def test_keys_that_the_model_does_not_use_make_nothing(model_folder):
    source = open_folder(model_folder("llama_unused"), Hub())
    names = Names(source)
    unused = {"left.over", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert {key for key, origin in names.origins.items() if origin.parameter is None} == unused
    assert names.parameters(unused, source.weights.get) == {}


def test_a_model_in_memory_has_the_names_of_its_checkpoint(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("mixtral"))
    source = open_model(model)
    names = Names(source)
    assert_same(names.parameters(source.weights.tensors, source.weights.get), model.state_dict())
    assert_same(names.written(model.state_dict()), models.read_tensors(tiny_folder("mixtral")))


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "hrm_text"])
def test_origins_are_planned_without_reading(tiny_source, model_type):
    """The first parameter of each key, and whether the key alone makes it."""
    source = tiny_source(model_type)
    source.weights.get = None  # type: ignore[method-assign]
    names = Names(source)
    assert names_of(source) == names.origins
    shapes = {name: tuple(p.shape) for name, p in source.skeleton.named_parameters()}
    for name, key in names.keys.items():
        assert source.weights.tensors[key].shape == shapes[name]


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", *CONVERTED])
def test_sources_are_what_makes_a_parameter(tiny_source, model_type):
    """With just its keys a parameter is made, and without one of them it isn't, or not as it is."""
    source = tiny_source(model_type)
    names = Names(source)
    sources = names.sources()
    everything = names.parameters(source.weights.tensors, source.weights.get)
    assert sources.keys() == everything.keys()
    for name, keys in sources.items():
        assert models.same(names.parameters(keys, source.weights.get)[name], everything[name])
        fewer = [key for key in source.weights.tensors if key != keys[0]]
        try:
            found = names.parameters(fewer, source.weights.get).get(name)
        except CheckpointError:
            continue
        assert found is None or found.shape != everything[name].shape


def test_sources_of_merged_and_of_split_tensors(tiny_source):
    sources = Names(tiny_source("mixtral")).sources()
    assert sorted(sources[f"{EXPERTS}.gate_up_proj"]) == [f"{W}.{e}.{w}.weight" for e in range(4) for w in ("w1", "w3")]
    assert sorted(sources[f"{EXPERTS}.down_proj"]) == [f"{W}.{e}.w2.weight" for e in range(4)]
    sources = Names(tiny_source("hrm_text")).sources()
    attention = "model.L_module.layers.0"
    for leaf in ("q_proj", "k_proj", "v_proj", "gate_proj"):
        assert sources[f"{attention}.self_attn.{leaf}.weight"] == (f"{attention}.attn.gqkv_proj.weight",)


def test_tensors_that_do_not_fit_are_refused(tiny_source):
    """An expert without its up projection: three matrices cannot lie beside four."""
    source = tiny_source("mixtral")
    names = Names(source)
    keys = [key for key in names.sources()[f"{EXPERTS}.gate_up_proj"] if key != f"{W}.2.w3.weight"]
    with pytest.raises(CheckpointError, match=rf"'{EXPERTS}.gate_up_proj' cannot be made of its tensors .*shard"):
        names.parameters(keys, source.weights.get)


class TestPieces:
    """Whether scales by row can be written: each key must hold whole rows."""

    def test_rows_that_lie_in_the_keys_as_they_are(self, tiny_source):
        names = Names(tiny_source("mixtral"))
        keys = names.sources()[f"{EXPERTS}.gate_up_proj"]
        assert names.pieces(f"{EXPERTS}.gate_up_proj", 2) == dict.fromkeys(keys, False)

    def test_in_features_before_out_features(self, tiny_source):
        """If K were axis 1 of down_proj the same tensors would hold K before N."""
        names = Names(tiny_source("mixtral"))
        keys = names.sources()[f"{EXPERTS}.down_proj"]
        assert names.pieces(f"{EXPERTS}.down_proj", 1) == dict.fromkeys(keys, True)
        assert names.pieces(f"{EXPERTS}.down_proj", 2) == dict.fromkeys(keys, False)

    def test_parts_of_rows_are_none(self, tiny_source):
        """Axis 1 of gate_up_proj is cut in two, axis 0 is taken apart."""
        names = Names(tiny_source("mixtral"))
        assert names.pieces(f"{EXPERTS}.gate_up_proj", 1) is None
        assert names.pieces(f"{EXPERTS}.gate_up_proj", 0) is None

    def test_a_tensor_that_several_parameters_share(self, tiny_source):
        block = "model.L_module.layers.0"
        names = Names(tiny_source("hrm_text"))
        assert names.pieces(f"{block}.self_attn.k_proj.weight", 1) == {f"{block}.attn.gqkv_proj.weight": False}

    def test_no_value_of_the_weights_is_read(self, tiny_source):
        source = tiny_source("mixtral")
        source.weights.get = None  # type: ignore[method-assign]
        assert Names(source).pieces(f"{EXPERTS}.down_proj", 2) is not None


@pytest.mark.parametrize(
    ("model_type", "step"), [("gpt2", "w8a8"), ("mixtral", "int8"), ("gpt_oss", "w8a8"), ("hrm_text", "fp8")]
)
def test_the_float_layout_of_a_compressed_checkpoint_is_the_sources(
    tiny_folder, tiny_source, tmp_path, model_type, step
):
    """Packed codes and experts that were taken apart name the float tensors that they came from, with their shapes."""
    quantize(tiny_folder(model_type), tmp_path / "out", steps=[step], progress=False)
    source = tiny_source(model_type)
    shapes, turned = float_layout(replace(source, weights=ShardReader(tmp_path / "out")))
    expected = {key: info.shape for key, info in source.weights.tensors.items()}
    assert {key: shapes.get(key) for key in expected} == expected
    in_x_out = {name for name, module in source.skeleton.named_modules() if type(module).__name__ == "Conv1D"}
    assert turned == {f"{name}.weight" for name in in_x_out}
