import json
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from quantkit import load, quantize, shards
from quantkit.checkpoint import read_config
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.modules import QuantizedLinear
from quantkit.pipeline import parse_size
from quantkit.recipe import load_recipe, recipe_names
from quantkit.shards import ShardReader

LINEARS = 14
DTYPES = {"llama": torch.float32, "llama_bf16": torch.bfloat16, "llama_fp16": torch.float16}


def weights_of(folder):
    """The bytes of every safetensors file and index, by name."""
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


def decoded(codes, scale):
    """Codes times scales [N, G], [1] or [N/128, K/128], in float64 and rounded once to the scale's dtype."""
    wide = scale.double().reshape(1, 1) if scale.ndim == 1 else scale.double()
    if wide.shape[0] not in (1, codes.shape[0]):
        wide = wide.repeat_interleave(128, 0)[: codes.shape[0]]
    wide = wide.repeat_interleave(codes.shape[1] // wide.shape[1], 1)
    return (codes.double() * wide).to(scale.dtype)


def codes_of(tensors, module):
    """Codes [N, K] of a layer on disk, unpacked by hand."""
    if f"{module}.weight" in tensors:
        return tensors[f"{module}.weight"]
    out_features, in_features = tensors[f"{module}.weight_shape"].tolist()
    raw = tensors[f"{module}.weight_packed"].contiguous().view(torch.uint8).to(torch.int16)
    if raw.shape[1] < in_features:  # two codes a byte, the first in the lower half
        return torch.stack([raw & 15, raw >> 4], dim=-1).flatten(1)[:out_features, :in_features] - 8
    return raw[:out_features, :in_features] - 128


def scale_of(tensors, module):
    """The scale of a layer's weight on disk; bitsandbytes stores 127 times as much."""
    if f"{module}.SCB" in tensors:
        return (tensors[f"{module}.SCB"].double() / 127).float().unsqueeze(1)
    return tensors[f"{module}.weight_scale"]


# What smoothing changes is in test_smoothing_is_what_smoothing_alone_writes.
MEASURED = [name for name in recipe_names() if "e5m2" not in name and "smoothquant" not in name]


@pytest.mark.parametrize("recipe", MEASURED)
def test_the_report_is_what_can_be_measured_on_disk(compressed, model_folder, recipe):
    folder, source = compressed(recipe), models.read_tensors(model_folder("llama"))
    tensors, report = models.read_tensors(folder), json.loads((folder / "quantkit_report.json").read_text())
    stored, weights = 0, 0
    assert len(report["layers"]) == LINEARS
    for layer in report["layers"]:
        name = layer["module"]
        exact = source[f"{name}.weight"].double()
        lost = decoded(codes_of(tensors, name), scale_of(tensors, name)).double() - exact
        nbytes = sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith(f"{name}."))
        assert layer["shape"] == list(exact.shape)
        assert layer["bits_per_weight"] == 8 * nbytes / exact.numel()
        # Float32 sums of n squares, in any order, are right to n * 2**-24; the root halves that, the quotient adds two.
        bound = exact.numel() * 2**-24
        assert layer["weight_error"] == pytest.approx(float(lost.norm() / exact.norm()), rel=bound)
        stored, weights = stored + nbytes, weights + exact.numel()
    assert report["bits_per_weight"] == pytest.approx(8 * stored / weights, rel=1e-12)
    assert report["bytes_before"] == sum(tensor.nbytes for tensor in source.values())
    assert report["bytes_after"] == sum(tensor.nbytes for tensor in tensors.values())
    assert report["verified"] == {"tensors": len(tensors), "quantized": LINEARS, "left": 1}
    assert report["seconds"] > 0
    assert report["peak_memory_bytes"] > 10**7


FOLDED = ("input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj")


@pytest.mark.parametrize("recipe", ["smoothquant-w8a8", "smoothquant-auto-w8a8"])
def test_smoothing_is_what_smoothing_alone_writes(tmp_path, calibration, recipe):
    """Of one block, which no compressed block comes before: smoothed to a float checkpoint and then quantized it is bit
    for bit what both steps make of it at once."""
    folder = models.save(models.llama_model(num_hidden_layers=1), tmp_path / "model")
    smooth, quantizer = load_recipe(recipe).steps
    both = quantize(folder, tmp_path / "both", recipe=recipe, progress=False, **calibration)
    alone = quantize(folder, tmp_path / "alone", steps=[smooth], progress=False, **calibration)
    after = quantize(tmp_path / "alone", tmp_path / "after", steps=[quantizer], progress=False)
    assert weights_of(tmp_path / "both") == weights_of(tmp_path / "after")
    assert both.layers == after.layers
    assert both.groups == alone.groups
    folded = {group.producer for group in both.groups if group.state == "folded"}
    assert folded == {f"{name}.weight" for name in FOLDED}
    assert alone.bytes_after == alone.bytes_before
    assert not alone.layers
    assert "quantization_config" not in read_config(tmp_path / "alone")
    changed = models.read_tensors(tmp_path / "alone")
    weights = models.read_tensors(folder)
    same = {key for key, tensor in weights.items() if models.same(tensor, changed[key])}
    assert same == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("recipe", ["w8a8-static", "fp8-static"])
def test_static_scales_are_the_largest_magnitudes_that_meet_a_layer(model_folder, tmp_path, recipe):
    """The data are as long as the windows, so that all of them are seen. What meets a block's first layers comes of the
    compressed blocks before it, which the loaded model runs as well: the same numbers but for float32 sums in another
    order, some 1e-6 of them. Behind them in the block the calibration has float layers and the loaded model has not:
    8 bits round each with half a percent."""
    text = "".join(chr(97 + number * number % 26) for number in range(256))
    (tmp_path / "text.txt").write_text(text)
    out = tmp_path / "out"
    data = {"dataset": str(tmp_path / "text.txt"), "samples": 8, "seq_len": 32}
    quantize(model_folder("llama"), out, recipe=recipe, progress=False, **data)
    model, largest = load(out), {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: largest.__setitem__(name, float(args[0].abs().max()))
            )
    with torch.no_grad():
        model(torch.tensor(models.tokenizer()(text)["input_ids"]).view(8, 32))
    assert len(largest) == LINEARS
    limit = 127 if recipe == "w8a8-static" else 448
    for name, seen in largest.items():
        scale = float(model.get_submodule(name).get_buffer("input_scale"))
        first = name.endswith(("q_proj", "k_proj", "v_proj"))
        assert scale * limit == pytest.approx(seen, rel=1e-5 if first else 0.05), name


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("recipe", ["w8a8", "int8-g128", "fp8", "fp8-e5m2"])
def test_codes_are_the_nearest_to_the_weight_in_scales_of_its_dtype(compressed, model_folder, recipe, name):
    """Int8: |weight - code * scale| <= scale / 2 * (1 + 2**-16), and a row's largest magnitude has the largest code."""
    tensors, source = models.read_tensors(compressed(recipe, name)), models.read_tensors(model_folder(name))
    scales = {key: tensor for key, tensor in tensors.items() if key.endswith("weight_scale")}
    assert len(scales) == LINEARS
    for key, scale in scales.items():
        module = key.removesuffix(".weight_scale")
        exact = source[f"{module}.weight"].double()
        assert scale.dtype == DTYPES[name]
        if "fp8" in recipe:
            continue
        codes = codes_of(tensors, module).double()
        spread = scale.double().repeat_interleave(exact.shape[1] // scale.shape[1], dim=1)
        assert bool(((exact - codes * spread).abs() <= spread / 2 * (1 + 2**-16)).all())
        assert bool((codes.reshape(*scale.shape, -1).abs().amax(-1) >= 126).all())


@pytest.mark.parametrize(
    "name",
    ["llama", "llama_bf16", "llama_unused", "llama_sharded", "llama_odd", "opt", "mixtral", "gpt2", "gpt2_untied"],
)
def test_what_is_not_quantized_is_bit_equal_to_the_source(compressed, model_folder, name):
    folder, source = compressed("w8a8", name, "compressed-tensors"), models.read_tensors(model_folder(name))
    tensors = models.read_tensors(folder)
    scaled = {key.removesuffix("_scale") for key in tensors if key.endswith("weight_scale")}
    assert len(scaled) == len(json.loads((folder / "quantkit_report.json").read_text())["layers"]) > 0
    assert set(tensors) == set(source) | {f"{key}_scale" for key in scaled}
    for key in set(source) - scaled:
        assert models.same(tensors[key], source[key]), key
    for key in scaled:
        assert (tensors[key].dtype, tensors[key].shape) == (torch.int8, source[key].shape)


def test_unused_tensors_are_copied_whatever_they_hold_and_listed(compressed, model_folder):
    report = json.loads((compressed("w8a8", "llama_unused") / "quantkit_report.json").read_text())
    assert set(report["copied_unused"]) == {"left.over", "model.layers.0.self_attn.rotary_emb.inv_freq"}


def test_a_tied_tensor_under_its_second_name_is_written_under_its_first(compressed, model_folder):
    tensors = models.read_tensors(compressed("w8a8", "llama_second_name"))
    source = models.read_tensors(model_folder("llama_second_name"))
    assert "lm_head.weight" not in tensors
    assert models.same(tensors["model.embed_tokens.weight"], source["lm_head.weight"])
    same = compressed("w8a8", "llama_tied")
    assert all(models.same(tensor, tensors[key]) for key, tensor in models.read_tensors(same).items())


def test_the_config_is_the_sources_with_what_is_quantized(compressed, model_folder):
    before, after = read_config(model_folder("llama")), read_config(compressed("w8a8"))
    stored = after.pop("quantization_config")
    assert after == before
    assert stored["ignore"] == ["lm_head"]


def test_a_config_without_dtype_gets_the_weights_own(model_folder, tmp_path):
    folder = models.copy(model_folder("llama_bf16"), tmp_path / "model")
    config = {key: value for key, value in read_config(folder).items() if key not in ("dtype", "torch_dtype")}
    (folder / "config.json").write_text(json.dumps(config))
    quantize(folder, tmp_path / "out", steps=["w8a8"], progress=False)
    assert read_config(tmp_path / "out")["dtype"] == "bfloat16"


def test_the_other_files_are_copied_and_the_card_is_new(model_folder, tmp_path):
    folder = models.copy(model_folder("llama_sharded"), tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "quantkit_report.json").write_text("old")
    (folder / ".hidden").write_text("x")
    (folder / "modeling_own.py").write_text("x")
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("x")
    quantize(folder, tmp_path / "out", steps=["w8a8"], progress=False)
    copied = {"LICENSE", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    for name in {*copied, "modeling_own.py"}:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    own = {"config.json", "README.md", "quantkit_recipe.json", "quantkit_report.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*copied, "modeling_own.py", *own}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert "The source's own card" not in card
    assert not (tmp_path / "out.partial").exists()


def test_the_same_work_gives_the_same_bytes(compressed, model_folder, tmp_path):
    quantize(model_folder("llama"), tmp_path / "out", recipe="w8a8", progress=False)
    first = compressed("w8a8")
    for path in first.iterdir():
        if path.name != "quantkit_report.json":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_bf16", "opt", "mixtral"])
def test_a_model_in_memory_gives_the_same_bytes_and_is_not_changed(compressed, model_folder, tmp_path, name):
    model = AutoModelForCausalLM.from_pretrained(model_folder(name), dtype="auto").train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    report = quantize(model, tmp_path / "out", steps=["w8a8"], tokenizer=models.tokenizer(), progress=False)
    assert weights_of(tmp_path / "out") == weights_of(compressed("w8a8", name))
    stored = [read_config(f)["quantization_config"] for f in (tmp_path / "out", compressed("w8a8", name))]
    assert stored[0] == stored[1]
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert report.bytes_before == sum(tensor.nbytes for tensor in models.read_tensors(model_folder(name)).values())
    assert model.training
    assert classes == [type(module) for module in model.modules()]
    assert "quantization_config" not in model.config.to_dict()
    assert all(models.same(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_model_in_memory_whose_tensors_share_memory(tmp_path):
    model = models.llama_model()
    attention = model.model.layers[0].self_attn
    fused = torch.randn(256, 128)
    attention.q_proj.weight.data, attention.k_proj.weight.data = fused[:128], fused[128:192]
    model.model.layers[0].input_layernorm.weight.data = fused[0]
    quantize(model, tmp_path / "out", steps=["w8a8"], ignore=["*.q_proj"], progress=False)
    tensors = models.read_tensors(tmp_path / "out")
    assert models.same(tensors["model.layers.0.self_attn.q_proj.weight"], fused[:128])
    assert models.same(tensors["model.layers.0.input_layernorm.weight"], fused[0])


def test_the_stored_recipe_does_the_same_again(cli, model_folder, tmp_path):
    words = ["-m", "fp8:dtype=e4m3,weight_range=mse", "--ignore", "*.down_proj", "--include", "re:.*mlp", "--seed", 3]
    one = cli("quantize", model_folder("llama"), "-o", tmp_path / "one", *words)
    assert one.exit_code == 0, one.stderr
    recipe = tmp_path / "one" / "quantkit_recipe.json"
    two = cli("quantize", model_folder("llama"), "-o", tmp_path / "two", "--recipe", recipe)
    assert two.exit_code == 0, two.stderr
    for name in ("model.safetensors", "config.json", "quantkit_recipe.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_patterns_and_seed_are_added_to_a_recipe(model_folder, tmp_path):
    report = quantize(
        model_folder("llama"), tmp_path / "out", recipe="w8a8", ignore=["*.mlp.*"], seed=5, progress=False
    )
    assert (report.recipe["ignore"], report.recipe["seed"], len(report.layers)) == (["*.mlp.*"], 5, 8)


@pytest.mark.parametrize("size", ["300KB", 100_000])
def test_shards_are_no_larger_than_asked(model_folder, compressed, tmp_path, size):
    quantize(model_folder("llama"), tmp_path / "out", steps=["w8a8"], max_shard_size=size, progress=False)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    for path in files:
        held = [info.nbytes for info in ShardReader(tmp_path / "out").tensors.values() if info.path == path]
        assert sum(held) <= parse_size(size) or len(held) == 1
    once, again = models.read_tensors(compressed("w8a8")), models.read_tensors(tmp_path / "out")
    assert set(once) == set(again)
    assert all(models.same(tensor, again[key]) for key, tensor in once.items())


def test_no_more_than_one_block_is_alive(tmp_path, monkeypatch):
    """What is read and what is handed to the writer is followed by its storage: at each read and each write, what lives
    is less than one block in float beside itself in int8."""
    folder = models.save(models.llama_model(num_hidden_layers=6), tmp_path / "model")
    sizes = {name: info.nbytes for name, info in ShardReader(folder).tensors.items()}
    block = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    alive, peaks = {}, []

    def follow(tensor):
        storage = tensor.untyped_storage()
        alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        for key, (reference, _) in list(alive.items()):
            if reference.expired():
                del alive[key]
        peaks.append(sum(size for _, size in alive.values()))

    read, add = ShardReader.get, shards.ShardWriter.add

    def get(self, name):
        tensor = read(self, name)
        follow(tensor)
        return tensor

    def added(self, tensors):
        for tensor in tensors.values():
            follow(tensor)
        add(self, tensors)

    monkeypatch.setattr(ShardReader, "get", get)
    monkeypatch.setattr(shards.ShardWriter, "add", added)
    monkeypatch.setattr(shards, "SMALLEST_SHARD", 1)
    quantize(folder, tmp_path / "out", steps=["w8a8"], progress=False)
    assert len(peaks) > 2 * len(sizes)
    assert max(peaks) < 1.3 * block < sum(sizes.values()) / 4


def test_progress_is_on_stderr_alone_and_can_be_turned_off(model_folder, tmp_path, capsys):
    quantize(model_folder("llama"), tmp_path / "one", steps=["w8a8"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "quantizing" in captured.err
    assert "verifying" in captured.err
    quantize(model_folder("llama"), tmp_path / "two", steps=["w8a8"], progress=False)
    assert capsys.readouterr().err == ""


def test_an_empty_folder_is_written_to_and_parents_are_made(model_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    quantize(model_folder("llama"), tmp_path / "empty", steps=["w8a8"], progress=False)
    quantize(model_folder("llama"), tmp_path / "a" / "b", steps=["w8a8"], progress=False)
    assert (tmp_path / "empty" / "config.json").is_file()
    assert (tmp_path / "a" / "b" / "config.json").is_file()


def test_the_working_folder_is_no_output(model_folder, tmp_path, monkeypatch):
    """A rename would leave the shell in a folder that is gone."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="the folder that you are in"):
        quantize(model_folder("llama"), ".", steps=["w8a8"], progress=False)


def test_a_mount_point_is_no_output(model_folder, tmp_path, monkeypatch):
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "mount")
    with pytest.raises(CheckpointError, match="a mount point"):
        quantize(model_folder("llama"), tmp_path / "mount", steps=["w8a8"], progress=False)


def test_what_lies_outside_of_the_blocks_does_not_pile_up(tmp_path, monkeypatch):
    """Many tensors that the model doesn't use: the writer holds one smallest shard of them and one tensor more."""
    folder = models.save(models.llama_model(), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights |= {f"extra.{number}": torch.full((1000,), float(number)) for number in range(50)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    waiting = []
    add = shards.ShardWriter.add

    def added(self, tensors):
        add(self, tensors)
        if any(name.startswith("extra.") for name in tensors):
            waiting.append(self._waiting_bytes)

    monkeypatch.setattr(shards.ShardWriter, "add", added)
    monkeypatch.setattr(shards, "SMALLEST_SHARD", 10_000)
    report = quantize(folder, tmp_path / "out", steps=["w8a8"], progress=False)
    assert len(report.copied_unused) == len(waiting) == 50
    assert max(waiting) < 10_000 + 4_000


@pytest.mark.parametrize(("made", "given"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_a_model_in_memory_is_stored_with_the_dtype_that_it_has(tmp_path, made, given):
    model = models.llama_model().to(made)
    model.config.dtype = getattr(torch, given)
    quantize(model, tmp_path / "out", steps=["int8"], progress=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(made).removeprefix("torch.")


@pytest.mark.parametrize("step", ["w8a8", "int8", "fp8:dtype=e5m2"])
def test_a_layer_whose_weight_other_code_reads_stays_in_float(tmp_path, step):
    """Mamba multiplies by `dt_proj.weight` without calling the layer."""
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    report = quantize(tmp_path / "model", tmp_path / "out", steps=[step], progress=False)
    reasons = {item.module: item.reason for item in report.left_alone}
    assert "other code reads" in reasons["backbone.layers.0.mixer.dt_proj"]
    assert {layer.module.rpartition(".")[2] for layer in report.layers} == {"in_proj", "x_proj", "out_proj"}
    with torch.inference_mode():
        assert bool(torch.isfinite(load(tmp_path / "out")(torch.arange(8)[None]).logits).all())


def test_an_evaluation_that_fails_says_that_the_checkpoint_is_safe(model_folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise QuantkitError("no luck")

    monkeypatch.setattr("quantkit.evaluation.evaluate", fail)
    (tmp_path / "text.txt").write_text("words and words " * 50)
    with pytest.raises(QuantkitError, match=r"out is written and verified, but its evaluation failed: no luck"):
        quantize(
            model_folder("llama"),
            tmp_path / "out",
            steps=["w8a8"],
            eval_dataset=str(tmp_path / "text.txt"),
            seq_len=32,
            progress=False,
        )
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("5 GB", 5 * 10**9),
        ("512MB", 512 * 10**6),
        ("2GiB", 2**31),
        ("1.5kb", 1500),
        ("7", 7),
        (7, 7),
        ("7B", 7),
    ],
)
def test_sizes(size, expected):
    assert parse_size(size) == expected
