"""One model, loaded, timed and weighed. `python -m quantkit.measuring` does so in a process of its own.

In a process of its own a model's peak memory is its own, and several models that take turns don't share a cache of the
allocator. That process reads one JSON object a line, the task and then a word for each thing to do, and answers each
with one JSON object.
"""

import contextlib
import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from quantkit_kernels.backends import counted
from quantkit_kernels.errors import KernelError
from torch import nn

from quantkit.checkpoint import quiet_transformers
from quantkit.errors import CheckpointError, DataError, QuantkitError
from quantkit.experts import quantized_experts
from quantkit.loading import load
from quantkit.memory import peak_memory_bytes
from quantkit.modules import Decoded
from quantkit.pairing import Model, context_length, vocabulary
from quantkit.served import Calls, rows

CACHES = ("auto", "dynamic", "static")


@dataclass(frozen=True)
class Task:
    """What to measure, and how.

    Attributes:
        name: what the user called the model.
        folder: where its files lie; empty for a model in memory.
        dtype: dtype of what isn't compressed, or None for what the checkpoint says.
        device: `cpu`, `cuda` or `cuda:N`.
        backend: `auto`, `triton` or `torch`.
        keep_decoded: on a CPU, keep weights as they are decoded.
        cache: `auto`, `dynamic` or `static`: the key-value cache of decoding.
        prompt_tokens: tokens of a prompt.
        new_tokens: steps after it; 0 measures none.
        batch: prompts at once.
        seed: seed of the prompts' tokens.
        threads: threads of a product on a CPU, or None for torch's own choice.
        trust_remote_code: let the model's folder run its own Python code.
        attention: `auto` or `transformers`, as `load` takes it.
    """

    name: str
    folder: str
    dtype: str | None
    device: str
    backend: str
    keep_decoded: bool | None
    cache: str
    prompt_tokens: int
    new_tokens: int
    batch: int
    seed: int
    threads: int | None
    trust_remote_code: bool
    attention: str = "auto"


class Subject:
    """A model that is measured.

    Args:
        model: a transformers model, in eval mode.
        task: what to measure.
        clock: what tells the seconds on a CPU.

    Raises:
        DataError: the model's context is too short.
        QuantkitError: it can't generate, or has no static cache and one is asked for.
    """

    def __init__(self, model: Model, task: Task, clock: Callable[[], float] = time.perf_counter) -> None:
        self.model, self.task, self.clock = model, task, clock
        _check_context(model, task)
        if task.new_tokens and not hasattr(model, "generate"):
            raise QuantkitError(f"{task.name} cannot generate: measure the prefill alone, with new_tokens 0")
        self.cache = _cache_of(model, task)
        self.device = torch.device(str(model.device))
        self.ids = prompt_ids(model, task).to(self.device)

    def warm_up(self) -> dict[str, Any]:
        """What the model is and which kernels serve it, after one run whose time doesn't count."""
        with _errors(self.task), torch.inference_mode():
            prefill = self._calls(0)
            steps = self._calls(1) - prefill if self.task.new_tokens else Calls()
            self.run()
        return {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "vocabulary": vocabulary(self.model),
            "device": _device_name(self.device),
            "attention": getattr(self.model.config, "_attn_implementation", None),
            "cache": self.cache,
            "served": rows(calls_prefill=prefill, calls_step=steps),
            "weight_bytes": weight_bytes(self.model),
            "threads": torch.get_num_threads(),
        }

    def run(self) -> dict[str, float | None]:
        """Seconds of one forward pass over the prompts, and of the steps after them together."""
        with _errors(self.task), torch.inference_mode():
            started = self._now()
            out = _forward(self.model, self.ids)
            prefill = self._between(started, self._now())
            del out
            return {"prefill": prefill, "decode": self._decode() if self.task.new_tokens else None}

    def peak(self) -> int | None:
        """The most memory in bytes: that of the GPU's tensors, or on a CPU that of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_memory_bytes()

    def _decode(self) -> float:
        """Seconds of the steps after the first new token, which belongs to the prompt's own pass."""
        stamps: list[Any] = []
        self._generate(self.task.new_tokens, stamps, cache_implementation="static" if self.cache == "static" else None)
        if len(stamps) <= self.task.new_tokens:
            raise QuantkitError(
                f"{self.task.name} stops after {len(stamps)} of {self.task.new_tokens + 1} tokens: choose fewer "
                "new_tokens"
            )
        return self._between(stamps[0], stamps[self.task.new_tokens])

    def _generate(self, steps: int, stamps: list[Any], **words: Any) -> None:
        """The likeliest tokens, one after the prompt's pass and one a step; the time after each goes to `stamps`."""

        def after_a_token(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            stamps.append(self._now())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=steps + 1,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[after_a_token],
            **words,
        )

    def _calls(self, steps: int) -> Calls:
        """How many calls of each op, on each backend, the prompt's pass and these steps make."""
        with counted() as calls:
            if steps:
                self._generate(steps, [], disable_compile=True)
            else:
                _forward(self.model, self.ids)
        return calls

    def _now(self) -> Any:
        """The time; on a GPU an event in its stream, so that nothing waits for it."""
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, started: Any, ended: Any) -> float:
        """The seconds between two times."""
        if self.device.type != "cuda":
            return float(ended - started)
        torch.cuda.synchronize(self.device)
        return float(started.elapsed_time(ended)) / 1000


def prompt_ids(model: Model, task: Task) -> torch.Tensor:
    """Random token ids [batch, prompt_tokens] that the seed tells, none of them one that the config gives a meaning.

    A token that stands for an image, say, wants the image as well.
    """
    size = vocabulary(model)
    if size is None:
        raise CheckpointError(f"the config of {task.name} doesn't say vocab_size, so no prompt can be made up")
    special: set[int] = set()
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        for key, value in config.to_dict().items():
            if key.endswith(("_token_id", "_token_index", "_token_ids")):
                special |= {each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)}
    plain = torch.tensor([token for token in range(size) if token not in special] or [0])
    generator = torch.Generator().manual_seed(task.seed)
    return plain[torch.randint(len(plain), (task.batch, task.prompt_tokens), generator=generator)]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that the model's modules hold: parameters, buffers, plain attributes; shared ones once."""
    held: dict[tuple[str, int], int] = {}
    for module in model.modules():
        for tensor in _tensors([module._parameters, module._buffers, module.__dict__]):
            if tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                held[str(tensor.device), storage.data_ptr()] = storage.nbytes()
            elif tensor.is_mkldnn:  # which has no storage that torch knows
                held["mkldnn", id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(held.values())


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among values, and in lists, tuples and dicts among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Decoded):
            yield from (value.weight, value.scale)
        elif isinstance(value, dict):
            yield from _tensors(list(value.values()))
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _forward(model: Model, ids: torch.Tensor) -> Any:
    """What the model says after the prompts, with its cache, as generation begins: logits of the last token alone."""
    known = inspect.signature(model.forward).parameters
    words = {"use_cache": True, "logits_to_keep": 1}
    return model(input_ids=ids, **{name: value for name, value in words.items() if name in known})


def _check_context(model: Model, task: Task) -> None:
    """Return nothing; raise DataError where prompt and new tokens are more than the model's context."""
    context, needed = context_length(model), task.prompt_tokens + task.new_tokens
    if context is not None and needed > context:
        raise DataError(
            f"prompt_tokens is {task.prompt_tokens} and new_tokens is {task.new_tokens}, {needed} together, and "
            f"{task.name} reads at most {context}: choose fewer"
        )


def _cache_of(model: Model, task: Task) -> str:
    """`static` where it is asked for or, on a GPU, where transformers compiles the model with one; else `dynamic`."""
    offered = bool(getattr(model, "_can_compile_fullgraph", False)) and next(quantized_experts(model), None) is None
    if task.cache == "static" and not offered:
        raise QuantkitError(
            f"cache is static and {task.name} has none that transformers can compile the model with: use dynamic"
        )
    wanted = task.cache == "static" or (task.cache == "auto" and torch.device(str(model.device)).type == "cuda")
    return "static" if wanted and offered else "dynamic"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@contextlib.contextmanager
def _errors(task: Task) -> Iterator[None]:
    """Turns a lack of memory, or of positions that the config doesn't tell of, into a sentence."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise QuantkitError(
            f"there is too little memory for {task.name} with batch {task.batch} and {task.prompt_tokens} tokens of "
            "prompt: choose fewer"
        ) from error
    except IndexError as error:
        if "index out of range" not in str(error):
            raise
        raise DataError(
            f"{task.name} cannot read {task.prompt_tokens + task.new_tokens} tokens ({error}), which its config "
            "doesn't say: choose a smaller prompt_tokens or new_tokens"
        ) from error


# The process of its own


def _loaded(task: Task) -> Subject:
    """The model of a task's folder, ready to be measured."""
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    with _errors(task):
        model = load(
            Path(task.folder),
            device=task.device,
            dtype=task.dtype,
            backend=task.backend,
            keep_decoded=task.keep_decoded,
            attention=task.attention,
            trust_remote_code=task.trust_remote_code,
        )
    return Subject(model, task)


def _answers(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """An answer to each line: what was asked for, or the user's mistake that was found. Others are raised."""
    subject: Subject | None = None
    for line in lines:
        try:
            request = json.loads(line)
            if subject is None:
                before = peak_memory_bytes()
                subject = _loaded(Task(**request))
                yield {**subject.warm_up(), "peak_before_loading": before}
            elif request == "run":
                yield dict(subject.run())
            else:
                yield {"peak": subject.peak()}
        except (QuantkitError, KernelError) as error:
            yield {"error": type(error).__name__, "message": str(error)}


def request_line(request: Task | str) -> str:
    """What the process reads for a request."""
    return json.dumps(asdict(request) if isinstance(request, Task) else request) + "\n"


def _answer_stream() -> TextIO:
    """Where answers go: stdout as it was. What else is printed, by a model's own code say, goes to stderr."""
    kept = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return kept


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks decides when to end
    stream = _answer_stream()
    quiet_transformers()
    for answer in _answers(sys.stdin):
        stream.write(json.dumps(answer) + "\n")
        stream.flush()
