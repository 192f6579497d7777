"""quantkit's own format, versions 1 to 5: holds every scheme, loads with quantkit only. Described in docs/formats.md.

A linear layer's tensors are `weight` int32 [N, ceil(K/4)], the bytes of its codes (two's complement, E4M3 or E5M2),
element 0 in the lowest byte, rows padded with zero bytes; `weight_scale`, [N, G] with G groups of K (one unless the
scheme has a group size), [1] by tensor, or [ceil(N/128), ceil(K/128)] by block, in the dtype of the weight that it
replaces (float32 for LLM.int8); and with static activations `input_scale` [1] in the same dtype. Weights are out x in,
also where the model has them in x out. The name `weight` is kept on purpose with another shape: software that doesn't
know the format stops there, instead of running codes as if they were weights.

Version 2 has LLM.int8 with outlier columns in float beside it: `outlier_columns` int32 [O], their numbers in ascending
order, and `outlier_weight` [N, O], the weight in these columns, in its own dtype. Their codes are 0.

Version 3 has 4 bits beside it: `weight` int32 [N, ceil(K/8)], each code + 8, element 0 in the lowest bits, as
compressed-tensors packs them, so that the same op runs on them.

Version 4 has 2:4 sparse weights beside it, as `quantkit_kernels.sparse24` packs them: `weight` holds the K / 2 kept
codes of a row as other codes are held in K, or kept floats as they are, [N, K / 2] in the weight's dtype and without a
scale; `weight_indices` int32 [N, ceil(K / 32)] says where they stood. V:2:M sparse weights are packed as
`quantkit_kernels.venom` does it: with T = K / M tiles in a row `weight` holds 2 T codes, `weight_indices` int32
[N, ceil(T / 8)] says where they stood among the four columns of their tile, and `weight_columns` uint8
[ceil(N / V), 4 T] which four these are.

Version 5 has `activations` beside the groups, of which there may be none: which modules' outputs are rectified, and the
inputs of which linear layers are zeroed below a threshold (`quantkit.activations`). Tensors are those of the others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from quantkit_kernels import sparse24, venom
from quantkit_kernels.formats import pack_int32, packed_words, unpack_int32

from quantkit.activations import Activations
from quantkit.errors import CheckpointError, RecipeError
from quantkit.formats.base import Group, Layout, TensorSpec, checked_targets, scale_specs, stored_scales
from quantkit.scheme import Scheme
from quantkit.untrusted import shown

NAME = "quantkit"
VERSION = 5
"""The newest; a checkpoint is written in the oldest that can hold it."""


def reason_against(scheme: Scheme) -> str | None:
    """None: this format can say every scheme but those with zero points, which are read elsewhere and not written."""
    return "it has no zero points" if scheme.weight_dtype == "uint4" else None


def is_packed(scheme: Scheme) -> bool:
    """Whether codes are smaller than bytes: of others a view of what is stored is all that a product needs."""
    return scheme.bits < 8


def tensor_specs(
    scheme: Scheme, out_features: int, in_features: int, dtype: torch.dtype, transposed: bool = False
) -> dict[str, TensorSpec]:
    """What is stored for a linear layer [N, K] whose float weight has this dtype, transposed or not."""
    shared = scheme.shared_columns(in_features)
    stored = in_features if scheme.sparsity is None else shared // 2
    specs = {"weight": TensorSpec((out_features, packed_words(stored, scheme.bits)), torch.int32)}
    if scheme.is_float:
        specs["weight"] = TensorSpec((out_features, stored), dtype)
    if scheme.sparsity is not None:
        specs["weight_indices"] = TensorSpec((out_features, sparse24.index_words(shared)), torch.int32)
    if scheme.tiles is not None:
        blocks = venom.row_blocks(out_features, scheme.tiles[0])
        specs["weight_columns"] = TensorSpec((blocks, shared), torch.uint8)
    specs |= scale_specs(scheme, out_features, in_features, dtype)
    if scheme.outlier_columns is not None:
        specs["outlier_columns"] = TensorSpec((scheme.outlier_columns,), torch.int32)
        specs["outlier_weight"] = TensorSpec((out_features, scheme.outlier_columns), dtype)
    return specs


def compress(
    scheme: Scheme,
    codes: torch.Tensor,
    scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    transposed: bool = False,
    outliers: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Codes [N, K] and their scale as they are stored; `input_scale` with static activations.

    `outliers` are the numbers [O] of the columns that stay in float, ascending, and the weight there, [N, O].

    Raises:
        ValueError: the scheme has such columns and there are none given, or the other way round; or its codes are to be
            2:4 (or V:2:M) and aren't.
    """
    if (outliers is None) != (scheme.outlier_columns is None):
        raise ValueError(f"{scheme.label}: columns in float go with a scheme that has them, and only there")
    indices = {}
    if scheme.tiles is not None:
        codes, indices["weight_indices"], indices["weight_columns"] = venom.pack(codes, *scheme.tiles)
    elif scheme.sparsity is not None:
        codes, indices["weight_indices"] = sparse24.pack(codes)
    stored = {"weight": _words(scheme, codes), **indices, **stored_scales(scheme, scale, input_scale)}
    if outliers is not None:
        stored |= {"outlier_columns": outliers[0].to(torch.int32), "outlier_weight": outliers[1].contiguous()}
    return stored


def _words(scheme: Scheme, codes: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] in words of 32 bits; numbers in float as they are."""
    if scheme.is_float:
        return codes
    if is_packed(scheme):
        return pack_int32(codes, scheme.bits)
    padding = -codes.shape[1] % 4
    return F.pad(codes.contiguous().view(torch.uint8), (0, padding)).contiguous().view(torch.int32)


def sparse_parts(scheme: Scheme, tensors: Mapping[str, torch.Tensor], in_features: int) -> tuple[torch.Tensor, ...]:
    """The kept codes of a sparse weight as the op takes them, their indices, and of V:2:M the columns."""
    values = tensors["weight"]
    if not scheme.is_float and not is_packed(scheme):
        values = values.view(getattr(torch, scheme.weight_dtype))[:, : scheme.shared_columns(in_features) // 2]
    return (values, *(tensors[leaf] for leaf in ("weight_indices", "weight_columns") if leaf in tensors))


def decompress(
    scheme: Scheme, tensors: Mapping[str, torch.Tensor], in_features: int, transposed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K], of bytes a view of the stored words, and their scale; those of columns stored in float are 0.

    Sparse codes are unpacked, with their zeros; weights in float have the scale 1.

    Raises:
        CheckpointError: packed tensors that aren't those of a sparse weight with K in features.
    """
    if scheme.sparsity is not None:
        values, indices = sparse_parts(scheme, tensors, in_features)[:2]
        half = scheme.shared_columns(in_features) // 2
        values = unpack_int32(values, scheme.bits, half) if is_packed(scheme) else values
        try:
            if scheme.tiles is not None:
                codes = venom.unpack(values, indices, tensors["weight_columns"], in_features, *scheme.tiles)
            else:
                codes = sparse24.unpack(values, indices, in_features)
        except ValueError as error:
            raise CheckpointError(f"a sparse weight is damaged ({error}); download the checkpoint again") from error
        return codes, codes.new_ones(len(codes), 1) if scheme.is_float else tensors["weight_scale"]
    if is_packed(scheme):
        return unpack_int32(tensors["weight"], scheme.bits, in_features), tensors["weight_scale"]
    codes = tensors["weight"].view(getattr(torch, scheme.weight_dtype))
    return codes[:, :in_features], tensors["weight_scale"]


def config(
    scheme: Scheme, modules: Sequence[str], left: Sequence[str], columns: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint in which just these modules are quantized.

    Where the scheme has outlier columns in float, `columns` says how many of each module (without it the scheme does):
    modules that have as many make a group.
    """
    said = scheme.to_dict()
    if scheme.sparsity is None:
        del said["sparsity"]
    if scheme.outlier_columns is None:
        del said["outlier_columns"]  # version 1 doesn't know the key
        version = 3 if is_packed(scheme) else 1
        version = version if scheme.sparsity is None else 4
        return {"quant_method": NAME, "version": version, "groups": [{"scheme": said, "modules": list(modules)}]}
    counts: dict[int, list[str]] = {}
    for module in modules:
        counts.setdefault(columns[module] if columns else scheme.outlier_columns, []).append(module)
    groups = [{"scheme": said | {"outlier_columns": count}, "modules": counts[count]} for count in sorted(counts)]
    return {"quant_method": NAME, "version": 2, "groups": groups}


def joined(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One `quantization_config` of several that each are of some of the modules."""
    groups = [group for each in configs for group in each["groups"]]
    return {**configs[0], "version": max(each["version"] for each in configs), "groups": groups}


def with_activations(config: Mapping[str, Any] | None, activations: Activations) -> dict[str, Any]:
    """A `quantization_config` that says what is done to activations, too; None: one of weights that are all float."""
    found = dict(config or {"quant_method": NAME, "groups": []})
    return found | {"version": VERSION, "activations": activations.to_dict()}


def parse(config: Mapping[str, Any]) -> Layout:
    """Which modules have which scheme, and what is done to activations.

    Raises:
        CheckpointError: another version, or a config that isn't one.
    """
    version = config.get("version")
    if type(version) is not int or version not in range(1, VERSION + 1):
        raise CheckpointError(
            f"the checkpoint is in version {shown(version)} of quantkit's format and this quantkit reads "
            f"versions up to {VERSION}; use a quantkit that knows it"
        )
    groups = config.get("groups")
    if not isinstance(groups, list):
        raise CheckpointError(f"groups of quantization_config is {shown(groups)}, not a list; mend config.json")
    found = []
    for group in groups:
        try:
            scheme, modules = Scheme(**group["scheme"]), group["modules"]
            reason = reason_against(scheme)
            if is_packed(scheme) and version < 3:
                reason = f"codes are bytes in version {version}"
            if scheme.sparsity is not None and version < 4:
                reason = f"every weight is stored in version {version}"
            if reason is not None:
                raise RecipeError(f"{scheme.label}: {reason}")
        except (TypeError, KeyError, RecipeError) as error:
            raise CheckpointError(
                f"a group of quantization_config cannot be read ({error}); mend config.json"
            ) from error
        found.append(Group(scheme, checked_targets(modules, "modules")))
    if "activations" not in config:
        return Layout(tuple(found))
    if version < 5:
        raise CheckpointError(
            f"quantization_config is in version {version}, which has no activations, and says some; mend config.json"
        )
    return Layout(tuple(found), activations=Activations.parse(config["activations"]))
