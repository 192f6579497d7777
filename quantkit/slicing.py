"""Tensor parallelism: packed layers that hold a slice of their rows or columns, put in by transformers' own plan.

transformers says for each layer of a model whether its rows (`colwise`) or its columns (`rowwise`) are cut, and reads
of every tensor what a rank needs. Here stands what that means for codes and scales: a tensor is cut along the axis that
is shorter in a layer of the slice's size, and is whole in every rank where none is.

With activations that are quantized by token a layer whose columns are cut takes a scale from the part of a token that
a rank has: its codes are finer than those of the whole layer, and its output differs by their rounding. All else gives
the numbers of one process, up to the order of sums.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard
from transformers.distributed.tensor_parallel import ColwiseParallel, RowwiseParallel, TensorParallelLayer

from quantkit.errors import CheckpointError
from quantkit.experts import QuantizedExperts
from quantkit.formats import FORMATS
from quantkit.modules import QuantizedLinear

PREFIX = "quantkit_"
WORD = 8
"""Codes that lie in words or bits are cut where a multiple of so many of them ends."""

SIZES = ("weight_shape", "shape")
"""Tensors that hold a layer's sizes themselves."""


def placements(layer: QuantizedLinear, ranks: int, rows: bool) -> dict[str, int | None]:
    """The axis along which each tensor of a layer is cut into `ranks` slices, or None where it is whole in each.

    Args:
        layer: whole.
        ranks: how many slices.
        rows: whether its rows (out features) are cut, or else its columns.

    Raises:
        CheckpointError: the layer can't be cut there.
    """
    scheme, layout = layer.scheme, FORMATS[layer.format]
    size = layer.out_features if rows else layer.in_features
    unit = 128 if scheme.weight_granularity == "block" else 1
    if layout.is_packed(scheme) or scheme.sparsity is not None:
        unit = max(unit, WORD)
    if not rows and scheme.group_size:
        unit = max(unit, scheme.group_size)
    if size % ranks or size // ranks % unit:
        raise CheckpointError(
            f"a layer of {layer.out_features} x {layer.in_features} with {scheme.label} cannot be cut into {ranks} "
            f"slices of its {'out' if rows else 'in'} features, each a multiple of {unit}; use fewer ranks"
        )
    if scheme.tiles is not None:
        raise CheckpointError(f"a layer packed by {scheme.sparsity} cannot be cut; load it in one process")
    if not rows and scheme.outlier_columns is not None:
        raise CheckpointError(
            "a layer with columns in float cannot be cut along its in features; load it in one process"
        )
    slices = slice_specs(layer, ranks, rows)
    found: dict[str, int | None] = {}
    for leaf, spec in layer.stored.items():
        shorter = [
            axis for axis, (one, other) in enumerate(zip(spec.shape, slices[leaf].shape, strict=True)) if one != other
        ]
        if len(shorter) > 1 or any(spec.shape[axis] != ranks * slices[leaf].shape[axis] for axis in shorter):
            raise CheckpointError(f"tensor {leaf!r} of a layer with {scheme.label} cannot be cut; use fewer ranks")
        found[leaf] = shorter[0] if shorter else None
    return found


def slice_specs(layer: QuantizedLinear, ranks: int, rows: bool) -> Mapping[str, Any]:
    """What a slice of a layer stores."""
    out_features, in_features = layer.out_features, layer.in_features
    sizes = (out_features // ranks, in_features) if rows else (out_features, in_features // ranks)
    dtype = next((spec.dtype for leaf, spec in layer.stored.items() if leaf.endswith("scale")), torch.float32)
    specs: Mapping[str, Any] = FORMATS[layer.format].tensor_specs(layer.scheme, *sizes, dtype, layer.transposed)
    return specs


def cut(layer: QuantizedLinear, mesh: DeviceMesh, rows: bool) -> None:
    """Return nothing; a layer without values becomes this rank's slice, and its tensors say which part they are."""
    if getattr(layer, "is_merged", False):
        raise CheckpointError(
            "a layer that is merged or split while it is loaded cannot be cut for several ranks; load it in one process"
        )
    ranks = mesh.size()
    places, slices = placements(layer, ranks, rows), slice_specs(layer, ranks, rows)
    for leaf, axis in places.items():
        if axis is not None:
            layer._buffers[leaf] = distribute_tensor(layer.get_buffer(leaf), mesh, [Shard(axis)], src_data_rank=None)
    layer.stored = dict(slices)
    layer.out_features //= ranks if rows else 1
    layer.in_features //= 1 if rows else ranks
    layer._hf_quantized_needs_local_tp = True  # type: ignore[assignment]


def settle(model: nn.Module) -> int:
    """How many layers of a model that was just loaded are slices; their tensors are plain buffers from now on."""
    found = 0
    for layer in model.modules():
        if not isinstance(layer, QuantizedLinear) or not getattr(layer, "_hf_quantized_needs_local_tp", False):
            continue
        found += 1
        for leaf, spec in layer.stored.items():
            read: Any = layer._parameters.pop(leaf, None)
            value: Any = layer._buffers.get(leaf) if read is None else read.detach()
            value = value.to_local() if isinstance(value, DTensor) else value
            if leaf in SIZES:
                value = torch.tensor([layer.out_features, layer.in_features], dtype=spec.dtype).view(spec.shape)
            layer._buffers[leaf] = value
    return found


def plan_slices(model: nn.Module, plan: dict[str, str]) -> None:
    """Return nothing; a plan of transformers has our styles where the model has packed layers."""
    kinds: dict[str, set[type]] = {}
    for name, module in model.named_modules():
        kinds.setdefault(replace_layer_number_by_wildcard(name), set()).add(type(module))
    for key, style in plan.items():
        found = kinds.get(key, set())
        if QuantizedLinear in found or QuantizedExperts in found:
            ours = PREFIX + style
            plan[key] = ours if ours in ALL_PARALLEL_STYLES and QuantizedExperts not in found else PREFIX + "refused"


class _Rows(ColwiseParallel):  # type: ignore[misc]
    """Rows of packed layers; layers in float as transformers has it."""

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        """The module, cut."""
        if isinstance(module, QuantizedLinear):
            cut(module, mesh, rows=True)
        found: nn.Module = super().install_forward(module, mesh)
        return found

    def transform_output_post_forward(self, module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        """A rank's slice of the output, or all of it where the plan says so."""
        if isinstance(module, QuantizedLinear) and isinstance(self.output_layouts, Replicate):
            return DTensor.from_local(output, mesh, [Shard(-1)], run_check=False).full_tensor()
        return super().transform_output_post_forward(module, output, mesh)


class _Columns(RowwiseParallel):  # type: ignore[misc]
    """Columns of packed layers; layers in float as transformers has it."""

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        """The module, cut."""
        if isinstance(module, QuantizedLinear):
            cut(module, mesh, rows=False)
        found: nn.Module = super().install_forward(module, mesh)
        return found


class _Refused(TensorParallelLayer):  # type: ignore[misc]
    """Styles that packed layers don't have."""

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        """Nothing: it raises CheckpointError."""
        raise CheckpointError(
            f"{type(module).__name__} cannot be cut as the plan for several ranks has it; load it in one process"
        )


def register() -> None:
    """Make our styles known to transformers."""
    ALL_PARALLEL_STYLES.register(PREFIX + "refused", _Refused())
    for style, whole in (("colwise", False), ("colwise_rep", True), ("colwise_gather_output", True)):
        layouts = {"output_layouts": Replicate() if whole else Shard(-1)}
        ALL_PARALLEL_STYLES.register(PREFIX + style, _Rows(input_layouts=Replicate(), **layouts))
    for style, given in (("rowwise", Shard(-1)), ("rowwise_rep", Replicate()), ("rowwise_split_input", Replicate())):
        ALL_PARALLEL_STYLES.register(PREFIX + style, _Columns(input_layouts=given, output_layouts=Replicate()))


register()
