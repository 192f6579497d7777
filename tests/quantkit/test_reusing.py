"""Neurons of the last tokens for the next ones: as a plain loop says, the same in one pass, off unless asked for."""

import copy

import pytest
import torch

import quantkit
from quantkit import skipping
from quantkit.errors import QuantkitError
from quantkit.generation import complete
from quantkit.skipping import reusing


def loop(active, run):
    """Return what `kept_of` says of one text [M, K], token by token."""
    kept = torch.ones_like(active)
    for place in range(len(active)):
        number, begin = place // run, place // run * run
        if number % 2 == 1:
            kept[place] = torch.stack([active[each] for each in range(begin - run, begin)]).any(0)
    return kept


@pytest.mark.parametrize("run", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("length", [1, 6, 20])
def test_kept_neurons_are_those_of_the_run_before(run, length):
    active = torch.rand(2, length, 13, generator=torch.Generator().manual_seed(0)) < 0.2
    expected = torch.stack([loop(each, run) for each in active])
    assert torch.equal(reusing.kept_of(active, run), expected)


@pytest.fixture(scope="module")
def models(data, tmp_path_factory):
    """An OPT with relu between two layers, a Llama with relu in gated MLPs, and its int8 copy."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("relu")
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=65, hidden_act="relu", **sizes)).save_pretrained(folder / "float")
    quantkit.quantize(folder / "float", folder / "int8", steps=["int8"], progress=False)
    quantkit.quantize(folder / "float", folder / "w8a8", steps=["w8a8"], progress=False)
    return {
        "opt": data / "models" / "tensorforge-charopt",
        **{name: folder / name for name in ("float", "int8", "w8a8")},
    }


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(
    ("name", "run"), [("opt", 3), ("opt", 4), ("float", 1), ("float", 4), ("int8", 3), ("w8a8", 3)]
)
def test_token_by_token_it_is_what_one_pass_gives(models, name, run, skips):
    model = quantkit.load(models[name])
    ids = torch.randint(65, (1, 26), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        plain = model(input_ids=ids, use_cache=False).logits
        with reusing.as_if_reused(model, run) as expected_share:
            expected = model(input_ids=ids, use_cache=False).logits
        if skips:
            skipping.skip_zeros(model)
        with reusing.reusing(model, run) as share:
            out = model(input_ids=ids[:, :run], use_cache=True)
            found = [out.logits]
            for place in range(run, 26):
                out = model(input_ids=ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
                found.append(out.logits)
        after = model(input_ids=ids, use_cache=False).logits
    size = expected.abs().max()
    # int8 activations: a sum in another order can move an activation to the next code
    assert (torch.cat(found, 1) - expected).abs().max() <= (0.02 if name == "w8a8" else 1e-5) * size
    assert (plain - expected).abs().max() > 0.02 * size, "reuse must change something here"
    assert (after - plain).abs().max() <= 1e-5 * size, "and nothing afterwards"
    assert share.tokens == expected_share.tokens > 0
    assert abs(share.share - expected_share.share) < 1e-2
    assert share.share < 0.95


def test_weights_of_other_neurons_are_not_read(models):
    """NaN in them while neurons are reused: neither layer's reach the output."""
    model = quantkit.load(models["float"], skip_zeros=True)
    ids = torch.randint(65, (1, 12), generator=torch.Generator().manual_seed(2))
    mlp = model.model.layers[1].mlp
    with torch.inference_mode(), reusing.reusing(model, 4):
        active = []
        hook = mlp.down_proj.register_forward_pre_hook(lambda module, args: active.append((args[0] != 0)[0]))
        out = model(input_ids=ids[:, :8], use_cache=True)
        others = ~active[0][-4:].any(0)
        assert 0 < int(others.sum()) < 100
        expected = copy.deepcopy(out.past_key_values)
        plain = [_step(model, ids[:, place], expected) for place in range(8, 12)]
        # once more from the prompt on, with NaN where nothing may be read
        out = model(input_ids=ids[:, :8], use_cache=True)
        for layer in (mlp.gate_proj, mlp.up_proj):
            layer.weight[others] = torch.nan
        mlp.down_proj.weight[:, others] = torch.nan
        found = [_step(model, ids[:, place], out.past_key_values) for place in range(8, 12)]
        hook.remove()
    assert torch.equal(torch.stack(found), torch.stack(plain))


def test_another_prompt_begins_anew(models):
    model = quantkit.load(models["float"])
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randint(65, (1, 12), generator=generator) for _ in range(2))

    def read(ids, tokens):
        out = model(input_ids=ids[:, :4], use_cache=True)
        return torch.stack([_step(model, ids[:, place], out.past_key_values) for place in range(4, 4 + tokens)])

    with torch.inference_mode():
        with reusing.reusing(model, 4):
            expected = read(second, 8)
        with reusing.reusing(model, 4):
            read(first, 2)  # in the middle of a run
            assert torch.equal(read(second, 8), expected)


def _step(model, token, cache):
    return model(input_ids=token[:, None], past_key_values=cache, use_cache=True).logits[0, -1]


def test_off_by_default_and_told(models, cli):
    words = ("generate", str(models["opt"]), "--prompt", "ROMEO:", "--max-new-tokens", "24", "--device", "cpu")
    plain, zero, reused = cli(*words), cli(*words, "--reuse-neurons", "0"), cli(*words, "--reuse-neurons", "4")
    assert plain.stdout == zero.stdout != reused.stdout
    assert plain.stderr == zero.stderr == ""
    assert reused.stderr.startswith("reused neurons: ")
    assert reused.stderr.strip().endswith("% of all, in every second run of 4 tokens")


def test_what_cannot_be_is_refused(models, model_folder):
    with pytest.raises(QuantkitError, match="reuse_neurons is -1: expected a number of tokens from 1"):
        complete(models["opt"], "a", reuse_neurons=-1)
    model = quantkit.load(model_folder("llama"))
    for context in (reusing.reusing, reusing.as_if_reused):
        with pytest.raises(QuantkitError, match="there are no inactive neurons"), context(model, 4):
            pass
        with pytest.raises(QuantkitError, match="reuse_neurons is 0"), context(model, 0):
            pass
