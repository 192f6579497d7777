"""What servers make of checkpoints as a whole: hardware, splits, and how a verdict is told."""

import itertools
import json
import random
import re
from pathlib import Path

import models
import pytest
import torch
from torch import nn

from quantkit import formats
from quantkit.cli import inspect as command
from quantkit.errors import CheckpointError, RecipeError
from quantkit.recipe import Recipe, load_recipe
from quantkit.servers import HARDWARE, SERVERS, check, check_all, of_recipe
from quantkit.servers.arguments import KEYS, read_arguments
from quantkit.servers.contents import Contents, Layer
from quantkit.servers.findings import Finding, Verdict
from quantkit.servers.matching import in_compressed_tensors

EVERYWHERE = tuple(HARDWARE)
SERVED = {
    ("vllm", "w8a8", "llama"): "cpu cpu-amx sm75 sm80 sm89 sm90",
    ("vllm", "w8a8-static", "llama"): "cpu cpu-amx sm75 sm80 sm89 sm90",
    ("vllm", "fp8", "llama"): "cpu cpu-amx sm75 sm80 sm89 sm90 sm100 sm120",
    ("vllm", "fp8-static", "llama"): "cpu-amx sm75 sm80 sm89 sm90 sm100 sm120",
    ("vllm", "fp8-weight-only", "llama"): "sm75 sm80 sm89 sm90 sm100 sm120",
    ("vllm", "int8", "llama"): "sm75 sm80 sm89 sm90 sm100 sm120",
    ("vllm", "int8-g128", "llama"): "sm75 sm80 sm89 sm90 sm100 sm120",
    ("vllm", "fp8-block", "llama"): "",  # 64 rows of k before those of v
    ("vllm", "llm-int8", "llama"): "",
    ("vllm", "w8a8", "mixtral"): "sm75 sm80 sm89 sm90",
    ("vllm", "fp8", "mixtral"): "sm75 sm80 sm89 sm90 sm100 sm120",
    ("vllm", "int8", "mixtral"): "sm75 sm80 sm89 sm90 sm100 sm120",
    ("vllm", "fp8-weight-only", "mixtral"): "",
    ("vllm", "w8a8", "gpt_oss"): "",
    ("sglang", "w8a8", "llama"): "sm80 sm89 sm90",
    ("sglang", "fp8", "llama"): "sm80 sm89 sm90 sm100 sm120",
    ("sglang", "fp8-weight-only", "llama"): "sm80 sm89 sm90 sm100 sm120",
    ("sglang", "int8", "llama"): "sm80 sm89 sm90 sm100 sm120",
    ("sglang", "w8a8", "mixtral"): "",
    ("transformers", "w8a8", "llama"): " ".join(EVERYWHERE),
    ("transformers", "llm-int8", "llama"): " ".join(EVERYWHERE),
    ("transformers", "int8", "mixtral"): " ".join(EVERYWHERE),
    ("transformers", "fp8", "mixtral"): " ".join(EVERYWHERE),
    ("transformers", "w8a8", "mixtral"): "",
    ("transformers", "w8a8", "gpt_oss"): "",
}


@pytest.mark.parametrize(("server", "recipe", "model"), SERVED)
def test_where_a_scheme_is_served(compressed, server, recipe, model):
    verdict = check(compressed(recipe, model), server)
    wanted = SERVED[server, recipe, model]
    assert " ".join(verdict.served_on) == wanted, verdict.to_text()
    assert verdict.state == ("served" if wanted else "refused")


def test_a_float_model_is_served(model_folder):
    for name in ("llama", "llama_tied", "llama_sharded", "mixtral", "opt"):
        for verdict in check_all(model_folder(name), list(SERVERS)):
            assert verdict.state == "served", verdict.to_text()
            assert not any(finding.severity == "error" for finding in verdict.findings)


def test_a_format_that_a_server_knows_and_quantkit_does_not_is_not_checked(compressed, model_folder, tmp_path):
    folder = models.copy(model_folder(), tmp_path / "model")
    models.change_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    assert {verdict.state for verdict in check_all(folder, list(SERVERS))} == {"not checked"}
    verdict = check(compressed("llm-int8"), "sglang")
    assert (verdict.state, verdict.served_on) == ("not checked", ())
    assert "not checked" in verdict.headline()


@pytest.mark.parametrize(
    ("step", "cpus"),
    [("w8a8", ["cpu-amx"]), ("fp8", ["cpu-amx"]), ("int8", []), ("int8:group=128", []), ("fp8:scheme=weight-only", [])],
)
def test_experts_on_a_cpu(step, cpus):
    """Where vLLM's experts run: with AMX in int8 and FP8, and packed in 4 bits alone."""
    scheme = Recipe.of(step).scheme
    stored = formats.choose(scheme).config(scheme, [], ["lm_head"])
    early = of_recipe(stored, {}, "model", experts=True)[0]
    assert [name for name in early.served_on if name.startswith("cpu")] == cpus, early.to_text()


def test_one_piece_of_hardware_makes_its_limit_an_error(compressed):
    verdict = check(compressed("int8"), "vllm", hardware="cpu")
    assert (verdict.state, verdict.served_on) == ("refused", ())
    assert [(f.severity, f.hardware) for f in verdict.findings if "CPUWNA16" in f.rule] == [("error", ())]
    on_gpu = check(compressed("int8"), "vllm", hardware="sm80")
    assert (on_gpu.state, on_gpu.served_on) == ("served", ("sm80",))
    assert not any("CPUWNA16" in finding.rule for finding in on_gpu.findings)


def test_conv1d_goes_to_vllm_and_not_to_transformers(compressed):
    """Codes of a Conv1D lie as [in, out]; compressed-tensors passes its class by."""
    folder = compressed("w8a8", "gpt2", "compressed-tensors")
    vllm = check(folder, "vllm", hardware="sm80")
    assert vllm.state == "served", vllm.to_text()
    (finding,) = (f for f in check(folder, "transformers").findings if f.severity == "error")
    assert "takes codes for weights" in finding.rule
    assert len(finding.where) == 8


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_turned_weights_of_others_are_not_checked(compressed, monkeypatch, server):
    folder = compressed("w8a8", "gpt2", "compressed-tensors")
    assert "turns only" not in check(folder, server).to_text()
    monkeypatch.setattr("quantkit.servers.shapes.TURNED", ())
    (finding,) = (f for f in check(folder, server).findings if "turns only" in f.rule)
    assert finding.severity == "warning"


def test_sglang_says_that_stored_scales_of_activations_go_unused(compressed):
    assert "go unused" in check(compressed("w8a8-static"), "sglang").to_text()
    assert "go unused" not in check(compressed("w8a8"), "sglang").to_text()


def test_a_config_that_is_no_table_of_groups_is_told(compressed, tmp_path):
    good = json.loads((compressed() / "config.json").read_text())["quantization_config"]
    for change, says in (
        ({"config_groups": [1]}, "not a table of groups"),
        ({"config_groups": {"group_0": 1}}, "it is 1, not a table"),
        ({"config_groups": {"group_0": {"targets": "Linear", "weights": {}}}}, "not a list of names"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": 8}}}, "it is 8, not a table"),
        ({"ignore": "lm_head"}, "it is 'lm_head', not a list of names"),
    ):
        for server in SERVERS:
            (verdict,) = (v for v in of_recipe(good | change, {}, "model") if v.server == SERVERS[server].NAME)
            assert says in verdict.headline(), verdict.to_text()


def test_weights_that_lie_the_other_way_round_are_found(compressed, tmp_path):
    key = "transformer.h.0.attn.c_attn.weight"
    folder = models.copy(compressed("w8a8", "gpt2", "compressed-tensors"), tmp_path / "model")
    models.change_tensors(folder, lambda tensors: tensors | {key: tensors[key].t().contiguous()})
    verdict = check(folder, "vllm", hardware="sm80")
    assert [f.where for f in verdict.findings if f.severity == "error"] == [(key,)], verdict.to_text()


def test_members_that_are_ignored_together_are_served(model_folder, tmp_path):
    """By vLLM; by SGLang only where the model's class says what is fused, so that it warns."""
    import quantkit

    patterns = ["*.q_proj", "*.k_proj", "*.v_proj"]
    quantkit.quantize(model_folder(), tmp_path / "out", recipe="w8a8", ignore=patterns, progress=False)
    assert check(tmp_path / "out", "vllm").state == "served"
    verdict = check(tmp_path / "out", "sglang")
    assert verdict.state == "served"
    assert any("add it to ignore" in finding.rule for finding in verdict.findings)


@pytest.mark.parametrize(("parallel", "state"), [(1, "served"), (2, "refused"), (3, "refused")])
@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_groups_over_devices(compressed, server, parallel, state):
    """o_proj has 128 in features and groups of 128: two devices would split a group."""
    verdict = check(compressed("int8-g128"), server, hardware="sm80", tensor_parallel=parallel)
    assert verdict.state == state, verdict.to_text()
    if parallel == 2:
        wrong = {name for finding in verdict.findings if finding.severity == "error" for name in finding.where}
        assert wrong == {f"model.layers.{i}.self_attn.o_proj" for i in range(2)}


def test_blocks_over_devices(tmp_path):
    """Column-parallel layers split their rows: 256 rows of gate and up over 4 devices are half a block each."""
    import quantkit

    models.save(models.llama_model(num_key_value_heads=4), tmp_path / "model")
    quantkit.quantize(tmp_path / "model", tmp_path / "out", recipe="fp8-block", progress=False)
    assert check(tmp_path / "out", "vllm", hardware="sm90").state == "served"
    verdict = check(tmp_path / "out", "vllm", hardware="sm90", tensor_parallel=4)
    wrong = {name for finding in verdict.findings if finding.severity == "error" for name in finding.where}
    leaves = {name.rpartition(".")[2] for name in wrong}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("recipe", ["w8a8", "fp8", "int8", "fp8-static", "llm-int8"])
def test_what_is_said_of_a_plan_is_said_of_its_checkpoint(compressed, model_folder, recipe):
    scheme = load_recipe(recipe).scheme
    assert scheme is not None
    stored = formats.choose(scheme).config(scheme, [], ["lm_head"])
    config = json.loads((model_folder() / "config.json").read_text())
    early = of_recipe(stored, config, "model")
    late = check_all(compressed(recipe), list(SERVERS))
    assert [(v.server, v.state, v.served_on) for v in early] == [(v.server, v.state, v.served_on) for v in late]


def values() -> dict[str, list[object]]:
    return {
        "num_bits": [8, 4, 16, "8", 3],
        "type": ["int", "float", "FLOAT", "posit"],
        "symmetric": [True, False],
        "group_size": [None, -1, 128, 0, -2],
        "strategy": [None, "tensor", "channel", "group", "block", "token", "tensor_group", "attn_head", "row"],
        "block_structure": [None, [128, 128], "128x128", [128], [0, 128], "12"],
        "dynamic": [False, True, "local"],
        "actorder": [None, "weight", "static", "group", "dynamic", True, False],
        "observer": ["minmax"],
        "observed": [1],
    }


def test_arguments_are_refused_where_compressed_tensors_refuses_them():
    """4,000 drawn ones against its own class; `8` as a text is the one that only it takes for a number."""
    args = pytest.importorskip("compressed_tensors.quantization.quant_args", reason="install the extra `oracles`")
    assert set(args.QuantizationArgs.model_fields) == KEYS
    draw, taken = random.Random(0), 0
    for _ in range(4000):
        chosen = {key: draw.choice(options) for key, options in values().items() if draw.random() < 0.4}
        if draw.random() < 0.9:
            chosen.pop("observed", None)
        if chosen.get("num_bits") == "8":
            chosen["num_bits"] = 8
        try:
            theirs = args.QuantizationArgs.model_validate(chosen)
        except (ValueError, NotImplementedError):
            theirs = None
        ours, mistakes = read_arguments(chosen, "weights")
        assert (ours is None) == (theirs is None) == bool(mistakes), (chosen, mistakes)
        if ours is not None and theirs is not None:
            taken += 1
            pair = [(ours.num_bits, theirs.num_bits), (ours.type, theirs.type), (ours.strategy, theirs.strategy)]
            pair += [(ours.group_size, theirs.group_size), (ours.dynamic, theirs.dynamic)]
            assert all(a == b for a, b in pair)
            assert (None if ours.block is None else list(ours.block)) == theirs.block_structure
    assert taken > 100


class Router(nn.Linear):
    """A subclass of nn.Linear."""


def test_targets_are_found_as_compressed_tensors_finds_them():
    """Names, regexes, classes and bases, ignored and targeted, in every order of two groups."""
    match = pytest.importorskip("compressed_tensors.utils.match", reason="install the extra `oracles`")
    names = ("a.q_proj", "a.k_proj", "lm_head")
    words = ("Linear", "Router", "a.q_proj", "re:a\\..*", "re:.*k_proj", "re:proj", "lm_head", "Module", "linear")
    for kind, name in itertools.product((nn.Linear, Router), names):
        module = kind(2, 2)
        classes = tuple(each.__name__ for each in kind.__mro__ if each is not object)
        layer = Layer(name, name, classes, {}, 2, 2, False)
        for first, second, left in itertools.product(words, repeat=3):
            stored = {
                "quant_method": "compressed-tensors",
                "ignore": [left],
                "config_groups": {
                    "one": {"targets": [first], "weights": {}, "format": "int-quantized"},
                    "two": {"targets": [second], "weights": {}, "format": "int-quantized"},
                },
            }
            choice = in_compressed_tensors(layer, contents(stored))
            is_left = match.is_match(name, module, [left])
            targets = match.match_targets(name, module, [first, second])
            assert choice.ignored == is_left
            wanted = None if is_left or not targets else ("two" if targets[0] == second else "one")
            assert (choice.group and choice.group.name) == wanted, (name, classes, first, second, left)


def contents(stored: dict[str, object]) -> Contents:
    from quantkit.servers.contents import of_config

    return of_config({"quantization_config": stored}, "model")


@pytest.mark.parametrize(
    ("recipe", "model"),
    [(recipe, "llama") for recipe in ("w8a8", "w8a8-static", "fp8", "fp8-static", "fp8-block", "int8", "int8-g128")]
    + [("fp8", "mixtral"), ("int8", "mixtral"), ("w8a8", "mixtral"), ("fp8", "llama_odd"), ("w8a8", "opt")],
)
def test_transformers_loads_what_it_is_said_to_load(compressed, recipe, model):
    """And stumbles over what it is said to refuse."""
    pytest.importorskip("compressed_tensors", reason="install the extra `oracles`")
    from transformers import AutoModelForCausalLM

    folder = compressed(recipe, model)
    try:
        _, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        loaded = not any(info.values())
    except RuntimeError:
        loaded = False
    verdict = check(folder, "transformers")
    assert loaded == (verdict.state == "served"), verdict.to_text()


def test_findings_that_say_the_same_are_one_line():
    same = [Finding("error", (name,), "it is wrong", "a book") for name in "abcde"]
    verdict = Verdict.of("vLLM", "1", [*same, Finding("note", ("x",), "mind it", "a book", ("sm75",))], EVERYWHERE)
    assert verdict.to_text() == (
        "vLLM 1: refused: a and 4 more: it is wrong\n"
        "  error: a, b, c and 2 more: it is wrong [a book]\n"
        "  note (sm75): x: mind it [a book]"
    )
    assert json.loads(json.dumps(verdict.to_dict())) == verdict.to_dict()
    assert verdict.to_dict()["findings"][0]["where"] == list("abcde")


def test_limits_that_together_leave_nothing_refuse():
    limits = [Finding("warning", ("x",), "no", "a book", (name,)) for name in ("cpu", "sm75")]
    verdict = Verdict.of("vLLM", "1", limits, ("cpu", "sm75"))
    assert (verdict.state, verdict.served_on) == ("refused", ())
    assert "own reason" in verdict.headline()


def test_every_finding_names_a_place_and_a_source(compressed):
    for recipe, model in (("w8a8", "mixtral"), ("llm-int8", "llama"), ("fp8-block", "llama"), ("int8", "llama_odd")):
        for verdict in check_all(compressed(recipe, model), list(SERVERS)):
            for finding in verdict.findings:
                assert finding.where
                assert re.search(r"\d\.\d|this check", finding.source), finding


def test_unknown_words_are_one_sentence(compressed):
    folder = compressed()
    with pytest.raises(RecipeError, match="server 'tgi' is unknown; use vllm, sglang, transformers"):
        check(folder, "tgi")
    with pytest.raises(RecipeError, match=r"hardware 'h100' is unknown; use one of cpu .*, sm90 \(Hopper\)"):
        check(folder, "vllm", hardware="h100")
    with pytest.raises(RecipeError, match="knows no rules of SGLang on cpu; use one of sm75"):
        check(folder, "sglang", hardware="cpu")
    with pytest.raises(RecipeError, match="tensor parallel is 0"):
        check(folder, "vllm", tensor_parallel=0)


def test_a_missing_shard_is_one_sentence(compressed, tmp_path):
    folder = models.copy(compressed(), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"shard model-00001-of-00001\.safetensors is missing"):
        check(folder, "vllm")


def test_the_command_line_says_it(cli, compressed):
    result = cli("inspect", compressed("w8a8"), "--for", "vllm,transformers", "--for", "vllm")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert heads[0].startswith("vLLM 0.32: served on: cpu, cpu-amx, sm75, sm80, sm89, sm90; refused on: sm100, sm120")
    assert heads[1].startswith("transformers 5.23: served")
    assert len(heads) == 2
    assert result.stderr == ""


def test_the_command_line_exits_with_1_where_a_server_refuses(cli, compressed):
    folder = compressed("w8a8")
    assert cli("inspect", folder, "--for", "vllm", "--hardware", "sm100").exit_code == 1
    result = cli("inspect", compressed("llm-int8"), "--for", "vllm,sglang,transformers", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert [each["state"] for each in found["servers"]] == ["refused", "not checked", "served"]
    assert found["servers"][0]["findings"][0]["severity"] == "error"
    assert cli("inspect", compressed("llm-int8"), "--for", "sglang").exit_code == 0
    assert cli("inspect", compressed("int8-g128"), "--for", "vllm", "--tensor-parallel", 2).exit_code == 1


def test_the_command_line_refuses_what_it_does_not_know(cli, compressed):
    folder = compressed("w8a8")
    assert tuple(SERVERS) == command.SERVERS
    assert tuple(HARDWARE) == command.HARDWARE
    for words in (
        ("--for", "tgi"),
        ("--hardware", "cpu"),
        ("--tensor-parallel", 2),
        ("--for", "vllm", "--hardware", "x"),
    ):
        assert cli("inspect", folder, *words).exit_code == 2
    assert cli("inspect", folder, "--for", "sglang", "--hardware", "cpu").exit_code == 1


def test_what_lies_beside_a_routers_weight_makes_no_codes_of_it(tiny_folder, tmp_path):
    """DeepSeek's router has a `weight` and an `e_score_correction_bias`."""
    import quantkit

    quantkit.quantize(tiny_folder("deepseek_v3"), tmp_path / "out", recipe="fp8", progress=False)
    for server in SERVERS:
        verdict = check(tmp_path / "out", server, hardware="sm90")
        assert verdict.state == "served", verdict.to_text()


def test_a_router_is_ignored_by_the_names_of_model_and_files(tiny_folder, tmp_path):
    """PhiMoE's, a linear layer by class, is mlp.router in the model, and block_sparse_moe.gate in files and servers."""
    import quantkit

    quantkit.quantize(tiny_folder("phimoe"), tmp_path / "out", recipe="fp8", progress=False)
    for server in ("vllm", "sglang"):
        verdict = check(tmp_path / "out", server, hardware="sm90")
        assert verdict.state == "served", verdict.to_text()
        assert not [f for f in verdict.findings if f.severity == "warning" and "by its class" in f.rule]
    assert check(tmp_path / "out", "transformers").state == "served"


def test_scales_of_a_cache_are_used_where_the_config_has_its_scheme(compressed, tmp_path):
    folder = models.copy(compressed(), tmp_path / "model")
    scales = {f"model.layers.{i}.self_attn.{leaf}_scale": torch.ones(1) for i in range(2) for leaf in "kv"}
    models.change_tensors(folder, lambda tensors: tensors | scales)
    unused = {name for f in check(folder, "vllm").findings for name in f.where if name.endswith("_scale")}
    assert unused == set(scales)
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    models.change_config(folder, quantization_config=stored | {"kv_cache_scheme": scheme})
    for server in SERVERS:
        verdict = check(folder, server)
        assert verdict.state == "served", verdict.to_text()
        assert not any(name.endswith("_scale") for finding in verdict.findings for name in finding.where)


FIXTURES = Path(__file__).parent.parent / "oracles" / "fixtures"


WRITTEN = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
ORPHANS = [name for name in WRITTEN if name.startswith("sparse24")]


@pytest.mark.parametrize("name", ORPHANS)
def test_what_was_written_in_2_of_4_is_refused_where_it_was_dropped(name):
    verdict = check(FIXTURES / name, "vllm")
    assert verdict.state == "refused"
    assert any("2:4 sparsity was removed" in finding.rule for finding in verdict.findings), verdict.to_text()


@pytest.mark.parametrize("name", [name for name in WRITTEN if name not in ORPHANS])
def test_what_llm_compressor_wrote_breaks_no_rule_of_tensors(name):
    """Checkpoints that vLLM's own companion made: errors can only be about schemes and sizes."""
    for server in SERVERS:
        verdict = check(FIXTURES / name, server)
        wrong = [finding for finding in verdict.findings if finding.severity == "error"]
        told = ("has no scheme", "no bitsandbytes", "don't divide", "conversion errors", "asymmetric", "NPUs")
        assert all(any(words in finding.rule for words in told) for finding in wrong), verdict.to_text()
