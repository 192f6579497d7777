"""benchmark(): how fast a model runs and what memory it takes, beside the float model in the same run.

Every model lies in a process of its own, so that its peak memory is its own, and the runs take turns: model, baseline,
model, baseline. What the machine does meanwhile meets all of them, and ratios say more than figures.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from quantkit_kernels.backends import BACKENDS
from quantkit_kernels.errors import KernelError
from torch import nn

from quantkit import attention as attentions
from quantkit import errors
from quantkit.checkpoint import Hub, read_config, resolve
from quantkit.errors import CheckpointError, DataError, QuantkitError
from quantkit.loading import DTYPES
from quantkit.measuring import CACHES, Subject, Task, request_line
from quantkit.pairing import Model, name_of, place_of, refuse_elsewhere, refuse_other_backend
from quantkit.progress import Steps
from quantkit.shards import ShardReader
from quantkit.version import __version__

CPU_BASELINES = ("float32", "bfloat16")
"""What a float model is measured in on a CPU: which one is faster depends on the processor and on the work."""
PACKAGES = ("torch", "transformers")


def benchmark(
    model: str | Path | Model,
    baseline: str | Path | Model | None = None,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batch: int = 1,
    runs: int = 5,
    dtype: str | None = None,
    baseline_dtype: str | None = None,
    cache: str = "auto",
    backend: str = "auto",
    keep_decoded: bool | None = None,
    attention: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """The numbers that `quantkit bench --json` prints, by name.

    Args:
        model: a folder, a hub id, or a transformers model in memory (which stays on its device; its process is this
            one, so that its peak memory is not known).
        baseline: the float model to compare with, given like `model`; by default the folder that the checkpoint's
            report says it was made from, if it is there.
        prompt_tokens: tokens of a prompt: the prefill is one forward pass over them.
        new_tokens: steps after the prompt, one token each; 0 measures the prefill alone.
        batch: prompts at once.
        runs: how often each model is measured; they take turns.
        dtype: dtype of what isn't compressed in the model, by default what the checkpoint says.
        baseline_dtype: dtype of the baseline; by default float32 and bfloat16 on a CPU, bfloat16 on a GPU.
        cache: auto, dynamic or static: the key-value cache. auto is static, and compiled, on a GPU where transformers
            offers that for the model.
        backend: auto, triton or torch: what compressed layers run on.
        keep_decoded: on a CPU, keep weights that would be decoded at every call as they are decoded (`quantkit.load`);
            the memory that this takes is in the figures.
        attention: auto or transformers: what computes the model's attention on a CPU (`quantkit.load`). The baseline's
            is always transformers', so that it is the float model as it runs without quantkit.
        device: auto, cpu, cuda or cuda:N.
        threads: threads of a CPU, by default what torch chooses.
        seed: seed of the prompts' token ids.
        revision: the model's branch, tag or commit on the hub (the baseline's is its default branch).
        token: access token for the hub.
        cache_dir: the hub's cache.
        trust_remote_code: let a model's folder run its own Python code.
        progress: say on stderr how far it is.

    Times are medians over the runs with the smallest and largest; a ratio is of medians, against the baseline that is
    the best at just that. Raises QuantkitError's children, one sentence each, for what can't be measured.
    """
    numbers = {"prompt_tokens": prompt_tokens, "batch": batch, "runs": runs, "threads": threads}
    words = {"cache": cache, "backend": backend, "attention": attention}
    _check_arguments(numbers, new_tokens, seed, {"dtype": dtype, "baseline_dtype": baseline_dtype}, words)
    if keep_decoded and isinstance(model, nn.Module):
        raise QuantkitError(
            "keep_decoded is for models that are loaded: call quantkit.modules.keep_decoded(model) before"
        )
    hub = Hub(revision, token, cache_dir, trust_remote_code)
    place = place_of(model, baseline, device)
    in_memory = [given for given in (model, baseline) if isinstance(given, nn.Module)]
    refuse_elsewhere(in_memory, torch.device(place), f"what is compared is to be on {place}")
    refuse_other_backend(in_memory, backend)
    folder = _folder(model, hub)
    notes: list[str] = []
    if baseline is None:
        baseline, said = _recorded_baseline(folder)
        notes.append(said)
    given = [(model, "model", folder, dtype)]
    if baseline is not None:
        base_folder = _folder(baseline, Hub(None, token, cache_dir, trust_remote_code))
        given += [
            (baseline, "baseline", base_folder, each) for each in _baseline_dtypes(baseline, baseline_dtype, place)
        ]
    _refuse_too_little_memory([(where, each) for _, _, where, each in given if where is not None], place)
    common = (cache, prompt_tokens, new_tokens, batch, seed, threads, trust_remote_code)
    with ExitStack() as stack:
        contenders = []
        steps = stack.enter_context(Steps("benchmark", len(given) * (runs + 1), "run", disable=not progress))
        for source, role, where, each in given:
            kept, used = (keep_decoded, attention) if role == "model" else (None, "transformers")
            path = "" if where is None else str(where)
            task = Task(name_of(source), path, each, place, backend, kept, *common, used)
            contenders.append(stack.enter_context(_contender(source, role, task, hub)))
            steps.advance()
        _check_vocabularies(contenders)
        for _ in range(runs):
            for contender in contenders:
                contender.run()
                steps.advance()
        measured = [contender.measured() for contender in contenders]
    return {
        "model": name_of(model),
        "baseline": None if baseline is None else name_of(baseline),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        "runs": runs,
        "seed": seed,
        "models": measured,
        "ratios": ratios(measured),
        "machine": {**_machine(), "device": contenders[0].facts["device"], "threads": contenders[0].facts["threads"]},
        "versions": _versions(),
        "notes": notes,
    }


def ratios(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many times as fast, and how many times smaller, the first model is than the baseline that is best at that.

    Empty without a baseline. `against` is that baseline's dtype. `min` and `max` of a time's ratio are those of single
    runs, each beside the baseline's run of the same turn.
    """
    ours, theirs = measured[0], measured[1:]
    found: dict[str, Any] = {}
    for key in ("prefill", "decode") if theirs else ():
        rate = f"{key}_tokens_per_second"
        if ours[rate] is None:
            continue
        best = max(theirs, key=lambda each: each[rate]["median"])
        single = [one / other for one, other in zip(ours[rate]["runs"], best[rate]["runs"], strict=True)]
        ratio = ours[rate]["median"] / best[rate]["median"]
        found[key] = {"ratio": ratio, "min": min(single), "max": max(single), "against": best["dtype"]}
    for key in ("weight_bytes", "peak_memory_bytes") if theirs else ():
        if any(each[key] is None for each in measured):
            continue
        best = min(theirs, key=lambda each: each[key])
        found[key] = {"ratio": best[key] / ours[key], "against": best["dtype"]}
    return found


# One model that takes part


class _Process:
    """A model in a process of its own, which answers requests."""

    def __init__(self, task: Task) -> None:
        self.task = task
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        if task.threads is not None:
            environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(task.threads))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "quantkit.measuring"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )

    def ask(self, request: Task | str) -> dict[str, Any]:
        """The answer to a request; a mistake that was found there is raised here."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(request_line(request))
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = KernelError if answer["error"] == "KernelError" else getattr(errors, answer["error"], QuantkitError)
            raise kind(answer["message"])
        return answer

    def _ended(self) -> Exception:
        """What to raise when the process is gone: killed, or ended by a bug, whose traceback it has written."""
        status = self.process.wait()
        if status < 0:
            return QuantkitError(
                f"the process that measured {self.task.name} was ended by signal {-status}, most likely for want of "
                "memory: choose a smaller prompt, or one baseline_dtype"
            )
        return RuntimeError(f"the process that measured {self.task.name} ended with status {status}")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


class _Here:
    """A model in memory, measured in this process."""

    def __init__(self, model: Model, task: Task) -> None:
        self.model, self.task, self.was_training = model, task, model.training
        self.threads = torch.get_num_threads()

    def ask(self, request: Task | str) -> dict[str, Any]:
        """The answer to a request."""
        if isinstance(request, Task):
            if self.task.threads is not None:
                torch.set_num_threads(self.task.threads)
            self.subject = Subject(self.model.eval(), self.task)
            return {**self.subject.warm_up(), "peak_before_loading": None}
        if request == "run":
            return dict(self.subject.run())
        return {"peak": None}

    def close(self) -> None:
        """Give the model its mode back, and torch its threads."""
        self.model.train(self.was_training)
        torch.set_num_threads(self.threads)


class _Contender:
    """A model of the comparison: its facts, and its runs so far."""

    def __init__(self, role: str, task: Task, where: _Process | _Here) -> None:
        self.role, self.task, self.where = role, task, where
        self.facts = where.ask(task)
        self.seconds: dict[str, list[float]] = {"prefill": [], "decode": []}

    def run(self) -> None:
        """Measure once more."""
        for key, seconds in self.where.ask("run").items():
            if seconds is not None:
                self.seconds[key].append(seconds)

    def measured(self) -> dict[str, Any]:
        """What was found."""
        task, facts = self.task, self.facts
        kept = ("dtype", "attention", "cache", "served", "weight_bytes")
        return {
            "role": self.role,
            "name": task.name,
            **{key: facts[key] for key in kept},
            "peak_memory_bytes": self.where.ask("peak")["peak"],
            "peak_before_loading_bytes": facts["peak_before_loading"],
            "prefill_tokens_per_second": _spread(task.batch * task.prompt_tokens, self.seconds["prefill"]),
            "decode_tokens_per_second": _spread(task.batch * task.new_tokens, self.seconds["decode"]),
        }


@contextmanager
def _contender(source: Any, role: str, task: Task, hub: Hub) -> Iterator[_Contender]:
    """A model, loaded and warm, until the end of the comparison."""
    where = _Here(source, task) if isinstance(source, nn.Module) else _Process(task)
    try:
        yield _Contender(role, task, where)
    finally:
        where.close()


def _spread(tokens: int, seconds: Sequence[float]) -> dict[str, Any] | None:
    """Tokens a second: median, least and most, and every run; None where nothing was measured."""
    if not seconds:
        return None
    rates = [tokens / each for each in seconds]
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates), "runs": rates}


# What goes in


def _check_arguments(
    numbers: dict[str, int | None],
    new_tokens: int,
    seed: int,
    dtypes: dict[str, str | None],
    words: dict[str, str],
) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise QuantkitError(f"{name} is {value}: expected at least 1")
    if new_tokens < 0:
        raise QuantkitError(f"new_tokens is {new_tokens}: expected at least 0, which measures the prefill alone")
    if not 0 <= seed < 2**63:
        raise QuantkitError(f"seed is {seed}: expected 0 to 2**63 - 1")
    for name, dtype in dtypes.items():
        if dtype is not None and dtype not in DTYPES:
            raise QuantkitError(f"{name} is {dtype!r}: expected one of {', '.join(DTYPES)}")
    known = {"cache": CACHES, "backend": BACKENDS, "attention": attentions.CHOICES}
    for name, word in words.items():
        if word not in known[name]:
            raise QuantkitError(f"{name} is {word!r}: expected one of {', '.join(known[name])}")


def _folder(model: Any, hub: Hub) -> Path | None:
    """Where a model's files lie, or None for a model in memory; what isn't there is found out before all the work."""
    if isinstance(model, nn.Module):
        return None
    folder = resolve(model, hub)
    read_config(folder)
    return folder


def _recorded_baseline(folder: Path | None) -> tuple[Path | None, str]:
    """The folder that the checkpoint's report says it was made from, if it is there, and a sentence on it."""
    without = "no baseline, so the figures are absolute"
    path = None if folder is None else folder / "quantkit_report.json"
    if folder is None or path is None or not path.is_file():
        return None, f"{without}: give the float model with --baseline for ratios"
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["model"]
        found = Path(str(named)).expanduser()
        is_there = (found / "config.json").is_file() and not found.samefile(folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}): give the float model with --baseline") from error
    if not is_there:
        return None, f"{without}: the report names {named}, which is no folder here; give it with --baseline"
    ours, theirs = read_config(folder), read_config(found)
    if "quantization_config" in theirs or any(ours.get(key) != theirs.get(key) for key in ("model_type", "vocab_size")):
        return None, f"{without}: the report names {named}, which is now another model; give yours with --baseline"
    return found, f"baseline {named}, which the checkpoint's report names"


def _baseline_dtypes(baseline: Any, dtype: str | None, place: str) -> tuple[str | None, ...]:
    """The dtypes to measure the baseline in."""
    if isinstance(baseline, nn.Module):
        return (None,)
    if dtype is not None:
        return (dtype,)
    return CPU_BASELINES if place == "cpu" else ("bfloat16",)


def _refuse_too_little_memory(models: Sequence[tuple[Path, str | None]], place: str) -> None:
    """Return nothing; raise QuantkitError where the weights alone are more than the memory that is free."""
    free = _available_bytes()
    if place != "cpu" or free is None:
        return
    needed = 0
    for folder, dtype in models:
        for tensor in ShardReader(folder).tensors.values():
            size = tensor.dtype.itemsize
            if dtype is not None and tensor.dtype.is_floating_point and size > 1:
                size = DTYPES[dtype].itemsize
            needed += tensor.nbytes // tensor.dtype.itemsize * size
    if needed > free:
        raise QuantkitError(
            f"the models take {needed / 2**30:.1f} GiB together and {free / 2**30:.1f} GiB are free: choose one "
            "baseline_dtype, or measure without a baseline where more memory is"
        )


def _available_bytes() -> int | None:
    """Bytes that can be taken without swapping, or None where the kernel doesn't say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _check_vocabularies(contenders: Sequence[_Contender]) -> None:
    first = contenders[0]
    for other in contenders[1:]:
        if other.facts["vocabulary"] != first.facts["vocabulary"]:
            raise DataError(
                f"{first.task.name} has a vocabulary of {first.facts['vocabulary']} and {other.task.name} one of "
                f"{other.facts['vocabulary']}: give the baseline that the model was made from"
            )


def _machine() -> dict[str, Any]:
    """The processor's name and its number of cores."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {"processor": name, "cores": os.cpu_count()}


def _versions() -> dict[str, str]:
    """The versions of what runs."""
    return {
        "quantkit": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }
