"""What of a model is trained, what of it stays zero, and the memory that takes."""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint import Source, output_head
from quantkit.errors import QuantkitError, RecipeError
from quantkit.footprint import MARGIN, RUNTIME
from quantkit.linears import linear_modules
from quantkit.memory import resident_memory_bytes
from quantkit.recovery import adapters
from quantkit.recovery.zeros import Masks

FLOAT = 4
"""Bytes of a number in float32."""
LOGITS, LOGITS_DISTILLED = 5, 10
"""Tensors as large as a batch's logits that are there at once: logits, their logarithms, gradients of both."""
PROBE = 64
"""Tokens that the memory of activations is measured with."""


@dataclass
class Trainable:
    """A model that is ready to be trained.

    Attributes:
        model: the model, or peft's wrapper of it.
        trained: the parameters that change, by the names that `model` has for them.
        masks: what stays zero of them, by the same names.
        zeros: what stays zero of the model's weights, by the model's own names.
        layers: how many linear layers LoRA is on.
        notes: what a reader should know.
    """

    model: Any
    trained: dict[str, nn.Parameter]
    masks: Masks
    zeros: Masks
    layers: int
    notes: list[str]

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.trained.values())


def trainable(model: nn.Module, what: str, rank: int, pruned: Collection[str], seed: int) -> Trainable:
    """The model with what is trained of it; all else is frozen.

    Args:
        model: in float32.
        what: `all` parameters, or those of `linear` layers (experts that lie in one parameter included).
        rank: of LoRA, or 0 for none.
        pruned: names of layers that are known to be pruned.
        seed: of LoRA's first values.

    Raises:
        QuantkitError: nothing would be trained, or peft isn't installed.
    """
    linears = {f"{name}.{leaf}" for name, module, *_ in linear_modules(model) for leaf in module._parameters}
    turned = {f"{name}.weight" for name, _, _, _, transposed in linear_modules(model) if transposed}
    zeros = Masks.of(model, pruned, turned)
    model.requires_grad_(False)
    if rank:
        wrapped, names = adapters.add_lora(model, rank, zeros, seed, output_head(model))
        trained = {name: each for name, each in wrapped.named_parameters() if each.requires_grad}
        stacked = sorted(name for name, each in model.named_parameters() if each.ndim > 2 and "lora_" not in name)
        notes = [f"LoRA leaves {len(stacked)} stacked weights as they are, {stacked[0]} first"] if stacked else []
        return Trainable(wrapped, trained, Masks(), zeros, len(names), notes)
    trained = {}
    for name, parameter in model.named_parameters():
        stacked_experts = parameter.ndim == 3
        if parameter.is_floating_point() and (what == "all" or name in linears or stacked_experts):
            parameter.requires_grad_(True)
            trained[name] = parameter
    if not trained:
        raise QuantkitError("the model has no linear layer to train; use train=all")
    masks = Masks({name: each for name, each in zeros.zeros.items() if name in trained}, zeros.patterns)
    return Trainable(model, trained, masks, zeros, 0, [])


@dataclass(frozen=True)
class Memory:
    """What a training takes of the memory that it runs in, in bytes.

    Attributes:
        parts: by what they are for.
        now: what the process holds already; 0 on a GPU.
    """

    parts: dict[str, int]
    now: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.now + sum(self.parts.values())

    def line(self) -> str:
        """One line."""
        parts = ", ".join(f"{what} {_megabytes(size)}" for what, size in self.parts.items() if size)
        return f"takes about {_megabytes(self.total)} of memory: {parts}, {_megabytes(self.now)} in use now"

    def refuse_above(self, limit: int | None) -> None:
        """Return nothing; raise RecipeError when it is more than the limit."""
        if limit is not None and MARGIN * self.total > limit:
            parts = ", ".join(f"{what} {size:,}" for what, size in self.parts.items() if size)
            raise RecipeError(
                f"--max-memory {limit:,} bytes is too little: training takes at least about "
                f"{int(MARGIN * self.total):,} ({parts}); give more, a smaller --batch-size, "
                "--gradient-checkpointing, or --lora, which trains less"
            )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def memory_of_weights(source: Source, original_bytes: int, lora: bool, on_cpu: bool) -> Memory:
    """What weights, gradients and the optimizer take, before anything is loaded.

    With LoRA what is trained is small and isn't counted here.
    """
    count = sum(parameter.numel() for parameter in source.skeleton.parameters())
    parts = {"weights": FLOAT * count, "the original": original_bytes}
    if not lora:
        parts |= {"gradients": FLOAT * count, "AdamW": 2 * FLOAT * count}
    return Memory(parts, (resident_memory_bytes() or 0) + RUNTIME if on_cpu else 0)


def memory_of_training(ready: Trainable, original_bytes: int, activations: int, on_cpu: bool, now: int) -> Memory:
    """What all of it takes, once the model is loaded."""
    weights = sum(parameter.nbytes for parameter in ready.model.parameters())
    parts = {
        "weights": weights,
        "the original": original_bytes,
        "gradients": FLOAT * ready.count,
        "AdamW": 2 * FLOAT * ready.count,
        "masks": sum(zeros.numel() for zeros in ready.zeros.zeros.values()),
        "activations": activations,
    }
    return Memory(parts, now if on_cpu else 0)


def activation_bytes(
    model: nn.Module, seq_len: int, batch: int, vocabulary: int, blocks: int | None, *, distilled: bool
) -> int:
    """About what a batch's forward pass keeps for its backward pass, and its logits, in bytes.

    The bytes that a pass over a few tokens keeps are counted, and taken times the tokens of a batch: attention that
    keeps every pair of tokens keeps more.

    Args:
        model: on the CPU, in float32.
        seq_len: tokens of a window.
        batch: windows of a batch.
        vocabulary: logits of a token.
        blocks: how many blocks there are, of which one at a time is kept with gradient checkpointing; None without it.
        distilled: whether the original's logits are there too.
    """
    tokens = min(PROBE, seq_len)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    each = sum(kept.values()) / tokens
    if blocks:
        each *= 2 / blocks  # of one block, and what goes into each
    logits = FLOAT * vocabulary * (LOGITS_DISTILLED if distilled else LOGITS)
    return int(seq_len * batch * (each + logits))


@contextmanager
def told_memory(device: torch.device) -> Iterator[None]:
    """Turns a lack of memory into a sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise QuantkitError(
            f"{device} has too little memory for this training: give a smaller --batch-size, --gradient-checkpointing, "
            "--mixed-precision bf16, or --lora; what was kept of it stays, and these change its bits: add --restart"
        ) from error


def say(line: str) -> None:
    """Write a line to stderr."""
    print(f"quantkit: {line}", file=sys.stderr, flush=True)  # noqa: T201
