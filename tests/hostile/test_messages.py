"""What the command line prints of names that a stranger made up: one line, and nothing that a terminal would obey."""

import json
import logging
import subprocess
import sys
import unicodedata

import click
import hostile
import models
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.cli import LONGEST_SENTENCE, main, sentence
from quantkit.cli.options import say
from quantkit.errors import QuantkitError
from quantkit.untrusted import SHOWN, name_trouble, printable, shown

ESCAPES = "\x1b[31m\x1b]0;title\x07\x9b2J\r\x08\u202eevil\u2028\x7f\n\ttwo\0\ud800"
ESCAPED = st.text(st.characters() | st.sampled_from(ESCAPES), max_size=60)


def obeyed(text, keep=""):
    """The characters of a text that a terminal obeys or can't show."""
    return [
        c
        for c in text
        if c not in keep and (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in "\u202e\ufeff")
    ]


@settings(max_examples=200, deadline=None)
@given(text=ESCAPED)
def test_any_text_is_printable(text):
    assert not obeyed(printable(text))
    assert not obeyed(printable(text, keep="\n"), keep="\n")
    assert printable(text).isascii() or printable(printable(text)) == printable(text)
    printable(text).encode()


@settings(max_examples=100, deadline=None)
@given(text=ESCAPED)
def test_json_stays_json_and_says_the_same(text):
    written = json.dumps({text: [text]}, ensure_ascii=False, indent=1)
    assert json.loads(printable(written, keep="\n")) == {text: [text]}


@pytest.mark.parametrize("text", ["ok", "naïve 日本語 عربى", "👩‍👩‍👧", "می‌خواهم", "±×²", "a\u00a0b"])
def test_what_harms_nobody_stays(text):
    assert printable(text) == text


@settings(max_examples=100, deadline=None)
@given(text=ESCAPED)
def test_an_error_is_one_line(text):
    line = sentence(QuantkitError(f"{text} is wrong; mend it"))
    assert not obeyed(line)
    assert len(line.splitlines()) == 1


def test_an_error_ends():
    line = sentence(QuantkitError("x" * 10**6))
    assert len(line) < LONGEST_SENTENCE + 10


@settings(max_examples=100, deadline=None)
@given(value=hostile.values)
def test_any_value_can_be_shown(value):
    assert len(shown(value)) < SHOWN + 40


def test_a_number_that_python_does_not_write_can_be_shown():
    assert shown(16**5000) == "a int too large to show"


@settings(max_examples=100, deadline=None)
@given(name=hostile.texts | ESCAPED)
def test_a_name_without_trouble_is_one_line_of_plain_digits(name):
    if name_trouble(name) is None:
        assert name.isprintable()
        assert name
        for part in name.split("."):
            int(part if part.isdigit() else 0)


@pytest.fixture
def told(cli, tmp_path, model_folder):
    """Runs a command on a changed model, which must fail, and returns its line."""

    def run(command, change, *words):
        folder = models.copy(model_folder("llama"), tmp_path / "model")
        change(folder)
        result = cli(command, folder, *words)
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.endswith("\n")
        assert not obeyed(result.stderr[:-1]), result.stderr
        return result.stderr

    return run


CHANGES = {
    "a model type": {"model_type": ESCAPES, "architectures": []},
    "an architecture": {"architectures": [ESCAPES]},
    "a method": {"quantization_config": {"quant_method": ESCAPES}},
    "a group": {
        "quantization_config": {**hostile.COMPRESSED_TENSORS, "config_groups": {ESCAPES: {"targets": [ESCAPES]}}}
    },
    "a dtype": {"dtype": ESCAPES},
    "an activation": {"hidden_act": ESCAPES},
    "weights": {"transformers_weights": ESCAPES},
    "a kernel": {"attn_implementation": f"a/{ESCAPES}"},
    "a number of layers": {f"{ESCAPES}_layers": 10**9},
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_a_config_writes_nothing_to_the_terminal(what, told):
    told("plan", lambda folder: models.change_config(folder, **CHANGES[what]), "-m", "w8a8")


@pytest.mark.parametrize(
    "words", [("-m", ESCAPES[:-2]), ("--recipe", ESCAPES[:-2].replace("\0", "")), ("-m", "w8a8", "--ignore", "\x1b[2J")]
)
def test_an_argument_writes_nothing_to_the_terminal(words, told):
    told("plan", lambda folder: None, *words)


def test_a_tensor_s_name_writes_nothing_to_the_terminal(told):
    def change(folder):
        hostile.raw_safetensors(
            folder / "model.safetensors", {ESCAPES[:-1]: {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}, b"\0"
        )

    told("inspect", change)


def test_an_index_writes_nothing_to_the_terminal(told):
    def change(folder):
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"a": f"{ESCAPES}.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    told("inspect", change)


def test_results_write_nothing_to_the_terminal():
    @click.command()
    def command():
        say(f"layer {ESCAPES} of a table\n\tand more")

    result = CliRunner().invoke(command)
    assert not obeyed(result.stdout, keep="\n\t")
    assert "\n\tand more" in result.stdout


def test_warnings_write_nothing_to_the_terminal(model_folder, tmp_path):
    """In a process of its own, where no test framework takes the log."""
    name = tmp_path / "a\x1b[31mb\nc"
    models.copy(model_folder("llama"), name)
    command = [sys.executable, "-m", "quantkit.cli", "plan", name, "-m", "int8", "--revision", "main"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = ran.stderr.splitlines()
    assert "--revision" in line
    assert not obeyed(line)
    assert not obeyed(ran.stdout, keep="\n")


def test_every_command_is_there_to_be_guarded():
    """No command prints past `say`: what they import is the only way to stdout."""
    from quantkit.cli import bench, convert, evaluate, generate, inspect, plan, push, quantize, recover, sparsity

    for module in (bench, convert, evaluate, generate, inspect, plan, push, quantize, recover, sparsity):
        assert "click.echo" not in module.__loader__.get_source(module.__name__), module.__name__
        assert module.command.name in main.commands


def test_the_log_is_guarded_where_it_is_set_up():
    from quantkit.cli import _Line

    record = logging.LogRecord("quantkit", logging.WARNING, "", 0, "name %s", (ESCAPES,), None)
    assert not obeyed(_Line("quantkit: %(message)s").format(record))
