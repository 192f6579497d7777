import json
import os
import statistics
import subprocess
import sys
import time

import models
import pytest

from quantkit import __version__
from quantkit.cli import main
from quantkit.methods import METHODS
from quantkit.recipe import recipe_names

HEAVY = ("torch", "transformers", "safetensors", "numpy", "datasets", "huggingface_hub", "triton", "accelerate")


def test_no_help_imports_anything_heavy():
    """All commands' help in one process of its own; `sys.modules` tells what was imported."""
    code = (
        "import json, sys\n"
        "from click.testing import CliRunner\n"
        "from quantkit.cli import main\n"
        "results = [CliRunner().invoke(main, words) for words in json.loads(sys.argv[1])]\n"
        "print(json.dumps([[r.exit_code for r in results], sorted(sys.modules)]))\n"
    )
    words = [["--help"], ["-h"], ["--version"], ["methods"], *([name, "--help"] for name in main.commands)]
    command = [sys.executable, "-P", "-c", code, json.dumps(words)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    codes, imported = json.loads(result.stdout)
    assert codes == [0] * len(words)
    assert not set(HEAVY) & set(imported)


def test_importing_quantkit_imports_nothing_heavy():
    code = "import sys, quantkit; quantkit.__version__; print('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert not set(HEAVY) & set(result.stdout.split())


def seconds(code):
    started = time.perf_counter()
    subprocess.run([sys.executable, "-P", "-c", code], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def test_help_takes_less_than_300_ms_more_than_python_itself():
    """The median of five pairs; a busy machine gets four chances."""
    code = "import sys; sys.argv = ['quantkit', '--help']; from quantkit.cli import main; main()"
    found = []
    for _ in range(4):
        found.append(statistics.median(seconds(code) - seconds("pass") for _ in range(5)))
        if found[-1] < 0.3:
            return
    pytest.fail(f"quantkit --help takes {min(found):.3f} s beyond Python's own start")


@pytest.mark.parametrize("name", main.commands)
def test_every_command_and_option_is_described(cli, name):
    command = main.commands[name]
    result = cli(name, "--help")
    assert result.exit_code == 0
    assert command.help
    for option in command.params:
        if option.param_type_name == "option":
            assert option.help or option.name == "max_new_tokens", f"{name} {option.opts} has no help"
            assert option.opts[-1] in result.stdout


def test_flags_are_the_keywords_of_the_function():
    import inspect

    from quantkit import quantize
    from quantkit.pipeline import foresee, planned

    for name, functions, more, fewer in (
        ("quantize", (quantize,), {"as_json", "log_level"}, {"tokenizer"}),
        ("plan", (foresee, planned), {"as_json", "explain"}, {"arguments"}),
    ):
        keywords = {keyword for function in functions for keyword in inspect.signature(function).parameters}
        flags = {option.name for option in main.commands[name].params}
        assert flags - keywords == more
        assert keywords - flags == fewer


def test_the_version(cli):
    assert cli("--version").stdout == f"quantkit, version {__version__}\n"


def test_methods_lists_every_step_with_parameters_and_paper(cli):
    text, values = cli("methods").stdout, json.loads(cli("methods", "--json").stdout)
    assert [step["name"] for step in values["steps"]] == list(METHODS)
    assert list(values["recipes"]) == recipe_names()
    for step in values["steps"]:
        assert step["paper"] in text
        for parameter in step["parameters"]:
            assert f"{parameter['name']}={'|'.join(parameter['values'])}" in text
    assert all(name in text for name in recipe_names())


def test_quantize_says_what_it_did(cli, model_folder, tmp_path):
    result = cli("quantize", model_folder(), "-o", tmp_path / "out", "--recipe", "w8a8")
    assert result.exit_code == 0
    assert f"written to {tmp_path / 'out'}" in result.stdout
    assert "14 linear layers" in result.stdout
    assert "quantizing" in result.stderr


def test_quantize_says_what_calibration_did(cli, model_folder, calibration, tmp_path):
    words = ("--recipe", "smoothquant-w8a8", "--dataset", calibration["dataset"], "--samples", 8, "--seq-len", 32)
    result = cli("quantize", model_folder(), "-o", tmp_path / "out", *words)
    assert result.exit_code == 0, result.stderr
    assert "smoothing  10 groups refused, 8 groups folded" in result.stdout
    assert "mlp.down_proj.weight" in result.stdout
    stored = json.loads((tmp_path / "out" / "quantkit_report.json").read_text())
    data = stored["recipe"]["dataset"]
    assert (data["windows"], data["seq_len"]) == (8, 32)
    assert sum(group["state"] == "folded" for group in stored["groups"]) == 8


@pytest.fixture
def no_read(monkeypatch):
    """Makes reading any weight an error of its own."""
    from quantkit.shards import ShardReader

    def get(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(ShardReader, "get", get)


def test_plan_names_every_weight_matrix_and_reads_none(cli, model_folder, no_read):
    folder = model_folder("gpt_oss")
    result = cli("plan", folder, "-m", "w8a8", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    planned = {target["key"] for target in found["targets"]} | {left["module"] for left in found["left_alone"]}
    matrices = {name for name, tensor in models.read_tensors(folder).items() if tensor.ndim > 1}
    assert planned >= {name if name in planned else name.removesuffix(".weight") for name in matrices}
    assert found["format"] == "quantkit"
    text = cli("plan", folder, "-m", "w8a8").stdout
    assert "24 linear layers: int8, activations per token" in text
    assert "mlp.router: its output chooses experts (topk)" in text
    assert f"{found['output_bytes']:,} bytes" in text


def test_what_is_planned_is_what_is_done(cli, model_folder, tmp_path):
    for name in ("llama", "mixtral", "gpt2", "gpt_oss"):
        found = json.loads(cli("plan", model_folder(name), "-m", "fp8", "--json").stdout)
        done = json.loads(
            cli("quantize", model_folder(name), "-o", tmp_path / name, "-m", "fp8", "--json", "--seed", 1).stdout
        )
        assert found["output_bytes"] == done["bytes_after"]
        assert found["left_alone"] == done["left_alone"]
        assert found["format"] == done["format"]
        assert sum(target["experts"] or 1 for target in found["targets"]) == len(done["layers"])


def test_plan_explains_every_group(cli, model_folder, no_read):
    words = ("plan", model_folder(), "-m", "smoothquant", "-m", "w8a8")
    text = cli(*words, "--explain").stdout
    assert "8 groups found" in text
    assert "model.layers: blocks 0 to 1\n" in text
    assert "norm post_attention_layernorm.weight, 128 channels -> mlp.gate_proj.weight, mlp.up_proj.weight\n" in text
    assert "linear self_attn.v_proj.weight, 64 channels -> self_attn.o_proj.weight\n" in text
    assert "no group at linear mlp.gate_proj.weight: it feeds silu" in text
    assert "no group at" not in cli(*words).stdout
    groups = json.loads(cli(*words, "--json").stdout)["groups"]
    assert len(groups) == 8
    assert not any(group["proven"] for group in groups)


def test_json_is_all_there_is_on_stdout(cli, model_folder, tmp_path):
    result = cli("quantize", model_folder(), "-o", tmp_path / "out", "-m", "w8a8", "--json")
    stored = json.loads((tmp_path / "out" / "quantkit_report.json").read_text())
    assert json.loads(result.stdout) == stored
    found = json.loads(cli("inspect", tmp_path / "out", "--json").stdout)
    assert (found["problems"], found["nbytes"]) == ([], stored["bytes_after"])


def test_json_and_the_note_on_an_unused_data_set_in_a_process_of_its_own(model_folder, tmp_path):
    """As a user sees them: pure JSON on stdout; on stderr the note, then progress, and nothing of transformers."""
    words = ["quantize", str(model_folder()), "-o", str(tmp_path / "out"), "-m", "w8a8", "--json"]
    words += ["--dataset", "nowhere.txt"]
    code = "from quantkit.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, *words], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert json.loads(result.stdout)["recipe"]["dataset"] is None
    lines = result.stderr.splitlines()
    assert lines[0] == "quantkit: --dataset nowhere.txt is unused: no step of this recipe observes data"
    assert [line.split(":")[0] for line in lines[1:]] == ["quantizing", "verifying"]


def test_inspect_shows_one_screen(cli, compressed):
    result = cli("inspect", compressed("w8a8"))
    assert result.exit_code == 0
    assert "int8, activations per token" in result.stdout
    assert "14 linear layers" in result.stdout
    assert "no problem found" in result.stdout
    assert result.stderr == ""


def test_generate_prints_the_text_alone(cli, compressed):
    result = cli("generate", compressed("w8a8"), "--prompt", "ab", "--max-new-tokens", 3, "--device", "cpu")
    assert result.exit_code == 0
    assert result.stdout.startswith("ab")
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--max-new-tokens", 100_000), "and max_new_tokens is 100000, "),
        (("--temperature", "nan"), "temperature is nan: expected 0,"),
        (("--temperature", "inf"), "temperature is inf: expected 0,"),
        (("--temperature", "1e-300"), "temperature is 1e-300: expected 0,"),
        (("--seed", -1), "seed is -1: expected 0 to 2**63 - 1"),
        (("--seed", 2**64), "seed is 18446744073709551616: expected 0 to 2**63 - 1"),
    ],
)
def test_generate_refuses_what_it_cannot_do(mistake, compressed, words, sentence):
    mistake("generate", compressed("w8a8"), "--prompt", "ab", "--device", "cpu", *words, says=(sentence,))


def test_demo_finds_out_before_the_work_what_would_fail_after_it(mistake, monkeypatch, tmp_path):
    def work(*_, **__):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("quantkit.demonstration.quantize", work)
    mistake("demo", "--max-tokens", 511, "--device", "cpu", says=("max_tokens is 511, less than one window",))
    (tmp_path / "something").touch()
    monkeypatch.setattr("quantkit.demonstration.load", work)
    mistake("demo", "-o", tmp_path, says=(f"{tmp_path} exists already; give another -o OUT",))


def test_demo_tabulates_every_recipe_and_keeps_the_checkpoints(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("quantkit.demonstration.recipe_names", lambda: ["w8a8", "w8a8-static"])
    words = ("demo", "-o", tmp_path / "new" / "kept", "--max-tokens", 512, "--device", "cpu", "--json")
    result = cli(*words)
    assert result.exit_code == 0, result.output
    assert [row["recipe"] for row in json.loads(result.stdout)] == ["float", "w8a8", "w8a8-static"]
    assert (tmp_path / "new" / "kept" / "w8a8" / "config.json").is_file()


def test_a_bug_of_ours_is_no_sentence(cli, model_folder, monkeypatch, tmp_path):
    """An exception that nobody understands goes through as it is."""

    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("quantkit.pipeline.quantize", fail)
    result = cli("quantize", model_folder(), "-o", tmp_path / "out", "-m", "w8a8")
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_sentence_is_one_line(mistake, model_folder, monkeypatch, tmp_path):
    from quantkit.errors import QuantkitError

    def fail(*_, **__):
        raise QuantkitError("one\n  two")

    monkeypatch.setattr("quantkit.staging.quantize", fail)
    assert mistake("quantize", model_folder(), "-o", tmp_path / "out") == "Error: one two"


def test_names_on_disk_can_be_of_any_script(cli, model_folder, tmp_path):
    folder = models.copy(model_folder(), tmp_path / "größe 模型")
    result = cli("quantize", folder, "-o", tmp_path / "Ausgabe ü", "-m", "w8a8", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["model"] == str(folder)
