"""SIGTERM and Ctrl-C: the run ends at once, says how to go on, and the same command does."""

import signal
import time

import pytest
from forks import appears, partial

ENDS = [("SIGTERM", 143, "quantkit: terminated"), ("SIGINT", 130, "quantkit: interrupted")]

MOMENTS = {
    "at-a-block's-end": ("quantkit.journal", "Journal.commit", 3, True),
    "within-a-block": ("quantkit.calibrated", "_Work._smooth", 2, True),
    "while-a-block-is-written": ("quantkit.calibrated", "compress_stage", 2, True),
    "while-a-file-is-written": ("quantkit.shards", "save_file", 5, False),
    "while-shards-are-made": ("quantkit.shards", "ShardWriter._make_shard", 2, True),
    "while-it-is-verified": ("quantkit.verification", "_verify_layer", 1, False),
}


@pytest.mark.parametrize(("how", "status", "said"), ENDS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_while_something_is_finished(job, tmp_path, moment, how, status, said):
    found, output = job(recipe="static"), tmp_path / "out"
    module, name, number, after = MOMENTS[moment]
    words = {"module": module, "name": name, "number": number, "how": how, "after": after}
    ended = found.run(output, ("signal_in", words))
    assert ended.status == status, ended.said
    kept = f"quantkit: what is finished is kept in {partial(output)}: the same command goes on from there"
    assert ended.lines == [kept, said]
    assert not output.exists()
    assert "going on from there" in found.goes_on(output).said


@pytest.mark.parametrize(("how", "status", "said"), ENDS)
def test_a_signal_before_anything_is_finished_leaves_nothing(job, tmp_path, how, status, said):
    found, output = job(recipe="static"), tmp_path / "out"
    words = {"module": "quantkit.pipeline", "name": "compress_stage", "number": 1, "how": how}
    ended = found.run(output, ("signal_in", words))
    assert (ended.status, ended.lines) == (status, [said])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("how", "status", "said"), ENDS)
def test_a_signal_from_another_process(job, tmp_path, how, status, said):
    """At a moment that nobody chose."""
    found, output = job("mixtral", "calibrated"), tmp_path / "out"
    child = found.start(output)
    assert appears(partial(output), output)
    time.sleep(found.seconds / 3)
    child.signal(getattr(signal, how))
    ended = child.wait()
    if ended.status == 0:
        pytest.skip("the run was faster than the signal")
    assert ended.status == status, ended.said
    assert ended.lines[-1] == said
    assert "Traceback" not in ended.said
    found.goes_on(output)
