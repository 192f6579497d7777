"""What vLLM's CPU build refuses of what we write, and in which words: docs/serving.md has the same list.

Each was tried on a processor without AMX, where FP8 has fewer kernels. When a newer vLLM serves one of them, its test
fails: move it to `SCHEMES` and mend the list.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving_models import build, compress
from vllm_process import Ours, Refused, Vllm

from quantkit import quantize
from quantkit.servers import check

pytestmark = pytest.mark.serving

WHOLE_BLOCKS = {"num_key_value_heads": 4}
"""Every linear layer has out features that 128 divides."""
SMALL_HEADS = {"num_attention_heads": 8, "head_dim": 16}
NO_WORD = "No compressed-tensors compatible scheme was found"
NO_KERNEL = "Failed to find a kernel that can implement the"
UNKNOWN = "Unknown quantization method:"

REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "int8 weights only": ("llama", {}, "int8", "Quant type (uint8b128) not supported by CPUWNA16"),
    "int8 weights only, groups": ("llama", {}, "int8:group=128", "Quant type (uint8b128) not supported by CPUWNA16"),
    "int8 activations per tensor, dynamic": ("llama", {}, "w8a8:activation=tensor", NO_WORD),
    "fp8 static": ("llama", {}, "fp8:scheme=static", "static_scaled_fp8_quant() expected at most 0 argument(s)"),
    "fp8 weights only": ("llama", {}, "fp8:scheme=weight-only", f"{NO_KERNEL} ScaledMM linear layer"),
    "fp8 blocks that don't divide": ("llama", {}, "fp8:scheme=block", "is not divisible by weight quantization block"),
    "fp8 blocks": ("llama", WHOLE_BLOCKS, "fp8:scheme=block", NO_KERNEL),
    "bitsandbytes": ("llama", {}, "llm-int8", f"{UNKNOWN} bitsandbytes"),
    "quantkit's own": ("llama", {}, "fp8:dtype=e5m2", f"{UNKNOWN} quantkit"),
    "int8 experts": ("mixtral", {}, "w8a8", "No Int8 MoE backend supports the deployment configuration"),
    "fp8 experts": ("mixtral", {}, "fp8", "Unsupported FP8 MoE backend: NONE"),
    "heads of 16": ("llama", SMALL_HEADS, "w8a8", "Unsupported CPU attention configuration: head_dim=16"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusal_is_the_one_that_the_docs_list(vllm: Vllm, tmp_path: Path, what: str) -> None:
    name, changes, step, message = REFUSED[what]
    compressed = compress(build(name, tmp_path / "model", **changes), tmp_path, [step])
    with pytest.raises(Refused) as refusal:
        vllm.serve(compressed, "bfloat16")
    assert message in str(refusal.value)
    assert check(compressed, "vllm", "cpu").state == "refused", "`inspect --for vllm` says otherwise"


def test_experts_left_in_float_are_served(
    vllm: Vllm, ours: Ours, float_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """The remedy for experts: everything else in int8."""
    base, output = float_model("mixtral"), tmp_path / "output"
    quantize(base, output, steps=["w8a8"], ignore=["*.experts*"], progress=False)
    found = ours.agreement(vllm.serve(output), output, base, "float32")
    assert found.is_exact, found
