import contextlib
import json
import os
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import same
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit import shards
from quantkit.durable import write_json
from quantkit.errors import CheckpointError
from quantkit.shards import DTYPES, INDEX, SINGLE, ShardReader, ShardWriter, checksum

MANY = {
    "a.float": torch.randn(3, 5),
    "b.half": torch.randn(3, 5).half(),
    "c.bfloat": torch.randn(3, 5).bfloat16(),
    "d.double": torch.randn(3).double(),
    "e.e4m3": torch.randn(3, 5).to(torch.float8_e4m3fn),
    "f.e5m2": torch.randn(3, 5).to(torch.float8_e5m2),
    "g.int8": torch.arange(-128, 128, dtype=torch.int8),
    "h.uint8": torch.arange(7, dtype=torch.uint8),
    "i.int16": torch.arange(7, dtype=torch.int16),
    "j.int32": torch.arange(7, dtype=torch.int32),
    "k.int64": torch.arange(7),
    "l.bool": torch.tensor([True, False, True]),
    "m.scalar": torch.tensor(3.5),
    "n.empty": torch.empty(0, 4),
    "o.transposed": torch.randn(4, 6).t(),
    "p.strided": torch.randn(8, 8)[::2, 1::3],
    "q.uint16": torch.arange(7).to(torch.uint16),
    "r.uint32": torch.arange(7).to(torch.uint32),
    "s.uint64": torch.arange(7).to(torch.uint64),
    "t.complex": torch.randn(3, 5, dtype=torch.complex64),
    "u.e8m0": torch.arange(7, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "v.e4m3fnuz": torch.arange(7, dtype=torch.uint8).view(torch.float8_e4m3fnuz),
    "w.e5m2fnuz": torch.arange(7, dtype=torch.uint8).view(torch.float8_e5m2fnuz),
    "x.e2m1": torch.arange(12, dtype=torch.uint8).view(3, 4).view(torch.float4_e2m1fn_x2),
    "y.e2m1 empty": torch.empty(3, 0, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
}


def write(folder, tensors, limit=10**9):
    writer = ShardWriter(folder, limit)
    writer.add(tensors)
    writer.finish()
    return writer


@pytest.mark.parametrize("limit", [10**9, 100])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, limit):
    writer = write(tmp_path, MANY, limit)
    reader = ShardReader(tmp_path)
    assert set(reader.tensors) == set(MANY) == set(writer.checksums)
    assert reader.nbytes == writer.nbytes == sum(tensor.nbytes for tensor in MANY.values())
    for name, tensor in MANY.items():
        info = reader.tensors[name]
        assert (info.shape, info.dtype, info.nbytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
        assert same(reader.get(name), tensor)
        assert checksum(reader.get(name)) == writer.checksums[name]


def test_every_dtype_that_is_read_was_written_above():
    assert {tensor.dtype for tensor in MANY.values()} == set(DTYPES.values())


def test_every_dtype_that_safetensors_and_torch_know_is_read(tmp_path):
    written = set()
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        with contextlib.suppress(KeyError, RuntimeError, NotImplementedError):
            save_file({"t": torch.zeros(16, dtype=torch.uint8).view(dtype)}, tmp_path / SINGLE)
            written.add(dtype)
            assert ShardReader(tmp_path).tensors["t"].dtype == dtype
    assert written == set(DTYPES.values())


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("limit", [10**9, 100])
def test_shards_have_the_mode_that_the_umask_gives(tmp_path, mask, limit):
    before = os.umask(mask)
    try:
        write(tmp_path, MANY, limit)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_one_shard_has_the_plain_name_and_no_index(tmp_path):
    write(tmp_path, MANY)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    with safe_open(tmp_path / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_several_shards_have_numbers_and_an_index_that_transformers_reads(tmp_path):
    write(tmp_path, MANY, 100)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in MANY.values())
    placed = {name: file for file in files for name in load_file(tmp_path / file)}
    assert index["weight_map"] == placed
    assert {path.name for path in tmp_path.iterdir()} == {*files, INDEX}


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=20), limit=st.integers(1, 100))
def test_no_shard_is_larger_than_asked_but_for_a_single_tensor(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("limit")
    write(folder, {f"t{number}": torch.zeros(size, dtype=torch.uint8) for number, size in enumerate(sizes)}, limit)
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        held = [tensor.nbytes for tensor in load_file(path).values()]
        assert sum(held) <= limit or len([size for size in held if size]) == 1
        found += held
    assert sorted(found) == sorted(sizes)


@pytest.mark.parametrize("limit", [10**9, 100])
def test_the_same_tensors_give_the_same_bytes(tmp_path, limit):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, MANY, limit)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_small_shards_wait_for_company_and_large_ones_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SMALLEST_SHARD", 1000)
    writer = ShardWriter(tmp_path, 10**6)
    writer.add({"a": torch.zeros(999, dtype=torch.uint8)})
    writer.flush()
    assert not list(tmp_path.iterdir())
    writer.add({"b": torch.zeros(1, dtype=torch.uint8)})
    writer.flush()
    assert len(list(tmp_path.iterdir())) == 1


def test_tensors_that_share_memory_are_written_each_by_itself(tmp_path):
    storage = torch.arange(12.0)
    tensors = {"whole": storage, "part": storage[3:7], "again": storage.view(3, 4), "back": storage[8:]}
    write(tmp_path, tensors)
    reader = ShardReader(tmp_path)
    assert all(same(reader.get(name), tensor) for name, tensor in tensors.items())


def test_checksums_tell_shape_dtype_and_bytes_apart():
    zeros = torch.zeros(4)
    others = [zeros.view(2, 2), zeros.int(), torch.tensor([0, 0, 0, -0.0]), torch.zeros(5)]
    assert len({checksum(tensor) for tensor in [zeros, *others]}) == 5
    assert checksum(zeros) == checksum(torch.zeros(8)[::2])


# What is damaged


@pytest.fixture
def several(tmp_path):
    write(tmp_path, {f"t{number}": torch.full((64,), float(number)) for number in range(4)}, 256)
    return tmp_path


def read_all(folder):
    reader = ShardReader(folder)
    return {name: reader.get(name) for name in reader.tensors}


def refused(folder, *words):
    with pytest.raises(CheckpointError) as error:
        read_all(folder)
    for word in words:
        assert word in str(error.value)


def test_a_missing_shard_is_named(several):
    (several / "model-00002-of-00004.safetensors").unlink()
    refused(several, "model-00002-of-00004.safetensors", "missing", "download")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 40, -257, -256, -1])
def test_a_shard_cut_anywhere_is_named(several, keep):
    path = several / "model-00003-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(several, path.name, "truncated or damaged", "download")


def test_a_shard_with_bytes_after_its_end_is_named(several):
    path = several / "model-00003-of-00004.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    refused(several, path.name, "truncated or damaged")


def test_flipped_header_bits_are_an_error_or_change_no_byte_count(tmp_path):
    """Half of all bits of a header, one at a time: a CheckpointError, or still a header (a letter of a name)."""
    write(tmp_path, {"t": torch.arange(4.0), "u": torch.arange(3, dtype=torch.int8)})
    path = tmp_path / SINGLE
    good = path.read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    outcomes = set()
    for place in range(length):
        for bit in (0, 3, 5, 7):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            path.write_bytes(bad)
            try:
                reader = ShardReader(tmp_path)
            except CheckpointError as error:
                outcomes.add("refused" if SINGLE in str(error) else "refused without a name")
            else:
                assert reader.nbytes == 19
                outcomes.add("read")
    assert outcomes == {"refused", "read"}


def write_raw(folder, dtype, shape, size):
    header = json.dumps({"t": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2"])
def test_a_dtype_that_torch_does_not_know_is_named(tmp_path, dtype):
    write_raw(tmp_path, dtype, [8], 6)
    refused(tmp_path, SINGLE, dtype, "'t'")


@pytest.mark.parametrize(("dtype", "size"), [("C64", 63), ("U32", 16), ("F8_E8M0", 16), ("F4", 8), ("C128", 128)])
def test_a_dtype_with_another_byte_count_is_refused(tmp_path, dtype, size):
    write_raw(tmp_path, dtype, [8], size)
    refused(tmp_path, SINGLE, "damaged")


@pytest.mark.parametrize("shape", [[], [1], [3], [2, 3]])
def test_half_a_byte_of_f4_is_refused(tmp_path, shape):
    write_raw(tmp_path, "F4", shape, 3 if shape == [2, 3] else 1)
    refused(tmp_path, SINGLE)


def test_the_single_file_counts_where_an_index_is_beside_it(several):
    """As for transformers, which test_loading asks."""
    save_file({"t0": torch.ones(1)}, several / SINGLE)
    assert read_all(several) == {"t0": torch.ones(1)}
    (several / INDEX).write_text("no index")
    assert read_all(several) == {"t0": torch.ones(1)}


def test_a_shard_without_a_tensor_of_the_index_is_named(several):
    save_file({"else": torch.zeros(1)}, several / "model-00001-of-00004.safetensors")
    refused(several, "model-00001-of-00004.safetensors", "'t0'")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "5",
        "null",
        "{}",
        '{"weight_map": 5}',
        '{"weight_map": null}',
        '{"weight_map": []}',
        '{"weight_map": {"t0": 5}}',
        '{"weight_map": {"t0": ["x"]}}',
        '{"weight_map": {"t0": "x", "t1": 5}}',
        "[" * 100_000,
        b"\xff\xfe\x00",
    ],
)
def test_an_index_that_is_none_is_named(several, text):
    (several / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(several, INDEX)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", ".", "a\0b"]
)
def test_an_index_that_points_out_of_its_folder_is_refused(several, shard):
    save_file({"t": torch.zeros(1)}, several.parent / "x.safetensors")
    (several / INDEX).write_text(json.dumps({"weight_map": {"t": shard}}))
    refused(several, INDEX)


def test_pickles_are_refused_with_the_remedy(tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", "pickle", "safetensors")


def test_a_folder_without_weights_is_refused(tmp_path):
    refused(tmp_path, str(tmp_path), SINGLE)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
    (tmp_path / SINGLE).mkdir()
    refused(tmp_path, SINGLE)


# Failing writes


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        shards.SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_as_one(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(shards, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"no space is left on the disk of .*free some or give another -o OUT$"):
        write(tmp_path, MANY)


def test_other_failures_name_the_file(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shards, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"part-00000.*Permission denied"):
        write(tmp_path, MANY)


def test_json_that_cannot_be_written_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere/x\.json"):
        write_json(tmp_path / "nowhere" / "x.json", {})


def test_a_checksum_from_disk_is_that_of_the_tensor(tmp_path, monkeypatch):
    """Read in pieces that end anywhere; one bit on disk makes it another."""
    monkeypatch.setattr(shards, "PIECE", 7)
    writer = ShardWriter(tmp_path, 100)
    writer.add(MANY)
    writer.finish()
    reader = ShardReader(tmp_path)
    assert {name: reader.checksum(name) for name in MANY} == writer.checksums
    name, info = next((name, info) for name, info in reader.tensors.items() if info.nbytes)
    content = bytearray(info.path.read_bytes())
    content[info.start + info.nbytes - 1] ^= 1
    info.path.write_bytes(content)
    changed = {other for other in MANY if reader.checksum(other) != writer.checksums[other]}
    assert changed == {name}
    info.path.write_bytes(content[: info.start])
    assert reader.checksum(name) != writer.checksums[name]
    info.path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        reader.checksum(name)
