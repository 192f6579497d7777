"""What goes wrong in a process that a test has forked: a signal or an error of the disk at the N-th step, a full disk.

A step is whatever changes the disk below a folder: a file that is opened to be written, written (half of it is there
when the step fails), synced, renamed, removed or given a mode, a folder that is made, removed or synced. Python tells
of most through audit hooks; `os.fsync`, `Path.write_text` and safetensors' `save_file`, which writes natively to a file
`.tmp...` beside, are wrapped. Steps are counted from 1, and each is told before it happens.
"""

import ctypes
import errno
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NATIVE = ".tmpAbCdEf"
"""As safetensors names what it writes before it is renamed."""


class Steps:
    """Counts the steps below a folder, keeps a log of them, and lets one of them go wrong.

    Args:
        base: the folder.
        at: the number of the step that goes wrong; 0 for none.
        how: the name of a signal or of an error of the disk.
        log: a file, outside of the folder, that gets a line a step: its kind, inode, size and paths.
    """

    def __init__(self, base: str, at: int = 0, how: str = "SIGKILL", log: str | None = None) -> None:
        self.base, self.at, self.how = os.path.realpath(base), at, how
        self.number = 0
        self.inside = False
        self.disk = Disk(self.base) if how.startswith("CUT") else None
        self.log = None if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def step(self, kind: str, *paths: Any, half: Callable[[], object] | None = None) -> None:
        """A step is about to happen; `half` does the half of it."""
        names = [os.fspath(path) for path in paths]
        if self.inside or not any(name == self.base or name.startswith(self.base + os.sep) for name in names):
            return
        self.number += 1
        self.inside = True
        try:
            if self.log is not None:
                there = os.stat(names[0]) if os.path.exists(names[0]) else None  # noqa: PTH110, PTH116
                what = (kind, there and there.st_ino, there and there.st_size, *names)
                os.write(self.log, ("\t".join(map(str, what)) + "\n").encode())
            if self.number != self.at:
                if self.disk is not None:
                    self.disk.before(kind, names)
                return
            if half is not None:
                half()
            if self.disk is not None:
                self.disk.cut(old=self.how == "CUT-OLD")
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, self.how))
                return
            number = getattr(errno, self.how)
            if kind == "save":
                from safetensors import SafetensorError

                Path(names[0]).with_name(NATIVE).unlink(missing_ok=True)  # as it does itself
                raise SafetensorError(f"Error preparing file: I/O error: {os.strerror(number)} (os error {number})")
            raise OSError(number, os.strerror(number), names[0])
        finally:
            self.inside = False

    def audit(self, event: str, words: tuple[Any, ...]) -> None:
        """What Python is about to do."""
        if self.inside:
            return
        if event == "open" and isinstance(words[0], (str, os.PathLike)):
            path, _, flags = words
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.step("open", os.path.abspath(path))  # noqa: PTH100
        elif event == "os.rename":
            self.step("rename", *(os.path.abspath(path) for path in words[:2]))  # noqa: PTH100
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.chmod"):
            folder = words[-1] if isinstance(words[-1], int) and words[-1] >= 0 else None
            above = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd()  # noqa: PTH109, PTH115
            path = os.path.join(above, words[0])  # noqa: PTH118
            if event != "os.mkdir" or not os.path.isdir(path):  # noqa: PTH112  (where a folder is, nothing is made)
                self.step(event.removeprefix("os."), path)

    def install(self) -> "Steps":
        """Watch from now on, to the end of the process."""
        from quantkit import shards

        sync, save, write = os.fsync, shards.save_file, Path.write_text

        def fsync(handle: int) -> None:
            path = os.readlink(f"/proc/self/fd/{handle}")  # noqa: PTH115
            self.step("fsync", path)
            sync(handle)
            if self.disk is not None:
                self.disk.synced(path)

        def save_file(tensors: Any, path: Path, **words: Any) -> None:
            def half() -> None:
                save(tensors, path.with_name(NATIVE), **words)
                os.truncate(path.with_name(NATIVE), path.with_name(NATIVE).stat().st_size // 2)

            self.step("save", path, half=half)
            self.inside = True
            save(tensors, path, **words)
            self.inside = False

        def write_text(path: Path, data: str, **words: Any) -> int:
            self.step("write", path, half=lambda: write(path, data[: len(data) // 2], **words))
            return write(path, data, **words)

        os.fsync, shards.save_file, Path.write_text = fsync, save_file, write_text  # type: ignore[assignment]
        sys.addaudithook(self.audit)
        return self


class Disk:
    """What a power cut leaves of a folder: of what wasn't synced either all names stay, or none.

    In both cases the bytes that weren't synced are gone by half. A file's bytes are safe when the file was synced after
    they were written; its name, and that another is gone, when the folder was synced after.
    """

    def __init__(self, base: str) -> None:
        self.base = Path(base)
        self.stash = self.base.with_name(self.base.name + ".stash")
        self.stash.mkdir(exist_ok=True)
        self.safe: dict[int, tuple[int, int]] = {}
        self.undo: list[tuple[Path, Callable[[], object]]] = []

    def before(self, kind: str, names: list[str]) -> None:
        """Note how to undo what is about to happen to a folder."""
        path = Path(names[0])
        if kind in ("open", "mkdir") and not path.exists():
            self.undo.append((path.parent, lambda: self._remove(path)))
        elif kind == "remove" and path.exists():
            kept = self.stash / f"{os.getpid()}-{len(self.undo)}-{time.monotonic_ns()}"
            os.link(path, kept)
            self.undo.append((path.parent, lambda: (path.parent.mkdir(exist_ok=True), kept.replace(path))))
        elif kind == "rename":
            other = Path(names[1])
            self.undo.append((path.parent, lambda: other.replace(path)))

    @staticmethod
    def _remove(path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def synced(self, path: str) -> None:
        """What is safe from now on."""
        if Path(path).is_dir():
            self.undo = [(folder, undo) for folder, undo in self.undo if folder != Path(path)]
        else:
            found = os.stat(path)  # noqa: PTH116
            self.safe[found.st_ino] = (found.st_size, found.st_mtime_ns)

    def cut(self, *, old: bool) -> None:
        """Let the power go."""
        if old:
            for _, undo in reversed(self.undo):
                undo()
        for path in self.base.rglob("*"):
            found = path.stat()
            if path.is_file() and self.safe.get(found.st_ino) != (found.st_size, found.st_mtime_ns):
                os.truncate(path, found.st_size // 2)


def steps(**words: Any) -> None:
    """Let a step go wrong, or keep a log of all; see Steps."""
    Steps(**words).install()


def each(base: str, output: str, points: list[int], how: str, log: str) -> None:
    """Fork where the command begins to write, twice for each point: one child that fails there, and one that goes on.

    All that a command does before it writes is done once. `output` is moved away to `base`/N when it is there. The log
    gets a line a child: its point, its status, and what it said.
    """
    from quantkit import pipeline

    begin = pipeline.partial_folder

    def run(number: int) -> int:
        pid = os.fork()
        if pid == 0:
            Steps(base, number, how).install()
            said = os.open(f"{log}.{number}.said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 2)
        return pid

    def forked(*words: Any, **more: Any) -> Any:
        for point in points:
            for number in (point, 0):
                pid = run(number)
                if pid == 0:
                    return begin(*words, **more)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                said = Path(f"{log}.{number}.said").read_text(encoding="utf-8")
                there = [path.name for path in Path(base).iterdir() if path.is_dir()]
                with open(log, "a", encoding="utf-8") as file:  # noqa: PTH123
                    file.write(repr((point, number, status, said, there)) + "\n")
            if Path(output).exists():
                os.rename(output, f"{log}.{point}")  # noqa: PTH104
        os._exit(0)

    pipeline.partial_folder = forked


def signal_in(module: str, name: str, number: int, how: str, *, after: bool = False) -> None:
    """Send this process a signal at the N-th call of a function (or method, as `Class.name`), or just after it."""
    owner = sys.modules[module]
    *classes, leaf = name.split(".")
    for each_class in classes:
        owner = getattr(owner, each_class)
    call, count = getattr(owner, leaf), 0

    def counted(*words: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == number and not after:
            os.kill(os.getpid(), getattr(signal, how))
        made = call(*words, **more)
        if count == number and after:
            os.kill(os.getpid(), getattr(signal, how))
        return made

    setattr(owner, leaf, counted)


def change_in(module: str, name: str, number: int, path: str, place: int) -> None:
    """At the N-th call of a function another process flips a bit of a file, at a place counted from its end."""
    owner, count = sys.modules[module], 0
    call = getattr(owner, name)

    def counted(*words: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            content = bytearray(Path(path).read_bytes())
            content[-place] ^= 1
            Path(path).write_bytes(content)
        return call(*words, **more)

    setattr(owner, name, counted)


def wait_in(module: str, name: str, here: str, gone: str) -> None:
    """At the first call of a function make the file `here`, and wait until `gone` is there."""
    owner = sys.modules[module]
    call = getattr(owner, name)

    def waiting(*words: Any, **more: Any) -> Any:
        Path(here).touch()
        while not Path(gone).exists():
            time.sleep(0.01)
        return call(*words, **more)

    setattr(owner, name, waiting)


def largest_file(nbytes: int) -> None:
    """No file may be larger; Python ignores the signal, so that a write fails with EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def as_user(number: int) -> None:
    """Be a user that isn't root from now on."""
    os.setgroups([])
    os.setgid(number)
    os.setuid(number)


def mount(path: str, options: str) -> None:
    """Mount a small disk in memory, which this process and its children alone see and which goes with them."""
    library = ctypes.CDLL(None, use_errno=True)
    new_mounts, private, recursive = 0x20000, 1 << 18, 1 << 14
    for done in (
        lambda: library.unshare(new_mounts),
        lambda: library.mount(b"none", b"/", None, private | recursive, None),
        lambda: library.mount(b"tmpfs", path.encode(), b"tmpfs", 0, options.encode()),
    ):
        if done():
            os.write(2, f"no mount: {os.strerror(ctypes.get_errno())}".encode())
            os._exit(99)


def full(path: str, left: int, stored: str) -> None:
    """Fill the disk of a folder but for so many bytes, and run the command; then make room, and run it again.

    That there is too little room is not found out before. What the second gives in `out` is copied to `stored`.
    """
    from quantkit import pipeline

    pipeline.refuse_full_disk = lambda *_: None  # type: ignore[assignment]
    ballast = Path(path, "ballast")
    for room in (False, True):
        if room:
            ballast.unlink()
        else:
            status = os.statvfs(path)
            ballast.write_bytes(bytes(status.f_bavail * status.f_frsize - left))
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            return
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        there = sorted(each.name for each in Path(path).iterdir())
        os.write(1, f"\f{code} {there}\f".encode())
    shutil.copytree(Path(path, "out"), stored)
    os._exit(0)


def hub(endpoint: str, home: str) -> None:
    """Use another hub and a home of one's own, as `hub_client.point_to` does in the tests' process."""
    from huggingface_hub import constants

    constants.ENDPOINT = endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH = f"{home}/hub", f"{home}/token"
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True


def environment(values: dict[str, str]) -> None:
    """The process has these variables, as if a launcher had set them."""
    os.environ.update(values)


def constant(module: str, name: str, value: Any) -> None:
    """A module's constant has another value."""
    import importlib

    setattr(importlib.import_module(module), name, value)


def instead(module: str, name: str, arguments: dict[str, Any]) -> None:
    """The process runs this function and no command."""
    import importlib

    getattr(importlib.import_module(module), name)(**arguments)
    sys.stdout.flush()
    os._exit(0)


def slow(module: str, name: str, seconds: float) -> None:
    """A function takes so long more."""
    owner = sys.modules[module]
    call = getattr(owner, name)

    def delayed(*words: Any, **more: Any) -> Any:
        time.sleep(seconds)
        return call(*words, **more)

    setattr(owner, name, delayed)
