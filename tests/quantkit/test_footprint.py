"""The memory that a run takes, foreseen: what a batch holds, what a limit leaves, and that no result depends on it."""

import errno
import json
import subprocess
import sys
from dataclasses import replace

import models
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quantkit import calibrated, pipeline, quantize
from quantkit import footprint as footprints
from quantkit.activity import activity
from quantkit.budget import disk_bytes
from quantkit.errors import CheckpointError, RecipeError
from quantkit.footprint import EXCESS, TIGHT, Batching, footprint, ways
from quantkit.journal import Journal
from quantkit.pipeline import foresee, planned
from quantkit.shards import ShardReader

CPU = torch.device("cpu")
BOTH = ["smoothquant", "w8a8"]


@pytest.fixture
def rows(tmp_path):
    ids = torch.randint(0, 200, (9, 16), generator=torch.Generator().manual_seed(0)).tolist()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return {"dataset": str(path), "samples": 9, "seq_len": 16, "progress": False}


def seen(model, batch, length):
    source, plan, _ = planned(model, steps=["int8"])
    return activity(source.skeleton, plan.findings, batch, length)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "opt", "gpt_oss"])
def test_what_a_batch_holds_grows_with_its_tokens(model_folder, name):
    one, four = seen(model_folder(name), 1, 16), seen(model_folder(name), 4, 16)
    assert one.counted
    assert four.counted
    hidden = 4 * 16 * planned(model_folder(name), steps=["int8"])[0].skeleton.config.hidden_size
    for less, more in ((one.held, four.held), (one.working, four.working), (one.made, four.made)):
        assert 2 * less < more <= 4 * less  # masks and positions don't grow
    assert hidden <= one.held <= 8 * hidden
    assert one.working <= one.made


def test_what_a_block_makes_is_what_it_makes_when_it_runs():
    """Held against torch's profiler, which says what the allocator gives while a real block runs."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    source, plan, _ = planned(model, steps=["int8"])
    told = activity(source.skeleton, plan.findings, 2, 32)
    caught = {}

    def note(_, args, kwargs):
        caught["args"], caught["kwargs"] = args, kwargs

    block = model.model.layers[0]
    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.zeros((2, 32), dtype=torch.int64), use_cache=False)
        handle.remove()
        kinds = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
            block(*caught["args"], **caught["kwargs"])
    made = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert 0.7 * made <= told.made <= 1.3 * made


def test_a_model_whose_code_looks_at_values_is_estimated(model_folder, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def looking(self, hidden_states, *args, **kwargs):
        if hidden_states.sum().item() > 1e9:
            raise AssertionError
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", looking)
    found = seen(model_folder("llama"), 2, 16)
    assert not found.counted
    assert found.held >= 4 * 2 * 16 * 128
    assert found.working > 0


def test_ways_go_from_the_fastest_to_the_least():
    found = list(ways(100, 64, CPU))
    assert found[0] == Batching(8, EXCESS, spill=False)
    assert [way.windows for way in found] == [8, 8, 4, 2, 1, 8, 4, 2, 1]
    assert [way.spill for way in found] == [False] * 5 + [True] * 4
    assert {way.excess for way in found[1:]} == {TIGHT}
    assert [way.windows for way in ways(3, 64, CPU)] == [8, 3, 1, 3, 1]
    assert [way.windows for way in ways(3, 10**6, CPU)] == [1, 1, 1]


def test_parts_are_the_sizes_of_a_block(model_folder):
    source, plan, recipe = planned(model_folder("llama"), steps=BOTH)
    found = footprint(source, plan, recipe, (9, 16), CPU)
    weights = 4 * sum(p.numel() for p in source.skeleton.model.layers[0].parameters())
    assert found.parts["a block in float32"] == weights
    held = activity(source.skeleton, plan.findings, 32, 16).held
    assert found.parts["hidden states"] == 3 * held  # the first window's, the others', and what they become
    assert found.host_bytes >= sum(found.parts.values())
    assert found.device_bytes is None
    gpu = footprint(source, plan, recipe, (9, 16), torch.device("cuda"))
    assert gpu.device_bytes > weights


def test_without_calibration_nothing_is_batched(model_folder):
    source, plan, recipe = planned(model_folder("llama"), steps=["w8a8"])
    found = footprint(source, plan, recipe, (0, 0), CPU)
    assert found.batching is None
    assert set(found.parts) == {"in use now", "libraries", "tensors at work"}


@pytest.mark.parametrize("steps", [["w8a8"], BOTH], ids=" ".join)
def test_too_little_memory_is_refused_before_a_weight_is_read(model_folder, rows, tmp_path, monkeypatch, steps):
    def get(self, name):
        raise AssertionError(f"{name} is read")

    monkeypatch.setattr(ShardReader, "get", get)
    words = rows if steps == BOTH else {"progress": False}
    with pytest.raises(
        RecipeError, match=r"--max-memory 1,000,000 bytes is too little: the run takes at least about \d"
    ):
        quantize(model_folder("llama"), tmp_path / "out", steps=steps, max_memory="1MB", **words)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    with pytest.raises(RecipeError, match="too little"):
        foresee(model_folder("llama"), steps=steps, max_memory="1MB")


def test_the_command_says_what_it_takes(cli, mistake, model_folder):
    done = cli("plan", model_folder("llama"), "-m", "smoothquant", "-m", "w8a8", "--seq-len", "16")
    assert "  memory     about " in done.stdout
    mistake("plan", model_folder("llama"), "-m", "w8a8", "--max-memory", "x", says=("'x' is not a size; write one",))
    mistake("plan", model_folder("llama"), "-m", "w8a8", "--max-memory", "1MB", says=("is too little",))
    done = cli("plan", model_folder("llama"), "-m", "w8a8", "--json", "--device", "cuda")
    memory = json.loads(done.stdout)["budget"]["memory"]
    assert memory["device_bytes"] > 0
    assert memory["host_bytes"] > 10**8


def bits(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("steps", [BOTH, ["w8a8:activation=tensor-static"]], ids=" ".join)
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_hidden_states_on_disk_change_no_bit(model_folder, rows, tmp_path, monkeypatch, name, steps):
    from quantkit_calibration import spilling

    monkeypatch.setattr(spilling, "SMALLEST", 1)
    for spill in (False, True):
        monkeypatch.setattr(footprints, "ways", lambda *_, spill=spill: iter([Batching(2, TIGHT, spill)]))
        report = quantize(model_folder(name), tmp_path / str(spill), steps=steps, **rows)
        assert report.predicted_memory_bytes > 0
    assert bits(tmp_path / "True") == bits(tmp_path / "False")
    assert not list((tmp_path / "True").rglob("*.bin"))


def test_a_limit_is_kept_to_by_smaller_batches_and_by_the_disk(model_folder, monkeypatch):
    """With the process's own memory left out, the parts alone decide."""
    monkeypatch.setattr(footprints, "resident_memory_bytes", lambda: 0)
    monkeypatch.setattr(footprints, "peak_memory_bytes", lambda: 0)
    source, plan, recipe = planned(model_folder("llama"), steps=BOTH)
    shape = (4096, 64)
    most = footprint(source, plan, recipe, shape, CPU)
    assert most.batching == Batching(8, EXCESS, spill=False)
    sizes = []
    for batching in ways(*shape, CPU):
        monkeypatch.setattr(footprints, "ways", lambda *_, batching=batching: iter([batching]))
        sizes.append(footprint(source, plan, recipe, shape, CPU).host_bytes)
    monkeypatch.undo()
    monkeypatch.setattr(footprints, "resident_memory_bytes", lambda: 0)
    monkeypatch.setattr(footprints, "peak_memory_bytes", lambda: 0)
    least = int(1.06 * min(sizes))
    assert least < most.host_bytes
    found = footprint(source, plan, recipe, shape, CPU, least)
    assert found.batching.spill
    assert found.spilled_bytes > 0
    with pytest.raises(RecipeError):
        footprint(source, plan, recipe, shape, CPU, min(sizes))


class Stopped(BaseException):
    """What a test stops a run by."""


def test_a_run_that_is_taken_up_goes_on_with_the_batches_that_it_began_with(model_folder, rows, tmp_path, monkeypatch):
    commit, made = Journal.commit, []

    def stop(self, *arguments):
        commit(self, *arguments)
        made.append(arguments[0])
        if arguments[0].endswith(".0"):
            raise Stopped

    monkeypatch.setattr(footprints, "ways", lambda *_: iter([Batching(2, TIGHT)]))
    quantize(model_folder("llama"), tmp_path / "whole", steps=BOTH, **rows)
    monkeypatch.setattr(Journal, "commit", stop)
    with pytest.raises(Stopped):
        quantize(model_folder("llama"), tmp_path / "out", steps=BOTH, **rows)
    monkeypatch.setattr(Journal, "commit", commit)
    monkeypatch.setattr(footprints, "ways", lambda *_: iter([Batching(8, EXCESS)]))
    used, run_blocks = [], calibrated.run_blocks
    monkeypatch.setattr(
        calibrated,
        "run_blocks",
        lambda *a, **k: used.append([len(b["input_ids"]) for b in a[2]]) or run_blocks(*a, **k),
    )
    quantize(model_folder("llama"), tmp_path / "out", steps=BOTH, **rows)
    assert used == [[1, 2, 2, 2, 2]]
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")


def test_a_limit_that_the_batches_of_a_run_that_was_begun_pass_is_refused(model_folder, rows, tmp_path, monkeypatch):
    commit = Journal.commit

    def stop(self, *arguments):
        commit(self, *arguments)
        if arguments[0].endswith(".0"):
            raise Stopped

    monkeypatch.setattr(Journal, "commit", stop)
    with pytest.raises(Stopped):
        quantize(model_folder("llama"), tmp_path / "out", steps=BOTH, **rows)
    monkeypatch.setattr(Journal, "commit", commit)
    monkeypatch.setattr(footprints, "ways", lambda *_: iter([Batching(1, TIGHT, spill=True)]))
    calibrated_by = footprints._Blocks.calibrated

    def sized(self, done, batches, batching):
        return replace(calibrated_by(self, done, batches, batching), host_bytes=10**9 if batching.spill else 10**10)

    monkeypatch.setattr(footprints._Blocks, "calibrated", sized)
    with pytest.raises(RecipeError, match=r"2,000,000,000 bytes is too little: the run takes at least about 10,5"):
        quantize(model_folder("llama"), tmp_path / "out", steps=BOTH, max_memory="2GB", **rows)
    quantize(model_folder("llama"), tmp_path / "out", steps=BOTH, max_memory="20GB", **rows)


def test_hidden_states_that_find_no_room_are_one_sentence(model_folder, rows, tmp_path, monkeypatch):
    from quantkit_calibration import spilling

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spilling, "SMALLEST", 1)
    monkeypatch.setattr(spilling, "_bytes", full)
    monkeypatch.setattr(footprints, "ways", lambda *_: iter([Batching(2, TIGHT, spill=True)]))
    with pytest.raises(CheckpointError, match=r"no space is left on the disk of .*out.partial"):
        quantize(model_folder("llama"), tmp_path / "out", steps=BOTH, **rows)
    assert not list((tmp_path / "out.partial").rglob("*.bin"))
    monkeypatch.undo()
    quantize(model_folder("llama"), tmp_path / "out", steps=BOTH, restart=True, **rows)


def test_room_for_hidden_states_on_disk_is_asked_for_before_the_work(model_folder, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(footprints, "ways", lambda *_: iter([Batching(2, TIGHT, spill=True)]))
    asked = []
    monkeypatch.setattr(pipeline, "refuse_full_disk", lambda _, needed: asked.append(needed))
    quantize(model_folder("llama"), tmp_path / "out", steps=BOTH, **rows)
    source, plan, recipe = planned(model_folder("llama"), steps=BOTH)
    spilled = footprint(source, plan, recipe, (9, 16), CPU).spilled_bytes
    assert asked == [disk_bytes(source, plan) + spilled]
    assert spilled > 0


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_what_is_foreseen_is_what_is_taken(tmp_path):
    """In a process of its own, on a model whose block is large beside the libraries."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=6144,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    models.save(model, tmp_path / "model")
    ids = torch.randint(3, 200, (8, 128), generator=torch.Generator().manual_seed(0)).tolist()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    command = [sys.executable, "-m", "quantkit", "quantize", str(tmp_path / "model"), "-o", str(tmp_path / "out")]
    command += ["-m", "smoothquant", "-m", "w8a8", "--dataset", str(rows), "--samples", "8", "--seq-len", "128"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert 0.9 <= report["predicted_memory_bytes"] / report["peak_memory_bytes"] <= 1.15
