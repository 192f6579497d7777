"""Reading a checkpoint back from disk and holding it against what was meant to be written."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

from quantkit.checkpoint import read_config
from quantkit.errors import CheckpointError
from quantkit.planning import Plan
from quantkit.progress import track
from quantkit.ranks import current
from quantkit.shards import ShardReader
from quantkit.targets import Target, tensor_specs

SCALES = ("weight_scale", "input_scale", "SCB")


def verify(folder: Path, plan: Plan, checksums: Mapping[str, str], *, progress: bool = True) -> dict[str, int]:
    """How many tensors and schemes were read back and found as they were meant.

    Every tensor is read from disk: its name, shape, dtype and bytes must be those written; every quantized layer's
    tensors must be what its format demands, with positive finite scales; and the scheme of every linear layer, parsed
    from the config on disk, must be the recipe's, or none where the layer was left in float.

    Raises:
        CheckpointError: anything differs.
    """
    current().told((folder, dict(checksums)))
    reader = ShardReader(folder)
    if set(reader.tensors) != set(checksums):
        odd = sorted(set(reader.tensors) ^ set(checksums))[0]
        raise CheckpointError(f"read back from {folder}, tensor {odd!r} is not where it should be; check the disk")
    _check_bytes(reader, checksums, progress)
    current().barrier()
    counts = {"tensors": len(checksums), "quantized": len(plan.targets), "left": len(plan.linears_left)}
    if plan.layout is None:
        return counts
    parsed = plan.layout.parse(read_config(folder)["quantization_config"])
    for target in plan.targets.values():
        _verify_layer(reader, target, plan.layout)
        found = parsed.scheme_of(target.module)
        same = found is not None and found.label == target.scheme.label
        if not same:
            raise CheckpointError(f"the config in {folder} gives {target.module} another scheme than the recipe")
    for module in plan.linears_left:
        if parsed.scheme_of(module) is not None:
            raise CheckpointError(f"the config in {folder} gives {module} a scheme, and it was left in float")
    return counts


def verify_share() -> None:
    """Return nothing; read back this rank's share of what the first rank wrote, while that verifies it.

    Raises:
        CheckpointError: a tensor differs.
    """
    told: tuple[Path, dict[str, str]] = current().told((Path(), {}))
    _check_bytes(ShardReader(told[0]), told[1], progress=False)
    current().barrier()


def _check_bytes(reader: ShardReader, checksums: Mapping[str, str], progress: bool) -> None:
    """Raise CheckpointError when a tensor isn't as it was written; each rank reads its share of them."""
    names = current().share(sorted(checksums))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # neither reading nor hashing holds the interpreter
        found = pool.map(reader.checksum, names)
        for name in track(names, "verifying", len(names), "tensor", disable=not progress):
            if next(found) != checksums[name]:
                raise CheckpointError(
                    f"read back from {reader.folder}, tensor {name!r} differs from what was written; check the disk"
                )


def _verify_layer(reader: ShardReader, target: Target, layout: ModuleType) -> None:
    """Raise CheckpointError when a layer's tensors aren't what its format demands."""
    for name, spec in tensor_specs(target, layout).items():
        info = reader.tensors.get(name)
        if info is None or info.shape != spec.shape or info.dtype != spec.dtype:
            raise CheckpointError(f"tensor {name!r} has not the shape and dtype that {layout.NAME} demands")
        if name.rpartition(".")[2] in SCALES:
            scale = reader.get(name).float()
            if not bool(((scale > 0) & torch.isfinite(scale)).all()):
                raise CheckpointError(f"a scale of {target.module} is not a positive finite number")
        if name.rpartition(".")[2] == "outlier_weight" and not bool(torch.isfinite(reader.get(name)).all()):
            raise CheckpointError(
                f"a column of {target.module} that stays in float is beyond the range of {spec.dtype}; take a gentler "
                "smoothing, or leave outlier_weight=float out"
            )
