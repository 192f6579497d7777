"""What `quantkit bench-kernels` measures: each op, shape and number of tokens beside the float layer, in one run."""

import gc
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels.benchmarks import baselines, cpu_clock, experts, gpu_clock, quantizers, roofline
from quantkit_kernels.benchmarks.cases import (
    Case,
    activations,
    chosen,
    floats,
    linear_cases,
    named,
    rotated,
)
from quantkit_kernels.benchmarks.correctness import is_right
from quantkit_kernels.benchmarks.shapes import Shape
from quantkit_kernels.benchmarks.skipping import skipping_cases
from quantkit_kernels.configurations import architecture

TOKENS = (1, 4, 16, 64, 512, 2048, 8192)
CPU_TOKENS = (1, 4, 16, 64)
CPU_SHAPES = ("4096x4096",)
GPU_SHAPES = ("Llama-3-8B",)
ROUNDS = 8
WRONG = "wrong, not timed"


@dataclass(frozen=True)
class Group:
    """Cases and what they are compared with, the float work, of which the fastest counts; both by name."""

    references: dict[str, Case]
    cases: dict[str, Case]


@dataclass(frozen=True)
class Time:
    """Seconds of a call, the least and the most of most calls, and of the references in the same turns, by name.

    On a GPU the median and the tenth and the ninetieth of a hundred, on a CPU the fastest call of all, and the fifth.
    """

    seconds: float
    least: float
    most: float
    references: dict[str, float]
    settled: bool = True


@dataclass
class Prepared:
    """A case with its operands, ready to be timed; `calls` go round operands that no cache holds."""

    name: str
    case: Case
    calls: list[Callable[[], Any]]
    moved: int
    operations: int
    has_fp8: bool


Timed = Iterator[tuple[Prepared, Time | str]]
"""What was prepared, and its time or why it has none."""


@dataclass
class Bench:
    """One run: on which device, how long each line, and how calls are timed there.

    Attributes:
        device: where the tensors are.
        dtype: dtype of the activations.
        seconds: about how long each line is measured.
        cache_bytes: what operands exceed together; 0 lets them stay in the cache.
        failed: names of cases whose result was wrong, or that did not run, in any line.
    """

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    seconds: float = 0.5
    cache_bytes: int = 0
    failed: set[str] = field(default_factory=set)

    def timed(self, references: list[Prepared], others: Iterator[Prepared]) -> Timed:
        """Return each of the references and then of the others with its time; on a GPU these are made one by one."""
        if self.device.type != "cuda":
            return _timed_on_cpu(references, others, self.seconds)
        return _timed_on_gpu(references, others, self.seconds)


def groups(words: Sequence[str], device: torch.device, dtype: torch.dtype) -> dict[str, list[Group]]:
    """Return by kind what is measured, "linear", "experts" and "quantizer", of the ops that the words name.

    Raises:
        KernelError: for a word that names no op.
    """
    floats_here = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    names = {f"{str(each).removeprefix('torch.')}": each for each in floats_here}
    by_kind = {
        "linear": [Group({name: floats(each) for name, each in names.items()}, linear_cases() | skipping_cases())],
        "experts": [
            Group(
                {k: v for each in floats_here for k, v in experts.float_experts(each).items()}, experts.expert_cases()
            )
        ],
        "quantizer": [Group(*pair) for pair in quantizers.quantizer_cases()],
    }
    others, _ = baselines.baselines(device)
    known = {name: case for each in by_kind.values() for group in each for name, case in group.cases.items()}
    wanted = set(chosen({**known, **others}, words))
    by_kind["linear"][0].cases.update(others)
    found: dict[str, list[Group]] = {}
    for kind, each in by_kind.items():
        kept = [Group(group.references, {n: c for n, c in group.cases.items() if n in wanted}) for group in each]
        if any(group.cases for group in kept):
            found[kind] = [group for group in kept if group.cases]
    return found


def op_names(device: torch.device) -> list[str]:
    """Return what an op may be called on the command line, in the order of the table."""
    every = groups((), device, torch.bfloat16)
    return [named(name) for each in every.values() for group in each for name in group.cases]


def measure(
    bench: Bench,
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    words: Sequence[str],
    said: Callable[[dict[str, Any]], None] = lambda record: None,
    until: float | None = None,
) -> dict[str, Any]:
    """Return the machine, the ceilings that were measured, and a record for each line.

    Args:
        bench: where and how.
        shapes: linear layers.
        tokens: numbers of tokens.
        words: names of ops; all where there are none.
        said: is given each record as it comes.
        until: after this `time.monotonic()` nothing more is begun, and `complete` is false.

    Raises:
        KernelError: for a word that names no op.
    """
    found = groups(words, bench.device, bench.dtype)
    others, beside = baselines.baselines(bench.device)
    ours = {name for each in found.values() for group in each for name in group.cases} - set(others)
    on_gpu = bench.device.type == "cuda"
    ceilings = gpu_clock.ceilings(bench.device) if on_gpu else cpu_clock.ceilings()
    records: list[dict[str, Any]] = []
    complete = True
    with torch.inference_mode():
        for kind, group, shape, count in _plan(found, shapes, tokens):
            if until is not None and time.monotonic() > until:
                complete = False
                break
            for record in _lines(bench, kind, group, shape, count, ceilings):
                records.append(record)
                said(record)
    return {
        "machine": gpu_clock.machine(bench.device) if on_gpu else cpu_clock.machine(),
        "beside": beside,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "cache": "cold" if bench.cache_bytes else "hot",
        "ceilings": ceilings,
        "records": records,
        "complete": complete,
        "failed": sorted(bench.failed & ours),
        "system": platform.platform(),
    }


def _plan(
    found: dict[str, list[Group]], shapes: Sequence[Shape], tokens: Sequence[int]
) -> Iterator[tuple[str, Group, Shape, int]]:
    """Yield what is measured in the order of the table: kind, group, shape and tokens; quantizers once for each K."""
    quantized: set[tuple[int, int]] = set()
    for shape in shapes:
        for count in tokens:
            for kind, groups_of_kind in found.items():
                if kind == "quantizer":
                    if (count, shape.in_features) in quantized:
                        continue
                    quantized.add((count, shape.in_features))
                elif (kind == "experts") != bool(shape.experts):
                    continue
                for group in groups_of_kind:
                    yield kind, group, shape, count


def _lines(
    bench: Bench, kind: str, group: Group, shape: Shape, tokens: int, ceilings: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Yield the records of one group, shape and number of tokens: the references first, what failed last."""
    rows = tokens * shape.top if kind == "experts" else tokens
    experts = (shape.experts,) if shape.experts else ()
    size = (*experts, shape.out_features, shape.in_features)
    weight = torch.randn(size, dtype=bench.dtype, device=bench.device).div_(shape.in_features**0.5)
    wrong: list[dict[str, Any]] = []

    def prepared(cases: dict[str, Case]) -> Iterator[Prepared]:
        for name, case in cases.items():
            x = activations(rows, shape.in_features, bench.dtype, case.outliers, str(bench.device))
            ready = _prepared(bench, name, case, x, weight, shape)
            if isinstance(ready, str):
                bench.failed.add(name)
                wrong.append(_record(name, kind, case, shape, tokens, ready))
                continue
            yield ready

    references = list(prepared(group.references))
    if not references:
        yield from wrong
        return
    for ready, taken in bench.timed(references, prepared(group.cases)):
        if isinstance(taken, str):
            bench.failed.add(ready.name)
            wrong.append(_record(ready.name, kind, ready.case, shape, tokens, taken))
            continue
        against = min(taken.references, key=taken.references.__getitem__)
        record = _record(ready.name, kind, ready.case, shape, tokens, "")
        record |= {
            "microseconds": round(taken.seconds * 1e6, 2),
            "least": round(taken.least * 1e6, 2),
            "most": round(taken.most * 1e6, 2),
            "settled": taken.settled,
            "against": against,
            "times_float": round(taken.references[against] / taken.seconds, 3),
            "bytes": ready.moved,
            "operations": ready.operations,
        }
        if bench.device.type == "cuda":
            as_fast = ready.has_fp8 and architecture(bench.device) < 89
            floor = roofline.floor_seconds(ready.moved, ready.operations, ready.case.multiplies, ceilings, not as_fast)
            record["share"] = round(floor / taken.seconds, 3)
        yield record
    yield from wrong


def _prepared(bench: Bench, name: str, case: Case, x: Tensor, weight: Tensor, shape: Shape) -> Prepared | str:
    """Return the case ready to be timed, or what is wrong with its result."""
    try:
        operands = case.prepare(x, weight)
        out = case.run(*operands)
        if not is_right(case, operands, out):
            return WRONG
    except (
        Exception
    ) as error:  # another library's, a card too small, or a kernel's: the line says it, and the exit code
        return _refusal(error)
    moved, operations = roofline.work(case, operands, out, shape.out_features, shape.in_features)
    fp8 = any(isinstance(each, Tensor) and each.dtype.itemsize == 1 and each.is_floating_point() for each in operands)
    return Prepared(name, case, rotated(case, operands, bench.cache_bytes), moved, operations, fp8)


def _refusal(error: Exception) -> str:
    """Return what a line says of an op that raised this."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"does not run: {type(error).__name__}: {first[:160]}"


def _record(name: str, kind: str, case: Case, shape: Shape, tokens: int, said: str) -> dict[str, Any]:
    """Return the record of a line that has no time yet."""
    return {
        "op": name,
        "kind": kind,
        "shape": str(shape),
        "out_features": shape.out_features,
        "in_features": shape.in_features,
        "experts": shape.experts,
        "tokens": tokens,
        "said": said,
        "graph": case.graph,
        **dict.fromkeys(("microseconds", "least", "most", "settled", "against", "times_float", "bytes", "operations")),
        "share": None,
    }


def _timed_on_cpu(references: list[Prepared], others: Iterator[Prepared], seconds: float) -> Timed:
    """Return each with its fastest call; all of them take turns."""
    every = [*references, *others]
    taken = cpu_clock.seconds({str(i): each.calls for i, each in enumerate(every)}, seconds, ROUNDS)
    beside = {each.name: taken[str(i)][0] for i, each in enumerate(references)}
    for i, each in enumerate(every):
        times = taken[str(i)]
        yield each, Time(times[0], times[0], times[-1], beside, cpu_clock.is_settled(times))


def _timed_on_gpu(references: list[Prepared], others: Iterator[Prepared], seconds: float) -> Timed:
    """Return each with its median; each of the others takes turns with the references, whose graphs stay."""
    graphs: dict[str, gpu_clock.Recorded] = {}
    for each in references:
        recorded = _recorded(each)
        if isinstance(recorded, str):
            yield each, recorded
        else:
            graphs[each.name] = recorded
    alone = [gpu_clock.spread(each) for each in gpu_clock.in_turn(list(graphs.values()), seconds)]
    beside = {name: median for name, (median, _, _) in zip(graphs, alone, strict=True)}
    timed = [each for each in references if each.name in graphs]
    for each, (median, low, high) in zip(timed, alone, strict=True):
        yield each, Time(median, low, high, beside)
    for each in others:
        recorded = _recorded(each) if graphs else "not timed: there is no float work to compare with"
        if isinstance(recorded, str):
            yield each, recorded
        else:
            taken = gpu_clock.in_turn([*graphs.values(), recorded], seconds)
            *theirs, (median, low, high) = map(gpu_clock.spread, taken)
            yield each, Time(median, low, high, {name: time[0] for name, time in zip(graphs, theirs, strict=True)})
        del recorded
        each.calls.clear()
        gc.collect()
        torch.cuda.empty_cache()


def _recorded(ready: Prepared) -> gpu_clock.Recorded | str:
    """Return the calls as a graph, or why they cannot be one: memory, or something that waits for the device."""
    try:
        return gpu_clock.Recorded(ready.calls, ready.case.graph)
    except RuntimeError as error:
        return _refusal(error)


def introduction(result: dict[str, Any]) -> str:
    """Return the lines above a table: the machine, what was measured of it, and what else took part."""
    machine = result["machine"]
    known = {key: value for key, value in machine.items() if value not in (None, [], "")}
    lines = [", ".join(f"{key} {value}" for key, value in known.items())]
    copied, multiplied = (result["ceilings"][key] for key in ("copy_bytes_per_second", "product_operations_per_second"))
    product = "bfloat16 product" if machine.get("architecture") else "the faster float product"
    lines.append(
        f"in this run: copy {copied / 1e9:,.0f} GB/s (read and written), {product} {multiplied / 1e12:,.4g} TFLOP/s"
    )
    if machine.get("architecture"):  # on a CPU no other library is measured
        lines.append("beside: " + ", ".join(f"{name} {said}" for name, said in result["beside"].items()))
    return "\n".join(lines)


def heading(record: dict[str, Any]) -> str:
    """Return the line above the lines of one shape and number of tokens."""
    shape = f"K {record['in_features']}" if record["kind"] == "quantizer" else record["shape"]
    return f"{shape}, tokens {record['tokens']}"


def line(record: dict[str, Any]) -> str:
    """Return a record on a line: its time and spread, the ratio to the float work, the share of the roofline."""
    name = f"  {record['op']:38}"
    if record["microseconds"] is None:
        return f"{name} {record['said']}"
    spread = f"{_figure(record['least'])} to {_figure(record['most'])}"
    share = "" if record["share"] is None else f"  {record['share']:5.2f} of the roofline"
    ratio = f"{record['times_float']:6.2f}x {record['against']}"
    notes = ("" if record["settled"] else "  (disturbed)") + ("" if record["graph"] else "  (no CUDA graph)")
    return f"{name} {_figure(record['microseconds']):>10} us  ({spread})  {ratio}{share}{notes}"


def _figure(microseconds: float) -> str:
    """Return microseconds to four figures, or whole."""
    return f"{microseconds:,.0f}" if microseconds >= 1000 else f"{microseconds:.4g}"
