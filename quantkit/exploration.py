"""Exploration: one short forward pass of a model with random weights, to see what it does with its parameters.

No weight is read: each decoder block gets random weights in float32 just before it runs, is traced
(`discovery.discover`), and loses them after. So the model's own forward pass gives every block the arguments that it
really gets, and a block is all that is in memory. Blocks that are alike (the same modules, shapes, switches and
arguments) are traced once.

Which modules hold the blocks is seen as well: of the outermost lists of modules whose members all ran, the one with
most parameters. A vision tower doesn't run on a text.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from quantkit.checkpoint import empty_copy, output_head, tied_parameters, use_plain_implementations
from quantkit.discovery import UNUSED, Refusal, Structure, discover, randomize_, rectifiable
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.experts import QuantizedExperts, put_experts, quantize_experts
from quantkit.memory import give_back_memory
from quantkit.scheme import Scheme
from quantkit.streaming import LazyModel

TOKENS = (2, 8)
LARGE_BLOCK = 10**6
"""Parameters from which a block that is like an earlier one isn't run again: the earlier output stands for its own."""


@dataclass
class Findings:
    """What one pass showed.

    Attributes:
        blocks: the name of the list of decoder blocks.
        count: its length.
        structures: what each block does with its parameters (names inside the block), by the block's number.
        untraced: why a block could not be traced, by its number.
        ran: names of all modules that ran.
        order: the numbers of the blocks in the order in which they ran; longer than `count` where the model loops.
        ended: why the pass ended early, or None.
        reads_outside: whether the model reads parameters of modules that it doesn't run, outside of the blocks.
        activities: what batches hold, by their windows and tokens, as far as it was counted.
    """

    blocks: str
    count: int
    structures: dict[int, Structure] = field(default_factory=dict)
    untraced: dict[int, str] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    order: list[int] = field(default_factory=list)
    ended: str | None = None
    reads_outside: bool = False
    activities: dict[tuple[int, int], Any] = field(default_factory=dict, repr=False, compare=False)

    def unused(self, parameter: str) -> bool:
        """Whether a block was traced, and this parameter of it (by its full name) met no activation."""
        return self._other(parameter) == UNUSED

    def otherwise(self, parameter: str) -> str | None:
        """What a traced block does with this parameter (by its full name) beside a linear layer's product, or None."""
        what = self._other(parameter)
        return None if what == UNUSED else what

    def _other(self, parameter: str) -> str | None:
        number, _, path = parameter.removeprefix(f"{self.blocks}.").partition(".")
        structure = self.structures.get(int(number)) if number.isdigit() else None
        return None if structure is None else structure.others.get(path)

    @property
    def idle(self) -> list[int]:
        """The numbers of blocks that a text never reaches; none where the pass ended early."""
        return [] if self.ended is not None else sorted(set(range(self.count)) - set(self.order))


def explore(skeleton: nn.Module, seed: int = 0, *, groups: bool = True, activations: bool = False) -> Findings:
    """What the model's blocks do with their parameters; without `groups` only what each is used for.

    With `activations` it is also looked for where a relu has room.

    Raises:
        CheckpointError: the model has no list of blocks.
    """
    looked_for = (groups, activations)
    found = _explored(skeleton, seed, looked_for, outside=False)
    give_back_memory()
    if found.ended is None:
        return found
    again = _explored(skeleton, seed, looked_for, outside=True)
    give_back_memory()
    return found if again.ended is not None and len(found.structures) >= len(again.structures) else again


def _explored(skeleton: nn.Module, seed: int, looked_for: tuple[bool, bool], *, outside: bool) -> Findings:
    """What one pass showed; with `outside` all that lies outside of lists of modules has its weights from the start."""
    model = empty_copy(skeleton, buffers=True).float()
    use_plain_implementations(model)
    lists = outermost_lists(model)
    if not lists:
        raise CheckpointError(f"{type(model).__name__} has no list of layers to go through block by block")
    ties = tied_parameters(model)
    shared = {*ties, *ties.values()}
    tracer = _Tracer(model, lists, torch.Generator().manual_seed(seed), *looked_for)
    ended = tracer.run(outside=outside)
    complete = [
        name for name, members in lists.items() if all(f"{name}.{i}" in tracer.ran for i in range(len(members)))
    ]
    # A pass that ended early leaves some members without a turn: then the largest list must be it.
    chosen = max(complete or lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    found = Findings(chosen, len(lists[chosen]), ran=tracer.ran, ended=ended, reads_outside=outside)
    found.order = [int(name.rpartition(".")[2]) for name in tracer.order if name.rpartition(".")[0] == chosen]
    for number in range(found.count):
        name = f"{chosen}.{number}"
        result = tracer.results.get(name)
        if isinstance(result, Structure):
            found.structures[number] = _own_groups(name, result, shared)
        else:
            idle = "it does not run when the model reads text" if ended is None else "the pass ended before it"
            found.untraced[number] = result or idle
    return found


def _own_groups(block: str, structure: Structure, shared: Collection[str]) -> Structure:
    """The structure without groups that would change a parameter that is used elsewhere as well."""
    groups, refusals = [], list(structure.refusals)
    for group in structure.groups:
        names = {edit.parameter for edit in (*group.producers, *group.consumers)}
        also = sorted(name for name in names if f"{block}.{name}" in shared)
        if also:
            refusals.append(Refusal(group.name, group.kind, f"{also[0]} is shared with another part of the model"))
        else:
            groups.append(group)
    return replace(structure, groups=tuple(groups), refusals=tuple(refusals))


def outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules that hold parameters, by name."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inner and any(True for _ in module.parameters()):
            lists[name] = module
    return lists


class _Tracer:
    """Runs a model once, and traces every block that isn't like an earlier one."""

    def __init__(
        self,
        model: nn.Module,
        lists: Mapping[str, nn.ModuleList],
        generator: torch.Generator,
        groups: bool,
        activations: bool,
    ) -> None:
        self.model, self.generator, self.groups, self.activations = model, generator, groups, activations
        self.members = {f"{name}.{i}": m for name, members in lists.items() for i, m in enumerate(members)}
        self.results: dict[str, Structure | str] = {}
        self.ran: set[str] = set()
        self.order: list[str] = []
        self._tracing = False
        self._kinds: dict[str, tuple[Structure | str, Any, str]] = {}

    def run(self, *, outside: bool) -> str | None:
        """None, or why the pass ended early."""
        head = self._stubbed_head()
        lazy = LazyModel(self.model, self._random, apart=[*self.members, *head])
        self.lazy = lazy
        ended = None
        with torch.no_grad(), lazy.hooked(), lazy.embeddings():
            if outside:
                lazy.fill_outside(self.members)
            for name, member in self.members.items():
                member.forward = self._visitor(name, member, member.forward)  # type: ignore[method-assign]
            try:
                self.model(**probe(self.model))
            except Exception as error:  # whatever the model's own code raises
                ended = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        self.ran = lazy.ran
        return ended

    def _stubbed_head(self) -> list[str]:
        """The name of the layer that makes the logits, which gives zeros now: it is the largest, and comes last."""
        name = output_head(self.model)
        head = None if name is None else self.model.get_submodule(name)
        if name is None or not isinstance(head, nn.Linear):
            return []
        size = head.out_features
        head.forward = lambda x: x.new_zeros(()).expand(*x.shape[:-1], size)  # type: ignore[method-assign, assignment]
        return [name]

    def _visitor(self, name: str, member: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._tracing:
                return original(*args, **kwargs)
            self.order.append(name)
            if name in self.results:
                self._fill(name, member)
                output = original(*args, **kwargs)
                self.lazy.empty(name, member)
                return output
            kind = _kind(member, args, kwargs)
            if kind in self._kinds:
                self.results[name], output, like = self._kinds[kind]
                if sum(p.numel() for p in member.parameters()) >= LARGE_BLOCK:
                    ran = [path for path in self.lazy.ran if path.startswith(f"{like}.")]
                    self.lazy.ran |= {name + path.removeprefix(like) for path in ran}
                    return output
                self._fill(name, member)
                output = original(*args, **kwargs)
            else:
                self._fill(name, member)
                self.results[name] = self._traced(member, args, kwargs)
                output = original(*args, **kwargs)
                self._kinds[kind] = (self.results[name], output, name)
            self.lazy.empty(name, member)
            return output

        return forward

    def _traced(self, member: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Structure | str:
        """The block's structure, or why it could not be traced."""
        self._tracing = True
        try:
            structure = discover(member, args, kwargs, groups=self.groups)
            if self.activations:
                structure = _with_activations(member, structure, args, kwargs)
            return _packable(member, structure, args, kwargs)
        except Exception as error:  # the trace runs the model's own code several times
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        finally:
            self._tracing = False

    def _fill(self, name: str, member: nn.Module) -> None:
        """Random weights for a block; experts, which are alike to a trace, share theirs."""
        shapes = {path: value for path, value in member.named_parameters() if value.is_meta}
        for path, value in shapes.items():
            shape = (1, *value.shape[1:]) if value.ndim == 3 else value.shape
            self._put(member, path, torch.zeros(shape))
        randomize_(member, self.generator)
        for path, value in shapes.items():
            if value.ndim == 3:
                self._put(member, path, member.get_parameter(path).detach().expand(value.shape))

    @staticmethod
    def _put(member: nn.Module, path: str, value: torch.Tensor) -> None:
        owner, _, leaf = path.rpartition(".")
        member.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _random(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Random values for the parameters of a module outside of the blocks."""
        found = {}
        for name in names:
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            value = module._parameters.get(leaf)
            if value is None:
                continue  # a buffer, which the constructor made
            tensor = torch.empty(value.shape)  # of an embedding only the rows that are looked up come into being
            rows = tensor[:ROWS] if isinstance(module, nn.Embedding) else tensor
            if value.ndim == 1:
                rows.normal_(1.0, 0.1, generator=self.generator)
            else:
                rows.normal_(0.0, 1.0, generator=self.generator)
                if not isinstance(module, nn.Embedding):
                    rows.mul_(value[0].numel() ** -0.5)
            found[name] = tensor
        return found


def _with_activations(
    block: nn.Module, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Structure:
    """The structure, with the activations and norms that a relu can stand in place of, or behind."""
    try:
        found = rectifiable(block, args, kwargs, structure.linears)
    except Exception as error:  # it runs the model's own code with other numbers
        words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return replace(structure, unchanged={"activations": f"they could not be followed ({words})"})
    return replace(structure, activations=found.activations, norms=found.norms, unchanged=found.unchanged)


def _packable(block: nn.Module, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Structure:
    """The structure; parameters of experts that the block's own code can't multiply packed have the role `float`.

    Each is quantized and tried in the block: code that reads a weight in another way than `QuantizedExperts` serves
    raises there.
    """
    uses = []
    for use in structure.linears:
        owner, _, leaf = use.parameter.rpartition(".")
        module = block.get_submodule(owner)
        weight = module._parameters.get(leaf)
        if use.expert_axis != 0 or use.role != "linear" or weight is None or weight.ndim != 3:
            uses.append(use)
            continue
        codes, scale = quantize_experts(weight[:1].detach(), Scheme("int8"), use.in_axis)
        experts = len(weight)
        packed = QuantizedExperts(
            codes.expand(experts, -1, -1), scale.expand(experts, -1, -1), use.in_axis, Scheme("int8")
        )
        put_experts(block, use.parameter, packed)
        try:
            block(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            uses.append(use)
        except QuantkitError as error:
            uses.append(replace(use, role="float", reason=f"stays in float, as {error}"))
        finally:
            del module._modules[leaf]
            module._parameters[leaf] = weight
    return replace(structure, linears=tuple(uses))


ROWS = 256


def probe(model: nn.Module, shape: tuple[int, int] = TOKENS) -> dict[str, Any]:
    """The arguments of a short forward pass over token ids that mean nothing: no padding, no special token."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    size = getattr(config, "vocab_size", None)
    limit = min(ROWS, size) if isinstance(size, int) else ROWS
    special = [getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")]
    special += [number for numbers in special if isinstance(numbers, list) for number in numbers]
    usable = [number for number in range(3, limit) if number not in special] or list(range(limit))
    generator = torch.Generator().manual_seed(1)
    picked = torch.randint(0, len(usable), shape, generator=generator)
    arguments: dict[str, Any] = {"input_ids": torch.tensor(usable)[picked]}
    return arguments | without_cache(model)


def without_cache(model: nn.Module) -> dict[str, Any]:
    """`use_cache=False` for a model that takes it."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _kind(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """A text that is the same for blocks that do the same: modules, shapes, switches, and the kinds of arguments."""
    parts = [str(len(args)), *sorted(f"{key}={type(value).__name__}" for key, value in kwargs.items())]
    parts += [str(tuple(leaf.shape)) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    for path, module in block.named_modules():
        switches = sorted(f"{k}={v}" for k, v in vars(module).items() if isinstance(v, (bool, str)))
        shapes = [f"{leaf}{tuple(p.shape)}" for leaf, p in module._parameters.items() if p is not None]
        parts.append(f"{path}:{type(module).__name__}:{switches}{shapes}")
    return "\n".join(parts)
