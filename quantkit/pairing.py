"""A model and perhaps its baseline, loaded, checked against one another, and ready to read the same tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quantkit_kernels.backends import BACKENDS

from quantkit.checkpoint import Hub, load_tokenizer, resolve
from quantkit.devices import pick_device
from quantkit.errors import DataError, QuantkitError
from quantkit.experts import quantized_experts
from quantkit.loading import load
from quantkit.modules import QuantizedLinear
from quantkit.texts import Texts

# A transformers model: transformers itself is imported where checkpoints are read and nowhere else.
Model = Any

DEFAULT_SEQ_LEN = 2048
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")


@dataclass(frozen=True)
class Pair:
    """The models of one evaluation, ready to run, and what the user called them."""

    model: Model
    name: str
    baseline: Model | None
    baseline_name: str


def context_length(model: Model) -> int | None:
    """The most tokens the model was made to read at once, or None where its config names no such number."""
    config = model.config.get_text_config()
    for key in CONTEXT_KEYS:
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def window_length(pair: Pair, seq_len: int | None) -> int:
    """seq_len, or the smaller of 2048 and the models' context; more than the context is refused."""
    limit = DEFAULT_SEQ_LEN if seq_len is None else seq_len
    for model, name in ((pair.model, pair.name), (pair.baseline, pair.baseline_name)):
        context = None if model is None else context_length(model)
        if context is not None and context < limit:
            if seq_len is not None:
                raise DataError(
                    f"seq_len is {seq_len} and {name} reads at most {context} tokens: choose {context} or less"
                )
            limit = context
    return limit


@contextmanager
def position_errors(name: str, seq_len: int) -> Iterator[None]:
    """Turns the IndexError of a model that has no place for so many tokens, and doesn't say so, into a sentence."""
    try:
        yield
    except IndexError as error:
        if "index out of range" not in str(error):
            raise
        raise DataError(
            f"{name} cannot read {seq_len} tokens at once ({error}), which its config doesn't say: choose a smaller "
            "seq_len"
        ) from error


def check_vocabulary(model: Model, name: str, largest: int) -> None:
    """Return nothing; raise DataError when the largest token id is none of the model."""
    size = vocabulary(model)
    if size is not None and largest >= size:
        raise DataError(
            f"the data set has the token id {largest} and {name} a vocabulary of {size}: use the tokenizer that "
            "belongs to the model"
        )


def vocabulary(model: Model) -> int | None:
    """The size of the vocabulary, or None where the config doesn't say."""
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def _is_path(model: Any) -> bool:
    return isinstance(model, (str, Path))


def name_of(model: Any) -> str:
    """What the user called the model."""
    if _is_path(model):
        return str(model)
    return getattr(model, "name_or_path", None) or type(model).__name__


def folder_of(model: Any, hub: Hub) -> Path | None:
    """Where the model's files lie, or None for a model in memory that came from no folder."""
    if _is_path(model):
        return resolve(model, hub)
    path = getattr(model, "name_or_path", None)
    return Path(path) if path and Path(path).is_dir() else None


def tokenizer_for(model: Any, baseline: Any, hub: Hub, texts: Texts) -> Any:
    """The model's tokenizer; refuses a baseline whose tokenizer has another vocabulary."""
    tokenizer = tokenizer_of(model, hub)
    require_tokenizer(texts, tokenizer, name_of(model))
    other = None if baseline is None else tokenizer_of(baseline, baseline_hub(hub))
    if other is not None and other.get_vocab() != tokenizer.get_vocab():
        raise DataError(
            f"the tokenizers of {name_of(model)} and {name_of(baseline)} have different vocabularies: give the "
            "baseline that the model was made from"
        )
    return tokenizer


def require_tokenizer(texts: Texts, tokenizer: Any, name: str) -> None:
    """Return nothing; raise DataError when there is text to read and no tokenizer."""
    if tokenizer is None and texts.kind != "tokens":
        raise DataError(
            f"{texts.name} is text and {name} has no tokenizer: put the tokenizer's files in its folder, pass "
            "tokenizer=, or give rows of input_ids"
        )


def tokenizer_of(model: Any, hub: Hub) -> Any:
    """The tokenizer in the model's folder (of a model in memory: the folder it came from), or None without one."""
    folder = folder_of(model, hub)
    if folder is None:
        return None
    return load_tokenizer(folder, trust_remote_code=hub.trust_remote_code)


def baseline_hub(hub: Hub) -> Hub:
    """The hub's arguments for a baseline: a revision belongs to the model."""
    return Hub(None, hub.token, hub.cache_dir, hub.trust_remote_code)


@contextmanager
def loaded(model: Any, baseline: Any, hub: Hub, device: str, backend: str) -> Iterator[Pair]:
    """Both models, in eval mode; what was in memory before gets its mode back afterwards."""
    for given in (model, baseline):
        if given is not None and not _is_path(given) and not isinstance(given, torch.nn.Module):
            raise QuantkitError(f"{given!r} is no model: give a folder, a hub id or a transformers model")
    refuse_other_backend([given for given in (model, baseline) if isinstance(given, torch.nn.Module)], backend)
    place = place_of(model, baseline, device)
    ours = _load(model, hub, place, backend)
    theirs = None if baseline is None else _load(baseline, baseline_hub(hub), place, backend)
    pair = Pair(ours, name_of(model), theirs, "" if baseline is None else name_of(baseline))
    if theirs is not None and vocabulary(ours) != vocabulary(theirs):
        raise DataError(
            f"{pair.name} has a vocabulary of {vocabulary(ours)} and {pair.baseline_name} one of "
            f"{vocabulary(theirs)}: give the baseline that the model was made from"
        )
    training = [m for m in (ours, theirs) if m is not None and m.training]
    for each in training:
        each.eval()
    try:
        yield pair
    finally:
        for each in training:
            each.train()


def place_of(model: Any, baseline: Any, device: str) -> str:
    """Where what is loaded goes: to `device`; with auto, to where a model in memory already is."""
    in_memory = [given for given in (model, baseline) if isinstance(given, torch.nn.Module)]
    if device == "auto" and in_memory:
        return str(in_memory[0].device)
    place = pick_device(device)
    refuse_elsewhere(in_memory, place, f"device is {device}")
    return str(place)


def refuse_elsewhere(models: Sequence[Any], place: torch.device, said: str) -> None:
    """Return nothing; raise QuantkitError, which begins with what was said, for a model that isn't at the place."""
    current = torch.cuda.current_device() if place.type == "cuda" else 0
    for given in models:
        if not same_place(place, torch.device(str(given.device)), current):
            raise QuantkitError(f"{said} and {name_of(given)} is on {given.device}: move it or say device auto")


def refuse_other_backend(models: Sequence[Any], backend: str) -> None:
    """Return nothing; raise QuantkitError for a backend that is unknown, or not the one that a model was loaded with.

    With `auto` each model in memory keeps its own.
    """
    if backend not in BACKENDS:
        raise QuantkitError(f"backend is {backend!r}: expected one of {', '.join(BACKENDS)}")
    for given in models if backend != "auto" else ():
        layers = [module for module in given.modules() if isinstance(module, QuantizedLinear)]
        for packed in (*layers, *(experts for _, experts in quantized_experts(given))):
            if packed.backend != backend:
                raise QuantkitError(
                    f"backend is {backend!r} and {name_of(given)} in memory was loaded with {packed.backend!r}: load "
                    f"it with backend={backend!r}, or say auto"
                )


def same_place(one: torch.device, other: torch.device, current: int) -> bool:
    """Whether both are one device, where a GPU without an index is the current one."""

    def index(device: torch.device) -> int:
        return device.index if device.index is not None else current if device.type == "cuda" else 0

    return (one.type, index(one)) == (other.type, index(other))


def _load(model: Any, hub: Hub, place: str, backend: str) -> Model:
    if not _is_path(model):
        return model
    return load(
        model,
        device=place,
        backend=backend,
        revision=hub.revision,
        token=hub.token,
        cache_dir=hub.cache_dir,
        trust_remote_code=hub.trust_remote_code,
    )


def backend_in_use(model: Model) -> str:
    """What the model's compressed layers run on; torch where it has none."""
    named = {layer.backend_in_use for layer in model.modules() if isinstance(layer, QuantizedLinear)}
    return "+".join(sorted(named)) or "torch"
