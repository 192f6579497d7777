"""A transformed model is trained, its zeros stay, and a run that is stopped goes on to the same bits."""

import json
import math
import os
import signal
import subprocess
import sys

import models
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from quantkit import load, quantize, recover
from quantkit.errors import QuantkitError
from quantkit.journal import STATE
from quantkit.methods.recover import count_of
from quantkit.recovery.training import Keeper, Order, Schedule, Training, loss_of
from quantkit.shards import ShardReader, read_tensors, write_tensors
from quantkit.sparsity import is_24

WORDS = {"tokens": 1024, "batch_tokens": 128, "seq_len": 32, "learning_rate": 0.01, "warmup": 0.2, "progress": False}


class StoppedError(BaseException):
    """What a test stops a run by."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    said = " ".join(f"{number} is no {number * number % 997}." for number in range(60))
    (folder / "train.txt").write_text(said, encoding="utf-8")
    (folder / "held.txt").write_text(said[::-1], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory, model_folder):
    """Tiny models, their linear layers pruned to 2:4."""
    made = {}

    def folder(name="llama", pattern="2:4"):
        if (name, pattern) not in made:
            output = tmp_path_factory.mktemp("sparse") / name
            step = f"sparse24:criterion=magnitude,pattern={pattern}"
            quantize(model_folder(name), output, steps=[step], progress=False)
            made[name, pattern] = output
        return made[name, pattern]

    return folder


def tensors(folder):
    reader = ShardReader(folder)
    return {name: reader.get(name) for name in reader.tensors}


def contents(folder):
    """Every file's bytes, but for the report's seconds and memory."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    report = json.loads(found.pop("quantkit_report.json"))
    for key in ("seconds", "peak_memory_bytes", "predicted_memory_bytes"):
        del report[key]
    del report["recovery"]["seconds"], found["README.md"]
    return found | {"quantkit_report.json": report}


# What is trained


def test_the_loss_is_the_documented_one():
    """Against plain sums in float64."""
    generator = torch.Generator().manual_seed(0)
    logits, original = (torch.randn(2, 5, 7, generator=generator).double() for _ in range(2))
    windows = torch.randint(0, 7, (2, 5), generator=generator)
    ce = kl = 0.0
    for b in range(2):
        for t in range(4):
            q, p = logits[b, t].softmax(-1), original[b, t].softmax(-1)
            ce += -math.log(q[windows[b, t + 1]]) / 8
            kl += sum(float(p[v]) * (math.log(p[v]) - math.log(q[v])) for v in range(7)) / 8
    for weight in (0.0, 0.3, 1.0):
        found = loss_of(logits.float(), original.float(), windows, weight)
        assert float(found) == pytest.approx((1 - weight) * ce + weight * kl, rel=1e-5)


def test_the_rate_rises_and_falls_along_a_cosine():
    schedule = Schedule(steps=10, windows=1, seq_len=2, rate=2.0, warmup=4, distill=0, batch=1, seed=0)
    rates = [schedule.rate_at(step) for step in range(10)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:] == pytest.approx([1 + math.cos(math.pi * k / 6) for k in range(6)])


def test_every_pass_reads_every_window_once_in_another_order():
    schedule = Schedule(steps=9, windows=2, seq_len=2, rate=1, warmup=0, distill=0, batch=1, seed=3)
    order = Order(schedule, 6)
    read = [int(number) for step in range(9) for number in order.of(step)]
    passes = [read[:6], read[6:12], read[12:]]
    assert all(sorted(each) == list(range(6)) for each in passes)
    assert passes[0] != passes[1] != passes[2]
    assert [int(number) for number in Order(schedule, 6).of(5)] == read[10:12]  # whatever was asked for before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_adamw_on_masked_gradients(tmp_path, text, dtype):
    """Against a plain loop: torch's AdamW, clipped gradients, the mask after each step; master weights in float32."""
    folder = models.save(models.llama_model(dtype), tmp_path / "model")
    quantize(folder, tmp_path / "sparse", steps=["sparse24:criterion=magnitude"], progress=False)
    recover(tmp_path / "sparse", tmp_path / "out", dataset=str(text / "train.txt"), **WORDS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    zeros = {name: p == 0 for name, p in model.named_parameters() if "proj" in name}
    tokenizer = models.tokenizer()
    ids = torch.tensor(tokenizer((text / "train.txt").read_text(encoding="utf-8"))["input_ids"])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    schedule = Schedule(steps=8, windows=4, seq_len=32, rate=0.01, warmup=2, distill=0, batch=4, seed=0)
    order = Order(schedule, len(windows))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(8):
        batch = windows[order.of(step)]
        logits = model(input_ids=batch).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        for name, parameter in model.named_parameters():
            if name in zeros:
                parameter.grad[zeros[name]] = 0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = schedule.rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in zeros:
                    parameter[zeros[name]] = 0
    expected, found = dict(model.named_parameters()), tensors(tmp_path / "out")
    before = tensors(tmp_path / "sparse")
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        assert tensor.dtype == before[name].dtype
        limit = 1e-4 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(tensor.float(), expected[name].detach(), rtol=limit, atol=limit)
        assert not torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_zeros_stay_and_all_else_is_as_it_was_stored(tmp_path, text, sparse, name):
    report = recover(sparse(name), tmp_path / "out", dataset=str(text / "train.txt"), **WORDS)
    before, after = tensors(sparse(name)), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    pruned = [key for key, tensor in before.items() if tensor.ndim > 1 and (tensor == 0).float().mean() > 0.4]
    assert pruned
    for key, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[key].dtype, after[key].shape)
        if key in pruned:
            assert torch.equal(tensor == 0, after[key] == 0)
            assert is_24(after[key]) or is_24(after[key], -2)
            assert not torch.equal(tensor, after[key])
    assert report.recovery.tokens == 1024
    assert report.recovery.last_loss < report.recovery.first_loss
    assert set(report.recovery.zeros["patterns"]) == {"2:4"}
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config == json.loads((sparse(name) / "config.json").read_text(encoding="utf-8"))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (sparse(name) / "tokenizer.json").read_bytes()
    assert load(tmp_path / "out") is not None


def test_unstructured_zeros_stay(tmp_path, text, sparse):
    """Known from the report also where there are few."""
    folder = sparse("llama", "unstructured:0.05")
    report = recover(folder, tmp_path / "out", dataset=str(text / "train.txt"), **WORDS)
    before, after = tensors(folder), tensors(tmp_path / "out")
    counts = {key: int((tensor == 0).sum()) for key, tensor in before.items() if "proj" in key}
    assert all(counts.values())
    assert {key: int((after[key] == 0).sum()) for key in counts} == counts
    assert report.recovery.zeros["patterns"] == {"unstructured": len(counts)}


def test_only_linear_layers(tmp_path, text, sparse):
    recover(sparse(), tmp_path / "out", dataset=str(text / "train.txt"), train="linear", **WORDS)
    before, after = tensors(sparse()), tensors(tmp_path / "out")
    changed = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    assert changed == {key for key in before if "proj" in key or key == "lm_head.weight"}


@pytest.mark.parametrize(
    "changes", [pytest.param({"batch_size": 1}, marks=pytest.mark.exhaustive), {"gradient_checkpointing": True}]
)
def test_how_it_is_computed_changes_nothing_but_rounding(tmp_path, text, sparse, changes):
    data = {"dataset": str(text / "train.txt"), **WORDS}
    recover(sparse(), tmp_path / "one", **data)
    recover(sparse(), tmp_path / "two", **data, **changes)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-3)


def test_bf16_products_train_float32_weights(tmp_path, text, sparse):
    data = {"dataset": str(text / "train.txt"), **WORDS}
    report = recover(sparse(), tmp_path / "out", mixed_precision="bf16", **data)
    exact = recover(sparse(), tmp_path / "exact", **data)
    assert report.recovery.last_loss == pytest.approx(exact.recovery.last_loss, rel=0.02)
    assert report.recovery.last_loss != exact.recovery.last_loss
    assert tensors(tmp_path / "out")["lm_head.weight"].dtype == torch.float32


def test_distillation_comes_nearer_to_the_original(tmp_path, text, sparse, model_folder):
    words = {**WORDS, "dataset": str(text / "train.txt"), "teacher": model_folder(), "distill": 1, "tokens": 4096}
    report = recover(sparse(), tmp_path / "out", **words)
    original, before, after = (load(each) for each in (model_folder(), sparse(), tmp_path / "out"))
    ids = torch.tensor(models.tokenizer()((text / "train.txt").read_text(encoding="utf-8"))["input_ids"])[None, :32]
    target = original(ids).logits.detach().log_softmax(-1)
    kl = [
        float(F.kl_div(model(ids).logits.log_softmax(-1), target, reduction="batchmean", log_target=True).detach())
        for model in (before, after)
    ]
    assert report.recovery.last_loss < 0.8 * report.recovery.first_loss
    assert kl[1] < kl[0]


# A run that is stopped


def stopped_at(monkeypatch, step, how):
    """Do something after that step of a training."""
    run = Training.run

    def stopping(self, tell):
        def told(state, seconds):
            tell(state, seconds)
            if state.done == step:
                how()

        return run(self, told)

    monkeypatch.setattr(Training, "run", stopping)


def die():
    raise StoppedError


@pytest.mark.parametrize(("how", "lora"), [("kill", 0), ("interrupt", 0), ("interrupt", 4)])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path, text, sparse, monkeypatch, how, lora, caplog):
    if lora:
        pytest.importorskip("peft", reason="peft is not installed")
    words = {**WORDS, "dataset": str(text / "train.txt"), "lora": lora, "checkpoint_every": 2}
    words |= {"teacher": sparse("llama", "unstructured:0.05")}
    recover(sparse(), tmp_path / "whole", **words)
    with monkeypatch.context() as patch:
        if how == "kill":  # what was done since the last that was kept is done again
            stopped_at(patch, 3, die)
        else:
            stopped_at(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(StoppedError if how == "kill" else KeyboardInterrupt):
            recover(sparse(), tmp_path / "out", **words)
    assert not (tmp_path / "out").exists()
    state = tmp_path / "out.partial" / STATE
    kept = [path.name for path in state.glob("training-*")]
    assert kept == [f"training-{2 if how == 'kill' else 3:09d}.safetensors"]
    assert "the same command goes on from there" in caplog.text
    with monkeypatch.context() as patch:
        stopped_at(patch, 7, die)
        with pytest.raises(StoppedError):
            recover(sparse(), tmp_path / "out", **words)
    recover(sparse(), tmp_path / "out", **words)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    events = [json.loads(line)["event"] for line in (tmp_path / "out.log.jsonl").read_text().splitlines()]
    assert events.count("resume") == 2
    assert events[-1] == "finish"


def test_dropout_draws_the_same_when_a_run_goes_on(tmp_path, text, monkeypatch):
    model = models.llama_model(attention_dropout=0.3)
    folder = models.save(model, tmp_path / "model")
    words = {**WORDS, "dataset": str(text / "train.txt"), "checkpoint_every": 2}
    recover(folder, tmp_path / "whole", **words)
    with monkeypatch.context() as patch:
        stopped_at(patch, 4, die)
        with pytest.raises(StoppedError):
            recover(folder, tmp_path / "out", **words)
    recover(folder, tmp_path / "out", **words)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.fixture
def begun(tmp_path, text, sparse, monkeypatch):
    """The words of a run that was stopped."""
    words = {**WORDS, "dataset": str(text / "train.txt"), "checkpoint_every": 2}
    with monkeypatch.context() as patch:
        stopped_at(patch, 3, die)
        with pytest.raises(StoppedError):
            recover(sparse(), tmp_path / "out", **words)
    return words


def test_another_setting_is_refused(tmp_path, sparse, begun):
    with pytest.raises(QuantkitError, match=r"was begun with another recipe.*lr=0\.01.*--restart") as raised:
        recover(sparse(), tmp_path / "out", **begun | {"learning_rate": 0.02})
    assert "\n" not in str(raised.value)
    recover(sparse(), tmp_path / "out", **begun | {"learning_rate": 0.02, "restart": True})


def test_a_damaged_state_is_refused(tmp_path, sparse, begun):
    (file,) = (tmp_path / "out.partial" / STATE).glob("training-*")
    found = read_tensors(file)
    found["weight.lm_head.weight"][0, 0] += 1
    write_tensors(file, found)
    with pytest.raises(QuantkitError, match=r"training-000000002.safetensors is not as it was written.*--restart"):
        recover(sparse(), tmp_path / "out", **begun)


def test_a_loss_that_is_not_finite(tmp_path, text, sparse, monkeypatch):
    gradients = Training._gradients

    def broken(self, numbers, step):
        return math.nan if step == 5 else gradients(self, numbers, step)

    monkeypatch.setattr(Training, "_gradients", broken)
    words = {**WORDS, "dataset": str(text / "train.txt"), "checkpoint_every": 2}
    with pytest.raises(QuantkitError, match=r"the loss is nan in step 6 of 8.*smaller --lr, with --restart"):
        recover(sparse(), tmp_path / "out", **words)
    assert [path.name for path in (tmp_path / "out.partial" / STATE).glob("training-*")]
    assert not (tmp_path / "out").exists()


# LoRA


def test_lora_is_merged_and_keeps_zeros(tmp_path, text, sparse, monkeypatch):
    """The merged weight is W + 2 B A where W isn't zero, and nothing else changed."""
    pytest.importorskip("peft", reason="peft is not installed")
    kept, keep = {}, Keeper.keep

    def keeping(self, state, trained, optimizer):
        kept.update({name: parameter.detach().clone() for name, parameter in trained.items()})
        keep(self, state, trained, optimizer)

    monkeypatch.setattr(Keeper, "keep", keeping)
    report = recover(sparse(), tmp_path / "out", dataset=str(text / "train.txt"), lora=4, **WORDS)
    before, after = tensors(sparse()), tensors(tmp_path / "out")
    assert report.recovery.layers == 14
    assert report.recovery.trained == sum(each.numel() for each in kept.values())
    for name, tensor in before.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if "proj" not in name:
            assert torch.equal(tensor, after[name])
            continue
        delta = 2 * kept[f"{stem}.lora_B.default.weight"] @ kept[f"{stem}.lora_A.default.weight"]
        torch.testing.assert_close(after[name], torch.where(tensor == 0, 0, tensor + delta), rtol=1e-6, atol=1e-6)
        assert torch.equal(tensor == 0, after[name] == 0)
        assert float(delta.abs().max()) > 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        pytest.param("llama", marks=pytest.mark.exhaustive),
        pytest.param("mixtral", marks=pytest.mark.exhaustive),
    ],
)
def test_what_lora_trains_is_what_is_written(tmp_path, text, sparse, monkeypatch, name):
    """The wrapped model's logits after the last step are those of the checkpoint."""
    pytest.importorskip("peft", reason="peft is not installed")
    ids, logits, run = torch.arange(32)[None] + 100, [], Training.run

    def running(self, tell):
        state = run(self, tell)
        logits.append(self.model(input_ids=ids).logits.detach())
        return state

    monkeypatch.setattr(Training, "run", running)
    recover(sparse(name), tmp_path / "out", dataset=str(text / "train.txt"), lora=4, **WORDS)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    untrained = AutoModelForCausalLM.from_pretrained(sparse(name), dtype=torch.float32)(ids).logits
    torch.testing.assert_close(found, logits[0], rtol=1e-3, atol=1e-3)
    assert float((untrained - found).detach().abs().max()) > 0.05


def test_lora_without_peft(tmp_path, text, sparse, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(QuantkitError, match=r"pip install 'quantkit\[recover\]'"):
        recover(sparse(), tmp_path / "out", dataset=str(text / "train.txt"), lora=4, **WORDS)


# The command


def test_the_report_says_perplexity_three_times(tmp_path, text, sparse, model_folder, cli):
    words = ("--tokens", "512", "--batch-tokens", "128", "--seq-len", "32", "--lr", "0.003", "--lora", "0")
    words = (*words, "--teacher", model_folder(), "--distill", "0", "--eval-dataset", text / "held.txt", "--json")
    result = cli("recover", sparse(), "-o", tmp_path / "out", "--dataset", text / "train.txt", *words)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "out" / "quantkit_report.json").read_text(encoding="utf-8"))
    said = report["recovery"]["perplexity"]
    from quantkit import evaluate

    for key, folder in (("original", model_folder()), ("transformed", sparse()), ("recovered", tmp_path / "out")):
        expected = evaluate(folder, text / "held.txt", seq_len=32, progress=False)
        assert (said[key], said[f"{key}_stderr"]) == (expected["perplexity"], expected["perplexity_stderr"])
    assert report["recovery"]["tokens"] == 512
    assert report["pruned"] == json.loads((sparse() / "quantkit_report.json").read_text(encoding="utf-8"))["pruned"]
    assert report["recipe"]["steps"][0].startswith("sparse24")
    assert report["recipe"]["steps"][1].startswith("recover:tokens=512,lr=0.003,batch=128")
    assert "after recovery" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "it takes about" in result.stderr
    assert "recovering: 512/512 tokens, loss" in result.stderr
    assert "00:00 left" in result.stderr


MISTAKES = {
    "a budget below one step": (["--tokens", "100"], ["100 tokens are less than one step", "--batch-tokens"]),
    "no number": (["--tokens", "many"], ["tokens='many'", "recover", "500k"]),
    "no rate": (["--lr", "-1"], ["lr='-1'", "positive number"]),
    "distillation without a teacher": (["--distill", "0.5"], ["distill=0.5", "--teacher MODEL"]),
    "fp16 on a CPU": (["--mixed-precision", "fp16", "--device", "cpu"], ["fp16", "GPU", "bf16"]),
    "too little memory": (["--max-memory", "10MB"], ["--max-memory 10,000,000", "AdamW", "--batch-size"]),
    "the same text": (["--eval-dataset", "TRAIN"], ["is the text to train on"]),
    "too long a window": (["--seq-len", "100"], ["seq_len is 100", "at most 64"]),
    "both ways": (["--lora", "4", "--train", "linear"], ["lora", "train"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(tmp_path, text, sparse, mistake, name):
    options, says = MISTAKES[name]
    options = [str(text / "train.txt") if option == "TRAIN" else option for option in options]
    words = ["--batch-tokens", "128", "--seq-len", "32", "--quiet"]
    command = ["recover", sparse(), "-o", tmp_path / "out", "--dataset", text / "train.txt", *words, *options]
    mistake(*command, says=tuple(says))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_compressed_model_is_refused(tmp_path, text, compressed, mistake):
    said = mistake("recover", compressed("w8a8"), "-o", tmp_path / "out", "--dataset", text / "train.txt")
    assert "is compressed (quant_method" in said
    assert "-m sparse24 -m recover -m w8a8" in said


def test_a_text_that_is_too_short(tmp_path, sparse, mistake):
    (tmp_path / "short.txt").write_text("so short", encoding="utf-8")
    said = mistake("recover", sparse(), "-o", tmp_path / "out", "--dataset", tmp_path / "short.txt", "--seq-len", "32")
    assert "8 tokens, less than one window of seq_len 32" in said


@pytest.mark.parametrize(("text_", "count"), [("2M", 2_000_000), ("500k", 500_000), ("1.5B", 1_500_000_000), ("7", 7)])
def test_counts(text_, count):
    assert count_of(text_) == count


@pytest.mark.exhaustive
def test_two_processes_train_as_one_does(tmp_path, text, sparse):
    """But for the rounding of sums; real processes, which talk by gloo."""
    words = ["--dataset", str(text / "train.txt"), "--tokens", "1024", "--batch-tokens", "128", "--seq-len", "32"]
    words = ["recover", str(sparse()), "--lr", "0.003", "--device", "cpu", *words]
    alone = [sys.executable, "-m", "quantkit"]
    together = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "quantkit",
    ]
    for name, program in (("one", alone), ("two", together)):
        done = subprocess.run(
            [*program, *words, "-o", str(tmp_path / name)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    one, two, before = tensors(tmp_path / "one"), tensors(tmp_path / "two"), tensors(sparse())
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
        assert torch.equal(two[name] == 0, before[name] == 0)
    assert json.loads((tmp_path / "two" / "quantkit_report.json").read_text())["recovery"]["processes"] == 2
