"""Texts: every kind of SPEC, and every way in which one can be wrong."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from quantkit import texts
from quantkit.errors import DataError
from quantkit.texts import read, tokenize


class Characters:
    """A tokenizer for the tests: a token a character, and a special token where one is asked for."""

    chat_template: str | None = None

    def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(character) for character in text]}


class Chat(Characters):
    chat_template = "a template"

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def write(path: Path, content: str | bytes | list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def text_of(ids: torch.Tensor) -> str:
    return "".join(map(chr, ids.tolist()))


# What a SPEC may be


def test_a_txt_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.txt", "één\r\n\n two ")
    found = read(spec)
    assert (found.name, found.kind, found.documents) == (spec, "text", ("één\r\n\n two ",))
    ids, utf8_bytes = tokenize(found, Characters())
    assert text_of(ids) == "één\r\n\n two "
    assert (ids.dtype, ids.ndim, utf8_bytes) == (torch.int64, 1, 13)


ROWS = [{"text": "one", "other": "eins"}, {"text": "", "other": "zwei"}, {"text": "three\n", "other": "drei"}]


def save(kind: str, folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        return write(path, rows)
    if kind == "json":
        return write(path, json.dumps(rows, indent=1))
    if kind == "lines.json":
        return write(path, rows)
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
        return str(path)
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


@pytest.mark.parametrize("kind", ["jsonl", "json", "lines.json", "parquet", "folder"])
def test_rows_of_text_in_every_container(kind: str, tmp_path: Path) -> None:
    found = read(save(kind, tmp_path, ROWS))
    assert (found.kind, found.documents) == ("text", ("one", "", "three\n"))
    ids, utf8_bytes = tokenize(found, Characters())
    assert text_of(ids) == "one\n\n\n\nthree\n"
    assert utf8_bytes == 13


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_field_is_named_after_a_colon(kind: str, tmp_path: Path) -> None:
    found = read(save(kind, tmp_path, ROWS) + ":other")
    assert found.documents == ("eins", "zwei", "drei")


def test_a_path_with_a_colon_is_a_path(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "other")
    assert read(write(tmp_path / "a.txt:b.txt", "text")).documents == ("text",)


def test_a_list_of_strings_is_documents(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", '["one", "two"]')).documents == ("one", "two")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_input_ids_are_tokens_one_row_after_another(kind: str, tmp_path: Path) -> None:
    found = read(save(kind, tmp_path, [{"input_ids": [3, 1], "text": "x"}, {"input_ids": [4], "text": "y"}]))
    assert found.kind == "tokens"
    ids, utf8_bytes = tokenize(found)
    assert (ids.tolist(), ids.dtype, utf8_bytes) == ([3, 1, 4], torch.int64, None)


def test_passages_are_apart_by_one_space_which_is_the_continuation_s(tmp_path: Path) -> None:
    rows = [{"context": "a b", "continuation": word} for word in ("c", " c")]
    found = read(write(tmp_path / "a.jsonl", [*rows, {"context": "a b ", "continuation": "c"}]))
    assert found.kind == "passages"
    assert found.passages == (("a b", " c"), ("a b", " c"), ("a b ", "c"))
    assert text_of(tokenize(found, Characters()).ids) == "a b c\n\na b c\n\na b c"


def test_messages_are_rendered_by_the_chat_template(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    found = read(write(tmp_path / "a.jsonl", [{"messages": messages}, {"messages": messages[:1]}]))
    assert found.kind == "messages"
    assert text_of(tokenize(found, Chat()).ids) == "<user>hi<assistant>ho\n\n<user>hi"
    with pytest.raises(DataError, match="no chat template"):
        tokenize(found, Characters())


def test_a_saved_folder_of_splits_gives_the_one_for_the_purpose(tmp_path: Path) -> None:
    splits = {s: datasets.Dataset.from_list([{"text": s}]) for s in ("train", "validation", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "all"))
    assert read(tmp_path / "all").documents == ("test",)
    assert read(tmp_path / "all").name == f"{tmp_path}/all/test"
    assert read(tmp_path / "all", purpose="calibration").documents == ("train",)
    datasets.DatasetDict({"a": splits["train"], "b": splits["test"]}).save_to_disk(str(tmp_path / "odd"))
    with pytest.raises(DataError, match=r"has the splits a, b: choose one with .*odd/SPLIT"):
        read(tmp_path / "odd")
    assert read(tmp_path / "odd" / "b").documents == ("test",)


# Known names


def test_wikitext2_has_the_rows_of_the_hub(tmp_path: Path) -> None:
    write(tmp_path / "wikitext2" / "wiki.test.raw", " \n = Title = \n \n Text . \n")
    write(tmp_path / "wikitext2" / "wiki.train.raw", "other\n")
    write(tmp_path / "wikitext2" / "SOURCE.txt", "where it is from")
    found = read("wikitext2", data_dir=tmp_path)
    assert (found.name, found.documents) == ("wikitext2", ("", " = Title = \n", "", " Text . \n"))
    assert read("wikitext2", data_dir=tmp_path, purpose="calibration").documents == ("other\n",)


def test_a_known_name_with_a_single_file(tmp_path: Path) -> None:
    write(tmp_path / "c4" / "sample.jsonl", ROWS)
    write(tmp_path / "c4" / "README.txt", "about it")
    assert read("c4", data_dir=tmp_path).documents == ("one", "", "three\n")
    write(tmp_path / "ptb" / "ptb.txt", "no it was n't black monday")
    assert read("ptb", data_dir=str(tmp_path)).documents == ("no it was n't black monday",)


@pytest.mark.parametrize("rows", [[{"text": "it was red"}], [{"context": "it was", "continuation": "red"}]])
def test_lambada_is_passages_also_where_rows_are_text(rows: list[Any], tmp_path: Path) -> None:
    write(tmp_path / "lambada" / "test.jsonl", rows)
    assert read("lambada", data_dir=tmp_path).passages == (("it was", " red"),)


def test_demo_is_held_out_for_evaluation() -> None:
    held_out, training = read("demo"), read("demo", purpose="calibration")
    assert held_out.kind == training.kind == "text"
    assert held_out.fingerprint != training.fingerprint


def test_the_hub_is_asked_for_the_usual_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, config: str | None, **options: Any) -> datasets.Dataset:
        asked.append((path, config, options["split"], options.get("data_files"), options.get("revision")))
        column = "sentence" if "ptb" in path else "text"
        return datasets.Dataset.from_list([{column: f"some words {i}"} for i in range(1200)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *args, **options: ["train", "validation"])
    assert len(read("wikitext2").documents) == 1200
    c4 = read("c4")
    assert len(c4.documents) == 1100
    assert "first 1,100 documents" in c4.name
    assert read("ptb").documents[0] == "some words 0"
    assert read("lambada").passages[0] == ("some words", " 0")
    assert read("org/name").name == "org/name:default:validation"
    assert read("org/name:config:train[:10%]").name == "org/name:config:train[:10%]"
    file = "en/c4-validation.00000-of-00008.json.gz"
    parquet = "penn_treebank/test/0000.parquet"
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None, None),
        ("allenai/c4", None, "validation", {"validation": file}, None),
        ("ptb-text-only/ptb_text_only", None, "test", {"test": parquet}, "refs/convert/parquet"),
        ("EleutherAI/lambada_openai", "default", "test", None, None),
        ("org/name", None, "validation", None, None),
        ("org/name", "config", "train[:10%]", None, None),
    ]


# The fingerprint


def test_the_fingerprint_is_the_content_s(tmp_path: Path) -> None:
    """The same text from another container or cut elsewhere is the same; another letter is not."""
    first = read(write(tmp_path / "a.txt", "one two\nthree\n")).fingerprint
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", first)
    assert read(write(tmp_path / "b.jsonl", [{"text": "one two"}, {"text": " three"}])).fingerprint == first
    assert read(write(tmp_path / "c.txt", "one two\r\nthree")).fingerprint == first
    assert read(write(tmp_path / "d.txt", "one two\nthre\n")).fingerprint != first
    ids = [read(write(tmp_path / f"{i}.jsonl", [{"input_ids": [1, i]}])).fingerprint for i in (2, 3)]
    assert len({*ids, first}) == 3


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text\nx\n", r"ends in \.csv: expected one of \.txt, \.jsonl, \.json, \.parquet"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"line 2 isn't JSON \(Expecting value\)"),
        ("a.jsonl", '{"text": "x"}\n\n[1]\n', r"row 2 is a list: expected an object"),
        ("a.json", '[{"text": "x"},\n\n{"text"}]', r"line 3 isn't JSON \(Expecting ':' delimiter\)"),
        ("a.json", '{"text": "x"}\n{"text"\n', r"line 2 isn't JSON"),
        ("a.json", "[" * 100_000, r"nested too deeply|isn't JSON"),
        ("a.json", "3", "row 1 is a int"),
        ("a.jsonl", "", "holds no row"),
        ("a.jsonl", [{"body": "x", "id": 1}], r"none of the fields .*it has body, id.*FILE:field"),
        ("a.jsonl", [{}], "it has no field"),
        ("a.jsonl", [{"text": "x"}, {"body": "x"}], "row 2 has no field 'text': it has body"),
        ("a.jsonl", [{"text": "x"}, {"text": None}], "row 2 has null in 'text': expected a string"),
        ("a.jsonl", [{"text": ["x"]}], "row 1 has a list in 'text': expected a string"),
        ("a.jsonl", [{"text": 3}], "row 1 has a int in 'text': expected a string"),
        ("a.jsonl", [{"input_ids": "x"}], "row 1 has a str in 'input_ids': expected a list of token ids"),
        ("a.jsonl", [{"input_ids": [1]}, {"input_ids": [1.5]}], "row 2 is no list of token ids"),
        ("a.jsonl", [{"input_ids": [-1]}], "row 1 is no list of token ids"),
        ("a.jsonl", [{"input_ids": []}], "holds no token"),
        ("a.jsonl", [{"messages": "x"}], "row 1 has a str in 'messages': expected a list of messages"),
        ("a.jsonl", [{"messages": [{"role": "user"}]}, {"messages": ["x"]}], "row 2 is no conversation"),
        ("a.jsonl", [{"context": "x", "continuation": " "}], "row 1 has an empty context or continuation"),
        ("a.jsonl", '{"text": "\\ud800"}', "half a surrogate pair"),
        ("a.txt", "", "holds no text"),
        ("a.txt", " \n\t", "holds no text"),
        ("a.txt", b"abc\xff", r"isn't UTF-8 text \(byte 3 is 0xff\): convert it"),
        ("a.jsonl", b'{"text": "\xe9"}', "isn't UTF-8 text"),
        ("a.parquet", "no parquet", "isn't a readable parquet file"),
        ("folder/a.txt", "x", "a folder that save_to_disk didn't make"),
    ],
)
def test_content_that_is_refused(name: str, content: str | bytes | list[Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / name, content)
    spec = tmp_path / name.split("/")[0]
    with pytest.raises(DataError, match=message) as raised:
        read(spec)
    assert str(spec) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{tmp}/none.txt", r"none\.txt doesn't exist"),
        ("{tmp}/none.jsonl:body", r"none\.jsonl:body doesn't exist"),
        ("none.parquet", "doesn't exist"),
        ("data/none.csv", "doesn't exist"),
        ("./none", "doesn't exist"),
        ("wikitext3", "is no known data set: give a file, a folder, one of wikitext2, c4, ptb, lambada, demo"),
        ("org/name:", "is no known data set"),
        ("{tmp}/a.jsonl:body", r"a\.jsonl has no field 'body': it has text; give .*a\.jsonl:FIELD"),
        ("{tmp}/a.parquet:body", r"a\.parquet has no field 'body': it has text; give .*a\.parquet:FIELD"),
        ("{tmp}/a.txt:body", r"asks for a field, and a \.txt file has none"),
    ],
)
def test_specs_that_are_refused(spec: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": "x"}])
    write(tmp_path / "a.txt", "x")
    save("parquet", tmp_path, [{"text": "x"}])
    (tmp_path / "rows.parquet").rename(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        read(spec.format(tmp=tmp_path))


def test_known_names_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"c4 doesn't exist: put c4 there, or leave out --data-dir"):
        read("c4", data_dir=tmp_path)
    write(tmp_path / "c4" / "LICENSE.txt", "x")
    with pytest.raises(DataError, match=r"holds no .* file: put one of c4 there"):
        read("c4", data_dir=tmp_path)
    write(tmp_path / "c4" / "a.txt", "x")
    write(tmp_path / "c4" / "b.txt", "x")
    with pytest.raises(DataError, match=r"holds a\.txt, b\.txt, and none is alone in being for evaluation"):
        read("c4", data_dir=tmp_path)


@pytest.mark.parametrize("spec", ["wikitext2", "c4", "org/name", "org/name:config:test"])
def test_offline(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach it on the Hub\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    with pytest.raises(DataError, match=r"can't be had from the hub \(Couldn't reach it on the Hub\)") as raised:
        read(spec, cache_dir=str(tmp_path))
    assert ("--data-dir" in str(raised.value)) == (spec in texts.KNOWN)


def test_text_needs_a_tokenizer_that_makes_tokens(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.txt", "x"))
    with pytest.raises(DataError, match=r"is text and the model has no tokenizer"):
        tokenize(found, None)
    with pytest.raises(DataError, match="makes no token"):
        tokenize(found, lambda text, **options: {"input_ids": []})


def test_a_template_that_refuses(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.jsonl", [{"messages": [{"role": "user"}]}]))
    with pytest.raises(DataError, match="doesn't fit the tokenizer's chat template"):
        tokenize(found, Chat())


def test_rows_saved_with_a_format_are_read_as_they_are(tmp_path: Path) -> None:
    """`with_format("torch")` is what tokens are often saved with."""
    rows = datasets.Dataset.from_list([{"input_ids": [3, 1]}, {"input_ids": [4]}])
    rows.with_format("torch").save_to_disk(str(tmp_path / "torch"))
    rows.with_format("numpy").save_to_disk(str(tmp_path / "numpy"))
    assert [tokenize(read(tmp_path / form)).ids.tolist() for form in ("torch", "numpy")] == [[3, 1, 4]] * 2


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
def test_messages_of_different_fields_are_the_same_from_every_container(kind: str, tmp_path: Path) -> None:
    """A table fills what a message doesn't have with nulls, which a template takes for a field."""
    messages = [{"role": "user", "content": "hi", "name": "x"}, {"role": "tool", "content": None, "calls": [{"f": 1}]}]
    rows = [{"messages": messages, "chat": messages[:1]}]
    found = read(save(kind, tmp_path, rows), purpose="calibration")
    assert found.conversations == (messages,)
    assert found.fingerprint == read(write(tmp_path / "other.jsonl", rows)).fingerprint


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_field_may_hold_messages_or_tokens(kind: str, tmp_path: Path) -> None:
    rows = [{"chat": [{"role": "user", "content": "hi"}], "ids": [7, 8], "text": "x"}]
    spec = save(kind, tmp_path, rows)
    assert text_of(tokenize(read(f"{spec}:chat", purpose="calibration"), Chat()).ids) == "<user>hi"
    assert tokenize(read(f"{spec}:ids", purpose="calibration")).ids.tolist() == [7, 8]


# Part of the tokens


class Counting(Chat):
    """Which merges up to three equal characters into a token, and counts the characters that it encodes."""

    def __init__(self) -> None:
        self.characters = 0

    def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
        self.characters += len(text)
        return {"input_ids": [sum(map(ord, run.group())) for run in re.finditer(r"(?s)(.)\1{0,2}", text)]}


@pytest.mark.parametrize("limit", [1, 2, 300, 3000, 5000, 10**6])
@pytest.mark.parametrize("kind", ["one", "many", "messages", "passages"])
def test_the_first_tokens_are_those_of_the_whole(
    kind: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "LOOKAHEAD", 4)
    pieces = [f"{'aaaab' * (n % 7)}{n}" for n in range(900)]
    if kind == "one":
        spec = write(tmp_path / "a.txt", "\n\n".join(pieces))
    elif kind == "messages":
        spec = write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": p}]} for p in pieces])
    elif kind == "passages":
        spec = write(tmp_path / "a.jsonl", [{"context": p, "continuation": " c"} for p in pieces])
    else:
        spec = write(tmp_path / "a.jsonl", [{"text": p} for p in pieces])
    found, counting = read(spec, purpose="calibration"), Counting()
    whole = tokenize(found, Counting())
    part = tokenize(found, counting, limit)
    assert part.ids.tolist() == whole.ids[:limit].tolist()
    assert part.utf8_bytes is None
    assert whole.utf8_bytes is not None
    assert counting.characters < max(100, 20 * limit)
    assert counting.characters <= 2 * whole.utf8_bytes


def test_the_first_of_tokens_that_came_as_tokens(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.jsonl", [{"input_ids": [3, 1]}, {"input_ids": [4]}]))
    assert tokenize(found, limit=2).ids.tolist() == [3, 1]


@pytest.mark.parametrize("size", range(24, 60))
def test_documents_that_end_just_at_the_cut(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two documents around a cut of 4 * (limit + LOOKAHEAD) = 40 characters: neither is left out."""
    monkeypatch.setattr(texts, "LOOKAHEAD", 0)
    found = texts.Texts("t", "text", "", documents=("a" * 30, "b" * (size - 24), "c" * 20))
    sparse = lambda text, **options: {"input_ids": [ord(c) for c in text[::8]]}  # noqa: E731
    assert tokenize(found, sparse, 10).ids.tolist() == tokenize(found, sparse).ids[:10].tolist()


# The real thing


def test_real_known_data_sets(data: Path) -> None:
    found = {name: read(name, data_dir=data / "text") for name in ("wikitext2", "c4", "lambada")}
    assert len(found["wikitext2"].documents) == 4358  # the hub's number of rows
    raw = (data / "text/wikitext2/wiki.test.raw").read_text(encoding="utf-8")
    lines = [line for line in raw.splitlines(keepends=True) if line.strip()]
    assert [document for document in found["wikitext2"].documents if document] == lines
    assert read(data / "text/wikitext2/wiki.test.raw").fingerprint == found["wikitext2"].fingerprint
    assert len(found["c4"].documents) == 1000
    assert len(found["lambada"].passages) == 5153
    assert found["lambada"].passages[0][1] == " signs"


def test_real_tokens_are_those_of_the_joined_text(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from quantkit.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(data / "models/stories3M")
    text = (data / "text/tinystories/tinystories_val.txt").read_text(encoding="utf-8")[:4000]
    found = texts.Texts("t", "text", "", documents=(text[:1000], text[1000:]))
    ids, _ = tokenize(found, tokenizer)
    assert len(ids) > tokenizer.model_max_length
    assert ids.tolist() == tokenizer.encode(f"{text[:1000]}\n\n{text[1000:]}", add_special_tokens=False, verbose=False)
    assert "longer than" not in capfd.readouterr().err
