"""What a stranger's checkpoint holds, before anything believes it: texts that end, stay in their folder, can be shown.

Nothing here needs torch. docs/security.md says what is guarded by this and what isn't.
"""

import importlib
import json
import re
import stat
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError, QuantkitError

LARGEST_JSON = 64 * 2**20
"""Bytes of the largest JSON file that is read: the index of a mixture of 60,000 experts has 8 MiB."""

LONGEST_NAME = 512
"""Characters of a tensor's name; transformers' longest have some 100."""

LONGEST_REGEX = 10_000
REGEX_SECONDS = 5.0
"""What one regex may take in all: over the 60,000 names of a large mixture a usual one takes a tenth of a second."""

BRACE = re.compile(r"(?<!\\)\{(?!\d*,?\d*\})")
"""What `re` takes for a brace and `regex` for a word of its own; no module's name has one."""

SHOWN = 200
"""Characters of a value that a message shows."""

COUNTED = re.compile("(layers?|labels|blocks|depth)$")
MOST_COUNT = 100_000
"""The largest number of layers, or of what else transformers makes a list of, that a config may ask for."""

ADAPTER = "adapter_config.json"
WEIGHTS_KEY = "transformers_weights"
"""A config's own name for its weights, which transformers prefers to the usual ones."""
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Keys of a config that may name kernels on the hub, as owner/name."""

DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
"""Characters that turn the direction of writing, or can't be seen at all."""

BLOBS = "blobs"
"""Where the hub's cache keeps the files that a snapshot's links lead to: `models--owner--name/blobs`."""


def read_json(path: Path, remedy: str) -> Any:
    """The value of a JSON file of a checkpoint.

    Raises:
        CheckpointError: it can't be read, is too large or no JSON, or gives a key twice.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise CheckpointError(f"{path} has {size:,} bytes, more than {LARGEST_JSON:,} that are read; {remedy}")
        return unambiguous(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({shown(error, str)}); {remedy}") from error


def unambiguous(text: bytes) -> Any:
    """The value of JSON in which no object gives a key twice, about which readers would differ; or ValueError."""
    return json.loads(text.decode("utf-8"), object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{shown(next(key for key in keys if keys.count(key) > 1))} is given twice")
    return found


def shown(value: object, how: Callable[[object], str] = repr) -> str:
    """A value for a message, cut to a length that can be read; of a number too long for Python the kind."""
    try:
        text = how(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"


def printable(text: str, keep: str = "") -> str:
    """The text with what a terminal would obey, or can't show, written as `\\u001b`; characters to keep stay.

    That is control characters (colours, the cursor), what turns the direction of writing, line and paragraph
    separators, and halves of surrogate pairs. Joiners, which some scripts and emoji need, stay.
    """
    if text.isprintable():
        return text
    return "".join(each if each in keep or not _is_odd(each) else _escaped(each) for each in text)


def _is_odd(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in DIRECTIONS


def _escaped(character: str) -> str:
    """As JSON and Python write it, so that JSON stays JSON."""
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[place] << 8 | units[place + 1]:04x}" for place in range(0, len(units), 2))


def name_trouble(name: str) -> str | None:
    """Why a text can't be a tensor's name, or None.

    Other software takes names apart at their digits and prints them, so that only plain ones are let in.
    """
    if not name or len(name) > LONGEST_NAME:
        return f"has {len(name):,} characters where 1 to {LONGEST_NAME} are expected"
    if not name.isprintable():
        return "holds characters that cannot be printed"
    if any(each.isdigit() and not each.isascii() for each in name):
        return "holds digits other than 0 to 9"
    return None


def refuse_links(folder: Path) -> None:
    """Return nothing; raise CheckpointError when a link in the folder leads to a file outside of it.

    What it led to would be read, copied and perhaps pushed as a part of the model. Links of the hub's cache lead from
    a snapshot to the blobs beside it, and may.
    """
    inside = folder.resolve()
    try:
        for path in folder.iterdir():
            if not path.is_symlink() or not path.exists():
                continue
            target = path.resolve()
            blob = target.parent.name == BLOBS and target.parent.parent.name.startswith("models--")
            if not (target.is_relative_to(inside) or blob):
                raise CheckpointError(
                    f"{path} is a link to {target}, outside of the model's folder; copy what it leads to there if it "
                    "belongs to the model, or remove it"
                )
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error}); check its permissions") from error


def refuse_counts(config: Mapping[str, Any], path: Path) -> None:
    """Return nothing; raise CheckpointError when a config counts more layers or the like than any model has.

    transformers makes lists of as many while it reads the config, before any tensor can be looked at.
    """
    waiting: list[Any] = [config]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        for key, value in part.items() if isinstance(part, dict) else ():
            waiting.append(value)
            if isinstance(value, (int, float)) and COUNTED.search(key) and value > MOST_COUNT:
                raise CheckpointError(
                    f"{shown(key, str)} is {shown(value)} in {path}, more than any model has; mend or download it again"
                )


def refuse_elsewhere(config: Mapping[str, Any], name: str, *, trusted: bool) -> None:
    """Return nothing; raise CheckpointError where transformers would load what the config names: a file, or a kernel.

    Kernels are code from the hub; whoever trusts a model's code may trust them.
    """
    if config.get(WEIGHTS_KEY) is not None:
        raise CheckpointError(
            f"{name}'s config.json says that its weights are in {shown(config[WEIGHTS_KEY])} ({WEIGHTS_KEY}), and "
            "quantkit reads model.safetensors or its shards; rename the file and take the key out"
        )
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in IMPLEMENTATIONS:
            named = part.get(key)
            texts = named.values() if isinstance(named, dict) else (named,)
            if not trusted and any("/" in text for text in texts if isinstance(text, str)):
                raise CheckpointError(
                    f"{name}'s config.json asks for code from the hub ({key} {shown(named)}); take the key out, or "
                    "pass --trust-remote-code if you trust that code"
                )


def refuse_adapter(folder: Path) -> None:
    """Return nothing; raise CheckpointError when an adapter lies beside a model: only some software would apply it."""
    if (folder / ADAPTER).exists() and (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER}), which transformers applies where peft is installed, and quantkit "
            "does not; merge it into the model first (merge_and_unload of peft), or remove it"
        )


def is_plain_file(path: Path) -> bool:
    """Whether a path is a file, links followed: no folder, pipe or device, and a name that the file system takes."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def regex_trouble(pattern: str) -> str | None:
    """Why a text is no regex that is taken from a config or recipe, or None."""
    if len(pattern) > LONGEST_REGEX:
        return f"it has {len(pattern):,} characters, more than {LONGEST_REGEX:,}"
    try:
        _timed(pattern)
    except QuantkitError:
        raise
    except Exception as error:  # of two compilers, on text that may be anything
        return shown(error, str)
    return None


def fits(pattern: str, name: str) -> bool:
    """Whether a regex matches a name from its start.

    Raises:
        QuantkitError: it is no regex, or takes too long, as `(a|a)*$` does on a name of many a's.
    """
    trouble = regex_trouble(pattern)
    if trouble is not None:
        raise QuantkitError(f"{shown(pattern)} is not a regular expression: {trouble}; mend it")
    return _timed(pattern).fits(name)


def first_fit(name: str, targets: Iterable[str]) -> str | None:
    """The first of these targets, `re:REGEX`, that matches a name from its start, or None."""
    return next((target for target in targets if fits(target[3:], name)), None)


def _weight(parsed: Any) -> int:
    """How many single steps a parsed regex has when its repeats are written out: a compiler may do that."""
    total = 1
    for operation, value in parsed:
        word = str(operation)
        if word in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, body = value
            times = int(least) if str(most) == "MAXREPEAT" else int(most)
            total += max(1, times) * _weight(body)
        elif word == "BRANCH":
            total += sum(map(_weight, value[1]))
        else:  # groups and assertions hold a regex in their last places
            parts = value if isinstance(value, (tuple, list)) else ()
            total += 1 + sum(_weight(part) for part in parts if type(part).__name__ == "SubPattern")
    return total


class _Timed:
    """A regex and the seconds that it took.

    It is matched by the package `regex`, which comes with transformers and, unlike `re`, can be told when to stop.
    """

    def __init__(self, pattern: str) -> None:
        import regex

        if BRACE.search(pattern):
            raise ValueError("a brace in it holds no count")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what later versions of Python may read otherwise
            weight = _weight(importlib.import_module("re._parser").parse(pattern))
            if weight > LONGEST_REGEX:
                raise ValueError(f"its repeats make {weight:,} steps, more than {LONGEST_REGEX:,}")
            re.compile(pattern)  # what the formats' own software would take
        self.pattern, self.spent = pattern, 0.0
        self._match = regex.compile(pattern).match

    def fits(self, name: str) -> bool:
        """Whether it matches a name from its start."""
        started = time.perf_counter()
        try:
            found = self._match(name, timeout=max(REGEX_SECONDS - self.spent, 1e-3))
        except TimeoutError as error:
            raise QuantkitError(
                f"the regular expression {shown(self.pattern)} takes more than {REGEX_SECONDS:g} s on names like "
                f"{shown(name)}; write it without a repeat inside of a repeat"
            ) from error
        self.spent += time.perf_counter() - started
        return found is not None


_timed = cache(_Timed)
