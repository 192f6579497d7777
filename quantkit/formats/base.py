"""What every format speaks of: the specification of a stored tensor, and which modules have which scheme."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from quantkit.activations import Activations
from quantkit.errors import CheckpointError
from quantkit.scheme import BLOCK, FLOAT, Scheme
from quantkit.untrusted import first_fit, fits, regex_trouble, shown


@dataclass(frozen=True)
class TensorSpec:
    """A stored tensor's shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def scale_specs(scheme: Scheme, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """The scales of a linear layer [N, K] whose float weight has this dtype: the weight's, and static activations'.

    They have the float weight's dtype, but for LLM.int8, where they are float32 as in its paper's software. Weights in
    float have none.
    """
    if scheme.is_float:
        return {}
    dtype = dtype if scheme.threshold is None else torch.float32
    shape: tuple[int, ...] = (out_features, 1 if scheme.group_size is None else in_features // scheme.group_size)
    if scheme.weight_granularity == "tensor":
        shape = (1,)
    elif scheme.weight_granularity == "block":
        shape = (-(-out_features // BLOCK), -(-in_features // BLOCK))
    specs = {"weight_scale": TensorSpec(shape, dtype)}
    return specs | {"input_scale": TensorSpec((1,), dtype)} if scheme.is_static else specs


def stored_scales(scheme: Scheme, scale: torch.Tensor, input_scale: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """`weight_scale`, and for static activations `input_scale` [1] in the same dtype, at least its smallest normal one.

    Raises:
        ValueError: the scheme's activations are static and there is no scale of theirs, or the other way round.
    """
    if scheme.is_float:
        return {}
    if (input_scale is not None) != scheme.is_static:
        raise ValueError(f"{scheme.label}: a scale of the activations goes with static activations, and only there")
    stored = {"weight_scale": scale}
    if input_scale is not None:
        least = torch.finfo(scale.dtype).tiny
        stored["input_scale"] = input_scale.reshape(1).to(scale.device, scale.dtype).clamp(min=least)
    return stored


@dataclass(frozen=True)
class Group:
    """A scheme and the modules that have it: class names, module names, or regexes after `re:`."""

    scheme: Scheme
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Every group of a checkpoint, and what is left in float whatever the groups say.

    Attributes:
        groups: schemes with the modules that have them.
        ignore: modules left in float: class names, module names, or regexes after `re:`.
        spares_head: whether the layer that makes the logits and layers that share their weight with another stay in
            float too. The config doesn't say which they are; a reader asks the model.
        cache_scales: the last parts of the names of tensors by which servers scale cached keys and values. They are
            held as they are stored, and unused: the cache here has the model's dtype.
        sparse: modules whose weights are packed 2:4, beside what the groups say of their numbers; named as in `ignore`.
        dense: modules that aren't, whatever `sparse` says.
        activations: what is done to activations; there may be no group then, and all weights in float.
    """

    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()
    spares_head: bool = False
    cache_scales: tuple[str, ...] = ()
    sparse: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    activations: Activations = field(default_factory=Activations)

    def scheme_of(self, module: str, class_name: str = "Linear") -> Scheme | None:
        """The scheme of the linear layer of that name, or None when it is in float.

        Where targets of several groups name it, its own name goes before a regex, and a regex before its class; of
        two regexes the first in alphabetical order counts (compressed-tensors 0.20, `match_targets`).
        """
        found = self._numbers_of(module, class_name)
        if not named(module, self.sparse, class_name) or named(module, self.dense, class_name):
            return found
        return Scheme(FLOAT, sparsity="2:4") if found is None else replace(found, sparsity="2:4")

    def _numbers_of(self, module: str, class_name: str) -> Scheme | None:
        """The scheme that a group gives the linear layer of that name, or None."""
        if not self._ignored.isdisjoint((module, class_name)) or first_fit(module, self._ignored_regexes):
            return None
        named = (module, first_fit(module, self._regexes), class_name)
        return next((self._schemes[target] for target in named if target in self._schemes), None)

    # Looked up for every module of a model: a mixture of experts has tens of thousands, each named on its own.
    @cached_property
    def _schemes(self) -> dict[str, Scheme]:
        """Every target to its scheme, the last group's where several name it."""
        return {target: group.scheme for group in self.groups for target in group.targets}

    @cached_property
    def _regexes(self) -> list[str]:
        return _regexes_of(self._schemes)

    @cached_property
    def _ignored(self) -> frozenset[str]:
        return frozenset(self.ignore)

    @cached_property
    def _ignored_regexes(self) -> list[str]:
        return _regexes_of(self.ignore)


def checked_targets(values: object, where: str) -> tuple[str, ...]:
    """A config's list of targets or ignored modules.

    Raises:
        CheckpointError: it is no list of names, or a regex in it is broken.
    """
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(
            f"{where} of quantization_config is {shown(values)}, not a list of names; mend config.json"
        )
    for value in values:
        trouble = regex_trouble(value[3:]) if value.startswith("re:") else None
        if trouble is not None:
            raise CheckpointError(
                f"{where} of quantization_config holds {shown(value)}, no regular expression ({trouble}); "
                "mend config.json"
            )
    return tuple(values)


def named(module: str, targets: Iterable[str], class_name: str) -> bool:
    """Whether a module is among targets: by class name, by its own name, or by a regex from the name's start."""
    for target in targets:
        if target in (class_name, module) or (target.startswith("re:") and fits(target[3:], module)):
            return True
    return False


def _regexes_of(targets: Iterable[str]) -> list[str]:
    """The regexes among targets, in alphabetical order."""
    return sorted(target for target in targets if target.startswith("re:"))
