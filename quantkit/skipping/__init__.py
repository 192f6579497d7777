"""Layers that don't read the weights which zeros would multiply: `quantkit.load(..., skip_zeros=True)`.

Which layers is found by running the model once on random tokens and looking at what meets each linear layer: where a
share of `LEAST` or more is exactly zero, the layer multiplies only rows of its weight that meet something else
(`ops.linear_sparse_input`). Nothing is known of names or of activation functions, so that it makes no difference
whether a ReLU, a shift, a threshold or a norm with a ReLU behind it made the zeros.

Where such a layer is the last one of a gated MLP (`gating.py`), the up projection needs no neuron either whose gate is
zero.

A weight in float keeps its name and its shape [N, K], and lies in memory as [K, N] from then on: no bytes more. Int8
weights (row scales, activations in float) are packed a second time for the CPU, or laid out a second time for a GPU:
one byte a weight more. Results differ by rounding.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from quantkit_kernels import cpu_skipping, ops
from quantkit_kernels.backends import count
from torch import Tensor, nn

from quantkit import activations
from quantkit.activations import Adapted, adapt
from quantkit.linears import linear_orientation
from quantkit.modules import QuantizedLinear
from quantkit.skipping.gating import Parts, gated_parts, leaves_zeros

LEAST = 0.25
"""The smallest share of zeros in a layer's input that is worth looking for them."""

TOKENS = 64
"""So many random tokens show where zeros are."""

RECENT = 4
"""So many of the latest calls may have made what meets a linear layer."""

WEIGHTS_ALONE = ("linear_weight_only", "linear_weight_only_packed")
"""The ops of packed layers whose activations stay in float."""


@dataclass(frozen=True)
class Found:
    """A linear layer whose input is often zero.

    Attributes:
        name: the layer's name.
        zeros: the share of zeros that random tokens showed.
        gated: the name of the gated MLP that it is the last layer of, or None.
        feeders: the layers, by name, whose neuron i meets nothing but in feature i of this one.
        reason: why it stays as it is; empty where it doesn't.
    """

    name: str
    zeros: float
    gated: str | None = None
    feeders: tuple[str, ...] = ()
    reason: str = ""


@dataclass
class Read:
    """What layers that skip zeros have read, of single tokens.

    Attributes:
        rows: in features that met single tokens.
        zeros: those that were zero, whose rows weren't read.
        layers: the layers that were called, by id.
    """

    rows: int = 0
    zeros: int = 0
    layers: set[int] = field(default_factory=set)

    @property
    def share(self) -> float:
        """The share of the rows that weren't read."""
        return self.zeros / self.rows if self.rows else 0.0


_counting: list[Read] = []


@contextmanager
def counted() -> Iterator[Read]:
    """A count of the rows that are skipped while the context lasts, for every model of the process.

    Counting waits for the numbers: on a GPU it costs more than what is skipped.
    """
    read = Read()
    _counting.append(read)
    try:
        yield read
    finally:
        _counting[:] = [each for each in _counting if each is not read]


class Skipping:
    """What a linear layer's class is mixed with where its input is often zero."""

    plain: type[nn.Module]
    __dict__: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (Skipping, self.plain), self.__getstate__()  # type: ignore[attr-defined]


class Gated:
    """What a gated MLP's class is mixed with where it needs no neurons whose gate is zero.

    Attributes:
        gate, up, down: names of its linear layers.
        function: the name of its activation, or None for relu.
    """

    plain: type[nn.Module]
    gate: str
    up: str
    down: str
    function: str | None
    __dict__: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (Gated, self.plain), self.__getstate__()  # type: ignore[attr-defined]


def _linear(self: Any, x: Tensor) -> Tensor:
    """The layer's output [..., N] in x's dtype, from the rows that x needs."""
    ordinary: Callable[[Tensor], Tensor] = functools.partial(self.plain.forward, self)
    if _counting and x.numel() == x.shape[-1]:
        _note(self, x)
    if _learns(self, x):
        return ordinary(x)
    bias = self._parameters.get("bias")
    if not isinstance(self, QuantizedLinear):
        rows = self.weight if orientation_of(self) == "in_out" else self.weight.t()
        return ops.linear_sparse_input(x, rows, None, bias)
    by_row = self._by_row
    if not x.is_cpu or self.backend == "triton":
        kept = self._kept(torch.int8, lambda codes, scale: (codes.t().contiguous(), by_row(scale)))
        if kept is None:
            return ordinary(x)
        return ops.linear_sparse_input(x, kept.weight, kept.scale, bias, self.backend)
    kept = self._kept(torch.uint8, lambda codes, scale: (cpu_skipping.pack_rows(codes.t()).table, by_row(scale)))
    if kept is None:
        return ordinary(x)
    table = cpu_skipping.Rows(kept.weight, self.in_features, self.out_features)
    return cpu_skipping.linear_of_rows(x, table, kept.scale, bias, ordinary)


def _learns(module: nn.Module, x: Tensor) -> bool:
    """Whether gradients are wanted, which the ops don't have."""
    return torch.is_grad_enabled() and (x.requires_grad or any(each.requires_grad for each in module.parameters()))


def _mlp(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The gated MLP's output, from the neurons whose gate isn't zero."""
    gate, up, down = (self.get_submodule(name) for name in (self.gate, self.up, self.down))
    tokens = x.numel() // max(1, x.shape[-1])
    few = tokens <= cpu_skipping.GATHERED_TOKENS or not x.is_cpu
    watched = any(each._forward_pre_hooks or each._forward_hooks for each in (up, down))  # who wants to see them called
    if args or kwargs or not few or watched or _learns(self, x):
        return self.plain.forward(self, x, *args, **kwargs)
    gates = gate(x)
    gates = F.relu(gates) if self.function is None else self.get_submodule(self.function)(gates)
    if not isinstance(up, QuantizedLinear) and not isinstance(down, QuantizedLinear):
        if _counting and tokens == 1:
            _note(down, gates)
        rows = down.weight if orientation_of(down) == "in_out" else down.weight.t()
        columns = up.weight.t() if orientation_of(up) == "in_out" else up.weight
        biases = up._parameters.get("bias"), down._parameters.get("bias")
        return ops.mlp_sparse(x, gates, columns, None, biases[0], rows, None, biases[1])
    count("mlp_sparse", torch.int8, "cpu")
    return cpu_skipping.gated(gates, functools.partial(_rows, up, x), torch.int8, down)


def _rows(layer: QuantizedLinear, x: Tensor, used: Tensor | None) -> Tensor:
    """What some neurons of a layer with int8 weights give, [..., R]; all of them for None."""
    if used is None:
        found: Tensor = layer(x)
        return found
    whole = layer._parameters.get("bias")
    bias = None if whole is None else whole.index_select(0, used)
    if layer.op == "linear_weight_only_packed":
        words, scale = layer.weight, layer._by_row(layer.get_buffer("weight_scale"))
        part = words.index_select(0, used)  # type: ignore[operator]
        return ops.linear_weight_only_packed(x, part, scale.index_select(0, used), bias, layer.scheme.bits)
    codes, scale = layer.codes_and_scale()
    scale = layer._by_row(scale)
    return ops.linear_weight_only(x, codes.index_select(0, used), scale.index_select(0, used), bias)


def _note(layer: nn.Module, x: Tensor) -> None:
    zeros = x.numel() - int(torch.count_nonzero(x))
    for read in _counting:
        read.rows += x.numel()
        read.zeros += zeros
        read.layers.add(id(layer))


_classes: dict[tuple[type, type], type[nn.Module]] = {}


def _class(kind: type, plain: type[nn.Module]) -> type[nn.Module]:
    """The plain class with what `Skipping` or `Gated` adds, under the same name; one for each plain class."""
    if (kind, plain) in _classes:
        return _classes[kind, plain]
    members = {
        "plain": plain,
        "forward": _linear if kind is Skipping else _mlp,
        "__module__": plain.__module__,
        "__doc__": plain.__doc__,
    }
    _classes[kind, plain] = type(plain.__name__, (kind, plain), members)
    return _classes[kind, plain]


def _restored(kind: type, plain: type[nn.Module]) -> nn.Module:
    """An empty module of the mixed class, for a copy."""
    made = _class(kind, plain)
    return made.__new__(made)


def orientation_of(layer: Any) -> str | None:
    """`linear_orientation` of the class that a layer had before."""
    known: str | None = layer.__dict__.get("orientation")
    return known if known is not None else linear_orientation(layer)


def skip_zeros(model: nn.Module) -> list[Found]:
    """The linear layers whose input is often zero, which from now on read only the rows that are needed.

    Those with a reason stay as they are. Layers that do so already are found again and left alone.
    """
    found = sparse_inputs(model)
    for each in found:
        if each.reason:
            continue
        layer = model.get_submodule(each.name)
        if not isinstance(layer, Skipping):
            _let_skip(layer)
        if each.gated is not None:
            _let_gate(model.get_submodule(each.gated), _parts(model.get_submodule(each.gated)))
    return found


def sparse_inputs(model: nn.Module) -> list[Found]:
    """The linear layers whose input is often zero, by a pass of the model over random tokens."""
    seen = _seen(model)
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    found = []
    for name, met in seen.items():
        if met.zeros < LEAST * met.numbers:
            continue
        layer = model.get_submodule(name)
        reason = _against(layer, counts)
        parent_name = name.rpartition(".")[0]
        parts = None if reason else _parts(model.get_submodule(parent_name))
        feeders = met.feeders
        gated = parent_name if parts is not None and parts.down == name.rpartition(".")[2] else None
        if parts is not None and gated and leaves_zeros(parts.function_of(model.get_submodule(gated))):
            feeders = (f"{gated}.{parts.gate}", f"{gated}.{parts.up}")
        found.append(Found(name, met.zeros / met.numbers, gated, feeders, reason))
    return found


def _parts(module: nn.Module) -> Parts | None:
    """The parts of a module that is a gated MLP."""
    layers = {name: _in_features(child) for name, child in module.named_children() if is_linear(child)}
    return gated_parts(module, layers)


def _in_features(layer: Any) -> int:
    """K of a linear layer."""
    if isinstance(layer, QuantizedLinear):
        return layer.in_features
    return int(layer.weight.shape[0 if orientation_of(layer) == "in_out" else 1])


def _against(layer: nn.Module, counts: dict[int, int]) -> str:
    """Why a layer can't skip rows, or an empty string."""
    if isinstance(layer, QuantizedLinear):
        if layer.op not in WEIGHTS_ALONE:
            return "its activations are quantized, too"
        codes, scale = layer.codes_and_scale()
        if codes.dtype != torch.int8 or layer.scheme.bits != 8:
            return f"its weight is {layer.scheme.label}; rows of int8 can be skipped"
        return "" if scale.numel() in (1, layer.out_features) else "its rows have several scales each"
    if any(counts.get(id(parameter), 0) > 1 for parameter in layer.parameters()):
        return "another module has the same weight"
    return ""


@dataclass
class _Met:
    """What met a linear layer: numbers, how many of them were zero, and the layers whose neurons they are."""

    zeros: int = 0
    numbers: int = 0
    feeders: tuple[str, ...] = ()


def _seen(model: nn.Module) -> dict[str, _Met]:
    """What meets each linear layer, by name in the model's order, for random tokens."""
    seen: dict[str, _Met] = {}
    layers: deque[tuple[str, Tensor]] = deque(maxlen=RECENT)
    functions: deque[tuple[nn.Module, Tensor, Tensor]] = deque(maxlen=RECENT)

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            x = args[0] if args else None
            if not isinstance(x, Tensor) or not isinstance(output, Tensor) or not x.numel():
                return
            if not is_linear(module):
                functions.append((module, x, output))
                return
            met = seen.setdefault(name, _Met())
            met.zeros += x.numel() - int(counts_of(module, x).sum())
            met.numbers += x.numel()
            met.feeders = _feeders(x, layers, functions)
            layers.append((name, output))

        return hook

    with _hooked(model, note), torch.no_grad():
        model(input_ids=_tokens(model), use_cache=False)
    return seen


def counts_of(layer: nn.Module, x: Tensor) -> Tensor:
    """Which numbers of a layer's input aren't zero for it, its own threshold taken into account."""
    threshold = layer.__dict__.get("threshold") if isinstance(layer, Adapted) else None
    return ~(x.abs() < threshold) if threshold else x != 0


def _feeders(
    x: Tensor, layers: Iterable[tuple[str, Tensor]], functions: Iterable[tuple[nn.Module, Tensor, Tensor]]
) -> tuple[str, ...]:
    """The layer whose output an activation made x of, number by number; nothing where none of the latest did."""
    for name, made in layers:
        if made.shape[-1] != x.shape[-1] or made.numel() != x.numel():
            continue
        if torch.equal(F.relu(made).view(x.shape), x):
            return (name,)
        for function, given, output in functions:
            same = given.numel() == output.numel() == x.numel() and torch.equal(output.view(x.shape), x)
            if same and torch.equal(given.view(made.shape), made) and leaves_zeros(function):
                return (name,)
    return ()


@contextmanager
def _hooked(model: nn.Module, note: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    """While it lasts the calls of every linear layer, and of modules without parts and parameters, are noted."""
    hooks = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if name and (is_linear(module) or not any(True for _ in (*module.children(), *module.parameters())))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, in float or packed, whatever its class is mixed with."""
    return isinstance(module, Skipping) or activations.is_linear(module)


def _tokens(model: Any) -> Tensor:
    """Random tokens [1, M] that the model knows, on its device."""
    config = model.config.get_text_config()
    length = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (1, length), generator=generator).to(model.device)


def _let_skip(layer: Any) -> None:
    """Return nothing; the layer reads only the rows that its input needs, and its weight in float lies by rows."""
    adapted = isinstance(layer, Adapted)
    if adapted:
        layer.__class__ = layer.plain  # zeros are made first, then skipped
    if not isinstance(layer, QuantizedLinear):
        orientation = linear_orientation(layer)
        layer.__dict__["orientation"] = orientation
        if orientation == "out_in":
            layer.weight.data = layer.weight.data.t().contiguous().t()
    layer.__class__ = _class(Skipping, type(layer))
    if adapted:
        adapt(layer)


def _let_gate(module: Any, parts: Parts | None) -> None:
    """Return nothing; the module computes only neurons whose gate isn't zero, where all its layers allow it."""
    if isinstance(module, Gated) or parts is None:
        return
    up, down = module.get_submodule(parts.up), module.get_submodule(parts.down)
    plain = not any(isinstance(each, Adapted) for each in (up, down)) and not isinstance(up, Skipping)
    packed = [isinstance(each, QuantizedLinear) for each in (up, down)]
    fits = not any(packed) or (all(packed) and not _against(up, {}) and down.get_buffer(next(iter(down.stored))).is_cpu)
    if plain and fits and not isinstance(module, Adapted):
        module.__dict__.update(gate=parts.gate, up=parts.up, down=parts.down, function=parts.function)
        module.__class__ = _class(Gated, type(module))
