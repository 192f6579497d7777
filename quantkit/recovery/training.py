"""A model's parameters are trained on windows of tokens, in whole steps, so that a run that is stopped goes on.

    loss = (1 - w) · CE(next token) + w · KL(original ‖ model)

CE is the mean of -log q(next token) over all positions of a window but the last, KL the mean over the same positions of
sum_v p_v (log p_v - log q_v), p of the original's logits and q of the model's (Hinton et al. 2015, arXiv:1503.02531, at
temperature 1). AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) without weight decay, its betas 0.9 and 0.95; the
norm of the gradient is cut to 1; the rate rises in the first steps and falls along a cosine to 0.

What a step reads and draws follows from the seed and its number alone. So weights, the optimizer's two moments, the
losses and the number are all there is to keep: what a run that goes on makes is bit for bit what it would have made.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quantkit.errors import CheckpointError, QuantkitError
from quantkit.journal import read_whole, write_whole
from quantkit.recovery.signals import Patience
from quantkit.recovery.zeros import Masks
from quantkit.shards import checksum, is_whole, read_tensors, write_tensors

BETAS = (0.9, 0.95)
EPSILON = 1e-8
LARGEST_NORM = 1.0
RECORD = "record-training.json"

WEIGHT, FIRST, SECOND, LOSSES = "weight.", "first.", "second.", "losses"


@dataclass(frozen=True)
class Schedule:
    """How a model is trained.

    Attributes:
        steps: how many steps there are.
        windows: windows of a step, of all processes together.
        seq_len: tokens of a window.
        rate: the largest learning rate.
        warmup: steps in which the rate rises.
        distill: w above.
        batch: windows that one process puts through the model at once.
        seed: of the order of the windows, and of whatever the model draws.
    """

    steps: int
    windows: int
    seq_len: int
    rate: float
    warmup: int
    distill: float
    batch: int
    seed: int

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.windows * self.seq_len

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, the first being 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * 0.5 * (1 + math.cos(math.pi * progress))

    def draws(self, *what: object) -> int:
        """A seed for one purpose."""
        digest = hashlib.blake2b(repr((self.seed, *what)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


class Order:
    """The windows that a step reads: every pass over the text has an order of its own, drawn from the seed."""

    def __init__(self, schedule: Schedule, count: int) -> None:
        self.schedule, self.count = schedule, count
        self._pass, self._order = -1, torch.empty(0, dtype=torch.int64)

    def of(self, step: int) -> torch.Tensor:
        """The numbers of a step's windows."""
        first = step * self.schedule.windows
        return torch.tensor([self._at(place) for place in range(first, first + self.schedule.windows)])

    def _at(self, place: int) -> int:
        if place // self.count != self._pass:
            self._pass = place // self.count
            generator = torch.Generator().manual_seed(self.schedule.draws("order", self._pass))
            self._order = torch.randperm(self.count, generator=generator)
        return int(self._order[place % self.count])


@dataclass
class State:
    """What is kept of a training: everything that the next step depends on.

    Attributes:
        done: steps that are done.
        losses: the loss of each.
        updates: steps in which the optimizer changed weights: with fp16 some are left out.
        scaler: the state of fp16's loss scaling.
        seconds: what these steps took.
    """

    done: int = 0
    losses: list[float] = field(default_factory=list)
    updates: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Keeper:
    """Keeps a training in a folder, and takes it up again.

    A file with all tensors comes first, then the record that names it with the hashes of them all, then the file before
    is removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, state: State, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Keep all of it, durably."""
        tensors = {LOSSES: torch.tensor(state.losses, dtype=torch.float64)}
        for name, parameter in trained.items():
            moments = optimizer.state.get(parameter, {})
            tensors[WEIGHT + name] = parameter.detach()
            tensors[FIRST + name] = moments.get("exp_avg", torch.zeros_like(parameter)).detach()
            tensors[SECOND + name] = moments.get("exp_avg_sq", torch.zeros_like(parameter)).detach()
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        file = f"training-{state.done:09d}.safetensors"
        write_tensors(self.folder / file, tensors)
        record = {
            "file": file,
            "checksums": {name: checksum(tensor) for name, tensor in tensors.items()},
            "done": state.done,
            "updates": state.updates,
            "scaler": state.scaler,
            "seconds": state.seconds,
        }
        write_whole(self.folder / RECORD, record)
        for path in self.folder.glob("training-*.safetensors"):
            if path.name != file:
                path.unlink(missing_ok=True)

    def take_up(self, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> State:
        """What was kept, put into parameters and optimizer; the beginning where nothing was.

        Raises:
            CheckpointError: it isn't as it was written.
        """
        path = self.folder / RECORD
        if not path.is_file():
            return State()
        try:
            record = read_whole(path)
            file = self.folder / record["file"]
            if not is_whole(file, record["checksums"]):
                raise ValueError(f"{file.name} is not as it was written")
            tensors = read_tensors(file)
            state = State(record["done"], tensors.pop(LOSSES).tolist(), record["updates"], record["scaler"])
            state.seconds = record["seconds"]
            if {name.partition(".")[2] for name in tensors} != set(trained):
                raise ValueError("it is of other parameters")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); check the disk, and give --restart to begin anew"
            ) from error
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors[WEIGHT + name])
                moments = {"exp_avg": tensors[FIRST + name], "exp_avg_sq": tensors[SECOND + name]}
                here = {key: value.to(parameter.device) for key, value in moments.items()}
                optimizer.state[parameter] = {"step": torch.tensor(float(state.updates)), **here}
        return state


def loss_of(logits: torch.Tensor, original: torch.Tensor | None, windows: torch.Tensor, distill: float) -> torch.Tensor:
    """The loss above, a scalar in float32, of logits [B, T, V] on windows [B, T]."""
    log_q = logits.float().log_softmax(-1)
    loss = log_q.new_zeros(())
    if distill < 1:
        loss = -(1 - distill) * log_q[:, :-1].gather(-1, windows[:, 1:, None]).mean()
    if original is not None and distill > 0:
        log_p = original.float().log_softmax(-1)
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        loss = loss + distill * divergence[:, :-1].mean()
    return loss


@dataclass
class Training:
    """The training of one model.

    Attributes:
        model: in float32, in training mode.
        original: whose predictions are imitated, or None.
        trained: the parameters that change, by name.
        masks: what stays zero of them, by the same names.
        windows: [W, T], the text.
        schedule: how it is trained.
        accelerator: accelerate's: devices, processes, mixed precision.
        keeper: where it is kept, or None.
        every: after so many steps it is kept.
    """

    model: nn.Module
    original: nn.Module | None
    trained: dict[str, nn.Parameter]
    masks: Masks
    windows: torch.Tensor
    schedule: Schedule
    accelerator: Any
    keeper: Keeper
    every: int

    def run(self, tell: Callable[[State, float], None] = lambda *_: None) -> State:
        """Train, from where it was kept on; `tell` is told of every step: the state, and the seconds it took.

        Raises:
            QuantkitError: a loss or gradient isn't finite; the steps that were kept before stay.
            KeyboardInterrupt: a signal came; all steps are kept.
        """
        accelerator, schedule = self.accelerator, self.schedule
        parameters = list(self.trained.values())
        self.model.to(accelerator.device)
        self.masks.to(accelerator.device)
        if self.original is not None:
            self.original.to(accelerator.device)
        optimizer = torch.optim.AdamW(parameters, lr=schedule.rate, betas=BETAS, eps=EPSILON, weight_decay=0.0)
        self.prepared, wrapped = accelerator.prepare(self.model, optimizer)
        state = self.keeper.take_up(self.trained, optimizer)
        if state.scaler and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state.scaler)
        order = Order(schedule, len(self.windows))
        self.model.train()
        with Patience() as patience:
            while state.done < schedule.steps:
                started = time.monotonic()
                for group in optimizer.param_groups:
                    group["lr"] = schedule.rate_at(state.done)
                loss = self._gradients(order.of(state.done), state.done)
                self._step(wrapped, loss, state)
                seconds = time.monotonic() - started
                state.losses.append(loss)
                state.done, state.seconds = state.done + 1, state.seconds + seconds
                tell(state, seconds)
                stopped = self._any(patience.asked)
                if stopped or state.done % self.every == 0 or state.done == schedule.steps:
                    self._keep(state, optimizer)
                if stopped:
                    patience.answer()
        self.model.eval()
        return state

    def _gradients(self, numbers: torch.Tensor, step: int) -> float:
        """The loss of a step over all processes; the gradients are with the parameters."""
        accelerator = self.accelerator
        own = numbers.chunk(accelerator.num_processes)[accelerator.process_index]
        batches = own.split(self.schedule.batch)
        total = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(batches):
            torch.manual_seed(self.schedule.draws("model", step, number, accelerator.process_index))
            windows = self.windows[batch].to(accelerator.device)
            with _last(accelerator, self.prepared, number == len(batches) - 1):
                loss = self._loss(windows) * (len(batch) / len(own))
                accelerator.backward(loss)
            total += loss.detach()
        if accelerator.num_processes > 1:
            total = accelerator.reduce(total, "mean")
        return float(total)

    def _loss(self, windows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = self.original is not None and self.schedule.distill > 0
            original = self.original(input_ids=windows, use_cache=False).logits if wanted and self.original else None
        logits = self.prepared(input_ids=windows, use_cache=False).logits
        return loss_of(logits, original, windows, self.schedule.distill)

    def _step(self, optimizer: Any, loss: float, state: State) -> None:
        """Change the parameters by their gradients, which are forgotten; what is zero stays so."""
        accelerator = self.accelerator
        if not math.isfinite(loss):
            raise self._diverged("loss", loss, state.done)
        self.masks.apply({name: p.grad for name, p in self.trained.items() if p.grad is not None})
        norm = float(accelerator.clip_grad_norm_(list(self.trained.values()), LARGEST_NORM))
        if not math.isfinite(norm) and accelerator.scaler is None:
            raise self._diverged("gradient's norm", norm, state.done)
        optimizer.step()
        optimizer.zero_grad()
        state.updates += not accelerator.optimizer_step_was_skipped
        self.masks.apply(self.trained)

    def _diverged(self, what: str, value: float, step: int) -> QuantkitError:
        return QuantkitError(
            f"the {what} is {value} in step {step + 1} of {self.schedule.steps}, at a learning rate of "
            f"{self.schedule.rate_at(step):.3g}: the training diverged; give a smaller --lr, with --restart"
        )

    def _keep(self, state: State, optimizer: torch.optim.Optimizer) -> None:
        if self.accelerator.scaler is not None:
            state.scaler = dict(self.accelerator.scaler.state_dict())
        if self.accelerator.is_main_process:
            self.keeper.keep(state, self.trained, optimizer)
        self.accelerator.wait_for_everyone()

    def _any(self, asked: bool) -> bool:
        """Whether a signal came to any of the processes."""
        if self.accelerator.num_processes == 1:
            return asked
        flag = torch.tensor(float(asked), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)


def _last(accelerator: Any, model: nn.Module, last: bool) -> Any:
    """A context in which gradients are gathered among processes only for the last batch of a step."""
    from contextlib import nullcontext

    return nullcontext() if last else accelerator.no_sync(model)


def curve(losses: list[float], points: int = 20) -> Iterator[tuple[int, float]]:
    """So many points of the losses of all steps: after how many steps, and the mean of those since the one before."""
    count = min(points, len(losses))
    for number in range(count):
        first, last = number * len(losses) // count, (number + 1) * len(losses) // count
        yield last, math.fsum(losses[first:last]) / (last - first)
