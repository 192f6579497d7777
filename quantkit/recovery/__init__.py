"""recover(): a transformed float model is trained on text, and written as an ordinary checkpoint again."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import Hub, Source, decoder_blocks
from quantkit.durable import write_text
from quantkit.errors import DataError, QuantkitError, RecipeError
from quantkit.identity import files_of, identity, refuse_changed
from quantkit.journal import STATE, records
from quantkit.loading import load
from quantkit.memory import peak_memory_bytes, resident_memory_bytes
from quantkit.methods.recover import count_of
from quantkit.output import partial_folder, partial_of, refuse_existing, refuse_full_disk
from quantkit.pairing import baseline_hub, folder_of, position_errors, tokenizer_for, vocabulary
from quantkit.pipeline import parse_size
from quantkit.recipe import Recipe, Step
from quantkit.recovered import Recovered
from quantkit.recovery import adapters
from quantkit.recovery.inputs import open_float, place_of_training, schedule_of, step_of, training_windows
from quantkit.recovery.perplexities import Perplexities
from quantkit.recovery.progress import TrainingProgress
from quantkit.recovery.trainable import (
    Trainable,
    activation_bytes,
    memory_of_training,
    memory_of_weights,
    say,
    told_memory,
    trainable,
)
from quantkit.recovery.trained import pruned_in, recipe_with, report_before, report_of, write_trained
from quantkit.recovery.training import Keeper, Schedule, State, Training, curve
from quantkit.report import Report, model_card, write_report
from quantkit.runlog import RunLog, log_path
from quantkit.shards import ShardReader
from quantkit.texts import read
from quantkit.version import __version__

LONGEST_WAIT = timedelta(days=7)
"""For so long processes wait for the first, which evaluates."""


def recover(
    model: str | Path,
    output: str | Path,
    *,
    dataset: str,
    tokens: int | str = "2M",
    learning_rate: float | str = 1e-4,
    teacher: str | Path | None = None,
    distill: float | str | None = None,
    train: str = "all",
    lora: int = 0,
    batch_tokens: int | str = 8192,
    warmup: float | str = 0.03,
    mixed_precision: str = "no",
    seq_len: int | None = None,
    batch_size: int | None = None,
    gradient_checkpointing: bool = False,
    checkpoint_every: int = 100,
    seed: int = 0,
    eval_dataset: str | None = None,
    eval_tokens: int | None = None,
    max_memory: str | int | None = None,
    max_shard_size: str | int = "5GB",
    device: str = "auto",
    data_dir: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    restart: bool = False,
    progress: bool = True,
) -> Report | None:
    """Train a transformed float model on text, write it to `output` as it was stored, and return the report.

    Weights that were pruned stay zero. Under `accelerate launch` several processes share every step; the first of them
    writes and has a report, the others have None.

    Args:
        model: a folder or hub id: what `sparse24` or another transform left, in float.
        output: a folder that doesn't exist yet, or is empty.
        dataset: the text, a SPEC.
        tokens: how many tokens are read, in whole steps: a number, or such as `"2M"`. A shorter text is read again.
        learning_rate: the largest one.
        teacher: the original: its perplexity is measured too, and its predictions are imitated.
        distill: the share of the loss that is the divergence from the teacher; by default 0.5 with one.
        train: `all` parameters, or those of `linear` layers.
        lora: the rank of LoRA on linear layers, or 0 to train the parameters themselves.
        batch_tokens: tokens of a step, in whole windows.
        warmup: the share of steps in which the rate rises.
        mixed_precision: `no`, `bf16` or `fp16`: what products are computed in. Weights stay in float32.
        seq_len: tokens of a window; by default the smaller of 2048 and the model's context.
        batch_size: windows that go through the model at once; by default some 2048 tokens of them.
        gradient_checkpointing: compute each block again for its gradients, which takes less memory.
        checkpoint_every: so many steps lie between two that are kept.
        seed: of the order of the text, and of whatever the model draws.
        eval_dataset: measure perplexity on this data set, of the teacher, before and after.
        eval_tokens: only on so many tokens from its start.
        max_memory: such as `"8GiB"`: refuse what takes more.
        max_shard_size: such as `"5GB"`.
        device: `auto`, `cpu` or `cuda`.
        data_dir: where known data sets lie.
        revision: the model's branch, tag or commit on the hub (the teacher's is its default branch).
        token: access token for the hub.
        cache_dir: the hub's cache.
        trust_remote_code: let a model's folder run its own Python code.
        restart: begin anew, whatever a run that was stopped has done.
        progress: show progress on stderr.

    Raises:
        QuantkitError: any mistake that a user can mend, and a loss that isn't finite; then `output` doesn't exist.
    """
    started = time.monotonic()
    step = step_of(
        tokens=tokens,
        lr=learning_rate,
        batch=batch_tokens,
        warmup=warmup,
        distill=(0.5 if teacher is not None else 0) if distill is None else distill,
        train=train,
        lora=lora,
        precision=mixed_precision,
    )
    if float(step.parameters["distill"]) and teacher is None:
        raise RecipeError(
            f"distill={step.parameters['distill']} takes the original's predictions; give --teacher MODEL"
        )
    limit, place = parse_size(max_shard_size), place_of_training(device, mixed_precision)
    allowed = None if max_memory is None else parse_size(max_memory)
    target = refuse_existing(output)
    hub = Hub(revision, token, cache_dir, trust_remote_code, progress)
    source = open_float(model, hub)
    texts = read(dataset, purpose="calibration", data_dir=data_dir, token=token, cache_dir=cache_dir)
    tokenizer = tokenizer_for(model, teacher, hub, texts) if texts.kind != "tokens" else None
    windows = training_windows(source, texts, tokenizer, count_of(step.parameters["tokens"]), seq_len)
    schedule = schedule_of(step, windows.shape[1], batch_size, seed)
    data = {"name": texts.name, "fingerprint": texts.fingerprint, "windows": len(windows), "seq_len": schedule.seq_len}
    words = {"seq_len": seq_len, "max_tokens": eval_tokens, "device": str(place), "progress": progress}
    perplexities = None
    if eval_dataset is not None:
        held = read(eval_dataset, data_dir=data_dir, token=token, cache_dir=cache_dir)
        perplexities = Perplexities(source, teacher, held, texts, hub, words)
    job = Job(
        source,
        teacher,
        hub,
        recipe_with(source, step, seed, data),
        step,
        windows,
        schedule,
        place,
        gradient_checkpointing,
        max(1, checkpoint_every),
        allowed,
        progress,
    )
    job.refuse_too_large(target)
    with _accelerator(place, mixed_precision) as accelerator:
        job.refuse_uneven(accelerator.num_processes)
        known = job.fingerprint(accelerator.num_processes) | {"max_shard_size": limit}
        if not accelerator.is_main_process:
            accelerator.wait_for_everyone()
            job.train(accelerator, partial_of(target), lambda *_, **__: None)
            return None
        with partial_folder(target, known, restart=restart) as folder:
            finished = records(folder)
            with RunLog(log_path(target), anew=not finished, worth=lambda: records(folder)) as run:
                run.write(
                    "resume" if finished else "start", model=source.name, recipe=job.recipe.to_dict(), pid=os.getpid()
                )
                before = None if perplexities is None else perplexities.before(folder / STATE)
                accelerator.wait_for_everyone()
                ready, state = job.train(accelerator, folder, run.write)
                refuse_changed(source, known["model"])
                report = job.write(folder, ready, state, limit, accelerator.num_processes)
                assert report.recovery is not None
                report.recovery.perplexity = before
                report.seconds = max(time.monotonic() - started, report.recovery.seconds)  # that of all runs
                write_report(folder, report)
                write_text(folder / "README.md", model_card(report, source))
                run.write("finish", seconds=round(report.seconds, 3), tokens=report.recovery.tokens)
    if perplexities is not None:
        try:
            report.recovery.perplexity = perplexities.after(target, before)
        except QuantkitError as error:
            raise QuantkitError(f"{target} is written and verified, but its evaluation failed: {error}") from error
        write_report(target, report)
        write_text(target / "README.md", model_card(report, source))
    return report


@dataclass
class Job:
    """One recovery, once all that the user said is found right.

    Attributes:
        source: the model.
        original: the teacher, or None.
        hub: how to find both.
        recipe: the source's, with the step at its end.
        step: what is done.
        windows: the text.
        schedule: how it is read.
        place: cpu or cuda.
        checkpointing: whether blocks are computed again for their gradients.
        every: steps between two that are kept.
        allowed: bytes of memory, or None.
        progress: show progress.
    """

    source: Source
    original: str | Path | None
    hub: Hub
    recipe: Recipe
    step: Step
    windows: torch.Tensor
    schedule: Schedule
    place: torch.device
    checkpointing: bool
    every: int
    allowed: int | None
    progress: bool

    @property
    def rank(self) -> int:
        """LoRA's rank, or 0."""
        return int(self.step.parameters["lora"])

    @property
    def original_bytes(self) -> int:
        """Bytes of the teacher's weights, if it is needed in training."""
        if self.original is None or not self.schedule.distill:
            return 0
        folder = folder_of(self.original, baseline_hub(self.hub))
        return 0 if folder is None else ShardReader(folder).nbytes

    def refuse_too_large(self, target: Path) -> None:
        """Return nothing; raise QuantkitError where memory or the disk is too small, or peft is missing."""
        if self.rank:
            adapters.require_peft()
        on_cpu = self.place.type == "cpu"
        memory_of_weights(self.source, self.original_bytes, bool(self.rank), on_cpu).refuse_above(self.allowed)
        count = sum(parameter.numel() for parameter in self.source.skeleton.parameters())
        kept = 0 if self.rank else 12 * count  # float32 and two moments; the next is written before the last goes
        refuse_full_disk(target, 2 * max(kept, self.source.weights.nbytes))

    def refuse_uneven(self, processes: int) -> None:
        """Return nothing; raise RecipeError when processes can't share a step evenly."""
        if self.schedule.windows % processes:
            raise RecipeError(
                f"a step of {self.schedule.windows} windows cannot be shared by {processes} processes; give a "
                f"--batch-tokens that is a multiple of {self.schedule.seq_len * processes:,}"
            )

    def fingerprint(self, processes: int) -> dict[str, Any]:
        """What the run is known by: when it was stopped, only the same run may go on."""
        packages = ("torch", "transformers", "accelerate", *(("peft",) if self.rank else ()))
        folder = None if self.original is None else folder_of(self.original, baseline_hub(self.hub))
        return {
            "version of quantkit": __version__,
            "recipe": self.recipe.to_dict(),
            "model": identity(self.source),
            "teacher": None if folder is None else files_of(folder),
            "batch_size": self.schedule.batch,
            "gradient_checkpointing": self.checkpointing,
            "device": self.place.type,
            "number of processes": processes,
            "number of threads": torch.get_num_threads(),
            **{f"version of {package}": version(package) for package in packages},
        }

    def train(self, accelerator: Any, folder: Path, tell: Callable[..., None]) -> tuple[Trainable, State]:
        """Train the model; what was trained, and its state at the end."""
        model = self._load(self.source.folder, self.hub, "float32")
        if self.checkpointing:
            _checkpoint_gradients(model)
        pruned = [name for layer in pruned_in(report_before(self.source)) for name in layer.module.split(", ")]
        ready = trainable(model, self.step.parameters["train"], self.rank, pruned, self.schedule.draws("lora"))
        self._foresee(ready, tell, accelerator.is_main_process)
        original = None
        if self.original is not None and self.schedule.distill:
            original = self._load(self.original, baseline_hub(self.hub), None)
            if vocabulary(original) != vocabulary(model):
                raise DataError(
                    f"{self.source.name} has a vocabulary of {vocabulary(model)} and the teacher one of "
                    f"{vocabulary(original)}: give the original that the model was made from"
                )
        keeper = Keeper(folder / STATE)
        training = Training(
            ready.model,
            original,
            ready.trained,
            ready.masks,
            self.windows,
            self.schedule,
            accelerator,
            keeper,
            self.every,
        )
        shown = self.progress and accelerator.is_main_process
        with told_memory(accelerator.device), position_errors(self.source.name, self.schedule.seq_len):
            state = training.run(Told(self.schedule, tell, self.every, shown))
        return ready, state

    def _load(self, model: str | Path | None, hub: Hub, dtype: str | None) -> Any:
        assert model is not None
        found = load(
            model,
            "cpu",
            dtype,
            attention="transformers",
            revision=hub.revision if model is not self.source.folder else None,
            token=hub.token,
            cache_dir=hub.cache_dir,
            trust_remote_code=hub.trust_remote_code,
        )
        return found.requires_grad_(False)

    def _foresee(self, ready: Trainable, tell: Callable[..., None], first: bool) -> None:
        """Say what it takes, and refuse what is too much."""
        schedule = self.schedule
        blocks = decoder_blocks(self.source.skeleton)[1] if self.checkpointing else None
        size = vocabulary(ready.model) or 0
        now = resident_memory_bytes() or 0
        weights = sum(parameter.nbytes for parameter in ready.model.parameters())
        activations = activation_bytes(
            ready.model, schedule.seq_len, schedule.batch, size, blocks, distilled=schedule.distill > 0
        )
        memory = memory_of_training(
            ready, self.original_bytes, activations, self.place.type == "cpu", max(0, now - weights)
        )
        tell("memory", parts=memory.parts, total=memory.total)
        memory.refuse_above(self.allowed)
        self.foreseen = memory.total
        if self.progress and first:
            passes = schedule.steps * schedule.windows / len(self.windows)
            say(
                f"{ready.count:,} numbers are trained in {schedule.steps:,} steps of {schedule.step_tokens:,} tokens "
                f"({passes:.2f} passes over the text); it {memory.line()}"
            )

    def write(self, folder: Path, ready: Trainable, state: State, limit: int, processes: int) -> Report:
        """Write the checkpoint; its report, without what comes after."""
        model = adapters.merged(ready.model) if self.rank else ready.model
        nbytes = write_trained(folder, self.source, model.cpu(), ready.zeros, self.recipe, limit)
        schedule, edge = self.schedule, max(1, len(state.losses) // 20)
        packages = ("accelerate", *(("peft",) if self.rank else ()))
        recovery = Recovered(
            dataset=str((self.recipe.dataset or {})["name"]),
            tokens=schedule.steps * schedule.step_tokens,
            text_tokens=self.windows.numel(),
            steps=schedule.steps,
            step_tokens=schedule.step_tokens,
            seq_len=schedule.seq_len,
            processes=processes,
            precision=self.step.parameters["precision"],
            trained=ready.count,
            layers=ready.layers,
            original=None if self.original is None else str(self.original),
            distill=schedule.distill,
            zeros=ready.zeros.to_dict(),
            first_loss=math.fsum(state.losses[:edge]) / edge,
            last_loss=math.fsum(state.losses[-edge:]) / edge,
            losses=[(steps * schedule.step_tokens, loss) for steps, loss in curve(state.losses)],
            skipped=state.done - state.updates,
            seconds=state.seconds,
            versions={package: version(package) for package in packages},
        )
        report = report_of(self.source, self.recipe, recovery, nbytes, report_before(self.source), ready.notes)
        report.predicted_memory_bytes, report.peak_memory_bytes = self.foreseen, peak_memory_bytes()
        return report


class Told:
    """Is told of every step, and shows it on stderr and, from time to time, in the log."""

    def __init__(self, schedule: Schedule, tell: Callable[..., None], every: int, shown: bool) -> None:
        self.schedule, self.tell, self.every, self.shown = schedule, tell, every, shown
        self.progress: TrainingProgress | None = None

    def __call__(self, state: State, seconds: float) -> None:
        """A step is done."""
        tokens, schedule = state.done * self.schedule.step_tokens, self.schedule
        if self.progress is None:
            total = schedule.steps * schedule.step_tokens
            self.progress = TrainingProgress(tokens - schedule.step_tokens, total, disable=not self.shown)
        self.progress.show(tokens, state.losses[-1])
        if state.done % self.every == 0 or state.done == schedule.steps:
            rate = schedule.rate_at(state.done - 1)
            self.tell(
                "train", step=state.done, tokens=tokens, loss=state.losses[-1], rate=rate, seconds=round(seconds, 3)
            )
        if state.done == schedule.steps:
            self.progress.__exit__(None, None, None)


def _checkpoint_gradients(model: Any) -> None:
    """Let the model compute each block again for its gradients, or QuantkitError where it can't."""
    try:
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.23 on
        if enable is not None:
            enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise QuantkitError(f"--gradient-checkpointing: {error}; leave it out") from error


@contextmanager
def _accelerator(place: torch.device, precision: str) -> Iterator[Any]:
    """Accelerate's accelerator for this device; what it keeps for the whole process is forgotten afterwards.

    Raises:
        QuantkitError: this process uses accelerate in another way already, or it was launched for another kind.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType, InitProcessGroupKwargs

    was_used = bool(AcceleratorState._shared_state)
    patience = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    try:
        made = Accelerator(mixed_precision=precision, cpu=place.type == "cpu", kwargs_handlers=[patience])
    except ValueError as error:
        raise QuantkitError(f"accelerate cannot be set up ({error}); start a new process") from error
    if made.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise QuantkitError(
            f"accelerate was launched for {made.distributed_type.value}, and every process holds the whole model here; "
            "launch it with --multi_gpu, or on the CPU"
        )
    try:
        yield made
    finally:
        if not was_used and made.num_processes == 1:
            made.free_memory()
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
