"""What config.json says of compression, with anything in any place: a layout and a plan, or one sentence."""

import json
import math
import tracemalloc
from pathlib import Path

import hostile
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import formats
from quantkit.checkpoint import compressed_as, read_config
from quantkit.dequantization import dequantized
from quantkit.errors import CheckpointError, QuantkitError, RecipeError
from quantkit.scheme import Scheme
from quantkit.servers import of_recipe
from quantkit.shards import TensorInfo
from quantkit.untrusted import LARGEST_JSON

WEIGHT = torch.ones(8, 32, dtype=torch.int8)
WORDS = torch.ones(8, 8, dtype=torch.int32)
ROWS = torch.ones(8, 1)
STATE = {"shape": [8, 32], "blocksize": 64, "dtype": "float32", "quant_type": "nf4"}
NESTED = {**STATE, "nested_blocksize": 256, "nested_offset": 0.5}


class Tensors:
    """A checkpoint in memory."""

    nbytes = 0

    def __init__(self, tensors):
        self._all = tensors
        self.tensors = {name: TensorInfo(Path("x"), tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def get(self, name):
        return self._all[name]


def state_bytes(state):
    return torch.tensor(list(hostile.dumped(state)), dtype=torch.uint8)


def four_bits(state, nested):
    made = {
        "m.a.weight": torch.zeros(128, 1, dtype=torch.uint8),
        "m.a.weight.absmax": torch.zeros(4, dtype=torch.uint8) if nested else torch.ones(4),
        "m.a.weight.quant_map": torch.ones(16),
        "m.a.weight.quant_state.bitsandbytes__nf4": state_bytes(state),
    }
    more = {"m.a.weight.nested_absmax": torch.ones(1), "m.a.weight.nested_quant_map": torch.ones(256)}
    return made | more if nested else made


STORED = {
    "compressed-tensors": {
        "m.a.weight": WEIGHT,
        "m.a.weight_scale": ROWS,
        "m.a.weight_zero_point": ROWS.to(torch.int8),
        "m.a.weight_g_idx": torch.zeros(32, dtype=torch.int32),
    },
    "packed": {
        "m.a.weight_packed": torch.ones(8, 4, dtype=torch.int32),
        "m.a.weight_scale": ROWS,
        "m.a.weight_shape": torch.tensor([8, 32]),
        "m.a.weight_zero_point": torch.ones(1, 1, dtype=torch.int32),
    },
    "blocks": {"m.a.weight": WEIGHT, "m.a.weight_scale": torch.ones(2, 2)},
    "bitsandbytes": {
        "m.a.weight": WEIGHT,
        "m.a.SCB": torch.ones(8),
        "m.a.weight_format": torch.zeros((), dtype=torch.uint8),
    },
    "native": {"m.a.weight": WORDS, "m.a.weight_scale": ROWS},
    "native-columns": {
        "m.a.weight": WORDS,
        "m.a.weight_scale": ROWS,
        "m.a.outlier_columns": torch.tensor([1, 2], dtype=torch.int32),
        "m.a.outlier_weight": torch.ones(8, 2),
    },
    "fp8": {"m.a.weight": torch.ones(8, 32).to(torch.float8_e4m3fn), "m.a.weight_scale_inv": torch.ones(1, 1)},
    "mxfp4": {
        "e.x_blocks": torch.ones(2, 8, 1, 16, dtype=torch.uint8),
        "e.x_scales": torch.ones(2, 8, 1, dtype=torch.uint8),
    },
    "nf4": four_bits(STATE, nested=False),
    "nf4-nested": four_bits(NESTED, nested=True),
}
FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
CONFIGS = {**hostile.CONFIGS, "mxfp4": {"quant_method": "mxfp4"}, "nf4": FOUR_BITS, "nf4-nested": FOUR_BITS}


def parsed(config):
    """What a loader does with a config before it has a model."""
    form = formats.of_config(config, "X")
    layout = form.parse(config)
    for group in layout.groups:
        form.tensor_specs(group.scheme, 64, 64, torch.float32)
        str(group.scheme.label), group.scheme.bits, group.scheme.to_dict()
    return layout.scheme_of("m.a" + "a" * 40)


def decoded(config, tensors, name="m.a.weight"):
    """What --dequantize does with a checkpoint: every tensor."""
    view, _ = dequantized(
        Tensors(tensors), {"quantization_config": config, "dtype": "float32"}, "X", shapes={name: (8, 32)}
    )
    for key in view.tensors:
        view.get(key)
    return view


@pytest.mark.parametrize("kind", ["compressed-tensors", "packed", "blocks", "bitsandbytes", "native", "native-columns"])
def test_every_place_of_a_config_may_hold_anything(kind):
    config = hostile.CONFIGS[kind]
    if kind != "blocks":
        parsed(config)
    hostile.all_answers(config, parsed)
    hostile.all_answers(config, lambda value: of_recipe(value, {}, "X") if isinstance(value, dict) else None)
    hostile.all_answers(config, lambda value: compressed_as({"quantization_config": value}))


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_every_place_of_a_config_may_hold_anything_when_it_is_dequantized(kind):
    if kind not in ("packed", "compressed-tensors"):  # whose zero points make them asymmetric
        decoded(CONFIGS[kind], STORED[kind])
    hostile.all_answers(CONFIGS[kind], lambda value: decoded(value, STORED[kind]))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(list(hostile.CONFIGS)))
def test_a_config_near_a_right_one_is_read_or_refused(data, kind):
    config = data.draw(hostile.near(hostile.CONFIGS[kind]))
    hostile.answer(lambda: parsed(config))
    hostile.answer(lambda: decoded(config, STORED[kind]))


@pytest.mark.parametrize("nested", [False, True])
def test_every_place_of_a_quant_state_may_hold_anything(nested):
    before = hostile.peak_bytes()
    hostile.all_answers(NESTED if nested else STATE, lambda state: decoded(FOUR_BITS, four_bits(state, nested)))
    assert hostile.peak_bytes() - before < 500 * 2**20


@pytest.mark.parametrize("block", [2**31, 2**31 - 2, 2**30])
def test_a_large_block_takes_no_memory(block):
    """A checkpoint of two bytes that says one number is shared by gigabytes of others."""
    tensors = four_bits({**STATE, "blocksize": block}, nested=False) | {"m.a.weight.absmax": torch.ones(1)}
    nested = four_bits({**NESTED, "nested_blocksize": block}, nested=True)
    before = hostile.peak_bytes()
    assert torch.equal(decoded(FOUR_BITS, tensors).get("m.a.weight"), torch.ones(8, 32))
    assert torch.equal(decoded(FOUR_BITS, nested).get("m.a.weight"), torch.full((8, 32), 1.5))
    assert hostile.peak_bytes() - before < 200 * 2**20


DTYPES = [
    *(torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.uint64, torch.float64, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.complex64, torch.float32),
]
SHAPES = [(), (0,), (1,), (8,), (8, 1), (1, 8), (8, 32), (2, 2), (8, 0), (1, 1), (8, 4), (2, 8, 32), (1, 1, 1)]


def filled(shape, dtype, byte):
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.full((size,), byte, dtype=torch.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("kind", list(STORED))
def test_every_tensor_may_have_any_shape_dtype_and_bytes(kind):
    """As many values as there are expected, or others, of all ones or of bytes that are no numbers."""
    for name, tensor in STORED[kind].items():
        for shape in {tuple(tensor.shape), *SHAPES}:
            for dtype in {tensor.dtype, *DTYPES}:
                for byte in (1, 255):
                    other = filled(shape, dtype, byte)
                    try:
                        hostile.answer(
                            lambda other=other, name=name: decoded(CONFIGS[kind], STORED[kind] | {name: other})
                        )
                    except BaseException as error:
                        error.add_note(f"{name} of {shape} {dtype} {byte}")
                        raise


@pytest.mark.parametrize("name", [*hostile.ODD_TEXT, "experts.0.up", "experts." + "9" * 5000 + ".up", "experts.٣.up"])
@pytest.mark.parametrize("kind", ["compressed-tensors", "bitsandbytes", "native"])
def test_a_module_may_have_any_name(kind, name):
    config = json.loads(json.dumps(CONFIGS[kind]))
    if kind == "native":
        config["groups"][0]["modules"] = ["experts.up", "m.a"]
    tensors = {key.replace("m.a", name): value for key, value in STORED[kind].items()}
    hostile.answer(lambda: decoded(config, tensors, "another.weight"))


@pytest.mark.parametrize("written", ["9" * 5000 + "x4", "4x" + "9" * 5000, "²x4", "٤x16", "4x16x", "x", "-4x16"])
def test_blocks_that_are_none_are_refused(written):
    config = json.loads(json.dumps(hostile.BLOCKS))
    config["config_groups"]["group_0"]["weights"]["block_structure"] = written
    with pytest.raises(CheckpointError):
        decoded(config, STORED["blocks"])
    assert of_recipe(config, {}, "X")


@pytest.mark.parametrize("version", [True, 1.0, "1", 0, 6, 10**30, None, [1]])
def test_a_version_is_one_of_the_whole_numbers_that_are_read(version):
    with pytest.raises(CheckpointError, match="version"):
        parsed({**hostile.NATIVE, "version": version})


@pytest.mark.parametrize("count", [2**31 + 1, 2**63, 10**400, True, -1])
def test_counts_of_a_scheme_are_counts(count):
    for words in (
        {"group_size": count},
        {"activation_dtype": "int8", "threshold": 6.0, "outlier_columns": count},
    ):
        with pytest.raises(RecipeError):
            Scheme("int8", **words)


@pytest.mark.parametrize("text", ["(a|a)*$", r"(x)\1*" * 50 + "y"])
def test_regexes_of_a_config_end(text, monkeypatch):
    monkeypatch.setattr("quantkit.untrusted.REGEX_SECONDS", 0.2)
    for key in ("ignore", "targets"):
        config = json.loads(json.dumps(hostile.COMPRESSED_TENSORS))
        holder = config if key == "ignore" else config["config_groups"]["group_0"]
        holder[key] = [f"re:{text}"]
        for name in ("a" * 400 + "b", "x" * 300):
            hostile.answer(
                lambda config=config, name=name: formats.of_config(config, "X").parse(config).scheme_of(name)
            )
    skipped = {**hostile.BITSANDBYTES, "llm_int8_skip_modules": [text]}
    hostile.answer(lambda: formats.of_config(skipped, "X").parse(skipped).scheme_of("a" * 400 + "b"))


# config.json itself


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1, "a": 2}',
        b'{"num_hidden_layers": 1000000000}',
        b'{"num_labels": 1e300}',
        b'{"text_config": {"encoder_layers": 10000000}}',
        b'{"vision": [{"depth": 10000000}]}',
        b"\xff\xfe\0",
        b'"\\ud800"',
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    error = hostile.answer(lambda: read_config(tmp_path))
    assert isinstance(error, CheckpointError)
    assert "config.json" in str(error)
    assert "download" in str(error)


def test_a_config_nested_as_deep_as_python_reads_is_read(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}")
    read_config(tmp_path)


def test_a_config_that_is_far_too_large_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10**12)  # takes no room on disk
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"{LARGEST_JSON:,}"):
            read_config(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@settings(max_examples=60, deadline=None)
@given(value=hostile.values)
def test_any_value_is_a_config_or_refused(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_bytes(hostile.dumped(value))
    found = hostile.answer(lambda: read_config(folder))
    assert isinstance(found, (dict, QuantkitError))
