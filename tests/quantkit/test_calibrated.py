"""Calibration block by block: what every block is fed with, what is observed there, and what comes of it."""

import copy
import json
from dataclasses import dataclass, field

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import inputs
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import calibrated, footprint, observation
from quantkit.checkpoint import Hub, open_folder
from quantkit.compression import compress_stage
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.experts import QuantizedExperts
from quantkit.exploration import explore
from quantkit.linears import linear_modules
from quantkit.modules import QuantizedLinear
from quantkit.pipeline import prepare
from quantkit.smoothing import Smoother

STATIC = "w8a8:activation=tensor-static"
BOTH = ["smoothquant", "w8a8"]
UNLIKE = ["llama", "gpt2", "opt", "falcon", "phi3", "gemma2", "mixtral", "deepseek_v3", "gpt_oss", "llama4_text"]
UNLIKE += ["jamba", "mamba", "qwen3_next", "hrm_text"]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """20,000 random letters and blanks: bytes are tokens."""
    codes = torch.randint(97, 124, (20_000,), generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(chr(code) for code in codes).replace("{", " "), encoding="utf-8")
    return path


def cloned(value):
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, value)


def tensors_of(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@dataclass
class Run:
    """A compression that was looked at: its batches, each block's arguments by batch, what calibration made of it."""

    report: quantkit.Report | None = None
    batches: list = field(default_factory=list)
    visits: dict[int, list] = field(default_factory=dict)
    worked: dict[str, object] = field(default_factory=dict)
    model: object = None
    plan: object = None


@pytest.fixture
def run(monkeypatch, text, tmp_path):
    """Compresses a folder, and keeps what each block was given in its first visit; `after` is called after each."""

    def compress(folder, *steps, samples=8, after=lambda model, block, calls: None, name="out", **more):
        made = Run()
        run_blocks = kept_run_blocks

        def watched(model, blocks, batches, visit, **options):
            made.batches, made.model = batches, model

            def visited(position, calls):
                if not calls.number:
                    made.visits[position] = [cloned((call.args, dict(call.kwargs))) for call in calls]
                found = visit(position, calls)
                after(model, blocks[position], calls)
                return found

            return run_blocks(model, blocks, batches, visited, **options)

        def stage(stage, plan, source, writer, device, worked=None, kept=None, **more):
            made.worked[stage.name], made.plan = copy.deepcopy(worked), plan
            return compress_stage(stage, plan, source, writer, device, worked, kept, **more)

        monkeypatch.setattr(calibrated, "run_blocks", watched)
        monkeypatch.setattr(calibrated, "compress_stage", stage)
        options = {"dataset": str(text), "samples": samples, "seq_len": 16, "progress": False} | more
        made.report = quantkit.quantize(folder, tmp_path / name, steps=steps, **options)
        return made

    kept_run_blocks = calibrated.run_blocks
    return compress


def bfloat16(folder, target):
    """A copy of a tiny model in bfloat16."""
    models.copy(folder, target)
    weights = load_file(target / "model.safetensors")
    weights = {key: value.bfloat16() if value.is_floating_point() else value for key, value in weights.items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return models.change_config(target, dtype="bfloat16")


def arguments_of_blocks(model, name, batches):
    """What a loaded model calls its blocks with, by block and batch (the first time that it does)."""
    seen, now = {}, [0]
    for number, block in enumerate(model.get_submodule(name)):

        def note(_, args, kwargs, number=number):
            seen.setdefault((number, now[0]), cloned((args, dict(kwargs))))

        block.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        for now[0], arguments in enumerate(batches):
            model(**arguments)
    return seen


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TestWhatBlocksAreFedWith:
    @pytest.mark.parametrize(
        ("model_type", "dtype", "steps"),
        [
            ("gpt2", "bfloat16", BOTH),
            ("opt", "bfloat16", BOTH),
            ("gemma2", "float32", BOTH),
            ("mixtral", "bfloat16", BOTH),
            ("gpt_oss", "bfloat16", BOTH),
            ("jamba", "bfloat16", BOTH),
            ("hrm_text", "float32", BOTH),
            ("phi3", "float32", ["smoothquant:alpha=auto", STATIC]),
            ("qwen3_next", "float32", ["smoothquant", "fp8:scheme=static"]),
            ("deepseek_v3", "bfloat16", ["smoothquant"]),
        ],
    )
    def test_is_what_the_finished_checkpoint_feeds_them_with(
        self, one_thread, run, tiny_folder, tmp_path, monkeypatch, model_type, dtype, steps
    ):
        """Every tensor bit for bit, masks and positions of each layer's own kind included; here in several batches.

        So everything that was folded, rounded and quantized is in what the next block is calibrated on. On one thread:
        how MKL shares a product out among several depends on where its operands lie, and so do the last bits.
        """
        monkeypatch.setitem(footprint.BATCH_TOKENS, "cpu", 64)
        folder = tiny_folder(model_type)
        if dtype == "bfloat16":
            folder = bfloat16(folder, tmp_path / "bfloat16")
        made = run(folder, *steps)
        assert len(made.batches) > 1
        model = quantkit.load(tmp_path / "out", dtype="float32")
        name = explore(open_folder(folder, Hub()).skeleton, groups=False).blocks
        seen = arguments_of_blocks(model, name, made.batches)
        assert len(made.visits) == len(model.get_submodule(name))
        for number, calls in made.visits.items():
            for batch, arguments in enumerate(calls):
                given, expected = tensors_of(arguments), tensors_of(seen[number, batch])
                assert len(given) == len(expected) > 0
                assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True)), number

    def test_layers_of_two_kinds_get_their_own_masks(self, run, tiny_folder):
        """Gemma 2 alternates: 16 tokens are more than its window of 8."""
        made = run(tiny_folder("gemma2"), *BOTH)
        masks = [made.visits[number][0][1]["attention_mask"] for number in (0, 1)]
        assert (masks[0] is None) != (masks[1] is None) or not torch.equal(*masks)

    def test_a_block_that_no_text_reaches_is_written_and_told(self, run, tiny_folder, tmp_path):
        made = run(tiny_folder("mllama"), *BOTH)
        (note,) = [note for note in made.report.notes if "is not calibrated" in note]
        idle = note.split(" does not run")[0]
        assert note == f"{idle} does not run when the model reads text, and is not calibrated"
        assert [layer.module for layer in made.report.layers if layer.module.startswith(f"{idle}.")]
        assert not [group for group in made.report.groups if group.block == idle]


def linear_inputs(model, name, calls):
    """What meets each linear layer of a block of a float model, by the layer's full name: rows [n, K]."""
    block, seen, handles = model.get_submodule(name), {}, []
    for path, module, *_ in linear_modules(block):
        keep = seen.setdefault(f"{name}.{path}", [])
        handles.append(module.register_forward_pre_hook(lambda _, args, keep=keep: keep.append(args[0].flatten(0, -2))))
    with torch.no_grad():
        for args, kwargs in calls:
            block(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(parts) for path, parts in seen.items() if parts}


class TestStaticScales:
    @pytest.mark.parametrize("steps", [[STATIC], ["smoothquant", STATIC], ["smoothquant", "fp8:scheme=static"]])
    @pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon", "mixtral"])
    def test_are_the_largest_magnitude_over_the_largest_code(self, run, tiny_folder, tmp_path, model_type, steps):
        """Recomputed with hooks: the float block, folded as it was, on what the compressed blocks before it gave."""
        made = run(tiny_folder(model_type), *steps)
        tensors = models.read_tensors(tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(tiny_folder(model_type), dtype=torch.float32).eval()
        checked = 0
        for number, calls in made.visits.items():
            name = next(each for each in made.worked if each.endswith(f".{number}"))
            for path, value in made.worked[name].changed.items():
                model.get_parameter(path).data = value
            found = linear_inputs(model, name, calls)
            for module, rows in found.items():
                if f"{module}.input_scale" not in tensors:
                    continue
                expected = float(rows.abs().max()) / (448 if "fp8" in steps[-1] else 127)
                assert tensors[f"{module}.input_scale"].tolist() == [torch.tensor(expected).item()], module
                checked += 1
        assert checked == sum(name.endswith("input_scale") for name in tensors) >= 8

    def test_layers_of_one_tensor_store_one_for_all(self, run, tiny_folder, tmp_path):
        """HRM's q, k, v and gate are split from one float32 tensor, and see the same activations."""
        made = run(tiny_folder("hrm_text"), STATIC)
        tensors, block = models.read_tensors(tmp_path / "out"), "model.L_module.layers.0"
        scales = made.worked[block].input_scales
        shared = [float(scales[f"{block}.self_attn.{leaf}_proj.weight"]) for leaf in ("q", "k", "v", "gate")]
        assert len(set(shared)) == 1
        assert tensors[f"{block}.attn.gqkv_proj.input_scale"].tolist() == shared[:1]
        assert float(scales[f"{block}.self_attn.o_proj.weight"]) != shared[0]

    @pytest.mark.parametrize("step", ["w8a8:activation=tensor-static", "fp8:scheme=static"])
    def test_other_ranges_clip(self, run, tiny_folder, tmp_path, step):
        """Of the first block, which all ranges see alike: no more than absmax, and somewhere less."""
        scales = {}
        for kind in ("absmax", "percentile", "mse"):
            whole = f"{step},activation_range={kind}"
            scales[kind] = run(tiny_folder("llama"), whole, name=kind).worked["model.layers.0"].input_scales
        for kind in ("percentile", "mse"):
            ratios = [float(scales[kind][name] / scales["absmax"][name]) for name in scales["absmax"]]
            assert max(ratios) <= 1
            # FP8 loses little of small numbers, so that its range of least error may well be all of it.
            assert min(ratios) < 1 or (kind, step[:3]) == ("mse", "fp8")

    def test_a_layer_that_met_nothing_is_an_error_with_a_remedy(self, run, tiny_folder, tmp_path, monkeypatch):
        monkeypatch.setattr(
            observation.Watch, "__torch_dispatch__", lambda self, f, t, a=(), k=None: f(*a, **(k or {}))
        )
        with pytest.raises(QuantkitError, match=r"model.layers.0.self_attn.q_proj met no calibration token.*--ignore"):
            run(tiny_folder("llama"), STATIC)
        assert not (tmp_path / "out").exists()


class TestExperts:
    def sent(self, folder, calls):
        """How many tokens Mixtral's first router sends to each expert."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        block, counts = model.model.layers[0], torch.zeros(4, dtype=torch.int64)

        def count(module, args, kwargs):
            counts.add_(torch.bincount((list(args) + list(kwargs.values()))[1].flatten(), minlength=4))

        block.mlp.experts.register_forward_pre_hook(count, with_kwargs=True)
        with torch.no_grad():
            for args, kwargs in calls:
                block(*args, **kwargs)
        return counts.tolist()

    def observed(self, monkeypatch):
        seen = {}
        fold_all = Smoother.fold_all

        def note(self, groups, inputs):
            seen[self.name] = inputs
            return fold_all(self, groups, inputs)

        monkeypatch.setattr(Smoother, "fold_all", note)
        return seen

    def test_those_that_few_tokens_reach_are_told_and_shown_all_of_the_first_batch(self, run, tiny_folder, monkeypatch):
        seen = self.observed(monkeypatch)
        made = run(tiny_folder("mixtral"), *BOTH, samples=3, seq_len=32)
        sent = self.sent(tiny_folder("mixtral"), made.visits[0])
        assert sum(sent) == 2 * 3 * 32
        rare = [expert for expert, count in enumerate(sent) if count < 32]
        assert 0 < len(rare) < 4
        tokens = seen["model.layers.0"].tokens
        for leaf in ("gate_up_proj", "down_proj"):
            for expert in rare:
                assert tokens[f"mlp.experts.{leaf}", expert] >= sent[expert] + 32
        note = (
            f"experts {', '.join(map(str, rare))} of model.layers.0 were sent fewer than 32 calibration tokens, "
            "and are calibrated with all tokens of the first windows"
        )
        assert note in made.report.notes

    def test_where_all_are_reached_nothing_is_forced(self, run, tiny_folder, monkeypatch):
        seen = self.observed(monkeypatch)
        made = run(tiny_folder("mixtral"), *BOTH, samples=64)
        sent = self.sent(tiny_folder("mixtral"), made.visits[0])
        assert min(sent) >= 32
        tokens = seen["model.layers.0"].tokens
        assert [tokens["mlp.experts.down_proj", expert] for expert in range(4)] == sent
        assert not [note for note in made.report.notes if "layers.0 " in note]

    def test_without_a_router_that_can_be_forced_that_is_said(self, run, tiny_folder, monkeypatch):
        """Phi's router takes maxima."""
        made = run(tiny_folder("phimoe"), *BOTH, samples=1)
        assert any(note.endswith("and are calibrated with those alone") for note in made.report.notes)


class TestMemory:
    @pytest.mark.parametrize("model_type", ["llama", "mixtral", "hrm_text"])
    def test_one_blocks_float_weights_are_alive(self, run, tiny_folder, monkeypatch, model_type):
        """Every weight that is quantized is followed by its storage, as it is read and as it is folded.

        While one block's are there no other's are; once a block is done, none are: its codes have their place.
        """
        plan = prepare(tiny_folder(model_type), steps=BOTH)[0]
        names = {layer.parameter for layer in plan.quantized if layer.parameter.startswith(plan.findings.blocks)}
        alive, together, done = [], [], []

        def follow(name, value):
            if name in names and not value.is_meta:
                alive.append((name, StorageWeakRef(value.untyped_storage())))
                together.append({name.split(".layers.")[1][0] for name, storage in alive if not storage.expired()})

        def put(self, name, value):
            lazy_put(self, name, value)
            follow(name, dict(self.model.named_parameters(remove_duplicate=False)).get(name, torch.empty(0)))

        def fold(self, group, inputs):
            report = smoother_fold(self, group, inputs)
            for edit in (*group.producers, *group.consumers):
                follow(f"{self.name}.{edit.parameter}", self.block.get_parameter(edit.parameter))
            return report

        def after(model, block, calls):
            done.append({name for name, storage in alive if not storage.expired()} if not calls.last else set())

        lazy_put, smoother_fold = calibrated.LazyModel._put, Smoother.fold
        monkeypatch.setattr(calibrated.LazyModel, "_put", put)
        monkeypatch.setattr(Smoother, "fold", fold)
        made = run(tiny_folder(model_type), *BOTH, after=after)
        assert max(map(len, together)) == 1
        assert {number for numbers in together for number in numbers} == {"0", "1"}
        assert not set().union(*done)
        assert not [name for name, value in made.model.named_parameters() if not value.is_meta and value.ndim > 1]

    @pytest.mark.parametrize("model_type", ["llama", "mixtral"])
    def test_a_block_before_has_given_back_its_codes_and_norms_too(self, run, tiny_folder, model_type):
        held = []

        def after(model, block, calls):
            for other in model.model.layers:
                if other is not block:
                    held.extend(p for p in other.parameters() if not p.is_meta)
                    held.extend(m for m in other.modules() if isinstance(m, QuantizedLinear | QuantizedExperts))

        made = run(tiny_folder(model_type), *BOTH, after=after)
        assert len(made.visits) == 2
        assert held == []


class TestLoops:
    def test_blocks_are_calibrated_in_the_first_round_and_stay_quantized(self, run, tiny_folder, tmp_path):
        """HRM goes six times through two blocks."""
        rounds = []
        made = run(tiny_folder("hrm_text"), *BOTH, after=lambda model, block, calls: rounds.append(calls.number))
        assert rounds == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
        assert sorted(made.visits) == [0, 1]
        blocks = [group.block for group in made.report.groups if group.state == "folded"]
        assert sorted(set(blocks)) == ["model.L_module.layers.0", "model.L_module.layers.1"]


class TestSeeds:
    def test_the_same_seed_gives_the_same_bytes_and_another_other_windows(self, run, tiny_folder, tmp_path):
        steps = ["smoothquant:alpha=auto", STATIC]
        one, two = (run(tiny_folder("llama"), *steps, seed=1, name=name) for name in ("one", "two"))
        other = run(tiny_folder("llama"), *steps, seed=2, name="other")
        for path in (tmp_path / "one").iterdir():
            if path.name != "quantkit_report.json":
                assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes(), path.name
        ids = [torch.cat([batch["input_ids"] for batch in made.batches]) for made in (one, two, other)]
        assert torch.equal(ids[0], ids[1])
        assert ids[0].shape == ids[2].shape == (8, 16)
        assert not torch.equal(ids[0], ids[2])
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
        assert weights[0] != weights[1]


@pytest.mark.parametrize("model_type", UNLIKE)
def test_every_linear_layer_is_reported_or_left_with_a_reason(run, tiny_folder, tmp_path, model_type):
    """And every smoothing group has a state with its reason; the result is loaded and runs."""
    folder = tiny_folder(model_type)
    made = run(folder, *BOTH)
    report, plan = made.report, made.plan
    left = {item.module: item.reason for item in report.left_alone}
    assert all(left.values())
    model = AutoModelForCausalLM.from_pretrained(folder)
    linears = {name: tuple(module.weight.shape) for name, module, *_ in linear_modules(model)}
    on_disk = {}
    for target in plan.targets.values():
        modules = [prefix[:-1] for prefix in target.prefixes] if target.of_experts else [", ".join(target.modules)]
        on_disk |= dict.fromkeys(modules, target)
    assert {layer.module for layer in report.layers} == set(on_disk)
    quantized = {module for target in plan.targets.values() for module in target.modules}
    reported = {name for layer in report.layers for name in layer.module.split(", ")}
    for name in linears:
        assert (name in reported) != (name in left), name
    for name in (name for name, value in model.named_parameters() if value.ndim == 3 and "experts" in name):
        assert (name in quantized) != (name in left or name.removesuffix(".weight") in left), name
    states = {group.state for group in report.groups}
    assert states <= {"folded", "skipped", "refused"}
    assert "folded" in states
    assert all(group.reason or group.state == "folded" for group in report.groups)
    assert all(group.error <= 1 and group.alpha == 0.5 for group in report.groups if group.state == "folded")
    with torch.no_grad():
        assert bool(quantkit.load(tmp_path / "out")(**inputs(model)).logits.isfinite().all())


class TestSmoothQuantAlone:
    @pytest.mark.parametrize(
        "model_type", ["llama", "gpt2", "opt", "gemma2", "nemotron", "mixtral", "gpt_oss", "jamba", "hrm_text"]
    )
    def test_gives_an_ordinary_checkpoint_with_the_same_logits(self, run, tiny_folder, tmp_path, model_type):
        """That transformers itself loads.

        Folds are proven block by block against 8 times what rounding makes; after a few blocks that is below 1e-5.
        """
        folder = tiny_folder(model_type)
        report = run(folder, "smoothquant").report
        assert (report.format, report.layers) == ("float", [])
        assert any(group.state == "folded" for group in report.groups)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config == json.loads((folder / "config.json").read_text())
        before, after = models.read_tensors(folder), models.read_tensors(tmp_path / "out")
        assert {key: (value.shape, value.dtype) for key, value in before.items()} == {
            key: (value.shape, value.dtype) for key, value in after.items()
        }
        assert any(not models.same(value, after[key]) for key, value in before.items())
        one, other = (AutoModelForCausalLM.from_pretrained(each).eval() for each in (folder, tmp_path / "out"))
        with torch.no_grad():
            expected, found = (model(**inputs(model)).logits for model in (one, other))
        assert float((found - expected).norm() / expected.norm()) < 1e-5

    def test_in_bfloat16_it_is_as_far_as_rounding_takes_it(self, run, model_folder, tmp_path):
        """Each folded weight is rounded once more, to 2**-9 of itself: so is each weight times 1 + 2**-9 at random."""
        run(model_folder("llama_bf16"), "smoothquant")
        one, other = (
            AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32).eval()
            for each in (model_folder("llama_bf16"), tmp_path / "out")
        )
        noisy, generator = copy.deepcopy(one), torch.Generator().manual_seed(0)
        for parameter in noisy.model.layers.parameters():
            parameter.data *= 1 + (torch.rand(parameter.shape, generator=generator) - 0.5) * 2**-7
        with torch.no_grad():
            expected, found, noise = (model(**inputs(one)).logits for model in (one, other, noisy))
        assert 0 < float((found - expected).norm()) < float((noise - expected).norm())


def test_a_model_that_skips_a_block_is_refused(run, tiny_folder, tmp_path, monkeypatch):
    """One batch calls a block fewer than the plan saw."""
    found = calibrated.run_blocks

    def skipping(model, blocks, batches, visit, **options):
        return found(model, [*blocks, torch.nn.Linear(2, 2)], batches, visit, **options)

    monkeypatch.setattr(calibrated, "run_blocks", skipping)
    options = {"dataset": str(tmp_path / "text.txt"), "samples": 2, "seq_len": 16, "progress": False}
    (tmp_path / "text.txt").write_text("words and words " * 50)
    with pytest.raises(CheckpointError, match=r"cannot be calibrated block by block: batch 0 ended after 2 calls"):
        quantkit.quantize(tiny_folder("llama"), tmp_path / "out", steps=BOTH, **options)
    assert not (tmp_path / "out").exists()


def test_an_untraced_block_is_told_and_not_smoothed(run, tiny_folder, monkeypatch):
    from quantkit import exploration

    def discover(*_, **__):
        raise RuntimeError("no luck")

    monkeypatch.setattr(exploration, "discover", discover)
    report = run(tiny_folder("llama"), *BOTH).report
    assert report.groups == []
    assert len(report.layers) == 14
    for number in (0, 1):
        assert any(
            note == f"model.layers.{number} is not smoothed: its data flow could not be traced (RuntimeError: no luck)"
            for note in report.notes
        )
