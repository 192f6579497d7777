"""One stage on disk: what stays float byte for byte, what calibration changed, and what is quantized."""

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quantkit import formats
from quantkit.checkpoint import Hub, open_folder
from quantkit.compression import Worked, compress_stage
from quantkit.errors import CheckpointError
from quantkit.modules import quantize_linear
from quantkit.planning import make_plan
from quantkit.recipe import Recipe
from quantkit.shards import ShardWriter

NORM, UP = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj"
STATIC = "w8a8:activation=tensor-static"


class Written:
    """A plan, and what `compress_stage` wrote of its stages."""

    def __init__(self, source, folder, *steps, stages=None, worked=None, **patterns):
        self.source, self.plan = source, make_plan(source, Recipe.of(steps or ["w8a8"], **patterns))
        self.kept, self.reports = {}, []
        folder.mkdir()
        writer = ShardWriter(folder, 10**9)
        for stage in self.plan.stages:
            if stages is None or stage.name in stages:
                device = torch.device("cpu")
                self.reports += compress_stage(stage, self.plan, source, writer, device, worked, self.kept)
        writer.finish()
        self.tensors = models.read_tensors(folder)


@pytest.mark.parametrize("name", ["llama_bf16", "llama_fp16", "llama_unused", "mixtral", "opt", "llama_odd"])
def test_what_stays_float_is_written_byte_for_byte(model_folder, tmp_path, name):
    source = open_folder(model_folder(name), Hub())
    written = Written(source, tmp_path / "out", ignore=["*.1.*"])
    float_keys = set(source.weights.tensors) - set(written.plan.targets)
    assert len(float_keys) > 10
    for key in float_keys:
        assert models.same(written.tensors[key], source.weights.get(key)), key


def test_a_stage_is_just_its_keys(model_folder, tmp_path):
    source = open_folder(model_folder("llama"), Hub())
    written = Written(source, tmp_path / "out", stages=["model.layers.1"])
    assert {name.rpartition(".")[0] for name in written.tensors} == {
        key.rpartition(".")[0] for key in source.weights.tensors if ".layers.1." in key
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_changed_is_stored_in_the_dtype_that_it_had(model_folder, tmp_path, dtype):
    """A gain is rounded once; a weight is quantized from float32, with scales in the stored dtype."""
    name = {torch.bfloat16: "llama_bf16", torch.float16: "llama_fp16"}[dtype]
    source = open_folder(model_folder(name), Hub())
    generator = torch.Generator().manual_seed(0)
    changed = {NORM: torch.randn(128, generator=generator), f"{UP}.weight": torch.randn(256, 128, generator=generator)}
    written = Written(source, tmp_path / "out", worked=Worked(changed)).tensors
    assert models.same(written[NORM], changed[NORM].to(dtype))
    codes, scale = quantize_linear(changed[f"{UP}.weight"], Recipe.of(["w8a8"]).scheme, dtype)
    assert scale.dtype == dtype
    assert models.same(written[f"{UP}.weight"], codes)
    assert models.same(written[f"{UP}.weight_scale"], scale)
    assert not models.same(codes, quantize_linear(changed[f"{UP}.weight"].to(dtype), Recipe.of(["w8a8"]).scheme)[0])
    other = "model.layers.0.input_layernorm.weight"
    assert models.same(written[other], source.weights.get(other))


def test_changed_experts_are_written_under_the_checkpoints_names(tiny_source, tmp_path):
    """Mixtral: gate and up of each expert are a key each; every one is quantized from the changed parameter."""
    source = tiny_source("mixtral")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    value = torch.randn(4, 256, 64, generator=torch.Generator().manual_seed(0))
    written = Written(source, tmp_path / "out", stages=["model.layers.0"], worked=Worked({name: value}))
    stem = "model.layers.0.block_sparse_moe.experts"
    for expert, (gate, up) in enumerate(zip(value[:, :128], value[:, 128:], strict=True)):
        for leaf, part in (("w1", gate), ("w3", up)):
            codes, scale = quantize_linear(part, Recipe.of(["w8a8"]).scheme)
            assert models.same(written.tensors[f"{stem}.{expert}.{leaf}.weight"], codes)
            assert models.same(written.tensors[f"{stem}.{expert}.{leaf}.weight_scale"], scale)


def test_a_part_of_a_tensor_is_written_with_its_partners(tiny_source, tmp_path):
    """HRM: v is a quarter of a tensor; what was changed comes with the three others, changed or not."""
    source = tiny_source("hrm_text")
    block = "model.L_module.layers.0"
    key = f"{block}.attn.gqkv_proj.weight"
    plan = make_plan(source, Recipe.of(["w8a8"]))
    parts = plan.names.parameters([key], source.weights.get)
    changed = {name: 2 * value if "v_proj" in name else value for name, value in parts.items()}
    written = Written(source, tmp_path / "out", stages=[block], worked=Worked(changed)).tensors
    whole = source.weights.get(key).clone()
    rows = next(
        i for i in range(0, 256, 64) if torch.equal(whole[i : i + 64], parts[f"{block}.self_attn.v_proj.weight"])
    )
    whole[rows : rows + 64] *= 2
    codes, scale = quantize_linear(whole, Recipe.of(["w8a8"]).scheme)
    assert models.same(written[key], codes)
    assert models.same(written[f"{key}_scale"], scale)


class TestStaticScales:
    def test_are_stored_beside_the_weight_in_its_dtype(self, model_folder, tmp_path):
        source = open_folder(model_folder("llama_bf16"), Hub())
        linears = [name for name, m in source.skeleton.named_modules() if isinstance(m, nn.Linear) and "layers" in name]
        scales = {f"{name}.weight": torch.tensor([0.01 * (i + 1)]) for i, name in enumerate(linears)}
        written = Written(source, tmp_path / "out", STATIC, worked=Worked(input_scales=scales)).tensors
        for name in linears:
            assert models.same(written[f"{name}.input_scale"], scales[f"{name}.weight"].bfloat16())

    def test_parts_of_one_tensor_share_the_largest(self, tiny_source, tmp_path):
        source = tiny_source("hrm_text")
        block = "model.L_module.layers.0"
        plan = make_plan(source, Recipe.of([STATIC]))
        mine = [layer.parameter for layer in plan.quantized if layer.parameter.startswith(f"{block}.")]
        scales = {name: torch.tensor([float(number + 1)]) for number, name in enumerate(mine)}
        written = Written(source, tmp_path / "out", STATIC, stages=[block], worked=Worked(input_scales=scales))
        for key, target in written.plan.targets.items():
            if key.startswith(f"{block}."):
                expected = max(float(scales[name]) for name in target.parameters)
                assert written.tensors[key.replace(".weight", ".input_scale")].tolist() == [expected]
        assert len(written.plan.targets[f"{block}.attn.gqkv_proj.weight"].parameters) == 4


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_oss", "mixtral", "hrm_text"])
def test_a_report_tells_what_was_stored_and_what_was_lost(tiny_source, tmp_path, model_type):
    """One a linear layer as it lies on disk, experts by their numbers; the error against the source in float64."""
    source = tiny_source(model_type)
    written = Written(source, tmp_path / "out", "int8")
    reports = {report.module: report for report in written.reports}
    layout, scheme = written.plan.layout, Recipe.of(["int8"]).scheme
    count = 0
    for key, target in written.plan.targets.items():
        whole = source.weights.get(key)
        for prefix, part in zip(target.prefixes, whole.unbind(0) if target.experts else [whole], strict=True):
            exact = (part.t() if target.transposed else part).double()
            own = {name.removeprefix(prefix): v for name, v in written.tensors.items() if name.startswith(prefix)}
            own.pop("bias", None)
            report = reports[prefix[:-1] if target.of_experts else ", ".join(target.modules)]
            assert report.shape == tuple(exact.shape) == (target.out_features, target.in_features)
            assert report.bits_per_weight == 8 * sum(value.nbytes for value in own.values()) / exact.numel()
            codes, scale = quantize_linear(exact.float(), scheme)
            lost = (codes.double() * scale.double()).float().double() - exact
            assert report.weight_error == pytest.approx(float(lost.norm() / exact.norm()), rel=exact.numel() * 2**-24)
            if not target.experts:
                found = layout.decompress(scheme, own, target.in_features, target.transposed)
                assert models.same(found[0].contiguous(), codes)
            count += 1
    assert count == len(reports) == len(written.reports)


def test_experts_that_lie_together_are_written_one_by_one_in_their_own_layout(tiny_source, tmp_path):
    """gpt-oss holds them in x out: codes [K, N], scales [1, N]."""
    source = tiny_source("gpt_oss")
    written = Written(source, tmp_path / "out", stages=["model.layers.1"])
    assert written.plan.layout is formats.native
    key = "model.layers.1.mlp.experts.down_proj"
    for expert, weight in enumerate(source.weights.get(key)):
        codes, scale = quantize_linear(weight.t(), Recipe.of(["w8a8"]).scheme)
        words = written.tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"]
        assert models.same(words.view(torch.int8), codes.t().contiguous())
        assert models.same(written.tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.weight_scale"], scale.t())
    assert key not in written.tensors


def test_kept_are_the_tensors_of_layers_that_one_key_makes(tiny_source, tmp_path):
    written = Written(tiny_source("mixtral"), tmp_path / "mixtral")
    assert set(written.kept) == {f"model.layers.{i}.self_attn.{leaf}_proj" for i in (0, 1) for leaf in "qkvo"}
    for name, tensors in written.kept.items():
        assert set(tensors) == {"weight", "weight_scale"}
        assert all(models.same(value, written.tensors[f"{name}.{leaf}"]) for leaf, value in tensors.items())
    written = Written(tiny_source("hrm_text"), tmp_path / "hrm")
    assert {name.rpartition(".")[2] for name in written.kept} == {"o_proj", "down_proj"}


class TestDamage:
    @pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
    @pytest.mark.parametrize("key", [NORM, f"{UP}.weight"])
    def test_numbers_that_are_none_are_refused(self, model_folder, tmp_path, key, value, word):
        folder = models.copy(model_folder("llama_bf16"), tmp_path / "model")
        weights = load_file(folder / "model.safetensors")
        weights[key].view(-1)[5] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"tensor '{key}' in .*model.safetensors holds {word}"):
            Written(open_folder(folder, Hub()), tmp_path / "out")

    def test_large_numbers_are_none(self, model_folder, tmp_path):
        """Their sum is beyond float32, each of them isn't."""
        folder = models.copy(model_folder("llama_bf16"), tmp_path / "model")
        weights = load_file(folder / "model.safetensors")
        weights[NORM].fill_(3e38)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        written = Written(open_folder(folder, Hub()), tmp_path / "out")
        assert models.same(written.tensors[NORM], weights[NORM])

    def test_what_calibration_made_is_looked_at_too(self, model_folder, tmp_path):
        source = open_folder(model_folder("llama"), Hub())
        with pytest.raises(CheckpointError, match=f"'{NORM}'"):
            Written(source, tmp_path / "out", worked=Worked({NORM: torch.full((128,), float("nan"))}))
