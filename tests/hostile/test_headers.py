"""Safetensors headers and indexes that lie: refused before anything is allocated, and nothing read elsewhere."""

import json
import random
import tracemalloc

import hostile
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantkit.errors import CheckpointError, QuantkitError
from quantkit.shards import INDEX, SINGLE, ShardReader, parse_header

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "I8", "shape": [4, 8], "data_offsets": [16, 48]},
}
DATA = bytes(48)


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read_all(folder):
    """Every tensor, for which no more memory is taken than the file has."""
    reader = ShardReader(folder)
    return {name: reader.get(name) for name in reader.tensors}


def read(folder, header, data=DATA, length=None):
    hostile.raw_safetensors(folder / SINGLE, header, data, length)
    return read_all(folder)


def test_every_place_of_a_header_may_hold_anything(tmp_path):
    assert set(read(tmp_path, HEADER)) == {"a", "b"}
    before = hostile.peak_bytes()
    assert hostile.all_answers(HEADER, lambda header: read(tmp_path, header)) > 20
    assert hostile.peak_bytes() - before < 100 * 2**20


@settings(max_examples=150, deadline=None)
@given(
    header=hostile.near(HEADER),
    cut=st.integers(0, 60),
    length=st.none() | st.sampled_from([0, 8, 2**32, 2**63, 2**64 - 1]),
)
def test_a_header_near_a_right_one_is_read_or_refused(tmp_path_factory, header, cut, length):
    folder = tmp_path_factory.mktemp("header")
    hostile.answer(lambda: read(folder, header, DATA[:cut] if cut < 48 else DATA, length))


@pytest.mark.parametrize("seed", range(4))
def test_changed_bytes_of_a_header_are_read_or_refused(tmp_path, seed):
    chance = random.Random(seed)
    good = hostile.raw_safetensors(tmp_path / SINGLE, HEADER, DATA).read_bytes()
    for _ in range(250):
        bad = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(bad) - len(DATA))
            bad[place] = chance.choice([0, 255, *b'-90"[{,:', chance.randrange(256)])
        (tmp_path / SINGLE).write_bytes(bad)
        hostile.answer(lambda: read_all(tmp_path))


LIES = {
    "ten terabytes": {"a": entry("F32", [10**6, 2_500_000], 0, 10**13)},
    "bytes that overlap": {"a": entry("I8", [32], 0, 32), "b": entry("I8", [32], 16, 48)},
    "the same bytes": {"a": entry("I8", [48], 0, 48), "b": entry("I8", [48], 0, 48)},
    "a hole": {"a": entry("I8", [16], 0, 16), "b": entry("I8", [16], 32, 48)},
    "bytes after the end": {"a": entry("I8", [64], 0, 64)},
    "an end before its start": {"a": entry("I8", [48], 48, 0)},
    "a negative size": {"a": entry("I8", [-48], 0, 48)},
    "two negative sizes": {"a": entry("I8", [-6, -8], 0, 48)},
    "a negative offset": {"a": entry("I8", [49], -1, 48)},
    "a product that overflows": {"a": entry("I8", [2**32, 2**32], 0, 0)},
    "a product that overflows to 48": {"a": entry("I8", [2**63, 2, 48], 0, 48)},
    "a size over 2**63 beside none": {"a": entry("I8", [48], 0, 48), "b": entry("I8", [0, 2**63], 48, 48)},
    "large sizes beside none": {"a": entry("I8", [48], 0, 48), "b": entry("F32", [2**62, 2**62, 0], 48, 48)},
    "more axes than torch has": {"a": entry("I8", [1] * 65 + [48], 0, 48)},
    "a boolean size": {"a": entry("I8", [True, 48], 0, 48)},
    "a broken size": {"a": entry("I8", [48.0], 0, 48)},
    "a name on two lines": {"a\nb": entry("I8", [48], 0, 48)},
    "a name with an escape": {"\x1b[31ma": entry("I8", [48], 0, 48)},
    "a name that runs backwards": {"\u202ea": entry("I8", [48], 0, 48)},
    "a name with a NUL": {"a\0": entry("I8", [48], 0, 48)},
    "a name of half a character": {"\ud800": entry("I8", [48], 0, 48)},
    "a name that never ends": {"x" * 10**6: entry("I8", [48], 0, 48)},
    "no name": {"": entry("I8", [48], 0, 48)},
    "digits that are no number": {"layers.².a": entry("I8", [48], 0, 48)},
    "a tensor that is none": {"a": None},
    "metadata that is none": {"__metadata__": [], "a": entry("I8", [48], 0, 48)},
    "a key twice": b"{" + b",".join([b'"a":{"dtype":"I8","shape":[48],"data_offsets":[0,48]}'] * 2) + b"}",
    "a shape twice": b'{"a":{"dtype":"I8","shape":[4,12],"shape":[48],"data_offsets":[0,48]}}',
    "lists without end": b"[" * 10**6,
    "tables without end": b'{"a":' * 10**6,
    "metadata without end": b'{"__metadata__":{"a":' + b"[" * 10**6,
    "no JSON": b"\xff" * 100,
    "nothing": b"",
}


@pytest.mark.parametrize("lie", list(LIES))
def test_a_header_that_lies_is_refused_before_anything_is_made(tmp_path, lie):
    header = LIES[lie]
    before = hostile.peak_bytes()
    error = hostile.answer(lambda: read(tmp_path, header))
    assert isinstance(error, CheckpointError), error
    assert SINGLE in str(error)
    assert hostile.peak_bytes() - before < 100 * 2**20


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8 + 1, 99_000_000, 10**6])
def test_a_header_longer_than_its_file_is_refused(tmp_path, length):
    before = hostile.peak_bytes()
    assert isinstance(hostile.answer(lambda: read(tmp_path, HEADER, DATA, length)), CheckpointError)
    assert hostile.peak_bytes() - before < 20 * 2**20


@pytest.mark.parametrize("lie", [lie for lie in LIES if lie != "metadata that is none"])
def test_a_header_from_elsewhere_is_read_as_one_from_a_file(tmp_path, lie):
    text = LIES[lie] if isinstance(LIES[lie], bytes) else hostile.dumped(LIES[lie])
    with pytest.raises((ValueError, CheckpointError)):
        parse_header(text, tmp_path / SINGLE, len(DATA))


def test_every_place_of_a_header_from_elsewhere_may_hold_anything(tmp_path):
    assert set(parse_header(hostile.dumped(HEADER), tmp_path / SINGLE, 48)) == {"a", "b"}
    for header in hostile.changed(HEADER):
        try:
            found = parse_header(hostile.dumped(header), tmp_path / SINGLE, 48)
        except (ValueError, CheckpointError):
            continue
        hostile.raw_safetensors(tmp_path / SINGLE, header, DATA)
        if not isinstance(hostile.answer(lambda: ShardReader(tmp_path)), QuantkitError):
            assert found == ShardReader(tmp_path).tensors


# Indexes


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(2)}, tmp_path / "two.safetensors")
    return tmp_path


PLACES = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}


def indexed(folder, index):
    (folder / INDEX).write_bytes(index if isinstance(index, bytes) else hostile.dumped(index))
    return read_all(folder)


def test_every_place_of_an_index_may_hold_anything(sharded):
    index = {"metadata": {"total_size": 24}, "weight_map": PLACES}
    assert len(indexed(sharded, index)) == 3
    hostile.all_answers(index, lambda value: indexed(sharded, value))


@pytest.mark.parametrize(
    "name", [*hostile.ODD_TEXT, "../out.safetensors", "/out.safetensors", "sub/../../out.safetensors", "."]
)
def test_an_index_leads_nowhere_else(sharded, name):
    save_file({"d": torch.ones(2)}, sharded.parent / "out.safetensors")
    error = hostile.answer(lambda: indexed(sharded, {"weight_map": {**PLACES, "d": name}}))
    assert isinstance(error, CheckpointError)
    assert "missing" in str(error) or "outside" in str(error) or "no safetensors" in str(error)


def test_an_index_leads_not_even_to_a_shard_that_is_there(sharded):
    save_file({"d": torch.ones(2)}, sharded.parent / "out.safetensors")
    for name in ("../out.safetensors", str(sharded.parent / "out.safetensors")):
        with pytest.raises(CheckpointError, match="outside of its folder"):
            indexed(sharded, {"weight_map": {**PLACES, "d": name}})


@pytest.mark.parametrize("file", ["pytorch_model.bin", "config.json", "model.pt", "one.safetensors.bin"])
def test_an_index_of_other_files_is_refused_with_the_remedy(sharded, file):
    torch.save({"a": torch.zeros(2)}, sharded / file)
    with pytest.raises(CheckpointError, match=r"run code.*save_pretrained"):
        indexed(sharded, {"weight_map": {**PLACES, "a": file}})


def test_an_index_that_places_a_tensor_twice_is_refused(sharded):
    twice = b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors", "c": "two.safetensors"}}'
    with pytest.raises(CheckpointError, match="given twice"):
        indexed(sharded, twice)


def test_a_tensor_in_two_shards_is_refused(sharded):
    save_file({"a": torch.ones(2), "c": torch.zeros(2)}, sharded / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' lies in one\.safetensors and in two\.safetensors"):
        indexed(sharded, {"weight_map": PLACES})


def test_an_index_that_is_far_too_large_is_not_read(sharded):
    with (sharded / INDEX).open("wb") as file:
        file.truncate(10**12)  # takes no room on disk
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="more than"):
            read_all(sharded)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_the_largest_of_real_headers_takes_no_time(tmp_path):
    """As many tensors as a mixture of 256 experts in 61 layers, with scales."""
    names = [f"model.layers.{n % 61}.mlp.experts.{n}.gate_proj.weight_scale_inv" for n in range(90_000)]
    header = {name: entry("I8", [0, 128], 0, 0) for name in names}
    hostile.raw_safetensors(tmp_path / SINGLE, json.dumps(header).encode())
    assert len(hostile.answer(lambda: ShardReader(tmp_path), seconds=15).tensors) == 90_000
