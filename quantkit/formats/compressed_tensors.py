"""The compressed-tensors format, which vLLM, SGLang and transformers load. Written and read without its package.

| scheme | its format name | tensors of a linear layer |
| --- | --- | --- |
| int8, activations too | int-quantized | `weight` int8 [N, K], `weight_scale` [N, 1] |
| E4M3, activations too | float-quantized | `weight` float8_e4m3fn [N, K], `weight_scale` |
| E4M3 weights only | naive-quantized | as above |
| int8 weights only | pack-quantized | `weight_packed` int32 [N, K/4], `weight_scale`, `weight_shape` int64 [2] |
| int4 weights only | pack-quantized | `weight_packed` int32 [N, K/8], and so on |
| the same with zero points | pack-quantized | and `weight_zero_point` int32 [N/8, G], packed along N |
| 2:4 sparse, int8 or E4M3 | any but packed | for `weight` what is below |
| 2:4 sparse, in float | none | the same, without a scale |

`weight_scale` is [N, 1] by row, [N, G] in groups, [1] by tensor and [ceil(N/128), ceil(K/128)] by block; static
activations add `input_scale` [1]. Scales have the dtype of the weight that they replace. A packed element is q + 128,
or q + 8 of 4 bits, element 0 in the lowest bits; zero points are read, and not written. Keys and values that a server
is to cache in FP8 have scales `k_scale` and `v_scale` [1]. A weight that lies in the model as [K, N] (GPT-2's) is
stored so, as servers' loaders transpose it by its name; packed words are out x in always. The layout follows
compressed-tensors 0.20.

2:4 sparse weights are read as releases up to 0.14 stored them (`sparse-24-bitmask`), and not written, as nothing else
reads them any more: `compressed` [N, K / 2] in the dtype of the codes, or of the float weight; `bitmask` uint8
[N, ceil(K / 8)], its lowest bit first; `shape` int64 [2, 1].
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from quantkit_kernels import sparse24
from quantkit_kernels.formats import pack_int32, packed_words, unpack_int32

from quantkit.errors import CheckpointError, RecipeError
from quantkit.formats.base import Group, Layout, TensorSpec, checked_targets, scale_specs, stored_scales
from quantkit.scheme import BLOCK, FOUR_BITS, Scheme
from quantkit.untrusted import shown

NAME = "compressed-tensors"
VERSION = "0.20.0"
STRATEGIES = {"row": "channel", "tensor": "tensor", "block": "block"}
"""Its word for what shares a scale among weights."""
KINDS: dict[tuple[str, bool | None], str] = {
    ("int 8", True): "int8",
    ("float 8", True): "float8_e4m3fn",
    ("int 4", True): "int4",
    ("int 4", False): "uint4",
}
"""Its words for what codes are (type and bits, and whether they are symmetric), to Scheme's."""
ACTIVATIONS = {
    "token": ("token", True),
    "tensor": ("tensor", True),
    "tensor-static": ("tensor", False),
    "group": ("group", True),
}
"""Its words for what shares a scale among activations: the strategy, and whether it is dynamic."""
CACHE_SCALES = ("k_scale", "v_scale")
"""What it stores of an attention layer whose keys and values a server is to cache in FP8."""
BITMASKS = "sparse-24-bitmask"
"""Its name for 2:4 sparse weights, which its releases up to 0.14 wrote."""


def reason_against(scheme: Scheme) -> str | None:
    """Why this format can't say the scheme, or None."""
    if scheme.sparsity is not None:
        return "no release since 0.15 reads packed 2:4 weights (write their zeros with --format dense)"
    if scheme.weight_dtype == "float8_e5m2":
        return "its FP8 is E4M3 only, and the recipe asks for E5M2"
    if scheme.group_size is not None and not _is_int(scheme):
        return "its groups are for integers only"
    if scheme.threshold is not None:
        return "it has no word for outlier features that stay in float, as LLM.int8 keeps them"
    return None


def _is_int(scheme: Scheme) -> bool:
    return not scheme.weight_dtype.startswith("float")


def format_name(scheme: Scheme) -> str:
    """The value of `format` in the config."""
    if _is_int(scheme):
        return "pack-quantized" if scheme.activation_dtype is None else "int-quantized"
    return "naive-quantized" if scheme.activation_dtype is None else "float-quantized"


def is_packed(scheme: Scheme) -> bool:
    """Whether codes are packed into words that an op unpacks: with zero points `decompress` does it."""
    return _is_in_words(scheme) and not _has_zeros(scheme)


def _is_in_words(scheme: Scheme) -> bool:
    return format_name(scheme) == "pack-quantized"


def _has_zeros(scheme: Scheme) -> bool:
    return scheme.weight_dtype == "uint4"


def tensor_specs(
    scheme: Scheme, out_features: int, in_features: int, dtype: torch.dtype, transposed: bool = False
) -> dict[str, TensorSpec]:
    """What is stored for a linear layer [N, K] whose float weight has this dtype (and is [K, N] when transposed)."""
    if scheme.sparsity is not None:
        return _bitmask_specs(scheme, out_features, in_features, dtype)
    scales = scale_specs(scheme, out_features, in_features, dtype)
    if _is_in_words(scheme):
        words = TensorSpec((out_features, packed_words(in_features, scheme.bits)), torch.int32)
        specs = {"weight_packed": words, **scales, "weight_shape": TensorSpec((2,), torch.int64)}
        if _has_zeros(scheme):
            _, groups = scales["weight_scale"].shape
            zeros = TensorSpec((packed_words(out_features, scheme.bits), groups), torch.int32)
            specs["weight_zero_point"] = zeros
        return specs
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    return {"weight": TensorSpec(shape, getattr(torch, scheme.weight_dtype)), **scales}


def _bitmask_specs(scheme: Scheme, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """What is stored for a 2:4 sparse layer: of its codes, or of its numbers in float."""
    values = dtype if scheme.is_float else getattr(torch, scheme.weight_dtype)
    return {
        "compressed": TensorSpec((out_features, in_features // 2), values),
        "bitmask": TensorSpec((out_features, -(-in_features // 8)), torch.uint8),
        "shape": TensorSpec((2, 1), torch.int64),
        **scale_specs(scheme, out_features, in_features, dtype),
    }


def sparse_parts(
    scheme: Scheme, tensors: Mapping[str, torch.Tensor], in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept codes [N, K / 2] of a 2:4 sparse weight as they are stored, and the indices that its bits stand for.

    Raises:
        CheckpointError: the bits are not those of a 2:4 weight.
    """
    try:
        return tensors["compressed"], sparse24.indices_of_bitmask(tensors["bitmask"], in_features)
    except ValueError as error:
        raise CheckpointError(f"a 2:4 sparse weight is damaged ({error}); download the checkpoint again") from error


def compress(
    scheme: Scheme,
    codes: torch.Tensor,
    scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    transposed: bool = False,
) -> dict[str, torch.Tensor]:
    """Codes [N, K] and their scale as they are stored; `input_scale` with static activations.

    Raises:
        CheckpointError: the scheme has zero points, which codes alone don't tell, or 2:4 sparsity.
    """
    if scheme.sparsity is not None:
        raise CheckpointError(f"{scheme.label}: packed 2:4 weights are read, and not written; use --format quantkit")
    if _has_zeros(scheme):
        raise CheckpointError(
            f"{scheme.label} with zero points is read, and not written; keep the checkpoint that it came from"
        )
    scales = stored_scales(scheme, scale, input_scale)
    if _is_in_words(scheme):
        shape = torch.tensor(list(codes.shape), dtype=torch.int64)
        return {"weight_packed": pack_int32(codes, scheme.bits), **scales, "weight_shape": shape}
    return {"weight": codes.t().contiguous() if transposed else codes, **scales}


def decompress(
    scheme: Scheme, tensors: Mapping[str, torch.Tensor], in_features: int, transposed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K], a view of the weight where it isn't packed, and their scale.

    Of 4 bits with a zero point each code is int8 already less its zero point, from -15 to 15.
    """
    if scheme.sparsity is not None:
        codes = sparse24.unpack(*sparse_parts(scheme, tensors, in_features), in_features)
        return codes, codes.new_ones(len(codes), 1) if scheme.is_float else tensors["weight_scale"]
    scale = tensors["weight_scale"]
    if _is_in_words(scheme):
        codes = unpack_int32(tensors["weight_packed"], scheme.bits, in_features)
        if _has_zeros(scheme):
            words = tensors["weight_zero_point"].t().contiguous()
            zeros = unpack_int32(words, scheme.bits, codes.shape[0]).t()
            codes = (codes.view(*zeros.shape, -1) - zeros.unsqueeze(-1)).flatten(1)
        return codes, scale
    weight = tensors["weight"]
    return weight.t() if transposed else weight, scale


def config(scheme: Scheme, modules: Sequence[str], left: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose linear layers are quantized but for those left."""
    name = format_name(scheme)
    group = {
        "targets": ["Linear"],
        "format": name,
        "weights": _weights(scheme),
        "input_activations": _activations(scheme),
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


def _numbers(scheme: Scheme) -> dict[str, Any]:
    return {"num_bits": scheme.bits, "type": "int" if _is_int(scheme) else "float", "symmetric": not _has_zeros(scheme)}


def _weights(scheme: Scheme) -> dict[str, Any]:
    strategy = STRATEGIES[scheme.weight_granularity] if scheme.group_size is None else "group"
    blocks = {"block_structure": [BLOCK, BLOCK]} if strategy == "block" else {}
    return {**_numbers(scheme), "strategy": strategy, "group_size": scheme.group_size, **blocks, "dynamic": False}


def _activations(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.activation_dtype is None:
        return None
    strategy, dynamic = ACTIVATIONS[scheme.activation]
    size = BLOCK if strategy == "group" else None
    return {**_numbers(scheme), "strategy": strategy, "group_size": size, "dynamic": dynamic}


def parse(config: Mapping[str, Any]) -> Layout:
    """Which modules have which scheme.

    Raises:
        CheckpointError: a scheme that quantkit doesn't read, or a config that isn't one.
    """
    sparse, dense = sparse_targets(config)
    groups = config.get("config_groups") or ({} if sparse else None)
    ignore = checked_targets(config.get("ignore") or [], "ignore")
    if not isinstance(groups, Mapping):
        raise CheckpointError("quantization_config has no config_groups; it isn't a compressed-tensors checkpoint")
    if config.get("transform_config") and config["transform_config"] != {"format": "dense"}:
        raise CheckpointError(
            "quantization_config uses transform_config, which quantkit doesn't read; load it with the software that "
            "wrote it"
        )
    found = []
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise CheckpointError(f"quantization_config's group {name!r} is no table; mend config.json")
        targets = checked_targets(group.get("targets"), f"targets in group {name!r}")
        scheme = _scheme_of(str(name), group)
        reason = reason_against(scheme)
        if reason is not None:
            raise CheckpointError(f"group {name!r} is none that compressed-tensors can say: {reason}; mend config.json")
        stored = group.get("format") or config.get("format")
        if stored != format_name(scheme):
            raise CheckpointError(
                f"group {name!r} is stored as {stored!r}; quantkit reads {format_name(scheme)!r} for it"
            )
        if sparse and _is_in_words(scheme):
            raise CheckpointError(f"group {name!r} has packed weights, which have no 2:4 sparse form; mend config.json")
        found.append(Group(scheme, targets))
    caches = _cache_scales(config.get("kv_cache_scheme"))
    return Layout(tuple(found), ignore, cache_scales=caches, sparse=sparse, dense=dense)


def sparse_targets(config: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modules whose weights are 2:4 sparse and packed, and those among them that aren't: none without a config.

    Raises:
        CheckpointError: weights are sparse in another way, or the config isn't one.
    """
    said = config.get("sparsity_config")
    if not said or (isinstance(said, Mapping) and said.get("format") == "dense"):
        return (), ()
    if (
        not isinstance(said, Mapping)
        or said.get("format") != BITMASKS
        or said.get("sparsity_structure", "2:4") != "2:4"
    ):
        kind = said.get("format") if isinstance(said, Mapping) else said
        raise CheckpointError(
            f"quantization_config's sparsity_config is {shown(kind)}, which quantkit doesn't read (it reads {BITMASKS} "
            "with 2:4); load it with the software that wrote it"
        )
    targets = checked_targets(said.get("targets") or ["Linear"], "targets of sparsity_config")
    return targets, checked_targets(said.get("ignore") or [], "ignore of sparsity_config")


def _cache_scales(scheme: object) -> tuple[str, ...]:
    """The last parts of the names of the scales that a scheme for cached keys and values goes with.

    Raises:
        CheckpointError: it isn't FP8 with one stored scale.
    """
    if not scheme:
        return ()
    words = scheme if isinstance(scheme, Mapping) else {"num_bits": None}
    plain = _is_symmetric(words) and not words.get("dynamic")
    if not plain or (_numbers_of(words), _strategy(words)) != ("float 8", "tensor"):
        raise CheckpointError(
            f"quantization_config's kv_cache_scheme is {_said(scheme)}, which quantkit doesn't read (it reads static "
            "float 8 tensor); load it with the software that wrote it, or quantize it again with --dequantize"
        )
    return CACHE_SCALES


def _scheme_of(name: str, group: Mapping[str, Any]) -> Scheme:
    """The scheme of one config group, or CheckpointError."""
    given, activations = group.get("weights"), group.get("input_activations")
    weights: Mapping[str, Any] = given if isinstance(given, Mapping) else {"num_bits": None}
    kind = KINDS.get((_numbers_of(weights), _is_symmetric(weights)))
    shared, activation = _granularity_of(weights), _activation_of(weights, activations)
    fits = kind not in FOUR_BITS or shared in ("row", "group")
    if kind is None or shared is None or activation is None or not fits or group.get("output_activations"):
        raise CheckpointError(
            f"quantization_config's group {name!r} has {_said(weights)} weights with "
            f"{_said(activations) if activations else 'float'} activations, which quantkit doesn't load (it loads "
            "symmetric 8-bit weights by channel, group, tensor or block of 128 x 128, with activations in float, or in "
            "the weights' 8 bits: by token or tensor, or by group of 128 with blocks; and int weights of 4 bits by "
            "channel or group); load it with the software that wrote it, or quantize it again with --dequantize"
        )
    size = weights.get("group_size") if shared == "group" else None
    try:
        return Scheme(
            kind,
            size,
            activation_dtype=kind if activations else None,
            weight_granularity="row" if shared == "group" else shared,
            activation=activation,
        )
    except RecipeError as error:
        raise CheckpointError(f"quantization_config's group {name!r}: {error}") from error


def _numbers_of(args: Mapping[str, Any]) -> str:
    """Type and bits of weights or activations, such as `int 8`, with compressed-tensors' defaults."""
    return f"{args.get('type', 'int')} {args.get('num_bits', 8)}"


def _is_symmetric(args: Mapping[str, Any]) -> bool | None:
    """Whether there is no zero point; None where the config says neither."""
    symmetric = args.get("symmetric", True)
    return symmetric if isinstance(symmetric, bool) else None


def _said(args: object) -> str:
    """What the config calls weights or activations, such as `asymmetric int 4 group`."""
    if not isinstance(args, Mapping):
        return repr(args)
    symmetric = "" if _is_symmetric(args) else "asymmetric "
    return f"{symmetric}{_numbers_of(args)} {_strategy(args)}"


def _strategy(args: Mapping[str, Any]) -> object:
    """The strategy of weights or activations; where it is left out, what the group size means."""
    size = args.get("group_size")
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    return args.get("strategy") or inferred


def _granularity_of(weights: Mapping[str, Any]) -> str | None:
    """What shares a scale among weights: `row`, `tensor`, `block` or `group`; None for what quantkit doesn't read."""
    strategy, block = _strategy(weights), weights.get("block_structure")
    # Columns quantized in another order ("weight") lie on disk in their own; "group" stores them permuted.
    if weights.get("dynamic") or weights.get("actorder") not in (None, False, "weight", "static"):
        return None
    if block not in (([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}") if strategy == "block" else (None,)):
        return None
    if strategy == "group":
        return "group" if weights.get("group_size") is not None else None
    return next((granularity for granularity, word in STRATEGIES.items() if word == strategy), None)


def _activation_of(weights: Mapping[str, Any], activations: object) -> str | None:
    """What shares a scale among activations, in Scheme's words; None for what quantkit doesn't read.

    Activations in float are `token`, as in a scheme that quantizes weights only.
    """
    if not activations:
        return "token"
    if not isinstance(activations, Mapping) or not _is_symmetric(activations):
        return None
    strategy, dynamic = _strategy(activations), activations.get("dynamic") or False
    if _numbers_of(activations) != _numbers_of(weights) or (
        strategy == "group" and activations.get("group_size") != BLOCK
    ):
        return None
    return next((activation for activation, words in ACTIVATIONS.items() if words == (strategy, dynamic)), None)
