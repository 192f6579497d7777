"""What a checkpoint says of its activations where no config of transformers can, and the modules that do it.

An *output* is a module whose output goes through relu(x - shift): in place of what the module computes (an activation
such as SiLU), or after it (a norm, an up projection). An *input* is a linear layer that sees zeros where |x| is below a
threshold. All of it is a few words in `quantization_config` (quantkit's own format, version 5; docs/formats.md); no
tensor is stored for it, and no parameter changes its name.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quantkit.errors import CheckpointError
from quantkit.linears import linear_orientation
from quantkit.untrusted import shown

FUNCTIONS = ("relu",)


@dataclass(frozen=True)
class Output:
    """relu(x - shift), of what a module is given (`replaces`) or of what it gives.

    Attributes:
        shift: the number that is taken off before.
        replaces: whether the function stands in the module's place, which then has no parameter.
        feeds: the linear layers that see its zeros: their input is zero where this output is.
    """

    shift: float = 0.0
    replaces: bool = False
    feeds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Activations:
    """What a checkpoint says of its activations.

    Attributes:
        outputs: modules by name, whose output is rectified.
        inputs: linear layers by name, each with the magnitude below which its input is zeroed.
    """

    outputs: Mapping[str, Output] = field(default_factory=dict)
    inputs: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.outputs or self.inputs)

    def to_dict(self) -> dict[str, Any]:
        """What stands in config.json."""
        return {
            "outputs": {
                name: {"function": "relu", "shift": one.shift, "replaces": one.replaces, "feeds": list(one.feeds)}
                for name, one in self.outputs.items()
            },
            "inputs": {name: {"threshold": threshold} for name, threshold in self.inputs.items()},
        }

    @classmethod
    def parse(cls, values: object) -> "Activations":
        """What a config says.

        Raises:
            CheckpointError: it is no such table.
        """
        if not isinstance(values, dict) or not values.keys() <= {"outputs", "inputs"}:
            raise _unreadable("activations", values, 'a table of "outputs" and "inputs"')
        outputs = {name: _output(name, one) for name, one in _table(values, "outputs").items()}
        inputs = {name: _threshold(name, one) for name, one in _table(values, "inputs").items()}
        return cls(outputs, inputs)

    def sparse_inputs(self, model: nn.Module) -> list[str]:
        """The linear layers of the model, by name, whose input is zero often by construction, in the model's order.

        Those whose input is thresholded, and those that a rectified output feeds.
        """
        names = {*self.inputs, *(name for one in self.outputs.values() for name in one.feeds)}
        return [name for name, _ in model.named_modules() if name in names]

    def with_more(self, more: "Activations") -> "Activations":
        """This and more; what is said of a module twice is as `more` says it."""
        return Activations({**self.outputs, **more.outputs}, {**self.inputs, **more.inputs})

    def within(self, name: str) -> "Activations":
        """What concerns the module of that name, with names as they are inside of it."""
        prefix = f"{name}."
        return Activations(
            {key.removeprefix(prefix): one for key, one in self.outputs.items() if key.startswith(prefix)},
            {key.removeprefix(prefix): one for key, one in self.inputs.items() if key.startswith(prefix)},
        )

    def check(self, model: nn.Module) -> None:
        """Return nothing; raise CheckpointError where a module isn't there, or isn't what it is said to be."""
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in (*self.outputs, *self.inputs):
            if name not in modules or not name:
                raise CheckpointError(
                    f"activations of quantization_config name {shown(name)}, which this model doesn't have; config and "
                    "weights don't belong together: download both again"
                )
        for name, one in self.outputs.items():
            module = modules[name]
            if one.replaces and any(True for _ in (*module.parameters(), *module.buffers())):
                raise CheckpointError(
                    f"activations of quantization_config put relu in place of {shown(name)}, which has weights; mend "
                    "config.json"
                )
        for name in self.inputs:
            if not is_linear(modules[name]):
                raise CheckpointError(
                    f"activations of quantization_config give a threshold to {shown(name)}, which is no linear layer; "
                    "mend config.json"
                )


def _unreadable(what: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(f"{what} of quantization_config is {shown(value)}, not {expected}; mend config.json")


def _table(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key, {})
    if not isinstance(found, dict):
        raise _unreadable(f"activations.{key}", found, "a table of modules")
    return found


def _number(where: str, value: object) -> float:
    """A finite number of a config."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= torch.finfo().max:
        raise _unreadable(where, value, "a finite number of float32")
    return float(value)


def _output(name: str, value: object) -> Output:
    where = f"activations.outputs of {shown(name)}"
    known = {"function", "shift", "replaces", "feeds"}
    if not isinstance(value, dict) or not {"function"} <= value.keys() <= known:
        raise _unreadable(where, value, f"a table of {', '.join(sorted(known))}")
    if value["function"] not in FUNCTIONS:
        raise _unreadable(f"the function in {where}", value["function"], " or ".join(map(repr, FUNCTIONS)))
    replaces, feeds = value.get("replaces", False), value.get("feeds", [])
    if not isinstance(replaces, bool):
        raise _unreadable(f"replaces in {where}", replaces, "true or false")
    if not isinstance(feeds, list) or not all(isinstance(each, str) for each in feeds):
        raise _unreadable(f"feeds in {where}", feeds, "a list of names")
    return Output(_number(f"the shift in {where}", value.get("shift", 0.0)), replaces, tuple(feeds))


def _threshold(name: str, value: object) -> float:
    where = f"activations.inputs of {shown(name)}"
    if not isinstance(value, dict) or value.keys() != {"threshold"}:
        raise _unreadable(where, value, 'a table with "threshold"')
    threshold = _number(f"the threshold in {where}", value["threshold"])
    if threshold < 0:
        raise _unreadable(f"the threshold in {where}", threshold, "0 or more")
    return threshold


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, in float or packed, with a threshold of its own or without."""
    if isinstance(module, Adapted):
        kind: Any = module.plain
        module = copy.copy(module)  # which shares its tensors
        module.__class__ = kind
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    packed = hasattr(module, "scheme") and all(isinstance(size, int) for size in sizes)
    return packed or linear_orientation(module) is not None


def rectified(x: torch.Tensor, shift: float) -> torch.Tensor:
    """relu(x - shift), in x's dtype, in which the shift is rounded (arXiv:2310.04564, section 5.3)."""
    return F.relu(x - shift if shift else x)


def zeroed(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """X where its magnitude is at least the threshold (rounded to x's dtype), else 0; NaN stays."""
    return x.masked_fill(x.abs() < threshold, 0.0)


class ReLU(nn.Module):
    """relu(x - shift), in the place of another activation."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is left of x above the shift."""
        return rectified(x, self.shift)

    def extra_repr(self) -> str:
        """The shift, for printing."""
        return f"shift={self.shift:g}" if self.shift else ""


class Adapted:
    """What a module's class is mixed with where its input is thresholded or its output rectified.

    The module itself stays, with its parameters and their names; so does whatever asks for its class by `isinstance`.

    Attributes:
        threshold: the magnitude below which its input is zeroed, or None.
        shift: that of the relu on its output, or None where it has none.
    """

    threshold: float | None = None
    shift: float | None = None
    plain: type[nn.Module]
    forward: Callable[..., Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (self.plain,), self.__getstate__()


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The plain module's output, with what was put before and after it."""
    if self.threshold is not None:
        x = zeroed(x, self.threshold)
    out = self.plain.forward(self, x, *args, **kwargs)
    return out if self.shift is None else rectified(out, self.shift)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _class(plain: type[nn.Module]) -> type[nn.Module]:
    """The plain class with what `Adapted` adds, under the same name."""
    if plain not in _CLASSES:
        members = {"plain": plain, "forward": _forward, "__module__": plain.__module__, "__doc__": plain.__doc__}
        _CLASSES[plain] = type(plain.__name__, (Adapted, plain), members)
    return _CLASSES[plain]


def _restored(plain: type[nn.Module]) -> nn.Module:
    """An empty module of the mixed class, for a copy."""
    kind = _class(plain)
    return kind.__new__(kind)


def adapt(module: nn.Module, *, threshold: float | None = None, shift: float | None = None) -> None:
    """Return nothing; from now on the module's input is thresholded, or its output rectified; what it had stays."""
    if not isinstance(module, Adapted):
        module.__class__ = _class(type(module))
    for name, value in (("threshold", threshold), ("shift", shift)):
        if value is not None:
            module.__dict__[name] = value


@contextmanager
def adapted(module: nn.Module, shift: float | None) -> Iterator[None]:
    """While it lasts the module's output is rectified; None leaves it as it is."""
    kind, held = module.__class__, dict(module.__dict__)
    try:
        if shift is not None:
            adapt(module, shift=shift)
        yield
    finally:
        module.__class__ = kind
        for name in ("threshold", "shift"):
            module.__dict__.pop(name, None)
            if name in held:
                module.__dict__[name] = held[name]


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Return nothing; a module that takes another's place does what that one's input and output were put through."""
    if isinstance(old, Adapted):
        adapt(new, threshold=old.threshold, shift=old.shift)


def apply(model: nn.Module, activations: Activations) -> None:
    """Return nothing; the model, or a part of it, does what is said of its activations.

    Raises:
        CheckpointError: a module isn't there, or isn't what it is said to be; then nothing is changed.
    """
    activations.check(model)
    for name, one in activations.outputs.items():
        if one.replaces:
            model.set_submodule(name, ReLU(one.shift).train(model.training))
        else:
            adapt(model.get_submodule(name), shift=one.shift)
    for name, threshold in activations.inputs.items():
        adapt(model.get_submodule(name), threshold=threshold)


def taken_out(config: dict[str, Any]) -> tuple[dict[str, Any], Activations]:
    """A config.json without a `quantization_config` that speaks of activations alone, and what is said of them.

    Where it speaks of weights too, the config stays as it is.

    Raises:
        CheckpointError: what is said of activations can't be read.
    """
    stored = config.get("quantization_config")
    if not isinstance(stored, dict) or stored.get("quant_method") != "quantkit" or "activations" not in stored:
        return config, Activations()
    found = Activations.parse(stored["activations"])
    alone = stored.get("groups") == []
    return {key: value for key, value in config.items() if key != "quantization_config" or not alone}, found


def remember(skeleton: nn.Module, activations: Activations) -> None:
    """Return nothing; models that are built like this skeleton will do what is said of activations.

    The skeleton itself stays plain, so that its linear layers are found.

    Raises:
        CheckpointError: a module isn't there, or isn't what it is said to be.
    """
    if activations:
        activations.check(skeleton)
        skeleton.__dict__["recorded_activations"] = activations


def remembered(skeleton: nn.Module) -> Activations:
    """What models that are built like this skeleton do."""
    found: Activations = skeleton.__dict__.get("recorded_activations", Activations())
    return found
