"""quantize(): from a float model to a compressed checkpoint on disk, as a straight line."""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from quantkit_kernels.formats import dequantize, quantize_weight
from torch import nn

from quantkit import formats
from quantkit.checkpoint import Hub, Source, open_folder, open_model
from quantkit.devices import pick_device
from quantkit.errors import CheckpointError, QuantkitError, RecipeError
from quantkit.memory import peak_memory_bytes
from quantkit.output import partial_folder, refuse_existing, refuse_full_disk
from quantkit.pairing import tokenizer_of
from quantkit.planning import Plan, Stage, Target, make_plan
from quantkit.progress import track
from quantkit.recipe import Recipe, Step, load_recipe
from quantkit.report import LayerReport, Report, model_card, write_report
from quantkit.shards import ShardWriter, write_error, write_json, write_text
from quantkit.texts import read
from quantkit.verification import verify

RECIPE_FILE = "quantkit_recipe.json"

log = logging.getLogger("quantkit")


def quantize(
    model: str | Path | nn.Module,
    output: str | Path,
    *,
    steps: Sequence[str | Step] = (),
    recipe: Recipe | str | Path | None = None,
    dataset: str | None = None,
    samples: int = 128,
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
    seed: int | None = None,
    format: str = "auto",  # noqa: A002  (the flag's name)
    max_shard_size: str | int = "5GB",
    device: str = "auto",
    eval_dataset: str | None = None,
    seq_len: int | None = None,
    data_dir: str | Path | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Report:
    """Compress a model, write the checkpoint to `output`, read it back, and return the report.

    Args:
        model: a folder, a hub id, or a transformers model in memory (which is only read).
        output: a folder that doesn't exist yet, or is empty.
        steps: steps such as `"w8a8"` or `"int8:group=128"`; or else give `recipe`.
        recipe: a Recipe, the name of one that comes with quantkit, or a file.
        dataset: what to calibrate on; noted and unused when no step observes anything.
        samples: windows to calibrate on; unused like `dataset` when no step observes anything.
        include: patterns of module names; when there are any, only what they match is quantized.
        ignore: patterns of module names that stay float.
        seed: seed of everything random; by default the recipe's, or 0.
        format: `auto`, `compressed-tensors` or `quantkit`.
        max_shard_size: such as `"5GB"`, or bytes.
        device: where weights are quantized: `auto`, `cpu`, `cuda` or `cuda:N`.
        eval_dataset: evaluate the result on this data set, with the float model as baseline, once it is safe on disk.
        seq_len: window length of that evaluation.
        data_dir: where known data sets lie.
        tokenizer: for a model in memory, a tokenizer to save beside it.
        revision: branch, tag or commit on the hub.
        token: access token for the hub.
        cache_dir: the hub's cache.
        trust_remote_code: let the model's folder run its own Python code.
        progress: show progress on stderr.

    Raises:
        QuantkitError: any mistake that a user can mend; then `output` doesn't exist. Only an evaluation that fails
            comes after it is safe, and says so.
    """
    started = time.monotonic()
    made = _recipe(recipe, steps, include, ignore, seed)
    limit, place = parse_size(max_shard_size), pick_device(device)
    target = refuse_existing(output)
    if dataset is not None and not made.observes:
        log.warning("--dataset %s is unused: no step of this recipe observes data", dataset)
    if seq_len is not None and not made.observes and eval_dataset is None:
        log.warning("--seq-len %s is unused: nothing is observed or evaluated", seq_len)
    hub = Hub(revision, token, cache_dir, trust_remote_code)
    source = open_model(model, tokenizer) if isinstance(model, nn.Module) else open_folder(model, hub)
    layout = formats.choose(_scheme(made), format)
    plan = make_plan(source, made, layout)
    refuse_full_disk(target, plan.output_bytes)
    evaluation = None
    if eval_dataset is not None:
        evaluation = prepare_evaluation(source, model, eval_dataset, seq_len, data_dir, hub, device, progress)
    with partial_folder(target) as folder:
        writer = ShardWriter(folder, limit)
        layers: list[LayerReport] = []
        for stage in track(plan.stages, "quantizing", len(plan.stages), "block", disable=not progress):
            layers += compress_stage(stage, plan, source, layout, writer, place)
        writer.finish()
        config = finished_config(source, plan, layout)
        write_json(folder / "config.json", config)
        copy_files(source, folder)
        write_text(folder / RECIPE_FILE, made.to_json())
        verified = verify(folder, plan, layout, writer.checksums, progress=progress)
        report = Report.of(source, made, layout.NAME, plan, layers, writer.nbytes, verified)
        report.seconds, report.peak_memory_bytes = time.monotonic() - started, peak_memory_bytes()
        write_text(folder / "README.md", model_card(report, source))
        write_report(folder, report)
    if evaluation is not None:
        try:
            report.evaluation = evaluation(target)
        except QuantkitError as error:
            raise QuantkitError(f"{target} is written and verified, but its evaluation failed: {error}") from error
        write_report(target, report)
        write_text(target / "README.md", model_card(report, source))
    return report


def _recipe(
    recipe: Recipe | str | Path | None,
    steps: Sequence[str | Step],
    include: Sequence[str],
    ignore: Sequence[str],
    seed: int | None,
) -> Recipe:
    """The recipe of either steps or a recipe, with patterns added."""
    include, ignore = ([v] if isinstance(v, str) else v for v in (include, ignore))
    if recipe is not None and steps:
        raise RecipeError("both steps and a recipe are given; give -m STEP or --recipe NAME|FILE, not both")
    if recipe is None:
        return Recipe.of(steps, include, ignore, seed or 0)
    found = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    seed = found.seed if seed is None else seed
    return Recipe(found.steps, (*found.include, *include), (*found.ignore, *ignore), seed)


def _scheme(recipe: Recipe) -> Any:
    """The recipe's scheme, or RecipeError when nothing in it quantizes."""
    if recipe.scheme is None:
        raise RecipeError("the recipe has no quantizer; add one such as -m w8a8")
    return recipe.scheme


def prepare_evaluation(
    source: Source,
    model: str | Path | nn.Module,
    dataset: str,
    seq_len: int | None,
    data_dir: str | Path | None,
    hub: Hub,
    device: str,
    progress: bool,
) -> Callable[[Path], dict[str, Any]]:
    """A function that evaluates a checkpoint against the model; its data are read and found sufficient now."""
    from quantkit.evaluation import check_text, evaluate

    tokenizer = source.tokenizer or tokenizer_of(model, hub)
    texts = read(dataset, data_dir=data_dir, token=hub.token, cache_dir=hub.cache_dir)
    check_text(texts, tokenizer, source.skeleton, source.name, seq_len)
    baseline = source.folder if source.folder is not None else model
    words: dict[str, Any] = {"seq_len": seq_len, "tokenizer": tokenizer, "device": device, "progress": progress}
    words["trust_remote_code"] = hub.trust_remote_code
    return lambda folder: evaluate(folder, texts, baseline=baseline, **words)


def parse_size(size: str | int) -> int:
    """Bytes of a size such as `5GB`, `512MB`, `2GiB`, or a number of bytes.

    Raises:
        RecipeError: it isn't one.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    text = str(size).strip().upper()
    digits = text.rstrip("BGIKM")
    unit = text[len(digits) :]
    try:
        value = float(digits)
        if unit in units and 1 <= value * units[unit] < 2**63:
            return int(value * units[unit])
    except ValueError:
        pass
    raise RecipeError(f"{size!r} is not a size; write one like 5GB, 512MB or 2GiB")


def compress_stage(
    stage: Stage, plan: Plan, source: Source, layout: ModuleType, writer: ShardWriter, device: torch.device
) -> list[LayerReport]:
    """Read, compress and write one stage, a tensor at a time; the reports of its linear layers."""
    layers = []
    for key in stage.keys:
        tensor = source.weights.get(key)
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and key not in plan.unused:
            refuse_nonfinite(tensor, key, source)
        if key not in plan.targets:
            writer.add({plan.renamed.get(key, key): tensor})
            if not stage.is_block:
                writer.flush()
            continue
        target = plan.targets[key]
        tensors, layer = compress_linear(target, tensor.to(device), layout)
        writer.add({target.prefix + name: value for name, value in tensors.items()})
        layers.append(layer)
    writer.flush()
    return layers


def refuse_nonfinite(tensor: torch.Tensor, key: str, source: Source) -> None:
    """Return nothing; raise CheckpointError when a tensor holds NaN or infinity."""
    if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):  # one pass; NaN and infinity survive a sum
        return
    if not bool(torch.isfinite(tensor).all()):
        kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
        path = source.weights.tensors[key].path
        raise CheckpointError(
            f"tensor {key!r} in {path} holds {kind}; the model is damaged: download or train it again"
        )


def compress_linear(
    target: Target, weight: torch.Tensor, layout: ModuleType
) -> tuple[dict[str, torch.Tensor], LayerReport]:
    """A float weight [N, K] as its format stores it, and what that cost."""
    scheme = target.scheme
    codes, scale = quantize_weight(
        weight, getattr(torch, scheme.weight_dtype), group_size=scheme.group_size, weight_range=scheme.weight_range
    )
    tensors = layout.compress(scheme, codes, scale)
    exact = weight.float()
    norm = float(torch.linalg.vector_norm(exact))
    lost = float(torch.linalg.vector_norm(dequantize(codes, scale).float() - exact))
    bits = 8 * sum(tensor.nbytes for tensor in tensors.values()) / weight.numel()
    shape = (target.out_features, target.in_features)
    return tensors, LayerReport(target.module, scheme.label, shape, bits, lost / norm if norm else 0.0)


def finished_config(source: Source, plan: Plan, layout: ModuleType) -> dict[str, Any]:
    """config.json of the result: the source's own, with what is quantized."""
    targets = list(plan.targets.values())
    names = [target.module for target in targets]
    config = dict(source.config)
    if not config.get("dtype") and not config.get("torch_dtype"):
        config["dtype"] = str(targets[0].dtype).removeprefix("torch.")
    config["quantization_config"] = layout.config(targets[0].scheme, names, plan.linears_left)
    return config


def copy_files(source: Source, folder: Path) -> None:
    """Copy tokenizer, generation config, chat template, licence and every other file that is no weight."""
    try:
        for path in source.files:
            shutil.copyfile(path, folder / path.name)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)
    except OSError as error:
        raise write_error(error, folder / Path(error.filename or "").name) from error
    if source.generation_config is not None:
        write_json(folder / "generation_config.json", source.generation_config)
