"""quantkit's own format, version 1: holds E5M2, loads with quantkit only. Described in docs/formats.md.

A linear layer's tensors are `weight` int32 [N, ceil(K/4)], the bytes of its codes (two's complement, E4M3 or E5M2),
element 0 in the lowest byte, rows padded with zero bytes; `weight_scale`, [N, G] with G groups of K (one unless the
scheme has a group size), [1] by tensor, or [ceil(N/128), ceil(K/128)] by block, in the dtype of the weight that it
replaces (float32 for LLM.int8); and with static activations `input_scale` [1] in the same dtype. Weights are out x in,
also where the model has them in x out. The name `weight` is kept on purpose with another shape: software that doesn't
know the format stops there, instead of running codes as if they were weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from quantkit.errors import CheckpointError, RecipeError
from quantkit.formats.base import Group, Layout, TensorSpec, checked_targets, scale_specs, stored_scales
from quantkit.scheme import Scheme

NAME = "quantkit"
VERSION = 1


def reason_against(scheme: Scheme) -> str | None:
    """None: this format can say every scheme."""
    return None


def is_packed(scheme: Scheme) -> bool:
    """False: codes are bytes, and a view of the words is all that a product needs."""
    return False


def tensor_specs(
    scheme: Scheme, out_features: int, in_features: int, dtype: torch.dtype, transposed: bool = False
) -> dict[str, TensorSpec]:
    """What is stored for a linear layer [N, K] whose float weight has this dtype, transposed or not."""
    weight = TensorSpec((out_features, -(-in_features // 4)), torch.int32)
    return {"weight": weight} | scale_specs(scheme, out_features, in_features, dtype)


def compress(
    scheme: Scheme,
    codes: torch.Tensor,
    scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    transposed: bool = False,
) -> dict[str, torch.Tensor]:
    """Codes [N, K] and their scale as they are stored; `input_scale` with static activations."""
    padding = -codes.shape[1] % 4
    words = F.pad(codes.contiguous().view(torch.uint8), (0, padding)).contiguous().view(torch.int32)
    return {"weight": words} | stored_scales(scheme, scale, input_scale)


def decompress(
    scheme: Scheme, tensors: Mapping[str, torch.Tensor], in_features: int, transposed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K], a view of the stored words, and their scale."""
    codes = tensors["weight"].view(getattr(torch, scheme.weight_dtype))
    return codes[:, :in_features], tensors["weight_scale"]


def config(scheme: Scheme, modules: Sequence[str], left: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint in which just these modules are quantized."""
    groups = [{"scheme": scheme.to_dict(), "modules": list(modules)}]
    return {"quant_method": NAME, "version": VERSION, "groups": groups}


def parse(config: Mapping[str, Any]) -> Layout:
    """Which modules have which scheme.

    Raises:
        CheckpointError: another version, or a config that isn't one.
    """
    if config.get("version") != VERSION:
        raise CheckpointError(
            f"the checkpoint is in version {config.get('version')!r} of quantkit's format and this quantkit reads "
            f"version {VERSION}; use a quantkit that knows it"
        )
    groups = config.get("groups")
    if not isinstance(groups, list):
        raise CheckpointError(f"groups of quantization_config is {groups!r}, not a list; mend config.json")
    found = []
    for group in groups:
        try:
            scheme, modules = Scheme(**group["scheme"]), group["modules"]
        except (TypeError, KeyError, RecipeError) as error:
            raise CheckpointError(
                f"a group of quantization_config cannot be read ({error}); mend config.json"
            ) from error
        found.append(Group(scheme, checked_targets(modules, "modules")))
    return Layout(tuple(found))
