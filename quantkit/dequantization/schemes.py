"""Which scheme of a compressed-tensors config the weights of a module have, found from its name alone."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.dequantization.base import is_count, unknown
from quantkit.formats.base import checked_targets
from quantkit.formats.compressed_tensors import BITMASKS
from quantkit.untrusted import first_fit

FORMATS = (
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "mxfp8-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)
MIXED = "mixed-precision"


@dataclass(frozen=True)
class Weights:
    """How the weights of a group of modules are stored.

    Attributes:
        bits: of a code.
        kind: `int` or `float`.
        symmetric: whether there is no zero point.
        strategy: what shares a scale: `tensor`, `channel`, `group` or `block`.
        group_size: neighbours along K, of `group`.
        block: rows and columns, of `block`.
        has_global: whether scales are themselves in units of one number.
    """

    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group_size: int
    block: tuple[int, int]
    has_global: bool


def scheme_finder(stored: Mapping[str, Any], where: str) -> Callable[[str], Weights]:
    """A function from a module's name to how its weights are stored.

    A group that names the module goes before one with a regex for it, of which the first in alphabetical order counts,
    and that before one that names classes (compressed-tensors 0.20, `match_targets`). The model's classes aren't known
    here, so that groups by class have to agree.

    Raises:
        CheckpointError: now, a config that says something that isn't decoded here; when called, no group for a module.
    """
    for key in ("sparsity_config", "transform_config"):
        value = stored.get(key)
        kind = value.get("format", key) if isinstance(value, Mapping) else value
        if value and kind != "dense" and (key, kind) != ("sparsity_config", BITMASKS):
            raise unknown(where, f"{key} of quantization_config asks for {kind}, which is not decoded yet")
    groups = stored.get("config_groups") or ({} if stored.get("sparsity_config") else None)
    if not isinstance(groups, Mapping) or (not groups and not stored.get("sparsity_config")):
        raise unknown(where, "quantization_config has no config_groups")
    found = [
        _group(str(name), group, stored.get("format"), where)
        for name, group in groups.items()
        if not isinstance(group, Mapping) or group.get("weights") is not None  # else of activations alone
    ]

    by_target = {target: weights for weights, targets in found for target in targets}
    regexes = sorted(target for target in by_target if target.startswith("re:"))
    by_class = {weights for weights, targets in found if any(map(_is_class, targets))}

    def find(module: str) -> Weights:
        if module in by_target:
            return by_target[module]
        matching = first_fit(module, regexes)
        if matching is not None:
            return by_target[matching]
        if len(by_class) != 1:
            what = "no group of quantization_config names it" if not by_class else "groups by class don't tell which"
            raise unknown(where, f"{module!r} is compressed, and {what}")
        return next(iter(by_class))

    return find


def _is_class(target: str) -> bool:
    return re.fullmatch(r"[A-Z]\w*", target) is not None


def _group(name: str, group: Any, overall: Any, where: str) -> tuple[Weights, tuple[str, ...]]:
    """The weights' scheme of one group, and its targets."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise unknown(where, f"group {name!r} of quantization_config says nothing of weights")
    form = group.get("format") or overall
    if form not in FORMATS:
        extra = "" if form != MIXED else " (its own format is missing)"
        raise unknown(where, f"group {name!r} is stored as {form}{extra}, which is not decoded yet")
    targets = checked_targets(group.get("targets"), f"targets in group {name!r}")
    return _weights(name, weights, where), targets


def _weights(name: str, weights: Mapping[str, Any], where: str) -> Weights:
    """The scheme of a group's weights, or CheckpointError."""
    bits, kind, size = weights.get("num_bits", 8), weights.get("type", "int"), weights.get("group_size")
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.get("strategy") or implied
    has_global = strategy == "tensor_group"
    strategy = "group" if has_global else strategy
    block = _block_structure(weights.get("block_structure")) if strategy == "block" else (1, 1)
    fits = type(bits) is int and ((kind == "int" and 1 <= bits <= 8) or (kind == "float" and bits in (4, 8)))
    fits = fits and strategy in ("tensor", "channel", "group", "block")
    fits = fits and (strategy != "group" or is_count(size))
    if not fits or block is None or weights.get("dynamic"):
        raise unknown(
            where,
            f"group {name!r} of quantization_config has {bits!r} bits {kind} by {strategy} of "
            f"{size or weights.get('block_structure')!r}, "
            "which is not decoded here",
        )
    symmetric = weights.get("symmetric", True) is not False
    group_size = int(size or 0) if strategy == "group" else 0
    return Weights(bits, kind, symmetric, strategy, group_size, block, has_global)


def _block_structure(value: Any) -> tuple[int, int] | None:
    """Rows and columns of a block, written as a list or, by early releases, as `128x128`; None for anything else."""
    written = re.fullmatch("([0-9]{1,9})x([0-9]{1,9})", value) if isinstance(value, str) else None
    sizes = [int(part) for part in written.groups()] if written is not None else value
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(map(is_count, sizes)):
        return None
    return sizes[0], sizes[1]
