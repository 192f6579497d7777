"""The compressed-tensors format, which vLLM, SGLang and transformers load. Written and read without its package.

| scheme | its format name | tensors of a linear layer |
| --- | --- | --- |
| int8, activations per token | int-quantized | `weight` int8 [N, K], `weight_scale` [N, 1] |
| E4M3, activations per token | float-quantized | `weight` float8_e4m3fn [N, K], `weight_scale` [N, 1] |
| E4M3 weights only | naive-quantized | as above |
| int8 weights only | pack-quantized | `weight_packed` int32 [N, K/4], `weight_scale` [N, G], `weight_shape` int64 [2] |

Scales have the dtype of the weight that they replace. A packed element is q + 128, element 0 in the lowest bits. The
layout follows compressed-tensors 0.20.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from quantkit_kernels.formats import pack_int32, unpack_int32

from quantkit.errors import CheckpointError, RecipeError
from quantkit.formats.base import Group, Layout, TensorSpec, checked_targets
from quantkit.scheme import Scheme

NAME = "compressed-tensors"
VERSION = "0.20.0"


def reason_against(scheme: Scheme) -> str | None:
    """Why this format can't say the scheme, or None."""
    if scheme.weight_dtype == "float8_e5m2":
        return "its FP8 is E4M3 only, and the recipe asks for E5M2"
    if scheme.group_size is not None and scheme.weight_dtype != "int8":
        return "its groups are for integers only"
    return None


def format_name(scheme: Scheme) -> str:
    """The value of `format` in the config."""
    if scheme.weight_dtype == "int8":
        return "pack-quantized" if scheme.activation_dtype is None else "int-quantized"
    return "naive-quantized" if scheme.activation_dtype is None else "float-quantized"


def is_packed(scheme: Scheme) -> bool:
    """Whether codes are packed into words."""
    return format_name(scheme) == "pack-quantized"


def tensor_specs(scheme: Scheme, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """What is stored for a linear layer [N, K] whose float weight has this dtype."""
    groups = 1 if scheme.group_size is None else in_features // scheme.group_size
    scale = TensorSpec((out_features, groups), dtype)
    if is_packed(scheme):
        words = -(-in_features * scheme.bits // 32)
        return {
            "weight_packed": TensorSpec((out_features, words), torch.int32),
            "weight_scale": scale,
            "weight_shape": TensorSpec((2,), torch.int64),
        }
    codes = TensorSpec((out_features, in_features), getattr(torch, scheme.weight_dtype))
    return {"weight": codes, "weight_scale": scale}


def compress(scheme: Scheme, codes: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Codes [N, K] and scale [N, G] as they are stored."""
    if not is_packed(scheme):
        return {"weight": codes, "weight_scale": scale}
    return {
        "weight_packed": pack_int32(codes, scheme.bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(list(codes.shape), dtype=torch.int64),
    }


def decompress(
    scheme: Scheme, tensors: Mapping[str, torch.Tensor], in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] and scale [N, G] of stored tensors."""
    if not is_packed(scheme):
        return tensors["weight"], tensors["weight_scale"]
    return unpack_int32(tensors["weight_packed"], scheme.bits, in_features), tensors["weight_scale"]


def config(scheme: Scheme, modules: Sequence[str], left: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose linear layers are quantized but for those left."""
    name = format_name(scheme)
    number = {"num_bits": 8, "type": "int" if scheme.weight_dtype == "int8" else "float", "symmetric": True}
    weights: dict[str, Any] = {**number, "strategy": "channel" if scheme.group_size is None else "group"}
    weights |= {"group_size": scheme.group_size, "dynamic": False}
    activations = {**number, "strategy": "token", "group_size": None, "dynamic": True}
    group = {
        "targets": ["Linear"],
        "format": name,
        "weights": weights,
        "input_activations": None if scheme.activation_dtype is None else activations,
        "output_activations": None,
    }
    return {
        "quant_method": NAME,
        "version": VERSION,
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(left),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def parse(config: Mapping[str, Any]) -> Layout:
    """Which modules have which scheme.

    Raises:
        CheckpointError: a scheme that quantkit doesn't read, or a config that isn't one.
    """
    groups = config.get("config_groups")
    ignore = checked_targets(config.get("ignore") or [], "ignore")
    if not isinstance(groups, Mapping):
        raise CheckpointError("quantization_config has no config_groups; it isn't a compressed-tensors checkpoint")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if config.get(key) and config[key] != {"format": "dense"}:
            raise CheckpointError(f"quantization_config uses {key}, which quantkit doesn't read yet")
    found = []
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise CheckpointError(f"quantization_config's group {name!r} is no table; mend config.json")
        targets = checked_targets(group.get("targets"), f"targets in group {name!r}")
        scheme = _scheme_of(str(name), group)
        stored = group.get("format") or config.get("format")
        if stored != format_name(scheme):
            raise CheckpointError(
                f"group {name!r} is stored as {stored!r}; quantkit reads {format_name(scheme)!r} for it"
            )
        found.append(Group(scheme, targets))
    return Layout(tuple(found), ignore)


def _scheme_of(name: str, group: Mapping[str, Any]) -> Scheme:
    """The scheme of one config group, or CheckpointError."""
    weights, activations = group.get("weights"), group.get("input_activations")
    weights = weights if isinstance(weights, Mapping) else {}
    kinds = {"int 8": "int8", "float 8": "float8_e4m3fn"}
    kind = kinds.get(f"{weights.get('type')} {weights.get('num_bits')}")
    grouped = weights.get("strategy") == "group"
    known = kind is not None and (grouped or weights.get("strategy") == "channel")
    known = known and weights.get("symmetric", True) is True and not weights.get("actorder")
    known = known and (not grouped or weights.get("group_size") is not None)
    if activations:
        known = known and isinstance(activations, Mapping) and _is_per_token(activations, weights)
    if not known or group.get("output_activations"):
        raise CheckpointError(
            f"quantization_config's group {name!r} has a scheme that quantkit doesn't read "
            "(it reads symmetric 8-bit weights by channel or group, with activations in float or 8-bit per token)"
        )
    size = weights.get("group_size") if grouped else None
    try:
        return Scheme(str(kind), size, activation_dtype=str(kind) if activations else None)
    except RecipeError as error:
        raise CheckpointError(f"quantization_config's group {name!r}: {error}") from error


def _is_per_token(activations: Mapping[str, Any], weights: Mapping[str, Any]) -> bool:
    """Whether activations are quantized per token when the model runs, symmetrically, to the weights' dtype."""
    same = all(activations.get(key) == weights.get(key) for key in ("type", "num_bits"))
    symmetric = activations.get("symmetric", True) is True
    return same and symmetric and activations.get("strategy") == "token" and activations.get("dynamic") is True
