"""Parsers under libFuzzer, which looks for inputs that reach new lines; where atheris is installed."""

import os
import subprocess
import sys
from pathlib import Path

import hostile
import pytest

pytestmark = pytest.mark.exhaustive
SECONDS = 60

PROGRAM = """
import json, sys, tempfile
from pathlib import Path
import atheris
import torch, transformers, regex, safetensors, datasets
with atheris.instrument_imports(include=["quantkit"]):
    from quantkit import formats, recipe, shards, texts, untrusted
    from quantkit.dequantization.schemes import scheme_finder
    from quantkit.errors import QuantkitError

folder = Path(tempfile.mkdtemp())
file = folder / "x"

def step(data):
    str(recipe.Step.parse(data.decode("utf-8", "surrogateescape")))

def recipes(data):
    (folder / "r.toml").write_bytes(data)
    recipe.load_recipe(folder / "r.toml")

def config(data):
    stored = json.loads(data)
    formats.of_config(stored, "X").parse(stored).scheme_of("m.a")

def schemes(data):
    stored = json.loads(data)
    if isinstance(stored, dict):
        scheme_finder(stored, "X")("m.a")

def header(data):
    (folder / "model.safetensors").write_bytes(data)
    shards.ShardReader(folder)

def remote_header(data):
    shards.parse_header(data, file, 48)

def index(data):
    file.write_bytes(data)
    shards.read_index(file)

def rows(data):
    (folder / "x.json").write_bytes(data)
    texts.read(folder / "x.json")

def pattern(data):
    text = data.decode("utf-8", "surrogateescape")
    if untrusted.regex_trouble(text) is None:
        untrusted.fits(text, "model.layers.0.mlp")

target = globals()[sys.argv.pop(1)]

def one(data):
    try:
        target(data)
    except QuantkitError as error:
        if not str(error):
            raise AssertionError("an error without a sentence") from error
    except (ValueError, RecursionError):
        if target not in (config, schemes, remote_header):  # whose JSON is read by the caller
            raise

atheris.Setup(sys.argv, one)
atheris.Fuzz()
"""
SEEDS = {
    "step": [b"smoothquant:alpha=0.5", b"llm-int8:threshold=6.0,outlier_weight=float"],
    "recipes": [b'steps = ["w8a8"]\nignore = ["re:.*head"]\nseed = 3\n'],
    "config": [hostile.dumped(value) for value in hostile.CONFIGS.values()],
    "schemes": [hostile.dumped(hostile.PACKED), hostile.dumped(hostile.BLOCKS)],
    "header": [b'\x38\0\0\0\0\0\0\0{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}    \0'],
    "remote_header": [b'{"a":{"dtype":"F32","shape":[3,4],"data_offsets":[0,48]}}'],
    "index": [b'{"weight_map": {"a": "one.safetensors"}}'],
    "rows": [b'[{"text": "a b"}]', b'{"messages": [{"role": "user", "content": "x"}]}', b'{"input_ids": [1]}'],
    "pattern": [b".*layers\\.[0-9]+\\.(q|k|v)_proj$", b"(?!a)(b|c){2,3}"],
}


@pytest.mark.parametrize("target", list(SEEDS))
def test_no_input_that_reaches_a_new_line_crashes(target: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed; it has wheels for some versions of Python only")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS[target]):
        (corpus / str(number)).write_bytes(seed)
    options = [f"-max_total_time={SECONDS}", "-timeout=20", "-rss_limit_mb=4000", "-max_len=4096"]
    command = [sys.executable, "-c", PROGRAM, target, *options, f"-artifact_prefix={tmp_path}/", str(corpus)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
