"""What a run takes, from the plan alone: bytes by dtype, room on disk, and a class of time. No weight is read.

Bytes follow from shapes and dtypes. The time is a class (seconds, minutes, hours, days), for what it rests on is rough:

    bytes read, and twice the bytes written (they are read back), at BYTES_RATE
  + weights to be quantized, at the rate at which this machine quantizes a small one
  + with calibration: 2 operations x tokens x parameters of the blocks x passes, at the rate at which this machine
    multiplies float32 matrices

Of several processes each runs its share of the tokens, and without calibration quantizes its share of the weights; all
of them read and write on one disk. Attention's products of activations, the tokenizer and a download come on top.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.candidates import raw_uses
from quantkit.checkpoint import Source
from quantkit.footprint import Footprint
from quantkit.methods import method_class
from quantkit.modules import quantize_linear
from quantkit.output import free_space
from quantkit.planning import Plan, tensor_specs
from quantkit.recipe import Recipe
from quantkit.scheme import BLOCK, Scheme
from quantkit.smoothing import ALPHAS, ROWS

BYTES_RATE = 200e6
"""Bytes a second that are read from a disk, or hashed and written; a plain SSD, not measured."""

ENTRY_BYTES = 1024
"""Room for a tensor's names and numbers in headers, the index, the config and the report."""

SMALL_FILES_BYTES = 64 * 1024
"""Room for what else is in config, card, recipe and report."""

CLASSES = (("seconds", 60.0), ("minutes", 3600.0), ("hours", 86400.0))
MEASURED = 0.1
"""Seconds that a measurement goes on for; it is made once at least."""
SIZE = 512
"""Rows and columns of the matrices that are multiplied for it."""

ROUTED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k")
"""What configs call the number of experts that a token is sent to."""


@dataclass(frozen=True)
class Rates:
    """How fast this machine is.

    Attributes:
        operations: of float32 matrix products, a second (a multiplication and an addition are two).
        weights: quantized to the scheme, a second; 0 without one.
    """

    operations: float
    weights: float


@dataclass(frozen=True)
class Time:
    """How long a run takes on the CPU of this machine, roughly.

    Attributes:
        kind: `seconds`, `minutes`, `hours` or `days`.
        seconds: what the formula gives.
        formula: the formula with its numbers.
        assumption: what is taken for granted.
    """

    kind: str
    seconds: float
    formula: str
    assumption: str


@dataclass(frozen=True)
class Disk:
    """Room on disk: what a run needs, where it would write, and what is free there (None: no output is given)."""

    needed: int
    folder: str | None
    free: int | None

    @property
    def fits(self) -> bool | None:
        """Whether there is room, or None when no output is given."""
        return None if self.free is None else self.needed <= self.free


@dataclass(frozen=True)
class Budget:
    """What a run takes.

    Attributes:
        before: the source's bytes by dtype.
        after: the result's.
        disk: room on disk.
        time: how long it takes.
        memory: at its peak.
    """

    before: dict[str, int]
    after: dict[str, int]
    disk: Disk
    time: Time
    memory: Footprint

    def to_dict(self) -> dict[str, Any]:
        """The budget as plain JSON values."""
        return {
            "bytes_before": self.before,
            "bytes_after": self.after,
            "disk": asdict(self.disk) | {"fits": self.disk.fits},
            "time": asdict(self.time),
            "memory": self.memory.to_dict(),
        }

    def lines(self) -> list[str]:
        """The budget as lines that go with those of a plan."""
        disk = f"needs {self.disk.needed:,} bytes"
        if self.disk.free is not None:
            fits = "" if self.disk.fits else ": too little, quantize will refuse"
            disk += f", and {self.disk.folder} has {self.disk.free:,} free{fits}"
        return [
            f"  bytes now  {_listed(self.before)}",
            f"  bytes then {_listed(self.after)}",
            f"  disk       {disk}",
            f"  memory     {self.memory.line()}",
            f"  time       {self.time.kind} on this CPU: {self.time.formula} ({self.time.assumption})",
        ]


def budget_of(
    source: Source,
    plan: Plan,
    recipe: Recipe,
    tokens: int,
    memory: Footprint,
    output: str | Path | None = None,
    ranks: int = 1,
) -> Budget:
    """What a run takes.

    Args:
        source: the model.
        plan: what happens to it.
        recipe: by what.
        tokens: of calibration; they count when the recipe observes any.
        memory: what it takes of that.
        output: where the result is to be written.
        ranks: how many processes share the work.
    """
    before, after = dtype_bytes(source, plan)
    folder, free = (None, None) if output is None else free_space(Path(output).expanduser())
    disk = Disk(disk_bytes(source, plan) + ranks * memory.spilled_bytes, None if folder is None else str(folder), free)
    return Budget(before, after, disk, time_class(source, plan, recipe, tokens, ranks=ranks), memory)


def dtype_bytes(source: Source, plan: Plan) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of all tensors by dtype, largest first: of the source, and of the result."""
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    for key, info in source.weights.tensors.items():
        before[_short(info.dtype)] += info.nbytes
        if key not in plan.targets:
            after[_short(info.dtype)] += info.nbytes
    for target in plan.targets.values():
        for spec in tensor_specs(target, plan.layout).values():
            after[_short(spec.dtype)] += spec.nbytes
    return dict(before.most_common()), dict(after.most_common())


def disk_bytes(source: Source, plan: Plan) -> int:
    """Room on disk that a run needs at most, output and what lies there in between.

    A shard is written under another name and renamed, so that nothing lies there twice. Columns that stay in float
    (LLM.int8 with outlier_weight=float) are found in calibration, and come on top. Pruned experts that are quantized
    wait there in float32, for a run that is stopped.
    """
    tensors = len(source.weights.tensors) - len(plan.targets)
    tensors += sum(len(tensor_specs(target, plan.layout)) for target in plan.targets.values())
    quantized = {layer.parameter for layer in plan.quantized}
    kept = [layer for layer in plan.pruned if layer.parameter in quantized and (layer.experts or layer.converted)]
    state = sum(4 * layer.out_features * layer.in_features * max(1, layer.experts) for layer in kept)
    return plan.output_bytes + state + source.copied_bytes + ENTRY_BYTES * tensors + SMALL_FILES_BYTES


def time_class(
    source: Source,
    plan: Plan,
    recipe: Recipe,
    tokens: int,
    measure: Callable[[Scheme | None], Rates] | None = None,
    ranks: int = 1,
) -> Time:
    """How long a run takes, by the formula that this module begins with.

    Args:
        source: the model.
        plan: what happens to it.
        recipe: by what.
        tokens: of calibration.
        measure: gives the rates of the machine; by default they are measured.
        ranks: how many processes share the work; the time is that of the slowest.
    """
    tokens = -(-tokens // ranks)
    rates = (measure or rates_of_this_machine)(recipe.scheme)
    moved = source.weights.nbytes + 2 * plan.output_bytes
    coded = [target for target in plan.targets.values() if not target.scheme.is_float]
    weights = sum(t.out_features * t.in_features * (t.experts or 1) for t in coded)
    seconds = moved / BYTES_RATE
    parts = [f"{moved:,} bytes at {BYTES_RATE:.1e} a second"]
    if recipe.observes:
        parameters, products = block_parameters(source, plan), passes(recipe)
        searched = len(ALPHAS) * 2 * ROWS if _searches(recipe) else 0
        operations = 2 * parameters * (tokens * products + searched)
        seconds += operations / rates.operations
        weights += len(ALPHAS) * weights if searched else 0  # every rank does it
        searching = f" + {searched:,} in the search" if searched else ""
        parts.append(
            f"2 x {parameters:,} parameters x ({tokens:,} tokens x {products} passes{searching}) at "
            f"{rates.operations:.1e} a second"
        )
    else:
        weights = -(-weights // ranks)
    if weights:
        seconds += weights / rates.weights
        parts.insert(1, f"{weights:,} weights at {rates.weights:.1e} a second")
    assumption = "the disk's rate is assumed" + (", the CPU's just measured" if len(parts) > 1 else "")
    assumption += f"; each of {ranks} processes" if ranks > 1 else ""
    kind = next((name for name, limit in CLASSES if seconds < limit), "days")
    return Time(kind, seconds, " + ".join(parts), assumption)


def passes(recipe: Recipe) -> int:
    """How often the calibration windows run through a block: once to observe for each step, once compressed.

    The sums of products that SparseGPT needs count as another, and zeros are counted before and after activations are
    changed.
    """
    scheme = recipe.scheme
    stored = scheme is not None and (scheme.is_static, scheme.outlier_columns is not None).count(True)
    transforms = [step for step in recipe.transforms if method_class(step.name)().observes(step.parameters)]
    sums = recipe.pruning is not None and recipe.pruning.parameters["criterion"] == "sparsegpt"
    zeros = 2 if recipe.rectifying is not None or recipe.thresholding is not None else 0
    return len(transforms) + int(sums) + int(stored) + zeros + 1


def block_parameters(source: Source, plan: Plan) -> int:
    """Parameters of two or more axes that one token meets in the blocks; of experts as many as it is sent to.

    A block that runs again counts again, one that no text reaches doesn't. All experts are counted where the config
    doesn't say how many a token is sent to, and where each is a module of its own.
    """
    findings = plan.findings
    experts = {name for name, use in raw_uses(findings) if use.expert_axis is not None}
    routed = _routed(source)
    runs = Counter(findings.order) or Counter(range(findings.count))
    total = 0
    for name, parameter in source.skeleton.named_parameters():
        number = name.removeprefix(f"{findings.blocks}.").partition(".")[0]
        if not name.startswith(f"{findings.blocks}.") or parameter.ndim < 2:
            continue
        share = parameter.numel()
        if name in experts and routed is not None and parameter.ndim == 3:
            share = share // parameter.shape[0] * min(routed, parameter.shape[0])
        total += share * runs[int(number)]
    return total


def rates_of_this_machine(scheme: Scheme | None) -> Rates:
    """How fast this machine is now, measured for some tenths of a second: a thread's rate, times torch's threads.

    A single thread is measured because work as short as this tells nothing of several on a machine that is busy: they
    wait for each other.
    """
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    left, right = torch.randn(SIZE, SIZE, generator=generator), torch.randn(SIZE, SIZE, generator=generator)
    rows = BLOCK if scheme is not None and scheme.weight_granularity == "block" else 16
    sample = torch.randn(rows, 8 * BLOCK, generator=generator)
    torch.set_num_threads(1)
    try:
        operations = 2 * SIZE**3 / _fastest(lambda: left @ right)
        weights = 0.0
        if scheme is not None:
            weights = sample.numel() / _fastest(lambda: quantize_linear(sample, scheme, torch.float32))
    finally:
        torch.set_num_threads(threads)
    return Rates(operations * threads, weights * threads)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs; the first, which may have to get ready, counts when there is no other."""
    ended = time.perf_counter() + MEASURED
    runs: list[float] = []
    while not runs or time.perf_counter() < ended:
        started = time.perf_counter()
        work()
        runs.append(time.perf_counter() - started)
    return min(runs)


def _searches(recipe: Recipe) -> bool:
    return any(step.parameters.get("alpha") == "auto" for step in recipe.transforms)


def _routed(source: Source) -> int | None:
    """How many experts a token is sent to, or None where the config doesn't say."""
    config = source.skeleton.config.get_text_config()  # type: ignore[operator, union-attr]
    return next((value for key in ROUTED if isinstance(value := getattr(config, key, None), int)), None)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(sizes: dict[str, int]) -> str:
    total = f"{sum(sizes.values()):,} bytes"
    return total if not sizes else f"{total}: " + ", ".join(f"{dtype} {size:,}" for dtype, size in sizes.items())
