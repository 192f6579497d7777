"""Which kernel served how many calls of a model's packed weights, while it is evaluated.

The ops count themselves where they run (`quantkit_kernels.backends.counted`), so nothing is hooked into the model, and
a compiled one is counted like any other.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from quantkit_kernels.backends import Call, counted
from torch import nn

Calls = Counter[Call]
_open: ContextVar[dict[int, Calls] | None] = ContextVar("open counters by model", default=None)


@contextmanager
def counting(*models: nn.Module | None) -> Iterator[list[Calls]]:
    """A counter a model, in the models' order, for what runs inside `calls_of`; a model that comes twice has one.

    A counter of None stays empty.
    """
    found: dict[int, Calls] = {}
    counters = [found.setdefault(id(model), Counter()) for model in models]
    before = _open.set(found)
    try:
        yield counters
    finally:
        _open.reset(before)


def calls_of(model: nn.Module) -> AbstractContextManager[Any]:
    """A context whose calls of ops are the model's, where `counting` counts them."""
    calls = (_open.get() or {}).get(id(model))
    return nullcontext() if calls is None else counted(calls)


def rows(**counted: Calls) -> list[dict[str, Any]]:
    """What was counted, for JSON, in alphabetic order: op, dtype of the codes (int32 where packed), backend, and the
    calls in each counter under its name."""
    calls = sorted({call for each in counted.values() for call in each}, key=lambda call: tuple(map(str, call)))
    return [
        {"op": call.op, "dtype": str(call.dtype).removeprefix("torch."), "backend": call.backend}
        | {name: each[call] for name, each in counted.items()}
        for call in calls
    ]
