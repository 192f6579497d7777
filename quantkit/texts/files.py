"""Rows of a file: .txt, .jsonl, .json, .parquet."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantkit.errors import DataError
from quantkit.texts.rows import Row, columns_of, first_line
from quantkit.untrusted import is_plain_file

PLAIN_ENDINGS = (".txt", ".raw", ".tokens")
ENDINGS = (".txt", ".jsonl", ".json", ".parquet", ".raw", ".tokens")
# Endings that tell a missing file from a hub data set: the hub's names may hold dots as well.
FILE_ENDINGS = (*ENDINGS, ".arrow", ".csv", ".gz", ".md", ".tsv", ".xml", ".zip", ".zst")


def split_field(spec: str) -> tuple[Path, str | None]:
    """The path of a SPEC and the field after its last colon, where what stands before the colon is a file."""
    path = expanded(spec)
    if exists(path) or ":" not in spec:
        return path, None
    head, column = spec.rsplit(":", 1)
    file = expanded(head)
    return (file, column) if is_plain_file(file) and column else (path, None)


def expanded(path: str | Path) -> Path:
    """The path with the home folder that a ~ means, where there is one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; a name that no file system takes is none."""
    try:
        return path.exists()
    except OSError:
        return False


def looks_like_a_path(spec: str) -> bool:
    """Whether a SPEC that is no file or folder was meant to be one."""
    head = spec.split(":", 1)[0]
    return head.startswith((".", "/", "~")) or head.count("/") > 1 or head.lower().endswith(FILE_ENDINGS)


def file_rows(path: Path, column: str | None) -> Iterable[Row]:
    """The rows of a file, read as its ending says; a plain text is one row."""
    ending = path.suffix.lower()
    if ending in PLAIN_ENDINGS:
        if column is not None:
            raise DataError(f"{path}:{column} asks for a field, and a {ending} file has none: leave out :{column}")
        return [{"text": decoded(path)}]
    if ending == ".jsonl":
        return _json_lines(path, decoded(path))
    if ending == ".json":
        return _json_rows(path)
    if ending == ".parquet":
        return _parquet_rows(path, column)
    raise DataError(f"{path} ends in {ending or 'nothing'}: expected one of {', '.join(ENDINGS[:4])}; convert it")


def decoded(path: Path) -> str:
    """The file's text, which must be UTF-8."""
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
    text = decoded(path)
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
    except ValueError as error:  # a whole number of thousands of digits
        raise DataError(f"{path} isn't JSON ({first_line(error)}): expected a list of objects") from error
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
        wanted = [column] if column is not None else columns_of(names, str(path))
        if not set(wanted) <= set(names):
            raise DataError(f"{path} has no field {column!r}: it has {', '.join(names)}; give {path}:FIELD")
        rows: list[Row] = pq.read_table(path, columns=wanted).to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} isn't a readable parquet file ({first_line(error)}): write it again") from error
    return rows
