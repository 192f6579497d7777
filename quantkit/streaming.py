"""Weights that exist only while they are needed: a model whose modules get their parameters when they run.

A skeleton has its parameters on the meta device. `LazyModel` hooks into its modules: just before one runs, its own
parameters are asked for and put in; just after, they are put back to the meta device. So a forward pass of the whole
model holds one module's weights at a time, or one block's where a block is put in as a whole.
"""

import mmap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint import Source, input_embeddings, tied_parameters
from quantkit.naming import Names

Provide = Callable[[list[str]], Mapping[str, torch.Tensor]]


class StoredWeights:
    """The parameters and buffers of a source by the model's names, read when they are asked for.

    Args:
        source: where they lie.
        names: its keys and parameters.
    """

    def __init__(self, source: Source, names: Names) -> None:
        self.source, self.names = source, names
        self._ties = tied_parameters(source.skeleton)
        self._keys = names.sources()

    def keys(self, names: Iterable[str]) -> list[str]:
        """The checkpoint keys that make these parameters, each once."""
        found: dict[str, None] = {}
        for name in names:
            found |= dict.fromkeys(self._keys.get(self._stored(name), ()))
        return list(found)

    def _stored(self, name: str) -> str:
        """The name under which a tied parameter is stored: its own, or that of a partner."""
        if name in self._keys:
            return name
        first = self._ties.get(name, name)
        partners = [first, *(other for other, its_first in self._ties.items() if its_first == first)]
        return next((other for other in partners if other in self._keys), name)

    def __call__(self, names: list[str]) -> dict[str, torch.Tensor]:
        """These parameters as they are stored, but for those that the source doesn't hold."""
        made = self.names.parameters(self.keys(names), self.source.weights.get)
        found = {name: made.get(self._stored(name)) for name in names}
        return {name: value for name, value in found.items() if value is not None}


class LazyModel:
    """A skeleton whose parameters come and go, in float32.

    Args:
        model: a skeleton on the meta device, with real buffers, in float32.
        provide: the values of parameters and buffers by name.
        kept: names of modules that keep their own parameters once they have them: those that blocks lie in, when
            several forward passes are inside of them at once.
        apart: names of modules that the caller fills and empties himself (blocks).
        device: where the values are put.
    """

    def __init__(
        self,
        model: nn.Module,
        provide: Provide,
        kept: Collection[str] = (),
        apart: Collection[str] = (),
        device: torch.device | None = None,
    ) -> None:
        self.model, self.provide = model, provide
        self.kept, self.apart = frozenset(kept), frozenset(apart)
        self.device = device or torch.device("cpu")
        for module in model.modules():
            for leaf, buffer in module._buffers.items():
                module._buffers[leaf] = None if buffer is None else buffer.to(self.device)
        self.ran: set[str] = set()
        self._filled: set[str] = set()
        self._held: dict[str, list[str]] = {}

    def fill(self, prefix: str, module: nn.Module, values: Mapping[str, torch.Tensor] | None = None) -> None:
        """Give a module and all in it the values of its parameters and persistent buffers, in float32."""
        found = self.provide([name for name, _ in _tensors(module, prefix)]) if values is None else values
        for name, value in found.items():
            self._put(name, value)

    def empty(self, prefix: str, module: nn.Module) -> None:
        """Take a module's parameters away again."""
        for name, value in list(_parameters(module, prefix)):
            if not value.is_meta:
                self._put(name, torch.empty_like(value, device="meta"))

    def _put(self, name: str, value: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        kept = value.float() if value.is_floating_point() else value
        kept = kept if kept.is_meta else kept.to(self.device)
        if not kept.is_meta and kept.untyped_storage().nbytes() > kept.nbytes:
            kept = kept.clone()  # a part of a tensor that was split: each weight is known by its own memory
        if leaf in module._buffers:
            module._buffers[leaf] = kept
        else:
            module._parameters[leaf] = nn.Parameter(kept, requires_grad=False)

    def fill_outside(self, apart: Collection[str]) -> None:
        """Give every parameter that lies in none of these modules its value, for as long as the hooks are there.

        For models that read a module's parameters without running it.
        """
        names = [name for name, _ in _tensors(self.model, "") if not any(name.startswith(f"{part}.") for part in apart)]
        for name, value in self.provide(names).items():
            self._put(name, value)

    @contextmanager
    def embeddings(self, *, whole: bool = True) -> Iterator[Callable[[], None]]:
        """The input embeddings are there from now on; what it gives takes them away again, as leaving it does.

        Some models ask where their embedding lies before it runs, and put their token ids there. Unless they are wanted
        `whole`, rows of a plain one come into memory when they are looked up, and the others are zeros.
        """
        name = input_embeddings(self.model)
        if name is None:
            yield lambda: None
            return
        module = self.model.get_submodule(name)
        with ExitStack() as stack:
            if whole or type(module) is not nn.Embedding or self.device.type != "cpu":
                self.fill(name, module)
            else:
                self._fill_rows(name, module, stack)

            def forget() -> None:
                stack.close()
                self.empty(name, module)

            try:
                yield forget
            finally:
                forget()

    def _fill_rows(self, name: str, module: nn.Embedding, stack: ExitStack) -> None:
        """Give an embedding memory that holds nothing yet, and each row its values when it is first looked up."""
        stored = self.provide([f"{name}.weight"])[f"{name}.weight"]
        memory = mmap.mmap(-1, max(1, 4 * stored.numel()))  # zeros; the system gives a page when it is written to
        weight = torch.frombuffer(memory, dtype=torch.float32, count=stored.numel()).view(stored.shape)
        there = torch.zeros(len(stored), dtype=torch.bool)
        self._put(f"{name}.weight", weight)

        def fetch(_: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].unique()
            rows = rows[~there[rows]]
            weight[rows] = stored[rows].float()
            there[rows] = True

        stack.callback(module.register_forward_pre_hook(fetch).remove)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While this lasts, each module gets its own parameters just before it runs, and loses them after."""
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda m, _, name=name: self._before(name, m)))
            handles.append(module.register_forward_hook(lambda m, *_, name=name: self._after(name, m)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, value in list(_parameters(self.model, "")):
                if not value.is_meta:
                    self._put(name, torch.empty_like(value, device="meta"))

    def _before(self, name: str, module: nn.Module) -> None:
        self.ran.add(name)
        own = {leaf: value for leaf, value in module._parameters.items() if value is not None and value.is_meta}
        if name in self.apart:
            return
        prefix = f"{name}." if name else ""
        buffers = [leaf for leaf in module._buffers if leaf not in module._non_persistent_buffers_set]
        inside = any(name.startswith(f"{part}.") for part in self.apart)
        if not own and (not buffers or inside or name in self._filled):
            return
        self._filled.add(name)
        for full, value in self.provide([prefix + leaf for leaf in (*own, *buffers)]).items():
            self._put(full, value)
        self._held[name] = [prefix + leaf for leaf in own]

    def _after(self, name: str, module: nn.Module) -> None:
        if name in self.kept:
            return
        for full in self._held.pop(name, ()):
            value = module._parameters[full.rpartition(".")[2]]
            if value is not None and not value.is_meta:
                self._put(full, torch.empty_like(value, device="meta"))


def _parameters(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(prefix.removesuffix("."), remove_duplicate=False)


def _tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers by full name."""
    yield from _parameters(module, prefix)
    for path, inner in module.named_modules(prefix=prefix.removesuffix(".")):
        for leaf, value in inner._buffers.items():
            if value is not None and leaf not in inner._non_persistent_buffers_set:
                yield f"{path}.{leaf}" if path else leaf, value
