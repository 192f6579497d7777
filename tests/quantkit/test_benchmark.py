"""benchmark() and `quantkit bench`: what is counted, weighed and compared, on models too small for times to mean much.

Times themselves are tested with a model that has a clock of its own, and by arithmetic on figures that are made up.
"""

import json
import os
import signal
from types import SimpleNamespace

import models
import pytest
import torch

import quantkit
from quantkit import measuring
from quantkit.benchmark import _Process, _recorded_baseline, benchmark, ratios
from quantkit.cli.bench import table
from quantkit.errors import CheckpointError, DataError, QuantkitError
from quantkit.measuring import Subject, Task, prompt_ids, request_line, weight_bytes
from quantkit.modules import QuantizedLinear

SHORT = {"prompt_tokens": 8, "new_tokens": 3, "runs": 2, "device": "cpu", "progress": False}
LINEARS = 14


def task(**changes):
    words = {"name": "m", "folder": "", "dtype": None, "device": "cpu", "backend": "auto", "cache": "auto"}
    words |= {"keep_decoded": False}
    words |= {"prompt_tokens": 8, "new_tokens": 3, "batch": 1, "seed": 0, "threads": None, "trust_remote_code": False}
    return Task(**(words | changes))


def bytes_of(folder):
    return sum(tensor.nbytes for tensor in models.read_tensors(folder).values())


# What is measured


class Slow(torch.nn.Module):
    """A model whose pass over a prompt takes 40 seconds and each step after it 2, by a clock of its own."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        text = SimpleNamespace(vocab_size=10, to_dict=dict)
        self.config = SimpleNamespace(get_text_config=lambda: text, to_dict=dict, _attn_implementation="none")
        self.lengths, self.seconds = [], 0.0

    def forward(self, input_ids):
        self.lengths.append(input_ids.shape[1])
        self.seconds += 40 if input_ids.shape[1] > 1 else 2

    def generate(self, ids, *, max_new_tokens, stopping_criteria, **words):
        self.words = words
        for number in range(max_new_tokens):
            self(ids if number == 0 else ids[:, -1:])
            ids = torch.cat([ids, ids[:, -1:]], dim=1)
            assert not any(bool(stop(ids, None).any()) for stop in stopping_criteria)


def test_prefill_is_the_prompts_pass_and_decode_the_steps_alone():
    model = Slow()
    found = Subject(model, task(new_tokens=5), clock=lambda: model.seconds).run()
    assert found == {"prefill": 40, "decode": 5 * 2}
    assert model.lengths == [8, 8, 1, 1, 1, 1, 1]
    assert model.words["do_sample"] is False
    assert model.words["eos_token_id"] is None


def test_without_new_tokens_only_the_prefill_is_measured(compressed):
    model = quantkit.load(compressed("w8a8"))
    result = benchmark(model, model, **(SHORT | {"new_tokens": 0}))
    assert [each["decode_tokens_per_second"] for each in result["models"]] == [None, None]
    assert set(result["ratios"]) == {"prefill", "weight_bytes"}
    assert "decode" not in table(result)


def test_a_model_that_stops_early_is_no_measurement(monkeypatch):
    model = Slow()
    monkeypatch.setattr(model, "generate", lambda *_, **__: None)
    with pytest.raises(QuantkitError, match="m stops after 0 of 4 tokens: choose fewer new_tokens"):
        Subject(model, task()).run()
    monkeypatch.undo()
    monkeypatch.delattr(Slow, "generate")
    with pytest.raises(QuantkitError, match="m cannot generate: measure the prefill alone, with new_tokens 0"):
        Subject(model, task())


def test_a_model_runs_on_however_soon_it_would_end(model_folder):
    """Greedy steps of a model all of whose tokens end the text."""
    model = quantkit.load(model_folder("llama"))
    model.generation_config.eos_token_id = list(range(models.VOCABULARY))
    assert Subject(model, task(new_tokens=20)).run()["decode"] > 0


# Models in memory, and what is said of them


@pytest.mark.parametrize(
    ("recipe", "name", "op", "prefill"),
    [
        ("w8a8", "llama", "linear_dynamic", LINEARS),
        ("llm-int8", "llama", "linear_llm_int8", LINEARS),
        ("int8-g128", "llama", "linear_weight_only_packed", LINEARS),
    ],
)
def test_calls_are_counted_by_op_and_backend(compressed, recipe, name, op, prefill):
    model = quantkit.load(compressed(recipe, name))
    result = benchmark(model, **(SHORT | {"runs": 1}))
    layer = next(module for module in model.modules() if hasattr(module, "backend_in_use"))
    backend = layer.backend_in_use
    dtype = "int32" if "packed" in op else "int8"
    served = {"op": op, "dtype": dtype, "backend": backend, "calls_prefill": prefill, "calls_step": prefill}
    assert result["models"][0]["served"] == [served]
    assert f"{op} on {backend}: {prefill} calls a prefill, {prefill} a step" in table(result)


def test_products_of_packed_experts_are_counted(compressed):
    """Two layers with attention's four linears each; every expert that a token of the prompt chose multiplies."""
    model = quantkit.load(compressed("w8a8", "mixtral"))
    result = benchmark(model, **(SHORT | {"runs": 1}))
    served = {row["op"]: row for row in result["models"][0]["served"]}
    config = model.config
    linears = 4 * config.num_hidden_layers
    extra = {key: served["linear_dynamic"][f"calls_{key}"] - linears for key in ("prefill", "step")}
    products = 2 * config.num_hidden_layers  # gate and up together, and down
    assert extra["step"] == products * config.num_experts_per_tok
    assert products * config.num_experts_per_tok <= extra["prefill"] <= products * config.num_local_experts


def test_a_model_in_memory_keeps_its_mode_and_torch_its_threads(model_folder):
    model, before = quantkit.load(model_folder("llama")).train(), torch.get_num_threads()
    result = benchmark(model, model, threads=1, **SHORT)
    assert model.training
    assert torch.get_num_threads() == before
    assert result["machine"]["threads"] == 1
    assert [each["peak_memory_bytes"] for each in result["models"]] == [None, None]
    assert set(result["ratios"]) == {"prefill", "decode", "weight_bytes"}
    assert result["models"][0]["served"] == []
    assert "all of the model is float" in table(result)


def test_weights_are_weighed_once_wherever_they_lie(model_folder, compressed):
    tied = quantkit.load(model_folder("llama_tied"))
    buffers = sum(buffer.nbytes for buffer in tied.buffers())
    assert weight_bytes(tied) == bytes_of(model_folder("llama_tied")) + buffers
    packed = quantkit.load(compressed("w8a8"))
    assert weight_bytes(packed) == bytes_of(compressed("w8a8")) + buffers
    packed.model.norm.copies = [{"copy": torch.zeros(7)}, packed.model.norm.weight[1:]]
    assert weight_bytes(packed) == bytes_of(compressed("w8a8")) + buffers + 28


def test_prompts_follow_the_seed_and_hold_no_token_of_special_meaning(model_folder):
    model = quantkit.load(model_folder("llama"))
    model.config.image_token_id, model.config.bos_token_id = 3, None
    model.config.eos_token_id = [4, 5]
    words = {"prompt_tokens": 5000, "batch": 2}
    ids = prompt_ids(model, task(**words))
    assert ids.shape == (2, 5000)
    assert set(ids.unique().tolist()) == set(range(models.VOCABULARY)) - {3, 4, 5}
    assert torch.equal(ids, prompt_ids(model, task(**words)))
    assert not torch.equal(ids, prompt_ids(model, task(seed=1, **words)))


def test_a_static_cache_where_it_is_asked_for_and_offered(compressed):
    model = quantkit.load(compressed("w8a8"))
    assert benchmark(model, cache="static", **SHORT)["models"][0]["cache"] == "static"
    assert benchmark(model, **SHORT)["models"][0]["cache"] == "dynamic"
    with pytest.raises(QuantkitError, match=r"cache is static and .* has none that transformers can compile"):
        benchmark(quantkit.load(compressed("w8a8", "mixtral")), cache="static", **SHORT)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_oss"])
def test_other_architectures_run(compressed, model_type):
    result = benchmark(quantkit.load(compressed("w8a8", model_type)), **(SHORT | {"batch": 2, "runs": 1}))
    assert result["models"][0]["decode_tokens_per_second"]["median"] > 0


@pytest.mark.parametrize("model_type", ["mamba", "rwkv", "gemma3", "qwen3_next"])
def test_other_kinds_of_state_and_models_with_a_vision_part_run(tiny_folder, model_type):
    result = benchmark(quantkit.load(tiny_folder(model_type)), **(SHORT | {"runs": 1}))
    assert result["models"][0]["decode_tokens_per_second"]["median"] > 0


# Arithmetic


def spread(*rates):
    return {"median": sorted(rates)[len(rates) // 2], "min": min(rates), "max": max(rates), "runs": list(rates)}


def made_up(dtype, prefill, decode, weights, peak=None):
    rates = {"prefill_tokens_per_second": spread(*prefill), "decode_tokens_per_second": spread(*decode)}
    return {"dtype": dtype, "weight_bytes": weights, "peak_memory_bytes": peak, **rates}


def test_ratios_are_against_the_baseline_that_is_best_at_that():
    ours = made_up("bfloat16", (200, 180, 240), (30, 40, 20), 50, 400)
    single = made_up("float32", (100, 90, 200), (10, 10, 10), 200, 800)
    half = made_up("bfloat16", (50, 50, 50), (20, 10, 40), 100, 900)
    found = ratios([ours, single, half])
    assert found["prefill"] == {"ratio": 2.0, "min": 1.2, "max": 2.0, "against": "float32"}
    assert found["decode"] == {"ratio": 1.5, "min": 0.5, "max": 4.0, "against": "bfloat16"}
    assert found["weight_bytes"] == {"ratio": 2.0, "against": "bfloat16"}
    assert found["peak_memory_bytes"] == {"ratio": 2.0, "against": "float32"}
    assert ratios([ours]) == {}
    assert set(ratios([ours, made_up("float32", (1,) * 3, (1,) * 3, 1)])) == {"prefill", "decode", "weight_bytes"}


# Processes of their own


def test_the_command_beside_the_model_that_the_report_names(cli, compressed, model_folder):
    words = ("--prompt-tokens", 8, "--new-tokens", 2, "--runs", 2, "--device", "cpu", "--threads", 1)
    result = cli("bench", compressed("w8a8"), *words, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["baseline"] == str(model_folder("llama"))
    assert found["notes"] == [f"baseline {model_folder('llama')}, which the checkpoint's report names"]
    assert [(each["role"], each["dtype"]) for each in found["models"]] == [
        ("model", "float32"),
        ("baseline", "float32"),
        ("baseline", "bfloat16"),
    ]
    ours, single, half = found["models"]
    assert half["weight_bytes"] < single["weight_bytes"] < 2.1 * half["weight_bytes"]
    assert ours["weight_bytes"] < half["weight_bytes"]
    for each in found["models"]:
        assert each["peak_memory_bytes"] > each["peak_before_loading_bytes"] > 2**20
        for key in ("prefill", "decode"):
            rates = each[f"{key}_tokens_per_second"]
            assert 0 < rates["min"] <= rates["median"] <= rates["max"]
            assert len(rates["runs"]) == 2
    assert found["machine"]["threads"] == 1
    assert found["versions"]["torch"] == torch.__version__
    assert result.stderr.splitlines()[-1].startswith("benchmark: 9/9 run")
    text = table(found)
    assert "baseline, bfloat16" in text
    assert f"linear_dynamic on {ours['served'][0]['backend']}: 14 calls a prefill, 14 a step" in text


def test_without_a_baseline_figures_are_absolute_and_that_is_said(cli, model_folder):
    words = ("--prompt-tokens", 8, "--new-tokens", 2, "--runs", 1, "--device", "cpu", "--dtype", "bfloat16")
    result = cli("bench", model_folder("llama"), *words)
    assert result.exit_code == 0, result.stderr
    assert "no baseline, so the figures are absolute: give the float model with --baseline for ratios" in result.stdout
    assert "model, bfloat16" in result.stdout
    assert "ratio" not in result.stdout.split("\n\n")[1]


def test_what_a_models_process_finds_out_is_raised_here():
    process = _Process(task(folder="/nowhere/at/all"))
    try:
        with pytest.raises(CheckpointError, match="/nowhere/at/all does not exist"):
            process.ask(process.task)
        os.kill(process.process.pid, signal.SIGKILL)
        with pytest.raises(QuantkitError, match="was ended by signal 9, most likely for want of memory"):
            process.ask("run")
    finally:
        process.close()


def test_a_bug_in_a_models_process_is_no_sentence(capfd):
    process = _Process(task())
    try:
        process.process.stdin.write("no JSON\n")
        with pytest.raises(RuntimeError, match="the process that measured m ended with status 1"):
            process.ask("run")
    finally:
        process.close()
    assert "Traceback" in capfd.readouterr().err


def test_a_task_survives_its_way_to_the_process():
    assert Task(**json.loads(request_line(task(name="größe", seed=7)))) == task(name="größe", seed=7)


# Mistakes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--prompt-tokens", 0), "prompt_tokens is 0: expected at least 1"),
        (("--batch", 0), "batch is 0: expected at least 1"),
        (("--runs", 0), "runs is 0: expected at least 1"),
        (("--threads", 0), "threads is 0: expected at least 1"),
        (("--new-tokens", -1), "new_tokens is -1: expected at least 0"),
        (("--seed", -1), "seed is -1: expected 0 to 2**63 - 1"),
        (("--device", "tpu"), "device 'tpu' is unknown"),
        (("--baseline", "nowhere/at/all"), "nowhere/at/all does not exist"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(mistake, monkeypatch, compressed, words, sentence):
    monkeypatch.setattr("quantkit.benchmark._Process", None)
    mistake("bench", compressed("w8a8"), *words, says=(sentence,))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8': expected one of float32, float16, bfloat16"),
        ({"baseline_dtype": "int8"}, "baseline_dtype is 'int8': expected one of"),
        ({"cache": "big"}, "cache is 'big': expected one of auto, dynamic, static"),
        ({"backend": "mkl"}, "backend is 'mkl': expected one of auto, torch, triton"),
    ],
)
def test_words_that_mean_nothing_are_refused(words, message):
    with pytest.raises(QuantkitError, match=message):
        benchmark("nowhere", **words)


def test_a_prompt_longer_than_the_context_is_refused(compressed, monkeypatch):
    model = quantkit.load(compressed("w8a8"))
    with pytest.raises(DataError, match=r"prompt_tokens is 512 and new_tokens is 3, 515 together, and .* at most 64"):
        benchmark(model, **(SHORT | {"prompt_tokens": 512}))
    assert benchmark(model, **(SHORT | {"prompt_tokens": 61}))
    monkeypatch.setattr(measuring, "context_length", lambda model: None)
    assert benchmark(model, **(SHORT | {"prompt_tokens": 80, "runs": 1}))  # rotary positions have no end


def test_positions_that_the_config_does_not_tell_of_are_a_sentence(model_folder, monkeypatch):
    monkeypatch.setattr(measuring, "context_length", lambda model: None)
    model = quantkit.load(model_folder("gpt2"))
    positions = model.config.n_positions
    with pytest.raises(DataError, match="which its config doesn't say: choose a smaller prompt_tokens"):
        benchmark(model, **(SHORT | {"prompt_tokens": positions + 1}))


def test_models_of_different_vocabularies_are_refused(model_folder):
    model, other = quantkit.load(model_folder("llama")), models.llama_model(vocab_size=100)
    with pytest.raises(DataError, match=r"has a vocabulary of 260 and .* one of 100: give the baseline"):
        benchmark(model, other, **SHORT)


def test_models_that_memory_cannot_hold_are_refused(monkeypatch, compressed):
    monkeypatch.setattr("quantkit.benchmark._available_bytes", lambda: bytes_of(compressed("w8a8")) + 1000)
    with pytest.raises(QuantkitError, match=r"GiB together and .* GiB are free: choose one baseline_dtype"):
        benchmark(compressed("w8a8"), **SHORT)


def test_a_lack_of_memory_is_a_sentence(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = Slow()
    monkeypatch.setattr(measuring, "_forward", fail)
    with pytest.raises(
        QuantkitError, match="too little memory for m with batch 1 and 8 tokens of prompt: choose fewer"
    ):
        Subject(model, task(new_tokens=0)).run()


def report(folder, model):
    (folder / "quantkit_report.json").write_text(model if isinstance(model, str) else json.dumps({"model": str(model)}))
    return folder


def test_the_baseline_of_a_report_is_the_same_model_or_none(compressed, model_folder, tmp_path):
    folder = models.copy(compressed("w8a8"), tmp_path / "copy")
    assert _recorded_baseline(report(folder, model_folder("llama")))[0] == model_folder("llama")
    assert _recorded_baseline(model_folder("llama"))[0] is None
    for other, words in ((folder, "no folder here"), (tmp_path / "gone", "no folder here")):
        baseline, said = _recorded_baseline(report(folder, other))
        assert baseline is None
        assert words in said
    for other in (model_folder("gpt2"), compressed("w8a8")):
        assert "now another model" in _recorded_baseline(report(folder, other))[1]
    for damaged in ("[", "[]", "{}"):
        with pytest.raises(CheckpointError, match=r"quantkit_report\.json is damaged .*: give the float model with"):
            _recorded_baseline(report(folder, damaged))


# Weights that are kept decoded


@pytest.mark.parametrize("recipe", ["fp8", "int8", "w8a8"])
def test_weights_that_are_kept_decoded_are_weighed(compressed, recipe, caplog):
    """Two bytes a weight in bfloat16, which load() keeps of all layers but those that multiply int8 with int8."""
    folder = compressed(recipe, "llama")
    weights = {}
    for keep in (False, True):
        subject = Subject(quantkit.load(folder, dtype="bfloat16", keep_decoded=keep), task(keep_decoded=keep))
        subject.warm_up()
        weights[keep] = weight_bytes(subject.model)
    layers = [each for each in subject.model.modules() if isinstance(each, QuantizedLinear)]
    decoded = 0 if recipe == "w8a8" else 2 * sum(each.in_features * each.out_features for each in layers)
    assert weights[True] - weights[False] == decoded
    assert ("keep_decoded is unused" in caplog.text) == (recipe == "w8a8")


def test_a_model_in_memory_is_not_made_to_keep_decoded_weights(compressed):
    with pytest.raises(QuantkitError, match="keep_decoded is for models that are loaded"):
        benchmark(quantkit.load(compressed("fp8", "llama")), keep_decoded=True, **SHORT)
