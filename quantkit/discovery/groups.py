"""Groups: which parameters must be scaled along with a norm's gain or the rows of a linear weight.

A producer is divided by its channels' scales; passes through the trace ask for one further parameter after another,
until every scale is undone, or its channel blocked.
"""

from dataclasses import dataclass

import torch

from quantkit.discovery.labels import channel_of, channels_in, encode, power_of
from quantkit.discovery.propagation import Pass, Scaling, Weights
from quantkit.discovery.structure import UNTOUCHED, Edit, Group
from quantkit.discovery.trace import Trace

PASSES = 64


@dataclass(frozen=True)
class Search:
    """What came of one producer.

    Attributes:
        group: what folds, or None.
        reason: without a group, what forbids it.
        normalized: whether the producer multiplies rows of equal length, as a norm's gain does.
    """

    group: Group | None
    reason: str
    normalized: bool


def search(trace: Trace, weights: Weights, name: str, axis: int, kind: str, generator: torch.Generator) -> Search:
    """The group of one producer, not yet proven."""
    count = trace.parameters[name].size(axis)
    scalings = {name: Scaling(axis, encode(torch.arange(count), 1))}
    reason, normalized = "", False
    for _ in range(PASSES):
        found = Pass(trace, scalings, count, weights, generator).run()
        if found.blocked and not reason:
            reason = next(iter(found.blocked.values()))
        normalized = normalized or (found.gain is not None and found.prober.equal_rows(*found.gain))
        changed = _changed(scalings, found)
        if not changed[name].channels:
            return Search(None, reason, normalized)
        if _same(changed, scalings):
            break
        scalings = changed
    else:
        return Search(None, f"its scales weren't undone after {PASSES} passes", normalized)
    group = _group(scalings, name, kind)
    return Search(group, reason or "no linear weight takes its output", normalized)


def _changed(scalings: dict[str, Scaling], found: Pass) -> dict[str, Scaling]:
    """The scalings of the next pass: what was asked for, without what was blocked."""
    result = {}
    for name, scaling in (scalings | found.wanted).items():
        offset = found.offsets.get(name, scaling.offset)
        result[name] = Scaling(scaling.axis, scaling.codes, offset).without(set(found.blocked))
    return result


def _same(one: dict[str, Scaling], other: dict[str, Scaling]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].codes, other[name].codes) and one[name].offset == other[name].offset for name in one
    )


def _group(scalings: dict[str, Scaling], name: str, kind: str) -> Group | None:
    """The scalings as a group of the channels that reach a consumer, numbered in the producer's order."""
    consumed: set[int] = set()
    for scaling in scalings.values():
        consumed |= channels_in(scaling.codes[power_of(scaling.codes) < 0])
    order = [channel for channel in channel_of(scalings[name].codes).tolist() if channel in consumed]
    number = {channel: i for i, channel in enumerate(order)}
    producers: list[Edit] = []
    consumers: list[Edit] = []
    for parameter, scaling in scalings.items():
        powers = {power for power in power_of(scaling.codes).tolist() if power}
        channels = tuple(number.get(channel, UNTOUCHED) for channel in channel_of(scaling.codes).tolist())
        if set(channels) == {UNTOUCHED}:
            continue
        if len(powers) != 1:
            return None
        edit = Edit(parameter, scaling.axis, channels, -powers.pop(), scaling.offset)
        (producers if edit.power < 0 else consumers).append(edit)
    if not consumers:
        return None
    producers.sort(key=lambda edit: edit.parameter != name)
    return Group(name, kind, len(order), tuple(producers), tuple(consumers))
