"""What a user says of a recovery, found right or refused before any work: settings, model, device, text."""

import math
from pathlib import Path
from typing import Any

import torch
from quantkit_eval.data import windows as windows_of

from quantkit import formats
from quantkit.checkpoint import Hub, Source, compressed_as, open_folder
from quantkit.devices import pick_device
from quantkit.errors import DataError, QuantkitError, RecipeError
from quantkit.methods.recover import count_of
from quantkit.pairing import Pair, check_vocabulary, window_length
from quantkit.recipe import Step
from quantkit.recovery.training import Schedule
from quantkit.texts import Texts, tokenize

BATCH_TOKENS = 2048
"""Windows that go through the model at once hold this many tokens, unless `batch_size` says otherwise."""


def step_of(**values: float | str) -> Step:
    """The step of a recipe that says these settings.

    Raises:
        RecipeError: a value isn't one.
    """
    return Step("recover", {name: str(value) for name, value in values.items()})


def open_float(model: str | Path, hub: Hub) -> Source:
    """The source of a float model, which may say something of its activations.

    Raises:
        CheckpointError: it can't be read.
        QuantkitError: its weights are compressed.
    """
    source = open_folder(model, hub, lambda found: (found.weights, found.config))
    method = compressed_as(source.config)
    stored = source.config.get("quantization_config")
    if method is not None and (stored is None or formats.of_config(stored, source.name).parse(stored).groups):
        raise QuantkitError(
            f"{source.name} is compressed (quant_method {method!r}), and only float weights can be trained; recover "
            "what the transform made, before it is quantized (-m sparse24 -m recover -m w8a8), or `quantkit convert "
            "--to dense` first"
        )
    return source


def place_of_training(device: str, precision: str) -> torch.device:
    """The kind of device; which GPU of several a process takes is accelerate's to say."""
    place = pick_device(device)
    if place.index is not None:
        raise QuantkitError(f"--device {device} names one GPU; give cuda, and CUDA_VISIBLE_DEVICES={place.index}")
    if precision == "fp16" and place.type == "cpu":
        raise QuantkitError("--mixed-precision fp16 takes a GPU, as its loss scaling does; give bf16 or no")
    return place


def training_windows(source: Source, texts: Texts, tokenizer: Any, tokens: int, seq_len: int | None) -> torch.Tensor:
    """Windows [W, T] to train on, of as many tokens as are asked for or the text has.

    Raises:
        DataError: it has less than one window, or tokens that the model doesn't know.
    """
    length = window_length(Pair(source.skeleton, source.name, None, ""), seq_len)
    ids = tokenize(texts, tokenizer, limit=tokens + length).ids
    if ids.numel() < length:
        raise DataError(
            f"{texts.name} has {ids.numel():,} tokens, less than one window of seq_len {length}: give more text or "
            "choose a smaller --seq-len"
        )
    cut = windows_of(ids, length, max(length, tokens // length * length))
    check_vocabulary(source.skeleton, source.name, int(cut.max()))
    return cut


def schedule_of(step: Step, seq_len: int, batch_size: int | None, seed: int) -> Schedule:
    """How a step of a recipe is carried out.

    Raises:
        RecipeError: there are fewer tokens than one step has.
    """
    values = step.parameters
    tokens, windows = count_of(values["tokens"]), max(1, count_of(values["batch"]) // seq_len)
    steps = tokens // (windows * seq_len)
    if not steps:
        raise RecipeError(
            f"{tokens:,} tokens are less than one step of {windows} windows of {seq_len} tokens; give more --tokens, "
            "or a smaller --batch-tokens"
        )
    if batch_size is not None and batch_size < 1:
        raise RecipeError(f"--batch-size {batch_size} is no number of windows; give 1 or more")
    return Schedule(
        steps=steps,
        windows=windows,
        seq_len=seq_len,
        rate=float(values["lr"]),
        warmup=math.ceil(float(values["warmup"]) * steps),
        distill=float(values["distill"]),
        batch=min(windows, batch_size or max(1, BATCH_TOKENS // seq_len)),
        seed=seed,
    )
