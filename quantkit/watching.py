"""Watching what is multiplied with a block's weights while it runs: the activations that calibration observes.

At the level of single operators, so that it makes no difference whether a weight belongs to a linear layer or is a
parameter that the model multiplies by itself, one expert after another.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

See = Callable[[str, int | None, torch.Tensor], None]

_aten = torch.ops.aten
PRODUCTS = {
    _aten.mm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.bmm.default: (0, 1),
    _aten.baddbmm.default: (1, 2),
    _aten.linear.default: (0, 1),
}
"""Where each product has its operands."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells, for every product with a watched parameter, what it is multiplied with.

    Args:
        parameters: the parameters by name, each with its axis of the in features.
        see: called with a parameter's name, the expert's number (None for a plain weight) and the activations [..., K].
    """

    def __init__(self, parameters: Mapping[str, tuple[torch.Tensor, int]], see: See) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see = see
        if len({p.untyped_storage().data_ptr() for p, _ in parameters.values()}) < len(parameters):
            raise ValueError("two of the parameters share their memory, and could not be told apart")
        self._known = {p.untyped_storage().data_ptr(): (name, p, axis) for name, (p, axis) in parameters.items()}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, and tell what met a watched parameter."""
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            left, right = (args[position] for position in PRODUCTS[func])
            if func is _aten.linear.default:
                right = right.t()
            for weight, other in ((right, left), (left.transpose(-1, -2), right.transpose(-1, -2))):
                found = self._known.get(weight.untyped_storage().data_ptr())
                if found is not None:
                    self._tell(*found, weight, other)
                    break
        return out

    def _tell(
        self, name: str, parameter: torch.Tensor, axis: int, weight: torch.Tensor, activations: torch.Tensor
    ) -> None:
        """Hand on the activations of a product with `weight` [..., K, N], all or one expert of the parameter."""
        if activations.shape[-1] != parameter.shape[axis]:
            return  # a part of the weight: what it meets says nothing of the rest
        if parameter.ndim < 3:
            self._see(name, None, activations)
        elif weight.ndim == 3 and weight.shape[0] == parameter.shape[0]:
            for expert, rows in enumerate(activations):
                self._see(name, expert, rows)
        else:
            expert = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
            self._see(name, int(expert), activations)


class ForcedRouting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes every token choose the same experts, whatever its router says.

    A router that takes the `topk` of as many scores as there are experts gets these instead, with their own scores.

    Args:
        experts: how many there are.
        chosen: which of them; filled up with others where more are asked for.

    Attributes:
        taken: how many were taken for each token, from the start of `chosen`; 0 when no router asked.
    """

    def __init__(self, experts: int, chosen: list[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._experts = experts
        self._order = [*chosen, *(number for number in range(experts) if number not in chosen)]
        self.taken = 0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, or choose in its place."""
        out = func(*args, **(kwargs or {}))
        if func is not _aten.topk.default or args[0].shape[-1] != self._experts or out[1].shape[-1] >= self._experts:
            return out
        self.taken = out[1].shape[-1]
        index = torch.tensor(self._order[: out[1].shape[-1]], device=out[1].device).expand_as(out[1]).contiguous()
        return args[0].gather(-1, index), index
