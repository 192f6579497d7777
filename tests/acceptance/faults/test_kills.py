"""kill -9 at any moment: the same command goes on, and its result is bit for bit that of a run that nobody killed."""

import random
import signal
import sys
import time

import pytest
from forks import appears, contents, kinds, partial

CASES = [("llama", "calibrated"), ("llama", "plain"), ("mixtral", "calibrated"), ("mixtral", "plain")]


def many_kills(job, folder, count):
    """Kill the command at moments drawn by chance, and give it again; a new output when one is through."""
    draw, kills, at_work, outputs = random.Random(0), 0, 0, 0
    while kills < count:
        output = folder / f"out{outputs}"
        outputs += 1
        for _ in range(5):
            child, moment = job.start(output), draw.random()
            if draw.random() < 0.2:  # before anything is written, too
                time.sleep(moment * job.before)
            elif appears(partial(output), output):
                started = time.monotonic()
                while time.monotonic() < started + moment * job.seconds and not output.exists():
                    time.sleep(0.001)
                if output.exists():
                    job.seconds = min(job.seconds, time.monotonic() - started)  # the machine has become faster
            child.signal(signal.SIGKILL)
            ended = child.wait()
            assert ended.status in (-signal.SIGKILL, 0), ended.said
            kills += not output.exists()
            at_work += not output.exists() and partial(output).exists()
            if output.exists() or kills >= count:
                break
        finished(job, output)
    sys.stdout.write(f"{kills} kills, {at_work} of them while OUT.partial was there; {outputs} outputs\n")


def finished(job, output):
    """The command is through, or goes on to the same result; behind the last rename it finds its output there."""
    if not output.exists():
        job.goes_on(output)
        return
    ended = job.run(output)
    assert ended.status == 1
    assert "exists already" in ended.said
    job.is_done(output)


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_five_kills_at_random_moments(job, tmp_path, model, recipe):
    many_kills(job(model, recipe), tmp_path, 5)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("model", "recipe"), [*CASES, ("llama", "static"), ("mixtral", "static")])
def test_fifty_kills_at_random_moments(job, tmp_path, model, recipe):
    many_kills(job(model, recipe), tmp_path, 50)


def check(job, points):
    """At each of these points the command was stopped, and the same command went on to the same result."""
    for point in points:
        assert point.first.status == -signal.SIGKILL, (point.number, point.first.said)
        if "out" in point.left:  # the last rename was done
            assert point.second.status == 1
            assert "exists already" in point.second.said
        else:
            assert point.second.status == 0, (point.number, point.second.said)
        assert contents(point.output) == job.whole, point.number


@pytest.mark.parametrize(("how", "every", "start"), [("SIGKILL", 1, 0), ("CUT-OLD", 2, 0), ("CUT-NEW", 2, 1)])
def test_every_kind_of_step(job, tmp_path, how, every, start):
    """Killed just before a step, of each kind one: half of what would be written is there.

    And the power is cut: what wasn't synced is lost, with all names or with none.
    """
    found = job()
    points = kinds(found.steps(tmp_path))[start::every]
    check(found, found.each(tmp_path, points, how))


@pytest.mark.parametrize("how", ["SIGKILL", "CUT-OLD", "CUT-NEW"])
def test_steps_of_a_calibrated_block(job, tmp_path, how):
    """What is kept beside a block: as above."""
    found = job(recipe="static")
    steps = found.steps(tmp_path)
    first = next(number for number, (*_, path) in enumerate(steps, 1) if "state-00001" in path)
    last = next(number for number, (*_, path) in enumerate(steps, 1) if path.endswith("record-00002.json"))
    points = list(range(first, last + 2))[:: 1 if how == "SIGKILL" else 4]
    check(found, found.each(tmp_path, points, how))


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", ["SIGKILL", "CUT-OLD", "CUT-NEW"])
@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_every_step(job, tmp_path, model, recipe, how):
    found = job(model, recipe)
    points = list(range(1, len(found.steps(tmp_path)) + 1))
    check(found, found.each(tmp_path, points, how))
    sys.stdout.write(f"{len(points)} steps\n")


def test_bytes_are_synced_before_their_name_and_the_name_before_what_builds_on_it(job, tmp_path):
    """The order of the calls: file, rename, folder; a record only when all that it names is safe; all before OUT."""
    steps = job(recipe="static").steps(tmp_path)
    synced, unsafe, renames = set(), set(), 0
    for kind, inode, size, *paths in steps:
        folder = paths[-1].rpartition("/")[0]
        if kind == "fsync":
            synced.add((inode, size))
            unsafe.discard(paths[0])
        elif kind == "rename" and paths[-1] != "out":
            renames += 1
            if "record" in paths[-1] or "complete" in paths[-1]:
                assert not unsafe, f"{paths[-1]} comes before {unsafe} is safe"
            assert (inode, size) in synced, f"{paths[0]} is renamed and not synced"
            if "quantkit_report" not in paths[-1] and not ("/part-" in paths[0] and "/model-" in paths[-1]):
                unsafe.add(folder)
        elif kind == "rename":
            written = {path for step, *_, path in steps if step in ("open", "save", "write") and "/" in path}
            assert not unsafe
            assert {path.rpartition("/")[2] for path in written} >= {"tokenizer.json", "config.json", "README.md"}
    assert renames > 10
    end = next(number for number, step in enumerate(steps) if step[0] == "rename" and step[-1] == "out")
    assert (steps[end + 1][0], steps[end + 1][-1]) == ("fsync", str(tmp_path / "steps"))
    before = {step[3] for step in steps[:end] if step[0] == "fsync"}
    assert before >= {f"out.partial/{name}" for name in job(recipe="static").whole}
