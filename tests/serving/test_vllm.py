"""vLLM's CPU build serves what we write, and predicts what we predict. `agreement.py` says what that means.

Behind a marker and in an environment of its own (docs/serving.md):

    QUANTKIT_VLLM_PYTHON=path/bin/python QUANTKIT_DATA=DIR python -m pytest tests/serving -m serving
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from agreement import EXACT
from serving_models import BREAKAGES, MODELS, SCHEMES, broken
from vllm_process import Ours, Vllm

from quantkit.servers import check

pytestmark = pytest.mark.serving

Checkpoint = Callable[..., Path]
Model = Callable[[str], Path]


@pytest.mark.parametrize("name", MODELS)
def test_float_model_is_the_same_model_there(vllm: Vllm, ours: Ours, float_model: Model, name: str) -> None:
    """The yardstick itself: without quantization nothing but the order of sums may differ."""
    base = float_model(name)
    found = ours.agreement(vllm.serve(base), base, base, "float32")
    assert found.is_exact, found
    assert found.moved == 0, found


def test_smoothed_float_model_is_served(vllm: Vllm, ours: Ours, checkpoint: Checkpoint) -> None:
    """SmoothQuant alone gives an ordinary checkpoint."""
    smoothed = checkpoint("llama", "smoothquant")
    found = ours.agreement(vllm.serve(smoothed), smoothed, smoothed, "float32")
    assert found.is_exact, found
    assert found.moved == 0, found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_float32_predictions_are_ours(
    vllm: Vllm, ours: Ours, float_model: Model, checkpoint: Checkpoint, name: str, scheme: str
) -> None:
    base, compressed = float_model(name), checkpoint(name, *SCHEMES[scheme])
    served = vllm.serve(compressed)
    found = ours.agreement(served, compressed, base, "float32")
    assert found.is_exact, found
    assert check(compressed, "vllm", "cpu").state == "served"
    # What it generates is what we would: where no code flips, its token is our own first choice.
    assert float(ours.regret(served, compressed, "float32").quantile(0.25)) <= EXACT


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_predictions_are_ours_but_for_rounding(
    vllm: Vllm, ours: Ours, float_model: Model, checkpoint: Checkpoint, name: str, scheme: str
) -> None:
    base, compressed = float_model(name), checkpoint(name, *SCHEMES[scheme])
    served = vllm.serve(compressed, "bfloat16")
    found = ours.agreement(served, compressed, base, "bfloat16")
    assert found.is_explained, found


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
def test_weights_that_lie_in_by_out_are_read_so(
    vllm: Vllm, ours: Ours, float_model: Model, checkpoint: Checkpoint, scheme: str
) -> None:
    """GPT-2 in compressed-tensors: codes lie as its float weights do, which the server's loader must know."""
    base, compressed = float_model("gpt2"), checkpoint("gpt2", scheme, form="compressed-tensors")
    found = ours.agreement(vllm.serve(compressed), compressed, base, "float32")
    assert found.is_exact, found


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
@pytest.mark.parametrize("how", BREAKAGES)
def test_broken_checkpoint_is_found_out(
    vllm: Vllm, ours: Ours, float_model: Model, checkpoint: Checkpoint, tmp_path: Path, how: str, scheme: str
) -> None:
    """The rule for float32 can fail: the server gets a copy with one thing wrong, we keep the right one."""
    base, compressed = float_model("llama"), checkpoint("llama", *SCHEMES[scheme])
    served = vllm.serve(broken(compressed, tmp_path / "broken", how))
    found = ours.agreement(served, compressed, base, "float32")
    assert not found.is_exact, found
