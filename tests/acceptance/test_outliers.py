"""What the papers claim of outlier channels, on copies of real models that have the same function and such channels.

The claims: one scale for all activations fails where a few channels are large (LLM.int8, arXiv:2208.07339, section 3;
SmoothQuant, arXiv:2211.10438, section 3); SmoothQuant moves them into the weights, where they do no harm; LLM.int8
multiplies them in float. bitsandbytes' format keeps no column of the weight in float, so that columns that are small
beside their row's largest number are lost to int8 rounding there, with or without outliers in the activations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import outliers
import pytest
import torch

import quantkit
from quantkit.demo import model_path
from quantkit.hf import quantized_layers
from quantkit.inspection import inspect_checkpoint

IDS = torch.randint(32, 250, (2, 48), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    """A real model, its copy with outliers, what was chosen there, and what each recipe lost on the copy."""

    model: Path
    copy: Path
    chosen: dict[str, dict[int, float]]
    lost: dict[str, dict[str, Any]]
    folder: Path

    def ratio(self, name: str, other: str | None = None) -> float:
        """The perplexity under a recipe over that under another, or over the float model's."""
        result = self.lost[name]
        return float(
            result["perplexity"] / (self.lost[other]["perplexity"] if other else result["baseline_perplexity"])
        )


@pytest.fixture(scope="module", params=["demo", "stories3M", "TinyStories-656K"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The demo model on its own text; stories3M and TinyStories-656K on stories."""
    folder = tmp_path_factory.mktemp(request.param)
    model, text, calibration = model_path(), "demo", "demo"
    if request.param != "demo":
        data = request.getfixturevalue("data")
        model = data / "models" / request.param
        text, calibration = str(folder / "text.txt"), str(folder / "calibration.txt")
        for path, source in ((text, "tinystories_val"), (calibration, "tinystories_train_sample_2M")):
            whole = (data / f"text/tinystories/{source}.txt").read_text(encoding="utf-8")
            Path(path).write_text(whole[:60_000], encoding="utf-8")
    chosen = outliers.outlier_copy(model, folder / "copy")
    lost = outliers.losses(folder / "copy", text, calibration, folder, max_tokens=4096)
    return Case(model, folder / "copy", chosen, lost, folder)


def test_the_copy_computes_the_same_bits(case: Case) -> None:
    with torch.no_grad():
        one, other = (quantkit.load(folder)(IDS).logits for folder in (case.model, case.copy))
    assert torch.equal(one, other)


def test_the_copy_has_outliers_where_they_were_put(case: Case) -> None:
    """Behind each norm the chosen channels are as many times as large as the model's own, to the bit, and no other."""
    largest = []
    for folder in (case.model, case.copy):
        model, seen = quantkit.load(folder), {}
        for name in case.chosen:
            norm = model.get_submodule(name.removesuffix(".weight"))
            norm.register_forward_hook(
                lambda *run, name=name, seen=seen: seen.update({name: run[2].abs().amax((0, 1))})
            )
        with torch.no_grad():
            model(IDS)
        largest.append(seen)
    for name, factors in case.chosen.items():
        times = torch.ones(largest[0][name].shape[0], dtype=largest[0][name].dtype)
        for channel, factor in factors.items():
            times[channel] = factor
        assert torch.equal(largest[1][name], largest[0][name] * times)


def test_one_static_scale_fails(case: Case) -> None:
    assert case.ratio("w8a8, one static scale") > 2


def test_a_scale_a_token_is_not_enough(case: Case) -> None:
    """Dynamic scales by token lose less, and still many times what SmoothQuant or LLM.int8 lose."""
    assert case.ratio("w8a8, a scale a token") > 1.05
    assert case.ratio("w8a8, a scale a token") < case.ratio("w8a8, one static scale")


def test_smoothquant_makes_activations_easy(case: Case) -> None:
    assert case.ratio("smoothquant + w8a8, a scale a token") < 1.01


def test_llm_int8_in_bitsandbytes_format_loses_what_its_int8_weights_lose(case: Case) -> None:
    name = "llm-int8 in bitsandbytes' format"
    assert case.lost[name]["format"] == "bitsandbytes"
    assert case.ratio(name, "int8 weights only") == pytest.approx(1, abs=0.01)


def test_llm_int8_with_outlier_columns_in_float_loses_next_to_nothing(case: Case) -> None:
    name = "llm-int8, outlier columns in float"
    assert case.lost[name]["format"] == "quantkit"
    assert case.ratio(name) < 1.01
    assert case.lost[name]["kl_mean"] < case.lost["llm-int8 in bitsandbytes' format"]["kl_mean"] / 2


def test_the_columns_in_float_are_the_outliers_and_the_model_is_sound(case: Case) -> None:
    """Every channel that was made an outlier is kept by each layer that reads it."""
    folder = case.folder / str(list(outliers.RECIPES).index("llm-int8, outlier columns in float"))
    assert inspect_checkpoint(folder).problems == []
    layers = dict(quantized_layers(quantkit.load(folder)))
    for name, factors in case.chosen.items():
        block, attention = name.rsplit(".", 2)[0], "input_layernorm" in name
        for leaf in ("self_attn.q_proj", "self_attn.v_proj") if attention else ("mlp.gate_proj", "mlp.up_proj"):
            assert set(factors) <= set(layers[f"{block}.{leaf}"].get_buffer("outlier_columns").tolist())


@pytest.mark.parametrize("name", ["gpt2", "opt", "mixtral", "llama_bf16"])
def test_other_architectures_get_outliers_too(name: str, tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
    """Norms with biases, Conv1D layers, experts and their router, bfloat16: the logits stay, to the bit."""
    chosen = outliers.outlier_copy(model_folder(name), tmp_path / "copy", channels=2)
    assert len(chosen) == 4
    with torch.no_grad():
        one, other = (quantkit.load(folder)(IDS).logits for folder in (model_folder(name), tmp_path / "copy"))
    assert torch.equal(one, other)
    before, after = models.read_tensors(model_folder(name)), models.read_tensors(tmp_path / "copy")
    assert sum(not torch.equal(before[key], after[key]) for key in before) > len(chosen)
