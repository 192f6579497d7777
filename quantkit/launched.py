"""Where this process stands among those that `torchrun` or `accelerate launch` started: what the environment says.

Nothing here imports torch.
"""

import os
from dataclasses import dataclass

from quantkit.errors import QuantkitError

MOST_RANKS = 1_000_000


@dataclass(frozen=True)
class Launched:
    """One process of a job.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
        local_rank: its number on this machine.
        local_count: how many there are on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0


def launched() -> Launched:
    """Where this process stands; alone when nothing launched it.

    Raises:
        QuantkitError: the environment names several processes, and not which of them this is or where they meet.
    """
    count = _number("WORLD_SIZE", 1, 1)
    if count == 1:
        return Launched()
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if absent:
        raise QuantkitError(
            f"WORLD_SIZE is {count} and {absent[0]} is not set; start it by torchrun or accelerate launch, which set "
            "both, or unset WORLD_SIZE"
        )
    rank = _number("RANK", 0, 0)
    if rank >= count:
        raise QuantkitError(f"RANK is {rank} and WORLD_SIZE {count}; start it by torchrun or accelerate launch")
    return Launched(rank, count, _number("LOCAL_RANK", 0, 0), _number("LOCAL_WORLD_SIZE", 1, 1))


def _number(name: str, default: int, least: int) -> int:
    """The number that a variable holds."""
    text = os.environ.get(name) or str(default)
    if not text.isascii() or not text.isdecimal() or len(text) > 7 or not least <= int(text) <= MOST_RANKS:
        raise QuantkitError(f"{name} is {text[:40]!r}, which is no number of processes; unset it, or use torchrun")
    return int(text)


def is_silent() -> bool:
    """Whether another process of the job speaks for this one."""
    rank, count = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return rank.isdecimal() and count.isdecimal() and int(rank) > 0 and int(count) > 1
