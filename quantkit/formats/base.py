"""What every format speaks of: the specification of a stored tensor, and which modules have which scheme."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantkit.errors import CheckpointError
from quantkit.scheme import Scheme


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


@dataclass(frozen=True)
class Group:
    """A scheme and the modules that have it: class names, module names, or regexes after `re:`."""

    scheme: Scheme
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Every group of a checkpoint, and what is left in float whatever the groups say."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()

    def scheme_of(self, module: str, class_name: str = "Linear") -> Scheme | None:
        """The scheme of the linear layer of that name, or None when it is in float."""
        if named(module, self.ignore, class_name):
            return None
        return next((group.scheme for group in self.groups if named(module, group.targets, class_name)), None)


def checked_targets(values: object, where: str) -> tuple[str, ...]:
    """A config's list of targets or ignored modules.

    Raises:
        CheckpointError: it is no list of names, or a regex in it is broken.
    """
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{where} of quantization_config is {values!r}, not a list of names; mend config.json")
    for value in values:
        try:
            re.compile(value[3:] if value.startswith("re:") else "")
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"{where} of quantization_config holds {value!r}, no regular expression ({error}); mend config.json"
            ) from error
    return tuple(values)


def named(module: str, targets: Sequence[str], class_name: str) -> bool:
    """Whether a module is among targets: by class name, by its own name, or by a regex from the name's start."""
    for target in targets:
        if target in (class_name, module) or (target.startswith("re:") and re.match(target[3:], module)):
            return True
    return False
