"""The processes of one job: what they tell each other, and how all end when one does.

`torchrun` or `accelerate launch` starts the processes (ranks); they meet by torch.distributed, over gloo, and over nccl
what lies on GPUs. Every rank runs the same code. What is told here is small: statistics, decisions, records. In a
process that nothing launched all of it is without effect.

No rank waits inside of torch: an exchange is begun, and looked at until it is done. So a signal is answered, and so is
the end of another rank: every rank says a sign of life twice a second and why it ends, in the store that all share. The
first rank tells the user.
"""

import functools
import io
import json
import logging
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from quantkit.errors import QuantkitError
from quantkit.launched import Launched, launched
from quantkit.memory import peak_memory_bytes

BEAT = 0.5
"""Seconds between two signs of life."""

SILENT = 60.0
"""Seconds without a sign of life after which a rank counts as gone; one that is killed is missed at once."""

STRAGGLES, NOTICED = 1.5, 10.0
"""A rank that takes so many times as long as the median, and so many seconds more, is named to the user."""

LAST_WORDS = 3.0
"""Seconds for which the first rank looks who ended the job, and why."""

MEETING = 300.0
"""Seconds for which ranks wait for each other at the start."""

SIGNAL = "a signal"
"""What a rank says of itself that was told to end."""

GONE = "the process that keeps the job together (rank 0, or what launched it) is gone"

FOREVER = timedelta(days=30)
"""How long torch itself would wait for a rank: we look after them ourselves."""

Given = ParamSpec("Given")
Made = TypeVar("Made")
Item = TypeVar("Item")

log = logging.getLogger("quantkit")


class RankError(QuantkitError):
    """Another rank ended: the sentence says which and why."""


class Ranks:
    """The ranks of a job, as one of them sees it.

    Args:
        place: where this one stands.
        store: what all share; None for a process alone.

    Attributes:
        waited: seconds that this rank has waited for others.
    """

    def __init__(self, place: Launched, store: Any = None, group: Any = None) -> None:
        self.rank, self.count = place.rank, place.count
        self.place, self.waited = place, 0.0
        self._store, self._group = store, group
        self._entered = 0
        self._speaks = place.is_first
        self._trouble: str | None = None
        self._number = 0
        if store is not None:
            threading.Thread(target=self._watch, args=(store.clone(),), daemon=True, name="quantkit ranks").start()

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    @property
    def place_of(self) -> tuple[int, int]:
        """This rank's number, and how many there are."""
        return self.rank, self.count

    # Exchanges

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This rank's of some items: every `count`-th, from its own number on."""
        return list(items[self.rank :: self.count])

    def gather(self, value: Made) -> list[Made]:
        """What each rank gives, in their order."""
        if self.is_alone:
            return [value]
        data = _packed(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        self._done(dist.all_gather(sizes, torch.tensor([data.numel()]), group=self._group, async_op=True))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: data.numel()] = data
        found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.count)]
        self._done(dist.all_gather(found, padded, group=self._group, async_op=True))
        return [pickle.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(found, sizes, strict=True)]

    def told(self, value: Made) -> Made:
        """What the first rank gives; of the others it doesn't matter what they do."""
        if self.is_alone:
            return value
        data = _packed(value if self.is_first else None)
        size = torch.tensor([data.numel()])
        self._done(dist.broadcast(size, 0, group=self._group, async_op=True))
        data = data if self.is_first else torch.zeros(int(size), dtype=torch.uint8)
        self._done(dist.broadcast(data, 0, group=self._group, async_op=True))
        found: Made = pickle.loads(data.numpy().tobytes())
        return value if self.is_first else found

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, which holds from now on the sum of all ranks'; the same bits in each."""
        if not self.is_alone:
            group = self._group if tensor.device.type == "cpu" else None
            self._done(dist.all_reduce(tensor, group=group, async_op=True))
        return tensor

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest of all ranks' numbers, place by place; NaN where one has it (which a reduction would lose)."""
        if self.is_alone:
            return tensor
        own = tensor.detach().cpu().contiguous()
        found = [torch.empty_like(own) for _ in range(self.count)]
        self._done(dist.all_gather(found, own, group=self._group, async_op=True))
        return functools.reduce(torch.maximum, found).to(tensor.device)

    def decided(self, decide: Callable[[], Made] | None) -> Callable[[], Made]:
        """A function that gives what the first rank decides; the others have None for it."""
        return lambda: self.told(decide() if decide is not None else None)  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if not self.is_alone:
            self.gather(None)

    def agree(self, what: str, value: object) -> None:
        """Return nothing; raise RankError where ranks don't have the same value, which would mix two results."""
        values = self.gather(value)
        odd = next((rank for rank, other in enumerate(values) if other != values[0]), None)
        if odd is not None:
            raise RankError(
                f"rank {odd} has another {what} than rank 0 ({str(values[odd])[:80]}, and {str(values[0])[:80]}); use "
                "the same files, versions and kind of machine for all ranks"
            )

    def compare(self, stage: str, seconds: float, tell: Callable[..., None], **more: Any) -> None:
        """Tell the log how long each rank worked on a stage, and the user which one holds up the others."""
        if self.is_alone:
            return
        rows = self.gather({"seconds": round(seconds, 3), **more, "peak_memory_bytes": peak_memory_bytes()})
        if not self.is_first:
            return
        times = sorted(row["seconds"] for row in rows)
        usual, slowest = times[(self.count - 1) // 2], max(range(self.count), key=lambda rank: rows[rank]["seconds"])
        tell("ranks", stage=stage, slowest=slowest, ranks=rows)
        if times[-1] > max(STRAGGLES * usual, usual + NOTICED):
            log.warning("%s: rank %d took %.0f s and others %.0f s; they wait for it", stage, slowest, times[-1], usual)

    def turn(self, name: str) -> int:
        """The next number of a sequence that all ranks share: 0, 1, ...; each number goes to one rank."""
        self.look()
        try:
            return int(self._store.add(f"turn/{self._number}/{name}", 1)) - 1
        except RuntimeError as error:
            raise RankError(self._cause() or GONE) from error

    # The end of others

    def look(self) -> None:
        """Return nothing; raise RankError when another rank has ended."""
        if self._trouble is not None:
            raise RankError(self._trouble)

    def _done(self, work: Any) -> None:
        """Wait for an exchange, and answer signals and the end of others meanwhile."""
        started, pause = time.monotonic(), 1e-5
        try:
            while not work.is_completed():
                self.look()
                time.sleep(pause)
                pause = min(1.5 * pause, 0.01)
            work.wait()
        except RuntimeError as error:  # gloo's: the connection to a rank is closed
            raise RankError(self._cause() or f"a rank ended in the middle of the work ({_line(error)})") from error
        finally:
            self.waited += time.monotonic() - started

    def _watch(self, store: Any) -> None:
        """Say a sign of life now and then, and look for the others': the first rank for all, the others for it."""
        others = range(1, self.count) if self.is_first else range(1)
        beats, seen, number = dict.fromkeys(others, ""), dict.fromkeys(others, time.monotonic()), 0
        while True:
            number += 1
            try:
                store.set(f"beat/{self.rank}", str(number))
                if self._trouble is None and store.check(["trouble"]):
                    self._trouble = self._sentence(json.loads(store.get("trouble")))
                for rank in others:
                    beat = store.get(f"beat/{rank}").decode() if store.check([f"beat/{rank}"]) else ""
                    if beat != beats[rank]:
                        beats[rank], seen[rank] = beat, time.monotonic()
                    elif time.monotonic() - seen[rank] > SILENT and self._entered and self._trouble is None:
                        self._trouble = f"rank {rank} of {self.count} has given no sign of life for {SILENT:.0f} s"
            except RuntimeError:  # who keeps the store is gone: the first rank, or the launcher
                if self._entered and self._trouble is None:
                    self._trouble = GONE
                return
            time.sleep(BEAT)

    def _sentence(self, trouble: dict[str, Any]) -> str | None:
        return None if trouble["rank"] == self.rank else f"rank {trouble['rank']} of {self.count}: {trouble['why']}"

    def _say(self, key: str, value: Any) -> bool:
        """Whether others can know of it now."""
        try:
            self._store.set(key, json.dumps(value))
        except RuntimeError:
            return False
        return True

    def _end(self, error: BaseException) -> BaseException:
        """What to raise for an error of this rank, which the others are told of."""
        if isinstance(error, RankError):
            self._say(f"left/{self.rank}", "another")
            error.told = not self._speaks
            return error
        if isinstance(error, KeyboardInterrupt):  # or SIGTERM: the launcher's, which ends all when one has ended
            cause = self._cause(signalled=True) if self.is_first else None
            self._say(f"left/{self.rank}", SIGNAL)
            return error if cause is None else RankError(cause)
        if isinstance(error, Exception):
            sentence = " ".join(str(error).split())
            why = sentence if isinstance(error, QuantkitError) else f"{error!r} (a fault of quantkit)"
            trouble = {"rank": self.rank, "why": why[:2000], "host": socket.gethostname()}
            with suppress(RuntimeError):
                self._store.compare_set("trouble", "", json.dumps(trouble))
                if isinstance(error, QuantkitError):
                    error.told = not self._speaks
        self._say(f"left/{self.rank}", "an error")
        return error

    def _cause(self, signalled: bool = False) -> str | None:
        """Which rank ended the job, and why; None where this one was `signalled` and so were the others."""
        until = time.monotonic() + LAST_WORDS
        others = [rank for rank in range(self.count) if rank != self.rank]
        try:
            beats = {rank: self._beat(rank) for rank in others}
            left: dict[int, str] = {}
            while len(left) < len(others) and time.monotonic() < until:
                if self._store.check(["trouble"]):
                    return self._sentence(json.loads(self._store.get("trouble")))
                left |= {rank: self._left(rank) for rank in others if self._store.check([f"left/{rank}"])}
                time.sleep(BEAT / 5)
            silent = [rank for rank in others if rank not in left and self._beat(rank) == beats[rank]]
            who = ", ".join(self._named(rank) for rank in silent[:4])
        except RuntimeError:  # the store went with the rank that kept it
            self._speaks |= self.rank == 1
            return self._trouble or GONE
        self._speaks |= 0 in silent and self.rank == min(set(range(self.count)).difference(silent))
        if silent:
            ranks = "rank" if len(silent) == 1 else "ranks"
            return f"{ranks} {who} of {self.count} ended without a word (killed, or out of memory), and the job with it"
        told = next((rank for rank, how in left.items() if how == SIGNAL), None)
        if signalled or told is None:
            return None
        return f"rank {told} of {self.count} was ended by a signal, and the job with it"

    def _left(self, rank: int) -> str:
        return str(json.loads(self._store.get(f"left/{rank}")))

    def _beat(self, rank: int) -> str:
        return str(self._store.get(f"beat/{rank}")) if self._store.check([f"beat/{rank}"]) else ""

    def _named(self, rank: int) -> str:
        """A rank with its machine and process."""
        if not self._store.check([f"who/{rank}"]):
            return str(rank)
        host, pid = json.loads(self._store.get(f"who/{rank}"))
        return f"{rank} (process {pid} on {host})"

    @contextmanager
    def entered(self) -> Iterator["Ranks"]:
        """While this lasts the ranks work together: when one ends, all do."""
        if self.is_alone or self._entered:
            yield self
            return
        self._entered, self._number = 1, self._number + 1
        self._say(f"who/{self.rank}", [socket.gethostname(), os.getpid()])
        try:
            yield self
            self.barrier()
        except BaseException as error:
            found = self._end(error)
            if found is error:
                raise
            raise found from error
        finally:
            self._entered = 0


_joined: list[Ranks] = []


def current() -> Ranks:
    """The ranks that this process has joined; itself alone when it has joined none."""
    return _joined[-1] if _joined else ALONE


ALONE = Ranks(Launched())


def join() -> Ranks:
    """The ranks of this process's job, which are met now if they weren't before.

    Raises:
        QuantkitError: the environment is half set, or not all ranks came.
    """
    place = launched()
    if place.count == 1 or _joined:
        return current()
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=MEETING)))
        own = PrefixStore(f"quantkit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store.clone())
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.count, timeout=FOREVER)
        group = dist.new_group(backend="gloo", timeout=FOREVER)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise QuantkitError(
            f"rank {place.rank} of {place.count} did not meet the others at {where} ({_line(error)}); start all by "
            "torchrun or accelerate launch, or unset WORLD_SIZE to work alone"
        ) from error
    _joined.append(Ranks(place, own, group))
    return current()


def together(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """The function, run by all ranks together: when one of them ends in it, all do."""

    @functools.wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        with join().entered():
            return function(*args, **kwargs)

    return run


class _Pickler(pickle.Pickler):
    """Takes tensors to the host: the rank that reads them has another GPU, or none."""

    def reducer_override(self, obj: Any) -> Any:
        """How to make an object again."""
        if isinstance(obj, torch.Tensor) and obj.device.type != "cpu":
            return obj.detach().cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)  # type: ignore[no-untyped-call]
        return NotImplemented


def _packed(value: Any) -> torch.Tensor:
    """A value as bytes."""
    memory = io.BytesIO()
    _Pickler(memory, pickle.HIGHEST_PROTOCOL).dump(value)
    return torch.frombuffer(bytearray(memory.getbuffer()), dtype=torch.uint8)


def _line(error: BaseException) -> str:
    """The start of an error's message, on a line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else f"{text[:157]}..."
