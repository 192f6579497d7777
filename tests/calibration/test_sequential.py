"""Blocks driven by the model's own forward pass: what they are called with, what comes out, what goes wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import gpt2_model, llama_model, randomized
from quantkit_calibration.sequential import Calls, OrderError, block_order, run_blocks
from torch import nn
from toy_blocks import Toy, inputs, run_toy
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
SLIDING = ["sliding_attention", "full_attention"] * 2


def gemma2() -> PreTrainedModel:
    return randomized(Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=4, layer_types=SLIDING)))


def gemma3() -> PreTrainedModel:
    return randomized(Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=4, layer_types=SLIDING)))


def mixtral() -> PreTrainedModel:
    return randomized(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)))


def mamba() -> PreTrainedModel:
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4}
    return randomized(MambaForCausalLM(MambaConfig(**sizes)))


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "llama": (lambda: llama_model(num_hidden_layers=3), "model.layers"),
    "gpt2": (gpt2_model, "transformer.h"),
    "gemma2": (gemma2, "model.layers"),
    "gemma3": (gemma3, "model.layers"),
    "mixtral": (mixtral, "model.layers"),
    "mamba": (mamba, "backbone.layers"),
}


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, list[nn.Module]]:
    build, path = MODELS[request.param]
    model = build()
    return model, list(model.get_submodule(path))


def some_batches(count: int = 3, length: int = 12) -> list[dict[str, Any]]:
    """Batches of several lengths and sizes, some padded on the left."""
    generator = torch.Generator().manual_seed(1)
    batches: list[dict[str, Any]] = []
    for number in range(count):
        ids = torch.randint(0, 100, (2 + number % 2, length - number % 3), generator=generator)
        batches.append({"input_ids": ids, "use_cache": False})
        if number % 2:
            mask = torch.ones_like(ids)
            mask[0, :3] = 0
            batches[-1]["attention_mask"] = mask
    return batches


def flat(value: Any) -> list[Any]:
    """The value's leaves, in order, tensors as they are."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in [key, *flat(value[key])]]
    if isinstance(value, (tuple, list)):
        return [type(value), *(leaf for item in value for leaf in flat(item))]
    return [value]


def assert_same(one: Any, other: Any) -> None:
    """Raises unless both are the same structure of the same values, tensors bit by bit."""
    for a, b in zip(flat(one), flat(other), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        else:
            assert a == b


def plain(model: nn.Module, blocks: list[nn.Module], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """What hooks see in an ordinary forward pass: each block's (args, kwargs, output); and the model's result."""
    seen: list[Any] = []

    def note(module: nn.Module, args: Any, words: dict[str, Any], output: Any) -> None:
        seen.append((args, words, output))

    handles = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        result = model(**kwargs)
    for handle in handles:
        handle.remove()
    return seen, result


# The same as an ordinary forward pass


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("way", ["outputs are set", "the block is returned"])
def test_every_block_sees_what_it_sees_in_an_ordinary_pass(
    made: tuple[PreTrainedModel, list[nn.Module]], way: str, count: int
) -> None:
    model, blocks = made
    batches = some_batches(count)
    expected = [plain(model, blocks, kwargs) for kwargs in batches]
    visited = []

    def visit(index: int, calls: Calls) -> nn.Module | None:
        visited.append(index)
        assert (len(calls), calls.number, calls.last) == (count, 0, False)
        for call, (seen, _) in zip(calls, expected, strict=True):
            args, kwargs, output = seen[index]
            assert_same((call.args, call.kwargs), (args, kwargs))
            with torch.no_grad():
                found = blocks[index](*call.args, **call.kwargs)
            assert_same(found, output)
            if way == "outputs are set":
                call.output = found
        return None if way == "outputs are set" else blocks[index]

    results: dict[int, Any] = {}
    with torch.no_grad():
        run_blocks(model, blocks, batches, visit, finish=results.__setitem__)
    assert visited == list(range(len(blocks)))
    assert list(results) == list(range(count))
    for number, (_, result) in enumerate(expected):
        assert torch.equal(results[number].logits, result.logits)


def test_kwargs_that_differ_from_layer_to_layer_differ() -> None:
    """What the test above compares isn't the same in every layer: Gemma 2's masks have another window."""
    model = gemma2()
    seen, _ = plain(model, list(model.model.layers), some_batches(2)[1])
    masks = [kwargs["attention_mask"] for _, kwargs, _ in seen]
    assert not torch.equal(masks[0], masks[1])


def test_changes_to_a_block_reach_those_behind_it() -> None:
    model, changed = llama_model(num_hidden_layers=3), llama_model(num_hidden_layers=3)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight *= 2
    kwargs = some_batches(1)[0]
    seen, result = plain(changed, list(changed.model.layers), kwargs)
    outputs, results = [], []

    def visit(index: int, calls: Calls) -> None:
        block = model.model.layers[index]
        with torch.no_grad():
            if index == 1:
                block.mlp.down_proj.weight *= 2
            calls[0].output = block(*calls[0].args, **calls[0].kwargs)
        outputs.append(calls[0].output)

    run_blocks(model, list(model.model.layers), [kwargs], visit, finish=lambda _, got: results.append(got.logits))
    assert_same(outputs, [output for _, _, output in seen])
    assert torch.equal(results[0], result.logits)


def test_nothing_runs_after_the_last_block_unless_asked_for() -> None:
    toy = Toy([0, 1, 2])
    assert run_toy(toy) == [(0, 0, False), (1, 0, False), (2, 0, True)]
    assert toy.heads == 0
    results = []
    assert run_toy(toy, finish=lambda number, result: results.append((number, result.shape))) == [
        (0, 0, False),
        (1, 0, False),
        (2, 0, False),
    ]
    assert results == [(0, (3, 2)), (1, (3, 2))]
    assert toy.heads == 2


def test_blocks_are_visited_in_the_model_s_own_order() -> None:
    assert [index for index, *_ in run_toy(Toy([2, 0, 1]))] == [2, 0, 1]


def test_a_model_that_loops_is_served_in_the_order_that_is_given() -> None:
    toy = Toy([0, 1, 0, 1, 2, 0])
    order = block_order(toy, list(toy.blocks), inputs()[0])
    assert order == [0, 1, 0, 1, 2, 0]
    assert not any(block._forward_pre_hooks for block in toy.blocks)
    visits = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (0, 2)]
    assert [(index, number) for index, number, _ in run_toy(toy, order=order)] == visits
    results: dict[int, torch.Tensor] = {}
    run_toy(toy, order=order, finish=results.__setitem__)
    for number, kwargs in enumerate(inputs()):
        assert torch.equal(results[number], toy(**kwargs))


# Orders that don't fit


@pytest.mark.parametrize(
    ("told", "options", "message"),
    [
        ([0, 2], {}, r"batch 0 ended after 2 calls of blocks without calling block 1: expected 3 calls"),
        ([], {}, r"batch 0 ended after 0 calls of blocks without calling block 0"),
        ([0, 1, 1, 2], {}, r"batch 0 calls block 1 again before all blocks were called"),
        ([0, 1, 2, 0], {"finish": print}, r"batch 0 calls block 0 after the last call that was expected"),
        ([0, 1, 2], {"order": [0, 2, 1]}, r"batch 0 calls block 1 where, as order says, block 2 was expected"),
        ([0, 1, 2], {"order": [0, 1, 2, 0]}, r"batch 0 ended after 3 calls of blocks without calling block 0"),
        (lambda x: [0, 1, 2] if x[0, 0] else [0, 2, 1], {}, r"batch 1 calls block 1 where block 2 was expected"),
        (lambda x: [1, 2] if x[0, 0] == 1 else [0, 1, 2], {}, r"batch 1 calls block 1 where block 0 was expected"),
    ],
)
def test_an_order_that_does_not_fit_is_an_error(told: Any, options: dict[str, Any], message: str) -> None:
    """The last two orders depend on the input: batch 0 is zeros, batch 1 ones."""
    toy = Toy(told)
    with pytest.raises(OrderError, match=message):
        run_toy(toy, **options)
    assert not any("forward" in block.__dict__ for block in toy.blocks)


def test_layer_drop_is_an_error() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"vocab_size": 100, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_attention_heads": 2}
    model = OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=3, layerdrop=1.0)).train()
    blocks = list(model.model.decoder.layers)
    with pytest.raises(OrderError, match="without calling block 0"):
        run_blocks(model, blocks, some_batches(), lambda index, calls: blocks[index])


@pytest.mark.parametrize(
    ("blocks", "batches", "order", "message"),
    [
        ([], 1, None, "0 blocks and 1 batches"),
        ([0], 0, None, "1 blocks and 0 batches"),
        ([0, 1, 0], 1, None, "block 2 is the same module as block 0"),
        ([0, 1], 1, [0, 0], r"order has the blocks \[0\]: expected each of 0 to 1"),
        ([0, 1], 1, [0, 1, 2], r"order has the blocks \[0, 1, 2\]"),
    ],
)
def test_wrong_use_is_a_value_error(blocks: list[int], batches: int, order: Any, message: str) -> None:
    toy = Toy([0, 1, 2])
    with pytest.raises(ValueError, match=message):
        run_blocks(
            toy, [toy.blocks[i] for i in blocks], inputs(batches), lambda index, calls: toy.blocks[index], order=order
        )


def test_an_output_that_is_not_set_is_a_value_error() -> None:
    toy = Toy([0, 1, 2])

    def visit(index: int, calls: Calls) -> None:
        calls[0].output = calls[0].args[0]

    with pytest.raises(ValueError, match="visit set no output for batch 1"):
        run_blocks(toy, list(toy.blocks), inputs(), visit)
