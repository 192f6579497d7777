"""Compressed tensors in memory, and what quantkit makes of them, for the tests of `quantkit.dequantization`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.checkpoint import Tensors
from quantkit.dequantization import dequantized
from quantkit.errors import CheckpointError
from quantkit.shards import TensorInfo


class Held:
    """Tensors in memory; remembers which were read."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state, self.read = dict(state), list[str]()
        where = Path("model.safetensors")
        self.tensors = {key: TensorInfo(where, tuple(t.shape), t.dtype) for key, t in self.state.items()}
        self.nbytes = sum(info.nbytes for info in self.tensors.values())

    def get(self, name: str) -> Tensor:
        self.read.append(name)
        return self.state[name]


def opened(
    state: Mapping[str, Tensor], stored: Any, dtype: str | None = "float32", **words: Any
) -> tuple[Tensors, dict[str, Any], Held]:
    held = Held(state)
    config = {"model_type": "llama", "quantization_config": stored} | ({} if dtype is None else {"dtype": dtype})
    view, made = dequantized(held, config, "MODEL", **words)
    return view, made, held


def decoded(state: Mapping[str, Tensor], stored: Any, dtype: str | None = "float32", **words: Any) -> dict[str, Tensor]:
    view, _, _ = opened(state, stored, dtype, **words)
    found = {name: view.get(name) for name in view.tensors}
    for name, tensor in found.items():
        assert (tuple(tensor.shape), tensor.dtype) == (view.tensors[name].shape, view.tensors[name].dtype)
        assert tensor.is_contiguous()
    return found


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fp8_codes(*shape: int) -> Tensor:
    """Every finite E4M3 code, over and over."""
    finite = [byte for byte in range(256) if byte & 0x7F != 0x7F]
    count = torch.Size(shape).numel()
    return (
        torch.tensor(finite, dtype=torch.uint8).repeat(-(-count // 254))[:count].view(shape).view(torch.float8_e4m3fn)
    )


def refused(state: Mapping[str, Tensor], stored: Any, *words: str, dtype: str | None = "float32") -> None:
    """It raises a CheckpointError of one sentence that names the model, holds the words and gives the remedy."""
    with pytest.raises(CheckpointError) as caught:
        decoded(state, stored, dtype)
    text = str(caught.value)
    assert "MODEL" in text
    assert "\n" not in text
    for word in words:
        assert word in text, text
    assert "give the float model" in text or "config.json" in text, text
