"""One linear layer on a CPU, quantized and in float, side by side: a table of ratios, and JSON.

    OMP_NUM_THREADS=2 python kernels/bench/cpu_linear.py --json kernels/results/cpu-NAME.json

Each line is one op, one shape and one number of tokens. A ratio says how many times as fast as the faster of F.linear
in float32 and in bfloat16 it is; all are measured in the same run, in turn, and every number is that of the fastest
single call, which others must come close to: where the machine was too busy for that, the line says so. "hot" repeats
one layer, whose weight then stays in cache if it fits; "cold" goes round copies of it that together are larger than the
last cache, as a model's layers do. Weights and activations are random. Each op's result is checked against float64
first, and an op whose check fails gets no time.

Set ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI to see a processor that multiplies int8 but no bfloat16.
"""

import argparse
import bisect
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from quantkit_kernels import cpu, decoded, formats, ops
from torch import Tensor

SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632), (1024, 1024), (2816, 1024))
TOKENS = (1, 2, 4, 8, 16, 64, 512)
E4M3 = torch.float8_e4m3fn
SETTLED = 5
"""So many calls must have taken no more than a twentieth longer than the fastest: else a line is called disturbed."""
OUTLIERS = 6
"""Columns of x that LLM.int8 keeps in float: some of a thousand features, as in the models of its paper."""


@dataclass(frozen=True)
class Case:
    """One op on one weight: how to prepare a weight, run it, and what it must give.

    Attributes:
        prepare: a float weight [N, K] to what `run` takes.
        run: activations and what was prepared to the output.
        given: activations [M, K] and the prepared to what the product's left and right side are in float64, and the
            number of float32 roundings and of roundings to x's dtype that the op may make.
        outliers: whether some columns of x are outliers.
    """

    prepare: Callable[[Tensor], tuple[Tensor, ...]]
    run: Callable[[Tensor, tuple[Tensor, ...]], Tensor]
    given: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor, int, int]]
    outliers: bool = False


def by_token(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x quantized per token, in float64."""
    codes, scale = formats.quantize_per_token(x, dtype)
    return codes.double() * scale.double()


def by_tensor(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x quantized with one scale, in float64."""
    codes, scale = formats.quantize_per_tensor(x, dtype)
    return codes.double() * scale.double()


def by_group(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x quantized in groups of 128, in float64."""
    codes, scale = formats.quantize_per_group(x, dtype)
    return (codes.double().view(*scale.shape, -1) * scale.double().unsqueeze(-1)).view(x.shape)


def mixed(x: Tensor, threshold: float) -> Tensor:
    """Return x as LLM.int8 multiplies it, in float64."""
    outlier = (x.abs() >= threshold).any(0)
    rest = by_token(x.masked_fill(outlier, 0.0), torch.int8)
    return torch.where(outlier, x.double(), rest)


def rows(weight: tuple[Tensor, ...]) -> Tensor:
    """Return the decoded weight in float64, from codes and a scale for each row."""
    return formats.dequantize(weight[0], weight[1].double())


def cases(dtype: torch.dtype) -> dict[str, Case]:
    """Return every op by name, for activations in the dtype.

    Roundings in float32: 4 in the epilogue of an exact sum, and one for each term of a float one.
    """
    code = {"int8": torch.int8, "fp8": E4M3}
    low = 2 if dtype == torch.bfloat16 else 1

    def quantized(name: str, granularity: str = "row") -> Callable[[Tensor], tuple[Tensor, ...]]:
        return lambda weight: formats.quantize_weight(weight, code[name], granularity=granularity)

    def packed(weight: Tensor) -> tuple[Tensor, ...]:
        codes, scale = formats.quantize_weight(weight, torch.int8)
        return formats.pack_int32(codes, 8), scale, codes

    def groups_of_4_bits(weight: Tensor) -> tuple[Tensor, ...]:
        codes, scale = formats.quantize_weight(weight, torch.int8, 128, bits=4)
        kept = decoded.decode_weight("linear_weight_only_packed", codes, scale, dtype)
        return formats.pack_int32(codes, 4), scale, codes, kept

    def keep(op: str, name: str, granularity: str = "row") -> Callable[[Tensor], tuple[Tensor, ...]]:
        def prepare(weight: Tensor) -> tuple[Tensor, ...]:
            codes, scale = formats.quantize_weight(weight, code[name], granularity=granularity)
            return codes, scale, decoded.decode_weight(op, codes, scale, dtype)

        return prepare

    def kept(op: str, name: str) -> Callable[[Tensor, tuple[Tensor, ...]], Tensor]:
        return lambda x, w: decoded.linear(op, x, w[2], code[name], w[1], None, None)

    def blocks(weight: tuple[Tensor, ...]) -> Tensor:
        return formats.dequantize_weight(weight[0], weight[1].double(), "block")

    found = {
        "w8a8": Case(
            quantized("int8"),
            lambda x, w: ops.linear_dynamic(x, w[0], w[1], None),
            lambda x, w: (by_token(x, torch.int8), rows(w), 4, 1),
        ),
        "w8a8 tensor": Case(
            quantized("int8"),
            lambda x, w: ops.linear_tensor(x, w[0], w[1], None, None),
            lambda x, w: (by_tensor(x, torch.int8), rows(w), 4, 1),
        ),
        "fp8": Case(
            quantized("fp8"),
            lambda x, w: ops.linear_dynamic(x, w[0], w[1], None),
            lambda x, w: (by_token(x, E4M3), rows(w), x.shape[1] + 4, 1),
        ),
        "fp8, kept": Case(
            keep("linear_dynamic", "fp8"),
            kept("linear_dynamic", "fp8"),
            lambda x, w: (by_token(x, E4M3), rows(w), x.shape[1] + 4, low),
        ),
        "fp8 tensor": Case(
            quantized("fp8"),
            lambda x, w: ops.linear_tensor(x, w[0], w[1], None, None),
            lambda x, w: (by_tensor(x, E4M3), rows(w), x.shape[1] + 4, 1),
        ),
        "fp8 tensor, kept": Case(
            keep("linear_tensor", "fp8"),
            kept("linear_tensor", "fp8"),
            lambda x, w: (by_tensor(x, E4M3), rows(w), x.shape[1] + 4, low),
        ),
        "fp8 block": Case(
            quantized("fp8", "block"),
            lambda x, w: ops.linear_block(x, w[0], w[1], None),
            lambda x, w: (by_group(x, E4M3), blocks(w), 130 + x.shape[1] // 128, 1),
        ),
        "fp8 block, kept": Case(
            keep("linear_block", "fp8", "block"),
            kept("linear_block", "fp8"),
            lambda x, w: (by_group(x, E4M3), blocks(w), x.shape[1] + 4, -3 if low == 2 else 1),
        ),
        "int8 weights": Case(
            quantized("int8"),
            lambda x, w: ops.linear_weight_only(x, w[0], w[1], None),
            lambda x, w: (x.double(), rows(w), x.shape[1] + 1, -3),
        ),
        "int8 weights, packed": Case(
            packed,
            lambda x, w: ops.linear_weight_only_packed(x, w[0], w[1], None, 8),
            lambda x, w: (x.double(), rows((w[2], w[1])), x.shape[1] + 1, -3),
        ),
        "int4 weights, packed": Case(
            groups_of_4_bits,
            lambda x, w: ops.linear_weight_only_packed(x, w[0], w[1], None, 4),
            lambda x, w: (x.double(), rows((w[2], w[1])), x.shape[1] + 1, -3),
        ),
        "int4 weights, kept": Case(
            groups_of_4_bits,
            lambda x, w: decoded.linear("linear_weight_only_packed", x, w[3], torch.int8, w[1], None, None),
            lambda x, w: (x.double(), rows((w[2], w[1])), x.shape[1] + 1, -3),
        ),
        "int8 weights, kept": Case(
            keep("linear_weight_only", "int8"),
            kept("linear_weight_only", "int8"),
            lambda x, w: (x.double(), rows(w), x.shape[1] + 1, -3),
        ),
        "fp8 weights": Case(
            quantized("fp8"),
            lambda x, w: ops.linear_weight_only(x, w[0], w[1], None),
            lambda x, w: (x.double(), rows(w), x.shape[1] + 1, -3),
        ),
        "fp8 weights, kept": Case(
            keep("linear_weight_only", "fp8"),
            kept("linear_weight_only", "fp8"),
            lambda x, w: (x.double(), rows(w), x.shape[1] + 1, -3),
        ),
    }
    for name, outliers in (("llm-int8, no outliers", False), (f"llm-int8, {OUTLIERS} outliers", True)):
        found[name] = Case(
            quantized("int8"),
            lambda x, w: ops.linear_llm_int8(x, w[0], w[1], None, 6.0),
            lambda x, w: (mixed(x, 6.0), rows(w), x.shape[1] + 6, 1),
            outliers,
        )
    return found


def is_right(case: Case, x: Tensor, weight: tuple[Tensor, ...]) -> bool:
    """Return whether the op's result is within its bound of float64, on the first and the last tokens.

    A negative number of roundings counts those of the weight or activations too: they are of the sum of magnitudes.
    """
    out = case.run(x, weight)
    left, right, float32, rounded = case.given(x, weight)
    some = torch.cat([torch.arange(min(8, len(x))), torch.arange(max(0, len(x) - 8), len(x))])
    exact, size = left[some] @ right.t(), left[some].abs() @ right.abs().t()
    unit = torch.finfo(x.dtype).eps / 2
    bound = 1.01 * float32 * 2.0**-24 * size + abs(rounded) * unit * (size if rounded < 0 else exact.abs()) + 1e-30
    return out.dtype == x.dtype and bool(((out[some].double() - exact).abs() <= bound * 1.01).all())


def seconds(runs: dict[str, list[Callable[[], Tensor]]], budget: float, rounds: int) -> dict[str, list[float]]:
    """Return the least SETTLED seconds of single calls of each name, whose calls go round its list, names in turn.

    A name's turns end early once its least is no chance, which two rounds at least must say.
    """
    least: dict[str, list[float]] = {name: [] for name in runs}
    clock = time.perf_counter
    for turn in range(rounds):
        for name, calls in runs.items():
            if turn > 1 and is_settled(least[name]):
                continue
            calls[0]()
            done, end, now = 0, clock() + budget / rounds, 0.0
            while now < end and not (done >= SETTLED and is_settled(least[name])):
                for call in calls:
                    begun = clock()
                    call()
                    now = clock()
                    bisect.insort(least[name], now - begun)
                    del least[name][SETTLED:]
                done += len(calls)
    return least


def is_settled(least: list[float]) -> bool:
    """Return whether as many calls as SETTLED says took no more than a twentieth longer than the fastest."""
    return len(least) == SETTLED and least[-1] <= 1.05 * least[0]


def activations(tokens: int, in_features: int, dtype: torch.dtype, outliers: bool) -> Tensor:
    """Return random activations below 6, with outliers in some columns where asked for."""
    x = torch.randn(tokens, in_features).clamp(-5.5, 5.5)
    if outliers:
        x[:, torch.randperm(in_features)[:OUTLIERS]] *= 20.0
        x[0, 0] = 60.0
    return x.to(dtype)


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """Return a record for each op, shape and number of tokens, and write a line for each as it comes."""
    dtype, records = getattr(torch, options.dtype), []
    chosen = {name: case for name, case in cases(dtype).items() if not options.ops or name in options.ops}
    for out_features, in_features in options.shapes:
        for tokens in options.tokens:
            weight = torch.randn(out_features, in_features) / in_features**0.5
            x = {outliers: activations(tokens, in_features, dtype, outliers) for outliers in (False, True)}
            plain = {each: (x[False].to(each), weight.to(each)) for each in (torch.float32, torch.bfloat16)}
            runs = {
                str(each)[6:]: copies(lambda x, w: F.linear(x, w[0]), x_, (w,), options)
                for each, (x_, w) in plain.items()
            }
            wrong = []
            for name, case in chosen.items():
                prepared = case.prepare(weight.to(dtype))
                if not is_right(case, x[case.outliers], prepared):
                    wrong.append(name)
                    continue
                runs[name] = copies(case.run, x[case.outliers], prepared, options)
            taken = seconds(runs, options.seconds, options.rounds)
            least = {name: min(each) for name, each in taken.items()}
            float_seconds = min(least["float32"], least["bfloat16"])
            sys.stdout.write(f"\n{out_features} x {in_features}, tokens {tokens}, {options.cache}\n")
            for name in (*least, *wrong):
                best = least.get(name)
                records.append(
                    {
                        "op": name,
                        "out_features": out_features,
                        "in_features": in_features,
                        "tokens": tokens,
                        "cache": options.cache,
                        "microseconds": None if best is None else round(best * 1e6, 1),
                        "times_float": None if best is None else round(float_seconds / best, 2),
                        "settled": best is not None and is_settled(taken[name]),
                    }
                )
                said = "WRONG, not timed" if best is None else f"{best * 1e6:10.0f} us  {float_seconds / best:6.2f}x"
                if best is not None and not is_settled(taken[name]):
                    said += "  (disturbed)"
                sys.stdout.write(f"  {name:24} {said}\n")
            sys.stdout.flush()
    return records


def copies(
    run: Callable[[Tensor, tuple[Tensor, ...]], Tensor],
    x: Tensor,
    weight: tuple[Tensor, ...],
    options: argparse.Namespace,
) -> list[Callable[[], Tensor]]:
    """Return calls of the layer: one, or when cold as many with weights of their own as exceed the last cache."""
    read = weight[2] if len(weight) == 3 and weight[2].dtype in formats.FLOAT_DTYPES else weight[0]
    size = read.numel() * read.element_size()
    count = 1 if options.cache == "hot" else 1 + -(-2 * options.cache_bytes // size)
    layers = [weight, *(tuple(tensor.clone() for tensor in weight) for _ in range(count - 1))]
    return [functools.partial(run, x, each) for each in layers]


def last_cache_bytes() -> int:
    """Return the size of the largest cache that Linux tells of; 32 MiB where it tells of none."""
    found = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        found.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]] if text[-1] in "KM" else int(text))
    return max(found) or 32 << 20


def machine() -> dict[str, object]:
    """Return what the numbers depend on: processor, versions, threads."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    said = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in said.items()}
    flags = fields.get("flags", "").split()
    return {
        "processor": fields.get("model name", platform.processor()),
        "family_model": f"{fields.get('cpu family')}/{fields.get('model')}",
        "features": [flag for flag in flags if flag.startswith(("avx512", "amx", "avx_vnni"))],
        "cores": os.cpu_count(),
        "last_cache_bytes": last_cache_bytes(),
        "threads": torch.get_num_threads(),
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "exact_int_mm": cpu.has_exact_int_mm(),
    }


def arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def shape(text: str) -> tuple[int, int]:
        out_features, in_features = text.split("x")
        return int(out_features), int(in_features)

    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--ops", nargs="+", help="names as in the table; all by default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the activations")
    parser.add_argument("--cache", choices=("hot", "cold"), default="hot")
    parser.add_argument("--seconds", type=float, default=2.0, help="at most, for each line")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write, or add to, a file of records")
    options = parser.parse_args()
    options.cache_bytes = last_cache_bytes()
    return options


def main() -> None:
    """Measure, and write the records where asked for."""
    options = arguments()
    torch.manual_seed(0)
    here = machine()
    sys.stdout.write(json.dumps(here) + "\n")
    with torch.inference_mode():
        records = measure(options)
    if options.json is not None:
        known = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else []
        known.append({"machine": here, "dtype": options.dtype, "records": records})
        options.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if any(record["microseconds"] is None for record in records):
        sys.exit("an op's result is wrong: it has no time")


if __name__ == "__main__":
    main()
