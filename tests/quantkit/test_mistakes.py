"""Every kind of bad input: one sentence that names value, expectation and remedy, exit 1, and nothing left on disk."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import models
import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError

from quantkit import shards
from quantkit.output import MARKER
from quantkit.shards import ShardReader

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def refused(mistake, tmp_path):
    """Runs `quantkit quantize MODEL -o OUT -m w8a8 ...`, which must fail and leave no OUT.

    Nor OUT.partial, unless it is to be kept because something in it is finished.
    """

    def run(model, *words, says, output=None, steps=("-m", "w8a8"), kept=False):
        target = tmp_path / "out" if output is None else Path(output)
        sentence = mistake("quantize", model, "-o", target, *steps, *words, says=says)
        if output is None:
            assert not target.exists()
        assert target.with_name(target.name + ".partial").exists() == kept
        return sentence

    return run


@pytest.fixture
def copied(model_folder, tmp_path):
    """A copy of the tiny Llama, to be damaged."""
    return lambda name="llama": models.copy(model_folder(name), tmp_path / "model")


@pytest.fixture
def no_read(monkeypatch):
    """Makes reading any weight an error of its own."""

    def get(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(ShardReader, "get", get)


# The output


def test_an_output_with_something_in_it(refused, model_folder, tmp_path, no_read):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    refused(model_folder(), output=tmp_path / "full", says=("full", "exists already", "-o OUT"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"]


def test_an_output_that_is_a_file_a_link_or_a_device(refused, model_folder, tmp_path, no_read):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for output in (tmp_path / "file", tmp_path / "link", "/dev/null"):
        refused(model_folder(), output=output, says=(str(output), "exists already", "-o OUT"))
    assert (tmp_path / "file").read_text() == "precious"


def test_the_model_itself_as_output(refused, copied, no_read):
    folder = copied()
    refused(folder, output=folder, says=("exists already",))
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("output", ["~nobody-of-this-name/out", "/" + "x" * 300, "/"])
def test_an_output_that_cannot_be(mistake, model_folder, output, no_read):
    mistake("quantize", model_folder(), "-o", output, "-m", "w8a8", says=(output[:20], "-o OUT"))


def test_a_parent_that_is_a_file(refused, model_folder, tmp_path, no_read):
    (tmp_path / "file").write_text("precious")
    refused(model_folder(), output=tmp_path / "file" / "out", says=("file", "-o OUT"))


def test_a_parent_that_cannot_be_written_to(refused, model_folder, monkeypatch, no_read):
    def mkdir(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    refused(model_folder(), says=("out.partial", "Permission denied", "-o OUT"))


def test_a_parent_that_only_root_writes_to(model_folder, tmp_path):
    """In a process of its own, as a user runs it."""
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere; the test above says what happens")
    parent = tmp_path / "closed"
    parent.mkdir(mode=0o500)
    command = [sys.executable, "-m", "quantkit.cli", "quantize", model_folder(), "-o", parent / "out", "-m", "w8a8"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "out.partial cannot be made: Permission denied; give another -o OUT\n" in result.stderr


def test_an_output_that_appears_meanwhile(refused, model_folder, tmp_path, monkeypatch):
    finish = shards.ShardWriter.finish

    def other(self):
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "precious").write_text("x")
        finish(self)

    monkeypatch.setattr(shards.ShardWriter, "finish", other)
    refused(model_folder(), output=tmp_path / "late", says=("late", "-o OUT"), kept=True)
    assert [path.name for path in (tmp_path / "late").iterdir()] == ["precious"]


def test_our_own_leftover_is_replaced_and_said(cli, model_folder, tmp_path, caplog):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / MARKER).touch()
    (partial / "part-00000.safetensors").write_text("half")
    result = cli("quantize", model_folder(), "-o", tmp_path / "out", "-m", "w8a8")
    assert result.exit_code == 0, result.stderr
    assert "left from a run that was stopped; starting anew" in caplog.text
    assert str(partial) in caplog.text
    assert not partial.exists()
    assert not (tmp_path / "out" / "part-00000.safetensors").exists()


def test_a_run_beside_another_is_refused(mistake, model_folder, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    with FileLock(str(partial / MARKER)):
        (partial / "part-00000.safetensors").write_text("half")
        mistake("quantize", model_folder(), "-o", tmp_path / "out", "-m", "w8a8", says=("another run", "-o OUT"))
        assert (partial / "part-00000.safetensors").read_text() == "half"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_foreign_leftover_is_refused_and_untouched(mistake, model_folder, tmp_path, no_read, kind):
    partial = tmp_path / "out.partial"
    if kind == "folder":
        partial.mkdir()
        (partial / "precious").write_text("x")
    else:
        partial.write_text("x")
    words = ("quantize", model_folder(), "-o", tmp_path / "out", "-m", "w8a8")
    mistake(*words, says=("out.partial", "isn't quantkit's", "-o OUT"))
    assert partial.is_file() or [path.name for path in partial.iterdir()] == ["precious"]
    assert not (tmp_path / "out").exists()


# The model


def test_a_model_that_does_not_exist(refused, tmp_path):
    refused(tmp_path / "nowhere", says=("nowhere does not exist", "config.json", "org/name"))


def test_a_model_that_is_a_file(refused, tmp_path):
    (tmp_path / "model.gguf").write_text("x")
    refused(tmp_path / "model.gguf", says=("model.gguf is a file", "config.json"))


def test_a_folder_without_config(refused, tmp_path):
    (tmp_path / "model").mkdir()
    refused(tmp_path / "model", says=("model has no config.json", "Hugging Face"))


@pytest.mark.parametrize("name", ["no-such-org/no-such-model", "bad id/x", "a/--b"])
def test_a_hub_id_that_cannot_be_had(refused, monkeypatch, name, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(name, "--cache-dir", tmp_path / "cache", says=(name, "hub"))


def test_a_hub_id_offline_in_a_process_of_its_own(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    words = ["quantize", "no-such-org/no-such-model", "-o", str(tmp_path / "out"), "-m", "w8a8"]
    command = [sys.executable, "-P", "-c", "from quantkit.cli import main; main()", *words]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: no-such-org/no-such-model is no folder, and the hub does not give it")
    assert len(result.stderr.splitlines()) == 1


def test_a_missing_shard(refused, copied):
    folder = copied("llama_sharded")
    path = sorted(folder.glob("*.safetensors"))[2]
    path.unlink()
    refused(folder, says=(path.name, "missing", "download"))


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_shard(refused, copied, keep):
    folder = copied("llama_sharded")
    path = sorted(folder.glob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, says=(path.name, "truncated or damaged", "download"))


def test_weights_that_lack_a_parameter(refused, copied, no_read):
    folder = copied()
    key = "model.layers.1.mlp.up_proj.weight"
    models.change_tensors(folder, lambda tensors: {k: v for k, v in tensors.items() if k != key})
    refused(folder, says=(key, "1 of the model's parameters", "download"))


def test_weights_of_another_shape_than_the_config_says(refused, copied, no_read):
    folder = models.change_config(copied(), intermediate_size=512)
    refused(folder, says=("mlp.down_proj.weight", "[128, 256]", "[128, 512]", "config"))


@pytest.mark.parametrize(
    ("key", "quantized"), [("model.layers.1.mlp.up_proj.weight", True), ("model.norm.weight", False)]
)
@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (-1e999, "infinity")])
def test_a_tensor_that_is_not_finite(refused, copied, key, quantized, value, kind):
    def spoil(tensors):
        tensors[key].view(-1)[7] = value
        return tensors

    folder = models.change_tensors(copied(), spoil)
    sentence = refused(folder, says=(f"tensor '{key}'", "model.safetensors", kind, "download"))
    assert ("NaN" in sentence) == (kind == "NaN")


def test_an_encoder(refused, model_folder, no_read):
    refused(model_folder("bert"), says=("BertForMaskedLM", "not a causal language model", "ForCausalLM"))


def test_a_model_that_is_compressed_already(refused, compressed):
    for recipe, method in (("w8a8", "compressed-tensors"), ("fp8-e5m2", "quantkit")):
        refused(compressed(recipe), says=("compressed already", repr(method), "float model"))


def test_an_architecture_that_transformers_does_not_know(refused, copied, no_read):
    folder = models.change_config(copied(), model_type="nonesuch", architectures=["NonesuchForCausalLM"])
    refused(folder, says=("NonesuchForCausalLM",))
    refused(models.change_config(folder, architectures=None), says=("nonesuch",))


def test_pickled_weights(refused, copied):
    folder = copied()
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, says=("pytorch_model.bin", "pickle", "safetensors"))


def test_nothing_to_quantize(refused, model_folder, no_read):
    refused(model_folder("gpt2"), "--include", "lm_head", says=("no linear layer", "--include"))


# The recipe


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("-m", "gptq"),
            ("'gptq'", "smoothquant, sparse24, relu, activation-threshold", "quantkit methods"),
        ),
        (("-m", "int8:size=3"), ("'size'", "group, weight_range")),
        (("-m", "int8:group=64"), ("'64'", "group=channel|128")),
        (("-m", "int8:group"), ("'group'", "key=value")),
        (("-m", "w8a8", "-m", "int8"), ("w8a8 and int8", "one quantizer")),
        ((), ("at least one step", "-m STEP or --recipe")),
        (("-m", "w8a8", "--recipe", "w8a8"), ("not both",)),
        (("--recipe", "nonesuch"), ("'nonesuch'", "w8a8-mse")),
        (("-m", "w8a8", "--include", "re:("), ("'re:('", "regular expression")),
        (("-m", "w8a8", "--ignore", "re:*"), ("'re:*'", "regular expression")),
        (("-m", "w8a8", "--ignore", ""), ("empty pattern", "glob")),
        (("-m", "w8a8", "--ignore", "nothing"), ("--ignore 'nothing'", "none of the 15 linear layers", "proj'")),
        (("-m", "w8a8", "--include", "re:q_proj"), ("--include 're:q_proj'", "none of the 15 linear layers")),
        (("-m", "w8a8", "--ignore", "*"), ("no linear layer", "--ignore")),
        (("-m", "fp8:dtype=e5m2", "--format", "compressed-tensors"), ("compressed-tensors", "E5M2", "--format auto")),
        (("-m", "w8a8", "--max-shard-size", "5TB"), ("'5TB'", "5GB")),
        (("-m", "w8a8", "--max-shard-size", "GB"), ("'GB'", "5GB")),
        (("-m", "w8a8", "--max-shard-size", "-1"), ("'-1'", "5GB")),
        (("-m", "w8a8", "--max-shard-size", "0"), ("'0'", "5GB")),
        (("-m", "w8a8", "--max-shard-size", "nan"), ("'nan'", "5GB")),
        (("-m", "w8a8", "--max-shard-size", "1e400"), ("'1e400'", "5GB")),
        (("-m", "w8a8", "--device", "tpu"), ("'tpu'", "auto, cpu, cuda or cuda:N")),
        (("-m", "w8a8", "--device", ""), ("''", "auto, cpu, cuda or cuda:N")),
        (("-m", "w8a8", "--device", "meta"), ("'meta'", "auto, cpu, cuda or cuda:N")),
        (("-m", "w8a8", "--device", "cuda:99"), ("'cuda:99'", "--device cpu")),
    ],
)
def test_words_that_make_no_recipe(refused, model_folder, no_read, words, says):
    refused(model_folder(), *words, says=says, steps=())


@pytest.mark.parametrize("step", ["int8:group=128", "fp8:scheme=block"])
def test_groups_that_do_not_divide_name_every_layer_before_any_work(refused, model_folder, no_read, step):
    sentence = refused(model_folder("llama_odd"), says=("128", "14 layers", "--ignore"), steps=("-m", step))
    for number in (0, 1):
        for leaf in "qkvo":
            assert f"model.layers.{number}.self_attn.{leaf}_proj (36)" in sentence
        assert f"model.layers.{number}.mlp.down_proj (51)" in sentence


def test_only_the_layers_that_do_not_divide_are_named(refused, model_folder, no_read):
    sentence = refused(model_folder("opt"), says=("10 layers", "fc1 (64)"), steps=("-m", "int8:group=128"))
    assert "fc2" not in sentence


def test_a_recipe_file_that_is_none(refused, model_folder, tmp_path, no_read):
    path = tmp_path / "recipe.toml"
    for text in ("steps =", "steps = ['gptq']", "methods = ['w8a8']", "steps = 'w8a8'"):
        path.write_text(text)
        refused(model_folder(), "--recipe", path, says=(str(path),), steps=())


# The evaluation


def evaluated(refused, model, data, *words, says):
    return refused(model, "--eval-dataset", data, *words, says=says)


def test_an_evaluation_text_shorter_than_a_window(refused, model_folder, tmp_path, no_read):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    evaluated(refused, model_folder(), text, says=("short.txt", "64"))
    evaluated(refused, model_folder(), text, "--seq-len", 32, says=("short.txt", "32"))


def test_an_evaluation_window_longer_than_the_context(refused, model_folder, tmp_path, no_read):
    text = tmp_path / "long.txt"
    text.write_text("a b c d " * 100)
    evaluated(refused, model_folder(), text, "--seq-len", 65, says=("65", "64"))


def test_an_evaluation_text_that_does_not_exist(refused, model_folder, tmp_path, no_read):
    evaluated(refused, model_folder(), tmp_path / "no.txt", says=("no.txt",))


def test_an_evaluation_without_a_tokenizer(refused, copied, tmp_path, no_read):
    folder = copied()
    for path in folder.glob("token*"):
        path.unlink()
    text = tmp_path / "long.txt"
    text.write_text("a b c d " * 100)
    evaluated(refused, folder, text, says=("tokenizer",))


# The disk


def test_a_disk_without_room_is_told_before_any_work(refused, model_folder, monkeypatch, no_read):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 1000, 1000))
    refused(model_folder(), says=("no space", "1,000 free", "-o OUT"))


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
)
@pytest.mark.parametrize("number", [0, 2])
def test_a_disk_that_fills_up_while_shards_are_written(refused, model_folder, monkeypatch, error, number):
    save, calls = shards.save_file, []

    def fail(tensors, path, **words):
        calls.append(path)
        if len(calls) > number:
            Path(path).write_bytes(b"half")
            raise error
        save(tensors, path, **words)

    monkeypatch.setattr(shards, "save_file", fail)
    refused(model_folder(), "--max-shard-size", "100KB", says=("no space is left", "-o OUT"))
    assert len(calls) == number + 1


@pytest.mark.parametrize("name", ["config.json", "quantkit_recipe.json", "README.md"])
def test_a_disk_that_fills_up_while_text_is_written(refused, model_folder, monkeypatch, name):
    write = Path.write_text

    def fail(self, *words, **named):
        if self.name == name:
            raise OSError(28, "No space left on device")
        return write(self, *words, **named)

    monkeypatch.setattr(Path, "write_text", fail)
    refused(model_folder(), says=("no space is left", "-o OUT"), kept=True)


def test_a_disk_that_fills_up_while_files_are_copied(refused, model_folder, monkeypatch):
    def fail(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", fail)
    refused(model_folder(), says=("no space is left", "-o OUT"), kept=True)


# Usage


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("nonesuch",),
        ("quantize",),
        ("quantize", "MODEL"),
        ("quantize", "MODEL", "-o"),
        ("quantize", "MODEL", "-o", "OUT", "--nonesuch"),
        ("quantize", "MODEL", "OTHER", "-o", "OUT"),
        ("quantize", "MODEL", "-o", "OUT", "--format", "gguf"),
        ("quantize", "MODEL", "-o", "OUT", "--samples", "0"),
        ("quantize", "MODEL", "-o", "OUT", "--seed", "x"),
        ("inspect",),
        ("generate", "OUT"),
        ("generate", "OUT", "--prompt", "x", "--max-new-tokens", "0"),
        ("generate", "OUT", "--prompt", "x", "--temperature", "-1"),
        ("generate", "OUT", "--prompt", "x", "--backend", "cuda"),
        ("eval",),
        ("methods", "x"),
    ],
)
def test_usage_errors_exit_2_with_usage_on_stderr(cli, words):
    result = cli(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage:" in result.stderr or "requires an argument" in result.stderr


# The other commands


def test_inspect_and_generate_refuse_what_they_cannot_open(mistake, model_folder, compressed, copied, tmp_path):
    mistake("inspect", tmp_path / "nowhere", says=("nowhere does not exist",))
    mistake("generate", tmp_path / "nowhere", "--prompt", "x", says=("nowhere does not exist",))
    mistake("generate", compressed(), "--prompt", "", says=("prompt ''", "give another"))
    mistake("generate", compressed(), "--prompt", "x", "--device", "tpu", says=("'tpu'", "auto, cpu, cuda"))
    folder = copied()
    models.change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    mistake("inspect", folder, says=("'gptq'", "compressed-tensors, bitsandbytes and quantkit"))
    mistake("generate", folder, "--prompt", "x", says=("'gptq'", "compressed-tensors, bitsandbytes and quantkit"))
    for path in folder.glob("token*"):
        path.unlink()
    mistake("generate", folder, "--prompt", "x", says=("no tokenizer", "copy one"))


def test_a_triton_kernel_on_a_cpu(mistake, compressed):
    words = ("generate", compressed("w8a8"), "--prompt", "ab", "--max-new-tokens", "4")
    words += ("--device", "cpu", "--backend", "triton")
    mistake(*words, says=("triton", "auto"))


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"architectures": 5})])
def test_a_config_that_is_none(refused, copied, no_read, text):
    folder = copied()
    (folder / "config.json").write_text(text)
    refused(folder, says=("config.json", "mend"))
