"""torch.compile sees packed layers: one graph, the bits of eager, and nothing is compiled anew from token to token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from schemes import SCHEMES
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from quantkit import formats
from quantkit.loading import load
from quantkit.modules import QuantizedLinear, quantize_linear

PROMPT, STEPS = 8, 6
N, K = 136, 256
RECIPES = ("w8a8", "w8a8-static", "int4", "fp8-block", "fp8-e5m2-weight-only", "llm-int8")
"""One for each op."""


def compiled(model: torch.nn.Module, backend: str = "eager") -> Any:
    """The model compiled anew, as one graph or not at all; `counters` begin at zero."""
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, backend=backend, fullgraph=True)


def layer(
    name: str, dtype: torch.dtype, form: str = "auto", *, bias: bool = True, transposed: bool = False
) -> QuantizedLinear:
    """A layer of a scheme with random weights."""
    scheme = SCHEMES[name]
    layout = formats.choose(scheme, form)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(dtype)
    made = QuantizedLinear(K, N, scheme, layout, bias=bias, dtype=dtype, transposed=transposed)
    input_scale = torch.tensor([0.02]) if scheme.is_static else None
    for key, tensor in layout.compress(scheme, *quantize_linear(weight, scheme), input_scale, transposed).items():
        made.get_buffer(key).copy_(tensor)
    if made.bias is not None:
        made.bias.data = weight[:, 0]
    return made


def graphs() -> int:
    """How many graphs were made since."""
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("form", ["auto", "quantkit"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_layer_is_one_graph_for_any_number_of_tokens(name, form):
    """`mark_dynamic` raises where code would depend on the number of tokens."""
    made = layer(name, torch.bfloat16, form)
    run = compiled(made)
    for tokens in (5, 2, 17, 64):
        x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            assert torch.equal(run(x), made(x))
    assert graphs() == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_layer_without_tokens_or_bias_compiles(bias, transposed):
    made = layer("w8a8", torch.float32, bias=bias, transposed=transposed)
    run = compiled(made, "aot_eager")
    with torch.no_grad():
        for shape in ((0, K), (2, 0, K), (1, 1, K), (K,)):
            x = torch.randn(shape)
            assert run(x).shape == (*shape[:-1], N)
            assert torch.equal(run(x), made(x))


def one_block(folder: Path) -> Any:
    """The model with one block alone, and plain attention: the bits of sdpa depend on how it is called."""
    model = load(folder)
    model.set_attn_implementation("eager")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


def tokens_of(run: Any, model: Any, kind: str) -> tuple[list[int], torch.Tensor]:
    """How many graphs there are after the prompt and after each step, and the steps' logits."""
    size = PROMPT + STEPS
    static = kind == "static"
    cache = StaticCache(config=model.config, max_cache_len=size) if static else DynamicCache(config=model.config)
    ids = torch.arange(size)[None]
    made, logits = [], []
    with torch.no_grad():
        for start, stop in [(0, PROMPT), *((place, place + 1) for place in range(PROMPT, size))]:
            place = torch.arange(start, stop)
            found = run(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, cache_position=place)
            made.append(graphs())
            logits.append(found.logits[:, -1])
    return made, torch.stack(logits)


@pytest.mark.parametrize(("recipe", "kind"), [*((each, "static") for each in RECIPES), ("w8a8", "dynamic")])
def test_a_model_is_compiled_for_the_prompt_and_for_a_step_and_never_again(compressed, recipe, kind):
    """A cache that grows costs one graph more: at its second step torch learns that a size isn't fixed."""
    model = one_block(compressed(recipe))
    expected = tokens_of(model, model, kind)[1]
    made, logits = tokens_of(compiled(model), model, kind)
    assert made == [1, *[2] * STEPS] if kind == "static" else [1, 2, *[3] * (STEPS - 1)]
    assert torch.equal(logits, expected)


def test_a_graph_more_would_be_seen(compressed):
    model = one_block(compressed("w8a8"))
    run = compiled(model)
    before = tokens_of(run, model, "static")[0][-1]
    layers = [module for module in model.modules() if hasattr(module, "backend_in_use")]
    layers[0].backend = "torch"
    assert tokens_of(run, model, "static")[0][-1] > before
