"""Compression without calibration, shared by the ranks of a job: each takes the next unit of the work, and writes it.

A unit is the stages between two places where a single process has nothing left to be written. So the files are those
that one process writes, whoever wrote which, and a run that was stopped goes on with any number of ranks: each unit has
a record of its own, and those count that are there from the first on without a gap.
"""

import time
from collections.abc import Callable, Sequence

import torch

from quantkit.checkpoint import Source
from quantkit.compression import compress_stage
from quantkit.journal import Journal
from quantkit.outcome import Outcome
from quantkit.planning import Plan, Stage, tensor_specs
from quantkit.progress import Steps
from quantkit.ranks import current
from quantkit.shards import Part, ShardWriter

Unit = tuple[Stage, ...]

Record = tuple[dict[str, Outcome], list[Part], dict[str, str]]
"""What a unit came to: its stages' outcomes, and the parts and hashes of what was written."""


def units(plan: Plan, source: Source, stages: Sequence[Stage], largest: int, smallest: int) -> list[Unit]:
    """The units of stages that are yet to be done; `ShardWriter` is followed in numbers.

    Args:
        plan: what happens to which tensor.
        source: the model.
        stages: in the order of the work.
        largest: the most bytes that a file holds.
        smallest: the fewest that are worth one.
    """
    found: list[Unit] = []
    unit: list[Stage] = []
    waiting = 0
    for stage in stages:
        for key in stage.keys:
            for size in _sizes(plan, source, key):
                waiting = size if waiting + size > largest else waiting + size
            if not stage.is_block and waiting >= smallest:
                waiting = 0
        waiting = 0 if waiting >= smallest else waiting
        unit.append(stage)
        if not waiting:
            found.append(tuple(unit))
            unit = []
    return [*found, tuple(unit)] if unit else found


def _sizes(plan: Plan, source: Source, key: str) -> list[int]:
    """Bytes of each tensor that a key is written as."""
    target = plan.targets.get(key)
    if target is None:
        return [source.weights.tensors[key].nbytes]
    return [spec.nbytes for spec in tensor_specs(target, plan.layout).values()]


def compress_units(plan: Plan, source: Source, journal: Journal, device: torch.device, progress: bool) -> Outcome:
    """What came of all stages, as the first rank knows it: they are written and recorded now.

    Args:
        plan: what happens to which tensor.
        source: the model.
        journal: says what is finished already.
        device: where weights are quantized.
        progress: show progress on stderr.
    """
    with Steps("quantizing", len(plan.stages), "block", disable=not progress) as steps:
        _share(plan, source, journal, device, steps.advance)
    journal.complete()
    return journal.outcome()


def _share(plan: Plan, source: Source, journal: Journal, device: torch.device, advance: Callable[[], None]) -> None:
    """Do this rank's part; `advance` is called for each stage that some rank has begun."""
    ranks, limits = current(), journal.writer
    stages = [stage for stage in plan.stages if journal.finished(stage.name) is None]
    for _ in range(len(plan.stages) - len(stages)):
        advance()
    left = units(plan, source, stages, limits.max_shard_bytes, limits.smallest)
    done: dict[int, Record] = {}
    shown, started, waited = 0, time.monotonic(), ranks.waited
    while (number := ranks.turn("units")) < len(left):
        for _ in range(shown, number):
            for _ in left[shown]:
                advance()
            shown += 1
        prefix = f"part-{journal.records + number:05d}-"
        writer = ShardWriter(limits.folder, limits.max_shard_bytes, prefix)
        outcomes: dict[str, Outcome] = {}
        for stage in left[number]:
            outcome = outcomes[stage.name] = Outcome()
            outcome.layers += compress_stage(stage, plan, source, writer, device, pruned=outcome.pruned)
            if plan.activating is not None and stage.is_block:
                outcome.activations += plan.activating.given(stage.name)
        writer.write()
        journal.put(number, outcomes, writer)
        done[number] = (outcomes, writer.parts, writer.checksums)
    seconds = time.monotonic() - started - (ranks.waited - waited)
    ranks.compare("all", seconds, journal.tell, units=len(done))
    records = {number: record for records in ranks.gather(done) for number, record in records.items()}
    for number in range(len(left)) if ranks.is_first else ():
        journal.adopt(*records[number])
    for unit in left[shown:]:
        for _ in unit:
            advance()
