"""What compressed-tensors' config says, read as its own classes read it, and what they refuse.

Rules of `QuantizationArgs` and `QuantizationScheme` of compressed-tensors 0.17 (vLLM 0.32), 0.18 (SGLang 0.5) and 0.20.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.untrusted import regex_trouble

KEYS = frozenset(
    {
        "num_bits",
        "type",
        "symmetric",
        "group_size",
        "strategy",
        "block_structure",
        "dynamic",
        "actorder",
        "scale_dtype",
        "zp_dtype",
        "observer",
        "observer_kwargs",
    }
)
GROUP_KEYS = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
FORMATS = frozenset(
    {
        "dense",
        "sparse-bitmask",
        "sparse-24-bitmask",
        "int-quantized",
        "float-quantized",
        "naive-quantized",
        "pack-quantized",
        "marlin-24",
        "mixed-precision",
        "nvfp4-pack-quantized",
        "mxfp4-pack-quantized",
        "mxfp6-pack-quantized",
        "mxfp8-quantized",
    }
)


@dataclass(frozen=True)
class Arguments:
    """How weights or activations are quantized, with compressed-tensors' defaults filled in."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    group_size: int | None = None
    block: tuple[int, int] | None = None
    dynamic: bool | str = False
    actorder: str | None = None
    scale_dtype: str | None = None

    @property
    def label(self) -> str:
        """A few words for messages, such as `int 8 by channel, static`."""
        kind = "dynamic" if self.dynamic else "static"
        size = f" of {self.group_size}" if self.strategy == "group" else ""
        return f"{self.type} {self.num_bits} by {self.strategy}{size}, {kind}{'' if self.symmetric else ', asymmetric'}"


@dataclass(frozen=True)
class Group:
    """One of `config_groups`.

    Attributes:
        name: its key.
        targets: class names, module names, or regexes after `re:`.
        weights: how weights are quantized; None for not at all, or where it can't be read.
        inputs: the same of what goes into a layer.
        outputs: and of what comes out.
        format: how weights lie on disk, the config's own where the group says none.
    """

    name: str
    targets: tuple[str, ...]
    weights: Arguments | None
    inputs: Arguments | None
    outputs: Arguments | None
    format: str | None

    @property
    def label(self) -> str:
        """What it is, for messages."""
        weights = "no weights" if self.weights is None else f"weights {self.weights.label}"
        inputs = "activations in float" if self.inputs is None else f"activations {self.inputs.label}"
        return f"{weights}; {inputs}; stored as {self.format}"


@dataclass(frozen=True)
class Mistake:
    """What compressed-tensors refuses in a config: the key, the sentence, and whether only whole groups are checked."""

    key: str
    sentence: str
    of_group: bool = False


def read_groups(config: Mapping[str, Any]) -> tuple[list[Group], list[Mistake]]:
    """The groups of a `quantization_config`, in its order, and what is wrong with them."""
    found, mistakes = [], _of_names(config.get("ignore") or [], "ignore")
    groups = config.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        return [], [*mistakes, Mistake("config_groups", f"it is {groups!r}, not a table of groups")]
    for name, values in groups.items():
        where = f"config_groups.{name}"
        if not isinstance(values, Mapping):
            mistakes.append(Mistake(where, f"it is {values!r}, not a table"))
            continue
        unknown = sorted(values.keys() - GROUP_KEYS)
        mistakes += [Mistake(f"{where}.{key}", "unknown keys are rejected", of_group=True) for key in unknown]
        targets = values.get("targets")
        wrong = _of_names(targets, f"{where}.targets")
        mistakes += wrong
        targets = () if wrong else tuple(targets or ())
        form = values.get("format") or config.get("format")
        if not isinstance(form, str) or form not in FORMATS:
            mistakes.append(Mistake(f"{where}.format", f"{form!r} is no format of compressed-tensors", of_group=True))
        weights, inputs, outputs = (
            read_arguments(values.get(key), f"{where}.{key}")
            for key in ("weights", "input_activations", "output_activations")
        )
        mistakes += [*weights[1], *inputs[1], *outputs[1], *_of_activations(inputs[0], f"{where}.input_activations")]
        stored = None if form is None else str(form)
        found.append(Group(str(name), targets, weights[0], inputs[0], outputs[0], stored))

    return found, mistakes


def _of_names(values: object, where: str) -> list[Mistake]:
    """What is wrong with a list of names, and of regexes after `re:`."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return [Mistake(where, f"it is {values!r}, not a list of names")]
    return [Mistake(where, f"{value!r} is no regular expression") for value in values if not _is_pattern(value)]


def _is_pattern(value: str) -> bool:
    return not value.startswith("re:") or regex_trouble(value[3:]) is None


def _of_activations(inputs: Arguments | None, where: str) -> list[Mistake]:
    """What QuantizationScheme refuses of activations."""
    if inputs is None:
        return []
    if inputs.strategy in ("channel", "block"):
        return [Mistake(f"{where}.strategy", f"activations can't be quantized by {inputs.strategy}", of_group=True)]
    if inputs.actorder is not None:
        return [Mistake(f"{where}.actorder", "activations have no order", of_group=True)]
    return []


def read_arguments(values: object, where: str) -> tuple[Arguments | None, list[Mistake]]:
    """Arguments of weights or activations (None for none, or where they can't be read), and what is wrong with them."""
    if values is None:
        return None, []
    if not isinstance(values, Mapping):
        return None, [Mistake(where, f"it is {values!r}, not a table")]
    mistakes = [Mistake(f"{where}.{key}", "unknown keys are rejected") for key in sorted(values.keys() - KEYS)]
    bits, size, block = values.get("num_bits", 8), values.get("group_size"), values.get("block_structure")
    kind, dynamic = str(values.get("type", "int")).lower(), values.get("dynamic", False)
    structure = _block(block)
    order = values.get("actorder")
    checks = (
        ("num_bits", isinstance(bits, int) and not isinstance(bits, bool), f"{bits!r} is no number of bits"),
        ("type", kind in ("int", "float"), f"{kind!r} is neither int nor float"),
        ("symmetric", isinstance(values.get("symmetric", True), bool), f"{values.get('symmetric')!r} is no yes or no"),
        ("group_size", size is None or (isinstance(size, int) and size >= -1), f"{size!r} is no group size"),
        ("block_structure", block is None or structure is not None, f"{block!r} is no pair of sizes"),
        ("dynamic", isinstance(dynamic, bool) or dynamic == "local", f"{dynamic!r} is no yes or no"),
        (
            "actorder",
            order in (None, False, "weight", "static"),
            f"{order!r} was removed from compressed-tensors; only weight, static and none are left",
        ),
    )
    mistakes += [Mistake(f"{where}.{key}", sentence) for key, right, sentence in checks if not right]
    strategy = values.get("strategy")
    strategy = _inferred(size) if strategy is None else str(strategy).lower()
    if strategy not in STRATEGIES:
        mistakes.append(Mistake(f"{where}.strategy", f"{strategy!r} is none of {', '.join(STRATEGIES)}"))
    if mistakes:
        return None, mistakes
    arguments = Arguments(
        bits,
        kind,
        values.get("symmetric", True),
        strategy,
        size,
        structure,
        dynamic,
        order or None,
        values.get("scale_dtype"),
    )
    wrong = _of_together(arguments, where)
    return (None if wrong else arguments), wrong


def _inferred(size: object) -> str:
    """The strategy that a group size means."""
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _block(value: object) -> tuple[int, int] | None:
    """Rows and columns of a block, also from the older spelling `128x128`."""
    if isinstance(value, str):
        written = re.fullmatch("([0-9]{1,9})x([0-9]{1,9})", value)
        value = None if written is None else [int(part) for part in written.groups()]
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value):
        return value[0], value[1]
    return None


def _of_together(arguments: Arguments, where: str) -> list[Mistake]:
    """What is refused of arguments that are right one by one."""
    grouped = arguments.strategy in ("group", "tensor_group")
    has_size = arguments.group_size is not None and arguments.group_size > 0
    dynamic_by = ("token", "tensor", "tensor_group", "group")
    checks = (
        (
            "dynamic",
            arguments.strategy != "token" or arguments.dynamic,
            "activations by token are dynamic, and here they are static",
        ),
        ("group_size", not grouped or has_size, f"strategy {arguments.strategy} needs a positive group_size"),
        ("group_size", grouped or not has_size, f"strategy {arguments.strategy} has no group_size"),
        (
            "block_structure",
            (arguments.strategy == "block") == (arguments.block is not None),
            "block_structure goes with strategy block, and only there",
        ),
        (
            "dynamic",
            not arguments.dynamic or arguments.strategy in dynamic_by,
            f"strategy {arguments.strategy} can't be dynamic",
        ),
        (
            "dynamic",
            arguments.dynamic != "local" or arguments.strategy == "tensor_group",
            "local goes with strategy tensor_group",
        ),
        (
            "num_bits",
            arguments.type == "int" or arguments.num_bits in (4, 6, 8),
            f"there are no floats of {arguments.num_bits} bits",
        ),
    )
    return [Mistake(f"{where}.{key}", sentence) for key, right, sentence in checks if not right]
