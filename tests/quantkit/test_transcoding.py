"""`quantkit convert`: codes are kept bit for bit, and other software reads what comes out.

The checkpoints are those that compressed-tensors and bitsandbytes wrote (`tests/oracles/fixtures`).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from quantkit_kernels import sparse24
from quantkit_kernels.formats import unpack_int32

import quantkit
from quantkit import transcoding
from quantkit.checkpoint import Hub, read_config
from quantkit.errors import CheckpointError, RecipeError
from quantkit.inspection import inspect_checkpoint
from quantkit.modules import QuantizedLinear
from quantkit.pipeline import open_source
from quantkit.shards import ShardReader
from quantkit.transcoding import convert

FIXTURES = Path(__file__).parents[1] / "oracles" / "fixtures"
SPARSE = ("sparse24-bf16", "sparse24-int8", "sparse24-fp8")
IDS = torch.arange(2, 12).unsqueeze(0)


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """The float tensors that a checkpoint stands for."""
    weights = open_source(folder, Hub(), None, dequantize=True).weights
    return {name: weights.get(name) for name in weights.tensors}


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = quantkit.load(folder)(IDS).logits
        return out


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_checkpoints_stay_packed_in_quantkits_format(tmp_path: Path, name: str) -> None:
    """The codes are the source's own, and logits and decoded weights the same to the bit.

    Only which zeros are stored where a four has less than two other numbers is our own choice.
    """
    done = convert(FIXTURES / name, tmp_path / "out", to="quantkit", progress=False)
    assert list(done.schemes.values()) == [7]
    before, after = models.read_tensors(FIXTURES / name), models.read_tensors(tmp_path / "out")
    assert read_config(tmp_path / "out")["quantization_config"]["version"] == 4
    layers = [key.removesuffix(".bitmask") for key in before if key.endswith(".bitmask")]
    assert len(layers) == 7
    for layer in layers:
        values = before[f"{layer}.compressed"]
        columns = 2 * values.shape[1]
        bits = sparse24.indices_of_bitmask(before[f"{layer}.bitmask"], columns)
        zeros = sparse24.unpack(values, bits, columns)
        stored = after[f"{layer}.weight"]
        again = sparse24.unpack(stored.view(values.dtype), after[f"{layer}.weight_indices"], columns)
        assert torch.equal(again.float(), zeros.float())
    assert inspect_checkpoint(tmp_path / "out").problems == []
    assert same(dequantized(tmp_path / "out"), dequantized(FIXTURES / name))
    assert torch.equal(logits(tmp_path / "out"), logits(FIXTURES / name))
    quantkit.load(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert all(models.same(value, after[key]) for key, value in models.read_tensors(tmp_path / "again").items())


@pytest.mark.parametrize("name", [*SPARSE, "bitsandbytes", "w4a16-asymmetric", "moe-fp8"])
def test_anything_becomes_float(tmp_path: Path, name: str) -> None:
    convert(FIXTURES / name, tmp_path / "out", to="dense", progress=False)
    assert "quantization_config" not in read_config(tmp_path / "out")
    assert same(models.read_tensors(tmp_path / "out"), dequantized(FIXTURES / name))


@pytest.mark.parametrize("name", SPARSE[1:])
def test_sparse_codes_become_ordinary_ones_that_others_load(tmp_path: Path, name: str) -> None:
    """What transformers with compressed-tensors decodes are the very weights that the source stands for."""
    pytest.importorskip("compressed_tensors", reason="install the extra `oracles`")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    out = tmp_path / "out"
    convert(FIXTURES / name, out, to="compressed-tensors", progress=False)
    expected = dequantized(FIXTURES / name)
    assert same(dequantized(out), expected)
    theirs = AutoModelForCausalLM.from_pretrained(out, quantization_config=CompressedTensorsConfig(dequantize=True))
    state = theirs.state_dict()
    layers = [key for key in expected if "_proj.weight" in key]
    assert len(layers) == 7
    assert all(torch.equal(state[key].float(), expected[key].float()) for key in layers)
    for key in layers:
        fours = expected[key].view(-1, 4)
        assert bool(((fours != 0).sum(1) <= 2).all())
    assert torch.equal(logits(out), logits(FIXTURES / name))


@pytest.mark.parametrize(("activations", "packed"), [("same", True), ("none", True), ("token", False)])
def test_bitsandbytes_becomes_compressed_tensors_and_back(tmp_path: Path, activations: str, packed: bool) -> None:
    source, there, back = FIXTURES / "bitsandbytes", tmp_path / "there", tmp_path / "back"
    convert(source, there, to="compressed-tensors", activations=activations, progress=False)
    before, made = models.read_tensors(source), models.read_tensors(there)
    layers = [key.removesuffix(".SCB") for key in before if key.endswith(".SCB")]
    for layer in layers:
        codes = before[f"{layer}.weight"]
        found = made[f"{layer}.weight_packed"] if packed else made[f"{layer}.weight"]
        assert torch.equal(unpack_int32(found, 8, codes.shape[1]) if packed else found, codes)
        assert torch.equal(made[f"{layer}.weight_scale"], (before[f"{layer}.SCB"] / 127).unsqueeze(1))
    assert inspect_checkpoint(there).problems == []
    convert(there, back, to="bitsandbytes", progress=False)
    again = models.read_tensors(back)
    assert again.keys() == before.keys()
    for key, value in before.items():
        if key.endswith(".SCB"):
            assert torch.allclose(again[key], value, rtol=2.0**-23, atol=0)
        else:
            assert models.same(again[key], value)


def test_transformers_reads_what_was_bitsandbytes(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="install the extra `oracles`")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    convert(FIXTURES / "bitsandbytes", tmp_path / "out", to="compressed-tensors", progress=False)
    words = {"quantization_config": CompressedTensorsConfig(dequantize=True), "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **words).state_dict()
    ours = dequantized(tmp_path / "out")
    for key in [key for key in ours if "_proj.weight" in key]:
        limit = 2.0**-10 * ours[key].float().abs()
        assert bool(((theirs[key].float() - ours[key].float()).abs() <= limit).all())


def test_a_float_checkpoint_with_zeros_is_packed(tmp_path: Path) -> None:
    """Only where the zeros are 2:4: the others stay as they are."""
    convert(FIXTURES / "sparse24-bf16", tmp_path / "dense", to="dense", progress=False)
    other = "model.layers.0.mlp.down_proj.weight"
    models.change_tensors(tmp_path / "dense", lambda tensors: tensors | {other: torch.ones_like(tensors[other])})
    convert(tmp_path / "dense", tmp_path / "out", to="quantkit", progress=False)
    model = quantkit.load(tmp_path / "out")
    packed = [name for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)]
    assert len(packed) == 6
    assert other.removesuffix(".weight") not in packed
    assert same(dequantized(tmp_path / "out"), models.read_tensors(tmp_path / "dense"))
    shares = [
        sum(model.get_submodule(name).get_buffer(leaf).nbytes for leaf in ("weight", "weight_indices"))
        / (2 * model.get_submodule(name).in_features * model.get_submodule(name).out_features)
        for name in packed
    ]
    assert shares == [9 / 16] * 6


def test_auto_classes_load_it_after_the_import(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import quantkit.hf  # noqa: F401  (registers the format)

    convert(FIXTURES / "sparse24-int8", tmp_path / "out", to="quantkit", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, logits(tmp_path / "out"))


@pytest.mark.parametrize("name", SPARSE)
def test_kept_weights_change_nothing_but_the_order_of_sums(tmp_path: Path, name: str) -> None:
    plain, kept = (quantkit.load(FIXTURES / name, keep_decoded=keep) for keep in (False, None))
    with torch.no_grad():
        expected, found = plain(IDS).logits.float(), kept(IDS).logits.float()
    layers = [layer for layer in kept.modules() if isinstance(layer, QuantizedLinear)]
    assert all(layer._decoded is not None for layer in layers)
    assert float((found - expected).abs().max()) <= 0.05 * float(expected.abs().max())
    if name == "sparse24-int8":  # codes as codes: the same products
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("sparse24-bf16", {"to": "compressed-tensors"}, "no layer of it has codes.*--to dense"),
        ("w4a16", {"to": "bitsandbytes"}, r"cannot be bitsandbytes int8.*it is int4 g128"),
        ("moe-fp8", {"to": "quantkit"}, "together with others.*--to dense"),
        ("w8a8", {"to": "dense", "activations": "none"}, "--activations none says nothing of a float"),
        ("w4a16-asymmetric", {"to": "quantkit"}, "zero points"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(
    tmp_path: Path, name: str, words: dict[str, Any], says: str
) -> None:
    with pytest.raises((CheckpointError, RecipeError), match=says):
        convert(FIXTURES / name, tmp_path / "out", progress=False, **words)
    assert not any(tmp_path.iterdir())


def test_a_bitmask_of_another_pattern_is_refused(tmp_path: Path) -> None:
    folder = models.copy(FIXTURES / "sparse24-int8", tmp_path / "model")
    key = "model.layers.0.mlp.up_proj.bitmask"
    models.change_tensors(folder, lambda tensors: tensors | {key: torch.full_like(tensors[key], 0x37)})
    assert inspect_checkpoint(folder).problems == [f"{key!r} does not say of every four weights where two are"]
    with pytest.raises(CheckpointError, match=r"up_proj\.bitmask' does not say of every four"):
        quantkit.load(folder)
    with pytest.raises(CheckpointError, match=r"up_proj\.bitmask' doesn't fit it"):
        dequantized(folder)


def test_the_command(cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli("convert", FIXTURES / "sparse24-int8", "-o", tmp_path / "out", "--to", "quantkit", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["schemes"] == {"2:4 int8, activations per token -> 2:4 int8, activations per token": 7}
    assert said["bytes_after"] == ShardReader(tmp_path / "out").nbytes


@pytest.mark.parametrize(("to", "form"), [("dense", "float"), ("compressed-tensors", "compressed-tensors")])
def test_the_result_has_a_card(tmp_path: Path, to: str, form: str) -> None:
    source = models.copy(FIXTURES / "sparse24-int8", tmp_path / "model")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# The source's own\n")
    done = convert(source, tmp_path / "out", to=to, progress=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith(f"---\nlibrary_name: transformers\ntags:\n- quantkit\n- {form}\nlicense: mit\n---\n")
    assert f"# model, as {form}" in card
    assert f"| bytes of tensors | {done.bytes_before:,} before, {done.bytes_after:,} after |" in card
    assert ("layers: 2:4 int8, activations per token -> int8, activations per token | 7 |" in card) == (to != "dense")
    assert str(tmp_path) not in card
    assert "source's own" not in card


def test_a_conversion_that_is_stopped_leaves_nothing_and_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transcoding, "_copy", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(FIXTURES / "sparse24-int8", tmp_path / "out", to="quantkit", progress=False)
    assert not any(tmp_path.iterdir())
    killed = tmp_path / "out.partial"  # what a kill would have left, half-written
    killed.mkdir()
    (killed / "quantkit_partial").touch()
    (killed / "part-00000.safetensors").write_bytes(b"half")
    convert(FIXTURES / "sparse24-int8", tmp_path / "out", to="quantkit", progress=False)
    assert inspect_checkpoint(tmp_path / "out").problems == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(CheckpointError, match="exists already"):
        convert(FIXTURES / "sparse24-int8", tmp_path / "out", to="quantkit", progress=False)
