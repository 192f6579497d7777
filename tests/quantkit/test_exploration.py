"""What one pass over random weights shows, held against the real models."""

import copy
from dataclasses import replace

import pytest
import torch
from quantkit_calibration.sequential import block_order
from tiny import build, configuration, inputs
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from quantkit import exploration
from quantkit.checkpoint import auto_class, empty_copy, open_model, tied_parameters
from quantkit.discovery import apply_group
from quantkit.errors import CheckpointError
from quantkit.exploration import explore, outermost_lists, probe
from quantkit.planning import make_plan
from quantkit.recipe import Recipe

QKV = [f"self_attn.{leaf}_proj.weight" for leaf in "qkv"]
GATE_UP = [f"mlp.{leaf}_proj.weight" for leaf in ("gate", "up")]
ATTENTION = {"input_layernorm.weight": QKV, "self_attn.v_proj.weight": ["self_attn.o_proj.weight"]}
EXPECTED = {
    "llama": ATTENTION | {"post_attention_layernorm.weight": GATE_UP, "mlp.up_proj.weight": ["mlp.down_proj.weight"]},
    "mixtral": ATTENTION
    | {
        "post_attention_layernorm.weight": ["mlp.gate.weight", "mlp.experts.gate_up_proj"],
        "mlp.experts.gate_up_proj": ["mlp.experts.down_proj"],
    },
}


def consumers(group):
    return sorted({edit.parameter for edit in group.consumers})


@pytest.mark.parametrize("model_type", EXPECTED)
def test_every_block_has_the_groups_that_its_code_says(model_type):
    found = explore(build(model_type))
    assert (found.blocks, found.count, found.order, found.untraced) == ("model.layers", 2, [0, 1], {})
    assert found.ended is None
    expected = {name: sorted(names) for name, names in EXPECTED[model_type].items()}
    for number in (0, 1):
        assert {group.name: consumers(group) for group in found.structures[number].groups} == expected


def folded(model, found, drop=None):
    """A copy of the model in which every group is scaled by random powers of two; `drop` leaves its last edit out."""
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for number, structure in found.structures.items():
        block = made.get_submodule(f"{found.blocks}.{number}")
        for group in structure.groups:
            scale = 2.0 ** torch.randint(-2, 3, (group.channels,), generator=generator)
            chosen = replace(group, consumers=group.consumers[:-1]) if group is drop else group
            parameters = {name: value.detach() for name, value in block.named_parameters()}
            for name, value in apply_group(parameters, chosen, scale).items():
                block.get_parameter(name).data = value
    return made


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "opt", "gpt2", "gpt_oss", "hrm_text", "nemotron"])
def test_the_groups_of_all_blocks_fold_in_the_real_model(model_type):
    """By powers of two, under which every product's terms are the same floats: the logits are the same bits.

    But for a norm that multiplies by 1 + w (Nemotron): w isn't scaled by a power of two. Its new gain is rounded with a
    relative error of 2**-24 four times at most, and each of the model's sums of at most 128 terms passes that on.
    """
    model = build(model_type)
    found = explore(model)
    groups = [group for structure in found.structures.values() for group in structure.groups]
    assert len(groups) >= 4
    with torch.no_grad():
        before = model(**inputs(model)).logits
        after = folded(model, found)(**inputs(model)).logits
        broken = folded(model, found, groups[0])(**inputs(model)).logits
    if model_type == "nemotron":
        assert float((after - before).norm() / before.norm()) < 1e-5
    else:
        assert torch.equal(after, before)
    assert float((broken - before).norm() / before.norm()) > 1e-3


def test_a_vision_tower_holds_no_decoder_blocks():
    """However large it is: it doesn't run when the model reads text."""
    config = configuration("gemma3")
    config.vision_config.num_hidden_layers = 6
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    lists = outermost_lists(model)
    largest = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    assert largest == "model.vision_tower.encoder.layers"
    found = explore(model)
    assert (found.blocks, found.count) == ("model.language_model.layers", 2)
    assert not any("vision" in name for name in found.ran)


@pytest.mark.parametrize("model_type", ["llama", "hrm_text", "jamba"])
def test_the_order_is_the_models_own(model_type):
    model = build(model_type)
    found = explore(model)
    blocks = list(model.get_submodule(found.blocks))
    assert found.order == block_order(model, blocks, inputs(model))
    assert (len(found.order) > found.count) == (model_type == "hrm_text")


def test_nothing_depends_on_the_weights_or_the_state_of_the_world():
    model = build("llama")
    torch.manual_seed(1)
    one = explore(model)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    other = explore(empty_copy(model))
    assert one == other
    assert torch.equal(torch.get_rng_state(), state)


def test_without_groups_the_uses_are_the_same():
    model = build("mixtral")
    with_groups, without = explore(model), explore(model, groups=False)
    for number, structure in without.structures.items():
        assert structure.groups == structure.refusals == ()
        assert structure.linears == with_groups.structures[number].linears


NO_LAYERS = {"vocab_size": 16, "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 0}


class TestProbe:
    def ids(self, **special):
        model = LlamaForCausalLM(LlamaConfig(**NO_LAYERS, **special))
        return probe(model)["input_ids"]

    @pytest.mark.parametrize("as_list", [False, True])
    def test_special_tokens_are_avoided(self, as_list):
        eos = [7, 8, 9, 10, 11, 12] if as_list else 7
        ids = self.ids(bos_token_id=5, eos_token_id=eos, pad_token_id=6)
        usable = {3, 4, 13, 14, 15} if as_list else set(range(3, 16)) - {5, 6, 7}
        assert tuple(ids.shape) == exploration.TOKENS
        assert set(ids.flatten().tolist()) <= usable
        assert len(set(ids.flatten().tolist())) > 3

    def test_where_all_are_special_any_will_do(self):
        ids = self.ids(eos_token_id=list(range(3, 16)))
        assert 0 <= int(ids.min()) <= int(ids.max()) < 16

    def test_no_cache_is_made_where_the_model_can_do_without(self):
        model = LlamaForCausalLM(LlamaConfig(**NO_LAYERS))
        assert probe(model)["use_cache"] is False
        assert "use_cache" not in exploration.without_cache(nn.Linear(2, 2))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral", "hrm_text", "xlm", "blt"])
def test_large_blocks_are_not_run_again_and_the_findings_are_the_same(monkeypatch, model_type):
    """XLM and BLT have several lists; BLT's blocks are alike and get sequences of different lengths."""
    model = build(model_type)
    usual = explore(model)
    monkeypatch.setattr(exploration, "LARGE_BLOCK", 0)
    found = explore(model)
    assert replace(found, ran=usual.ran) == usual
    assert usual.ran <= found.ran
    assert not [name for name in found.ran - usual.ran for _ in model.get_submodule(name).parameters()]
    assert usual.ended is None


def test_alike_blocks_are_traced_once(monkeypatch):
    traced = []

    def discover(block, *args, **kwargs):
        traced.append(block)
        return exploration_discover(block, *args, **kwargs)

    exploration_discover = exploration.discover
    monkeypatch.setattr(exploration, "discover", discover)
    config = configuration("gemma2")
    config.num_hidden_layers, config.layer_types = 4, ["sliding_attention", "full_attention"] * 2
    found = explore(AutoModelForCausalLM.from_config(config))
    assert len(traced) == 2
    assert found.structures[0] == found.structures[2]
    assert found.structures[1] == found.structures[3]


def test_an_error_in_the_model_is_told_with_what_was_seen():
    class Stumbling(LlamaForCausalLM):
        def forward(self, **arguments):
            super().forward(**arguments)
            raise ValueError("no\nluck")

    Stumbling.__name__ = "LlamaForCausalLM"
    model = Stumbling(configuration("llama"))
    found = explore(model)
    assert found.ended == "ValueError: no luck"
    assert sorted(found.structures) == [0, 1]
    plan = make_plan(open_model(model), Recipe.of(["w8a8"]))
    assert len(plan.targets) == 14
    assert any("ended early: ValueError: no luck" in note for note in plan.notes)


def test_a_block_that_cannot_be_traced_is_told(monkeypatch):
    def discover(block, *args, **kwargs):
        raise RuntimeError("no luck")

    monkeypatch.setattr(exploration, "discover", discover)
    found = explore(build("llama"))
    assert found.untraced == {0: "RuntimeError: no luck", 1: "RuntimeError: no luck"}
    assert (found.structures, found.ended) == ({}, None)
    assert found.order == [0, 1]


def test_an_error_in_a_block_ends_the_pass():
    class Stumbling(LlamaForCausalLM):
        def __init__(self, config) -> None:
            super().__init__(config)
            self.model.layers[0].mlp.forward = self.stumble

        def stumble(self, x):
            raise RuntimeError("no luck")

    found = explore(Stumbling(configuration("llama")))
    assert found.ended == "RuntimeError: no luck"
    assert (found.blocks, found.count) == ("model.layers", 2)
    assert (sorted(found.structures), sorted(found.untraced)) == ([], [0, 1])
    assert "no luck" in found.untraced[0]


def test_one_block_is_in_memory_and_experts_take_the_space_of_one(monkeypatch):
    seen = []

    def discover(block, *args, **kwargs):
        experts = {name: value for name, value in block.named_parameters() if value.ndim == 3}
        for value in experts.values():
            assert value.untyped_storage().nbytes() == value[0].nbytes
        others = [name for name, value in model_of[0].named_parameters() if not value.is_meta]
        own = {id(value) for value in block.parameters()}
        seen.append((len(experts), [name for name in others if id(model_of[0].get_parameter(name)) not in own]))
        return original(block, *args, **kwargs)

    original, model_of = exploration.discover, []
    made = exploration.empty_copy
    monkeypatch.setattr(exploration, "discover", discover)
    monkeypatch.setattr(exploration, "empty_copy", lambda *a, **k: model_of.append(made(*a, **k)) or model_of[-1])
    model = build("deepseek_v3")
    explore(model)
    assert seen == [(0, ["model.embed_tokens.weight"]), (2, ["model.embed_tokens.weight"])]
    assert all(value.is_meta for value in model_of[0].parameters())


class LoopedBlock(nn.Module):
    """Two experts, both of which every token goes to."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        for expert in self.experts:
            x = x + nn.functional.linear(x, expert)
        return x


class LoopedModel(PreTrainedModel):
    """Blocks of experts that are run three times."""

    config_class = PreTrainedConfig

    def __init__(self, config) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(LoopedBlock() for _ in range(2))
        self.held: list[int] = []
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for _ in range(3):
            for layer in self.layers:
                x = layer(x)
                HELD.append([not each.experts.is_meta for each in self.layers])
        return x


HELD: list[list[bool]] = []


def test_blocks_that_run_again_are_filled_and_emptied_each_time():
    HELD.clear()
    found = explore(LoopedModel(PreTrainedConfig(vocab_size=16)))
    assert found.ended is None
    assert found.order == [0, 1] * 3
    assert HELD == [[False, False]] * 6


def test_a_model_without_a_list_of_layers_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**NO_LAYERS))
    with pytest.raises(CheckpointError, match="LlamaForCausalLM has no list of layers"):
        explore(model)


def test_shared_parameters_do_not_fold(tiny_source):
    """Zamba 2's blocks share a transformer: a group of its parameters would change other blocks as well."""
    model = tiny_source("zamba2").skeleton
    found = explore(model)
    ties = tied_parameters(model)
    edited = {
        f"{found.blocks}.{number}.{edit.parameter}"
        for number, structure in found.structures.items()
        for group in structure.groups
        for edit in (*group.producers, *group.consumers)
    }
    assert edited
    assert edited.isdisjoint({*ties, *ties.values()})
    reasons = [refusal.reason for structure in found.structures.values() for refusal in structure.refusals]
    assert any("is shared with another part of the model" in reason for reason in reasons)
