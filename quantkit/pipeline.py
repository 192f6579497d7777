"""quantize(): from a float model to a compressed checkpoint on disk, as a straight line."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from quantkit_calibration.data import calibration_windows
from torch import nn

from quantkit import formats
from quantkit.activating import recorded
from quantkit.budget import Budget, budget_of, disk_bytes
from quantkit.calibrated import compress_calibrated
from quantkit.checkpoint import Hub, Source, Tensors, open_folder, open_headers, open_model, read_config
from quantkit.compression import compress_stage
from quantkit.dequantization import dequantized
from quantkit.devices import pick_device
from quantkit.durable import write_error, write_json, write_text
from quantkit.errors import DataError, QuantkitError, RecipeError
from quantkit.following import ended, follow, lead, refuse_idle, same_work
from quantkit.footprint import Batching, footprint
from quantkit.headers import NoPartsError
from quantkit.identity import identity, refuse_changed
from quantkit.journal import Journal, records
from quantkit.memory import peak_memory_bytes
from quantkit.naming import float_layout
from quantkit.outcome import Outcome
from quantkit.output import partial_folder, refuse_existing, refuse_full_disk
from quantkit.pairing import (
    Pair,
    check_vocabulary,
    position_errors,
    require_tokenizer,
    tokenizer_of,
    window_length,
)
from quantkit.planning import Plan, make_plan
from quantkit.progress import Steps
from quantkit.publishing import Publication
from quantkit.ranks import current, together
from quantkit.recipe import Recipe, Step, load_recipe
from quantkit.report import Report, model_card, write_report
from quantkit.runlog import RunLog, log_path
from quantkit.shards import ShardReader, ShardWriter
from quantkit.targets import counted
from quantkit.texts import read, tokenize
from quantkit.units import compress_units
from quantkit.verification import verify
from quantkit.version import __version__

RECIPE_FILE = "quantkit_recipe.json"

CHOICE = 16
"""Calibration windows are chosen among this many times as many, from the start of the data."""

log = logging.getLogger("quantkit")


@together
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
    dequantize: bool = False,
    restart: bool = False,
    max_memory: str | int | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    replace_weights: bool = False,
    commit_message: str | None = None,
    progress: bool = True,
) -> Report:
    """Compress a model, write the checkpoint to `output`, read it back, and return the report.

    Args:
        model: a folder, a hub id, or a transformers model in memory (which is only read).
        output: a folder that doesn't exist yet, or is empty.
        steps: steps such as `"w8a8"` or `"int8:group=128"`; or else give `recipe`.
        recipe: a Recipe, the name of one that comes with quantkit, or a file.
        dataset: what to calibrate on, a SPEC; noted and unused when no step observes anything.
        samples: windows to calibrate on; unused like `dataset` when no step observes anything.
        include: patterns of module names; when there are any, only what they match is quantized.
        ignore: patterns of module names that stay float.
        seed: seed of everything random; by default the recipe's, or 0.
        format: `auto`, `compressed-tensors`, `bitsandbytes`, `quantkit` (which packs 2:4 pruned weights), or `dense`
            (which says that their zeros are written, as `auto` does).
        max_shard_size: such as `"5GB"`, or bytes.
        device: where weights are quantized: `auto`, `cpu`, `cuda` or `cuda:N`.
        eval_dataset: evaluate the result on this data set, with the float model as baseline, once it is safe on disk.
        seq_len: tokens of a window, of calibration and of that evaluation.
        data_dir: where known data sets lie.
        tokenizer: for a model in memory, a tokenizer to save beside it.
        revision: branch, tag or commit on the hub.
        token: access token for the hub.
        cache_dir: the hub's cache.
        trust_remote_code: let the model's folder run its own Python code.
        dequantize: take a source that is compressed already, turned into float tensor by tensor first.
        restart: begin anew, whatever a run that was stopped has finished already.
        max_memory: such as `"2GiB"`, or bytes: the most that this process may take. It takes smaller batches and puts
            hidden states on disk to stay below it; where no way does, it is refused before the work begins.
        push_to_hub: send the result to this repository (owner/name) of the hub once it is safe on disk; whether it may
            go there is found out before the work begins.
        private: if that repository doesn't exist, make it a private one.
        replace_weights: put the result in the place of other weights that the repository holds.
        commit_message: what the commit there says.
        progress: show progress on stderr.

    Raises:
        QuantkitError: any mistake that a user can mend; then `output` doesn't exist. Only an evaluation or an
            upload that fails comes after it is safe, and says so.
    """
    started, ranks = time.monotonic(), current()
    progress = progress and ranks.is_first
    made = recipe_of(recipe, steps, include, ignore, seed)
    if made.trains:
        raise RecipeError("a recipe with the step recover is carried out by quantkit.quantize; call that")
    limit, place = parse_size(max_shard_size), pick_device(device)
    allowed = None if max_memory is None else parse_size(max_memory)
    target = refuse_existing(output)
    if dataset is not None and not made.reports:
        log.warning("--dataset %s is unused: no step of this recipe observes data", dataset)
    if seq_len is not None and not (made.reports and dataset is not None) and eval_dataset is None:
        log.warning("--seq-len %s is unused: nothing is observed or evaluated", seq_len)
    if made.observes and dataset is None:
        raise RecipeError(
            f"{', '.join(map(str, made.steps))} observes activations and needs data; give --dataset SPEC "
            "(a file such as text.txt, or a data set)"
        )
    publication = None
    if push_to_hub is not None:
        publication = Publication(push_to_hub, private, replace_weights, commit_message, token)
        if ranks.is_first:
            publication.check()
    elif private or replace_weights or commit_message is not None:
        log.warning("--private, --replace-weights and --commit-message are unused without --push-to-hub")
    hub = Hub(revision, token, cache_dir, trust_remote_code, progress)
    source = open_for_plan(model, hub, tokenizer, dequantize=dequantize)
    plan = make_plan(source, made, format)
    watches = made.observes or (made.reports and dataset is not None)
    shape = (samples, calibration_length(source, seq_len)) if watches else (0, 0)
    memory = footprint(source, plan, made, shape, place, allowed, ranks=ranks.count)  # before anything is read
    refuse_full_disk(target, disk_bytes(source, plan) + ranks.count * memory.spilled_bytes)
    if not source.whole:  # what can be found out before a download is; the plan of what came is made anew
        source = open_source(model, hub, tokenizer, dequantize=dequantize)
        plan = make_plan(source, made, format)
    windows = None
    if watches and dataset is not None:
        data = Data(dataset, samples, seq_len, data_dir)
        windows, made = calibration_data(source, model, made, data, hub)
    evaluation = None
    if eval_dataset is not None:
        evaluation = prepare_evaluation(source, model, made, eval_dataset, seq_len, data_dir, hub, device, progress)
    known = fingerprint(source, made, plan, limit, place)
    shape = (0, 0) if windows is None else (len(windows), windows.shape[1])
    foreseen = footprint(source, plan, made, shape, place, allowed, ranks=ranks.count)
    refuse_idle(ranks, shape[0], foreseen.batching)
    same_work(ranks, known)
    if not ranks.is_first:
        compress(plan, made, source, *follow(ranks), place, windows, progress)
        report = ended(ranks)
        if evaluation is not None:
            report.evaluation = evaluation(target)
        return report
    with partial_folder(target, known, restart=restart) as folder:
        finished = records(folder)
        with RunLog(log_path(target), anew=not finished, worth=lambda: records(folder)) as run:
            words = {"model": source.name, "recipe": made.to_dict(), "version": __version__, "pid": os.getpid()}
            run.write("resume" if finished else "start", **words, memory=foreseen.to_dict(), records=finished)
            journal = Journal(folder, ShardWriter(folder, limit), every=windows is not None, tell=run.write)
            batching = None
            if foreseen.batching is not None:  # as a run was begun it goes on, or its bits would differ
                batching = Batching(**journal.setting("batching", asdict(foreseen.batching)))
                if batching != foreseen.batching:
                    foreseen = footprint(source, plan, made, shape, place, allowed, batching, ranks.count)
            lead(ranks, journal, batching, made)
            done = compress(plan, made, source, journal, batching, place, windows, progress)
            refuse_changed(source, known["model"])
            plan = replace(plan, targets=counted(plan.targets, done.layers))
            report = _finished(folder, source, made, plan, done, journal, progress)
            report.seconds = journal.seconds + time.monotonic() - started
            report.predicted_memory_bytes = foreseen.host_bytes
            write_text(folder / "README.md", model_card(report, source))
            write_report(folder, report)
            run.write("finish", seconds=round(report.seconds, 3), layers=len(report.layers), bytes=report.bytes_after)
    ranks.told(report)
    if evaluation is not None:
        try:
            report.evaluation = evaluation(target)
        except QuantkitError as error:
            later = "" if publication is None else f"; it was not pushed, which goes by: {publication.command(target)}"
            failed = f"{target} is written and verified, but its evaluation failed: {error}{later}"
            raise QuantkitError(failed) from error
        write_report(target, report)
        write_text(target / "README.md", model_card(report, source))
    if publication is not None:
        report.pushed = publication.push(target, progress)
    return report


def _finished(
    folder: Path, source: Source, recipe: Recipe, plan: Plan, done: Outcome, journal: Journal, progress: bool
) -> Report:
    """The report of a checkpoint whose stages are all written: its shards and other files are made, and read back."""
    writer = journal.writer
    with journal.step("all", "write"):
        writer.finish()
        write_json(folder / "config.json", finished_config(source, plan, done))
        copy_files(source, folder)
        write_text(folder / RECIPE_FILE, recipe.to_json())
    with journal.step("all", "verify"):
        verified = verify(folder, plan, writer.checksums, progress=progress)
    report = Report.of(source, recipe, plan, done, writer.nbytes, verified)
    peak = peak_memory_bytes()
    report.peak_memory_bytes = None if peak is None else max(peak, journal.peak_memory_bytes)
    return report


def planned(
    model: str | Path | nn.Module,
    *,
    steps: Sequence[str | Step] = (),
    recipe: Recipe | str | Path | None = None,
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
    format: str = "auto",  # noqa: A002  (the flag's name)
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    dequantize: bool = False,
) -> tuple[Source, Plan, Recipe]:
    """The source, what `quantize` would do with the same arguments, and the recipe.

    No weight is read, none is fetched from the hub, and nothing is written (but small files to the hub's cache).
    """
    made = recipe_of(recipe, steps, include, ignore, None)
    hub = Hub(revision, token, cache_dir, trust_remote_code)
    source = open_source(model, hub, None, dequantize=dequantize, weights=False)
    return source, make_plan(source, made, format), made


def prepare(model: str | Path | nn.Module, **arguments: Any) -> tuple[Plan, Recipe]:
    """What `quantize` would do with the same arguments, and the recipe; the arguments are those of `planned`."""
    return planned(model, **arguments)[1:]


def foresee(
    model: str | Path,
    *,
    output: str | Path | None = None,
    samples: int = 128,
    seq_len: int | None = None,
    device: str = "cpu",
    max_memory: str | int | None = None,
    ranks: int = 1,
    **arguments: Any,
) -> tuple[Plan, Recipe, Budget]:
    """What `quantize` would do, the recipe, and what it takes; other arguments are those of `planned`.

    The `device` (`cpu` or `cuda`) need not be there, and nor do the `ranks` that would share the work: memory and time
    are those of each.
    """
    target = None if output is None else refuse_existing(output)
    allowed = None if max_memory is None else parse_size(max_memory)
    source, plan, recipe = planned(model, **arguments)
    length = calibration_length(source, seq_len) if recipe.observes else 0
    memory = footprint(source, plan, recipe, (samples, length), torch.device(device), allowed, ranks=ranks)
    return plan, recipe, budget_of(source, plan, recipe, samples * length, memory, target, ranks)


def calibration_length(source: Source, seq_len: int | None) -> int:
    """Tokens of a calibration window."""
    return window_length(Pair(source.skeleton, source.name, None, ""), seq_len)


def open_for_plan(model: str | Path | nn.Module, hub: Hub, tokenizer: Any, *, dequantize: bool) -> Source:
    """The source of a model, of one on the hub without its weights; with them where the plan can't be made without."""
    try:
        return open_source(model, hub, tokenizer, dequantize=dequantize, weights=False)
    except NoPartsError as error:
        log.warning("what can be checked is checked after the download, not before: %s", error)
        return open_source(model, hub, tokenizer, dequantize=dequantize)


def recipe_of(
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


def prepare_evaluation(
    source: Source,
    model: str | Path | nn.Module,
    recipe: Recipe,
    dataset: str,
    seq_len: int | None,
    data_dir: str | Path | None,
    hub: Hub,
    device: str,
    progress: bool,
) -> Callable[[Path], dict[str, Any]]:
    """A function that evaluates a checkpoint against the model; its data are read and found sufficient now."""
    from quantkit.evaluation import calibrated_with, check_text, evaluate

    stored = None if source.folder is None else read_config(source.folder).get("quantization_config")
    if stored is not None:  # the baseline is to be loaded as it is
        formats.of_config(stored, source.name).parse(stored)
    tokenizer = source.tokenizer or tokenizer_of(source.folder or model, hub)
    texts = read(dataset, data_dir=data_dir, token=hub.token, cache_dir=hub.cache_dir)
    if calibrated_with(recipe.dataset, texts):
        raise DataError(f"{texts.name} is the text to calibrate with: evaluate on another split or file")
    check_text(texts, tokenizer, source.skeleton, source.name, seq_len)
    baseline = source.folder if source.folder is not None else model
    words: dict[str, Any] = {"seq_len": seq_len, "tokenizer": tokenizer, "device": device, "progress": progress}
    words["trust_remote_code"] = hub.trust_remote_code
    return lambda folder: evaluate(folder, texts, baseline=baseline, **words)


def open_source(
    model: str | Path | nn.Module, hub: Hub, tokenizer: Any, *, dequantize: bool, weights: bool = True
) -> Source:
    """The source of a folder, a hub id or a model in memory; without `weights` those of a hub id aren't fetched."""
    if isinstance(model, nn.Module):
        return open_model(model, tokenizer)
    source = (open_folder if weights else open_headers)(model, hub, _as_float if dequantize else None)
    if dequantize and isinstance(source.weights, ShardReader):
        log.warning("--dequantize is unused: %s is not compressed", model)
    return source


def _as_float(source: Source) -> tuple[Tensors, dict[str, Any]]:
    """The float tensors and config that a compressed source stands for."""
    shapes, transposed = float_layout(source)
    return dequantized(source.weights, source.config, source.name, shapes=shapes, transposed=transposed)


def calibration_data(
    source: Source, model: str | Path | nn.Module, recipe: Recipe, data: "Data", hub: Hub
) -> tuple[torch.Tensor, Recipe]:
    """Windows [W, T] to calibrate on, and the recipe with what they were taken from."""
    texts = read(data.spec, purpose="calibration", data_dir=data.folder, token=hub.token, cache_dir=hub.cache_dir)
    tokenizer = source.tokenizer or (tokenizer_of(source.folder or model, hub) if texts.kind != "tokens" else None)
    require_tokenizer(texts, tokenizer, source.name)
    length = window_length(Pair(source.skeleton, source.name, None, ""), data.seq_len)
    ids = tokenize(texts, tokenizer, limit=CHOICE * data.samples * length).ids
    if ids.numel() < length:
        raise DataError(
            f"{texts.name} has {ids.numel():,} tokens, less than one window of seq_len {length}: give more text or "
            "choose a smaller --seq-len"
        )
    generator = torch.Generator().manual_seed(recipe.seed)
    windows = calibration_windows(ids, data.samples, length, generator)
    check_vocabulary(source.skeleton, source.name, int(windows.max()))
    if len(windows) < data.samples:
        log.warning("%s holds %d windows of %d tokens, not %d", texts.name, len(windows), length, data.samples)
    record = {"name": texts.name, "fingerprint": texts.fingerprint, "windows": len(windows), "seq_len": length}
    return windows, replace(recipe, dataset=record)


@dataclass(frozen=True)
class Data:
    """What to calibrate on: a SPEC, how many windows, their tokens (None: the default), and where known sets lie."""

    spec: str
    samples: int
    seq_len: int | None
    folder: str | Path | None


def compress(
    plan: Plan,
    recipe: Recipe,
    source: Source,
    journal: Journal,
    batching: Batching | None,
    device: torch.device,
    windows: torch.Tensor | None,
    progress: bool,
) -> Outcome:
    """Write every stage that isn't yet; with windows blocks are calibrated on them. Ranks share stages, or windows."""
    ranks = current()
    if windows is None and not ranks.is_alone and not journal.is_complete:
        return compress_units(plan, source, journal, device, progress)
    first = [stage for stage in plan.stages if windows is None or not stage.is_block]
    with Steps("quantizing", len(plan.stages), "block", disable=not progress) as steps:
        for stage in first:
            if journal.finished(stage.name) is None and ranks.is_first:
                done = Outcome()
                done.layers += compress_stage(stage, plan, source, journal.writer, device, pruned=done.pruned)
                if plan.activating is not None and stage.is_block:
                    done.activations += plan.activating.given(stage.name)
                journal.commit(stage.name, done)
            steps.advance()
        blocks = [f"{plan.findings.blocks}.{number}" for number in range(plan.findings.count)]
        if windows is not None and batching is not None and any(journal.finished(name) is None for name in blocks):
            with position_errors(source.name, windows.shape[1]):
                compress_calibrated(plan, recipe, source, journal, device, windows, batching, lambda _: steps.advance())
    journal.complete()
    return journal.outcome()


def fingerprint(source: Source, recipe: Recipe, plan: Plan, limit: int, device: torch.device) -> dict[str, Any]:
    """What a run is known by: when it was stopped, only the same run may go on."""
    return {
        "version of quantkit": __version__,
        "recipe": recipe.to_dict(),
        "model": identity(source),
        "format": _form(plan),
        "max_shard_size": limit,
        "device": device.type,
        "version of torch": torch.__version__,
        "version of transformers": version("transformers"),
    }


def _form(plan: Plan) -> str:
    """The format that a plan writes, and the pattern that it packs."""
    name = "float" if plan.layout is None else plan.layout.NAME
    packed = {target.scheme.sparsity for target in plan.targets.values()} - {None}
    return " ".join([name, *sorted(filter(None, packed))])


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


def finished_config(source: Source, plan: Plan, done: Outcome) -> dict[str, Any]:
    """config.json of the result: the source's own, with what is quantized, and what is done to activations."""
    config = dict(source.config) if plan.activating is None else plan.activating.write(source.config)
    if not config.get("dtype") and not config.get("torch_dtype"):
        dtypes = [target.dtype for target in plan.targets.values()] or list(source.skeleton.parameters())[:1]
        config["dtype"] = str(getattr(dtypes[0], "dtype", dtypes[0])).removeprefix("torch.")
    stored = plan.quantization_config(recorded(done.activations))
    return config if stored is None else config | {"quantization_config": stored}


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
