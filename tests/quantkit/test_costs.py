"""What compressing does as often as it must and no oftener: runs of blocks, reads of tensors, imports."""

import json
import subprocess
import sys
from collections import Counter

import models
import pytest
import torch
from transformers.models.llama import modeling_llama

import quantkit
from quantkit import calibrated, footprint, observation
from quantkit.compression import _norms
from quantkit.modules import quantize_linear
from quantkit.scheme import Scheme
from quantkit.shards import ShardReader
from quantkit.smoothing import Proof

BOTH = ["smoothquant", "w8a8"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """8 rows of 16 token ids."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    ids = torch.randint(0, 200, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return {"dataset": str(path), "samples": 8, "seq_len": 16, "progress": False}


@pytest.mark.parametrize("name", ["llama", "llama_bf16"])
def test_a_block_runs_twice_for_each_batch_and_once_for_its_proof(model_folder, rows, tmp_path, monkeypatch, name):
    """Eight windows are batches of 1, 2, 2, 2 and 1. All but the first are observed as far as the last product."""
    begun, ended, proofs, counting = Counter(), Counter(), [], []
    forward, run_blocks, prove = modeling_llama.LlamaDecoderLayer.forward, calibrated.run_blocks, Proof.__call__

    def count(self, *args, **kwargs):
        begun[self.self_attn.layer_idx] += bool(counting)
        output = forward(self, *args, **kwargs)
        ended[self.self_attn.layer_idx] += bool(counting)
        return output

    def counted(*args, **kwargs):
        counting.append(True)
        return run_blocks(*args, **kwargs)

    monkeypatch.setitem(footprint.BATCH_TOKENS, "cpu", 32)
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", count)
    monkeypatch.setattr(calibrated, "run_blocks", counted)
    monkeypatch.setattr(Proof, "__call__", lambda self: proofs.append(prove(self)) or proofs[-1])
    quantkit.quantize(model_folder(name), tmp_path / "out", steps=BOTH, **rows)
    assert len(proofs) == 2
    assert begun == {0: 5 + 1 + 5, 1: 5 + 1}  # nothing comes after the last block
    assert ended == {0: 1 + 1 + 5, 1: 1 + 1}


def test_static_scales_are_observed_as_far_as_the_last_product(model_folder, rows, tmp_path, monkeypatch):
    products = []
    stop = observation.Watch.of

    def of(self, run):
        stop(self, run)
        products.append(max(self.met.values()))

    monkeypatch.setitem(footprint.BATCH_TOKENS, "cpu", 32)
    monkeypatch.setattr(observation.Watch, "of", of)
    quantkit.quantize(model_folder(), tmp_path / "out", steps=["w8a8:activation=tensor-static"], **rows)
    assert products == [1, 2, 3, 4] * 2


@pytest.mark.parametrize(("steps", "most"), [(["fp8"], 1), (["int8"], 1), (BOTH, 2)])
def test_tensors_are_read_as_often_as_they_are_needed(model_folder, rows, tmp_path, monkeypatch, steps, most):
    """Of the source; with data an unchanged tensor once to run and once to be written.

    What was written: once, in pieces of a file, but for scales, whose values are looked at.
    """
    read, summed = Counter(), Counter()
    get, checksum = ShardReader.get, ShardReader.checksum

    def noted(self, name):
        read[self.folder.name.startswith("out"), name] += 1
        return get(self, name)

    def summing(self, name):
        summed[name] += 1
        return checksum(self, name)

    monkeypatch.setattr(ShardReader, "get", noted)
    monkeypatch.setattr(ShardReader, "checksum", summing)
    words = rows if steps == BOTH else {"progress": False}
    quantkit.quantize(model_folder(), tmp_path / "out", steps=steps, **words)
    written = models.read_tensors(tmp_path / "out")
    assert summed == dict.fromkeys(written, 1)
    assert {name for own, name in read if own} == {name for name in written if name.endswith("scale")}
    source = {name: times for (own, name), times in read.items() if not own}
    assert set(source) == set(models.read_tensors(model_folder()))
    blocks = {name: times for name, times in source.items() if ".layers." in name}
    assert max(blocks.values()) <= most
    assert steps == BOTH or set(source.values()) == {1}


def test_rows_of_token_ids_need_no_library_of_data_sets(model_folder, rows, tmp_path):
    """They take 80 MB and a second; a process of its own, as tests import them."""
    words = {**rows, "steps": BOTH}
    code = (
        "import sys, quantkit\n"
        f"quantkit.quantize({str(model_folder())!r}, {str(tmp_path / 'out')!r}, **{words!r})\n"
        "print([name for name in ('datasets', 'pyarrow', 'pandas') if name in sys.modules])\n"
    )
    ran = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("int8"),
        Scheme("int8", 128),
        Scheme(
            "float8_e4m3fn", activation_dtype="float8_e4m3fn", weight_granularity="tensor", activation="tensor-static"
        ),
        Scheme("float8_e4m3fn", activation_dtype="float8_e4m3fn", weight_granularity="block", activation="group"),
    ],
    ids=lambda scheme: scheme.label,
)
def test_what_is_lost_is_found_some_rows_at_a_time(scheme, monkeypatch):
    """Held against float64 of the whole.

    A float32 sum of 2**15 squares rounds by at most 2**15 * 2**-24 of it, and its root by half of that.
    """
    monkeypatch.setattr("quantkit.compression.NORM_ELEMENTS", 1)
    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scale = quantize_linear(weight, scheme)
    values = codes.float()
    if scheme.weight_granularity == "block":
        whole = scale.float().repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)
    elif scheme.weight_granularity == "tensor":
        whole = scale.float()
    else:
        whole = scale.float().repeat_interleave(256 // scale.shape[1], 1)
    decoded = (values * whole).bfloat16()
    found = _norms(weight, codes, scale, scheme.weight_granularity, None)
    expected = weight.double().norm(), (decoded.double() - weight.double()).norm()
    assert found == pytest.approx([float(each) for each in expected], rel=2**-10)
