"""lm-evaluation-harness on quantkit's models: `Model`, which lm-eval calls `quantkit`, and tasks for `quantkit eval`.

Importing this needs lm-eval (`pip install 'quantkit[lm-eval]'`), and registers the model with it. The arithmetic is
lm-eval's own for transformers models; what is ours is that a compressed checkpoint is loaded packed, as
`quantkit.load` does.
"""

import contextlib
import copy
import inspect
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from quantkit.checkpoint import Hub, load_tokenizer, resolve
from quantkit.errors import DataError, QuantkitError
from quantkit.loading import load
from quantkit.served import calls_of

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise QuantkitError(
        f"tasks are run by lm-eval, which cannot be imported ({error}): install it with pip install 'quantkit[lm-eval]'"
    ) from error

HARNESS = (
    "batch_size",
    "max_batch_size",
    "max_length",
    "truncation",
    "logits_cache",
    "softmax_dtype",
    "add_bos_token",
    "prefix_token_id",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
)
"""The arguments of lm-eval's transformers model that mean something for a model that is loaded already."""


@register_model("quantkit")
class Model(HFLM):  # type: ignore[misc]
    """A checkpoint for lm-eval, compressed or not, loaded as `quantkit.load` loads it.

    Args:
        pretrained: a folder, a hub id, or a transformers model in memory (which stays as it is).
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: dtype of everything that isn't compressed; `auto` for what the checkpoint says.
        backend: `auto`, `torch` or `triton`: what compressed layers run on.
        revision: branch, tag or commit on the hub.
        token: access token for the hub.
        cache_dir: the hub's cache.
        trust_remote_code: let the model's folder run its own Python code.
        tokenizer: used instead of the model's: an object, or the folder that it lies in.
        harness: arguments of lm-eval's transformers model, those in `HARNESS`.

    Raises:
        CheckpointError: the model can't be loaded.
        QuantkitError: an argument is unknown, or the model has no tokenizer.
    """

    def __init__(
        self,
        pretrained: str | Path | nn.Module,
        device: str | None = None,
        dtype: Any = "auto",
        backend: str = "auto",
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
        tokenizer: Any = None,
        **harness: Any,
    ) -> None:
        for name in harness:
            if name not in HARNESS:
                own = [each for each in inspect.signature(Model.__init__).parameters if each not in ("self", "harness")]
                raise QuantkitError(f"model argument {name!r} is unknown; use one of {', '.join((*own, *HARNESS))}")
        if isinstance(pretrained, nn.Module):
            model, home = pretrained, getattr(pretrained, "name_or_path", None)
        else:
            hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
            kind = None if dtype == "auto" else dtype
            model = load(pretrained, device or "auto", kind, backend, trust_remote_code=trust_remote_code, **hub)
            home = resolve(pretrained, Hub(revision, token, cache_dir, trust_remote_code))
        if tokenizer is None or isinstance(tokenizer, (str, Path)):
            tokenizer = _tokenizer(tokenizer or home, trust_remote_code)
        tokenizer = copy.deepcopy(tokenizer)  # lm-eval gives it a padding token
        with _quiet_about_models():
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **harness)


def _tokenizer(folder: str | Path | None, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder; a QuantkitError when there is none."""
    found = None if not folder else load_tokenizer(Path(folder), trust_remote_code=trust_remote_code)
    if found is None:
        raise QuantkitError(
            "lm-eval's tasks are text and the model has no tokenizer: put the tokenizer's files in its folder, or pass "
            "tokenizer="
        )
    return found


@contextlib.contextmanager
def _quiet_about_models() -> Iterator[None]:
    """Keep lm-eval from warning that the model which it is given is loaded already."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class Tasks:
    """Tasks of lm-eval that are known to exist, ready to run.

    Args:
        names: names of tasks or groups of tasks.
        include_path: a folder with further tasks (.yaml files), which go before those of lm-eval.
        num_fewshot: examples in the prompt, for tasks that don't fix it; None for what each task says.
        limit: only so many samples of each task, from the start.

    Raises:
        DataError: a task is unknown, or the folder isn't one.
    """

    def __init__(
        self,
        names: Sequence[str],
        include_path: str | Path | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
    ) -> None:
        if not names or not all(names):
            raise DataError(f"tasks is {','.join(names)!r}: expected names of lm-eval's tasks, as in arc_easy,piqa")
        if include_path is not None and not Path(include_path).is_dir():
            raise DataError(f"include_path {str(include_path)!r} is not a folder; give the one that holds the tasks")
        for name, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1)):
            if value is not None and value < least:
                raise DataError(f"{name} is {value}: expected at least {least}")
        self.names, self.num_fewshot, self.limit = list(names), num_fewshot, limit
        self._manager = _manager(self.names, None if include_path is None else str(include_path))

    def run(
        self, model: nn.Module, tokenizer: Any, batch_size: int | None, progress: bool
    ) -> dict[str, dict[str, Any]]:
        """The results by task (and by group, where lm-eval adds groups up), with lm-eval's own names of metrics.

        A metric's name is followed by that of its filter, unless that is `none`; `samples`, `shots` and `version` say
        what was run.

        Raises:
            DataError: a task's data can't be loaded.
        """
        with _quiet(progress), calls_of(model):
            try:
                self._manager.load(self.names)
            except Exception as error:  # whatever a task's file, or its data set's, does
                reason = " ".join(str(error).split()) or repr(error)
                raise DataError(f"lm-eval cannot load the tasks {', '.join(self.names)}: {reason}") from error
            found = simple_evaluate(
                model=Model(model, tokenizer=tokenizer, batch_size=batch_size or 8),
                tasks=self.names,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                log_samples=False,
                task_manager=self._manager,
            )
        return _tidied(found)


def _manager(names: Sequence[str], include_path: str | None) -> Any:
    """A TaskManager that knows these tasks; lm-eval's own, thousands of files, are looked through only if needed."""
    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(own.match_tasks([name]) for name in names):
            return own
    manager = TaskManager(include_path=include_path)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise DataError(
            f"lm-eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them, and --include-path DIR adds your own"
        )
    return manager


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """What lm-eval prints goes to stderr, as progress does; or nowhere, without progress."""
    with contextlib.ExitStack() as stack:
        place = sys.stderr if progress else stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(place))
        if not progress:
            stack.enter_context(contextlib.redirect_stderr(place))
        yield


def _tidied(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Lm-eval's results as plain JSON values by task."""
    made: dict[str, dict[str, Any]] = {}
    for name, metrics in found["results"].items():
        row: dict[str, Any] = {}
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if kind and not isinstance(value, str):  # lm-eval says "N/A" where there is no number
                row[metric if kind == "none" else key] = value if math.isfinite(value) else None
        counts = found.get("n-samples", {}).get(name)
        if counts is not None:
            row["samples"] = counts["effective"]
        for key, said in (("shots", "n-shot"), ("version", "versions")):
            if name in found.get(said, {}):
                row[key] = found[said][name]
        made[name] = row
    return made


def main() -> None:
    """Lm-eval's own command line, which knows `--model quantkit`; a user's mistake is one sentence."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except QuantkitError as error:
        sys.stderr.write(f"Error: {error}\n")
        raise SystemExit(1) from None
