"""Two runs with one output: the second is refused while the first works, which is unharmed; the dead block nobody."""

import signal

from forks import appears, partial


def test_the_second_of_two_runs_is_refused_and_the_first_is_unharmed(job, tmp_path):
    found, output = job(recipe="static"), tmp_path / "out"
    here, gone = tmp_path / "here", tmp_path / "gone"
    words = {"module": "quantkit.pipeline", "name": "compress_calibrated", "here": str(here), "gone": str(gone)}
    first = found.start(output, ("wait_in", words))
    assert appears(here)
    before = {path: path.read_bytes() for path in partial(output).rglob("*") if path.is_file()}
    assert before
    for more in ((), ("--restart",), ("-m", "int8")):
        second = found.forks.run(*found.line(output)[:4], *(found.words if more != ("-m", "int8") else ()), *more)
        assert second.status == 1, second.said
        sentence = f"another run is writing to {partial(output)}; wait for it, or give another -o OUT"
        assert second.lines == [f"Error: {sentence}"]
    assert {path: path.read_bytes() for path in partial(output).rglob("*") if path.is_file()} == before
    gone.touch()
    ended = first.wait()
    assert ended.status == 0, ended.said
    found.is_done(output)


def test_runs_that_start_together_give_one_whole_result(job, tmp_path):
    found, output = job(), tmp_path / "out"
    children = [found.start(output) for _ in range(4)]
    ends = [child.wait() for child in children]
    assert sorted(end.status for end in ends) == [0, 1, 1, 1], ends
    for end in ends:
        if end.status:
            assert any(word in end.lines[-1] for word in ("another run is writing to", "exists already")), end
    found.is_done(output)


def test_the_lock_of_a_killed_run_does_not_block(job, tmp_path):
    found, output = job(), tmp_path / "out"
    here = tmp_path / "here"
    words = {"module": "quantkit.pipeline", "name": "compress", "here": str(here), "gone": str(tmp_path / "never")}
    first = found.start(output, ("wait_in", words))
    assert appears(here)
    assert found.run(output).status == 1
    first.signal(signal.SIGKILL)
    assert first.wait().status == -signal.SIGKILL
    assert (partial(output) / "quantkit_partial").is_file()
    found.goes_on(output)


def test_the_folder_of_another_output_s_unfinished_work_is_no_output(job, tmp_path):
    found, output = job(), tmp_path / "out"
    words = {"module": "quantkit.journal", "name": "Journal.complete", "number": 1, "how": "SIGKILL", "after": True}
    assert found.run(output, ("signal_in", words)).status == -signal.SIGKILL
    ended = found.run(partial(output))
    assert ended.status == 1
    assert ended.lines[-1].endswith("ends in .partial, as the folders of unfinished work do; give another -o OUT")
    assert "going on from there" in found.goes_on(output).said
