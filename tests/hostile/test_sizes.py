"""Configs that ask for absurd sizes: refused by what the files hold, before memory or time is spent."""

import json
import subprocess
import sys
import time

import hostile
import models
import pytest
import tiny
import torch
from architectures import BUILDABLE
from torch import nn

from quantkit import load
from quantkit.building import BYTES, PARAMETERS, bounded
from quantkit.checkpoint import Hub, load_tokenizer, open_folder
from quantkit.errors import CheckpointError
from quantkit.inspection import inspect_checkpoint

MEMORY = 12 * 2**30
"""Bytes of addresses that a process may have which opens a model of kilobytes."""

OPEN = """
import resource, sys, time
from pathlib import Path
import torch, accelerate, transformers.models.auto.modeling_auto
from quantkit.checkpoint import Hub, open_folder
from quantkit.errors import QuantkitError
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
worst = 0
for folder in sys.argv[2:]:
    started = time.process_time()
    try:
        open_folder(Path(folder), Hub())
    except QuantkitError as error:
        pass
    worst = max(worst, time.process_time() - started)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, round(worst, 1))
"""


@pytest.fixture
def changed(model_folder, tmp_path):
    """A copy of a tiny model with other values in its config."""
    made = iter(range(10**6))

    def change(name="llama", **values):
        return models.change_config(models.copy(model_folder(name), tmp_path / f"model{next(made)}"), **values)

    return change


def refused(call):
    """The sentence of the refusal, which takes neither memory nor time."""
    before, started = hostile.peak_bytes(), time.perf_counter()
    with pytest.raises(CheckpointError) as error:
        call()
    assert hostile.peak_bytes() - before < BYTES
    assert time.perf_counter() - started < 20
    return str(error.value)


ABSURD = [
    *({"num_hidden_layers": count} for count in (3000, 100_000, 10**6, 10**9, 10**400)),
    *({"num_labels": count} for count in (10**9, 1e12)),
    *({"hidden_size": size, "head_dim": 32} for size in (10**6, 10**9, 2**62)),
    {"hidden_size": 10**8, "vocab_size": 1, "intermediate_size": 1, "head_dim": 32},
    {"head_dim": 10**9, "num_attention_heads": 1, "num_key_value_heads": 1},
    {"intermediate_size": 10**9},
    {"vocab_size": 10**9},
    {"num_key_value_heads": 10**9, "num_attention_heads": 10**9},
]


@pytest.mark.parametrize("values", ABSURD, ids=str)
def test_absurd_sizes_are_refused(changed, values):
    folder = changed(**values)
    for call in (open_folder, inspect_checkpoint):
        refused(lambda call=call: call(folder, Hub()))
    refused(lambda: load(folder))


def test_the_tokenizer_is_asked_for_no_list_either(changed):
    """Transformers reads the config to know which tokenizer a model has, and makes a list of its labels."""
    assert "num_labels" in refused(lambda: load_tokenizer(changed(num_labels=10**9)))


@pytest.mark.parametrize("values", [{"max_position_embeddings": 10**9}, {"bos_token_id": 10**12}], ids=str)
def test_large_numbers_that_take_nothing_are_nobody_s_business(changed, values):
    assert open_folder(changed(**values), Hub()).skeleton is not None


def test_experts_without_end_are_refused(changed):
    assert "config" in refused(lambda: open_folder(changed("mixtral", num_local_experts=10**7), Hub()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(10**10),
        lambda: torch.zeros(10**5, 10**5),
        lambda: torch.empty(2**40),
        lambda: torch.arange(10**10),
        lambda: torch.full((10**10,), 1.0),
        lambda: torch.eye(10**5),
        lambda: torch.outer(torch.arange(10**5), torch.arange(10**5)),
        lambda: torch.ones(10**5).unsqueeze(1).expand(10**5, 10**5).contiguous(),
        lambda: torch.ones(10**5).repeat(10**5),
        lambda: torch.cat([torch.ones(10**7)] * 100),
        lambda: torch.einsum("i,j->ij", torch.ones(10**5), torch.ones(10**5)),
        lambda: torch.linspace(0, 1, 10**10),
        lambda: torch.randn(10**10),
        lambda: torch.ones(10**5)[:, None] + torch.ones(10**5),
        lambda: nn.Linear(10**5, 10**5),
        lambda: nn.Embedding(10**6, 10**4),
        lambda: nn.LayerNorm(10**10),
    ],
)
def test_whatever_a_constructor_makes_is_bounded(make):
    refused(lambda: bounded_call(make))


def bounded_call(make):
    with bounded(10, 10**6, "X"):
        return make()


def test_many_small_things_are_bounded_too():
    def parameters():
        return nn.ModuleList(nn.LayerNorm(1) for _ in range(PARAMETERS))

    def modules():
        return nn.ModuleList(nn.Identity() for _ in range(100 * PARAMETERS))

    def buffers():
        module = nn.Module()
        for number in range(1000):
            module.register_buffer(f"b{number}", torch.empty(BYTES // 100, dtype=torch.uint8))

    for make in (parameters, modules, buffers):
        refused(lambda make=make: bounded_call(make))


def test_nothing_is_bounded_afterwards():
    with pytest.raises(CheckpointError):
        bounded_call(lambda: torch.ones(10**10))
    nn.ModuleList(nn.LayerNorm(1) for _ in range(PARAMETERS))
    assert torch.empty(BYTES + 100 * 10**6, dtype=torch.uint8).numel() > BYTES


def opened(folders, seconds):
    """Peak MiB and the longest seconds of a process that opens these folders with little memory."""
    command = [sys.executable, "-c", OPEN, str(MEMORY), *map(str, folders)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    assert ran.returncode == 0, f"{ran.returncode}: {ran.stderr[-1000:]}"
    return [float(number) for number in ran.stdout.split()]


def numbers_of(config):
    return [key for key, value in config.items() if type(value) is int]


def test_any_number_of_a_config_may_be_absurd(model_folder, tmp_path):
    """In a process of its own, which has no more memory than a small machine."""
    config = json.loads((model_folder("llama") / "config.json").read_text(encoding="utf-8"))
    folders = []
    for key in numbers_of(config):
        folder = models.copy(model_folder("llama"), tmp_path / key)
        folders.append(models.change_config(folder, **{key: 10**9}))
    mebibytes, seconds = opened(folders, 120)
    assert mebibytes < 2000
    assert seconds < 10


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", BUILDABLE)
def test_any_number_of_any_config_may_be_absurd(model_type, tmp_path):
    folder = tiny.save(model_type, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    folders = []
    for key in numbers_of(config):
        copy = models.copy(folder, tmp_path / key)
        folders.append(models.change_config(copy, **{key: 10**9}))
    mebibytes, seconds = opened(folders, 550)
    assert mebibytes < 3000
    assert seconds < 60
