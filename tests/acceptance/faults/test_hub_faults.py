"""`quantkit quantize org/name` and a hub that goes wrong: one sentence and nothing written, or it is asked again.

What each error of the hub says is held in test_hub; here a fault meets the whole command, while the headers of the
weights are read and while the weights are downloaded, and the same command afterwards has to give what it gives
without a fault.
"""

import signal

import huggingface_hub
import pytest
from forks import contents, partial

NAME = "org/tiny"
WEIGHTS = r"/storage/.*model-00002.*\.safetensors"


@pytest.fixture
def online(server, sources):
    """The hub, with a model of several files."""
    server.add(NAME, sources("llama"))
    return server


@pytest.fixture
def line(tmp_path):
    return ("quantize", NAME, "-o", tmp_path / "out", "-m", "w8a8", "--max-shard-size", "20KB")


def when(online, monkeypatch, phase, method, path, **how):
    """The fault, from the beginning, or from when the weights are downloaded."""
    if phase == "headers":
        return online.fail(method, path, **how)
    times = how.pop("times", 10**6)
    fault, download = online.fail(method, path, times=0, **how), huggingface_hub.snapshot_download

    def begin(*words, **more):
        nonlocal times
        fault.times, times = fault.times + times, 0
        return download(*words, **more)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", begin)
    return fault


FAULTS = {
    "dropped": ("GET", WEIGHTS, {"cut": 100}, "run it again"),
    "busy": ("GET", WEIGHTS, {"status": 429, "headers": {"Retry-After": "7"}}, "run it again in 7 s"),
    "broken": ("GET", WEIGHTS, {"status": 500}, "has an error of its own (status 500); run it again later"),
    "away": ("GET", WEIGHTS, {"status": 503}, "has an error of its own (status 503); run it again later"),
    "gateway": ("GET", WEIGHTS, {"status": 502}, "has an error of its own (status 502); run it again later"),
}


def refused(cli, line, words):
    """The command ends with one sentence that holds these words, the model's name and what to do."""
    result = cli(*line)
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = [each for each in result.stderr.splitlines() if not each.startswith(("reading ", "downloading "))]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    for word in (NAME, words, "run it again"):
        assert word in lines[0], lines[0]


def whole(cli, line, out, sources, tmp_path):
    """The command goes through, and gives the weights and config that the model's folder gives."""
    result = cli(*line)
    assert result.exit_code == 0, result.stderr
    assert cli(line[0], sources("llama"), "-o", tmp_path / "local", *line[4:]).exit_code == 0
    one, two = contents(out), contents(tmp_path / "local")
    assert set(one) == set(two)
    different = {name for name in one if one[name] != two[name]}
    assert different <= {"quantkit_report.json", "README.md"}  # the model's name is in them
    assert not partial(out).exists()


@pytest.mark.parametrize("phase", ["headers", "weights"])
@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_that_stays(online, line, cli, monkeypatch, impatient, sources, tmp_path, kind, phase):
    method, path, how, words = FAULTS[kind]
    fault = when(online, monkeypatch, phase, method, path, **how)
    refused(cli, line, words)
    assert [each.name for each in tmp_path.iterdir()] == ["home"]
    if kind == "busy":
        assert any(seconds >= 7 for seconds in impatient)
    fault.times = 0
    whole(cli, line, tmp_path / "out", sources, tmp_path)


@pytest.mark.parametrize("phase", ["headers", "weights"])
@pytest.mark.parametrize("kind", ["dropped", "busy", "broken"])
def test_a_fault_that_passes(online, line, cli, monkeypatch, impatient, sources, tmp_path, kind, phase):
    method, path, how, _ = FAULTS[kind]
    fault = when(online, monkeypatch, phase, method, path, times=1, **how)
    whole(cli, line, tmp_path / "out", sources, tmp_path)
    assert fault.times == 0
    if kind == "busy":
        assert any(seconds >= 7 for seconds in impatient)


def test_a_file_of_another_size_than_announced(online, line, cli, monkeypatch, impatient, sources, tmp_path):
    fault = when(online, monkeypatch, "weights", "HEAD", r"model-00002.*\.safetensors", size=10)
    refused(cli, line, "should be of size 10 but has size")
    assert [each.name for each in tmp_path.iterdir()] == ["home"]
    fault.times = 0
    whole(cli, line, tmp_path / "out", sources, tmp_path)


def test_a_download_that_is_killed_goes_on(online, line, forks, tmp_path):
    """A real process; what it had fetched whole is not fetched again."""
    place = ("hub", {"endpoint": online.endpoint, "home": str(tmp_path / "home")})
    words = {"module": "huggingface_hub.file_download", "name": "http_get", "number": 9, "how": "SIGKILL"}
    assert forks.run(*line, calls=(place, ("signal_in", words))).status == -signal.SIGKILL
    assert [each.name for each in tmp_path.iterdir()] == ["home"]
    blobs = {path.name for path in (tmp_path / "home").rglob("blobs/*") if not path.name.endswith(".incomplete")}
    assert online.asked("GET", "/storage/")
    online.requests.clear()
    ended = forks.run(*line, calls=(place,))
    assert ended.status == 0, ended.said
    again = {path.split("/")[2] for method, path, _ in online.requests if method == "GET" and "/storage/" in path}
    assert again
    assert not again & blobs
    assert not (tmp_path / "out.partial").exists()
