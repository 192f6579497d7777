"""SPECs of data sets, and files that are none: texts, or one sentence."""

import json
import random
import subprocess
import sys

import hostile
import models
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import DataError
from quantkit.texts import KNOWN, read, tokenize

ROWS = {
    "text": [{"text": "a b"}, {"text": "c"}],
    "tokens": [{"input_ids": [1, 2]}, {"input_ids": [3]}],
    "passages": [{"context": "a", "continuation": "b"}],
    "messages": [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}],
}


@pytest.fixture(scope="module")
def tokens():
    tokenizer = models.tokenizer()
    return lambda spec, **words: tokenize(read(spec, **words), tokenizer, limit=50)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def written(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", list(ROWS))
def test_every_place_of_a_json_file_may_hold_anything(tmp_path, tokens, kind):
    path = tmp_path / "x.json"
    assert tokens(written(path, hostile.dumped(ROWS[kind]))).ids.numel()
    hostile.all_answers(ROWS[kind], lambda rows: tokens(written(path, hostile.dumped(rows))))


@pytest.mark.parametrize("kind", list(ROWS))
def test_every_place_of_a_jsonl_file_may_hold_anything(tmp_path, tokens, kind):
    path = tmp_path / "x.jsonl"

    def as_lines(rows):
        return tokens(written(path, b"\n".join(map(hostile.dumped, rows if isinstance(rows, list) else [rows]))))

    hostile.all_answers(ROWS[kind], as_lines)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=60), ending=st.sampled_from([".txt", ".json", ".jsonl", ".parquet", ".raw"]))
def test_any_bytes_are_a_data_set_or_refused(tmp_path_factory, tokens, data, ending):
    path = written(tmp_path_factory.mktemp("bytes") / f"x{ending}", data)
    hostile.answer(lambda: tokens(path))


@pytest.mark.parametrize(
    "text", [b"[" + b"9" * 5000 + b"]", b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}", b"[\xff]"]
)
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_json_that_python_does_not_read_is_refused(tmp_path, tokens, text, ending):
    assert isinstance(hostile.answer(lambda: tokens(written(tmp_path / f"x{ending}", text))), DataError)


@pytest.mark.parametrize("depth", [100, 500, 900])
def test_messages_nested_deep_are_rendered_or_refused(tmp_path, tokens, depth):
    deep = json.loads("[" * depth + "]" * depth)
    path = written(tmp_path / "x.json", hostile.dumped([{"messages": [{"role": "user", "content": "x", "y": deep}]}]))
    hostile.answer(lambda: tokens(path))


@pytest.mark.parametrize("place", ["{}", "{}:x", "a/{}", "a/b:{}", "x.json:{}", "a/b:c:{}"])
def test_any_spec_is_understood_or_refused(tmp_path, tokens, place):
    written(tmp_path / "x.json", hostile.dumped(ROWS["text"]))
    for text in hostile.ODD_TEXT:
        hostile.answer(lambda text=text: tokens(place.format(text)))


@pytest.mark.parametrize("name", [name for name, known in KNOWN.items() if known is not None])
def test_any_data_dir_is_understood_or_refused(tokens, name):
    for text in hostile.ODD_TEXT:
        hostile.answer(lambda text=text: tokens(name, data_dir=text))


@settings(max_examples=40, deadline=None)
@given(spec=st.text(max_size=20))
def test_any_text_is_a_spec_or_refused(tokens, spec):
    hostile.answer(lambda: tokens(spec))


# Parquet


def half_a_character():
    offsets = pa.array([0, 1], pa.int32()).buffers()[1]
    return pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff")])


@pytest.mark.parametrize(
    "column",
    [
        half_a_character(),
        pa.array([2**62], pa.duration("s")),
        pa.array([2**62], pa.timestamp("us")),
        pa.array([b"\xff"]),
        pa.array([1, 2]),
        pa.array([{"a": 1}]),
        pa.array([[1, None]]),
        pa.array([], pa.string()),
        pa.nulls(3),
    ],
)
@pytest.mark.parametrize("name", ["text", "input_ids", "messages"])
def test_a_column_of_another_kind_is_refused(tmp_path, tokens, column, name):
    pq.write_table(pa.table({name: column}), tmp_path / "x.parquet")
    assert isinstance(hostile.answer(lambda: tokens(tmp_path / "x.parquet")), DataError)


def test_changed_bytes_of_a_parquet_file_are_read_or_refused(tmp_path, tokens):
    pq.write_table(pa.table({"text": ["abc"] * 50}), tmp_path / "good.parquet")
    good, chance = (tmp_path / "good.parquet").read_bytes(), random.Random(1)
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            bad[chance.randrange(len(bad))] = chance.randrange(256)
        hostile.answer(lambda bad=bad: tokens(written(tmp_path / "bad.parquet", bytes(bad))))


# Folders of save_to_disk


@pytest.fixture
def saved(tmp_path):
    Dataset.from_list(ROWS["text"]).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json"])
def test_every_place_of_a_saved_folder_may_hold_anything(saved, tokens, file):
    assert tokens(saved).ids.numel()
    right = json.loads((saved / file).read_bytes())
    few = [value for value in hostile.ODD if value not in ("", "9" * 5000, "x" * 100_000)][::3]
    hostile.all_answers(right, lambda value: (written(saved / file, hostile.dumped(value)), tokens(saved))[1], few)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"{}", b"5", b'{"_data_files": 5}', b'{"_data_files": [{"filename": 5}]}']
)
def test_a_saved_folder_that_is_none_is_refused(saved, tokens, text):
    assert isinstance(hostile.answer(lambda: tokens(written(saved / "state.json", text).parent)), DataError)


def test_a_saved_folder_reads_nothing_elsewhere(saved, tokens, tmp_path):
    """Neither by a file's name, nor by a split's, nor by a link."""
    (tmp_path / "other").mkdir()
    arrow = next(saved.glob("*.arrow"))
    (tmp_path / "other" / arrow.name).write_bytes(arrow.read_bytes())
    state = json.loads((saved / "state.json").read_bytes())
    state["_data_files"] = [{"filename": f"../other/{arrow.name}"}]
    right = (saved / "state.json").read_bytes()
    with pytest.raises(DataError, match="outside of it"):
        tokens(written(saved / "state.json", hostile.dumped(state)).parent)
    written(saved / "state.json", right)
    DatasetDict({"train": Dataset.from_list(ROWS["text"])}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="outside of it"):
        tokens(written(tmp_path / "splits" / "dataset_dict.json", b'{"splits": ["../saved"]}').parent)
    arrow.unlink()
    arrow.symlink_to(tmp_path / "other" / arrow.name)
    with pytest.raises(DataError, match="is a link"):
        tokens(saved)


FLIPS = """
import random, sys
from pathlib import Path
from quantkit.errors import DataError
from quantkit.texts import read
path = Path(sys.argv[1])
good, chance = path.read_bytes(), random.Random(0)
for _ in range(int(sys.argv[2])):
    bad = bytearray(good)
    for _ in range(chance.randint(1, 3)):
        bad[chance.randrange(len(bad))] = chance.choice([0, 255, 127, chance.randrange(256)])
    path.write_bytes(bad)
    try:
        read(path.parent)
    except DataError:
        pass
print("done")
"""


def flipped(saved, count):
    """Arrow's files hold offsets that a reader follows: in a process of its own, as that may end it."""
    arrow = next(saved.glob("*.arrow"))
    command = [sys.executable, "-c", FLIPS, str(arrow), str(count)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert ran.stdout == "done\n", f"{ran.returncode}: {ran.stderr[-500:]}"


def test_changed_bytes_of_a_saved_folder_are_read_or_refused(saved):
    flipped(saved, 150)


@pytest.mark.exhaustive
def test_many_changed_bytes_of_a_saved_folder_are_read_or_refused(saved):
    flipped(saved, 5000)
