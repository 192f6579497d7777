"""A disk that is full, fails or can only be read, at every step: one sentence, and the same command goes on after."""

import os
import re
import sys

import pytest
from forks import contents, kinds, partial

REMEDIES = {
    "ENOSPC": (r"no space is left on the disk of \S+; free some or give another -o OUT$",),
    "EIO": (
        r"the disk of \S+ fails \(Input/output error at \S+\); check it or give another -o OUT$",
        r"is written and verified, and a power cut may take it away: the disk of",
    ),
    "EROFS": (r"the disk of \S+ can only be read; make it writable or give another -o OUT$",),
}
WRITES = ("open", "write", "save", "fsync", "rename", "mkdir")
"""What a full disk refuses."""


def check(job, points, how):
    """At each of these points the disk refused: exit 1 with one sentence, and the same command went on after."""
    for point in points:
        first, second = point.first, point.second
        errors = [line for line in first.lines if line.startswith("Error: ")]
        if first.status == 0:  # only what the run had kept could not be removed
            assert "is not removed yet" in first.said, (point.number, first.said)
        else:
            assert first.status == 1, (point.number, first.said)
            assert len(errors) == 1, (point.number, first.said)
            assert any(re.search(remedy, errors[0]) for remedy in REMEDIES[how]), (point.number, errors)
            rest = [line for line in first.lines if line not in errors]
            assert all(line.startswith("quantkit: ") for line in rest), (point.number, first.said)
        if "out" in point.left:
            assert second.status == 1
            assert "exists already" in second.said
        else:
            kept = "the same command goes on from there" in first.said
            assert point.left == (["out.partial"] if kept else []), (point.number, first.said)
            assert second.status == 0, (point.number, second.said)
        assert contents(point.output) == job.whole, point.number


@pytest.mark.parametrize(("how", "every", "start"), [("ENOSPC", 1, 0), ("EIO", 3, 0), ("EROFS", 3, 1)])
def test_every_kind_of_step(job, tmp_path, how, every, start):
    found = job()
    steps = found.steps(tmp_path)
    points = [number for number in kinds(steps) if how != "ENOSPC" or steps[number - 1][0] in WRITES][start::every]
    check(found, found.each(tmp_path, points, how), how)


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("recipe", ["plain", "static"])
def test_every_step(job, tmp_path, recipe, how):
    found = job(recipe=recipe)
    steps = found.steps(tmp_path)
    points = [number for number in range(1, len(steps) + 1) if how != "ENOSPC" or steps[number - 1][0] in WRITES]
    check(found, found.each(tmp_path, points, how), how)
    sys.stdout.write(f"{len(points)} steps\n")


def test_files_may_be_no_larger(job, tmp_path):
    """A real limit (RLIMIT_FSIZE), which native code meets too."""
    found, output = job(), tmp_path / "out"
    ended = found.run(output, ("largest_file", {"nbytes": 15_000}))
    assert ended.status == 1
    assert ended.lines[-1].startswith("Error: ")
    assert "larger than a file may be here (File too large); raise the limit (ulimit -f)" in ended.said
    assert not output.exists()
    found.goes_on(output)


def mounted(job, disk, options, *calls):
    """How a run ended that writes to a small disk of its own."""
    ended = job.run(disk / "out", ("mount", {"path": str(disk), "options": options}), *calls)
    if ended.status == 99:
        pytest.skip(f"a small disk takes the right to mount one: {ended.said}")
    return ended


@pytest.mark.parametrize("kilobytes", [0, 4, 16, 40, 80, 120])
def test_a_disk_that_is_really_full(job, tmp_path, kilobytes):
    """A disk in memory with a ballast that leaves so much; when the ballast is gone the same command goes on."""
    found, disk = job(), tmp_path / "disk"
    disk.mkdir()
    words = {"path": str(disk), "left": 1024 * kilobytes, "stored": str(tmp_path / "stored")}
    ended = mounted(found, disk, "size=1m", ("full", words))
    assert ended.status == 0, ended.said
    first, left, _, end, _ = ended.said.split("\f")
    error = [line for line in first.splitlines() if line.startswith("Error: ")]
    assert len(error) == 1, first
    assert re.search(REMEDIES["ENOSPC"][0], error[0]), first
    assert "Traceback" not in first
    kept = "the same command goes on from there" in first
    assert left == f"1 {['ballast', 'out.log.jsonl', 'out.partial'] if kept else ['ballast']}"
    assert end == "0 ['out', 'out.log.jsonl']"
    assert contents(tmp_path / "stored") == found.whole


def test_a_disk_that_can_only_be_read(job, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    ended = mounted(job(), disk, "size=1m,ro")
    assert ended.status == 1
    message = f"Error: the disk of {disk} can only be read; make it writable or give another -o OUT"
    assert ended.lines == [message]


def test_a_disk_without_inodes(job, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    ended = mounted(job(), disk, "size=1m,nr_inodes=8")
    assert ended.status == 1
    assert ended.lines[-1].startswith(f"Error: no space is left on the disk of {disk}")


def test_a_folder_of_another_user(job, tmp_path):
    """In a process that isn't root's."""
    if os.geteuid():
        pytest.skip("another user's process takes root; test_mistakes has a folder that its own user may not write to")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o755)
    model = job().model
    for path in (tmp_path, *tmp_path.parents, model, *model.parents, *model.iterdir()):  # all but `closed` is open
        if path.stat().st_mode & 0o055 != 0o055:
            path.chmod(path.stat().st_mode | 0o055)
    ended = job().run(closed / "out", ("as_user", {"number": 65534}))
    assert ended.status == 1
    assert ended.lines == [f"Error: {partial(closed / 'out')} cannot be made: Permission denied; give another -o OUT"]
    assert not list(closed.iterdir())
