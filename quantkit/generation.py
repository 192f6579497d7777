"""complete(): text after a prompt, for a quick look at a checkpoint."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import Hub, load_tokenizer
from quantkit.errors import CheckpointError, DataError, QuantkitError
from quantkit.loading import load
from quantkit.pairing import context_length
from quantkit.skipping import counted
from quantkit.skipping.reusing import check_run, reusing

log = logging.getLogger("quantkit")

# Below it, logits over the temperature leave float16 and the softmax is the likeliest token anyway.
LEAST_TEMPERATURE = 1e-3


def complete(
    checkpoint: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    backend: str = "auto",
    skip_zeros: bool = False,
    reuse_neurons: int = 0,
    tell: Callable[[str], None] = log.info,
    hub: Hub | None = None,
) -> str:
    """The prompt and what the model says after it; with temperature 0 the likeliest token each time.

    Args:
        checkpoint: a folder or hub id.
        prompt: the text to go on from.
        max_new_tokens: how many tokens are added at most.
        temperature: 0 takes the likeliest token.
        seed: of the sampling.
        device: what the model runs on.
        backend: which implementation of the ops runs.
        skip_zeros: as for `load`.
        reuse_neurons: for so many tokens at a time only neurons that were active in as many before are computed, which
            changes the text (see `quantkit.skipping.reusing`); 0 never does.
        tell: is given a line on what wasn't read, where one of the two is wanted.
        hub: how the model is found.

    Raises:
        QuantkitError: max_new_tokens, temperature, seed or reuse_neurons is out of its range, or there is no neuron to
            leave out.
        CheckpointError: the model has no tokenizer.
        DataError: the prompt has no token that the tokenizer knows, or more than the model's context has room for.
    """
    _check_arguments(max_new_tokens, temperature, seed)
    if reuse_neurons:
        check_run(reuse_neurons)
    hub = hub or Hub()
    words = {**hub.download, "trust_remote_code": hub.trust_remote_code}
    tokenizer = load_tokenizer(checkpoint, **words)
    if tokenizer is None:
        raise CheckpointError(
            f"{checkpoint} has no tokenizer, so a prompt means nothing to it; copy one into its folder"
        )
    model = load(checkpoint, device=device, backend=backend, skip_zeros=skip_zeros, **words)
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if ids["input_ids"].numel() == 0:
        raise DataError(f"the prompt {prompt!r} has no token that the tokenizer of {checkpoint} knows; give another")
    _check_room(ids["input_ids"].shape[-1], max_new_tokens, context_length(model), checkpoint)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.inference_mode(), _told(model, skip_zeros, reuse_neurons, tell):
        out = model.generate(**ids, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text


@contextmanager
def _told(model: Any, skip_zeros: bool, reuse_neurons: int, tell: Callable[[str], None]) -> Iterator[None]:
    """Neurons are reused while it lasts, if they shall be; afterwards a line says what was left out."""
    with ExitStack() as stack:
        read = stack.enter_context(counted()) if skip_zeros and model.device.type == "cpu" else None
        reused = stack.enter_context(reusing(model, reuse_neurons)) if reuse_neurons else None
        yield
    if read is not None and read.rows:
        tell(f"zeros: {read.share:.1%} of the rows of {len(read.layers)} layers weren't read at decode")
    if reused is not None and reused.neurons:
        tell(f"reused neurons: {reused.share:.1%} of all, in every second run of {reuse_neurons} tokens")


def _check_arguments(max_new_tokens: int, temperature: float, seed: int) -> None:
    if max_new_tokens < 1:
        raise QuantkitError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < math.inf:  # also false for NaN
        raise QuantkitError(
            f"temperature is {temperature}: expected 0, which takes the likeliest token, or a finite number of at "
            f"least {LEAST_TEMPERATURE}"
        )
    if not 0 <= seed < 2**63:
        raise QuantkitError(f"seed is {seed}: expected 0 to 2**63 - 1")


def _check_room(prompt: int, max_new_tokens: int, context: int | None, checkpoint: str | Path) -> None:
    """Return nothing; raise DataError where prompt and new tokens together are more than the model's context."""
    if context is None or prompt + max_new_tokens <= context:
        return
    room = context - prompt
    remedy = f"choose {room} new tokens or less" if room > 0 else f"give a prompt of fewer than {context} tokens"
    raise DataError(
        f"the prompt has {prompt} tokens and max_new_tokens is {max_new_tokens}, {prompt + max_new_tokens} together, "
        f"and {checkpoint} reads at most {context}: {remedy}"
    )
