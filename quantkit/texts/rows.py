"""Rows of a data set, whatever they came from, and the texts, passages, conversations or tokens that they hold."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from quantkit.errors import DataError

Kind = Literal["text", "tokens", "passages", "messages"]
Purpose = Literal["evaluation", "calibration"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Texts:
    """What a SPEC holds; `kind` says which of the fields is filled.

    `fingerprint` is a SHA-256 of the content with its white space taken out: the same text has the same one whether
    it came from a .txt, its lines from the hub, or its documents from a .jsonl.
    """

    name: str
    kind: Kind
    fingerprint: str
    documents: tuple[str, ...] = ()
    passages: tuple[tuple[str, str], ...] = ()
    conversations: tuple[Any, ...] = ()
    token_ids: torch.Tensor | None = field(default=None, compare=False)


class Tokens(NamedTuple):
    """A 1-D int64 tensor of token ids, and the UTF-8 bytes of the text they stand for.

    The bytes are None where it came as tokens, or was cut to a number of tokens.
    """

    ids: torch.Tensor
    utf8_bytes: int | None


def columns_of(names: Sequence[str], where: str) -> list[str]:
    """Which of a row's fields are read when none is named."""
    for wanted in (["input_ids"], ["context", "continuation"], ["text"], ["messages"]):
        if set(wanted) <= set(names):
            return wanted
    found = ", ".join(names) if names else "no field"
    raise DataError(
        f"{where} has none of the fields input_ids, text, messages, or context with continuation (it has {found}): "
        "name the one to read with FILE:field"
    )


def interpret(rows: Iterable[Row], column: str | None, name: str, last_word: bool = False) -> Texts:
    """The texts of rows; with `last_word` a row of text is a passage whose continuation is its last word."""
    rows = list(rows)
    if not rows:
        raise DataError(f"{name} holds no row: give a data set with text in it")
    if column is None:
        wanted = columns_of(list(rows[0]), name)
    elif column in rows[0]:
        wanted = [column]
    else:
        where = name.removesuffix(f":{column}")
        raise DataError(f"{where} has no field {column!r}: it has {', '.join(rows[0])}; give {where}:FIELD")
    values = [tuple(_value(row, key, number, name) for key in wanted) for number, row in enumerate(rows, 1)]
    first = values[0][0]
    if len(wanted) == 2:
        return _passages([(str(c), str(w)) for c, w in values], name)
    flat = [value for (value,) in values]
    if isinstance(first, str):
        return _passages([_last_word(t, name) for t in flat], name) if last_word else _documents(flat, name)
    if first and isinstance(first[0], dict):
        return _conversations(flat, name)
    return _token_rows(flat, name)


def _value(row: Row, key: str, number: int, name: str) -> Any:
    """A field of a row: a string, or a list where the first row has one."""
    if key not in row:
        raise DataError(f"{name} row {number} has no field {key!r}: it has {', '.join(row)}; every row needs one")
    value = row[key]
    expected = {"input_ids": "a list of token ids", "messages": "a list of messages"}.get(key, "a string")
    fits = isinstance(value, (str, list)) and (expected == "a string" or not isinstance(value, str))
    if not fits or (key in ("text", "context", "continuation") and not isinstance(value, str)):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{name} row {number} has {kind} in {key!r}: expected {expected}")
    return value


def _documents(documents: list[Any], name: str) -> Texts:
    for number, document in enumerate(documents, 1):
        if not isinstance(document, str):
            raise DataError(f"{name} row {number} is a {type(document).__name__}: expected a string as in row 1")
    if not any(document.strip() for document in documents):
        raise DataError(f"{name} holds no text: it is empty or white space; give a text")
    return Texts(name, "text", _fingerprint(documents, name), documents=tuple(documents))


def _passages(passages: list[tuple[str, str]], name: str) -> Texts:
    """Passages whose parts are apart by a space, which belongs to the continuation's tokens."""
    apart = []
    for number, (context, continuation) in enumerate(passages, 1):
        if not context.strip() or not continuation.strip():
            raise DataError(f"{name} row {number} has an empty context or continuation: give both or leave it out")
        joined = context[-1].isspace() or continuation[0].isspace()
        apart.append((context, continuation if joined else f" {continuation}"))
    return Texts(name, "passages", _fingerprint((c + w for c, w in apart), name), passages=tuple(apart))


def _last_word(text: str, name: str) -> tuple[str, str]:
    context, _, word = text.rstrip().rpartition(" ")
    if not context:
        raise DataError(f"{name} holds {text[:40]!r}, which is no passage of several words: leave it out")
    return context, f" {word}"


def _conversations(conversations: list[Any], name: str) -> Texts:
    for number, messages in enumerate(conversations, 1):
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise DataError(f"{name} row {number} is no conversation: expected a list of role and content objects")
    said = tuple([_without_fillers(message) for message in messages] for messages in conversations)
    for number, messages in enumerate(said, 1):
        try:
            json.dumps(messages, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{name} row {number} holds half a surrogate pair, no character: mend the text") from error
    content = (json.dumps(messages, sort_keys=True) for messages in said)
    return Texts(name, "messages", _fingerprint(content, name), conversations=said)


def _without_fillers(message: Row) -> Row:
    """The message without the nulls that a table puts where only other messages have a field."""
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _token_rows(rows: list[Any], name: str) -> Texts:
    """One stream: the rows one after another."""
    ids: list[int] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or not all(type(i) is int and 0 <= i < 2**62 for i in row):
            raise DataError(f"{name} row {number} is no list of token ids: expected whole numbers from 0 up")
        ids.extend(row)
    if not ids:
        raise DataError(f"{name} holds no token: its rows are empty; give rows of input_ids")
    tensor = torch.tensor(ids, dtype=torch.int64)
    digest = hashlib.sha256(b"tokens" + tensor.numpy().tobytes()).hexdigest()
    return Texts(name, "tokens", f"sha256:{digest}", token_ids=tensor)


def _fingerprint(parts: Iterable[str], name: str) -> str:
    digest = hashlib.sha256()
    for part in _without_space(parts):
        try:
            digest.update(part.encode())
        except UnicodeEncodeError as error:
            raise DataError(
                f"{name} holds half a surrogate pair ({part[error.start]!r}), which is no character: mend the text"
            ) from error
    return f"sha256:{digest.hexdigest()}"


def _without_space(parts: Iterable[str]) -> Iterator[str]:
    for part in parts:
        yield "".join(part.split())


def first_line(error: BaseException) -> str:
    """The first line of a message of someone else's."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
