"""Where a block has room for a relu: the activations of its MLPs, and its norms before linear layers.

Found from a trace. What meets a linear layer is followed back, through operations on each number by itself, to the
products that it is made of. Where all of these are linear layers and something on the way isn't linear, that is an MLP;
the module that did it is the one, without parameters, whose calls cover it. Each find is proven (`replaying`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit.discovery.products import multiplies_activations, product_of
from quantkit.discovery.replaying import Call, Proof, calls_in
from quantkit.discovery.structure import Activation, LinearUse, Norm
from quantkit.discovery.trace import Op, Slot, Trace, address, record
from quantkit.discovery.uses import kind_of

COPIES = ("_to_copy", "clone", "copy", "_unsafe_view", "contiguous")
AFFINE = ("add", "sub", "rsub", "mul", "div", "neg", *COPIES)
GATHERS = ("index", "index_select", "gather", *COPIES)


@dataclass
class Path:
    """What a tensor is made of: the operations on each number on its way, calls among them, and what they start from.

    Attributes:
        ops: numbers of the operations.
        calls: activations on the way; what they were given isn't followed.
        linears: parameters of linear layers, with the address of what they gave.
        others: what else it is made of, in words.
    """

    ops: set[int] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)
    linears: dict[str, int] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """What `rectifiable` found: `Structure` says what these are."""

    activations: tuple[Activation, ...]
    norms: tuple[Norm, ...]
    unchanged: dict[str, str]


def rectifiable(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], uses: Sequence[LinearUse]) -> Found:
    """The activations and norms of a block that a relu can stand in place of, or behind.

    The block is left as it is. Its weights are float32 in memory (random ones will do), as for `discover`.
    """
    trace = Trace({name: parameter.detach() for name, parameter in block.named_parameters()})
    with calls_in(block, trace) as calls:
        record(block, [(args, kwargs)], trace)
    search = _Search(block, trace, calls, {use.parameter: use for use in uses})
    routed = any(use.role == "router" for use in uses)
    prove = Proof(block, args, kwargs, trace).holds
    activations, norms = dict[str, Activation](), []
    for each in search.activations():
        if prove(each.module, [call for call in calls if call.name == each.module], replaces=True, routed=routed):
            activations |= {found.module: found for found in (*search.likes(each), each)}
        else:
            search.unchanged[each.module] = "with relu in its place the block does not give what was expected"
    for norm in search.norms():
        if prove(norm.module, [call for call in calls if call.name == norm.module], replaces=False, routed=routed):
            norms.append(norm)
        else:
            search.unchanged[norm.module] = "with relu behind it the block does not give what was expected"
    return Found(tuple(activations.values()), tuple(norms), search.unchanged)


class _Search:
    """Follows what meets linear layers back to what it is made of."""

    def __init__(self, block: nn.Module, trace: Trace, calls: list[Call], uses: Mapping[str, LinearUse]) -> None:
        self.block, self.trace, self.calls, self.uses = block, trace, calls, uses
        self.unchanged: dict[str, str] = {}
        self._writers: dict[int, list[int]] = {}
        for number, op in enumerate(trace.ops):
            for slot in op.results:
                self._writers.setdefault(slot.storage, []).append(number)
        self.products = list(self._products())
        self._made = {number: name for number, name, _ in self.products}
        self._nonlinear = self._activation_calls()

    def _products(self) -> Iterator[tuple[int, str, Slot]]:
        """Every product with a linear layer's weight: the operation's number, the parameter, the activations."""
        for number, op in enumerate(self.trace.ops):
            product = product_of(op)
            if product is None:
                continue
            for weight, x in ((product.right, product.left), (product.left, product.right)):
                if weight.parameter in self.uses and weight.weightlike and x.active:
                    yield number, str(weight.parameter), x

    def _activation_calls(self) -> list[Call]:
        """The outermost calls of modules that compute a nonlinear function of each number."""
        found: list[Call] = []
        known: dict[str, bool] = {}
        for call in sorted(self.calls, key=lambda call: (call.start, -call.end)):
            if any(outer.start <= call.start and call.end <= outer.end for outer in found) or call.start == call.end:
                continue
            if call.name not in known:
                known[call.name] = is_activation(call.module, call.taken.ndim)
            if known[call.name]:
                found.append(call)
        return found

    def path(self, home: int, before: int) -> Path:
        """What the tensor at an address is made of, as it is before an operation."""
        found = Path()
        self._follow(home, before, found)
        return found

    def _follow(self, home: int, before: int, found: Path) -> None:
        writer = max((number for number in self._writers.get(home, ()) if number < before), default=None)
        if writer is None:
            found.others.append("the block's input")
            return
        call = next((each for each in self._nonlinear if each.home == home and each.start <= writer < each.end), None)
        if call is not None:
            if call not in found.calls:
                found.calls.append(call)
            return
        if writer in found.ops:
            return
        op = self.trace.ops[writer]
        if writer in self._made and self.uses[self._made[writer]].role == "linear":
            found.linears[self._made[writer]] = home
        elif multiplies_activations(op) or not (torch.Tag.pointwise in op.func.tags or op.name in COPIES):  # type: ignore[attr-defined]
            found.others.append(op.name.lstrip("_"))
        else:
            found.ops.add(writer)
            for slot in op.slots:
                if slot.active and slot.floating:
                    self._follow(slot.storage, writer, found)

    def activations(self) -> list[Activation]:
        """The activations of MLPs, one for each module; what can't be one is in `unchanged`, with the reason."""
        found: dict[str, Activation] = {}
        matched: set[int] = set()
        for number, down, x in self.products:
            way = self.path(x.storage, number)
            if not way.calls:
                inline = [self.trace.ops[i].name for i in sorted(way.ops) if not self._affine(self.trace.ops[i])]
                if inline and way.linears and not way.others:
                    words = f"computes its activation in code of its own ({inline[0]}), not in a module without weights"
                    self.unchanged.setdefault(down, words)
                continue
            reason = self._against(way)
            if self.uses[down].role != "linear":
                reason = f"its output chooses experts by {down}"
            for call in way.calls:
                if reason is not None:
                    self.unchanged[call.name] = f"{reason}, on the way to {down}"
                    continue
                matched.add(id(call))
                made = self._activation(call, way, down)
                known = found.get(call.name)
                found[call.name] = made if known is None else _merged(known, made)
        for call in self._nonlinear:
            if call.name in found and id(call) not in matched:
                self.unchanged.setdefault(call.name, "it is called for something other than an MLP as well")
        return [each for name, each in found.items() if name not in self.unchanged]

    def _against(self, way: Path) -> str | None:
        """Why what meets a linear layer isn't an MLP's activation, or None."""
        if len({call.name for call in way.calls}) > 1:
            return "there are two activations"
        before = self.path(address(way.calls[0].taken), way.calls[0].start)
        if before.others or before.calls or not before.linears:
            return f"it is given what is no linear layer's output ({(before.others or ['another activation'])[0]})"
        if way.others:
            return f"its output is mixed with what is no linear layer's ({way.others[0]})"
        inner = [self.trace.ops[i].name for i in sorted(way.ops) if not self._affine(self.trace.ops[i])]
        return f"there is a second activation ({inner[0]})" if inner else None

    @staticmethod
    def _affine(op: Op) -> bool:
        return op.name in AFFINE

    def _activation(self, call: Call, way: Path, down: str) -> Activation:
        before = self.path(address(call.taken), call.start)
        takes = tuple(before.linears)
        homes = set(before.linears.values())
        fused = any(home in homes for home in way.linears.values())
        ups = []
        for parameter, home in way.linears.items():
            owner = parameter.rpartition(".")[0]
            plain = any(each.name == owner and each.home == home for each in self.calls)
            if plain and self._only(home, way.ops | before.ops, call):
                ups.append(owner)
        if len(ups) < len(way.linears):
            ups = []
        ndim = call.taken.ndim
        kind = (is_relu(call.module, ndim), rectifies(call.module, ndim))
        return Activation(call.name, (down,), takes, bool(way.linears), tuple(ups), fused, *kind)

    def _only(self, home: int, ops: set[int], call: Call) -> bool:
        """Whether nothing but these operations and a call takes what lies at an address."""
        for number, op in enumerate(self.trace.ops):
            taken = any(slot.storage == home for slot in op.slots)
            if taken and not op.is_view and number not in ops and not call.start <= number < call.end:
                return False
        return True

    def likes(self, found: Activation) -> Iterator[Activation]:
        """What is known of activations that didn't run by one like them: those of experts that no token was sent to."""
        ran = {call.name for call in self.calls}
        parts = found.module.split(".")
        for name, module in self.block.named_modules():
            others = name.split(".")
            if (
                name in ran
                or kind_of(name) != kind_of(found.module)
                or type(module) is not type(self.block.get_submodule(found.module))
            ):
                continue
            places = [i for i, (one, other) in enumerate(zip(parts, others, strict=True)) if one != other]
            if len(places) != 1:
                continue
            old, new = ".".join(parts[: places[0] + 1]), ".".join(others[: places[0] + 1])

            def moved(names: tuple[str, ...], old: str = old, new: str = new) -> tuple[str, ...]:
                return tuple(new + each.removeprefix(old) for each in names if each.startswith(f"{old}."))

            yield replace(found, module=name, feeds=moved(found.feeds), takes=moved(found.takes), ups=moved(found.ups))

    def norms(self) -> list[Norm]:
        """The norms whose output meets linear layers and nothing else, the outermost module of each."""
        found: dict[str, Norm] = {}
        for call in sorted(self.calls, key=lambda call: (call.start, -call.end)):
            if call.start == call.end or any(p.ndim > 1 for p in call.module.parameters()) or call in self._nonlinear:
                continue
            feeds, reason = self._readers(call)
            if not feeds or not is_norm(call.module, call.value):
                continue
            if reason is not None:
                self.unchanged[call.name] = reason
            elif call.name in found:
                found[call.name] = Norm(call.name, tuple(dict.fromkeys((*found[call.name].feeds, *feeds))))
            elif not any(outer != call.name and call.name.startswith(f"{outer}.") for outer in found):
                found[call.name] = Norm(call.name, feeds)
        return [each for each in found.values() if each.module not in self.unchanged]

    def _readers(self, call: Call) -> tuple[tuple[str, ...], str | None]:
        """The linear layers that meet what a call gave, as it is; and what else takes it, in words, or None."""
        homes, feeds = {call.home}, []
        reason = "its output is the block's" if homes & self.trace.outputs else None
        for number in range(call.end, len(self.trace.ops)):
            op = self.trace.ops[number]
            if op.is_view or not any(slot.storage in homes for slot in op.slots):
                continue
            if number in self._made:
                feeds.append(self._made[number])
            elif op.name in GATHERS:
                homes |= {slot.storage for slot in op.results if slot.floating}
            elif not op.name.startswith(("empty", "new_", "zeros_like", "ones_like")):
                reason = reason or f"its output also goes elsewhere ({op.name.lstrip('_')})"
        return tuple(dict.fromkeys(feeds)), reason


def _merged(one: Activation, other: Activation) -> Activation:
    """What two calls of one module showed."""

    def both(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*a, *b)))

    ups = both(one.ups, other.ups) if bool(one.ups) == bool(other.ups) else ()
    takes, feeds = both(one.takes, other.takes), both(one.feeds, other.feeds)
    gated, fused = one.gated or other.gated, one.fused or other.fused
    return replace(one, feeds=feeds, takes=takes, gated=gated, ups=ups, fused=fused)


def _probe(ndim: int) -> Tensor:
    """Numbers from -8 to 8, as a tensor of so many axes."""
    return torch.linspace(-8, 8, 257).reshape([1] * (ndim - 1) + [-1])


@torch.no_grad()
def is_activation(module: nn.Module, ndim: int) -> bool:
    """Whether a module without parameters computes a function of each number by itself, and not a linear one."""
    if any(True for _ in (*module.parameters(), *module.buffers())):
        return False
    x = _probe(ndim)
    mask = torch.arange(x.numel()).reshape(x.shape) % 3 == 0
    try:
        y, other = module(x.clone()), module(torch.where(mask, x, 1 - 2 * x))
        turned = module(x.flip(-1))
    except Exception:  # whatever code that isn't an activation does with these numbers
        return False
    if not isinstance(y, Tensor) or y.shape != x.shape or not bool(torch.isfinite(y).all()):
        return False
    alone = torch.allclose(y[mask], other[mask], atol=1e-6) and torch.allclose(turned.flip(-1), y, atol=1e-6)
    bends = (y[..., 2:] - 2 * y[..., 1:-1] + y[..., :-2]).abs().max()
    return alone and float(bends) > 1e-4


@torch.no_grad()
def is_relu(module: nn.Module, ndim: int) -> bool:
    """Whether a module computes relu."""
    return torch.equal(module(_probe(ndim)), F.relu(_probe(ndim)))


@torch.no_grad()
def rectifies(module: nn.Module, ndim: int) -> bool:
    """Whether what an activation gives is 0 for every negative number, as relu's square is too."""
    x = _probe(ndim)
    return not bool(module(x.clone())[x < 0].any())


@torch.no_grad()
def is_norm(module: nn.Module, x: Tensor) -> bool:
    """Whether a module gives for 16 x what it gives for x, but for the small number that it adds to a variance."""
    try:
        y, scaled = module(x.clone()), module(16 * x)
    except Exception:  # as above
        return False
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return False
    return float((y - scaled).norm()) < 0.05 * float(y.norm())
