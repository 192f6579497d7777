"""Compression with calibration data: block by block, each fed with what the compressed blocks before it give.

For every block: its weights are read in float32; the calibration windows run through it and what meets its weights is
observed; smoothing groups are folded and proven, weights are pruned, activations changed, in the order of the recipe;
static ranges are observed on the block as it is then; its tensors are quantized and written; the quantized layers take
the place of the float ones, and the windows run through again to make the next block's inputs. One block's weights, its
statistics and the windows' hidden states are all that is in memory.
"""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from quantkit_calibration.sequential import Calls, OrderError, run_blocks
from quantkit_calibration.spilling import Spill, SpillError
from torch import nn

from quantkit.activations import carry_over
from quantkit.candidates import Candidate
from quantkit.checkpoint import Source, empty_copy, use_plain_implementations
from quantkit.compression import Worked, compress_stage
from quantkit.durable import write_error
from quantkit.errors import CheckpointError
from quantkit.experts import QuantizedExperts, put_experts, quantize_experts
from quantkit.exploration import outermost_lists, without_cache
from quantkit.footprint import Batching
from quantkit.journal import Journal
from quantkit.memory import Excess
from quantkit.methods.relu import share_of
from quantkit.modules import QuantizedLinear, quantize_linear
from quantkit.observation import Observation
from quantkit.outcome import GroupReport, Outcome
from quantkit.planning import Plan
from quantkit.ranks import current
from quantkit.recipe import Recipe, Step
from quantkit.rectifying import Rectifier, restore
from quantkit.shards import checksum
from quantkit.smoothing import Inputs, Proof, Smoother, fold_in
from quantkit.sparsifying import Pruner, Pruning, Streams
from quantkit.streaming import LazyModel, StoredWeights
from quantkit.targets import counted, tensor_specs
from quantkit.watching import product_dtype

FOLD, SCALE, PRUNED = "fold.", "input_scale.", "pruned."
"""What the names of tensors begin with that are kept beside a finished block."""

Kept = dict[str, dict[str, torch.Tensor]]
"""The tensors that are written for a linear layer, by its name and theirs."""


def compress_calibrated(
    plan: Plan,
    recipe: Recipe,
    source: Source,
    journal: Journal,
    device: torch.device,
    windows: torch.Tensor,
    batching: Batching,
    track: Callable[[int], None],
) -> None:
    """Calibrate, compress and write all blocks, and record each; what is recorded already is made again from that.

    Args:
        plan: what happens to which tensor.
        recipe: its transforms are carried out in their order.
        source: the model.
        journal: takes the tensors, and says what is finished already.
        device: where weights are quantized, and the blocks run.
        windows: [W, T] token ids.
        batching: how many run through a block at a time, and whether the others wait on disk.
        track: called with a block's number when it is done.

    Raises:
        CheckpointError: the model doesn't run block by block, or the disk has no room for hidden states.
    """
    forget_embeddings: Callable[[], None]
    work = _Work(plan, recipe, source, journal, device, batching.excess, (len(windows), windows.shape[1]))
    # The first window is a batch by itself: folds are proven on it, one run of the block for each.
    parts = [windows[:1], *torch.split(windows[1:], batching.windows)] if len(windows) > 1 else [windows]
    work.batches = [len(part) for part in parts]
    batches = [{"input_ids": part.to(device), **without_cache(work.model)} for part in work.ranks.share(parts)]
    idle = plan.findings.idle
    numbers = [i for i in range(plan.findings.count) if i not in idle]
    blocks = [work.model.get_submodule(work.name(i)) for i in numbers]
    order = [numbers.index(i) for i in plan.findings.order] if work.looped else None
    for index in idle:
        work.unobserved(index)
        track(index)

    def visit(position: int, calls: Calls) -> Callable[..., Any]:
        if calls.number:  # a model that loops through its blocks: this one is compressed already
            return blocks[position]
        index = numbers[position]
        forget_embeddings()
        block = work.block(index, calls)
        track(index)

        def run(*args: Any, **kwargs: Any) -> Any:
            output = block(*args, **kwargs)
            work.excess.watch()
            return output

        return run

    outside = plan.findings.reads_outside
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(work.lazy.hooked())
        forget_embeddings = stack.enter_context(work.lazy.embeddings(whole=outside))
        spill = Spill(stack.enter_context(journal.scratch()), [*work.model.buffers()]) if batching.spill else None
        if outside:
            work.lazy.fill_outside([*outermost_lists(work.model)])
        try:
            run_blocks(work.model, blocks, batches, visit, order=order, spill=spill)
        except OrderError as error:
            raise CheckpointError(f"{source.name} cannot be calibrated block by block: {error}") from error
        except SpillError as error:
            raise write_error(error, journal.folder) from error


class _Work:
    """The state of one calibrated compression: a lazy model, and what has been found."""

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        source: Source,
        journal: Journal,
        device: torch.device,
        excess: int,
        windows: tuple[int, int],
    ) -> None:
        self.plan, self.recipe, self.source, self.device = plan, recipe, source, device
        self.journal, self.writer = journal, journal.writer
        self.scheme, self.windows = recipe.scheme, windows
        self._schemes = {target.module: target.scheme for target in plan.targets.values()}
        self.model = empty_copy(source.skeleton, buffers=True).float()
        use_plain_implementations(self.model, attention=False)
        parts = plan.findings.blocks.split(".")
        ancestors = [".".join(parts[:end]) for end in range(len(parts))]
        blocks = [self.name(index) for index in range(plan.findings.count)]
        self.lazy = LazyModel(self.model, StoredWeights(source, plan.names), ancestors, blocks, device)
        self._sources = plan.names.sources()
        self._parameters = {path for path, _ in self.model.named_parameters(remove_duplicate=False)}
        self.stages = {stage.name: stage for stage in plan.stages}
        self.looped = len(plan.findings.order) > len(set(plan.findings.order))
        self.done = Outcome()
        self.excess = Excess(excess)
        self.ranks, self.batches = current(), list[int]()
        self._since = (time.monotonic(), self.ranks.waited)
        self._scales: dict[str, torch.Tensor] = {}
        self._undo: dict[int, list[Callable[[], None]]] = {}

    def name(self, index: int) -> str:
        """The block's name."""
        return f"{self.plan.findings.blocks}.{index}"

    def unobserved(self, index: int) -> None:
        """Compress and write a block that no text reaches, as its weights are."""
        name = self.name(index)
        if self.journal.finished(name) is not None or not self.ranks.is_first:
            return
        stage, self.done = self.stages.get(name), Outcome()
        if stage is not None:
            self.done.layers += compress_stage(
                stage, self.plan, self.source, self.writer, self.device, pruned=self.done.pruned
            )
        self.done.notes.append(f"{name} does not run when the model reads text, and is not calibrated")
        self.journal.commit(name, self.done)

    def block(self, index: int, calls: Calls) -> nn.Module:
        """Calibrate, compress and write one block; it is left with its quantized layers."""
        if not self.looped:
            for earlier in list(self._undo):
                self._release(earlier)
        name, block = self.name(index), self.model.get_submodule(self.name(index))
        self.lazy.fill(name, block)
        layers = [layer for layer in self.plan.quantized if layer.parameter.startswith(f"{name}.")]
        axes = {layer.parameter.removeprefix(f"{name}."): layer.in_axis for layer in layers}
        if self.journal.finished(name) is None:
            kept = self._calibrate(index, block, calls, axes)
        else:
            with self.journal.step(name, "replay"):
                kept = self._replay(index, block, calls, axes)
        if not (calls.last and not self.looped):
            self._undo[index] = self._quantize(layers, kept)
        since, self._since = self._since, (time.monotonic(), self.ranks.waited)
        own = (self._since[0] - since[0]) - (self._since[1] - since[1])
        self.ranks.compare(name, own, self.journal.tell)
        return block

    def _calibrate(self, index: int, block: nn.Module, calls: Calls, axes: dict[str, int]) -> Kept:
        """Observe, smooth, compress and write a block, and record it; the tensors written for its layers."""
        name, worked = self.name(index), Worked()
        state: dict[str, torch.Tensor] = {}
        self.done, seen = Outcome(), Observation(name, block, calls, self.excess, self.batches)
        rectifier = self._rectifier(index, seen)
        for number, step in enumerate(self.recipe.transforms):
            if rectifier is not None and step in (self.recipe.rectifying, self.recipe.thresholding):
                with self.journal.step(name, step.name):
                    _change(rectifier, step, step is self.recipe.rectifying)
                continue
            if step is self.plan.pruning:
                with self.journal.step(name, step.name):
                    self._prune(index, seen, axes, Pruning.of(step), worked)
                continue
            alpha = None if step.parameters["alpha"] == "auto" else float(step.parameters["alpha"])
            with self.journal.step(name, step.name):
                folded = self._smooth(index, seen, axes, alpha, worked)
            state |= {f"{FOLD}{number}.{position}": scale for position, scale in folded.items()}
        if rectifier is not None:
            self.done.activations, self.done.sparsity = rectifier.changes, rectifier.reports()
            self.done.notes += rectifier.notes
        if self.scheme is not None and self.scheme.is_static and axes:
            with self.journal.step(name, "static scales"):
                worked.input_scales = self._scales = seen.static_scales(axes, self.scheme)
            state |= {SCALE + path: scale for path, scale in self._scales.items()}
        if self.scheme is not None and self.scheme.outlier_columns is not None and axes:
            with self.journal.step(name, "outlier columns"):
                worked.outlier_columns = seen.outlier_columns(axes, self.scheme, self.recipe.seed)
        self.done.notes += seen.notes
        kept: Kept = {}
        stage = self.stages.get(name)
        if stage is not None:
            with self.journal.step(name, "compress"):
                layers = compress_stage(stage, self.plan, self.source, self.writer, self.device, worked, kept)
            self.done.layers += layers
        state |= {PRUNED + path: self.model.get_parameter(path).detach() for path in self._unwritten(index, kept)}
        self._agree(name, kept, state)
        self.journal.commit(name, self.done, state)
        return kept

    def _agree(self, name: str, kept: Kept, state: dict[str, torch.Tensor]) -> None:
        """Raise RankError when ranks made something else of a block, as unlike machines might."""
        if not self.ranks.is_alone:
            tensors = {f"{layer} {leaf}": each for layer, found in kept.items() for leaf, each in found.items()} | state
            self.ranks.agree(f"result for {name}", {key: checksum(value) for key, value in tensors.items()})

    def _replay(self, index: int, block: nn.Module, calls: Calls, axes: dict[str, int]) -> Kept:
        """Make a block again that a run which was stopped had finished: as `_calibrate` leaves it, nothing observed."""
        name, structure = self.name(index), self.plan.findings.structures.get(index)
        state, done = self.journal.state(name), self.journal.finished(name)
        restore(block, name, done.activations if done is not None else ())
        for number in range(len(self.recipe.transforms)):
            changed: set[str] = set()
            for position, group in enumerate(structure.groups if structure is not None else ()):
                scale = state.get(f"{FOLD}{number}.{position}")
                if scale is not None:
                    changed |= set(fold_in(block, group, scale.to(self.device)))
            self._settle(name, block, changed, axes)
        self._take_pruned(index, block, state, axes)
        self._scales = {key.removeprefix(SCALE): value for key, value in state.items() if key.startswith(SCALE)}
        stage, layout = self.stages.get(name), self.plan.layout
        targets = {key: self.plan.targets[key] for key in (stage.keys if stage else ()) if key in self.plan.targets}
        found = counted(targets, done.layers if done is not None else ()).values()
        return {
            target.module: {
                full.removeprefix(target.prefix): self.writer.read(full).to(self.device)
                for full in tensor_specs(target, layout)
            }
            for target in found
            if target.whole and not target.of_experts and layout is not None
        }

    def _release(self, index: int) -> None:
        """Give a block its float layers back, without weights."""
        for step in self._undo.pop(index):
            step()
        self.lazy.empty(self.name(index), self.model.get_submodule(self.name(index)))
        self.excess.give_back()

    def _smooth(
        self,
        index: int,
        seen: Observation,
        axes: dict[str, int],
        alpha: float | None,
        worked: Worked,
    ) -> dict[int, torch.Tensor]:
        """Fold the block's smoothing groups, each proven on the first batch; the scales of those that are folded."""
        name, block = seen.name, seen.block
        structure = self.plan.findings.structures.get(index)
        if structure is None:
            why = self.plan.findings.untraced.get(index, "it did not run")
            self.done.notes.append(f"{name} is not smoothed: its data flow could not be traced ({why})")
            return {}
        for refusal in structure.refusals:
            report = GroupReport(name, refusal.parameter, refusal.kind, (), "refused", reason=refusal.reason)
            self.done.groups.append(report)
        inputs = Inputs(keep_rows=alpha is None, seed=self.recipe.seed)
        # With nothing to be quantized smoothing speaks for a quantizer that comes later: all that can be folded is.
        consumers = {edit.parameter: edit.axis for group in structure.groups for edit in group.consumers}
        fed = {path: axis for path, axis in consumers.items() if path in axes or self.scheme is None}
        if not fed:
            return {}
        stored = {self.source.weights.tensors[key].dtype for path in fed for key in self._sources[f"{name}.{path}"]}
        dtype = product_dtype(stored.pop(), self.device) if len(stored) == 1 else None
        before = seen.inputs(fed, inputs, dtype)
        self.excess.give_back()
        weights = [p for _, p in block.named_parameters()]
        proof = self.ranks.decided(Proof(seen.output, weights, before) if self.ranks.is_first else None)
        restore = None if worked.changed else partial(self.lazy.fill, name, block)
        smoother = Smoother(name, block, alpha, self.scheme, fed, self._dtypes(name, block), proof, restore)
        self.done.groups += smoother.fold_all(structure.groups, inputs)
        self.excess.give_back()  # the weights as they were
        for path in self._settle(name, block, smoother.changed, axes):
            worked.changed[path] = self.model.get_parameter(path).detach()
        places = {id(group): position for position, group in enumerate(structure.groups)}
        return {places[id(group)]: scale for group, scale in smoother.folded}

    def _rectifier(self, index: int, seen: Observation) -> Rectifier | None:
        """What changes a block's activations, having seen how much is zero before; None where nothing is changed."""
        structure = self.plan.findings.structures.get(index)
        if self.plan.activating is None or structure is None:
            return None
        quantized = {layer.parameter for layer in self.plan.quantized}

        def bits(name: str) -> float:
            if name in quantized and self.scheme is not None:
                return self.scheme.bits
            return 8.0 * self.source.weights.tensors[self._sources[name][0]].dtype.itemsize

        with self.journal.step(seen.name, "zeros before"):
            here = self.plan.activating.within(seen.name)
            return Rectifier(seen, here, structure.linears, self.windows, bits)

    def _layers(self, index: int) -> list[Candidate]:
        """The layers of a block that are pruned."""
        return [layer for layer in self.plan.pruned if layer.parameter.startswith(f"{self.name(index)}.")]

    def _prune(self, index: int, seen: Observation, axes: Collection[str], how: Pruning, worked: Worked) -> None:
        """Prune a block's layers, by what meets them in the block as it now is."""
        name, block, layers = seen.name, seen.block, self._layers(index)
        places = {layer.parameter.removeprefix(f"{name}."): layer for layer in layers}
        streams = None
        if layers and how.criterion != "magnitude":
            streams = Streams(how.criterion, self.recipe.seed)
            stored = {self.source.weights.tensors[key].dtype for layer in layers for key in layer.keys}
            dtype = product_dtype(stored.pop(), self.device) if len(stored) == 1 else None
            seen.inputs({path: layer.in_axis for path, layer in places.items()}, streams, dtype)
            self.excess.give_back()
        pruner = Pruner(how, streams)
        for path, layer in places.items():
            made, report = pruner.parameter(layer.name, path, block.get_parameter(path).detach(), layer.in_axis)
            self.lazy.fill(name, block, {layer.parameter: made})
            self.done.pruned.append(report)
        self.done.notes += pruner.notes(name)
        for path in self._settle(name, block, places, axes):
            worked.changed[path] = self.model.get_parameter(path).detach()
        self.excess.give_back()

    def _unwritten(self, index: int, kept: Kept) -> list[str]:
        """The pruned parameters of a block that can't be read back as they were: they were quantized, in parts.

        What stays in float is read from the written tensors, and so are the codes of a layer that lies in one tensor.
        """
        quantized = {layer.parameter for layer in self.plan.quantized}
        layers = [layer for layer in self._layers(index) if layer.parameter in quantized]
        return [layer.parameter for layer in layers if layer.experts or layer.name not in kept]

    def _take_pruned(self, index: int, block: nn.Module, state: dict[str, torch.Tensor], axes: Collection[str]) -> None:
        """Give a block that is made again its pruned weights, but for those whose codes are read."""
        name = self.name(index)
        values = {key.removeprefix(PRUNED): value for key, value in state.items() if key.startswith(PRUNED)}
        quantized = {f"{name}.{path}" for path in axes}
        paths = [layer.parameter for layer in self._layers(index) if layer.parameter not in quantized]
        keys = {key: None for path in paths for key in self._sources[path]}
        made = self.plan.names.parameters(keys, self._written)
        self.lazy.fill(name, block, values | {path: made[path] for path in paths})

    def _written(self, key: str) -> torch.Tensor:
        """The float tensor of a key that was written: as it is, or packed without its zeros."""
        target, layout = self.plan.targets.get(key), self.plan.layout
        if target is None or layout is None:
            return self.writer.read(self.plan.renamed.get(key, key))
        stored = {full.removeprefix(target.prefix): self.writer.read(full) for full in tensor_specs(target, layout)}
        weight: torch.Tensor = layout.decompress(target.scheme, stored, target.in_features)[0]
        return weight.t() if target.transposed else weight

    def _settle(self, name: str, block: nn.Module, changed: Collection[str], axes: Collection[str]) -> list[str]:
        """The names of all parameters that are written anew; those that stay in float become what is written."""
        quantized = {f"{name}.{path}" for path in axes}
        paths = self._with_partners(name, changed)
        for path in paths:
            if path not in quantized:  # it is written in the dtype that it had: so it is what runs on
                dtype = self.source.weights.tensors[self._sources[path][0]].dtype
                self.lazy.fill(name, block, {path: self.model.get_parameter(path).detach().to(dtype)})
        return paths

    def _with_partners(self, name: str, changed: Collection[str]) -> list[str]:
        """The full names of changed parameters, and of those that lie in one tensor with them on disk."""
        sources = self._sources
        keys = {key for path in changed for key in sources.get(f"{name}.{path}", ())}
        partners = [path for path, needed in sources.items() if not keys.isdisjoint(needed)]
        return [path for path in partners if path in self._parameters]

    def _dtypes(self, name: str, block: nn.Module) -> dict[str, torch.dtype]:
        """The dtype on disk of the block's parameters that a key holds as they are."""
        stored, keys = self.source.weights.tensors, self.plan.names.keys
        found = {path: keys.get(f"{name}.{path}") for path, _ in block.named_parameters()}
        return {path: stored[key].dtype for path, key in found.items() if key is not None}

    def _quantize(self, layers: Sequence[Candidate], kept: Kept) -> list[Callable[[], None]]:
        """Put quantized layers into the block; what takes them out again."""
        undo: list[Callable[[], None]] = []
        assert self.scheme is not None or not layers
        for layer in layers:
            owner, _, leaf = layer.parameter.rpartition(".")
            module = self.model.get_submodule(owner)
            weight = module._parameters[leaf]
            assert weight is not None
            assert self.scheme is not None
            empty = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
            if layer.experts:
                dtype = self._dtype(layer)
                codes, scale = quantize_experts(weight.detach(), self.scheme, layer.in_axis, dtype)
                experts = QuantizedExperts(codes, scale, layer.in_axis, self.scheme, dtype=torch.float32)
                put_experts(self.model, layer.parameter, experts)
                undo.append(partial(_put_back, module, leaf, empty))
            else:
                self.model.set_submodule(owner, self._linear(module, weight, layer, kept.get(layer.name)))
                module._parameters[leaf] = empty
                undo.append(partial(self.model.set_submodule, owner, module))
        return undo

    def _dtype(self, layer: Candidate) -> torch.dtype:
        """The dtype of a layer's weight on disk."""
        return self.source.weights.tensors[next(iter(layer.keys))].dtype

    def _linear(
        self, module: nn.Module, weight: torch.Tensor, layer: Candidate, written: dict[str, torch.Tensor] | None
    ) -> QuantizedLinear:
        """The quantized layer of a module, with the tensors that were written for it (or made as they were)."""
        layout, scheme = self.plan.layout, self.scheme if written is None else self._schemes[layer.name]
        assert layout is not None
        assert scheme is not None
        bias = getattr(module, "bias", None)
        made = QuantizedLinear(
            layer.in_features,
            layer.out_features,
            scheme,
            layout,
            bias=bias is not None,
            dtype=torch.float32,
            transposed=layer.transposed,
        )
        if written is None:  # on disk it is in parts, or a part
            matrix = weight.detach().t() if layer.transposed else weight.detach()
            codes, scale = quantize_linear(matrix, scheme, self._dtype(layer))
            static = self._scales.get(layer.parameter)
            written = layout.compress(scheme, codes, scale, input_scale=static, transposed=layer.transposed)
        for name, value in written.items():
            made._buffers[name] = value
        if bias is not None:
            made.bias = nn.Parameter(bias.detach(), requires_grad=False)
        carry_over(module, made)
        made.keep_decoded = False  # the same bits whether zeros are packed or written
        return made.eval()


def _change(rectifier: Rectifier, step: Step, rectifies: bool) -> None:
    """Carry out a step that changes activations."""
    if rectifies:
        rectifier.rectify(share_of(step.parameters))
    else:
        rectifier.limit(float(step.parameters["target"]))


def _put_back(module: nn.Module, leaf: str, weight: nn.Parameter) -> None:
    del module._modules[leaf]
    module._parameters[leaf] = weight
