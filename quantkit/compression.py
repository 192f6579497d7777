"""Compression of one stage: its tensors are read, changed, quantized, packed and written."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from quantkit_kernels.formats import BLOCK, dequantize_weight

from quantkit.checkpoint import Source
from quantkit.errors import CheckpointError
from quantkit.modules import quantize_linear
from quantkit.outcome import LayerReport, PrunedReport
from quantkit.pieces import compress_expert
from quantkit.planning import Plan, Stage, Target
from quantkit.shards import ShardWriter
from quantkit.sparsifying import Pruning, prune_stored
from quantkit.workers import Workers

NORM_ELEMENTS = 2**18
"""About so many weights at a time are held against their codes: they stay in a core's cache."""


@dataclass
class Worked:
    """What calibration made of a block, to be written instead of what the source holds.

    Attributes:
        changed: parameters with new values (float32), by the model's names.
        input_scales: static scales [1] of activations, by the name of the weight that they meet.
        outlier_columns: the columns [O] of weights that stay in float, by the weight's name.
    """

    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    input_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    outlier_columns: dict[str, torch.Tensor] = field(default_factory=dict)


def compress_stage(
    stage: Stage,
    plan: Plan,
    source: Source,
    writer: ShardWriter,
    device: torch.device,
    worked: Worked | None = None,
    kept: dict[str, dict[str, torch.Tensor]] | None = None,
    pruned: list[PrunedReport] | None = None,
) -> list[LayerReport]:
    """Read, compress and write one stage; the reports of its linear layers.

    What is to be pruned and calibration hasn't made is pruned by magnitude here; `pruned` takes the reports. One tensor
    at a time is read and written, and a few of a block at a time are compressed: but for a calibrated one's, as what is
    freed of the memory of many threads is never all given back. `kept` takes the written tensors of each linear layer
    that one key makes, by its name.
    """
    side_by_side = stage.is_block and worked is None  # what lies outside of the blocks is large, and comes one by one
    worked = worked or Worked()
    layers: list[LayerReport] = []

    def compressed(task: _Task) -> _Compressed:
        zeros = task.prune(plan, source)
        return task.target, list(task.compress(plan, source, device)), zeros

    tasks = _tasks(stage, plan, source, worked)
    done = Workers(device).map(compressed, tasks) if side_by_side else map(compressed, tasks)

    def written(target: Target | None, tensors: dict[str, torch.Tensor], layer: LayerReport | None) -> None:
        writer.add(tensors)
        if target is None or layer is None:
            return
        layers.append(layer)
        if kept is not None and target.whole and not target.of_experts:
            kept[target.module] = {name.removeprefix(target.prefix): each for name, each in tensors.items()}

    for target, made, zeros in done:
        if pruned is not None and zeros is not None:
            pruned.append(zeros)
        while made:  # what is written is not held while the next is read
            written(target, *made.pop(0))
        if not stage.is_block:
            writer.flush()
    writer.flush()
    return layers


_Compressed = tuple[Target | None, list[tuple[dict[str, torch.Tensor], LayerReport | None]], PrunedReport | None]


@dataclass
class _Task:
    """One tensor of a stage, and what is to become of it.

    Attributes:
        key: its name in the checkpoint.
        tensor: what it holds.
        target: how it is quantized, or None.
        scale: the static scale [1] of the activations that it meets, or None.
        columns: the columns [O] that stay in float, or None.
        calibrated: whether calibration made the tensor.
    """

    key: str
    tensor: torch.Tensor
    target: Target | None = None
    scale: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    calibrated: bool = False

    def prune(self, plan: Plan, source: Source) -> PrunedReport | None:
        """Set the tensor's weights to zero by magnitude, where they are to be pruned and aren't yet; what that cost."""
        modules, transposed = plan.pruned_by_key(self.key)
        if self.calibrated or plan.pruning is None or not modules:
            return None
        refuse_nonfinite(self.tensor, self.key, source)
        self.tensor, report = prune_stored(self.tensor, modules, Pruning.of(plan.pruning), transposed)
        return report

    def compress(
        self, plan: Plan, source: Source, device: torch.device
    ) -> Iterator[tuple[dict[str, torch.Tensor], LayerReport | None]]:
        """The tensors to be written by name, with the report of the linear layer that they are."""
        tensor = self.tensor
        if self.target is None:
            if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and self.key not in plan.unused:
                refuse_nonfinite(tensor, self.key, source)
            yield {plan.renamed.get(self.key, self.key): tensor}, None
            return
        if self.columns is not None:
            refuse_nonfinite(tensor, self.key, source)
        assert plan.layout is not None
        try:
            yield from compress_target(self.target, tensor.to(device), plan.layout, self.scale, self.columns)
        except ValueError:  # quantizing looks for NaN and infinity itself, in all but columns that stay in float
            refuse_nonfinite(tensor, self.key, source)
            raise


def _tasks(stage: Stage, plan: Plan, source: Source, worked: Worked) -> Iterator[_Task]:
    """Every tensor of a stage, read when it is asked for."""
    changed = plan.names.written(worked.changed) if worked.changed else {}

    def read(key: str) -> torch.Tensor:  # a variable here would hold a tensor while the next is read
        return changed[key] if key in changed else source.weights.get(key)

    for key in stage.keys:
        target = plan.targets.get(key)
        if target is None:
            yield _Task(key, read(key).to(source.weights.tensors[key].dtype), calibrated=key in changed)
            continue
        scales = [worked.input_scales[name] for name in target.parameters if name in worked.input_scales]
        scale = torch.stack(scales).amax(0) if scales else None  # parts of one tensor see the same activations
        columns = worked.outlier_columns.get(target.parameters[0])  # a weight with such lies in a tensor of its own
        yield _Task(key, read(key), target, scale, columns, calibrated=key in changed)


def refuse_nonfinite(tensor: torch.Tensor, key: str, source: Source) -> None:
    """Return nothing; raise CheckpointError when a tensor holds NaN or infinity."""
    parts = tensor.reshape(-1).split(NORM_ELEMENTS)  # type: ignore[no-untyped-call]
    if all(bool(torch.isfinite(part.sum(dtype=torch.float32))) for part in parts):  # NaN and infinity survive a sum
        return
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
        path = source.weights.tensors[key].path
        raise CheckpointError(
            f"tensor {key!r} in {path} holds {kind}; the model is damaged: download or train it again"
        )


def compress_target(
    target: Target,
    weight: torch.Tensor,
    layout: ModuleType,
    input_scale: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> Iterator[tuple[dict[str, torch.Tensor], LayerReport]]:
    """The tensors of each linear layer of a target by full name, and what was lost: one layer, or each expert."""
    parts = weight.unbind(0) if target.experts else (weight,)
    for prefix, part in zip(target.prefixes, parts, strict=True):
        matrix = part.t() if target.transposed else part
        tensors, layer = compress_linear(target, matrix, layout, input_scale, columns)
        if target.of_experts:
            layer = replace(layer, module=prefix.removesuffix("."))
        yield {prefix + name: value for name, value in tensors.items()}, layer


def compress_linear(
    target: Target,
    weight: torch.Tensor,
    layout: ModuleType,
    input_scale: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> tuple[dict[str, torch.Tensor], LayerReport]:
    """A float weight [N, K] as its format stores it, and what that cost; `columns` [O] of it stay in float."""
    scheme, rest, outliers = target.scheme, weight, {}
    if columns is not None:
        columns = columns.to(weight.device)
        rest = weight.index_fill(1, columns, 0.0)  # so that a row's scale is that of what is coded
        outliers = {"outliers": (columns, weight[:, columns].to(target.dtype))}
    codes, scale = quantize_linear(rest, scheme, target.dtype)
    stored = None if input_scale is None else input_scale.to(scale.dtype)
    if target.experts:
        tensors = compress_expert(layout, scheme, codes, scale, target.transposed)
    else:
        tensors = layout.compress(scheme, codes, scale, input_scale=stored, transposed=target.transposed, **outliers)
    floats = None if columns is None else (columns, tensors["outlier_weight"])
    exact = scheme.is_float  # but for the rounding to the dtype that the weight has on disk
    norm, lost = (1.0, 0.0) if exact else _norms(weight, codes, scale, scheme.weight_granularity, floats)
    bits = 8 * sum(tensor.nbytes for tensor in tensors.values()) / weight.numel()
    shape = (target.out_features, target.in_features)
    error, kept = lost / norm if norm else 0.0, None if columns is None else len(columns)
    return tensors, LayerReport(", ".join(target.modules), scheme.label, shape, bits, error, kept)


def _norms(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    granularity: str,
    floats: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[float, float]:
    """The Frobenius norms of a float weight [N, K] and of what its codes lost.

    Some rows at a time, which stay in cache and take no memory; their squares are added up in float64. `floats` are the
    columns [O] that stay in float, and what is stored of them, [N, O].
    """
    step = max(1, NORM_ELEMENTS // max(1, weight.shape[1]) // BLOCK) * BLOCK
    squares = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for start in range(0, weight.shape[0], step):
        rows, blocks = slice(start, start + step), slice(start // BLOCK, (start + step) // BLOCK)
        own = scale if granularity == "tensor" else scale[blocks if granularity == "block" else rows]
        exact = weight[rows].float()
        lost = dequantize_weight(codes[rows], own, granularity).float()
        if floats is not None:
            lost[:, floats[0]] = floats[1][rows].float()
        lost.sub_(exact)
        squares += torch.stack([torch.linalg.vector_norm(exact), torch.linalg.vector_norm(lost)]).double().square()
    norm, lost_norm = squares.sqrt().tolist()
    return norm, lost_norm
