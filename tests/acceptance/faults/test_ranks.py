"""Several processes share a run or an evaluation: the result is that of one, and when one of them ends, all do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs
import models
import pytest
import torch
from forks import appears, contents, partial
from safetensors.torch import load
from sliced import logits, slice_of
from transformers import MixtralConfig, MixtralForCausalLM

import quantkit

SMALL_FILES = ("constant", {"module": "quantkit.shards", "name": "SMALLEST_SHARD", "value": 8000})
"""Files are worth writing that hold a block of these models."""

RECIPES = {
    "plain": ("-m", "w8a8"),
    "searched": ("-m", "smoothquant:alpha=auto", "-m", "w8a8"),
    "static": ("-m", "smoothquant", "-m", "w8a8:activation=tensor-static,activation_range=mse"),
    "wanda": ("-m", "sparse24:criterion=wanda", "-m", "int8"),
    "sparsegpt": ("-m", "sparse24:criterion=sparsegpt"),
    "columns": ("-m", "llm-int8:outlier_weight=float,threshold=1.0"),
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """The folders of a Llama and a Mixtral, with data for calibration and evaluation beside them."""
    base = tmp_path_factory.mktemp("ranks")
    models.save(models.llama_model(**SIZES), base / "llama", max_shard_size="30KB")
    config = MixtralConfig(
        **{**models.LLAMA, **SIZES, "num_hidden_layers": 2}, num_local_experts=4, num_experts_per_tok=1
    )
    models.save(models.randomized(MixtralForCausalLM(config)), base / "mixtral")
    for name, count in (("rows", 20), ("held-out", 130)):
        ids = torch.randint(0, 250, (count, 64), generator=torch.Generator().manual_seed(count)).tolist()
        (base / f"{name}.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return base


@pytest.fixture(scope="session")
def words(places):
    """The words of a command but for its output: 20 windows make 4 batches."""

    def of(name, recipe):
        data = ("--dataset", places / "rows.jsonl", "--samples", 20, "--seq-len", 64) if recipe != "plain" else ()
        return ("quantize", places / name, *RECIPES[recipe], *data, "--max-shard-size", "60KB")

    return of


@pytest.fixture(scope="session")
def whole(forks, words, tmp_path_factory):
    """The output of one process."""
    made = {}

    def of(name, recipe):
        if (name, recipe) not in made:
            output = tmp_path_factory.mktemp("whole") / "out"
            ended = forks.run(*words(name, recipe), "-o", output, calls=(SMALL_FILES,))
            assert ended.status == 0, ended.said
            made[name, recipe] = contents(output)
        return made[name, recipe]

    return of


def run(forks, count, *words, calls=None):
    """How the ranks of a job ended."""
    calls = calls or {}
    return jobs.run(forks, count, *words, calls={rank: (SMALL_FILES, *calls.get(rank, ())) for rank in range(count)})


def log_of(output):
    return [json.loads(line) for line in output.with_name(f"{output.name}.log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "recipe", "count"),
    [
        ("llama", "plain", 2),
        ("llama", "searched", 2),
        ("mixtral", "searched", 2),
        *(
            pytest.param(name, recipe, count, marks=pytest.mark.exhaustive)
            for name in ("llama", "mixtral")
            for recipe in RECIPES
            for count in (2, 3, 4)
            if recipe != "sparsegpt"
        ),
    ],
)
def test_ranks_write_what_one_process_writes(forks, words, whole, tmp_path, name, recipe, count):
    """To the byte: every statistic but sums is exact, and batches are those of one process."""
    ended = run(forks, count, *words(name, recipe), "-o", tmp_path / "out")
    assert [each.status for each in ended] == [0] * count, [each.said for each in ended]
    assert contents(tmp_path / "out") == whole(name, recipe)
    assert [each.said for each in ended[1:]] == [""] * (count - 1)
    rows = [line["ranks"] for line in log_of(tmp_path / "out") if line["event"] == "ranks"]
    assert rows
    assert all(len(each) == count for each in rows)


def test_units_are_shared(forks, words, tmp_path):
    """Each rank has its part of the work: no unit is done twice, and none is left to one alone."""
    slow = ("slow", {"module": "quantkit.units", "name": "compress_stage", "seconds": 0.2})
    run(forks, 2, *words("llama", "plain"), "-o", tmp_path / "out", calls={0: (slow,), 1: (slow,)})
    (line,) = (line for line in log_of(tmp_path / "out") if line["event"] == "ranks")
    done = [row["units"] for row in line["ranks"]]
    assert min(done) > 0
    assert sum(done) == 3


def test_sums_are_those_of_one_process_within_rounding(forks, words, whole, tmp_path):
    """SparseGPT adds up X^T X in float32: 1280 tokens, in another order. The same weights go, and others by rounding.

    float32 sums of n terms differ by at most n 2**-24 of the sum of magnitudes, and usually by the root of n; H is
    dampened to a condition of at most 100 times K.
    """
    ended = run(forks, 2, *words("llama", "sparsegpt"), "-o", tmp_path / "out")
    assert ended[0].status == 0, ended[0].said
    one = loads(whole("llama", "sparsegpt"))
    two = loads(contents(tmp_path / "out"))
    assert one.keys() == two.keys()
    for name, exact in one.items():
        assert torch.equal(two[name] == 0, exact == 0)
        assert (two[name] - exact).abs().max() <= 2e-5 * exact.abs().max()


def loads(files):
    """All tensors of an output, by name."""
    parts = [load(data) for name, data in files.items() if name.endswith(".safetensors")]
    return {name: value for part in parts for name, value in part.items()}


def test_an_evaluation_gives_the_numbers_of_one_process(forks, places, whole, tmp_path):
    line = ("eval", places / "llama", "--baseline", places / "mixtral", "--dataset", places / "held-out.jsonl")
    alone = forks.run(*line, "--json", "--quiet", "--restart")
    ended = run(forks, 3, *line, "--json", "--quiet", "--restart")
    assert [each.status for each in ended] == [0, 0, 0], ended[0].said
    one, three = json.loads(alone.said), json.loads(ended[0].said)
    assert len(three.pop("ranks")) == 3
    for key in ("seconds", "peak_memory_bytes"):
        del one[key], three[key]
    assert three.pop("delta_p_rms") == pytest.approx(one.pop("delta_p_rms"), rel=1e-12)  # a sum of squares
    assert three == one
    assert [each.said for each in ended[1:]] == ["", ""]


def killed(how, module, name, number):
    return ("signal_in", {"module": module, "name": name, "number": number, "how": how})


def test_a_killed_rank_ends_the_job_which_goes_on_with_any_number(forks, words, whole, tmp_path):
    output, line = tmp_path / "out", words("llama", "static")
    calls = {1: (killed("SIGKILL", "quantkit.calibrated", "_Work._smooth", 2),)}
    started = time.monotonic()
    ended = run(forks, 2, *line, "-o", output, calls=calls)
    assert time.monotonic() - started < 60
    assert [each.status for each in ended] == [1, -9]
    kept, sentence = ended[0].lines
    assert kept == f"quantkit: what is finished is kept in {partial(output)}: the same command goes on from there"
    assert sentence.startswith("Error: rank 1 (process ")
    assert sentence.endswith("of 2 ended without a word (killed, or out of memory), and the job with it")
    assert not output.exists()
    assert not list(partial(output).glob("*.index.json"))
    ended = run(forks, 3, *line, "-o", output)
    assert [each.status for each in ended] == [0, 0, 0], ended[0].said
    assert "going on from there" in ended[0].said
    assert contents(output) == whole("llama", "static")


@pytest.mark.parametrize("killed_rank", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_rank_that_is_killed_while_units_are_shared(forks, words, whole, tmp_path, killed_rank):
    """What was begun by others after it is done again: here by one process."""
    output, line = tmp_path / "out", words("llama", "plain")
    calls = {killed_rank: (killed("SIGKILL", "quantkit.shards", "ShardWriter.write", 2),)}
    ended = run(forks, 2, *line, "-o", output, calls=calls)
    assert ended[killed_rank].status == -9
    assert ended[1 - killed_rank].status == 1
    assert "Error: " in ended[1 - killed_rank].lines[-1]
    ended = forks.run(*line, "-o", output, calls=(SMALL_FILES,))
    assert ended.status == 0, ended.said
    assert contents(output) == whole("llama", "plain")


def test_a_signal_to_all(forks, words, whole, tmp_path):
    output, line = tmp_path / "out", words("mixtral", "searched")
    children = jobs.start(forks, 2, *line, "-o", output, calls={0: (SMALL_FILES,), 1: (SMALL_FILES,)})
    assert appears(partial(output) / "quantkit_state" / "record-00001.json", output)
    for child in children:
        child.signal(signal.SIGTERM)
    ended = [child.wait() for child in children]
    if ended[0].status == 0:
        pytest.skip("the run was faster than the signal")
    assert ended[0].status == 143, ended[0].said
    assert ended[0].lines[-1] == "quantkit: terminated"
    assert ended[1].lines == []
    ended = run(forks, 2, *line, "-o", output)
    assert ended[0].status == 0, ended[0].said
    assert contents(output) == whole("mixtral", "searched")


def test_an_error_of_another_rank_is_told_by_the_first(forks, words, tmp_path):
    output = tmp_path / "out"
    full = ("steps", {"base": str(tmp_path), "at": 3, "how": "ENOSPC"})
    ended = run(forks, 2, *words("llama", "plain"), "-o", output, calls={1: (full,)})
    assert [each.status for each in ended] == [1, 1]
    assert ended[0].lines[-1].startswith("Error: rank 1 of 2: no space is left on the disk of ")
    assert ended[1].said == ""


@pytest.mark.exhaustive
def test_a_rank_that_hangs(forks, words, tmp_path):
    output = tmp_path / "out"
    patience = ("constant", {"module": "quantkit.ranks", "name": "SILENT", "value": 8.0})
    hangs = killed("SIGSTOP", "quantkit.calibrated", "_Work._smooth", 2)
    calls = {0: (SMALL_FILES, patience), 1: (SMALL_FILES, hangs)}
    children = jobs.start(forks, 2, *words("llama", "static"), "-o", output, calls=calls)
    first = children[0].wait()
    children[1].signal(signal.SIGKILL)
    children[1].wait()
    assert first.status == 1
    assert first.lines[-1] == "Error: rank 1 of 2 has given no sign of life for 8 s"


@pytest.mark.exhaustive
def test_sums_go_on_with_as_many_ranks_as_they_were_begun_with(forks, words, tmp_path):
    output, line = tmp_path / "out", words("llama", "sparsegpt")
    calls = {1: (killed("SIGKILL", "quantkit.calibrated", "_Work._prune", 2),)}
    assert run(forks, 2, *line, "-o", output, calls=calls)[0].status == 1
    refused = forks.run(*line, "-o", output, calls=(SMALL_FILES,))
    assert refused.status == 1
    assert "was begun with 2 processes, and sums of products are rounded otherwise with 1" in refused.said
    assert run(forks, 2, *line, "-o", output)[0].status == 0
    assert run(forks, 2, *line, "-o", tmp_path / "anew")[0].status == 0
    assert contents(output) == contents(tmp_path / "anew")


def test_more_ranks_than_batches(forks, words, tmp_path):
    ended = run(forks, 5, *words("llama", "static"), "-o", tmp_path / "out")
    assert {each.status for each in ended} == {1}
    assert ended[0].lines == [
        "Error: 20 calibration windows make 4 batches, and there are 5 processes: give more --samples, or fewer "
        "processes"
    ]
    assert not list(tmp_path.iterdir())


def test_other_commands_are_refused(forks, places):
    ended = run(forks, 2, "inspect", places / "llama")
    assert [each.status for each in ended] == [1, 1]
    assert ended[0].lines == [
        "Error: quantkit inspect works in one process, and WORLD_SIZE is 2; give it without torchrun or accelerate "
        "launch"
    ]
    assert ended[1].said == ""


def test_a_model_is_spread_over_ranks_by_the_plan_of_transformers(forks, tmp_path):
    """Weights alone: the logits of one process, but for the order of sums. 8-bit activations: those of a model whose
    cut layers are sums of slices, each of which quantizes the part of a token that it is given."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "attention_bias": True, "mlp_bias": True}
    source = models.save(models.llama_model(**sizes), tmp_path / "source")
    folders = {}
    for name, words in {
        "int4": ("-m", "int4"),
        "native": ("-m", "int8:group=128", "--format", "quantkit"),
        "w8a8": ("-m", "w8a8"),
    }.items():
        folders[name] = tmp_path / name
        assert forks.run("quantize", source, "-o", folders[name], *words).status == 0
    write = (
        "instead",
        {
            "module": "sliced",
            "name": "write",
            "arguments": {"folders": [str(folder) for folder in folders.values()], "output": str(tmp_path)},
        },
    )
    ended = jobs.run(forks, 2, calls={0: (write,), 1: (write,)})
    assert [each.status for each in ended] == [0, 0], [each.said for each in ended]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, folder in folders.items():
        model = quantkit.load(folder)
        if name == "w8a8":
            slice_columns(model)
        exact = logits(model)
        for found, shapes in (first[str(folder)], second[str(folder)]):
            assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
            whole = {leaf: tuple(value.shape) for leaf, value in model.model.layers[0].self_attn.q_proj.named_buffers()}
            words = next(leaf for leaf in whole if leaf.startswith("weight") and "sc" not in leaf and "sh" not in leaf)
            assert shapes["q_proj"][words] == (whole[words][0] // 2, *whole[words][1:])


def slice_columns(model):
    """Put sums of two slices in place of the layers whose columns are cut."""
    for name, layer in list(model.named_modules()):
        if name.endswith(("o_proj", "down_proj")):
            model.set_submodule(name, Halves(layer))


class Halves(torch.nn.Module):
    """A packed layer as two slices of its columns."""

    def __init__(self, layer):
        super().__init__()
        self.parts = torch.nn.ModuleList(slice_of(layer, number, 2, rows=False) for number in (0, 1))
        self.bias = layer.bias

    def forward(self, x):
        return sum(part(half) for part, half in zip(self.parts, x.chunk(2, -1), strict=True)) + self.bias


def test_ranks_of_different_versions(forks, words, tmp_path):
    other = ("constant", {"module": "quantkit.pipeline", "name": "__version__", "value": "0.0.0"})
    ended = run(forks, 2, *words("llama", "plain"), "-o", tmp_path / "out", calls={1: (other,)})
    assert [each.status for each in ended] == [1, 1]
    assert ended[0].lines[-1].startswith("Error: rank 1 has another version of quantkit than rank 0 (0.0.0, and ")
    assert ended[1].said == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive
def test_torchrun(forks, words, tmp_path):
    """The launcher itself, which ends the others when one is killed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "quantkit"]
    line = [*launch, *map(str, words("mixtral", "searched")), "-o", str(tmp_path / "out")]
    with subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True) as running:
        assert appears(partial(tmp_path / "out") / "quantkit_state" / "record-00000.json")
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(max(map(int, children)), signal.SIGKILL)
        _, said = running.communicate(timeout=120)
    assert running.returncode == 1
    assert "of 2 ended without a word (killed, or out of memory), and the job with it" in said
    assert "the same command goes on from there" in said
    ended = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert forks.run(*words("mixtral", "searched"), "-o", tmp_path / "one").status == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
