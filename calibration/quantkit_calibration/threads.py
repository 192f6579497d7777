"""A forward pass in a thread of its own that can be stopped at a block, and goes on when told to.

Control is handed over strictly: either the driver runs, or one batch's thread does.
"""

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Final

import torch


class Unset:
    """The type of UNSET, which stands for no output: None can be one."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset()


@dataclass(frozen=True, eq=False)
class Called:
    """The forward pass has come to a block, and waits."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Ended:
    """The forward pass is through."""

    result: Any


@dataclass(frozen=True, eq=False)
class _Raised:
    error: BaseException


class _Cancelled(BaseException):
    """Unwinds a forward pass; no Exception, so that a model's own `except Exception` lets it through."""


_here = threading.local()


def current_batch() -> "Batch | None":
    """The batch whose thread this is, or None in any other thread."""
    return getattr(_here, "batch", None)


class Surroundings:
    """What torch keeps for each thread, read in the thread that makes this object, to be had in another.

    Inference mode, autocast, default device, the CUDA stream (and so its device). Function and dispatch modes stay
    behind.
    """

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self._context = contextvars.copy_context()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda", "xpu", "mps")
            if torch.is_autocast_enabled(kind)
        ]
        self._device = torch.get_default_device()
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.current_stream() if in_use else None

    def variables(self) -> contextvars.Context:
        """A copy of the context variables."""
        return self._context.copy()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A context in which the rest is as it was, without gradients."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.no_grad())
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            if self._device.type != "cpu":
                stack.enter_context(self._device)
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            yield


class Batch:
    """A forward pass, `work()`, in a thread of its own: it runs while `start` or `advance` does, and only then.

    It runs on one core until it is `alone`: every thread that computes on several cores keeps helpers of its own for as
    long as it lives, cores times batches of them.
    """

    def __init__(self, number: int, work: Callable[[], Any], surroundings: Surroundings) -> None:
        self.alone = False
        self._work: Callable[[], Any] | None = work
        self._surroundings = surroundings
        self._to_model: SimpleQueue[Any] = SimpleQueue()
        self._to_driver: SimpleQueue[Called | Ended | _Raised] = SimpleQueue()
        self._cancelled = False
        self._thread = threading.Thread(
            target=surroundings.variables().run,
            args=(self._run,),
            name=f"calibration batch {number}",
            daemon=True,
        )

    def start(self) -> Called | Ended:
        """Run up to the first block or the end. Raises what the forward pass raises."""
        self._thread.start()
        event = self._next()
        if self._surroundings.threads > 1:
            torch.set_num_threads(self._surroundings.threads)  # the thread's setting is also that of threads to come
        return event

    def advance(self, output: Any) -> Called | Ended:
        """Let the block return `output`, and run up to the next block or the end. Raises what the pass raises."""
        self._to_model.put(output)
        del output
        return self._next()

    def _next(self) -> Called | Ended:
        event = self._to_driver.get()
        if isinstance(event, _Raised):
            raise event.error
        return event

    def cancel(self) -> None:
        """Make the thread end: at once where it waits for an output, else at its next block or by itself."""
        self._cancelled = True
        self._to_model.put(UNSET)

    def join(self) -> None:
        """Wait until the thread has ended."""
        if self._thread.ident is not None:
            self._thread.join()

    # In the thread

    def call(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the driver makes of a block's call."""
        if not self._cancelled:
            self._to_driver.put(Called(index, args, kwargs))
            output = self._to_model.get()
            if not self._cancelled:
                if self.alone:
                    torch.set_num_threads(self._surroundings.threads)
                return output
        raise _Cancelled

    def _run(self) -> None:
        _here.batch = self
        if self._surroundings.threads > 1:
            torch.set_num_threads(1)
            torch.get_num_threads()  # the first use in a thread takes over the setting of the process; let it be now
        try:
            with self._surroundings.entered():
                work, self._work = self._work, None
                assert work is not None
                self._to_driver.put(Ended(work()))
        except _Cancelled:
            pass
        except BaseException as error:
            self._to_driver.put(_Raised(error))


def end(batches: Sequence[Batch]) -> None:
    """Cancel all batches, one after another, and wait for their threads; a second Ctrl-C stops the waiting only."""
    try:
        for batch in batches:
            batch.cancel()
            batch.join()
    finally:
        for batch in batches:
            batch.cancel()
