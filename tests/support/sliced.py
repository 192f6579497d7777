"""Models and layers that are spread over several processes: what each of them gives, and slices cut by hand."""

from pathlib import Path
from typing import Any

import torch

from quantkit.formats import FORMATS
from quantkit.modules import QuantizedLinear
from quantkit.slicing import SIZES, placements, slice_specs

TOKENS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(3))


def logits(model: Any) -> torch.Tensor:
    """[2, 24, V]."""
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def write(folders: list[str], output: str) -> None:
    """Write the logits of models that lie in these folders, loaded over all processes, or why one can't be."""
    import os

    import torch.distributed as dist

    import quantkit
    from quantkit.errors import QuantkitError

    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for folder in folders:
        try:
            model = quantkit.load(folder, tensor_parallel=True)
        except QuantkitError as error:
            found[folder] = str(error)
            continue
        layer = model.model.layers[0].self_attn
        shapes = {
            name: {leaf: tuple(value.shape) for leaf, value in getattr(layer, name).named_buffers()}
            for name in ("q_proj", "o_proj")
        }
        found[folder] = (logits(model), shapes)
    torch.save(found, Path(output) / f"{os.environ['RANK']}.pt")


def slice_of(layer: QuantizedLinear, number: int, ranks: int, rows: bool) -> QuantizedLinear:
    """A slice of a layer, cut as the placements say."""
    size = (
        (layer.in_features, layer.out_features // ranks) if rows else (layer.in_features // ranks, layer.out_features)
    )
    layout = FORMATS[layer.format]
    made = QuantizedLinear(*size, layer.scheme, layout, bias=False, dtype=torch.bfloat16, transposed=layer.transposed)
    for leaf, axis in placements(layer, ranks, rows).items():
        value = layer.get_buffer(leaf)
        if leaf in SIZES:
            value = torch.tensor([made.out_features, made.in_features], dtype=value.dtype).view(value.shape)
        elif axis is not None:
            value = value.chunk(ranks, axis)[number]
        made._buffers[leaf] = value
        assert tuple(value.shape) == slice_specs(layer, ranks, rows)[leaf].shape
    return made
