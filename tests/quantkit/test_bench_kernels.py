"""`quantkit bench-kernels`: the table, what gets no time, the floor, the plot, and tuning, without a GPU."""

import contextlib
import json
import math

import pytest
import torch
from quantkit_kernels import configurations, formats, ops
from quantkit_kernels.benchmarks import baselines, cpu_clock, gpu_clock, quantizers, roofline, shapes, table, tuning
from quantkit_kernels.benchmarks.cases import (
    Case,
    activations,
    chosen,
    floats,
    linear_cases,
    named,
    read_bytes,
    rotated,
)
from quantkit_kernels.benchmarks.correctness import is_right
from quantkit_kernels.benchmarks.experts import expert_cases, float_experts
from quantkit_kernels.benchmarks.skipping import skipping_cases
from quantkit_kernels.errors import KernelError

CPU = torch.device("cpu")
SIZE = (96, 256)


def operands_of(case, tokens=20, size=SIZE):
    torch.manual_seed(0)
    experts = (4,) if case.kind == "experts" else ()
    weight = (torch.randn(*experts, *size) / 16).to(torch.bfloat16)
    return case.prepare(activations(tokens, size[1], torch.bfloat16, case.outliers), weight)


ALL = {
    **{f"float: {dtype}": floats(dtype) for dtype in (torch.float32, torch.bfloat16)},
    **linear_cases(),
    **skipping_cases(),
    **float_experts(torch.bfloat16),
    **expert_cases(),
    **{name: case for pair in quantizers.quantizer_cases() for each in pair for name, case in each.items()},
}


# What is right, and what is not


@pytest.mark.parametrize("name", ALL)
def test_results_are_right_and_broken_ones_are_seen(name):
    """Broken: a scale off by a hundredth part, one number, one run of 64 outputs of the last token, NaN, a lost row.

    Of codes also: a scale twice as large, with the codes that suit it.
    """
    case = ALL[name]
    operands = operands_of(case)
    out = case.run(*operands)
    assert is_right(case, operands, out)
    if isinstance(out, tuple):
        codes, scale = out
        other = codes.clone()
        other.view(torch.int8)[0, 0] ^= 0x10
        each = 2 * scale if scale.ndim == 1 else 2 * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
        quotients = case.expected(*operands)[0] / each
        coarse = quotients.round().to(codes.dtype) if codes.dtype == torch.int8 else quotients.float().to(codes.dtype)
        broken = [(codes, scale * 1.01), (other, scale), (codes, scale * math.nan), (codes[:-1], scale[:-1])]
        broken.append((coarse, 2 * scale))
    else:
        one, run = out.clone(), out.clone()
        one[0, 0] += 0.5
        run[-1, :64] *= 1.05
        broken = [out * 1.05, one, run, out * math.nan, out[:-1]]
        if case.given(*operands)[3] == 1:  # codes by codes: the bound is tight
            slightly = out.clone()
            slightly[1, out[1].abs().argmax()] *= 1.03
            broken.append(slightly)
    assert not any(is_right(case, operands, each) for each in broken)


def test_nothing_is_timed_that_is_wrong(monkeypatch, cli):
    """A product with one wrong number: its row says so, the others have times, and the command fails."""

    def wrong(*arguments):
        out = right(*arguments)
        out[0, 0] += 1.0
        return out

    right = ops.linear_dynamic
    monkeypatch.setattr(ops, "linear_dynamic", wrong)
    monkeypatch.setattr(
        cpu_clock, "ceilings", lambda: {"copy_bytes_per_second": 1e9, "product_operations_per_second": 1e10}
    )
    arguments = ("--shapes", "64x128", "--tokens", "1,20", "--ops", "w8a8,int8-weights", "--seconds", "0.01", "--hot")
    result = cli("bench-kernels", *arguments)
    assert result.exit_code == 1
    assert "these ops gave a wrong result or did not run, and have no time: w8a8" in result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("  w8a8 ")]
    assert [line.split(maxsplit=1)[1] for line in lines] == ["wrong, not timed"] * 2
    assert result.stdout.count("  int8 weights ") == 2
    records = json.loads(cli("bench-kernels", *arguments, "--json").stdout)["records"]
    assert {record["microseconds"] is None for record in records if record["op"] == "w8a8"} == {True}
    assert all(record["microseconds"] > 0 for record in records if record["op"] != "w8a8")


def test_an_op_that_does_not_run_leaves_the_table_whole():
    def failing(x, weight):
        raise RuntimeError("no such product\nand more")

    group = table.Group({"bfloat16": floats(torch.bfloat16)}, {"other": Case(floats(torch.bfloat16).prepare, failing)})
    bench = table.Bench(CPU, seconds=0.01)
    records = list(table._lines(bench, "linear", group, shapes.Shape("", 16, 32), 1, {}))
    assert [record["op"] for record in records] == ["bfloat16", "other"]
    assert records[1]["said"] == "does not run: RuntimeError: no such product"
    assert bench.failed == {"other"}


# The table


def test_table_and_json_on_a_cpu(cli):
    words = ("--shapes", "64x128,32x128x4", "--tokens", "3", "--seconds", "0.01", "--hot", "--json")
    result = json.loads(cli("bench-kernels", *words).stdout)
    assert result["failed"] == []
    assert set(result["machine"]) >= {"processor", "threads", "torch"}
    assert set(result["ceilings"]) == {"copy_bytes_per_second", "product_operations_per_second"}
    assert set(result["beside"]) == {"torchao", "bitsandbytes"}
    records = result["records"]
    expected = {named(record["op"]) for record in records} - {"float32", "bfloat16", "copy", "norm", "silu-mul"}
    assert {name for name in expected if "expert-by-expert" not in name and "torch-" not in name} == set(
        table.op_names(CPU)
    )
    for record in records:
        assert record["least"] <= record["microseconds"] <= record["most"]
        assert record["times_float"] > 0
        assert record["share"] is None, "the ceiling of a CPU's codes is not measured"
    fastest = {"float32", "bfloat16"}
    for record in records:
        if record["kind"] == "linear":
            assert record["against"] in fastest
            assert record["operations"] == 2 * 3 * 64 * 128
        if record["kind"] == "experts":
            assert record["operations"] == 2 * 6 * 32 * 128
    w8a8 = next(record for record in records if record["op"] == "w8a8")
    assert w8a8["bytes"] == 3 * 128 * 2 + 64 * 128 + 64 * 2 + 3 * 64 * 2, "x, codes, scales, output"
    quantizer = [record for record in records if record["op"] == "quantize int8, token"]
    assert [record["bytes"] for record in quantizer] == [3 * 128 * 2 + 3 * 128 + 3 * 4], "measured once for each K"


def test_text_of_a_gpu():
    """What a table looks like where there are ceilings: figures that are made up, of no card."""
    record = {
        **table._record("w8a8", "linear", floats(torch.bfloat16), shapes.Shape("", 8, 16), 1, ""),
        "microseconds": 12.5,
        "least": 12.0,
        "most": 13.0,
        "settled": True,
        "against": "bfloat16",
        "times_float": 1.25,
        "share": 0.5,
        "graph": False,
    }
    assert table.line(record) == (
        f"  {'w8a8':38}       12.5 us  (12 to 13)    1.25x bfloat16   0.50 of the roofline  (no CUDA graph)"
    )
    said = table.introduction(
        {
            "machine": {"device": "card", "architecture": "sm_90", "driver": None},
            "ceilings": {"copy_bytes_per_second": 2e12, "product_operations_per_second": 3e14},
            "beside": {"torchao": "is not installed", "bitsandbytes": "0.5"},
        }
    )
    assert said.splitlines() == [
        "device card, architecture sm_90",
        "in this run: copy 2,000 GB/s (read and written), bfloat16 product 300 TFLOP/s",
        "beside: torchao is not installed, bitsandbytes 0.5",
    ]


def test_list_and_mistakes(cli, mistake):
    listed = cli("bench-kernels", "--list").stdout.split()
    assert {"w8a8", "fp8-block", "int4-weights-packed", "llm-int8-0.1-outliers", "experts-fp8", "Llama-3-70B"} <= set(
        listed
    )
    mistake("bench-kernels", "--tune", "--device", "cpu", says=("--tune is for a CUDA device", "run it on the machine"))
    mistake("bench-kernels", "--shapes", "64x", says=("shape is '64x'", "Mixtral-8x7B", "4096x4096"))
    mistake("bench-kernels", "--tokens", "0", says=("tokens is '0'", "whole number from 1"))
    mistake("bench-kernels", "--ops", "w4a4", "--shapes", "8x8", says=("op is 'w4a4'", "w8a8-tensor"))
    mistake("bench", "kernels", says=("there is no such model", "quantkit bench-kernels"))


def test_shapes_are_those_of_the_models():
    found = {(each.out_features, each.in_features): each.name for each in shapes.parsed(["Llama-3-8B"])}
    assert found[4096, 4096] == "Llama-3-8B q; o"
    assert set(found) == {(4096, 4096), (1024, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)}
    mixtral = [each for each in shapes.parsed(["mixtral-8x7b"]) if each.experts]
    assert [(each.out_features, each.in_features, each.experts, each.top) for each in mixtral] == [
        (14336, 4096, 8, 2),
        (4096, 14336, 8, 2),
        (28672, 4096, 8, 2),
    ]
    assert len(shapes.parsed(["Llama-3-8B", "4096x4096"])) == 6, "each shape once"
    assert shapes.parsed(["8x16x3"]) == [shapes.Shape("", 8, 16, 3, 2)]


# How it is timed, and the floor


def test_calls_go_round_more_than_the_cache():
    case = linear_cases()["w8a8"]
    operands = operands_of(case)
    size = read_bytes(case, operands)
    assert size == 20 * 256 * 2 + 96 * 256 + 96 * 2
    calls = rotated(case, operands, 10 * size)
    assert len(calls) == 21
    pointers = {call.args[1].data_ptr() for call in calls}
    assert len(pointers) == 21
    assert torch.equal(calls[0](), calls[-1]())
    assert len(rotated(case, operands, 0)) == 1


def test_spread_is_the_median_and_a_tenth_at_each_side():
    assert gpu_clock.spread([float(n) for n in range(101)][::-1]) == (50.0, 10.0, 90.0)
    assert gpu_clock.spread([2.0]) == (2.0, 2.0, 2.0)


class FakeGpu:
    """What `gpu_clock` uses of torch.cuda, with a clock that each call moves on by what it says it takes."""

    def __init__(self, monkeypatch):
        self.now, self.capturing, self.captures = 0.0, None, []
        fake = self

        class Event:
            def __init__(self, enable_timing):
                self.at = None

            def record(self):
                self.at = fake.now

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return (other.at - self.at) * 1000

        class Graph:
            def __init__(self):
                self.calls = []

            def replay(self):
                fake.now += 2e-6  # a graph's own launch
                for seconds in self.calls:
                    fake.now += seconds

        @contextlib.contextmanager
        def capture(graph):
            fake.capturing = graph
            try:
                yield
            finally:
                fake.capturing = None
            fake.captures.append(len(graph.calls))

        for name, value in {"Event": Event, "CUDAGraph": Graph, "graph": capture}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)

    def call(self, seconds, waits=False):
        def run():
            if self.capturing is None:
                self.now += seconds + 5e-5  # a launch from the host
                return
            if waits:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.capturing.calls.append(seconds)

        return run


def test_graphs_are_long_enough_and_take_turns(monkeypatch):
    """300 us, 1 ms and 1 us a call: a graph's own launch of 2 us adds little to any, and ratios are those of calls."""
    gpu = FakeGpu(monkeypatch)

    def prepared(name, seconds, **more):
        case = Case(lambda x, w: (), lambda: None, graph=not more.pop("eager", False))
        return table.Prepared(name, case, [gpu.call(seconds, **more)] * 2, 1, 1, False)

    references = [prepared("bfloat16", 3e-4), prepared("waits", 1e-4, waits=True)]
    others = [
        prepared("slow", 1e-3),
        prepared("small", 1e-6),
        prepared("other waits", 1.0, waits=True),
        prepared("eager", 1e-4, waits=True, eager=True),
    ]
    found = {ready.name: time for ready, time in table._timed_on_gpu(references, iter(others), 0.01)}
    for name, seconds in {"bfloat16": 3e-4, "slow": 1e-3, "small": 1e-6, "eager": 1.5e-4}.items():
        assert found[name].seconds == pytest.approx(seconds, rel=0.01), name
        assert found[name].least <= found[name].seconds <= found[name].most
        assert found[name].references["bfloat16"] == pytest.approx(3e-4, rel=0.01)
    assert found["waits"] == found["other waits"]
    assert found["waits"].startswith("does not run: RuntimeError: operation not permitted when stream is capturing")
    assert gpu.captures == [2, 2, 2, 250], (
        "the small one is captured again with as many calls as take half a millisecond"
    )
    assert all(not each.calls for each in others), "operands are freed"


def test_floor_is_the_larger_of_two_times():
    ceilings = {"copy_bytes_per_second": 1e12, "product_operations_per_second": 1e14}
    assert roofline.floor_seconds(10**9, 10, 16, ceilings) == pytest.approx(1e-3)
    assert roofline.floor_seconds(10, 10**12, 16, ceilings) == pytest.approx(1e-2)
    assert roofline.floor_seconds(10, 10**12, 8, ceilings) == pytest.approx(5e-3)
    assert roofline.floor_seconds(10, 10**12, 8, ceilings, fp8_products=False) == pytest.approx(1e-2)


def test_experts_without_tokens_are_not_read():
    case = expert_cases()["experts int8 weights"]
    codes = torch.ones(4, 8, 16, dtype=torch.int8)
    offsets = torch.tensor([0, 2, 2, 2, 3], dtype=torch.int32)
    operands = (torch.ones(3, 16, dtype=torch.bfloat16), codes, torch.ones(4, 8, 1, dtype=torch.bfloat16), offsets)
    out = torch.empty(3, 8, dtype=torch.bfloat16)
    moved, operations = roofline.work(case, operands, out, 8, 16)
    assert moved == 3 * 16 * 2 + 2 * (8 * 16 + 8 * 2) + 5 * 4 + 3 * 8 * 2
    assert operations == 2 * 3 * 8 * 16


def test_plot_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch, mistake):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    mistake("bench-kernels", "--plot", "x.png", says=("--plot needs matplotlib", "pip install 'quantkit[plots]'"))


def test_plot(tmp_path, cli):
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra plots, is not installed")
    path = tmp_path / "roofline.svg"
    words = ("--shapes", "64x128", "--tokens", "3", "--ops", "w8a8", "--seconds", "0.01", "--hot", "--plot", path)
    assert cli("bench-kernels", *words).exit_code == 0
    assert "copy and float product, measured" in path.read_text(encoding="utf-8")
    nothing = {"records": [], "ceilings": {}, "machine": {}}
    with pytest.raises(KernelError, match="nothing to plot"):
        roofline.plot(nothing, path)


def test_baselines_are_right_where_a_cpu_runs_them():
    """Those of torch and, where it is installed, of bitsandbytes: their operands are prepared as their kernels want."""
    cases, said = baselines.baselines(CPU)
    assert cases == {}
    found = baselines._of_torch()
    if said["bitsandbytes"] != "is not installed":
        found |= baselines._of_bitsandbytes()
    for name, case in found.items():
        operands = operands_of(case, 32)
        assert is_right(case, operands, case.run(*operands)), name
        calls = rotated(case, operands, 2 * read_bytes(case, operands))
        assert torch.equal(calls[0](), calls[-1]()), name


# Tuning


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """Return a case whose kernel asks the tables of sm_90, and gives a wrong result with 16 tokens a tile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configurations.forget()
    plain = floats(torch.bfloat16)

    def run(x, weight):
        config = configurations.configuration("int8_scaled_mm", len(x), *weight.shape, 90)
        out = plain.run(x, weight)
        if config["block_m"] == 32:
            raise KernelError("too large")
        return out * 2 if config["block_m"] == 16 else out

    yield Case(plain.prepare, run, plain.given)
    configurations.forget()


def test_tuning_keeps_the_fastest_right_configuration(kernel, tmp_path):
    shape, timed = shapes.Shape("", 256, 128), []

    def clock(name, configs, calls):
        timed.append((name, configs, len(calls)))
        return [1.0 / config["block_n"] for config in configs]

    records = tuning.tune(table.Bench(CPU), [shape], [70], {"fake": kernel, "again": kernel}, clock=clock)
    assert len(timed) == 1, "what two ops ask for is tried once"
    name, configs, calls = timed[0]
    assert (name, calls) == ("int8_scaled_mm", 1)
    assert {config["block_m"] for config in configs} == {64, 128}
    (record,) = records
    assert record["config"]["block_n"] == 256
    assert (record["tried"], record["refused"]) == (4, 2)
    assert "of 4 (2 refused)" in tuning.line(record)

    path = tuning.write(records, 90, {"device": "fake"})
    assert path == tmp_path / "quantkit" / "kernels" / "sm_90.json"
    assert [each.name for each in path.parent.iterdir()] == ["sm_90.json"]
    for tokens, expected in ((70, 256), (1, 256), (71, 64)):
        assert configurations.configuration("int8_scaled_mm", tokens, 256, 128, 90)["block_n"] == expected, tokens
    assert configurations.configuration("int8_scaled_mm", 70, 512, 128, 90)["block_n"] == 64, "another shape"
    content = json.loads(path.read_text())
    assert content["measured"] is True
    assert content["machine"] == {"device": "fake"}


def test_writing_keeps_what_others_wrote_and_replaces_what_is_for_the_same_calls(kernel):
    def record(name, tokens, block):
        return {"kernel": name, "tokens": tokens, "out_features": 8, "in_features": 16, "config": {"block_m": block}}

    tuning.write([record("llm_int8", 4, 1), record("llm_int8", 8, 2)], 90, {})
    path = tuning.write([record("llm_int8", 4, 3), record("grouped", 4, 4)], 90, {})
    kernels = json.loads(path.read_text())["kernels"]
    assert [entry["config"]["block_m"] for entry in kernels["llm_int8"]] == [2, 3]
    assert [entry["config"]["block_m"] for entry in kernels["grouped"]] == [4]
    path.write_text("{")
    with pytest.raises(KernelError, match="is not a table of kernel configurations"):
        tuning.write([record("llm_int8", 4, 1)], 90, {})
    assert path.read_text() == "{", "nothing is written over what cannot be read"


def test_what_is_in_use_stays_unless_another_is_faster_by_more_than_noise():
    used, other = {"block_m": 16}, {"block_m": 32}
    assert tuning.select([used, other], [1.0, 0.99], used) == used
    assert tuning.select([used, other], [1.0, 0.97], used) == other
    assert tuning.select([other], [2.0], used) == other, "the one in use gave a wrong result"


def test_a_trial_ends_also_when_it_fails():
    def fail_in_a_trial():
        with configurations.trial({"int8_scaled_mm": {"block_m": 1}}) as attempt:
            assert configurations.configuration("int8_scaled_mm", 1, 16, 16, 90) == {"block_m": 1}
            assert attempt.asked == {("int8_scaled_mm", 1, 16, 16): before}
            raise ZeroDivisionError

    before = configurations.configuration("int8_scaled_mm", 1, 16, 16, 90)
    with pytest.raises(ZeroDivisionError):
        fail_in_a_trial()
    assert configurations.configuration("int8_scaled_mm", 1, 16, 16, 90) == before


def test_products_alone_are_tuned_first():
    names = list(tuning.tunable(()))
    assert names[:2] == ["int8 product", "fp8 product"]
    assert list(tuning.tunable(["w8a8", "int8-product"])) == ["int8 product", "w8a8"]
    with pytest.raises(KernelError, match="op is 'quantize-int8-token'"):
        tuning.tunable(["quantize-int8-token"])


def test_names_are_written_without_spaces():
    known = linear_cases()
    assert list(chosen(known, ["LLM-int8-no-outliers", "fp8 block"])) == ["fp8 block", "llm-int8, no outliers"]
    assert len({named(name) for name in ALL}) == len(ALL)
    assert formats.BLOCK == 128


# The program for a machine with a GPU


@pytest.fixture
def on_gpu(monkeypatch):
    import runpy
    import sys
    from pathlib import Path

    monkeypatch.setattr(sys, "path", list(sys.path))
    return runpy.run_path(str(Path(__file__).parents[2] / "kernels" / "bench" / "on_gpu.py"))


def test_steps_write_their_own_parts(on_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        cpu_clock, "ceilings", lambda: {"copy_bytes_per_second": 1e9, "product_operations_per_second": 1e10}
    )
    words = ["--steps", "bench", "--device", "cpu", "--shapes", "64x128", "--tokens", "1", "2", "--ops", "w8a8"]
    monkeypatch.setattr("sys.argv", ["on_gpu.py", *words, "--seconds", "0.01", "--output", str(tmp_path)])
    (tmp_path / "cpu.json").write_text('{"tests": {"said": "3 passed"}, "bench": 0}')
    on_gpu["main"]()
    text = (tmp_path / "cpu.json").read_text()
    content = json.loads(text)
    assert content["tests"] == {"said": "3 passed"}
    assert content["bench"]["complete"] is True
    assert sum(line.startswith('   { "op"') for line in text.splitlines()) == len(content["bench"]["records"]) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"], "no lines of an unfinished bench are left"
    assert "64 x 128, tokens 2" in capsys.readouterr().out


def test_no_line_is_begun_after_the_time_is_over():
    result = table.measure(table.Bench(CPU, seconds=0.01), [shapes.Shape("", 16, 32)], [1], ["w8a8"], until=0.0)
    assert (result["records"], result["complete"]) == ([], False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(on_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["on_gpu.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="there is no CUDA device here"):
        on_gpu["main"]()
    assert not list(tmp_path.iterdir())
