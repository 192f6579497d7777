"""How much memory a run takes at its peak, told beforehand: from shapes, and from what the process holds already.

    peak = what is resident now + RUNTIME + the largest of
        a tensor outside of the blocks: its bytes, what quantizing it takes, and a file's worth that waits to be written
        a block: see below

Without calibration a block is its tensors that are worked on at a time, and its compressed tensors, which are written
together. A calibrated block is

    the hidden states of all windows (of one batch where they wait on disk)
  + its weights in float32
  + where it is pruned by what meets its weights: sums of products (SparseGPT: K x K in float32), or norms and a sample
    of tokens (Wanda), for each activation that weights meet; where shifts or thresholds are found, their histograms
  + the largest of: the weights as they are stored, while they are read;
                    copies of them in the dtype that products are observed in, and what a batch makes;
                    its compressed tensors and what quantizing the largest weight takes;
                    the decomposition of a K x K matrix in float64 and a copy of a weight, where SparseGPT prunes it
  + what may be added before memory is given back (`Batching.excess`; no more than HOLES times what a batch makes)

What a batch holds and makes is counted by `activity`. Experts in float32 are counted all. The sizes that are no
arithmetic (RUNTIME, HOLES, PER_WEIGHT, PER_PACKED_WEIGHT) were measured with glibc on Linux.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from quantkit_calibration.activity import Distribution
from quantkit_calibration.spilling import PIECE

from quantkit.activity import Activity, activity
from quantkit.checkpoint import Source
from quantkit.errors import RecipeError
from quantkit.memory import peak_memory_bytes, resident_memory_bytes
from quantkit.planning import Plan, Stage, Target, tensor_specs
from quantkit.recipe import Recipe
from quantkit.shards import SMALLEST_SHARD
from quantkit.sparsifying import ROWS, Pruning
from quantkit.watching import product_dtype
from quantkit.workers import Workers

BATCH_TOKENS = {"cpu": 512, "cuda": 2048}
"""Windows of a batch hold this many tokens together (one window at least). On a CPU what a block makes of so few stays
in its cache, and a process's memory is not full of it."""

EXCESS = 128 * 2**20
"""While a block's batches run, so much memory may be added before what is free is given back."""

TIGHT = 32 * 2**20
"""The same where memory is scarce."""

RUNTIME = 40 * 2**20
"""What libraries take for themselves once products run: their code, kernels and threads."""

MARGIN = 1.05
"""A limit is kept to by so much: what was foreseen for a run was never further from what it took, upwards."""

HOLES = 4
"""Holes in memory grow to so many times what a batch makes in a block, if nothing is given back before."""

PER_WEIGHT, PER_PACKED_WEIGHT = 2, 5
"""Bytes that quantizing takes for each weight that is worked on at a time, its codes included: plainly, and where a
range is searched or codes are packed into words."""


PER_SQUARE = 28
"""Bytes that SparseGPT takes for each of the K x K numbers of H, beside the sums: three matrices in float64, one in
float32."""

HISTOGRAM = 8 * 2 * Distribution.BINS
"""Bytes of the counts that a shift or a threshold is read off."""


@dataclass(frozen=True)
class Batching:
    """How calibration windows run through a block.

    Attributes:
        windows: of a batch.
        excess: bytes that may be added before what is free is given back.
        spill: whether hidden states wait on disk.
    """

    windows: int
    excess: int = EXCESS
    spill: bool = False


@dataclass(frozen=True)
class Footprint:
    """The memory that a run takes at its peak.

    Attributes:
        host_bytes: of this process.
        device_bytes: of the GPU; None where there is none.
        parts: what it is made of, in words, by bytes.
        spilled_bytes: room on disk for hidden states.
        batching: how calibration windows run; None without calibration.
        counted: whether what a batch makes was counted, or else estimated.
    """

    host_bytes: int
    device_bytes: int | None
    parts: dict[str, int]
    spilled_bytes: int
    batching: Batching | None
    counted: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The footprint as plain JSON values."""
        return asdict(self)

    def line(self) -> str:
        """The footprint on a line."""
        text = f"about {self.host_bytes:,} bytes at the peak"
        text += f", {self.device_bytes:,} of the GPU" if self.device_bytes is not None else ""
        text += ": " + ", ".join(f"{what} {size:,}" for what, size in self.parts.items() if size)
        if self.batching is not None:
            count = self.batching.windows
            text += f"; {count} window{'s' if count > 1 else ''} at a time"
            text += f", hidden states on disk ({self.spilled_bytes:,} bytes)" if self.batching.spill else ""
            text += "" if self.counted else " (what a batch takes is estimated)"
        return text


def footprint(
    source: Source,
    plan: Plan,
    recipe: Recipe,
    windows: tuple[int, int],
    device: torch.device,
    limit: int | None = None,
    only: Batching | None = None,
    ranks: int = 1,
) -> Footprint:
    """The memory that a run takes; under a limit with smaller batches and hidden states on disk where that is needed.

    Args:
        source: the model.
        plan: what happens to it.
        recipe: by what.
        windows: of calibration: how many, and the tokens of each; unused when nothing is observed.
        device: what the blocks run on.
        limit: bytes that the host's peak must not pass.
        only: the one way to run the windows that is open, if there is one; it is that of a run that was begun.
        ranks: how many processes share the windows; the memory is that of the first.

    Raises:
        RecipeError: no way stays within the limit; the message says what the least is.
    """
    count, length = windows
    if not recipe.reports or not count or not length:
        found = _without_calibration(source, plan, device)
        _refuse(found, limit)
        return found
    blocks = _Blocks(source, plan, device)
    if recipe.observes_pruning:
        blocks.statistics_of = Pruning.of(recipe.pruning).criterion if recipe.pruning is not None else None
    least: Footprint | None = None
    for batching in ways(count, length, device) if only is None else (only,):
        done = activity(source.skeleton, plan.findings, batching.windows, length)
        batches = -(-(count - 1) // batching.windows) + 1
        found = blocks.calibrated(done, -(-batches // ranks), batching)
        if limit is None or MARGIN * found.host_bytes <= limit:
            return found
        least = found if least is None or found.host_bytes < least.host_bytes else least
    assert least is not None
    _refuse(least, limit)
    return least


def ways(count: int, length: int, device: torch.device) -> Iterator[Batching]:
    """The ways to run the windows, from the fastest to the one that takes least memory."""
    size = max(1, BATCH_TOKENS[device.type] // length)
    yield Batching(size)
    for spill in (False, True):
        smaller = min(size, count)
        while smaller:
            yield Batching(smaller, TIGHT, spill)
            smaller //= 2


def _refuse(least: Footprint, limit: int | None) -> None:
    needed = int(MARGIN * least.host_bytes)
    if limit is not None and needed > limit:
        parts = ", ".join(f"{what} {size:,}" for what, size in least.parts.items() if size)
        raise RecipeError(
            f"--max-memory {limit:,} bytes is too little: the run takes at least about {needed:,} ({parts}, "
            f"and {MARGIN - 1:.0%} for what is not foreseen); give more, or a machine that has it"
        )


def _without_calibration(source: Source, plan: Plan, device: torch.device) -> Footprint:
    """Of a run that reads, quantizes and writes."""
    on_device = device.type == "cuda"
    workers = Workers(device).count
    largest, most = 0, 0
    for stage in plan.stages:
        working = sorted((_working(source, plan, key) for key in stage.keys), reverse=True)
        reading = sum(working[: workers if stage.is_block else 1])
        waiting = _written(plan, source, stage) if stage.is_block else max(_written_by_key(plan, source, stage))
        largest = max(largest, (0 if on_device else reading) + waiting + SMALLEST_SHARD)
        most = max(most, reading)
    parts = {"in use now": resident_memory_bytes() or 0, "libraries": RUNTIME, "tensors at work": largest}
    host = max(sum(parts.values()), peak_memory_bytes() or 0)
    return Footprint(host, most if on_device else None, parts, 0, None)


def _working(source: Source, plan: Plan, key: str) -> int:
    """Bytes of a tensor and of what quantizing it takes."""
    info, target = source.weights.tensors[key], plan.targets.get(key)
    weights = 0 if target is None else target.out_features * target.in_features  # experts come one by one
    return info.nbytes + (0 if target is None else _per_weight(target) * weights)


def _per_weight(target: Target) -> int:
    scheme = target.scheme
    plain = scheme.activation_dtype is not None and scheme.weight_range == "absmax" and scheme.sparsity is None
    return PER_WEIGHT if plain else PER_PACKED_WEIGHT


def _written_by_key(plan: Plan, source: Source, stage: Stage) -> list[int]:
    """Bytes that each key of a stage is written as."""
    found = []
    for key in stage.keys:
        target = plan.targets.get(key)
        specs = () if target is None else tensor_specs(target, plan.layout).values()
        found.append(source.weights.tensors[key].nbytes if target is None else sum(spec.nbytes for spec in specs))
    return found or [0]


def _written(plan: Plan, source: Source, stage: Stage) -> int:
    return sum(_written_by_key(plan, source, stage))


class _Blocks:
    """The sizes of a model's blocks, the largest of each kind."""

    def __init__(self, source: Source, plan: Plan, device: torch.device) -> None:
        self.source, self.plan, self.device = source, plan, device
        tensors = source.weights.tensors
        blocks = [source.skeleton.get_submodule(f"{plan.findings.blocks}.{i}") for i in range(plan.findings.count)]
        self.weights = max(4 * sum(p.numel() for p in block.parameters()) for block in blocks)
        stages = [stage for stage in plan.stages if stage.is_block]
        self.stored = max((sum(tensors[key].nbytes for key in stage.keys) for stage in stages), default=0)
        self.written = max((_written(plan, source, stage) for stage in stages), default=0)
        self.quantizing = max(
            (_per_weight(t) * t.out_features * t.in_features * max(1, t.experts) for t in plan.targets.values()),
            default=0,
        )
        self.copies = 0
        for stage in stages:
            keys = [key for key in stage.keys if key in plan.targets]
            lower = [tensors[key].nbytes for key in keys if product_dtype(tensors[key].dtype, device) is not None]
            self.copies = max(self.copies, sum(lower))
        outside = [stage for stage in plan.stages if not stage.is_block]
        self.outside = max((_working(source, plan, key) for stage in outside for key in stage.keys), default=0)
        self.outside += SMALLEST_SHARD
        self.statistics_of: str | None = None
        """The criterion whose statistics are kept, or None."""

    def pruning(self, done: Activity) -> tuple[int, int]:
        """Bytes of the statistics of what meets a block's weights, and of pruning the largest weight."""
        sums: Counter[str] = Counter()
        working = 0
        for layer in self.plan.pruned:
            size, several = layer.in_features, max(1, layer.experts)
            whole = layer.out_features * size
            block = ".".join(layer.parameter.split(".")[: self.plan.findings.blocks.count(".") + 2])
            made = 4 * whole * several
            if self.statistics_of == "sparsegpt":
                working = max(working, made + PER_SQUARE * size**2 + 8 * whole)
            else:
                working = max(working, made + PER_PACKED_WEIGHT * whole)
            if layer.parameter in done.fed_as:
                continue
            if self.statistics_of == "sparsegpt":
                sums[block] += 4 * size**2 * several
            elif self.statistics_of == "wanda":
                sums[block] += (8 * size + 4 * size * ROWS) * several
        return max(sums.values(), default=0), working

    def histograms(self) -> int:
        """Bytes of the histograms of a block's activations, of which shifts and thresholds are read off."""
        activating, counts = self.plan.activating, Counter[str]()
        if activating is None:
            return 0
        names = [place.module for place in activating.places if place.shift is None]
        for name in (*names, *(layer.parameter for layer in activating.inputs)):
            counts[".".join(name.split(".")[: self.plan.findings.blocks.count(".") + 2])] += HISTOGRAM
        return max(counts.values(), default=0) + 12 * Distribution.CHUNK

    def calibrated(self, done: Activity, batches: int, batching: Batching) -> Footprint:
        """Of a run with so many batches, each holding and making what was counted."""
        held = 3 * done.held + 2 * PIECE if batching.spill else done.held * (batches + 1)
        excess, holes = (min(size, HOLES * done.made) for size in (batching.excess, TIGHT))
        observing = self.copies + max(done.working + holes, excess)
        statistics, pruning = self.pruning(done)
        statistics += self.histograms()
        working = max(self.stored + excess, observing, self.written + self.quantizing, pruning)
        block = {"hidden states": held, "a block in float32": self.weights, "statistics": statistics}
        block["work on it"] = working
        now, spilled = resident_memory_bytes() or 0, done.held * batches if batching.spill else 0
        if self.device.type == "cuda":
            parts = {"in use now": now, "libraries": RUNTIME, "tensors at work": max(self.outside, self.stored)}
            host = sum(parts.values()) + self.written
            return Footprint(host, sum(block.values()), parts, spilled, batching, done.counted)
        parts = {"in use now": now, "libraries": RUNTIME, **block}
        if self.outside > sum(block.values()):
            parts = {"in use now": now, "libraries": RUNTIME, "tensors outside of the blocks": self.outside}
        host = max(sum(parts.values()), peak_memory_bytes() or 0)
        return Footprint(host, None, parts, spilled, batching, done.counted)
