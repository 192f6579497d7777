"""lm-evaluation-harness on our models, offline, on tasks of our own: a multiple choice, a text and a generation.

Oracles: sums of log-probabilities by a plain forward pass of transformers' model, one request at a time; and the
perplexity that `evaluate` finds, on the same tokens in the same windows.
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.errors import DataError, QuantkitError
from quantkit.hf import quantized_layers
from quantkit.texts import Texts

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed: pip install 'quantkit[lm-eval]'",
)
QUESTIONS = [
    {"question": f"Of {a} and {b} the larger is", "choices": [str(a), str(b), "none"], "answer": int(b > a)}
    for a, b in ((3, 7), (12, 5), (40, 41), (9, 1), (2, 77), (31, 13), (6, 60), (54, 45))
]
DOCUMENTS = [f"{number:03d} is a number, and so is {number + 1:03d}; each has a next one."[:48] for number in range(6)]
LENGTH = 48
"""Characters of a document, which are its tokens: the tiny models' tokens are bytes."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tasks `larger`, `numbers` and `next`, and their data."""
    folder = tmp_path_factory.mktemp("tasks")

    def write(name: str, rows: list[dict[str, object]], **config: object) -> None:
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        head = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test"}
        # JSON is YAML.
        made = head | config | {"metadata": {"version": 1.5}}
        (folder / f"{name}.yaml").write_text(json.dumps(made), encoding="utf-8")

    write(
        "larger",
        QUESTIONS,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="choices",
        doc_to_target="answer",
    )
    write(
        "numbers",
        [{"text": text} for text in DOCUMENTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "byte_perplexity"}],
    )
    write(
        "next",
        [{"text": text[:20], "rest": text[20:30]} for text in DOCUMENTS],
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{rest}}",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    return folder


def log_probability(model, context: str, continuation: str) -> tuple[float, bool]:
    """The sum of log-probabilities of a continuation, and whether it is what is likeliest, token by token."""
    tokenizer = models.tokenizer()
    before, after = tokenizer(context)["input_ids"], tokenizer(continuation)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1].double()
    wanted = torch.tensor(after)
    return float(logits.log_softmax(-1).gather(1, wanted[:, None]).sum()), bool((logits.argmax(-1) == wanted).all())


def instances(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, words, number) for number, words in enumerate(arguments)]


def test_without_lm_eval_one_sentence_says_what_to_install(monkeypatch, mistake, model_folder):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("quantkit.lm_eval")]:
        monkeypatch.delitem(sys.modules, name)
    mistake("eval", model_folder(), "--tasks", "arc_easy", says=("lm-eval", "pip install 'quantkit[lm-eval]'"))
    with pytest.raises(QuantkitError, match=r"pip install 'quantkit\[lm-eval\]'"):
        importlib.import_module("quantkit.lm_eval")


def test_there_must_be_something_to_evaluate_on(mistake, model_folder):
    mistake("eval", model_folder(), says=("--dataset", "--tasks"))


@needs_lm_eval
@pytest.mark.parametrize("recipe", [None, "w8a8"])
def test_log_probabilities_are_those_of_a_plain_forward_pass(recipe, model_folder, compressed):
    """In batches of any size; the compressed model stays packed."""
    from quantkit.lm_eval import Model

    folder = model_folder() if recipe is None else compressed(recipe)
    plain = AutoModelForCausalLM.from_pretrained(folder) if recipe is None else quantkit.load(folder)
    requests = [(row["question"], f" {choice}") for row in QUESTIONS for choice in row["choices"]]
    likely = ((context, plain_greedy(plain, context, 1)) for context in map("Is it {}?".format, range(500)))
    requests.append(next(each for each in likely if each[1].isascii() and each[1].isprintable()))
    expected = [log_probability(plain, *request) for request in requests]
    for size in (1, 5):
        model = Model(folder, batch_size=size)
        assert bool(list(quantized_layers(model.model))) == (recipe is not None)
        found = model.loglikelihood(instances("loglikelihood", requests))
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert expected[-1][1]


def plain_greedy(model, context: str, tokens: int) -> str:
    """So many tokens of what a model writes, by one forward pass each."""
    tokenizer = models.tokenizer()
    ids = tokenizer(context)["input_ids"]
    for _ in range(tokens):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return tokenizer.decode(ids)[len(context) :]


@needs_lm_eval
def test_a_multiple_choice_is_scored_as_its_sums_say(tasks, model_folder, compressed):
    names = ["larger", "numbers"]
    result = quantkit.evaluate(
        compressed("w8a8"), tasks=names, include_path=tasks, baseline=model_folder(), progress=False
    )
    assert list(result) == [
        "model", "seconds", "peak_memory_bytes", "backend", "served", "baseline_served", "tasks", "baseline_tasks",
    ]  # fmt: skip
    (served,) = result["served"]
    assert (served["op"], served["dtype"], served["backend"]) == ("linear_dynamic", "int8", "cpu")
    assert served["calls"] > 0 == served["calls"] % 14  # seven layers in each of two blocks
    assert result["baseline_served"] == []
    for key, folder in (("tasks", compressed("w8a8")), ("baseline_tasks", model_folder())):
        model, right, normalized = quantkit.load(folder), 0, 0
        for row in QUESTIONS:
            sums = [log_probability(model, row["question"], f" {choice}")[0] for choice in row["choices"]]
            lengths = [len(choice) for choice in row["choices"]]
            right += sums.index(max(sums)) == row["answer"]
            each = [value / length for value, length in zip(sums, lengths, strict=True)]
            normalized += each.index(max(each)) == row["answer"]
        whole = sum(log_probability(model, "<end>", text)[0] for text in DOCUMENTS)
        perplexity = math.exp(-whole / (LENGTH * len(DOCUMENTS)))
        assert result[key]["numbers"]["byte_perplexity"] == pytest.approx(perplexity, rel=1e-5)
        found = result[key]["larger"]
        count = len(QUESTIONS)
        assert found["acc"] == pytest.approx(right / count)
        assert found["acc_norm"] == pytest.approx(normalized / count)
        share = right / count
        assert found["acc_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (count - 1)))
        assert (found["samples"], found["shots"], found["version"]) == (count, 0, 1.5)


@needs_lm_eval
@pytest.mark.parametrize("recipe", [None, "w8a8", "int8"])
def test_the_perplexity_of_a_text_is_the_one_that_evaluate_finds(recipe, tasks, model_folder, compressed):
    """Lm-eval puts the end token before each document, and predicts all of it: so does a window of both."""
    folder = model_folder() if recipe is None else compressed(recipe)
    tokenizer = models.tokenizer()
    rows = [[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]] for text in DOCUMENTS]
    assert {len(row) for row in rows} == {LENGTH + 1}
    texts = Texts("numbers", "tokens", "", token_ids=torch.tensor(rows).flatten())
    result = quantkit.evaluate(folder, texts, seq_len=LENGTH + 1, tasks=["numbers"], include_path=tasks, progress=False)
    assert result["tokens"] == LENGTH * len(DOCUMENTS)
    assert result["tasks"]["numbers"]["byte_perplexity"] == pytest.approx(result["perplexity"], rel=1e-5)
    model = quantkit.load(folder)
    whole = sum(log_probability(model, "<end>", text)[0] for text in DOCUMENTS)
    assert result["perplexity"] == pytest.approx(math.exp(-whole / result["tokens"]), rel=1e-5)


@needs_lm_eval
def test_what_is_generated_is_what_the_model_writes(tasks, compressed):
    from quantkit.lm_eval import Model

    folder = compressed("w8a8")
    model, plain = Model(folder, batch_size=3), quantkit.load(folder)
    how = {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": False}
    prompts = [text[:20] for text in DOCUMENTS]
    found = model.generate_until(instances("generate_until", [(prompt, how) for prompt in prompts]))
    assert found == [plain_greedy(plain, prompt, 4) for prompt in prompts]
    result = quantkit.evaluate(folder, tasks=["next"], include_path=tasks, limit=2, progress=False)
    assert result["tasks"]["next"]["samples"] == 2
    assert 0 <= result["tasks"]["next"]["exact_match"] <= 1


@needs_lm_eval
def test_a_model_in_memory_and_its_tokenizer_stay_as_they_are(tasks, compressed):
    model, tokenizer = quantkit.load(compressed("w8a8")), models.tokenizer()
    ids = torch.randint(32, 250, (1, 12))
    with torch.no_grad():
        before = model(ids).logits
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        result = quantkit.evaluate(
            model, tasks=["larger"], include_path=tasks, tokenizer=tokenizer, limit=3, progress=False
        )
        assert torch.equal(model(ids).logits, before)
    assert all(models.same(value, kept[name]) for name, value in model.state_dict().items())
    assert tokenizer.pad_token is None
    assert result["tasks"]["larger"]["samples"] == 3


@needs_lm_eval
def test_examples_go_into_the_prompt(tasks, model_folder):
    found = quantkit.evaluate(
        model_folder(), tasks=["larger"], include_path=tasks, num_fewshot=1, limit=2, progress=False
    )
    assert found["tasks"]["larger"]["shots"] == 1


@needs_lm_eval
def test_the_command_prints_one_object_or_a_table(cli, tasks, compressed, model_folder, tmp_path):
    (tmp_path / "text.txt").write_text("A text of some length, for two windows at least. " * 5, encoding="utf-8")
    words = ["eval", compressed("w8a8"), "--baseline", model_folder(), "--tasks", "larger,numbers"]
    words += ["--include-path", tasks, "--dataset", tmp_path / "text.txt", "--seq-len", "32"]
    told = cli(*words, "--json")
    assert told.exit_code == 0, told.output
    result = json.loads(told.stdout)
    assert {"perplexity", "kl_mean", "tasks", "baseline_tasks"} <= set(result)
    assert list(result["tasks"]) == list(result["baseline_tasks"]) == ["larger", "numbers"]
    shown = cli(*words)
    acc, other = (result[key]["larger"]["acc"] for key in ("tasks", "baseline_tasks"))
    line = next(line for line in shown.stdout.splitlines() if line.startswith("larger acc "))
    assert f"{acc:.4f} ± " in line
    assert f"(baseline {other:.4f} ± " in line
    assert any(line.startswith("numbers byte_perplexity") for line in shown.stdout.splitlines())
    assert "perplexity" in shown.stdout


@needs_lm_eval
def test_lm_eval_finds_the_model_by_its_name(tasks, compressed):
    """Its Python function, the entry point that later releases look for, and its command line in a process of its own
    (which looks through all of lm-eval's tasks)."""
    from importlib.metadata import entry_points

    import lm_eval
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    from quantkit.lm_eval import Model

    assert get_model("quantkit") is Model
    (point,) = entry_points(group="lm_eval.models", name="quantkit")
    assert point.load() is Model
    own = TaskManager(include_path=str(tasks), include_defaults=False)
    told = lm_eval.simple_evaluate(
        model="quantkit",
        model_args=f"pretrained={compressed('w8a8')},backend=torch,dtype=float32",
        tasks=["larger"],
        task_manager=own,
        log_samples=False,
        batch_size=4,
        device="cpu",
    )
    result = quantkit.evaluate(compressed("w8a8"), tasks=["larger"], include_path=tasks, progress=False)
    assert told["results"]["larger"]["acc,none"] == result["tasks"]["larger"]["acc"]


@needs_lm_eval
@pytest.mark.exhaustive
def test_lm_evals_command_line_runs_it(tasks, compressed, tmp_path):
    """In a process of its own; it looks through all of lm-eval's tasks, which takes long."""
    words = ["run", "--model", "quantkit", "--model_args", f"pretrained={compressed('w8a8')}", "--tasks", "larger"]
    words += ["--include_path", tasks, "--device", "cpu", "--output_path", tmp_path]
    line = [sys.executable, "-m", "quantkit.lm_eval", *map(str, words)]
    ran = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    (written,) = tmp_path.rglob("results_*.json")
    told = json.loads(written.read_text(encoding="utf-8"))["results"]["larger"]
    result = quantkit.evaluate(compressed("w8a8"), tasks=["larger"], include_path=tasks, progress=False)
    assert told["acc,none"] == result["tasks"]["larger"]["acc"]
    line[line.index("--model_args") + 1] = "pretrained=/no/such/folder"
    failed = subprocess.run(line, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("Error: ")


@needs_lm_eval
def test_mistakes_are_one_sentence(mistake, tasks, model_folder, tmp_path):
    start = ("eval", model_folder(), "--include-path", tasks)
    mistake(*start, "--tasks", "larger,", says=("tasks is", "arc_easy"))
    mistake(*start, "--tasks", "larger", "--limit", "0", says=("limit is 0",))
    mistake(*start, "--tasks", "larger", "--num-fewshot", "-1", says=("num_fewshot is -1",))
    mistake("eval", model_folder(), "--tasks", "larger", "--include-path", tmp_path / "no", says=("not a folder",))
    (tmp_path / "lost.yaml").write_text(
        (tasks / "larger.yaml").read_text(encoding="utf-8").replace("larger", "lost"), encoding="utf-8"
    )
    mistake("eval", model_folder(), "--tasks", "lost", "--include-path", tmp_path, says=("cannot load the tasks lost",))
    silent = models.copy(model_folder(), tmp_path / "silent")
    for path in silent.glob("tokenizer*"):
        path.unlink()
    mistake("eval", silent, "--tasks", "larger", "--include-path", tasks, says=("no tokenizer",))


@needs_lm_eval
def test_arguments_of_the_model_that_mean_nothing_are_refused(model_folder):
    from quantkit.lm_eval import Model

    with pytest.raises(QuantkitError, match=r"'bakend' is unknown; use one of pretrained, device, dtype, backend"):
        Model(model_folder(), bakend="torch")
    with pytest.raises(QuantkitError, match="backend 'cuda' is unknown"):
        Model(model_folder(), backend="cuda")
    assert Model(model_folder(), max_length=20).max_length == 20


@needs_lm_eval
def test_an_unknown_task_is_refused_before_the_model_is_read(tasks, monkeypatch, tmp_path):
    from quantkit import lm_eval as ours

    class Empty:
        def __init__(self, **_):
            pass

        def match_tasks(self, names):
            return []

    monkeypatch.setattr(ours, "TaskManager", Empty)
    with pytest.raises(DataError, match=r"knows no task 'arc_esay'; `lm-eval ls tasks` lists them"):
        quantkit.evaluate(tmp_path / "no model", tasks=["arc_esay"])
