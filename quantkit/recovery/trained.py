"""A trained model is written as the checkpoint that it was made from: the same keys, dtypes and files."""

import json
import logging
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint import Source, compressed_as
from quantkit.durable import write_json, write_text, writing
from quantkit.errors import CheckpointError, QuantkitError, RecipeError
from quantkit.naming import Names
from quantkit.outcome import PrunedReport
from quantkit.pipeline import RECIPE_FILE, copy_files
from quantkit.recipe import Recipe, Step, load_recipe
from quantkit.recovered import Recovered
from quantkit.recovery.zeros import Masks
from quantkit.report import PACKAGES, REPORT_FILE, Report
from quantkit.shards import ShardReader, ShardWriter
from quantkit.version import __version__

log = logging.getLogger("quantkit")


def write_trained(folder: Path, source: Source, model: nn.Module, zeros: Masks, recipe: Recipe, limit: int) -> int:
    """How many bytes of tensors were written, and read back as they were meant.

    Args:
        folder: where to write; what a run that was stopped left of this is removed.
        source: the checkpoint that the model was made from.
        model: in float32.
        zeros: what must be zero of its weights.
        recipe: what made them.
        limit: bytes of the largest shard.

    Raises:
        CheckpointError: what is read back differs.
        QuantkitError: a weight isn't finite in its dtype.
    """
    for path in folder.glob("*.safetensors*"):
        with writing(path):
            path.unlink()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unmasked = zeros.broken(parameters)
    assert unmasked is None, unmasked
    writer = ShardWriter(folder, limit)
    for key, tensor in _tensors(source, parameters):
        writer.add({key: tensor})
        writer.flush()
    writer.finish()
    write_json(folder / "config.json", source.config)
    copy_files(source, folder)
    write_text(folder / RECIPE_FILE, recipe.to_json())
    reader = ShardReader(folder)
    for name, expected in writer.checksums.items():
        if name not in reader.tensors or reader.checksum(name) != expected:
            raise CheckpointError(
                f"read back from {folder}, tensor {name!r} differs from what was written; check the disk"
            )
    return writer.nbytes


def _tensors(source: Source, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint by its key: the model's, in the checkpoint's dtype, or as it was."""
    names = Names(source)
    known = names.sources()
    trained = names.written({name: each.detach().cpu() for name, each in parameters.items() if name in known})
    for key, info in source.weights.tensors.items():
        if key not in trained:
            yield key, source.weights.get(key)
            continue
        tensor = trained.pop(key).to(info.dtype)
        if tuple(tensor.shape) != info.shape:
            raise CheckpointError(
                f"{key!r} of {source.name} would be written as {list(tensor.shape)}, not {info.shape}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise QuantkitError(
                f"{key!r} is beyond the range of {info.dtype} after training; give a smaller --lr, with --restart"
            )
        yield key, tensor


def recipe_with(source: Source, step: Step, seed: int, data: Mapping[str, Any]) -> Recipe:
    """The recipe that made the source, with this step at its end.

    Where the source says none, or one that nothing may follow (it was decoded from a quantized one), it is this step
    alone.

    Raises:
        RecipeError: the source's recipe can't be read.
    """
    path = None if source.folder is None else source.folder / RECIPE_FILE
    before = load_recipe(path) if path is not None and path.is_file() else None
    if before is not None:
        record = {**data, **({"before": before.dataset} if before.dataset is not None else {})}
        try:
            return Recipe((*before.steps, step), before.include, before.ignore, seed, record)
        except RecipeError as error:
            log.warning("the recipe that made %s is not carried over: %s", source.name, error)
    return Recipe((step,), seed=seed, dataset=dict(data))


def report_before(source: Source) -> dict[str, Any]:
    """The report that lies in the source's folder; empty where there is none.

    Raises:
        CheckpointError: it can't be read.
    """
    path = None if source.folder is None else source.folder / REPORT_FILE
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        pruned_in(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); take it from the original again, or remove it") from error
    return dict(found)


def pruned_in(report: Mapping[str, Any]) -> list[PrunedReport]:
    """The pruned layers of a report as it lies on disk."""
    return [PrunedReport(**(layer | {"shape": tuple(layer["shape"])})) for layer in report.get("pruned", [])]


def report_of(
    source: Source, recipe: Recipe, recovery: Recovered, nbytes: int, before: Mapping[str, Any], notes: list[str]
) -> Report:
    """The report of a recovery; of pruning it says what the source's report did."""
    versions = {"quantkit": __version__, "python": platform.python_version()}
    versions |= {package: version(package) for package in PACKAGES}
    return Report(
        source.name,
        recipe.to_dict(),
        str(compressed_as(source.config) or "float"),
        layers=[],
        left_alone=[],
        copied_unused=[],
        renamed={},
        patterns=[],
        bytes_before=source.weights.nbytes,
        bytes_after=nbytes,
        verified={"tensors": len(source.weights.tensors), "quantized": 0, "left": 0},
        pruned=pruned_in(before),
        notes=notes,
        versions=versions,
        recovery=recovery,
    )
