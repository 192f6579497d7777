"""Several pieces of work at a time, each in a thread with its share of the cores."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")

MOST = 4
"""At most so many at a time, as each holds a tensor in memory."""


class Workers:
    """Threads that do pieces of work side by side; on a GPU, or with one core, there is none, and all is done in turn.

    torch can also cut every single operator up for all cores, but then all wait for the slowest of them after each: for
    many small operators that is much of the time, and where another program has one of the cores it is most of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._threads = torch.get_num_threads()
        self.count = min(self._threads, MOST) if device.type == "cpu" else 1

    def map(self, work: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """`work(item)` of each in their order; no more than `count` are taken from `items` before they are needed."""
        if self.count == 1:
            yield from map(work, items)
            return
        waiting: deque[Future[Made]] = deque()
        with ThreadPoolExecutor(self.count) as pool:
            self._share_cores(pool)
            for item in items:
                waiting.append(pool.submit(work, item))
                del item  # whoever works on it decides how long it lives
                if len(waiting) == self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _share_cores(self, pool: ThreadPoolExecutor) -> None:
        """Start all threads of a pool, each with its share; the setting of the last is that of threads to come."""
        started = threading.Barrier(self.count + 1)

        def start() -> None:
            torch.set_num_threads(max(1, self._threads // self.count))
            torch.get_num_threads()  # the first use in a thread takes over the setting of the process; let it be now
            started.wait()

        for _ in range(self.count):
            pool.submit(start)
        started.wait()
        torch.set_num_threads(self._threads)
