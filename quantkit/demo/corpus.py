"""The demo's text: English that every CPython carries, so that the demo needs no network and no data file.

A document is one topic of `help()` (`pydoc_data.topics`) or all docstrings of one module of the standard
library, read from its source with `ast` (no module is imported for its docstrings). A hash of a document's
name puts it into training (nine in ten) or holds it out, so that it stays on its side whatever the version of
Python. Topics and docstrings quote one another at length: a paragraph is kept only in the document where it
comes first, so that one Python's held-out text shares none with the same Python's training text.

The demo model was trained on the text of one Python (its card, `model/README.md`, says which). Another version's
held-out text can share a few paragraphs with that: one that moved between documents of the two sides.
"""

import ast
import functools
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import DataError

HELD_OUT_ONE_IN = 10
# Tests and their data, and programs whose docstrings are labels of menus.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idlelib", "turtledemo"})
# Characters. Shorter paragraphs are headings and stock phrases ("Optional arguments are:") and may repeat.
LONG_PARAGRAPH = 60


@dataclass(frozen=True)
class Document:
    """A named text: `topics/assert`, `json.decoder`."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the SHA-256 of the name falls on the held-out tenth."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def documents() -> list[Document]:
    """The documents of the running Python in the order of their names.

    Raises:
        DataError: this Python was installed without its help topics or without the sources of its library.
    """
    return list(_documents(Path(sysconfig.get_path("stdlib"))))


def training_text() -> str:
    """The documents for training, of the running Python, joined by two newlines."""
    return "\n\n".join(document.text for document in documents() if not document.held_out)


def held_out_text() -> str:
    """The held-out documents of the running Python, joined by two newlines.

    On the Python that the demo model was trained on it saw none of their long paragraphs; another version's can hold a
    few that it did see.
    """
    return "\n\n".join(document.text for document in documents() if document.held_out)


@functools.lru_cache(maxsize=1)
def _documents(stdlib: Path) -> tuple[Document, ...]:
    topics, modules = list(_topics()), list(_modules(stdlib))
    for found, what in ((topics, "help topics (pydoc_data.topics)"), (modules, "docstrings in its sources")):
        if not found:
            raise DataError(
                f"the demo text needs a CPython with {what}, and {stdlib} has none: "
                "use a full CPython 3.11 or newer, or name a text file of your own"
            )
    seen: set[str] = set()
    unique = (Document(each.name, _unseen_paragraphs(each.text, seen)) for each in topics + modules)
    return tuple(sorted((each for each in unique if each.text), key=lambda each: each.name))


def _topics() -> Iterator[Document]:
    """The help topics, longest first: the short ones are mostly excerpts of the long ones."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        yield Document(f"topics/{name}", text)


def _modules(stdlib: Path) -> Iterator[Document]:
    """The docstrings of each module below `stdlib`, in the order of the modules' names."""
    sources = (path.relative_to(stdlib) for path in stdlib.rglob("*.py"))
    # A folder that is no identifier holds no module: site-packages, config-3.13-x86_64-linux-gnu.
    wanted = (path for path in sources if all(map(str.isidentifier, path.with_suffix("").parts)))
    named = {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path
        for path in wanted
        if not SKIPPED_FOLDERS.intersection(path.parts)
    }
    for name, path in sorted(named.items()):
        text = "\n\n".join(_docstrings((stdlib / path).read_bytes()))
        if text:
            yield Document(name, text)


def _docstrings(source: bytes) -> Iterator[str]:
    """The docstrings of a module, its classes and functions in source order; none where it doesn't parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
        if isinstance(node, ast.mod | ast.stmt):  # expressions hold no docstring
            pending.extend(reversed(list(ast.iter_child_nodes(node))))


def _unseen_paragraphs(text: str, seen: set[str]) -> str:
    """`text` without the paragraphs in `seen`, to which its own are added; blank lines part paragraphs."""
    kept = []
    for paragraph in re.split(r"\n(?:[ \t]*\n)+", text.strip("\n")):
        words = " ".join(paragraph.split())
        if words and words not in seen:
            kept.append(paragraph.rstrip())
        if len(words) >= LONG_PARAGRAPH:
            seen.add(words)
    return "\n\n".join(kept)
