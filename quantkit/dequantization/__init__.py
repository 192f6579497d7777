"""Compressed checkpoints as float ones, a tensor at a time: what `--dequantize` reads.

A kind is a module with a DESCRIPTION and `plan(source) -> Plan`, which says from names, shapes and config.json what
every float tensor is made of; nothing is decoded before it is asked for. One more is a file and a line in `_MODULES`.
"""

import copy
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

import torch

from quantkit.dequantization import bitsandbytes, compressed, fp8, mxfp4, native
from quantkit.dequantization.base import FloatView, Plan, Source, Tensors
from quantkit.errors import CheckpointError

_MODULES: dict[str, ModuleType] = {
    "fp8": fp8,
    "mxfp4": mxfp4,
    "compressed-tensors": compressed,
    "bitsandbytes": bitsandbytes,
    "quantkit": native,
}
KINDS: dict[str, str] = {method: module.DESCRIPTION for method, module in _MODULES.items()}
"""What every quant_method that can be dequantized is, for messages."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KEYS = ("quantization_config", "compression_config")

__all__ = ["KINDS", "Tensors", "dequantized"]


def dequantized(
    weights: Tensors,
    config: dict[str, Any],
    name: str,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    transposed: Collection[str] = (),
) -> tuple[Tensors, dict[str, Any]]:
    """The float checkpoint that a compressed one stands for: its tensors, not yet decoded, and its config.

    `get` of a compressed weight reads its codes and what scales them, computes in float32 and rounds once to the
    config's dtype (bfloat16 where it names none); other tensors come as they are stored. Only tensors of a few numbers
    that say shapes are read here.

    Args:
        weights: the compressed checkpoint.
        config: its config.json; not changed.
        name: what the user called it.
        shapes: float shapes by checkpoint name, for what the files leave open: rows of quantkit's own format that 4
            doesn't divide.
        transposed: checkpoint names of float weights that are [K, N] (GPT-2's); files don't say which they are.

    Raises:
        CheckpointError: it isn't compressed, or in a way that isn't decoded here, or tensors are missing or don't fit.
    """
    stored = _stored(config)
    if stored is None:
        raise CheckpointError(f"{name} is not compressed; leave --dequantize out")
    method = stored.get("quant_method") if isinstance(stored, Mapping) else stored
    if method is None and isinstance(stored, Mapping) and (stored.get("load_in_8bit") or stored.get("load_in_4bit")):
        method = "bitsandbytes"  # before transformers wrote the method
    if not isinstance(stored, Mapping) or not isinstance(method, str) or method not in _MODULES:
        raise CheckpointError(
            f"{name} is compressed as {method!r}, which cannot be dequantized (it is possible for "
            f"{', '.join(KINDS)}); give the float model that it was made from"
        )
    source = Source(weights, stored, name, shapes or {}, transposed)
    plan: Plan = _MODULES[method].plan(source)
    if not plan.parts:
        raise CheckpointError(
            f"{name} says that it is compressed as {method!r}, and no tensor of it is; "
            "take quantization_config out of its config.json"
        )
    return FloatView(source, plan, _dtype(config, name)), _without(config)


def _holders(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config, and the one of its language model where it is nested."""
    nested = config.get("text_config")
    return [config, *([nested] if isinstance(nested, Mapping) else [])]


def _stored(config: Mapping[str, Any]) -> Any:
    """What the config says of compression, or None."""
    return next((holder[key] for holder in _holders(config) for key in _KEYS if holder.get(key)), None)


def _without(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of the config that says nothing of compression."""
    made = copy.deepcopy(config)
    for holder in (made, made.get("text_config")):
        if isinstance(holder, dict):
            for key in _KEYS:
                holder.pop(key, None)
    return made


def _dtype(config: Mapping[str, Any], name: str) -> torch.dtype:
    """The dtype of the float weights."""
    said = next(
        (holder[key] for holder in _holders(config) for key in ("dtype", "torch_dtype") if holder.get(key)), None
    )
    if said is None:
        return torch.bfloat16
    short = str(said).removeprefix("torch.")
    if short not in _DTYPES:
        raise CheckpointError(f"dtype of {name}'s config.json is {said!r}; write one of {', '.join(_DTYPES)} there")
    return _DTYPES[short]
