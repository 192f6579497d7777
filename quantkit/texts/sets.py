"""Data sets of `datasets`: folders of save_to_disk, names that are known here, and the hub."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import DataError
from quantkit.texts.files import ENDINGS, decoded, exists, expanded, file_rows
from quantkit.texts.rows import Purpose, Row, Texts, columns_of, first_line, interpret
from quantkit.untrusted import read_json, refuse_links, shown

SPLITS, STATE = "dataset_dict.json", "state.json"
"""Where save_to_disk says which splits there are, and which files a split has."""
NOT_DATA = ("source", "readme", "license", "licence", "notice")


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


def read_saved_folder(path: Path, spec: str, purpose: Purpose) -> Texts:
    """The texts of a folder that `save_to_disk` made."""
    import datasets

    try:
        _refuse_files_elsewhere(path)
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever datasets does with files that aren't its own
        raise DataError(
            f"{path} is a folder that save_to_disk didn't make ({first_line(error)}): give a file in it instead"
        ) from error
    split = None
    if isinstance(saved, datasets.DatasetDict):
        split = _default_split(list(saved), purpose, spec, f"{spec}/SPLIT")
    rows, name = _dataset_rows(saved if split is None else saved[split], None, spec), spec
    try:
        rows.data.validate(full=True)  # type: ignore[attr-defined]
        rows = list(rows)
    except Exception as error:  # of a table whose offsets lie, or whose values Python doesn't have
        raise DataError(f"{path} is damaged ({first_line(error)}): save it again") from error
    return interpret(rows, None, name if split is None else f"{spec}/{split}")


def _refuse_files_elsewhere(path: Path) -> None:
    """Return nothing; raise ValueError when a saved folder names a split or file outside of itself."""
    folders = [path]
    if (path / SPLITS).is_file():
        splits = read_json(path / SPLITS, "save it again")["splits"]
        folders = [path / _plain(name) for name in splits]
    for folder in folders:
        for file in read_json(folder / STATE, "save it again")["_data_files"]:
            _plain(file["filename"])
        refuse_links(folder)


def _plain(name: str) -> str:
    """The name, or ValueError for one that leads out of its folder."""
    if Path(name).name != name:
        raise ValueError(f"it names {shown(name)}, which is outside of it")
    return name


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
    wanted = [column] if column is not None and column in names else columns_of(names, spec)
    # Saved with a format, such as torch's for tokens, rows would hold tensors.
    rows: Iterable[Row] = dataset.select_columns(wanted).with_format(None)
    return rows


def read_known(
    name: str, purpose: Purpose, data_dir: str | Path | None, token: str | None, cache_dir: str | None
) -> Texts:
    """The texts of a known name, out of DATA_DIR/<name>/ or else from the hub."""
    known = KNOWN[name]
    if known is None:
        from quantkit.demo import corpus

        text = corpus.held_out_text() if purpose == "evaluation" else corpus.training_text()
        return interpret([{"text": text}], None, name)
    if data_dir is not None:
        path = _known_file(name, purpose, expanded(data_dir) / name)
        if name == "wikitext2" and path.suffix.lower() in (".raw", ".tokens", ".txt"):
            return interpret(_wikitext_lines(decoded(path)), None, name)
        return interpret(file_rows(path, None), None, name, last_word=name == "lambada")
    split = known.splits[purpose]
    dataset = _load_hub(name, known, split, purpose, token, cache_dir)
    if known.limit is not None and len(dataset) > known.limit:
        dataset = dataset.select(range(known.limit))
        name = f"{name} (the first {known.limit:,} documents of {known.files[purpose] if known.files else split})"
    rows = _dataset_rows(dataset, known.column, name)
    return interpret(rows, known.column, name, last_word=known is KNOWN["lambada"])


def _known_file(name: str, purpose: Purpose, folder: Path) -> Path:
    """The one file of DATA_DIR/<name>/ that the purpose asks for: by its name where there are several."""
    if not (exists(folder) and folder.is_dir()):
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
            f"{name} can't be had from the hub ({first_line(error)}): go online once, or put the files in DIR/{name}/ "
            "and give --data-dir DIR"
        ) from error


def read_hub(spec: str, parts: list[str], purpose: Purpose, token: str | None, cache_dir: str | None) -> Texts:
    """The texts of a hub data set given as path, config and split."""
    import datasets

    path = parts[0]
    config = parts[1] if len(parts) > 1 else None
    split = parts[2] if len(parts) > 2 else None
    try:
        if split is None:
            splits = datasets.get_dataset_split_names(path, config, token=token)
            split = _default_split(splits, purpose, spec, f"{path}:{config or 'CONFIG'}:SPLIT")
        dataset = datasets.load_dataset(path, config, split=split, token=token, cache_dir=cache_dir)
        spec = f"{path}:{config or dataset.config_name or 'default'}:{split}"
    except DataError:
        raise
    except Exception as error:  # whatever datasets, the hub or the network raise
        raise DataError(f"{spec} can't be had from the hub ({first_line(error)}): {_remedy(error, path)}") from error
    return interpret(_dataset_rows(dataset, None, spec), None, spec)


def _remedy(error: Exception, path: str) -> str:
    """What to do about a data set of the hub that can't be had."""
    said = str(error)
    if "OfflineModeIsEnabled" in said:
        return "unset HF_HUB_OFFLINE to fetch it once, or give a file"
    if "Couldn't reach" in said:
        return "check the network and HF_ENDPOINT, or give a file"
    if "cannot be accessed" in said or "gated" in said:
        return f"check its name, ask for access and give --token if {path} is private or gated, or give a file"
    return "check it against org/name[:config[:split]], or give a file"
