"""Statistics of all ranks, made of those of each: exact but for the rounding of sums; the same bits in every rank."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from quantkit_calibration.activity import Distribution, Zeros
from quantkit_calibration.observers import ChannelAbsmax, Reservoir, TensorRange

from quantkit.ranks import Ranks

Key = TypeVar("Key")
Counts = TypeVar("Counts", Distribution, Zeros)


@dataclass(frozen=True)
class Turn:
    """A batch of windows that runs through a block.

    Attributes:
        number: how many ran before it, in whichever rank.
        first: how many windows ran before.
        windows: of this one.
    """

    number: int
    first: int
    windows: int

    def begin(self, sample: Reservoir, rows: int, seed: int, is_expert: bool) -> None:
        """Let a sample of the tokens draw what it would draw if all batches ran in one process.

        A plain weight meets as many tokens of each window. How many an expert is sent nobody knows before, so that its
        numbers begin anew with each batch.
        """
        if is_expert:
            generator = torch.Generator().manual_seed((seed * 2**20 + self.number + 1) % 2**63)
            sample.go_on_at(self.number * 2**32, generator)
        else:
            sample.go_on_at(self.first * (rows // self.windows))


def total(counts: Mapping[Key, int], ranks: Ranks) -> dict[Key, int]:
    """The sums over all ranks."""
    if ranks.is_alone:
        return dict(counts)
    found: Counter[Key] = Counter()
    for each in ranks.gather(dict(counts)):
        found.update(each)
    return dict(found)


def merged(own: dict[str, Counts], ranks: Ranks) -> dict[str, Counts]:
    """What all ranks have counted, by name."""
    if ranks.is_alone:
        return own
    found: dict[str, Counts] = {}
    for each in ranks.gather(own):
        for name, counts in each.items():
            if name in found:
                found[name].merge(counts)
            else:
                found[name] = counts
    return found


def absmaxima(
    own: Mapping[tuple[str, int | None], ChannelAbsmax], ranks: Ranks, device: torch.device
) -> dict[tuple[str, int | None], ChannelAbsmax]:
    """The largest magnitudes of all ranks, for each weight that met something in one of them."""
    results = {key: each.result() for key, each in own.items()}
    sizes: dict[tuple[str, int | None], int] = {}
    for each in ranks.gather({key: len(value) for key, value in results.items()}):
        sizes |= each
    keys = sorted(sizes, key=_order)
    if not keys:
        return {}
    nothing = {key: torch.full((sizes[key],), -1.0, device=device) for key in keys if key not in results}
    flat = ranks.largest(torch.cat([results[key] if key in results else nothing[key] for key in keys]))
    parts = torch.split(flat, [sizes[key] for key in keys])
    return {key: ChannelAbsmax.of(part) for key, part in zip(keys, parts, strict=True)}


def sample(own: Reservoir, ranks: Ranks, device: torch.device) -> None:
    """Return nothing; make a rank's sample that of all ranks' tokens."""
    held = own.result() if own.seen else None
    shape = None if held is None else (held.shape[1], held.dtype)
    told = ranks.gather((own.drawn(), shape, own.seen))
    known = next((shape for _, shape, _ in told if shape is not None), None)
    if known is None:
        return
    keys, places, mine = own.choose([drawn for drawn, _, _ in told])
    rows = ranks.sum(own.rows(mine, known[0], known[1], device))  # all but one are zeros: the sum is exact
    own.take(keys, places, rows, sum(seen for _, _, seen in told))


def ranges(own: Mapping[str, TensorRange], ranks: Ranks) -> None:
    """Return nothing; make a rank's ranges those of all ranks."""
    for found in own.values():
        absmax, one_value, counts = found.parts()
        told = ranks.gather((absmax, one_value))
        if counts is not None:
            ranks.sum(counts)
        known = [value for value, _ in told if value is not None]
        if known:
            largest = math.nan if any(map(math.isnan, known)) else max(known)
            found.take(largest, all(flag for value, flag in told if value is not None))


def _order(key: tuple[str, int | None]) -> tuple[str, int]:
    name, expert = key
    return name, -1 if expert is None else expert
