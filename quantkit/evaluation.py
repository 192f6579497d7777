"""evaluate(): what a model's predictions are worth, and what they lost against a baseline.

Model and baseline read the same tokens batch by batch, side by side: logits are compared and forgotten, so the text
may be as long as it likes. The protocol is that of the papers: the text as one stream of tokens, windows that don't
overlap, every token of a window but the first predicted from those before it.
"""

import inspect
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from quantkit_eval.compare import Comparison
from quantkit_eval.data import windows
from quantkit_eval.perplexity import Perplexity, bits_per_byte, token_nll, window_nll
from quantkit_eval.tasks import (
    LastWord,
    Passage,
    UnscorablePassageError,
    continuation_rows,
    encode_passage,
    padded,
)

from quantkit.checkpoint import Hub, read_config
from quantkit.errors import CheckpointError, DataError, QuantkitError
from quantkit.identity import files_of
from quantkit.interruption import Interruptible, Statistic
from quantkit.memory import peak_memory_bytes
from quantkit.pairing import (
    Model,
    Pair,
    backend_in_use,
    baseline_hub,
    check_vocabulary,
    folder_of,
    loaded,
    name_of,
    position_errors,
    require_tokenizer,
    tokenizer_for,
    window_length,
)
from quantkit.progress import track
from quantkit.ranks import current, together
from quantkit.served import calls_of, counting, rows
from quantkit.texts import Texts, Tokens, encode, read, tokenize
from quantkit.version import __version__

# Windows or passages of a batch, unless batch_size says otherwise, hold this many tokens (one window at least).
DEFAULT_BATCH_TOKENS = 2048

LOSSY_KL = 0.1
"""Mean KL divergence, in nats a token, above which a comparison has a warning. On text as the baseline writes it a
model's perplexity is exp(KL) times the baseline's: 10.5 % higher here. Weights in 8 bits stay far below (README.md has
0.0003 to 0.02), those in 4 bits lie around it, and 2:4 pruning passes it by far."""


@together
def evaluate(
    model: str | Path | Model,
    dataset: str | Path | Texts | None = None,
    baseline: str | Path | Model | None = None,
    *,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    tasks: Sequence[str] | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    backend: str = "auto",
    device: str = "auto",
    batch_size: int | None = None,
    data_dir: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    restart: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """The numbers that `quantkit eval --json` prints, by name.

    Args:
        model: a folder, a hub id, or a transformers model in memory (which stays on its device).
        dataset: a SPEC, or texts that were read already; None where there are tasks alone.
        baseline: the float model to compare with, given like `model`.
        seq_len: tokens of a window; by default the smaller of 2048 and the models' context.
        max_tokens: read only so many tokens from the start.
        tasks: names of lm-eval's tasks, which are run as well; it must be installed.
        include_path: a folder with further tasks for lm-eval.
        num_fewshot: examples in the prompts of the tasks; by default what each task says.
        limit: only so many samples of each task.
        backend: auto, triton or torch: what compressed layers run on.
        device: auto, cpu, cuda or cuda:N.
        batch_size: windows (or passages) that go through the model at once; by default some 2048 tokens of them.
        data_dir: where known data sets lie, as DIR/<name>/.
        revision: the model's branch, tag or commit on the hub (the baseline's is its default branch).
        token: access token for the hub.
        cache_dir: the hub's cache.
        trust_remote_code: let a model's folder run its own Python code.
        tokenizer: used instead of the model's.
        restart: begin anew, whatever the same evaluation had done when it was stopped.
        progress: say on stderr how far it is.

    A model in memory whose `name_or_path` is a folder has its tokenizer there. `tokens` counts predictions: seq_len - 1
    a window, or a passage's continuation. Of passages, `truncated_passages` counts those that were cut on the left,
    `split_passages` those whose context and continuation had to be encoded apart, and `skipped_passages` those without
    a token to read or to predict, or with more to predict than the model reads. Raises QuantkitError's children, one
    sentence each, for what can't be evaluated: see the tests for the list.
    """
    started, ranks = time.monotonic(), current()
    progress = progress and ranks.is_first
    _check_arguments(seq_len, max_tokens, batch_size)
    if dataset is None and tasks is None:
        raise DataError(
            "there is nothing to evaluate on: give a dataset (--dataset SPEC), or tasks of lm-eval (--tasks)"
        )
    harness = None if tasks is None else _harness(tasks, include_path, num_fewshot, limit)
    hub = Hub(revision, token, cache_dir, trust_remote_code)
    texts = dataset
    if not (texts is None or isinstance(texts, Texts)):
        texts = read(texts, data_dir=data_dir, token=token, cache_dir=cache_dir)
    if texts is not None:
        _refuse_calibration_data(model, hub, texts)
    for asked in (texts, Texts(", ".join(tasks or ()), "text", "") if tasks else None):
        if tokenizer is None and asked is not None and asked.kind != "tokens":
            tokenizer = tokenizer_for(model, baseline, hub, asked)
    tokens = tokenize(texts, tokenizer) if texts is not None and texts.kind != "passages" else None
    measured: dict[str, Any] = {}
    with loaded(model, baseline, hub, device, backend) as pair, counting(pair.model, pair.baseline) as counters:
        if texts is not None:
            length = window_length(pair, seq_len)
            with torch.inference_mode(), _memory_errors(batch_size, length), position_errors(pair.name, length):
                known = _fingerprint(model, baseline, hub, texts, (length, max_tokens, batch_size, device, backend))
                run = _Run(pair, length, max_tokens, batch_size, known, restart, progress)
                measured = _last_word(run, texts, tokenizer) if tokens is None else _perplexity(run, tokens, texts.name)
        if harness is not None:
            for key, each in (("tasks", pair.model), ("baseline_tasks", pair.baseline)):
                if each is not None:  # lm-eval would share its requests in a way of its own: the first rank runs them
                    ran = harness.run(each, tokenizer, batch_size, progress) if ranks.is_first else None
                    measured[key] = ranks.told(ran)
        used = backend_in_use(pair.model)
        calls = [sum(each, Counter[Any]()) for each in zip(*ranks.gather(counters), strict=True)]
        served = {"served": rows(calls=calls[0])}
        served |= {} if pair.baseline is None else {"baseline_served": rows(calls=calls[1])}
    head = {"model": pair.name} | ({} if texts is None else {"dataset": texts.name})
    cost = {"seconds": time.monotonic() - started, "peak_memory_bytes": peak_memory_bytes(), "backend": used, **served}
    if not ranks.is_alone:
        own = {"seconds": cost["seconds"], "waited": ranks.waited, "peak_memory_bytes": cost["peak_memory_bytes"]}
        cost["ranks"] = ranks.gather(own)
    common = ("protocol", "tokens", "perplexity", "perplexity_stderr", "bits_per_byte")
    result = head | {key: measured.pop(key) for key in common if key in measured} | cost | measured
    for key, value in result.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(
                f"{key} of {pair.name} on {head.get('dataset')} is {value}: the model's predictions are beyond all "
                "measure, compress it more gently or check its weights"
            )
    return result


def _harness(tasks: Sequence[str], include_path: str | Path | None, num_fewshot: int | None, limit: int | None) -> Any:
    """Lm-eval's tasks, which are looked up now; a QuantkitError where it isn't installed."""
    from quantkit.lm_eval import Tasks

    return Tasks(tasks, include_path, num_fewshot, limit)


def check_text(
    texts: Texts,
    tokenizer: Any,
    model: Model,
    name: str,
    seq_len: int | None = None,
    max_tokens: int | None = None,
) -> None:
    """Raises what `evaluate` would raise for these texts, without running the model.

    Only the model's config is looked at, so that a model without weights serves as well: a long job can find out at
    once that its result could not be evaluated.
    """
    _check_arguments(seq_len, max_tokens, None)
    require_tokenizer(texts, tokenizer, name)
    length = window_length(Pair(model, name, None, ""), seq_len)
    if texts.kind == "passages":
        largest = max(max(passage.tokens) for passage in _passages(texts, tokenizer, length, max_tokens)[0])
    else:
        largest = int(_windows(tokenize(texts, tokenizer).ids, texts.name, length, max_tokens).max())
    check_vocabulary(model, name, largest)


# The two protocols


@dataclass(frozen=True)
class _Run:
    """What both protocols are given: the models, how much they read at a time, and what the evaluation is known by."""

    pair: Pair
    seq_len: int
    max_tokens: int | None
    batch_size: int | None
    fingerprint: dict[str, Any] | None
    restart: bool
    progress: bool


def _fingerprint(
    model: str | Path | Model, baseline: str | Path | Model | None, hub: Hub, texts: Texts, settings: tuple[Any, ...]
) -> dict[str, Any] | None:
    """What an evaluation is known by when it is taken up again; None where a model lies in memory."""
    folders = {}
    for what, each in (("model", model), ("baseline", baseline)):
        if each is not None:
            folder = (
                None
                if isinstance(each, torch.nn.Module)
                else folder_of(each, hub if what == "model" else baseline_hub(hub))
            )
            if folder is None:
                return None
            folders[what] = {"config": read_config(folder), "files": files_of(folder)}
    versions = {package: version(package) for package in ("torch", "transformers")}
    return folders | versions | {"quantkit": __version__, "texts": texts.fingerprint, "settings": settings}


def _perplexity(run: _Run, tokens: Tokens, name: str) -> dict[str, Any]:
    """Perplexity over windows, with what a comparison adds."""
    pair, seq_len = run.pair, run.seq_len
    cut = _windows(tokens.ids, name, seq_len, run.max_tokens)
    check_vocabulary(pair.model, pair.name, int(cut.max()))
    ours, theirs, comparison = Perplexity(), Perplexity(), Comparison()
    batches = current().share(torch.split(cut, run.batch_size or max(1, DEFAULT_BATCH_TOKENS // seq_len)))
    statistics: dict[str, Statistic] = {"model": ours, "baseline": theirs, "comparison": comparison}
    with Interruptible(run.fingerprint, statistics, restart=run.restart, ranks=current().place_of) as kept:
        for batch in track(kept.left(batches), "perplexity", unit="batch", disable=not run.progress):
            logits = _logits(pair.model, batch)
            ours.update(_finite(window_nll(logits, batch), pair.name))
            if pair.baseline is not None:
                base = _logits(pair.baseline, batch)
                theirs.update(_finite(window_nll(base, batch), pair.baseline_name))
                for base_tv, logits_tv, window in zip(base, logits, batch, strict=True):
                    comparison.update(base_tv[:-1], logits_tv[:-1], window[1:])
            kept.done()
        merge(statistics)
    result = ours.result()
    bits = None
    if tokens.utf8_bytes is not None:
        bits = bits_per_byte(result.mean_nll, tokens.ids.numel(), tokens.utf8_bytes)
    measured: dict[str, Any] = {
        "protocol": f"{len(cut)} windows of {seq_len} tokens that don't overlap",
        "tokens": result.tokens,
        "perplexity": result.perplexity,
        "perplexity_stderr": result.stderr,
        "bits_per_byte": bits,
    }
    if kept.before:  # seconds and served calls are those of the batches after
        measured["resumed_after_batches"] = kept.before
    if pair.baseline is not None:
        base_result = theirs.result()
        measured |= {
            "baseline_perplexity": base_result.perplexity,
            "baseline_perplexity_stderr": base_result.stderr,
            **_compared(comparison),
        }
    return measured


def _last_word(run: _Run, texts: Texts, tokenizer: Any) -> dict[str, Any]:
    """Last-word accuracy over passages, with what a comparison adds (over the continuations' tokens)."""
    pair = run.pair
    passages, skipped = _passages(texts, tokenizer, run.seq_len, run.max_tokens)
    check_vocabulary(pair.model, pair.name, max(max(p.tokens) for p in passages))
    # Longest first: little padding, and too large a batch fails at once.
    passages.sort(key=lambda p: len(p.tokens), reverse=True)
    size = run.batch_size or max(1, DEFAULT_BATCH_TOKENS // len(passages[0].tokens))
    batches = current().share([passages[start : start + size] for start in range(0, len(passages), size)])
    ours, theirs, comparison = LastWord(), LastWord(), Comparison()
    statistics: dict[str, Statistic] = {"model": ours, "baseline": theirs, "comparison": comparison}
    with Interruptible(run.fingerprint, statistics, restart=run.restart, ranks=current().place_of) as kept:
        for batch in track(kept.left(batches), "last word", unit="batch", disable=not run.progress):
            input_ids, mask = padded(batch)
            logits = _logits(pair.model, input_ids, mask)
            _add_passages(ours, logits, batch, pair.name)
            if pair.baseline is not None:
                base = _logits(pair.baseline, input_ids, mask)
                _add_passages(theirs, base, batch, pair.baseline_name)
                for row, passage in enumerate(batch):
                    base_nv, targets = continuation_rows(base[row], passage)
                    comparison.update(base_nv, continuation_rows(logits[row], passage)[0], targets)
            kept.done()
        merge(statistics)
    result = ours.result()
    measured: dict[str, Any] = {
        "protocol": "last-word",
        "tokens": result.tokens,
        "perplexity": result.perplexity,
        "perplexity_stderr": result.perplexity_stderr,
        "bits_per_byte": None,
        "accuracy": result.accuracy,
        "accuracy_stderr": result.accuracy_stderr,
        "passages": result.passages,
        "truncated_passages": sum(p.truncated for p in passages),
        "split_passages": sum(p.split for p in passages),
        "skipped_passages": skipped,
    }
    if kept.before:  # seconds and served calls are those of the batches after
        measured["resumed_after_batches"] = kept.before
    if pair.baseline is not None:
        base_result = theirs.result()
        measured |= {
            "baseline_accuracy": base_result.accuracy,
            "baseline_accuracy_stderr": base_result.accuracy_stderr,
            "baseline_perplexity": base_result.perplexity,
            "baseline_perplexity_stderr": base_result.perplexity_stderr,
            **_compared(comparison),
        }
    return measured


def merge(statistics: Mapping[str, Statistic]) -> None:
    """Make every rank's statistics those of all ranks."""
    ranks = current()
    for rank, states in enumerate(ranks.gather({name: each.state() for name, each in statistics.items()})):
        for name, state in states.items() if rank != ranks.rank else ():
            statistics[name].merge(state)


def _add_passages(statistics: LastWord, logits: torch.Tensor, batch: list[Passage], name: str) -> None:
    for logits_tv, passage in zip(logits, batch, strict=True):
        logits_nv, targets = continuation_rows(logits_tv, passage)
        nll = _finite(token_nll(logits_nv, targets), name)
        statistics.update(nll, (logits_nv.argmax(-1) == targets).cpu())


def _compared(comparison: Comparison) -> dict[str, Any]:
    compared = comparison.result()
    return {
        "kl_mean": compared.kl_mean,
        "kl_p99": compared.kl_p99,
        "top1_agreement": compared.top1_agreement,
        "delta_p_rms": compared.delta_p_rms,
        **({"warning": lossy(compared.kl_mean)} if compared.kl_mean > LOSSY_KL else {}),
    }


def lossy(kl: float) -> str:
    """The sentence that goes with a mean KL divergence above LOSSY_KL."""
    return (
        f"a mean KL of {kl:.3g} nats is above {LOSSY_KL:g}: on text as the baseline writes it, perplexity is "
        f"{math.exp(min(kl, 700.0)):.3g} times the baseline's; compress more gently, or be sure that its use bears it"
    )


def _windows(ids: torch.Tensor, name: str, seq_len: int, max_tokens: int | None) -> torch.Tensor:
    """[W, seq_len]; too little text is the user's mistake."""
    if max_tokens is not None and max_tokens < seq_len:
        raise DataError(
            f"max_tokens is {max_tokens}, less than one window of seq_len {seq_len}: raise it or choose a smaller "
            "seq_len"
        )
    if ids.numel() < seq_len:
        raise DataError(
            f"{name} has {ids.numel():,} tokens, less than one window of seq_len {seq_len}: give more text or choose "
            "a smaller seq_len"
        )
    return windows(ids, seq_len, max_tokens)


def _passages(texts: Texts, tokenizer: Any, context: int, max_tokens: int | None) -> tuple[list[Passage], int]:
    """The passages' tokens, and how many passages can't be scored; with `max_tokens` those from the start that fit."""
    passages: list[Passage] = []
    refused: list[str] = []
    room = math.inf if max_tokens is None else max_tokens
    for number, (before, word) in enumerate(texts.passages, 1):
        try:
            passage = encode_passage(before, word, lambda text: encode(tokenizer, text), context)
        except UnscorablePassageError as error:
            refused.append(f"row {number}: {error}")
            continue
        room -= len(passage.tokens)
        if room < 0:
            break
        passages.append(passage)
    if not passages and room < 0:
        raise DataError(f"max_tokens is {max_tokens}, less than the first passage of {texts.name} has: raise it")
    if not passages:
        raise DataError(
            f"{texts.name} has no passage that can be scored ({refused[0]}): check that its text, the tokenizer and "
            "the model's context belong together"
        )
    return passages, len(refused)


def _logits(model: Model, input_ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """[B, T, V] on the model's device."""
    arguments: dict[str, Any] = {"input_ids": input_ids.to(model.device)}
    if mask is not None:
        arguments["attention_mask"] = mask.to(model.device)
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    with calls_of(model):
        logits: torch.Tensor = model(**arguments).logits
    return logits


def _finite(nll: torch.Tensor, name: str) -> torch.Tensor:
    if bool(torch.isfinite(nll).all()):
        return nll
    raise CheckpointError(
        f"{name} gives logits that are NaN or infinite: its weights or scales are damaged, or its numbers leave the "
        "range of its dtype; check it with `quantkit inspect`, or load it in another dtype"
    )


# What goes in


def _check_arguments(seq_len: int | None, max_tokens: int | None, batch_size: int | None) -> None:
    for name, value, least in (("seq_len", seq_len, 2), ("max_tokens", max_tokens, 2), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise DataError(f"{name} is {value}: expected at least {least}")


def _refuse_calibration_data(model: Any, hub: Hub, texts: Texts) -> None:
    """Refuses texts that the model's own recipe says it was calibrated with."""
    folder = folder_of(model, hub)
    path = None if folder is None else folder / "quantkit_recipe.json"
    if path is None or not path.is_file():
        return
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} isn't JSON ({error}): take it from the original again") from error
    if calibrated_with(recipe.get("dataset") if isinstance(recipe, dict) else None, texts):
        raise DataError(
            f"{texts.name} is the text that {name_of(model)} was calibrated with: evaluate it on another split or file"
        )


def calibrated_with(dataset: Any, texts: Texts) -> bool:
    """Whether these are the texts that a recipe's record of its data names."""
    return isinstance(dataset, Mapping) and dataset.get("fingerprint") == texts.fingerprint


@contextmanager
def _memory_errors(batch_size: int | None, seq_len: int) -> Iterator[None]:
    """Turns a device's lack of memory into a sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise QuantkitError(
            f"the device has too little memory for batch_size {batch_size or 'auto'} at seq_len {seq_len}: choose a "
            "smaller batch_size or seq_len, or another device"
        ) from error
