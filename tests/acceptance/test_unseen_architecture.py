"""A model that nobody has seen, with names that say nothing: every recipe must get all of it right.

What must be found is written down by hand below, from the model's code (tests/support/unseen.py).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import tiny
import torch
from papers import Rounded, agree, relative
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from unseen import DriftConfig, DriftForCausalLM, Storey

from quantkit import evaluate, load, quantize
from quantkit.discovery import Edit, Group, Structure, discover, randomize_
from quantkit.experts import QuantizedExperts
from quantkit.modules import QuantizedLinear
from quantkit.pipeline import prepare

STOREYS, EXPERTS = 2, 4
TEXT = "The quick brown fox jumps over the lazy dog, and back. " * 40
IDS = torch.randint(32, 250, (2, 16), generator=torch.Generator().manual_seed(0))
LAYERS = {"gaze.braid": (96, 48), "gaze.home": (48, 48), "tide.sluice": (80, 48), "tide.flood": (80, 48)}
LAYERS |= {"tide.ebb": (48, 80)}
OWN_EXPERTS = {"wide": (80, 48), "narrow": (48, 40)}
RECIPES: dict[str, tuple[list[str], str, str]] = {
    "smoothquant+w8a8": (["smoothquant", "w8a8"], "auto", "quantkit"),
    "w8a8": (["w8a8"], "auto", "quantkit"),
    "fp8": (["fp8"], "auto", "quantkit"),
    "int8": (["int8"], "auto", "quantkit"),
    "llm-int8": (["llm-int8"], "auto", "bitsandbytes"),
    "llm-int8 in quantkit's own format": (["llm-int8"], "quantkit", "quantkit"),
}
"""Steps, the format asked for, and the one that holds all of it."""


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """While this file's tests run, transformers' auto classes know the model."""
    AutoConfig.register("drift", DriftConfig)
    AutoModelForCausalLM.register(DriftConfig, DriftForCausalLM)
    yield
    del CONFIG_MAPPING._extra_content["drift"]
    del AutoModelForCausalLM._model_mapping._extra_content[DriftConfig]


def built(tied: bool = False) -> DriftForCausalLM:
    """A random model; one channel behind each norm is ten times as large as others."""
    model = DriftForCausalLM(DriftConfig(tie_word_embeddings=tied)).float()
    tiny.randomize(model)
    with torch.no_grad():
        for storey in model.house.storeys:
            storey.flair.weight[5], storey.poise.weight[7] = 9.0, 10.0
    return model.eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, registered: None) -> Callable[[bool], Path]:
    """The folder of the float model, its head tied to the embedding or not."""
    made: dict[bool, Path] = {}

    def folder(tied: bool) -> Path:
        if tied not in made:
            made[tied] = models.save(built(tied), tmp_path_factory.mktemp("unseen"))
        return made[tied]

    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, source: Callable[[bool], Path], text: Path
) -> Callable[[str, bool], tuple[Path, Any]]:
    """The folder that a recipe makes, and the report."""
    done: dict[tuple[str, bool], tuple[Path, Any]] = {}

    def run(name: str, tied: bool) -> tuple[Path, Any]:
        if (name, tied) not in done:
            steps, form, _ = RECIPES[name]
            data: dict[str, Any] = {"dataset": str(text), "samples": 8, "seq_len": 16} if len(steps) > 1 else {}
            folder = tmp_path_factory.mktemp("compressed") / "out"
            report = quantize(source(tied), folder, steps=steps, format=form, progress=False, **data)
            done[name, tied] = folder, report
        return done[name, tied]

    return run


# What is there


def everything(count: int) -> tuple[int, ...]:
    return tuple(range(count))


VALUES = (-1,) * 72 + everything(24)
"""Rows of q (4 heads of 12) and k (2 of 12) are left alone, those of v (2 of 12) are channels."""
HEADS = tuple(12 * (head // 2) + place for head in range(4) for place in range(12))
"""What goes home are 4 heads of 12, two of them with the values of one head."""
UPPER = (-1,) * 40 + everything(40)
GROUPS = [
    Group(
        "flair.weight",
        "norm",
        48,
        (Edit("flair.weight", 0, everything(48), -1, 1.0),),
        tuple(Edit(f"{name}.weight", 1, everything(48), 1) for name in ("gaze.braid", "tide.flood", "tide.sluice")),
    ),
    Group(
        "gaze.braid.weight",
        "linear",
        24,
        (Edit("gaze.braid.weight", 0, VALUES, -1), Edit("gaze.braid.bias", 0, VALUES, -1)),
        (Edit("gaze.home.weight", 0, HEADS, 1),),
    ),
    Group(
        "tide.flood.weight",
        "linear",
        80,
        (Edit("tide.flood.weight", 0, everything(80), -1),),
        (Edit("tide.ebb.weight", 0, everything(80), 1),),
    ),
    Group(
        "poise.weight",
        "norm",
        48,
        (Edit("poise.weight", 0, everything(48), -1), Edit("poise.bias", 0, everything(48), -1)),
        (Edit("market.taste", 1, everything(48), 1), Edit("market.wide", 2, everything(48), 1)),
    ),
    Group(
        "market.wide",
        "linear",
        40,
        (Edit("market.wide", 1, UPPER, -1),),
        (Edit("market.narrow", 1, everything(40), 1),),
    ),
]


def by_name(groups: Any) -> dict[str, Any]:
    """Groups by their producer; the order of what is divided and multiplied doesn't count."""
    return {g.name: (g.kind, g.channels, frozenset(g.producers), frozenset(g.consumers)) for g in groups}


def hold(structure: Structure) -> None:
    """Everything in the block is found as it is written down."""
    assert by_name(structure.groups) == by_name(GROUPS)
    uses = {use.parameter: (use.in_axis, use.out_axis, use.expert_axis, use.role) for use in structure.linears}
    assert uses == {
        "gaze.braid.weight": (1, 0, None, "linear"),
        "gaze.home.weight": (0, 1, None, "linear"),
        "tide.sluice.weight": (1, 0, None, "linear"),
        "tide.flood.weight": (1, 0, None, "linear"),
        "tide.ebb.weight": (0, 1, None, "linear"),
        "market.taste": (1, 0, None, "router"),
        "market.wide": (2, 1, 0, "linear"),
        "market.narrow": (1, 2, 0, "linear"),
    }
    assert not structure.others


@pytest.mark.parametrize("tied", [False, True])
def test_all_groups_are_found_as_the_code_has_them(source: Callable[[bool], Path], tied: bool) -> None:
    plan, _ = prepare(source(tied), steps=["smoothquant", "w8a8"])
    assert plan.findings.blocks == "house.storeys"
    assert not plan.notes
    assert sorted(plan.findings.structures) == list(range(STOREYS))
    for structure in plan.findings.structures.values():
        hold(structure)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_the_groups_are_the_same_whichever_experts_are_sent_tokens(tokens: int, fused: bool) -> None:
    """With one token two experts of four are sent none: the code indexes with nothing.

    Nor does it matter whether the code takes attention's steps one by one, or calls torch's fused function.
    """
    for seed in range(4):
        block = Storey(DriftConfig(fused=fused)).eval()
        randomize_(block, torch.Generator().manual_seed(seed))
        x = torch.randn(1, tokens, 48, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            hold(discover(block, (x,), {}))


# What the report says


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_the_report_names_every_matrix(made: Callable[[str, bool], tuple[Path, Any]], name: str, tied: bool) -> None:
    folder, report = made(name, tied)
    assert report.format == RECIPES[name][2]
    layers = {f"house.storeys.{i}.{layer}": shape for i in range(STOREYS) for layer, shape in LAYERS.items()}
    apart = {
        f"house.storeys.{i}.market.{e}.{leaf}": shape
        for i in range(STOREYS)
        for e in range(EXPERTS)
        for leaf, shape in OWN_EXPERTS.items()
    }
    left = {"house.sounds": "Embedding", "house.places": "Embedding"}
    left |= {f"house.storeys.{i}.market.taste": "chooses experts" for i in range(STOREYS)}
    left["speech"] = "shares its weight with house.sounds" if tied else "makes the logits"
    if report.format == "bitsandbytes":
        left |= {
            f"house.storeys.{i}.market.{leaf}": "no quantized experts" for i in range(STOREYS) for leaf in OWN_EXPERTS
        }
        turned = [f"house.storeys.{i}.{layer}" for i in range(STOREYS) for layer in ("gaze.home", "tide.ebb")]
        left |= dict.fromkeys(turned, "class that transformers with bitsandbytes passes by")
        layers = {layer: shape for layer, shape in layers.items() if layer not in turned}
    else:
        layers |= apart
    assert {layer.module: layer.shape for layer in report.layers} == layers
    reasons = {item.module: item.reason for item in report.left_alone}
    assert reasons.keys() == left.keys()
    for module, word in left.items():
        assert word in reasons[module], module
    tensors = models.read_tensors(folder)
    for module in layers:
        assert tensors[f"{module}.weight"].dtype in (torch.int8, torch.int32)


def test_every_group_is_folded_and_proven(made: Callable[[str, bool], tuple[Path, Any]]) -> None:
    for tied in (False, True):
        groups = [group for group in made("smoothquant+w8a8", tied)[1].groups if group.state != "refused"]
        assert {(group.block, group.producer, group.state) for group in groups} == {
            (f"house.storeys.{i}", group.name, "folded") for i in range(STOREYS) for group in GROUPS
        }
        assert all(group.alpha == 0.5 and group.error <= 1 for group in groups)


# What it computes


def logits_of(model: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(IDS).logits
    return logits.double()


def decoded(folder: Path) -> tuple[dict[str, Tensor], set[str]]:
    """The float state that a compressed folder stands for, decoded by hand, and which of it was in codes."""
    stored, state, packed = models.read_tensors(folder), dict[str, Tensor](), set[str]()
    like = built().state_dict()
    dtype = torch.float8_e4m3fn if "float8" in (folder / "config.json").read_text() else torch.int8
    for name, value in like.items():
        stem = name.removesuffix(".weight")
        owner, _, leaf = name.rpartition(".")
        if f"{stem}.SCB" in stored:
            state[name] = stored[name].double() * stored[f"{stem}.SCB"].double()[:, None] / 127
        elif f"{stem}.weight_scale" in stored:
            columns = value.shape[0] if stem.endswith(("home", "ebb")) else value.shape[1]
            state[name] = rows(stored, stem, dtype, columns)
            state[name] = state[name].t() if stem.endswith(("home", "ebb")) else state[name]
        elif f"{owner}.0.{leaf}.weight_scale" in stored:
            layers = [f"{owner}.{expert}.{leaf}" for expert in range(EXPERTS)]
            state[name] = torch.stack([rows(stored, layer, dtype, value.shape[2]) for layer in layers])
        else:
            state[name] = stored.get(name, stored["house.sounds.weight"]).double()  # the head may be tied
            continue
        packed.add(name)
    return state, packed


def rows(stored: dict[str, Tensor], layer: str, dtype: torch.dtype, columns: int) -> Tensor:
    """Codes times scales, whether these are a row's or (experts in x out) a column's."""
    codes = stored[f"{layer}.weight"].view(dtype)[:, :columns]
    return codes.double() * stored[f"{layer}.weight_scale"].double()


LOST = {"smoothquant": 0.04, "w8a8": 0.06, "fp8": 0.16, "int8": 0.022, "llm-int8": 0.03}
"""What eight bits may cost; seen are 0.030, 0.048, 0.129, 0.017 and 0.022."""


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_logits_are_those_of_the_papers_equations_on_the_decoded_weights(
    made: Callable[[str, bool], tuple[Path, Any]], name: str, tied: bool
) -> None:
    folder, steps = made(name, tied)[0], RECIPES[name][0]
    state, packed = decoded(folder)
    reference = built(tied).double()
    reference.load_state_dict(state)
    weights = [weight for key, weight in reference.named_parameters() if key in packed]
    mode = Rounded(steps[-1], weights)
    with mode:
        expected = logits_of(reference)
    assert bool(mode.products) == (steps != ["int8"])
    assert bool(mode.outliers) == (steps == ["llm-int8"])
    ours, floats = logits_of(load(folder)), logits_of(built(tied).double())
    assert agree(ours, expected, floats, steps[-1])
    assert 1e-3 < relative(ours, floats) < LOST[steps[0]]


def test_smoothing_takes_a_third_of_the_loss_away(made: Callable[[str, bool], tuple[Path, Any]]) -> None:
    """One channel behind each norm is ten times as large as the others; seen are 0.030 and 0.048."""
    floats = logits_of(built())
    smooth, plain = (relative(logits_of(load(made(name, False)[0])), floats) for name in ("smoothquant+w8a8", "w8a8"))
    assert smooth < plain * 2 / 3


@pytest.mark.parametrize("tied", [False, True])
def test_smoothing_alone_leaves_the_function_as_it_is(
    source: Callable[[bool], Path], text: Path, tmp_path: Path, tied: bool
) -> None:
    report = quantize(
        source(tied), tmp_path / "out", steps=["smoothquant"], dataset=str(text), samples=8, seq_len=16, progress=False
    )
    assert sum(group.state == "folded" for group in report.groups) == STOREYS * len(GROUPS)
    before, after = models.read_tensors(source(tied)), models.read_tensors(tmp_path / "out")
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    edited = {edit.parameter for group in GROUPS for edit in (*group.producers, *group.consumers)}
    assert changed == {f"house.storeys.{i}.{parameter}" for i in range(STOREYS) for parameter in edited}
    assert relative(logits_of(load(tmp_path / "out")), logits_of(load(source(tied)))) < 1e-5


def test_packed_weights_stay_packed(made: Callable[[str, bool], tuple[Path, Any]], tmp_path: Path) -> None:
    folder, _ = made("int8", True)
    model = load(folder)
    for i in range(STOREYS):
        storey = model.get_submodule(f"house.storeys.{i}")
        assert {name for name, module in storey.named_modules() if isinstance(module, QuantizedLinear)} == set(LAYERS)
        assert {name for name, module in storey.named_modules() if isinstance(module, QuantizedExperts)} == {
            "market.wide",
            "market.narrow",
        }
        assert [name for name, p in storey.named_parameters() if p.ndim > 1] == ["market.taste"]
    before = logits_of(model)
    model.save_pretrained(tmp_path / "again")
    ours, theirs = models.read_tensors(folder), models.read_tensors(tmp_path / "again")
    assert ours.keys() == theirs.keys()
    assert all(models.same(value, theirs[key]) for key, value in ours.items())
    assert torch.equal(logits_of(load(tmp_path / "again")), before)


def test_a_model_in_memory_gives_the_same_bytes(made: Callable[[str, bool], tuple[Path, Any]], tmp_path: Path) -> None:
    quantize(built(), tmp_path / "out", steps=["int8"], tokenizer=models.tokenizer(), progress=False)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        made("int8", False)[0] / "model.safetensors"
    ).read_bytes()


def test_bitsandbytes_takes_what_is_written_for_it(made: Callable[[str, bool], tuple[Path, Any]]) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="install bitsandbytes")
    folder, report = made("llm-int8", False)
    model, info = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", output_loading_info=True)
    assert not any(info.values())
    theirs = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear8bitLt)}
    assert theirs.keys() == {layer.module for layer in report.layers}
    stored = models.read_tensors(folder)
    assert all(torch.equal(module.weight.data, stored[f"{name}.weight"]) for name, module in theirs.items())


def test_it_is_evaluated_and_planned_as_any_other(
    made: Callable[[str, bool], tuple[Path, Any]],
    source: Callable[[bool], Path],
    cli: Callable[..., Any],
    tmp_path: Path,
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Some other words than those before, and some more of them. " * 10, encoding="utf-8")
    folder, _ = made("smoothquant+w8a8", False)
    result = evaluate(folder, other, baseline=source(False), seq_len=32, progress=False)
    assert 0 < result["kl_mean"] < 0.01
    shown = cli("plan", source(False), "-m", "smoothquant", "-m", "w8a8", "--explain")
    assert shown.exit_code == 0
    for word in ("norm flair.weight, multiplies by 1 + weight, 48 channels", "market.taste", "experts market.wide"):
        assert word in shown.stdout


def test_a_context_that_the_config_does_not_name_is_found_out(
    source: Callable[[bool], Path], mistake: Callable[..., str], tmp_path: Path
) -> None:
    """The model has 64 places, under a name that means nothing to anyone, and windows are 2048 tokens by default."""
    long = tmp_path / "long.txt"
    long.write_text(TEXT * 2, encoding="utf-8")
    data = ["--dataset", long]
    steps = ["-m", "smoothquant", "-m", "w8a8", "--samples", 2]
    says = (str(source(False)), "cannot read 2048 tokens at once", "smaller seq_len")
    mistake("quantize", source(False), "-o", tmp_path / "out", *steps, *data, says=says)
    mistake("eval", source(False), *data, says=says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.txt", "out.log.jsonl", "out.partial"]
