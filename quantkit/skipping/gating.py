"""Whether a module is a gated MLP, and of which parts: proven by one call with random numbers, not read off names.

Its output is its last layer's, what meets that layer is an activation of one layer's output times another's output, bit
for bit, and these two layers are given what the module is given. Nothing else of the module then matters.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parts:
    """A gated MLP's parts: names of its linear layers, and of its activation (None: relu in its own code)."""

    gate: str
    up: str
    down: str
    function: str | None

    def function_of(self, module: nn.Module) -> Function:
        """The activation."""
        return F.relu if self.function is None else module.get_submodule(self.function)


@dataclass
class _Calls:
    """One call of a module: what its children were given and gave, by name, and who were called in another way."""

    given: dict[str, Tensor] = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)
    otherwise: set[str] = field(default_factory=set)

    def of(self, name: str) -> Callable[..., None]:
        """A forward hook for the child of that name."""

        def hook(child: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tensors = [each for each in tree_leaves(args) if isinstance(each, Tensor)]
            if name in self.given or len(tensors) != 1 or not isinstance(output, Tensor):
                self.otherwise.add(name)
            else:
                self.given[name], self.made[name] = tensors[0], output

        return hook


def gated_parts(module: nn.Module, layers: Mapping[str, int]) -> Parts | None:
    """The parts of a gated MLP; None for a module that isn't one.

    Args:
        module: any module; it is called, and left as it is.
        layers: its linear layers, each with its in features.
    """
    if len(layers) != 3 or any(True for _ in module.named_parameters(recurse=False)):
        return None
    parameter = next((each for each in (*module.parameters(), *module.buffers()) if each.is_floating_point()), None)
    if parameter is None:
        return None
    for width in sorted(set(layers.values())):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 3, width, generator=generator).to(parameter)
        with _watched(module) as calls, torch.no_grad():
            try:
                output = module(x)
            except Exception:  # whatever a module that isn't an MLP says to this
                continue
        if not calls.otherwise and set(layers) <= set(calls.given):
            return _matched(layers, x, output, calls)
    return None


@contextmanager
def _watched(module: nn.Module) -> Iterator[_Calls]:
    calls = _Calls()
    hooks = [child.register_forward_hook(calls.of(name)) for name, child in module.named_children()]
    try:
        yield calls
    finally:
        for each in hooks:
            each.remove()


def _matched(layers: Mapping[str, int], x: Tensor, output: Any, calls: _Calls) -> Parts | None:
    """The parts by which the call is a gated MLP's."""
    down = next((name for name in layers if calls.made[name] is output), None)
    if down is None:
        return None
    first, second = (name for name in layers if name != down)
    if not torch.equal(calls.given[first], x) or not torch.equal(calls.given[second], x):
        return None
    functions = [name for name in calls.made if name not in layers]
    for gate, up in ((first, second), (second, first)):
        for function in (*functions, None):
            if function is not None and not torch.equal(calls.given[function], calls.made[gate]):
                continue
            gates = F.relu(calls.made[gate]) if function is None else calls.made[function]
            if torch.equal(calls.given[down], gates * calls.made[up]):
                return Parts(gate, up, down, function)
    return None


def leaves_zeros(function: Function) -> bool:
    """Whether zeros stay zeros and other numbers don't notice: so that a neuron that isn't computed may be zero."""
    x = torch.linspace(-4, 4, 64).view(1, 1, 64)
    left = torch.arange(64) % 3 == 0
    try:
        with torch.no_grad():
            return torch.equal(function(x * left), function(x) * left)
    except Exception:  # whatever code of a model says to these numbers
        return False
