"""What a model that is spread over several processes gives; run in each of them."""

from pathlib import Path
from typing import Any

import torch

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
