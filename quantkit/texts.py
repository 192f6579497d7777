"""The texts that calibration and evaluation read: SPEC in, documents or token ids out.

A SPEC is, in the order in which it is understood:

- a known name (KNOWN), read from DATA_DIR/<name>/ or else from the hub;
- a file: .txt (one document), .jsonl, .json, .parquet; FILE:field for a field other than those that are looked for;
- a folder made by `Dataset.save_to_disk`;
- a hub data set, org/name[:config[:split]].

Rows are read by what they hold: `input_ids` are tokens, `context` with `continuation` is a passage, `text` is a
document, `messages` is a conversation. Nothing is shuffled, filtered or cut.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from quantkit.errors import DataError

Kind = Literal["text", "tokens", "passages", "messages"]
Purpose = Literal["evaluation", "calibration"]
Row = dict[str, Any]

SEPARATOR = "\n\n"
PLAIN_ENDINGS = (".txt", ".raw", ".tokens")
ENDINGS = (".txt", ".jsonl", ".json", ".parquet", ".raw", ".tokens")
# Endings that tell a missing file from a hub data set: the hub's names may hold dots as well.
FILE_ENDINGS = (*ENDINGS, ".arrow", ".csv", ".gz", ".md", ".tsv", ".xml", ".zip", ".zst")
NOT_DATA = ("source", "readme", "license", "licence", "notice")


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
    """A 1-D int64 tensor of token ids, and the UTF-8 bytes of the text they stand for (None: it came as tokens)."""

    ids: torch.Tensor
    utf8_bytes: int | None


@dataclass(frozen=True)
class Known:
    """Where the hub keeps a data set that has a name of its own here."""

    path: str
    config: str | None
    splits: dict[Purpose, str]
    files: dict[Purpose, str] | None = None  # one file of a data set too large to load whole, by its split
    revision: str | None = None
    column: str | None = None
    limit: int | None = None  # so many documents from the start, and the name says so


KNOWN: dict[str, Known | None] = {
    "wikitext2": Known("Salesforce/wikitext", "wikitext-2-raw-v1", {"evaluation": "test", "calibration": "train"}),
    # 1,100 documents: what GPTQ's C4 perplexity reads.
    "c4": Known(
        "allenai/c4",
        None,
        {"evaluation": "validation", "calibration": "train"},
        files={
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
            "calibration": "en/c4-train.00000-of-01024.json.gz",
        },
        limit=1100,
    ),
    # Its loading script is no longer run by `datasets`; the hub's own conversion is.
    "ptb": Known(
        "ptb-text-only/ptb_text_only",
        None,
        {"evaluation": "test", "calibration": "train"},
        files={
            "evaluation": "penn_treebank/test/0000.parquet",
            "calibration": "penn_treebank/train/0000.parquet",
        },
        revision="refs/convert/parquet",
        column="sentence",
    ),
    "lambada": Known("EleutherAI/lambada_openai", "default", {"evaluation": "test", "calibration": "test"}),
    "demo": None,
}


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
        return _known(text, purpose, data_dir, token, cache_dir)
    path, column = _split_field(text)
    if path.is_dir():
        return _saved_folder(path, text, purpose)
    if path.is_file():
        return _interpret(_file_rows(path, column), column, text)
    if _looks_like_a_path(text):
        raise DataError(f"{text} doesn't exist: give a {', '.join(ENDINGS[:4])} file or a save_to_disk folder")
    parts = text.split(":", 2)  # a split may hold colons: train[:10%]
    if parts[0].count("/") != 1 or not all(parts):
        raise DataError(
            f"{text!r} is no known data set: give a file, a folder, one of {', '.join(KNOWN)}, or a data set of the "
            "hub as org/name[:config[:split]]"
        )
    return _hub(text, parts, purpose, token, cache_dir)


def tokenize(texts: Texts, tokenizer: Any = None) -> Tokens:
    """All tokens of the texts: documents joined by two newlines, no special token added, encoded in one go.

    In one go, because a tokenizer may merge across any place where the text could be cut. Conversations are rendered by
    the tokenizer's chat template first; a passage is its context with its continuation. Raises DataError without a
    tokenizer (or chat template) where one is needed.
    """
    if texts.token_ids is not None:
        return Tokens(texts.token_ids, None)
    if tokenizer is None:
        raise DataError(
            f"{texts.name} is text and the model has no tokenizer: put the tokenizer's files in the model's folder, or "
            "give rows of input_ids"
        )
    if texts.kind == "messages":
        documents = _rendered(texts, tokenizer)
    elif texts.kind == "passages":
        documents = [context + continuation for context, continuation in texts.passages]
    else:
        documents = list(texts.documents)
    joined = SEPARATOR.join(documents)
    ids = encode(tokenizer, joined)
    if not ids:
        raise DataError(f"the tokenizer makes no token of {texts.name}: check that both are of the same language")
    return Tokens(torch.tensor(ids, dtype=torch.int64), len(joined.encode()))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens, and without a warning that a model can't take so many at once."""
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def _rendered(texts: Texts, tokenizer: Any) -> list[str]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{texts.name} holds conversations and the tokenizer has no chat template: give rows of text, or a "
            "tokenizer with one"
        )
    try:
        return [tokenizer.apply_chat_template(list(c), tokenize=False) for c in texts.conversations]
    except Exception as error:  # the template is the tokenizer's own program and raises what it likes
        raise DataError(
            f"{texts.name} doesn't fit the tokenizer's chat template ({_first_line(error)}): mend the roles of its "
            "messages, or give rows of text"
        ) from error


# Files and folders


def _split_field(spec: str) -> tuple[Path, str | None]:
    """The path of a SPEC and the field after its last colon, where what stands before the colon is a file."""
    path = Path(spec).expanduser()
    if path.exists() or ":" not in spec:
        return path, None
    head, column = spec.rsplit(":", 1)
    path = Path(head).expanduser()
    if path.is_file() and column:
        return path, column
    return Path(spec).expanduser(), None


def _looks_like_a_path(spec: str) -> bool:
    head = spec.split(":", 1)[0]
    return head.startswith((".", "/", "~")) or head.count("/") > 1 or head.lower().endswith(FILE_ENDINGS)


def _file_rows(path: Path, column: str | None) -> Iterable[Row]:
    ending = path.suffix.lower()
    if ending in PLAIN_ENDINGS:
        if column is not None:
            raise DataError(f"{path}:{column} asks for a field, and a {ending} file has none: leave out :{column}")
        return [{"text": _decoded(path)}]
    if ending == ".jsonl":
        return _json_lines(path, _decoded(path))
    if ending == ".json":
        return _json_rows(path)
    if ending == ".parquet":
        return _parquet_rows(path, column)
    raise DataError(f"{path} ends in {ending or 'nothing'}: expected one of {', '.join(ENDINGS[:4])}; convert it")


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} isn't UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}): convert it to UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}): check its permissions") from error


def _json_lines(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            raise DataError(f"{path} line {number} isn't JSON ({reason}): expected one object a line") from error
    return _objects(rows, path)


def _json_rows(path: Path) -> list[Row]:
    """A list of objects or strings, one object, or (as many .json files are) one object a line."""
    text = _decoded(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _json_lines(path, text)
        raise DataError(
            f"{path} line {error.lineno} isn't JSON ({error.msg}): expected a list of objects or one object a line"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path} is JSON nested too deeply: expected a list of objects") from error
    return _objects(value if isinstance(value, list) else [value], path)


def _objects(rows: list[Any], path: Path) -> list[Row]:
    """The rows, a bare string being a row of text."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, (dict, str)):
            raise DataError(
                f'{path} row {number} is a {type(row).__name__}: expected an object such as {{"text": ...}}'
            )
    return [{"text": row} if isinstance(row, str) else row for row in rows]


def _parquet_rows(path: Path, column: str | None) -> list[Row]:
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

    try:
        names = pq.read_schema(path).names
        wanted = [column] if column is not None else _columns(names, str(path))
        if not set(wanted) <= set(names):
            raise DataError(f"{path} has no field {column!r}: it has {', '.join(names)}; give {path}:FIELD")
        rows: list[Row] = pq.read_table(path, columns=wanted).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} isn't a readable parquet file ({_first_line(error)}): write it again") from error
    return rows


def _saved_folder(path: Path, spec: str, purpose: Purpose) -> Texts:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is a folder that save_to_disk didn't make ({_first_line(error)}): give a file in it instead"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        split = _default_split(list(saved), purpose, spec, f"{spec}/SPLIT")
        return _interpret(_dataset_rows(saved[split], None, spec), None, f"{spec}/{split}")
    return _interpret(_dataset_rows(saved, None, spec), None, spec)


def _default_split(splits: Sequence[str], purpose: Purpose, spec: str, remedy: str) -> str:
    """The only split; else the one that the purpose asks for."""
    if len(splits) == 1:
        return splits[0]
    for split in ("test", "validation") if purpose == "evaluation" else ("train",):
        if split in splits:
            return split
    raise DataError(f"{spec} has the splits {', '.join(splits)}: choose one with {remedy}")


def _dataset_rows(dataset: Any, column: str | None, spec: str) -> Iterable[Row]:
    names = list(dataset.column_names)
    wanted = [column] if column is not None and column in names else _columns(names, spec)
    rows: Iterable[Row] = dataset.select_columns(wanted)
    return rows


# Known names and the hub


def _known(name: str, purpose: Purpose, data_dir: str | Path | None, token: str | None, cache_dir: str | None) -> Texts:
    known = KNOWN[name]
    if known is None:
        from quantkit.demo import corpus

        text = corpus.held_out_text() if purpose == "evaluation" else corpus.training_text()
        return _interpret([{"text": text}], None, name)
    if data_dir is not None:
        path = _known_file(name, purpose, Path(data_dir).expanduser() / name)
        if name == "wikitext2" and path.suffix.lower() in (".raw", ".tokens", ".txt"):
            return _interpret(_wikitext_lines(_decoded(path)), None, name)
        return _interpret(_file_rows(path, None), None, name, last_word=name == "lambada")
    split = known.splits[purpose]
    dataset = _load_hub(name, known, split, purpose, token, cache_dir)
    if known.limit is not None and len(dataset) > known.limit:
        dataset = dataset.select(range(known.limit))
        name = f"{name} (the first {known.limit:,} documents of {known.files[purpose] if known.files else split})"
    rows = _dataset_rows(dataset, known.column, name)
    return _interpret(rows, known.column, name, last_word=known is KNOWN["lambada"])


def _known_file(name: str, purpose: Purpose, folder: Path) -> Path:
    """The one file of DATA_DIR/<name>/ that the purpose asks for: by its name where there are several."""
    if not folder.is_dir():
        raise DataError(f"{folder} doesn't exist: put {name} there, or leave out --data-dir to take it from the hub")
    files = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix.lower() in ENDINGS and path.stem.lower() not in NOT_DATA
    )
    if not files:
        raise DataError(f"{folder} holds no {', '.join(ENDINGS[:4])} or .raw file: put one of {name} there")
    if len(files) == 1:
        return files[0]
    for word in ("test", "valid") if purpose == "evaluation" else ("train", "valid"):
        found = [path for path in files if word in path.name.lower()]
        if len(found) == 1:
            return found[0]
    listed = ", ".join(path.name for path in files)
    raise DataError(f"{folder} holds {listed}, and none is alone in being for {purpose}: give the file itself")


def _wikitext_lines(text: str) -> list[Row]:
    """The rows that the hub's data set has: a line with its newline each, blank ones empty.

    The papers' protocol joins these rows by two newlines; the file as it stands would be another text.
    """
    lines = text.removesuffix("\n").split("\n")
    return [{"text": line + "\n" if line.strip() else ""} for line in lines]


def _load_hub(name: str, known: Known, split: str, purpose: Purpose, token: str | None, cache_dir: str | None) -> Any:
    """A known data set's split from the hub (or from the hub's cache when offline)."""
    import datasets

    files = None if known.files is None else {split: known.files[purpose]}
    try:
        return datasets.load_dataset(
            known.path,
            known.config,
            split=split,
            data_files=files,
            revision=known.revision,
            token=token,
            cache_dir=cache_dir,
            verification_mode="no_checks" if files else None,
        )
    except Exception as error:  # whatever datasets, the hub or the network raise
        raise DataError(
            f"{name} can't be had from the hub ({_first_line(error)}): go online once, or put the files in DIR/{name}/ "
            "and give --data-dir DIR"
        ) from error


def _hub(spec: str, parts: list[str], purpose: Purpose, token: str | None, cache_dir: str | None) -> Texts:
    import datasets

    path = parts[0]
    config = parts[1] if len(parts) > 1 else None
    split = parts[2] if len(parts) > 2 else None
    try:
        if split is None:
            splits = datasets.get_dataset_split_names(path, config, token=token)
            split = _default_split(splits, purpose, spec, f"{path}:{config or 'default'}:SPLIT")
            spec = f"{path}:{config or 'default'}:{split}"
        dataset = datasets.load_dataset(path, config, split=split, token=token, cache_dir=cache_dir)
    except DataError:
        raise
    except Exception as error:  # whatever datasets, the hub or the network raise
        raise DataError(
            f"{spec} can't be had from the hub ({_first_line(error)}): check it against org/name[:config[:split]], or "
            "give a file"
        ) from error
    return _interpret(_dataset_rows(dataset, None, spec), None, spec)


# Rows


def _columns(names: Sequence[str], where: str) -> list[str]:
    """Which of a row's fields are read when none is named."""
    for wanted in (["input_ids"], ["context", "continuation"], ["text"], ["messages"]):
        if set(wanted) <= set(names):
            return wanted
    found = ", ".join(names) if names else "no field"
    raise DataError(
        f"{where} has none of the fields input_ids, text, messages, or context with continuation (it has {found}): "
        "name the one to read with FILE:field"
    )


def _interpret(rows: Iterable[Row], column: str | None, name: str, last_word: bool = False) -> Texts:
    """The texts of rows; with `last_word` a row of text is a passage whose continuation is its last word."""
    rows = list(rows)
    if not rows:
        raise DataError(f"{name} holds no row: give a data set with text in it")
    if column is None:
        wanted = _columns(list(rows[0]), name)
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
    content = (json.dumps(messages, sort_keys=True) for messages in conversations)
    return Texts(name, "messages", _fingerprint(content, name), conversations=tuple(conversations))


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


def _first_line(error: BaseException) -> str:
    """The first line of a message of someone else's."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
