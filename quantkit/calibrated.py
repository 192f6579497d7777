"""Compression with calibration data: block by block, each fed with what the compressed blocks before it give.

For every block: its weights are read in float32; the calibration windows run through it and what meets its weights is
observed; smoothing groups are folded and proven; static ranges are observed on the folded block; its tensors are
quantized and written; the quantized layers take the place of the float ones, and the windows run through again to make
the next block's inputs. One block's weights, its statistics and the windows' hidden states are all that is in memory.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from quantkit_calibration.observers import TensorRange
from quantkit_calibration.sequential import Calls, OrderError, run_blocks
from quantkit_kernels.formats import QMAX, dequantize, quantize_per_tensor
from torch import nn
from torch.utils._pytree import tree_leaves

from quantkit.candidates import Candidate
from quantkit.checkpoint import Source, empty_copy, use_plain_implementations
from quantkit.compression import Worked, compress_stage
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.experts import QuantizedExperts, put_experts, quantize_experts
from quantkit.exploration import outermost_lists, without_cache
from quantkit.journal import Journal
from quantkit.memory import Excess
from quantkit.modules import QuantizedLinear, quantize_linear
from quantkit.outcome import GroupReport, Outcome
from quantkit.planning import Plan
from quantkit.recipe import Recipe
from quantkit.smoothing import Inputs, Proof, Smoother, fold_in
from quantkit.streaming import LazyModel, StoredWeights
from quantkit.targets import counted, tensor_specs
from quantkit.watching import ForcedRouting, Latest, See, Watch, product_dtype

BATCH_TOKENS = {"cpu": 512, "cuda": 2048}
"""Windows of a batch hold this many tokens together (one window at least). On a CPU what a block makes of so few stays
in its cache, and a process's memory is not full of it."""

EXCESS = 128 * 2**20
"""While a block's batches run, so much memory may be added before what is free is given back."""

FEW_TOKENS = 32
"""An expert that fewer calibration tokens were sent to is shown all tokens of the first batch."""

FOLD, SCALE = "fold.", "input_scale."
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
        track: called with a block's number when it is done.

    Raises:
        CheckpointError: the model doesn't run block by block.
    """
    forget_embeddings: Callable[[], None]
    work = _Work(plan, recipe, source, journal, device)
    size = max(1, BATCH_TOKENS[device.type] // windows.shape[1])
    # The first window is a batch by itself: folds are proven on it, one run of the block for each.
    parts = [windows[:1], *torch.split(windows[1:], size)] if len(windows) > 1 else [windows]
    batches = [{"input_ids": part.to(device), **without_cache(work.model)} for part in parts]
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

    with torch.no_grad(), work.lazy.hooked(), work.lazy.embeddings() as forget_embeddings:
        if plan.findings.reads_outside:
            work.lazy.fill_outside([*outermost_lists(work.model)])
        try:
            run_blocks(work.model, blocks, batches, visit, order=order)
        except OrderError as error:
            raise CheckpointError(f"{source.name} cannot be calibrated block by block: {error}") from error


class _Work:
    """The state of one calibrated compression: a lazy model, and what has been found."""

    def __init__(self, plan: Plan, recipe: Recipe, source: Source, journal: Journal, device: torch.device) -> None:
        self.plan, self.recipe, self.source, self.device = plan, recipe, source, device
        self.journal, self.writer = journal, journal.writer
        self.scheme = recipe.scheme
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
        self.excess = Excess(EXCESS)
        self._scales: dict[str, torch.Tensor] = {}
        self._undo: dict[int, list[Callable[[], None]]] = {}

    def name(self, index: int) -> str:
        """The block's name."""
        return f"{self.plan.findings.blocks}.{index}"

    def unobserved(self, index: int) -> None:
        """Compress and write a block that no text reaches, as its weights are."""
        name = self.name(index)
        if self.journal.finished(name) is not None:
            return
        stage, self.done = self.stages.get(name), Outcome()
        if stage is not None:
            self.done.layers += compress_stage(stage, self.plan, self.source, self.writer, self.device)
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
        made = self._calibrate if self.journal.finished(name) is None else self._replay
        kept = made(index, block, calls, axes)
        if not (calls.last and not self.looped):
            self._undo[index] = self._quantize(layers, kept)
        return block

    def _calibrate(self, index: int, block: nn.Module, calls: Calls, axes: dict[str, int]) -> Kept:
        """Observe, smooth, compress and write a block, and record it; the tensors written for its layers."""
        name, worked = self.name(index), Worked()
        state: dict[str, torch.Tensor] = {}
        self.done = Outcome()
        for number, step in enumerate(self.recipe.transforms):
            alpha = None if step.parameters["alpha"] == "auto" else float(step.parameters["alpha"])
            folded = self._smooth(index, block, calls, axes, alpha, worked)
            state |= {f"{FOLD}{number}.{position}": scale for position, scale in folded.items()}
        if self.scheme is not None and self.scheme.is_static and axes:
            worked.input_scales = self._scales = self._static_scales(name, block, calls, axes)
            state |= {SCALE + path: scale for path, scale in self._scales.items()}
        if self.scheme is not None and self.scheme.outlier_columns is not None and axes:
            worked.outlier_columns = self._outlier_columns(name, block, calls, axes)
        kept: Kept = {}
        stage = self.stages.get(name)
        if stage is not None:
            self.done.layers += compress_stage(stage, self.plan, self.source, self.writer, self.device, worked, kept)
        self.journal.commit(name, self.done, state)
        return kept

    def _replay(self, index: int, block: nn.Module, calls: Calls, axes: dict[str, int]) -> Kept:
        """Make a block again that a run which was stopped had finished: as `_calibrate` leaves it, nothing observed."""
        name, structure = self.name(index), self.plan.findings.structures.get(index)
        state = self.journal.state(name)
        for number in range(len(self.recipe.transforms)):
            changed: set[str] = set()
            for position, group in enumerate(structure.groups if structure is not None else ()):
                scale = state.get(f"{FOLD}{number}.{position}")
                if scale is not None:
                    changed |= set(fold_in(block, group, scale.to(self.device)))
            self._settle(name, block, changed, axes)
        self._scales = {key.removeprefix(SCALE): value for key, value in state.items() if key.startswith(SCALE)}
        stage, layout = self.stages.get(name), self.plan.layout
        done = self.journal.finished(name)
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
        block: nn.Module,
        calls: Calls,
        axes: dict[str, int],
        alpha: float | None,
        worked: Worked,
    ) -> dict[int, torch.Tensor]:
        """Fold the block's smoothing groups, each proven on the first batch; the scales of those that are folded."""
        name = self.name(index)
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
        fed = {path: axis for path, axis in consumers.items() if path in axes or not self.plan.targets}
        if not fed:
            return {}
        stored = {self.source.weights.tensors[key].dtype for path in fed for key in self._sources[f"{name}.{path}"]}
        dtype = product_dtype(stored.pop(), self.device) if len(stored) == 1 else None
        before = self._observe(name, block, calls, fed, inputs, dtype)
        self.excess.give_back()
        proof = Proof(lambda: _output(block, calls), [p for _, p in block.named_parameters()], before)
        restore = None if worked.changed else partial(self.lazy.fill, name, block)
        smoother = Smoother(name, block, alpha, self.scheme, fed, self._dtypes(name, block), proof, restore)
        self.done.groups += smoother.fold_all(structure.groups, inputs)
        for path in self._settle(name, block, smoother.changed, axes):
            worked.changed[path] = self.model.get_parameter(path).detach()
        places = {id(group): position for position, group in enumerate(structure.groups)}
        return {places[id(group)]: scale for group, scale in smoother.folded}

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

    def _observe(
        self,
        name: str,
        block: nn.Module,
        calls: Calls,
        axes: dict[str, int],
        inputs: Inputs,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Run the windows through the float block; what it gives for the first batch, in full and in float32.

        The batches after the first compute the products in `dtype`. Experts that few tokens were sent to see all of the
        first batches.
        """
        watched = {path: (block.get_parameter(path), axis) for path, axis in axes.items()}
        output = self._watched(block, calls, watched, inputs.see, dtype)
        experts = {path: value.shape[0] for path, (value, _) in watched.items() if value.ndim == 3}
        for count in set(experts.values()):
            paths = [path for path, size in experts.items() if size == count]
            rare = _rare(inputs, paths, count)
            if rare:
                shown = self._show(block, calls, watched, inputs, paths, count, list(rare))
                how = "with all tokens of the first windows" if shown else "with those alone"
                self.done.notes.append(
                    f"experts {_listed(rare)} of {name} were sent fewer than {FEW_TOKENS} calibration tokens, "
                    f"and are calibrated {how}"
                )
        return output

    @staticmethod
    def _show(
        block: nn.Module,
        calls: Calls,
        watched: Mapping[str, tuple[torch.Tensor, int]],
        inputs: Inputs,
        paths: Sequence[str],
        experts: int,
        rare: list[int],
    ) -> bool:
        """Send all tokens of the first batches to these experts until each has met enough (or all there are).

        False when the router doesn't choose in a way that can be overruled.
        """
        while rare:
            for call in calls:
                with ForcedRouting(experts, rare) as routing, Watch(watched, inputs.see):
                    block(*call.args, **call.kwargs)
                if not routing.taken:
                    return False
                left = set(_rare(inputs, paths, experts))
                if not left.intersection(rare[: routing.taken]):
                    break
            rare = rare[routing.taken :]  # they have met enough, or every token there is
        return True

    def _watched(
        self,
        block: nn.Module,
        calls: Calls,
        parameters: Mapping[str, tuple[torch.Tensor, int]],
        see: See,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Run a block for all batches and tell what meets its parameters; what it gives for the first batch.

        The first batch is run in full and as it is. Where each parameter met one product there, the others are run as
        far as their last; they compute these products in `dtype`.
        """
        first = Watch(parameters, see)
        with first:
            output = _output(block, calls)
        rest = Watch(parameters, see, stop=first.once_each, dtype=dtype)
        for call in calls.after(1):
            rest.of(partial(block, *call.args, **call.kwargs))
            self.excess.watch()
        return output

    def _static_scales(
        self, name: str, block: nn.Module, calls: Calls, axes: dict[str, int]
    ) -> dict[str, torch.Tensor]:
        """The static scale [1] of what meets each weight, observed on the block as it now is."""
        assert self.scheme is not None
        kind, dtype = self.scheme.activation_range, getattr(torch, str(self.scheme.activation_dtype))
        ranges = {path: TensorRange(histogram=kind != "absmax") for path in axes}
        watched = {path: (block.get_parameter(path), axis) for path, axis in axes.items()}

        def range_of(x: torch.Tensor) -> TensorRange:
            found = TensorRange(histogram=kind != "absmax")
            found.update(x)
            return found

        latest, met = Latest(range_of), set[str]()

        def see(path: str, expert: int | None, x: torch.Tensor) -> None:
            met.add(path)
            ranges[path].merge(latest(x))

        self._watched(block, calls, watched, see)
        for path in ranges:
            if path not in met:
                raise QuantkitError(
                    f"{name}.{path.removesuffix('.weight')} met no calibration token, so that it has no static range; "
                    "--ignore it, or use activations by token"
                )

        def encode(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            codes, scale = quantize_per_tensor(values, dtype, scale.reshape(1))
            return dequantize(codes[None], scale[None])[0]

        found = {path: each.range(kind, QMAX[dtype], encode) / QMAX[dtype] for path, each in ranges.items()}
        return {f"{name}.{path}": torch.tensor([value if value > 0 else 1.0]) for path, value in found.items()}

    def _outlier_columns(
        self, name: str, block: nn.Module, calls: Calls, axes: dict[str, int]
    ) -> dict[str, torch.Tensor]:
        """The columns [O] of each weight in which something reaches the threshold, observed on the block as it is."""
        assert self.scheme is not None
        assert self.scheme.threshold is not None
        inputs = Inputs(keep_rows=False, seed=self.recipe.seed)
        self._observe(name, block, calls, axes, inputs)
        found, threshold = {}, torch.tensor(self.scheme.threshold, dtype=torch.float32)
        for path in axes:
            largest = inputs.largest(path)
            if largest is None:
                raise QuantkitError(
                    f"{name}.{path.removesuffix('.weight')} met no calibration token, so that its outlier columns are "
                    "not known; --ignore it, or use llm-int8 without outlier_weight=float"
                )
            found[f"{name}.{path}"] = (largest >= threshold.to(largest.device)).nonzero().flatten()
        return found

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
        layout, scheme = self.plan.layout, self.scheme
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
        return made.eval()


def _put_back(module: nn.Module, leaf: str, weight: nn.Parameter) -> None:
    del module._modules[leaf]
    module._parameters[leaf] = weight


def _output(block: nn.Module, calls: Calls) -> torch.Tensor:
    """What the block gives for the first batch: its first float tensor."""
    output = block(*calls[0].args, **calls[0].kwargs)
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())


def _rare(inputs: Inputs, paths: Sequence[str], experts: int) -> list[int]:
    """Which experts met fewer tokens than FEW_TOKENS."""
    return [e for e in range(experts) if any(inputs.tokens.get((path, e), 0) < FEW_TOKENS for path in paths)]


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"
