"""Commands of quantkit in processes of their own that start at once, and what one left; see `warmed`."""

import ast
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

SUPPORT = Path(__file__).parent

Call = tuple[str, dict[str, Any]]
"""A function of the module `sabotage`, and its arguments."""


class Ended(NamedTuple):
    """How a process ended: its exit code (or minus the signal), and what it said on stdout and stderr."""

    status: int
    said: str

    @property
    def lines(self) -> list[str]:
        """What it said but for progress."""
        return [line for line in self.said.splitlines() if not line.startswith(("quantizing: ", "verifying: "))]


@dataclass
class Child:
    """A command that runs."""

    forks: "Forks"
    pid: int
    output: Path

    def signal(self, how: signal.Signals) -> None:
        """Send it a signal; nothing happens where it has ended."""
        os.kill(self.pid, how)

    def wait(self) -> Ended:
        """How it ended, when it has."""
        status = int(self.forks.ask(wait=self.pid)["status"])
        begun = self.output.exists()  # a kill may come before
        return Ended(status, self.output.read_text(encoding="utf-8") if begun else "")


class Forks:
    """The process that forks, while the context lasts."""

    def __init__(self, model: Path) -> None:
        self.model = model

    def __enter__(self) -> "Forks":
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        paths = [str(SUPPORT), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        command = [sys.executable, "-P", SUPPORT / "warmed.py", self.model]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._answer() == {"ready": True}
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
        self._folder.cleanup()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline()
            assert line, "the process that forks is gone"
            if line.startswith("{"):
                return dict(json.loads(line))

    def ask(self, **task: Any) -> dict[str, Any]:
        """Its answer to a task."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def start(self, *words: object, calls: tuple[Call, ...] = (), cwd: Path | None = None) -> Child:
        """Start a command line."""
        self._count += 1
        output = Path(self._folder.name, f"{self._count}.txt")
        task = {"words": [str(word) for word in words], "output": str(output), "calls": calls, "cwd": str(cwd or "/")}
        return Child(self, self.ask(**task)["pid"], output)

    def run(self, *words: object, calls: tuple[Call, ...] = (), cwd: Path | None = None) -> Ended:
        """Run a command line to its end."""
        return self.start(*words, calls=calls, cwd=cwd).wait()


@dataclass
class Job:
    """A command line of `quantkit quantize` but for its output, and what it gives when nothing goes wrong.

    Attributes:
        before: seconds until OUT.partial is there.
        seconds: seconds from then until OUT is there.
    """

    forks: Forks
    model: Path
    words: tuple[object, ...]
    whole: dict[str, Any] = field(default_factory=dict)
    before: float = 0.0
    seconds: float = 0.0

    def line(self, output: Path) -> tuple[object, ...]:
        """The command line."""
        return ("quantize", self.model, "-o", output, *self.words)

    def start(self, output: Path, *calls: Call) -> Child:
        """Start it."""
        return self.forks.start(*self.line(output), calls=calls)

    def run(self, output: Path, *calls: Call) -> Ended:
        """Run it to its end."""
        return self.start(output, *calls).wait()

    def is_done(self, output: Path) -> None:
        """Fail unless the output is what it gives when nothing goes wrong, to the bit, with nothing beside it."""
        found = contents(output)
        assert set(found) == set(self.whole)
        assert [name for name in found if found[name] != self.whole[name]] == []
        assert not partial(output).exists()

    def goes_on(self, output: Path) -> Ended:
        """How the same command ended after something went wrong; its result must be as if nothing had."""
        ended = self.run(output)
        assert ended.status == 0, ended.said
        self.is_done(output)
        return ended

    def steps(self, folder: Path) -> list[list[str]]:
        """What is done to the disk, step by step: kind, inode, size, paths; the paths from the output's folder on."""
        base, log = folder / "steps", folder / "steps.txt"
        base.mkdir()
        ended = self.run(base / "out", ("steps", {"base": str(base), "log": str(log)}))
        assert ended.status == 0, ended.said
        self.is_done(base / "out")
        return [line.replace(f"{base}/", "").split("\t") for line in log.read_text().splitlines()]

    def each(self, folder: Path, points: list[int], how: str) -> list["Point"]:
        """What happened where the N-th step went wrong, for each N: that run, and the same command after it."""
        base, log = folder / "each", folder / "log"
        base.mkdir()
        words = {"base": str(base), "output": str(base / "out"), "points": points, "how": how, "log": str(log)}
        ended = self.run(base / "out", ("each", words))
        assert ended.status == 0, ended.said
        lines = [ast.literal_eval(line) for line in log.read_text().splitlines()]
        found = []
        for (number, _, *first), (_, _, *second) in zip(lines[::2], lines[1::2], strict=True):
            one, two = (Ended(status, said) for status, said, _ in (first, second))
            found.append(Point(number, one, first[2], two, folder / f"log.{number}"))
        assert [each.number for each in found] == points
        return found


class Point(NamedTuple):
    """What happened where one step went wrong, what was there then, and how the same command went after it."""

    number: int
    first: Ended
    left: list[str]
    second: Ended
    output: Path


def appears(*paths: Path) -> bool:
    """Whether one of these is there, at last; False after a minute."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if any(path.exists() for path in paths):
            return True
        time.sleep(0.001)
    return False


def kinds(steps: list[list[str]]) -> list[int]:
    """The numbers of steps of which each is the first of its kind: with files of that kind, whatever their numbers."""
    seen: dict[tuple[str, str], int] = {}
    for number, (kind, _, _, *paths) in enumerate(steps, 1):
        name = " ".join(path.translate(str.maketrans("", "", "0123456789")) for path in paths)
        seen.setdefault((kind, name), number)
    return list(seen.values())


def partial(output: Path) -> Path:
    """The folder of unfinished work."""
    return output.with_name(output.name + ".partial")


def contents(folder: Path) -> dict[str, Any]:
    """Every file's bytes, but for the report's seconds and memory."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    report = json.loads(found.pop("quantkit_report.json"))
    for key in ("seconds", "peak_memory_bytes", "predicted_memory_bytes"):
        del report[key]
    return found | {"quantkit_report.json": report}
