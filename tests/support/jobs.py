"""Commands of quantkit that several processes share, as torchrun starts them: forks, which start at once."""

import socket
import time

from forks import Call, Child, Ended, Forks


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(forks: Forks, count: int, *words: object, calls: dict[int, tuple[Call, ...]] | None = None) -> list[Child]:
    """The ranks of a job, started; `calls` holds what is to be called in some of them before the command."""
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    found = []
    for rank in range(count):
        values = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        own = (calls or {}).get(rank, ())
        found.append(forks.start(*words, calls=(("environment", {"values": values}), *own)))
    return found


def run(forks: Forks, count: int, *words: object, calls: dict[int, tuple[Call, ...]] | None = None) -> list[Ended]:
    """How each rank of a job ended."""
    return [child.wait() for child in start(forks, count, *words, calls=calls)]


def seconds_until_ended(children: list[Child]) -> tuple[float, list[Ended]]:
    """How long it takes from now on until all have ended, and how they did."""
    started = time.monotonic()
    ended = [child.wait() for child in children]
    return time.monotonic() - started, ended
