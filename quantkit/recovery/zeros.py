"""Weights that are zero and stay so while a model is trained: masks of pruned parameters."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from quantkit.sparsity import GROUPS, has_groups

LEAST = 0.1
"""A weight of which this share is exactly zero was pruned: of weights that were trained as they are hardly any is."""


@dataclass
class Masks:
    """Which weights of which parameters are zero, and stay so.

    Attributes:
        zeros: bool tensors in the shape of the parameters, true where a weight is zero, by the parameter's name.
        patterns: what their zeros look like, `2:4`, `4:8` or `unstructured`, by the parameter's name.
    """

    zeros: dict[str, torch.Tensor] = field(default_factory=dict)
    patterns: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, modules: Collection[str] = (), transposed: Collection[str] = ()) -> "Masks":
        """The masks of a model's weights.

        A matrix (or a stack of them) has one where it belongs to one of `modules`, which are known to be pruned, and
        where at least a tenth of it is exactly zero.

        Args:
            model: its parameters are looked at.
            modules: names of layers, or of parameters where no layer owns them.
            transposed: names of parameters that hold K before N.
        """
        found = cls()
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or not parameter.is_floating_point():
                continue
            zeros = parameter.detach() == 0
            known = name in modules or name.rpartition(".")[0] in modules
            count = int(zeros.sum())
            if count and (known or count >= LEAST * zeros.numel()):
                found.zeros[name] = zeros
                found.patterns[name] = _pattern(~zeros, -2 if name in transposed else -1)
        return found

    @property
    def count(self) -> int:
        """How many weights are zero."""
        return sum(int(zeros.sum()) for zeros in self.zeros.values())

    def to(self, device: torch.device) -> None:
        """Move the masks."""
        self.zeros = {name: zeros.to(device) for name, zeros in self.zeros.items()}

    @torch.no_grad()
    def apply(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Set to zero what is zero of these parameters (or gradients), by name."""
        for name, zeros in self.zeros.items():
            if name in parameters:
                parameters[name].masked_fill_(zeros, 0.0)

    def broken(self, parameters: Mapping[str, torch.Tensor]) -> str | None:
        """The name of a parameter that isn't zero where it should be, or None."""
        for name, zeros in self.zeros.items():
            if bool((parameters[name].detach().to(zeros.device)[zeros] != 0).any()):
                return name
        return None

    def to_dict(self) -> dict[str, object]:
        """How many parameters have zeros in each pattern, and how many zeros there are, as plain JSON values."""
        patterns = list(self.patterns.values())
        weights = sum(zeros.numel() for zeros in self.zeros.values())
        counts = {pattern: patterns.count(pattern) for pattern in dict.fromkeys(patterns)}
        return {"parameters": len(patterns), "patterns": counts, "zeros": self.count, "weights": weights}


def _pattern(kept: torch.Tensor, in_axis: int) -> str:
    """What the zeros of a weight look like, along its in features."""
    found = (name for name, (keep, of) in GROUPS.items() if has_groups(kept, keep, of, in_axis))
    return next(found, "unstructured")
