"""Damaged files: the model's, before and while a run reads them, and those of a run that was stopped."""

import json
import re
import signal

import models
import pytest
from forks import contents, partial

from quantkit.journal import COMPLETE, FINGERPRINT, STATE

# The model


@pytest.fixture
def copied(job, sources, tmp_path):
    """A copy of a model in several files, to be damaged, and the job of compressing it."""

    def copy(recipe="plain"):
        return job(recipe=recipe, model=models.copy(sources("llama"), tmp_path / "model"))

    return copy


def refused(ended, *words):
    """The run was refused with one sentence that holds these words."""
    assert ended.status == 1, ended.said
    errors = [line for line in ended.lines if line.startswith("Error: ")]
    assert len(errors) == 1, ended.said
    assert "Traceback" not in ended.said
    for word in words:
        assert word in errors[0], errors[0]


def shard(job, number=2):
    return sorted(job.model.glob("*.safetensors"))[number]


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def flipped_length(path):
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


def flipped_offset(path):
    content = path.read_bytes()
    place = content.index(b"data_offsets") + len(b'data_offsets":[')
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


def flipped_name(path):
    content = path.read_bytes()
    place = content.index(b"model.layers")
    path.write_bytes(content[:place] + b"l" + content[place + 1 :])


def not_finite(path):
    """The last number (float32) is infinity."""
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x80\x7f")


DAMAGES = {
    "missing": (lambda path: path.unlink(), ("is missing", "names it; download it")),
    "truncated": (truncated, ("truncated or damaged", "download it again")),
    "empty": (lambda path: path.write_bytes(b""), ("truncated or damaged", "download it again")),
    "flipped-length": (flipped_length, ("truncated or damaged", "download it again")),
    "flipped-offset": (flipped_offset, ("truncated or damaged", "download it again")),
    "flipped-name": (flipped_name, ("lacks tensor", "download the shard again")),
    "not-finite": (not_finite, ("holds infinity", "download")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_shard_is_named_and_nothing_is_left(copied, tmp_path, name):
    """Where the header shows it; in the weights only what isn't finite can be seen, as no file says their hashes."""
    found, output = copied(), tmp_path / "out"
    path = shard(found)
    whole = path.read_bytes()
    DAMAGES[name][0](path)
    ended = found.run(output)
    refused(ended, path.name, *DAMAGES[name][1])
    assert not output.exists()
    kept = "the same command goes on from there" in ended.said
    assert partial(output).exists() == kept
    path.write_bytes(whole)
    if kept:  # the file is another than when the run was begun
        refused(found.run(output), "was begun with another model", path.name, "--restart")
    ended = found.forks.run(*found.line(output), "--restart")
    assert ended.status == 0, ended.said
    found.is_done(output)


def test_an_index_that_names_a_missing_file(copied, tmp_path):
    found, index = copied(), None
    index = found.model / "model.safetensors.index.json"
    stored = json.loads(index.read_text())
    stored["weight_map"]["lm_head.weight"] = "model-00099-of-00099.safetensors"
    index.write_text(json.dumps(stored))
    refused(found.run(tmp_path / "out"), "model-00099-of-00099.safetensors is missing", "names it; download it")
    assert not (tmp_path / "out").exists()
    assert not partial(tmp_path / "out").exists()


def stopped(job, output, steps=1, name="Journal.commit", module="quantkit.journal"):
    """Kill the command when so many stages are done."""
    words = {"module": module, "name": name, "number": steps, "how": "SIGKILL", "after": True}
    assert job.run(output, ("signal_in", words)).status == -signal.SIGKILL
    assert partial(output).is_dir()


def test_a_shard_that_is_changed_between_two_runs(copied, tmp_path):
    """One bit of a weight: the file's time tells."""
    found, output = copied("static"), tmp_path / "out"
    stopped(found, output, 2)
    path = shard(found)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    before = {each: each.read_bytes() for each in partial(output).rglob("*") if each.is_file()}
    ended = found.run(output)
    refused(ended, "was begun with another model", path.name, "--restart to begin anew")
    assert "goes on" not in ended.said
    assert {each: each.read_bytes() for each in partial(output).rglob("*") if each.is_file()} == before
    assert found.forks.run(*found.line(output), "--restart").status == 0
    assert not partial(output).exists()


def test_a_shard_that_is_changed_while_it_is_read(copied, tmp_path):
    found, output = copied(), tmp_path / "out"
    path = shard(found, 1)
    words = {"module": "quantkit.pipeline", "name": "compress_stage", "number": 3, "path": str(path), "place": 3}
    ended = found.run(output, ("change_in", words))
    refused(ended, f"{path} changed while it was read", "--restart")
    assert not output.exists()
    refused(found.run(output), "was begun with another model", path.name, "--restart")
    assert found.forks.run(*found.line(output), "--restart").status == 0
    assert output.is_dir()


# What a stopped run has kept


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if 0 <= place < 1 else place] ^= 4
    path.write_bytes(content)


HURTS = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "flipped-start": lambda path: flip(path, 0),
    "flipped-middle": lambda path: flip(path, 0.7),
    "flipped-end": lambda path: flip(path, -3),
}


def hurt(found, output, pattern, how):
    """Damage a file of a run that was stopped, one of the middle."""
    paths = sorted(partial(output).glob(pattern))
    path = paths[len(paths) // 2]
    HURTS[how](path)
    return path


@pytest.mark.parametrize("how", HURTS)
@pytest.mark.parametrize("pattern", ["part-*", f"{STATE}/record-*", f"{STATE}/state-*"])
def test_kept_work_that_is_damaged_is_done_again(job, tmp_path, pattern, how):
    found, output = job(recipe="static"), tmp_path / "out"
    stopped(found, output, 4)
    path = hurt(found, output, pattern, how)
    ended = found.goes_on(output)
    if not (how == "gone" and "record" in pattern):  # what no record names is just not there
        assert f"{path} is not as it was written; what was finished from there on is done again" in ended.said


@pytest.mark.parametrize("how", ["cut", "flipped-middle"])
@pytest.mark.parametrize("pattern", ["model-*", "part-*", f"{STATE}/record-*", f"{STATE}/{COMPLETE}"])
def test_a_finished_shard_that_is_damaged_is_refused(job, tmp_path, pattern, how):
    """While the final shards are made, or behind: what they are made of may be gone."""
    found, output = job(), tmp_path / "out"
    stopped(found, output, 2, "ShardWriter._make_shard", "quantkit.shards")
    assert list(partial(output).glob("model-*"))
    path = hurt(found, output, pattern, how)
    for _ in range(2):
        refused(found.run(output), f"{path} is not as it was written; check the disk", "--restart")
    assert not output.exists()
    assert found.forks.run(*found.line(output), "--restart").status == 0
    found.is_done(output)


@pytest.mark.parametrize("how", ["cut", "flipped-middle", "gone"])
def test_a_fingerprint_that_is_damaged(job, tmp_path, how):
    """Refused; without one nobody knows what the work is of, and it is done anew."""
    found, output = job(), tmp_path / "out"
    stopped(found, output, 1, "Journal.complete")
    hurt(found, output, f"{STATE}/{FINGERPRINT}", how)
    ended = found.run(output)
    if how == "gone":
        assert "starting anew" in ended.said
    else:
        refused(ended, f"{FINGERPRINT} is damaged", "--restart")
        assert found.forks.run(*found.line(output), "--restart").status == 0
    found.is_done(output)


def test_a_bit_that_flips_on_the_disk_before_it_is_verified(job, tmp_path):
    """Found when all is read back; the same command then refuses, and --restart begins anew."""
    found, output = job(), tmp_path / "out"
    path = partial(output) / "model-00002-of-00005.safetensors"
    name = next(name for name in found.whole if name.startswith("model-00002"))
    path = partial(output) / name
    words = {"module": "quantkit.pipeline", "name": "verify", "number": 1, "path": str(path), "place": 3}
    ended = found.run(output, ("change_in", words))
    refused(ended, "read back from", "differs from what was written; check the disk")
    assert not output.exists()
    refused(found.run(output), f"{path} is not as it was written", "--restart")
    assert found.forks.run(*found.line(output), "--restart").status == 0
    found.is_done(output)


def test_nothing_of_a_stopped_run_comes_into_the_output(job, tmp_path):
    """What safetensors leaves of a file that it was writing, and every other half file."""
    found, output = job(), tmp_path / "out"
    stopped(found, output, 1, "Journal.complete")
    for name in (".tmpAbCdEf", "part-00099.safetensors", "part-00099.tmp", "model-00001-of-00002.tmp"):
        (partial(output) / name).write_bytes(b"half")
    found.goes_on(output)
    assert not [name for name in contents(output) if re.search("tmp|part", name)]
