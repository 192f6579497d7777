"""The texts that calibration and evaluation read: SPEC in, documents or token ids out.

A SPEC is, in the order in which it is understood:

- a known name (KNOWN), read from DATA_DIR/<name>/ or else from the hub;
- a file: .txt (one document), .jsonl, .json, .parquet; FILE:field for a field other than those that are looked for;
- a folder made by `Dataset.save_to_disk`;
- a hub data set, org/name[:config[:split]].

Rows are read by what they hold: `input_ids` are tokens, `context` with `continuation` is a passage, `text` is a
document, `messages` is a conversation. Nothing is shuffled, filtered or cut.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import DataError
from quantkit.texts.files import ENDINGS, exists, file_rows, looks_like_a_path, split_field
from quantkit.texts.rows import Purpose, Texts, Tokens, first_line, interpret
from quantkit.texts.sets import KNOWN, read_hub, read_known, read_saved_folder
from quantkit.untrusted import is_plain_file, shown

__all__ = ["KNOWN", "Purpose", "Texts", "Tokens", "encode", "read", "tokenize"]

SEPARATOR = "\n\n"
LOOKAHEAD = 256  # tokens before a cut that may differ from those of the whole text, and are not used


def read(
    spec: str | Path,
    *,
    purpose: Purpose = "evaluation",
    data_dir: str | Path | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> Texts:
    """The texts of a SPEC.

    `purpose` chooses among the splits of a known name, and of a data set that names none: test (else validation) for
    evaluation, train for calibration. Raises DataError, one sentence, for whatever is wrong with SPEC or its content.
    """
    text = str(spec)
    if text in KNOWN:
        return read_known(text, purpose, data_dir, token, cache_dir)
    path, column = split_field(text)
    if exists(path) and path.is_dir():
        return read_saved_folder(path, text, purpose)
    if is_plain_file(path):
        return interpret(file_rows(path, column), column, text)
    if looks_like_a_path(text):
        raise DataError(
            f"{shown(text, str)} doesn't exist: give a {', '.join(ENDINGS[:4])} file or a save_to_disk folder"
        )
    parts = text.split(":", 2)  # a split may hold colons: train[:10%]
    if parts[0].count("/") != 1 or not all(parts):
        raise DataError(
            f"{shown(text)} is no known data set: give a file, a folder, one of {', '.join(KNOWN)}, or a data set of "
            "the hub as org/name[:config[:split]]"
        )
    return read_hub(text, parts, purpose, token, cache_dir)


def tokenize(texts: Texts, tokenizer: Any = None, limit: int | None = None) -> Tokens:
    """All tokens of the texts: documents joined by two newlines, no special token added, encoded in one go.

    In one go, because a tokenizer may merge across any place where the text could be cut. Conversations are rendered by
    the tokenizer's chat template first; a passage is its context with its continuation.

    With `limit` these are the first so many of all tokens, or all where there are fewer, made from no more text than
    that takes: of a tokenizer that looks ahead no further than LOOKAHEAD tokens. It is for calibration, not for
    evaluation.

    Raises DataError without a tokenizer (or chat template) where one is needed.
    """
    if texts.token_ids is not None:
        return Tokens(texts.token_ids[:limit], None)
    if tokenizer is None:
        raise DataError(
            f"{texts.name} is text and the model has no tokenizer: put the tokenizer's files in the model's folder, or "
            "give rows of input_ids"
        )
    documents = _documents(texts, tokenizer)
    if limit is None:
        joined = SEPARATOR.join(documents)
        ids, utf8_bytes = encode(tokenizer, joined), len(joined.encode())
    else:
        ids, utf8_bytes = _first_tokens(documents, tokenizer, limit), None
    if not ids:
        raise DataError(f"the tokenizer makes no token of {texts.name}: check that both are of the same language")
    return Tokens(torch.tensor(ids, dtype=torch.int64), utf8_bytes)


def _first_tokens(documents: Iterable[str], tokenizer: Any, limit: int) -> list[int]:
    """The first tokens of the joined documents; the text that is encoded doubles until there are enough."""
    rest, taken, length = iter(documents), list[str](), 0
    size = 4 * (limit + LOOKAHEAD)  # characters
    while True:
        for document in rest:
            length += len(document) + len(SEPARATOR) * bool(taken)
            taken.append(document)
            if length > size:
                break
        ids = encode(tokenizer, SEPARATOR.join(taken)[:size])
        if len(ids) >= limit + LOOKAHEAD or size >= length:
            return ids[:limit]
        size *= 2


def _documents(texts: Texts, tokenizer: Any) -> Iterator[str]:
    """The documents to be joined, made as they are asked for."""
    if texts.kind == "messages":
        yield from _rendered(texts, tokenizer)
    elif texts.kind == "passages":
        yield from (context + continuation for context, continuation in texts.passages)
    else:
        yield from texts.documents


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens, and without a warning that a model can't take so many at once."""
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def _rendered(texts: Texts, tokenizer: Any) -> Iterator[str]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{texts.name} holds conversations and the tokenizer has no chat template: give rows of text, or a "
            "tokenizer with one"
        )
    try:
        for conversation in texts.conversations:
            yield tokenizer.apply_chat_template(list(conversation), tokenize=False)
    except Exception as error:  # the template is the tokenizer's own program and raises what it likes
        raise DataError(
            f"{texts.name} doesn't fit the tokenizer's chat template ({first_line(error)}): mend the roles of its "
            "messages, or give rows of text"
        ) from error
