"""Block by block through a model, driven by the model's own forward pass.

What a block is called with (masks, rotary embeddings, arguments that differ from layer to layer) only the model knows.
So each batch's `model(**kwargs)` runs in a thread of its own, in which every block's `forward` hands its arguments to
the driver and waits. The driver gathers all batches at a block, lets `visit` work on it, hands the outputs back and
goes on to the next. Only one thread runs at a time: the threads are there to be stopped in the middle, not for speed.

In memory at once: what the batches' forward passes hold between two blocks, which is the inputs of one block (hidden
states, masks, embeddings of positions), and the outputs of `visit`. With a `Spill` these wait on disk, and only one
batch's are in memory.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantkit_calibration.spilling import Parcel, Spill
from quantkit_calibration.threads import UNSET, Batch, Called, Ended, Surroundings, current_batch, end


class OrderError(RuntimeError):
    """The batches don't call the blocks in one order, each as often as expected."""


@dataclass(eq=False)
class Call:
    """One batch's call of a block: what it is called with, and in `output` what it is to return.

    The objects are the model's own, untouched: a block's tensor or tuple, hidden states by position or by keyword.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = UNSET
    spill: Spill | None = None
    parcel: Parcel | None = None

    def away(self) -> None:
        """Put the arguments on disk, where that is wanted."""
        if self.spill is not None and self.parcel is not None:
            self.spill.away(self.parcel)

    def back(self) -> None:
        """Have the arguments in memory."""
        if self.spill is not None and self.parcel is not None:
            self.spill.back(self.parcel)

    def drop(self) -> None:
        """Let go of everything, so that whoever keeps the call keeps nothing else."""
        self.args, self.kwargs, self.output = (), {}, UNSET
        if self.spill is not None and self.parcel is not None:
            self.parcel = self.spill.rest(self.parcel)


@dataclass(frozen=True, eq=False)
class Calls:
    """All batches' calls of one block, in the order of the batches; they are empty once the outputs are handed back.

    Where arguments wait on disk, a call's are in memory while it is iterated over, or from when it is asked for by its
    number. `number` is how often these batches have called the block before: 0, but for models that loop or share
    weights. `last` says that nothing runs after this visit, so that outputs are not needed.
    """

    batches: tuple[Call, ...]
    number: int
    last: bool

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Call]:
        return self.after(0)

    def after(self, first: int) -> Iterator[Call]:
        """The calls from that number on."""
        for call in self.batches[first:]:
            call.back()
            yield call
            call.away()

    def __getitem__(self, batch: int) -> Call:
        self.batches[batch].back()
        return self.batches[batch]


Visit = Callable[[int, Calls], Callable[..., Any] | None]


def run_blocks(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[dict[str, Any]],
    visit: Visit,
    *,
    order: Sequence[int] | None = None,
    finish: Callable[[int, Any], None] | None = None,
    spill: Spill | None = None,
) -> None:
    """Return nothing; `visit(i, calls)` is called for each block, in the order in which the model calls them.

    `visit` runs in the caller's thread, with every block's own `forward` in place: it may call, copy and change
    `blocks[i]`. It sets `calls[j].output` for each batch j, or returns a callable (`blocks[i]` itself will do): that is
    then called with the arguments of each batch whose output isn't set, and its output handed back before the next is
    made, so that inputs and outputs of all batches are never there together. Forward hooks of a block run twice:
    around the model's call of it, and where `visit` calls it.

    Args:
        model: called as `model(**kwargs)` for each of `batches`, without gradients. Put it into eval mode, or layer
            drop will be an OrderError; give `use_cache=False`, or every run of a block fills the cache again.
        blocks: modules of the model, none of them twice.
        batches: keyword arguments of the model, a dict a batch. Each batch is a thread, so let it hold several
            windows. What lies outside of the blocks (embeddings, masks) runs in it on one core.
        visit: see above.
        order: the indices of all calls of blocks one after another, for a model that calls one more than once
            (`block_order` finds it); None: each block once, in whatever order. Nothing runs after the last call.
        finish: let the rest of the model (norm, output layer) run as well, one batch after another, and call
            `finish(batch, result)` with what the model returns.
        spill: where the arguments of waiting calls are put; None keeps them in memory.

    Raises:
        OrderError: a batch calls another block than the one expected, ends before all are called or (seen only with
            `finish`) calls one after that.
        ValueError: no block, no batch, a block twice, an order without one of the blocks; an output that isn't set.

    Whatever the model or `visit` raises comes out as it is. In every case the threads have ended and the blocks have
    their own `forward` again.
    """
    schedule = _Schedule(len(blocks), order)
    _check(blocks, batches)
    surroundings = Surroundings()
    running = [Batch(j, functools.partial(model, **kwargs), surroundings) for j, kwargs in enumerate(batches)]
    interception = _Interception(blocks)
    try:
        interception.install()
        kept = [_Kept(spill) for _ in running]
        called = [kept[j].waiting(schedule.accept(j, batch.start())) for j, batch in enumerate(running)]
        while True:
            last = schedule.is_last and finish is None
            calls = Calls(tuple(called), schedule.times, last)
            called.clear()
            with interception.away():
                run = visit(schedule.index, calls)
            if last:
                break
            if schedule.is_last and finish is not None:
                _finish(calls, run, running, kept, finish)
                break
            schedule.advance()
            for j, batch in enumerate(running):
                output = _output(calls, j, run)
                kept[j].back(calls.batches[j])
                event = batch.advance(output)
                del output
                called.append(kept[j].waiting(schedule.accept(j, event)))
            del calls, run  # nothing of this visit lives on but what was handed back
    finally:
        try:
            end(running)
        finally:
            interception.remove()


def block_order(model: nn.Module, blocks: Sequence[nn.Module], kwargs: dict[str, Any]) -> list[int]:
    """The indices of the blocks in the order in which `model(**kwargs)` calls them, as often as it does."""
    order: list[int] = []
    handles = [
        block.register_forward_pre_hook(functools.partial(_note, order, index)) for index, block in enumerate(blocks)
    ]
    try:
        with torch.no_grad():
            model(**kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return order


def _note(order: list[int], index: int, *_: Any) -> None:
    order.append(index)


def _check(blocks: Sequence[nn.Module], batches: Sequence[dict[str, Any]]) -> None:
    if not blocks or not batches:
        raise ValueError(f"{len(blocks)} blocks and {len(batches)} batches: expected at least one of each")
    first: dict[int, int] = {}
    for index, block in enumerate(blocks):
        if first.setdefault(id(block), index) != index:
            raise ValueError(f"block {index} is the same module as block {first[id(block)]}: give each module once")


class _Kept:
    """What a batch's forward pass holds on to of the arguments of earlier calls, on disk as these are."""

    def __init__(self, spill: Spill | None) -> None:
        self._spill = spill
        self._parcels: list[Parcel] = []

    def back(self, call: Call) -> None:
        """Have it in memory, with what is left of a call that was just answered."""
        if self._spill is None:
            return
        self._parcels += [] if call.parcel is None else [call.parcel]
        for parcel in self._parcels:
            self._spill.back(parcel)

    def waiting(self, event: Called) -> Call:
        """A call as it waits for the others; all of its batch is put on disk."""
        if self._spill is None:
            return Call(event.args, event.kwargs)
        parcel = self._spill.put((event.args, event.kwargs), own=self._parcels)
        self._parcels = [rest for rest in map(self._spill.rest, self._parcels) if rest.waiting]
        for rest in self._parcels:
            self._spill.away(rest)
        return Call(event.args, event.kwargs, spill=self._spill, parcel=parcel)


def _output(calls: Calls, batch: int, run: Callable[..., Any] | None) -> Any:
    """What a batch's call returns: the output that is set, or else that of `run`. The call is empty afterwards."""
    call = calls[batch]
    output = call.output
    if output is UNSET:
        if run is None:
            raise ValueError(f"visit set no output for batch {batch} and returned nothing to make it with")
        output = run(*call.args, **call.kwargs)
    call.drop()
    return output


def _finish(
    calls: Calls,
    run: Callable[..., Any] | None,
    running: Sequence[Batch],
    kept: Sequence[_Kept],
    finish: Callable[[int, Any], None],
) -> None:
    """Run the rest of the model, one batch after another, on all cores."""
    for j, batch in enumerate(running):
        batch.alone = True
        output = _output(calls, j, run)
        kept[j].back(calls.batches[j])
        event = batch.advance(output)
        del output
        if isinstance(event, Called):
            raise OrderError(f"batch {j} calls block {event.index} after the last call that was expected")
        batch.join()
        finish(j, event.result)
        del event


class _Schedule:
    """Which block is to be called next, by all batches."""

    def __init__(self, blocks: int, order: Sequence[int] | None) -> None:
        if order is not None and set(order) != set(range(blocks)):
            raise ValueError(f"order has the blocks {sorted(set(order))}: expected each of 0 to {blocks - 1}")
        self._order = order
        self._steps = blocks if order is None else len(order)
        self._step = 0
        self._times = [0] * blocks
        self._index = None if order is None else order[0]

    @property
    def index(self) -> int:
        """The block that the batches are at."""
        assert self._index is not None
        return self._index

    @property
    def times(self) -> int:
        """How often that block was called before."""
        return self._times[self.index]

    @property
    def is_last(self) -> bool:
        """Whether no other call is expected."""
        return self._step + 1 == self._steps

    def advance(self) -> None:
        """Expect the next call."""
        self._times[self.index] += 1
        self._step += 1
        self._index = None if self._order is None else self._order[self._step]

    def accept(self, batch: int, event: Called | Ended) -> Called:
        """The call, if it is the one that is expected."""
        if isinstance(event, Ended):
            missing = [i for i, times in enumerate(self._times) if not times] if self._order is None else [self.index]
            raise OrderError(
                f"batch {batch} ended after {self._step} calls of blocks without calling block {missing[0]}: expected "
                f"{self._steps} calls, so no layer drop and no early exit"
            )
        if self._index is None:
            if self._times[event.index]:
                raise OrderError(
                    f"batch {batch} calls block {event.index} again before all blocks were called: the model loops or "
                    "shares weights; say in which order with order="
                )
            self._index = event.index
        if event.index != self._index:
            before = "where" if self._order is None else "where, as order says,"
            raise OrderError(
                f"batch {batch} calls block {event.index} {before} block {self._index} was expected: all batches must "
                "call the blocks in one order"
            )
        return event


class _Interception:
    """Stands in the place of the blocks' `forward`, and takes itself away."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._own: list[Any] = []

    def install(self) -> None:
        """Make every block hand over its calls, where they come from a batch's thread."""
        for index, block in enumerate(self._blocks):
            # A module can have a `forward` of its own beside its class's, as accelerate's hooks give it.
            self._own.append(block.__dict__.get("forward", UNSET))
            block.__dict__["forward"] = _handing_over(index, block.forward)

    def remove(self) -> None:
        """Put back what was there."""
        for block, own in zip(self._blocks, self._own, strict=False):
            if own is UNSET:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = own
        self._own.clear()

    @contextmanager
    def away(self) -> Iterator[None]:
        """A context without the interception, so that a copy of a block doesn't carry it along."""
        self.remove()
        try:
            yield
        finally:
            self.install()


def _handing_over(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        batch = current_batch()
        return forward(*args, **kwargs) if batch is None else batch.call(index, args, kwargs)

    return intercepted
