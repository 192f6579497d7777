"""evaluate() and `quantkit eval`, against plain loops over the models' logits."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from quantkit_eval.tasks import encode_passage

from quantkit import evaluation, pairing
from quantkit.checkpoint import Hub
from quantkit.cli.evaluate import command, table
from quantkit.errors import CheckpointError, DataError, QuantkitError
from quantkit.evaluation import check_text, evaluate
from quantkit.pairing import same_place, tokenizer_of
from quantkit.texts import Texts, encode, read, tokenize

KEYS = [
    "model",
    "dataset",
    "protocol",
    "tokens",
    "perplexity",
    "perplexity_stderr",
    "bits_per_byte",
    "seconds",
    "peak_memory_bytes",
    "backend",
    "served",
]
COMPARED = [
    "baseline_perplexity",
    "baseline_perplexity_stderr",
    "kl_mean",
    "kl_p99",
    "top1_agreement",
    "delta_p_rms",
]
CONTEXT = 32
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n\n" * 8 + "Ünd noch ein Satz."


def tiny_model(seed: int, vocabulary: int = 300) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.3,
        )
    ).eval()


def byte_tokenizer(vocabulary: int = 300) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and base/ (other weights) with one tokenizer, and text.txt."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("model", "base")):
        tiny_model(seed).save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    return root


def plain(model: Any, tokens: list[int], seq_len: int) -> list[list[list[float]]]:
    """Log softmax in float64 of each window alone, [window][position][vocabulary]."""
    rows = []
    for start in range(0, len(tokens) - seq_len + 1, seq_len):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens[start : start + seq_len]])).logits[0, :-1]
        rows.append(logits.double().log_softmax(-1).tolist())
    return rows


def test_perplexity_and_comparison_are_the_plain_loop(folder: Path) -> None:
    """Batched and single forward passes differ by float32 rounding, 1e-6 relative; a mistake by far more than 1e-5."""
    tokens = tokenize(read(folder / "text.txt"), byte_tokenizer()).ids.tolist()
    result = evaluate(folder / "model", folder / "text.txt", folder / "base", seq_len=16, batch_size=3, progress=False)
    q, p = plain(tiny_model(0), tokens, 16), plain(tiny_model(1), tokens, 16)
    nll, base_nll, kl, agreed, change = [], [], [], [], []
    for w, (q_w, p_w) in enumerate(zip(q, p, strict=True)):
        target = tokens[16 * w + 1 : 16 * w + 16]
        nll.append([-row[t] for row, t in zip(q_w, target, strict=True)])
        base_nll.append([-row[t] for row, t in zip(p_w, target, strict=True)])
        for q_t, p_t, t in zip(q_w, p_w, target, strict=True):
            kl.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p_t, q_t, strict=True)))
            agreed.append(p_t.index(max(p_t)) == q_t.index(max(q_t)))
            change.append(math.exp(q_t[t]) - math.exp(p_t[t]))
    perplexity = math.exp(statistics.fmean(map(statistics.fmean, nll)))
    stderr = perplexity * statistics.stdev(map(statistics.fmean, nll)) / math.sqrt(len(nll))
    expected = {
        "tokens": 15 * len(nll),
        "perplexity": perplexity,
        "perplexity_stderr": stderr,
        "bits_per_byte": math.log2(perplexity) * len(tokens) / len(TEXT.encode()),
        "baseline_perplexity": math.exp(statistics.fmean(map(statistics.fmean, base_nll))),
        "kl_mean": statistics.fmean(kl),
        "top1_agreement": statistics.fmean(agreed),
        "delta_p_rms": math.sqrt(statistics.fmean(x * x for x in change)),
    }
    assert {key: result[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert sorted(kl)[-4] < result["kl_p99"] < max(kl)
    assert list(result) == [*KEYS, "baseline_served", *COMPARED, "warning"]
    assert result["protocol"] == f"{len(nll)} windows of 16 tokens that don't overlap"
    assert result["model"] == str(folder / "model")
    assert result["backend"] == "torch"
    assert result["peak_memory_bytes"] > 10**8
    assert 0 < result["seconds"] < 60


def test_a_warning_comes_with_a_divergence_above_the_threshold(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """exp(KL) is what perplexity is multiplied by on the baseline's own text; at the threshold itself there is none."""
    arguments = [str(folder / "model"), "--dataset", str(folder / "text.txt"), "--seq-len", "16", "--baseline"]
    command_line = [*arguments, str(folder / "base")]
    result = json.loads(CliRunner().invoke(command, [*command_line, "--json"], catch_exceptions=False).stdout)
    kl = result["kl_mean"]
    assert kl > evaluation.LOSSY_KL == 0.1
    assert f"a mean KL of {kl:.3g} nats is above 0.1: " in result["warning"]
    assert f"perplexity is {math.exp(kl):.3g} times the baseline's" in result["warning"]
    lines = CliRunner().invoke(command, command_line, catch_exceptions=False).stdout.splitlines()
    assert [line for line in lines if line.startswith("warning ")] == [f"warning             {result['warning']}"]
    monkeypatch.setattr(evaluation, "LOSSY_KL", kl)
    quiet = evaluate(folder / "model", folder / "text.txt", folder / "base", seq_len=16, progress=False)
    assert quiet["kl_mean"] == kl
    assert "warning" not in quiet


def test_defaults_caps_and_models_in_memory(folder: Path) -> None:
    """The default window is the context; a model in memory gives what its folder gives, and keeps its mode."""
    model = tiny_model(0).train()
    result = evaluate(model, folder / "text.txt", tokenizer=byte_tokenizer(), max_tokens=100, progress=False)
    assert model.training
    assert result["protocol"] == f"3 windows of {CONTEXT} tokens that don't overlap"
    assert list(result) == KEYS
    assert result["model"] == "LlamaForCausalLM"
    other = evaluate(folder / "model", str(folder / "text.txt"), max_tokens=100, progress=False)
    assert other["perplexity"] == result["perplexity"]
    itself = evaluate(model, folder / "text.txt", folder / "model", tokenizer=byte_tokenizer(), progress=False)
    assert (itself["kl_mean"], itself["top1_agreement"], itself["delta_p_rms"]) == (0.0, 1.0, 0.0)


def test_tokens_need_no_tokenizer_and_have_no_bits_per_byte(folder: Path, tmp_path: Path) -> None:
    tokens = tokenize(read(folder / "text.txt"), byte_tokenizer()).ids.tolist()
    path = tmp_path / "tokens.jsonl"
    path.write_text(json.dumps({"input_ids": tokens}))
    result = evaluate(tiny_model(0), path, seq_len=16, progress=False)
    assert result["bits_per_byte"] is None
    text = evaluate(folder / "model", folder / "text.txt", seq_len=16, progress=False)
    assert result["perplexity"] == text["perplexity"]


# Last word


def word_model(seed: int, tokenizer: Any) -> Any:
    """A tiny model whose first choice is nearly always a token that begins with a space, as a next word does."""
    model = tiny_model(seed)
    for token, index in tokenizer.get_vocab().items():
        if not token.startswith("Ġ"):
            model.lm_head.weight.data[index] = 0
    return model


def passages_for(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Passages of many lengths, every second one with the model's own first choice as its continuation."""
    rows = []
    words = TEXT.split()
    for length in range(1, 14):
        context = " ".join(words[length : 3 * length])
        continuation = " " + words[3 * length]
        if length % 2:
            ids = encode(tokenizer, context)[-CONTEXT:]
            with torch.no_grad():
                choice = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            continuation = tokenizer.decode([choice])
        rows.append({"context": context, "continuation": continuation})
    path = folder / "passages.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_last_word_batched_is_last_word_alone_and_the_plain_loop(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model, base = word_model(0, tokenizer), word_model(1, tokenizer)
    path = passages_for(model, tokenizer, tmp_path)
    nats, right, cut = [], [], 0
    for context, continuation in read(path).passages:
        passage = encode_passage(context, continuation, lambda text: encode(tokenizer, text), CONTEXT)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([passage.tokens[:-1]])).logits[0].double().log_softmax(-1)
        rows, targets = logits[-passage.continuation :], passage.tokens[-passage.continuation :]
        nats.append(-sum(float(row[t]) for row, t in zip(rows, targets, strict=True)))
        right.append(all(int(row.argmax()) == t for row, t in zip(rows, targets, strict=True)))
        cut += passage.truncated
    numbers = {
        "accuracy": statistics.fmean(right),
        "accuracy_stderr": statistics.stdev(right) / math.sqrt(len(right)),
        "perplexity": math.exp(statistics.fmean(nats)),
        "perplexity_stderr": math.exp(statistics.fmean(nats)) * statistics.stdev(nats) / math.sqrt(len(nats)),
    }
    exact = {"passages": 13, "truncated_passages": cut, "protocol": "last-word", "bits_per_byte": None}
    assert 0 < sum(right) < 13
    assert 0 < cut < 13
    for batch_size in (1, 5, None):
        result = evaluate(model, path, base, batch_size=batch_size, tokenizer=tokenizer, progress=False)
        assert {key: result[key] for key in numbers} == pytest.approx(numbers, rel=1e-5)
        assert {key: result[key] for key in exact} == exact
    assert list(result)[: len(KEYS)] == KEYS
    assert {"baseline_accuracy", *COMPARED} < set(result)
    assert result["kl_mean"] > 0


def test_last_word_is_capped_by_whole_passages(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(0), byte_tokenizer()
    path = passages_for(model, tokenizer, tmp_path)
    assert evaluate(model, path, max_tokens=60, tokenizer=tokenizer, progress=False)["passages"] < 13
    with pytest.raises(DataError, match="max_tokens is 2, less than the first passage"):
        evaluate(model, path, max_tokens=2, tokenizer=tokenizer, progress=False)


def left_tokenizer() -> Any:
    """A word and the space behind it are one token; a character that no token holds is dropped."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["the", "the ", "dog", "dog ", "sleeps", "sleeps ", " "]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^ ]+ ?| "), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_tokenizer_that_attaches_spaces_to_the_left_does_not_end_the_set() -> None:
    """Row 2 holds no token to predict, row 3 too many, row 4 none to read; the others are scored, in two parts."""
    model, tokenizer = tiny_model(0), left_tokenizer()
    rows = [("the dog", " sleeps"), ("the dog", "日本"), ("the", " dog" * (CONTEXT + 1)), ("日本", " dog")]
    texts = Texts("rows", "passages", "", passages=(*rows, ("the dog sleeps the", " dog")))
    result = evaluate(model, texts, tokenizer=tokenizer, progress=False)
    counted = {key: result[f"{key}_passages"] for key in ("truncated", "split", "skipped")}
    assert (result["passages"], counted) == (2, {"truncated": 0, "split": 2, "skipped": 3})
    nats = []
    for context, target in (([1, 2], [6, 4]), ([1, 3, 5, 0], [6, 2])):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + target])).logits[0, -3:-1].double()
        nats.append(-float(logits.log_softmax(-1).gather(-1, torch.tensor(target)[:, None]).sum()))
    assert result["perplexity"] == pytest.approx(math.exp(statistics.fmean(nats)), rel=1e-5)
    assert "2, 2 encoded in two parts, 3 more left out" in table(result)
    check_text(texts, tokenizer, model, "m")


def test_a_set_without_a_single_passage_to_score_is_refused() -> None:
    texts = Texts("odd", "passages", "", passages=(("the dog", "日本"),))
    with pytest.raises(DataError, match=r"odd has no passage that can be scored \(row 1: a passage needs at least"):
        evaluate(tiny_model(0), texts, tokenizer=left_tokenizer(), progress=False)


# Where the model is


def test_a_model_in_memory_has_the_tokenizer_of_its_folder(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert tokenizer_of(model, Hub()).get_vocab() == byte_tokenizer().get_vocab()
    assert tokenizer_of(tiny_model(0), Hub()) is None
    found = evaluate(model, folder / "text.txt", seq_len=16, progress=False)
    given = evaluate(tiny_model(0), folder / "text.txt", seq_len=16, tokenizer=byte_tokenizer(), progress=False)
    assert found["perplexity"] == given["perplexity"]


@pytest.mark.parametrize(
    ("one", "other", "current", "same"),
    [
        ("cuda", "cuda:0", 0, True),
        ("cuda:1", "cuda", 1, True),
        ("cuda", "cuda:0", 1, False),
        ("cuda:0", "cuda:1", 0, False),
        ("cpu", "cpu:0", 1, True),
        ("cpu", "cuda:0", 0, False),
    ],
)
def test_a_gpu_without_an_index_is_the_current_one(one: str, other: str, current: int, same: bool) -> None:
    assert same_place(torch.device(one), torch.device(other), current) is same


def test_a_model_on_the_current_gpu_is_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(torch.nn.Module):
        device = torch.device("cuda:1")

    monkeypatch.setattr(pairing, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert pairing.place_of(OnGpu(), None, "cuda") == "cuda"
    with pytest.raises(QuantkitError, match=r"device is cuda:0 and OnGpu is on cuda:1: move it or say device auto"):
        pairing.place_of(OnGpu(), None, "cuda:0")


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": CONTEXT + 1}, f"seq_len is {CONTEXT + 1} and .*model reads at most {CONTEXT} tokens"),
        ({"seq_len": 1}, "seq_len is 1: expected at least 2"),
        ({"seq_len": 16, "max_tokens": 15}, "max_tokens is 15, less than one window of seq_len 16"),
        ({"batch_size": 0}, "batch_size is 0: expected at least 1"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(QuantkitError, match=message) as raised:
        evaluate(folder / "model", folder / "text.txt", progress=False, **options)
    assert "\n" not in str(raised.value)


def test_too_little_text(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a few words")
    with pytest.raises(DataError, match=r"a\.txt has \d+ tokens, less than one window of seq_len 32: give more text"):
        evaluate(folder / "model", tmp_path / "a.txt", progress=False)


def test_models_that_do_not_fit_together(folder: Path, tmp_path: Path) -> None:
    tiny_model(0, vocabulary=310).save_pretrained(tmp_path / "larger")
    with pytest.raises(DataError, match=r"has a vocabulary of 300 and .*larger one of 310"):
        evaluate(folder / "model", folder / "text.txt", tmp_path / "larger", progress=False)
    byte_tokenizer(290).save_pretrained(tmp_path / "larger")
    with pytest.raises(DataError, match="different vocabularies"):
        evaluate(folder / "model", folder / "text.txt", tmp_path / "larger", progress=False)
    with pytest.raises(DataError, match=r"the token id \d+ and .* a vocabulary of 20"):
        evaluate(tiny_model(0, vocabulary=20), folder / "text.txt", tokenizer=byte_tokenizer(), progress=False)


def test_a_text_is_checked_without_the_weights(folder: Path, tmp_path: Path) -> None:
    texts, tokenizer = read(folder / "text.txt"), byte_tokenizer()
    model = tiny_model(0).to("meta")
    passages = read(passages_for(word_model(0, tokenizer), tokenizer, tmp_path))
    check_text(texts, tokenizer, model, "m", 16)
    check_text(passages, tokenizer, model, "m")
    check_text(Texts("one", "passages", "", passages=(("the dog", " sleeps"),)), tokenizer, model, "m")
    short = Texts("short", "text", "", documents=("a few words",))
    for wrong, message in (
        ((texts, tokenizer, model, "m", 33), "seq_len is 33 and m reads at most 32 tokens"),
        ((texts, tokenizer, model, "m", 1), "seq_len is 1"),
        ((texts, None, model, "m"), "m has no tokenizer"),
        ((passages, None, model, "m"), "m has no tokenizer"),
        ((short, tokenizer, model, "m"), "less than one window of seq_len 32"),
        ((texts, tokenizer, tiny_model(0, 20), "m"), "m a vocabulary of 20"),
        ((passages, tokenizer, tiny_model(0, 20), "m"), "m a vocabulary of 20"),
    ):
        with pytest.raises(DataError, match=message):
            check_text(*wrong)
    with pytest.raises(DataError, match="max_tokens is 15, less than one window of seq_len 16"):
        check_text(texts, tokenizer, model, "m", 16, max_tokens=15)


def test_what_is_no_model_or_has_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    tiny_model(0).save_pretrained(tmp_path / "bare")
    for model, name in ((tmp_path / "bare", "bare"), (tiny_model(0), "LlamaForCausalLM")):
        with pytest.raises(DataError, match=f"text and .*{name} has no tokenizer"):
            evaluate(model, folder / "text.txt", progress=False)
    with pytest.raises(QuantkitError, match="3 is no model"):
        evaluate(3, folder / "text.txt", tokenizer=byte_tokenizer(), progress=False)
    with pytest.raises(CheckpointError, match="nowhere"):
        evaluate(tmp_path / "nowhere", folder / "text.txt", progress=False)


@pytest.mark.parametrize("broken", ["model", "base"])
def test_logits_that_are_nan_are_an_error_that_names_the_model(broken: str, folder: Path) -> None:
    models = {"model": tiny_model(0), "base": tiny_model(1)}
    models[broken].name_or_path = broken
    models[broken].lm_head.weight.data[7] = math.nan
    with pytest.raises(CheckpointError, match=f"{broken} gives logits that are NaN or infinite"):
        evaluate(models["model"], folder / "text.txt", models["base"], tokenizer=byte_tokenizer(), progress=False)


def test_a_perplexity_beyond_all_measure_is_an_error(folder: Path) -> None:
    model = tiny_model(0)
    model.lm_head.weight.data *= 1e4
    with pytest.raises(CheckpointError, match=r"perplexity of .* is inf"):
        evaluate(model, folder / "text.txt", tokenizer=byte_tokenizer(), progress=False)


def test_the_text_of_the_calibration_is_refused(folder: Path, tmp_path: Path) -> None:
    tiny_model(0).save_pretrained(tmp_path / "out")
    byte_tokenizer().save_pretrained(tmp_path / "out")
    recipe = tmp_path / "out" / "quantkit_recipe.json"
    fingerprint = read(folder / "text.txt").fingerprint
    recipe.write_text(json.dumps({"dataset": {"fingerprint": fingerprint}}))
    with pytest.raises(
        DataError, match=r"text\.txt is the text that .*out was calibrated with: evaluate it on another"
    ):
        evaluate(tmp_path / "out", folder / "text.txt", progress=False)
    for innocent in ({"dataset": {"fingerprint": "sha256:0"}}, {"dataset": {"fingerprint": None}}, {"dataset": None}):
        recipe.write_text(json.dumps(innocent))
        assert evaluate(tmp_path / "out", folder / "text.txt", progress=False)["tokens"] > 0
    recipe.write_text("{")
    with pytest.raises(CheckpointError, match=r"quantkit_recipe\.json isn't JSON"):
        evaluate(tmp_path / "out", folder / "text.txt", progress=False)


def test_too_little_memory_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("a long story")

    monkeypatch.setattr(evaluation, "_logits", full)
    with pytest.raises(QuantkitError, match="too little memory for batch_size 7 at seq_len 32"):
        evaluate(folder / "model", folder / "text.txt", batch_size=7, progress=False)


# The command


def test_the_command_prints_one_object_or_a_table(folder: Path) -> None:
    arguments = [str(folder / "model"), "--dataset", str(folder / "text.txt"), "--seq-len", "16"]
    done = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    assert list(json.loads(done.stdout)) == KEYS
    assert "perplexity: " in done.stderr
    done = CliRunner().invoke(command, [*arguments, "--baseline", str(folder / "base")], catch_exceptions=False)
    result = evaluate(folder / "model", folder / "text.txt", folder / "base", seq_len=16, progress=False)
    assert (
        f"perplexity          {result['perplexity']:.4f} ± {result['perplexity_stderr']:.4f} (baseline " in done.stdout
    )
    assert "KL divergence       mean " in done.stdout
    assert "backend             torch" in done.stdout


def test_the_command_hands_every_flag_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def evaluated(model: str, dataset: str, **options: Any) -> dict[str, Any]:
        seen.update(options, model=model, dataset=dataset)
        return {}

    monkeypatch.setattr(evaluation, "evaluate", evaluated)
    flags = {
        "--baseline": "b",
        "--seq-len": "7",
        "--max-tokens": "70",
        "--batch-size": "3",
        "--tasks": "x,y",
        "--include-path": "i",
        "--num-fewshot": "2",
        "--limit": "9",
        "--backend": "torch",
        "--device": "cpu",
        "--data-dir": "d",
        "--revision": "r",
        "--token": "t",
        "--cache-dir": "c",
    }
    switches = ["--json", "--trust-remote-code", "--restart", "--quiet"]
    line = ["m", "--dataset", "s", *switches, *(word for pair in flags.items() for word in pair)]
    assert CliRunner().invoke(command, line, catch_exceptions=False).exit_code == 0
    numbers = {"seq_len": 7, "max_tokens": 70, "batch_size": 3, "num_fewshot": 2, "limit": 9}
    words = {key.removeprefix("--").replace("-", "_"): value for key, value in flags.items()}
    expected = words | numbers | {"model": "m", "dataset": "s", "tasks": ["x", "y"], "trust_remote_code": True}
    expected |= {"restart": True, "progress": False}
    assert seen == expected


def test_the_command_shows_passages(folder: Path, tmp_path: Path) -> None:
    path = passages_for(tiny_model(0), byte_tokenizer(), tmp_path)
    done = CliRunner().invoke(command, [str(folder / "model"), "--dataset", str(path)], catch_exceptions=False)
    assert "passages          13, " in done.stdout
    assert "cut on the left" in done.stdout
    assert "accuracy          " in done.stdout
