"""Weights that come and go: the same logits as with all of them in memory, and never more than one block's."""

import copy

import models
import pytest
import torch
from tiny import inputs
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from quantkit.checkpoint import Hub, empty_copy, open_folder
from quantkit.exploration import outermost_lists
from quantkit.naming import Names
from quantkit.streaming import LazyModel, StoredWeights

UNLIKE = ["llama", "gpt2", "opt", "gemma2", "mamba", "jamba", "mixtral", "deepseek_v3", "gpt_oss", "llama4_text"]
UNLIKE += ["kimi_linear", "hrm_text"]


def lazy_model(source, provide=None, **where):
    """A lazy model; what it is given is moved to memory of its own first, where sums are taken in one order."""
    stored = StoredWeights(source, Names(source))

    def moved(names):
        return {name: value.clone() for name, value in stored(names).items()}

    return LazyModel(empty_copy(source.skeleton, buffers=True).float(), provide or moved, **where)


def blocks_of(model):
    return {f"{name}.{i}": each for name, found in outermost_lists(model).items() for i, each in enumerate(found)}


def fill_blocks(lazy, blocks):
    """Fill each block as a whole just before it runs, and empty it after."""
    for name, block in blocks.items():
        block.register_forward_pre_hook(lambda block, _, name=name: lazy.fill(name, block))
        block.register_forward_hook(lambda block, *_, name=name: lazy.empty(name, block))


def off_meta(model):
    return [name for name, value in model.named_parameters(remove_duplicate=False) if not value.is_meta]


@pytest.mark.parametrize("model_type", UNLIKE)
def test_logits_are_those_of_an_ordinary_load(tiny_folder, tiny_source, model_type):
    """Bit for bit, and nothing is left in memory. A tied output layer, merged experts and buffers are among them."""
    source = tiny_source(model_type)
    blocks = blocks_of(source.skeleton)
    lazy = lazy_model(source, apart=blocks)
    fill_blocks(lazy, {name: lazy.model.get_submodule(name) for name in blocks})
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(model_type), dtype=torch.float32).eval()
    arguments = inputs(model)
    with torch.no_grad():
        expected = copy.deepcopy(model)(**arguments).logits
        with lazy.hooked(), lazy.embeddings():
            found = lazy.model(**arguments).logits
    assert torch.equal(found, expected)
    assert off_meta(lazy.model) == []
    assert set(blocks) <= lazy.ran


@pytest.mark.parametrize("name", ["llama_bf16", "llama_fp16", "llama_second_name", "opt_short_names"])
def test_other_dtypes_and_names(model_folder, name):
    """Parameters are float32 while they are there. Here each module gets its own by itself, also in the blocks."""
    source = open_folder(model_folder(name), Hub())
    lazy = lazy_model(source)
    seen = set()
    model = AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = copy.deepcopy(model)(**inputs(model)).logits
        with lazy.hooked():
            for module in lazy.model.modules():
                module.register_forward_pre_hook(lambda m, _: seen.update(p.dtype for p in m.parameters(recurse=False)))
            found = lazy.model(**inputs(model)).logits
    assert seen == {torch.float32}
    assert torch.equal(found, expected)
    assert off_meta(lazy.model) == []


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "hrm_text"])
def test_one_block_is_alive_at_a_time(tiny_source, model_type):
    """Every tensor that was handed over is followed by its storage."""
    source = tiny_source(model_type)
    names = blocks_of(source.skeleton)
    stored = StoredWeights(source, Names(source))
    alive, peaks = [], []

    def living():
        alive[:] = [each for each in alive if not each[1].expired()]
        return {next((block for block in names if name.startswith(f"{block}.")), name) for name, _ in alive}

    def provide(wanted):
        found = {name: value.clone() for name, value in stored(wanted).items()}
        alive.extend((name, StorageWeakRef(value.untyped_storage())) for name, value in found.items())
        peaks.append(living() & set(names))
        return found

    lazy = lazy_model(source, provide, apart=names)
    fill_blocks(lazy, {name: lazy.model.get_submodule(name) for name in names})
    with torch.no_grad(), lazy.hooked(), lazy.embeddings() as forget:
        lazy.model.get_submodule(next(iter(names))).register_forward_pre_hook(lambda *_: forget())
        lazy.model(**inputs(source.skeleton))
        assert living() == set()
    assert {name for peak in peaks for name in peak} == set(names)
    assert max(map(len, peaks)) == 1


def test_keys_are_named_once_whatever_shares_them(model_folder, tiny_source):
    source = tiny_source("hrm_text")
    stored = StoredWeights(source, Names(source))
    block = "model.L_module.layers.0"
    names = [f"{block}.self_attn.{leaf}.weight" for leaf in ("k_proj", "q_proj")]
    assert stored.keys(names) == [f"{block}.attn.gqkv_proj.weight"]
    assert list(stored(names)) == names
    for folder, kept in (("llama_tied", "model.embed_tokens.weight"), ("llama_second_name", "lm_head.weight")):
        source = open_folder(model_folder(folder), Hub())
        stored = StoredWeights(source, Names(source))
        both = ["model.embed_tokens.weight", "lm_head.weight"]
        assert stored.keys(both) == [kept]
        found = stored(both)
        assert list(found) == both
        assert all(models.same(value, source.weights.get(kept)) for value in found.values())


def test_what_the_source_does_not_hold_is_left_out(model_folder):
    source = open_folder(model_folder("llama"), Hub())
    stored = StoredWeights(source, Names(source))
    assert list(stored(["model.norm.weight", "model.rotary_emb.inv_freq"])) == ["model.norm.weight"]


class Toy(nn.Module):
    """A root with a parameter of its own, and a body with another around two layers that are called twice."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.gain = nn.Parameter(torch.empty(4))
            self.body = Body()

    def forward(self, x):
        return self.body(self.body(x)) * self.gain


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.empty(4))
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x + self.shift


def toy(**where):
    asked = []
    toy = Toy()
    shapes = {name: value.shape for name, value in toy.named_parameters()}

    def provide(names):
        asked.append(sorted(names))
        return {name: torch.full(shapes[name], 1.0 + len(name)) for name in names}

    return LazyModel(toy, provide, **where), asked


def test_each_module_asks_for_its_own_each_time_it_runs():
    lazy, asked = toy()
    with torch.no_grad(), lazy.hooked():
        lazy.model(torch.ones(2, 4))
    round_of_the_body = [["body.shift"], ["body.layers.0.weight"], ["body.layers.1.weight"]]
    assert asked == [["gain"], *round_of_the_body, *round_of_the_body]
    assert off_meta(lazy.model) == []
    assert lazy.ran == {"", "body", "body.layers.0", "body.layers.1"}


def test_kept_modules_keep_what_they_have_until_the_end():
    lazy, asked = toy(kept=["body", ""])
    with torch.no_grad(), lazy.hooked():
        lazy.model(torch.ones(2, 4))
        assert off_meta(lazy.model) == ["gain", "body.shift"]
        lazy.model(torch.ones(2, 4))
    assert [names for names in asked if "layers" not in names[0]] == [["gain"], ["body.shift"]]
    assert off_meta(lazy.model) == []


def test_modules_apart_are_the_callers():
    lazy, asked = toy(apart=["body.layers.0"])
    layer = lazy.model.body.layers[0]
    with torch.no_grad(), lazy.hooked():
        lazy.fill("body.layers.0", layer, {"body.layers.0.weight": torch.eye(4, dtype=torch.float64)})
        found = lazy.model(torch.ones(2, 4))
        assert off_meta(lazy.model) == ["body.layers.0.weight"]
        assert torch.equal(layer.weight, torch.eye(4))
        lazy.empty("body.layers.0", layer)
        assert off_meta(lazy.model) == []
    assert ["body.layers.0.weight"] not in asked
    second, shift, gain = (1.0 + len(name) for name in ("body.layers.1.weight", "body.shift", "gain"))
    once = 4 * second + shift
    assert found.tolist() == [[(4 * second * once + shift) * gain] * 4] * 2


def test_a_module_apart_is_not_filled_where_the_caller_does_without():
    lazy, asked = toy(apart=["body.layers.0"])
    lazy.model.body.layers[0].forward = lambda x: x
    with torch.no_grad(), lazy.hooked():
        lazy.model(torch.ones(2, 4))
    assert ["body.layers.0.weight"] not in asked
    assert ["body.layers.1.weight"] in asked


def test_after_an_error_nothing_is_left():
    lazy, _ = toy(kept=["body"])
    before = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in lazy.model.modules()]

    def stumble():
        with torch.no_grad(), lazy.hooked():
            lazy.model(torch.ones(2, 5))

    with pytest.raises(RuntimeError, match="shapes"):
        stumble()
    assert off_meta(lazy.model) == []
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in lazy.model.modules()] == before


def test_embeddings_are_there_until_they_are_taken_away(model_folder):
    source = open_folder(model_folder("llama_tied"), Hub())
    lazy = lazy_model(source)
    table = lazy.model.model.embed_tokens
    with lazy.embeddings() as forget:
        assert torch.equal(table.weight, source.weights.get("model.embed_tokens.weight"))
        assert off_meta(lazy.model) == ["model.embed_tokens.weight"]
        forget()
        assert off_meta(lazy.model) == []
    with lazy.embeddings():
        assert not table.weight.is_meta
    assert off_meta(lazy.model) == []
    with toy()[0].embeddings() as forget:  # a model that has none
        forget()


def test_persistent_buffers_are_filled_with_a_block(tiny_source):
    """DeepSeek's correction bias is a buffer of the router in the checkpoint."""
    source = tiny_source("deepseek_v3")
    lazy = lazy_model(source)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    block = lazy.model.get_submodule("model.layers.1")
    assert not torch.equal(lazy.model.get_buffer(name), source.weights.get(name))
    lazy.fill("model.layers.1", block)
    assert torch.equal(lazy.model.get_buffer(name), source.weights.get(name))
