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
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from quantkit_kernels import cpu_int4, decoded, formats
from quantkit_kernels.benchmarks.cases import (
    CODES,
    E4M3,
    Case,
    Given,
    Operands,
    activations,
    by_group,
    by_tensor,
    by_token,
    coded,
    floats,
    linear_cases,
    llm_int8,
    product_with,
    pruned,
    rotated,
)
from quantkit_kernels.benchmarks.cases import decoded as decoded_rows
from quantkit_kernels.benchmarks.correctness import is_right
from quantkit_kernels.benchmarks.cpu_clock import is_settled, last_cache_bytes, machine, seconds
from torch import Tensor

SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632), (1024, 1024), (2816, 1024))
TOKENS = (1, 2, 4, 8, 16, 64, 512)
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
REORDERED = "int4 weights, reordered"
"""What a loaded model does with few tokens in bfloat16, the only dtype that it is measured in."""

OUTLIERS = 6
"""Columns of x that LLM.int8 keeps in float: some of a thousand features, as in the models of its paper."""


def kept(op: str, name: str, given: Callable[[Tensor, Tensor, Tensor], Given], granularity: str = "row") -> Case:
    """Return the case of a weight that is kept as it was decoded; `given` takes x, codes and scale."""
    dtype = CODES.get(name, torch.int8)

    def prepare(x: Tensor, weight: Tensor) -> Operands:
        group, bits = (128, 4) if name == "int4" else (None, 8)
        codes, scale = formats.quantize_weight(weight, dtype, group, granularity=granularity, bits=bits)
        return x, decoded.decode_weight(op, codes, scale, x.dtype), scale, codes

    return Case(
        prepare,
        lambda x, weight, scale, codes: decoded.linear(op, x, weight, dtype, scale, None, None),
        lambda x, weight, scale, codes: given(x, codes, scale),
        reads=3,
    )


def reordered(given: Callable[[Tensor, Tensor, Tensor], Given]) -> Case:
    """Return the case of 4-bit codes that are kept in the order of torch's kernel, for bfloat16."""

    def prepare(x: Tensor, weight: Tensor) -> Operands:
        codes, scale = formats.quantize_weight(weight.bfloat16(), torch.int8, 128, bits=4)
        return x, *cpu_int4.repack(codes, scale), codes, scale

    return Case(
        prepare,
        lambda x, weight, scales, codes, scale: cpu_int4.linear(x, weight, scales, None),
        lambda x, weight, scales, codes, scale: given(x, codes, scale),
        reads=3,
    )


def kept_sparse(name: str) -> Case:
    """Return the case of a 2:4 weight that is kept as it was unpacked and decoded; the name of codes, or none."""
    dtype = CODES.get(name, torch.int8)

    def prepare(x: Tensor, weight: Tensor) -> Operands:
        codes, scale, _ = coded(pruned(weight), name)
        one = torch.ones(len(codes), 1) if scale is None else scale
        return x, decoded.decode_weight("linear_sparse24", codes, one, x.dtype), one, codes, scale

    return Case(
        prepare,
        lambda x, weight, one, codes, scale: decoded.linear("linear_sparse24", x, weight, dtype, one, None, None),
        lambda x, weight, one, codes, scale: product_with(x, codes, scale),
        reads=3,
    )


def low(x: Tensor) -> int:
    """Return how many roundings to x's dtype a sum of decoded codes is given."""
    return 2 if x.dtype == torch.bfloat16 else 1


def cases() -> dict[str, Case]:
    """Return every op by name."""

    def weights(x: Tensor, codes: Tensor, scale: Tensor) -> Given:
        return x.double(), decoded_rows(codes, scale), x.shape[1] + 1, -3

    def blocks(x: Tensor, codes: Tensor, scale: Tensor) -> Given:
        weight = formats.dequantize_weight(codes, scale.double(), "block")
        return by_group(x, E4M3), weight, x.shape[1] + 4, -3 if low(x) == 2 else 1

    def tokens(x: Tensor, codes: Tensor, scale: Tensor) -> Given:
        return by_token(x, E4M3), decoded_rows(codes, scale), x.shape[1] + 4, low(x)

    def tensor(x: Tensor, codes: Tensor, scale: Tensor) -> Given:
        return by_tensor(x, E4M3), decoded_rows(codes, scale), x.shape[1] + 4, low(x)

    found = {name: case for name, case in linear_cases().items() if not name.startswith("llm-int8, 0")}
    found |= {
        "fp8, kept": kept("linear_dynamic", "fp8", tokens),
        "fp8 tensor, kept": kept("linear_tensor", "fp8", tensor),
        "fp8 block, kept": kept("linear_block", "fp8", blocks, "block"),
        REORDERED: reordered(weights),
        "int4 weights, kept": kept("linear_weight_only_packed", "int4", weights),
        "int8 weights, kept": kept("linear_weight_only", "int8", weights),
        "fp8 weights, kept": kept("linear_weight_only", "fp8", weights),
        "2:4 weights, kept": kept_sparse(""),
        "2:4 int8 weights, kept": kept_sparse("int8"),
        "2:4 fp8 weights, kept": kept_sparse("fp8"),
        "2:4 int4 weights, kept": kept_sparse("int4"),
        f"llm-int8, {OUTLIERS} outliers": llm_int8(OUTLIERS),
    }
    return found


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """Return a record for each op, shape and number of tokens, and write a line for each as it comes."""
    dtype, records = getattr(torch, options.dtype), []
    chosen = {name: case for name, case in cases().items() if not options.ops or name in options.ops}
    if dtype != torch.bfloat16:
        chosen.pop(REORDERED, None)
    for out_features, in_features in options.shapes:
        for tokens in options.tokens:
            weight = torch.randn(out_features, in_features) / in_features**0.5
            x = {outliers: activations(tokens, in_features, dtype, outliers) for outliers in (0.0, OUTLIERS)}
            runs, wrong = {}, []
            for each in (torch.float32, torch.bfloat16):
                case = floats(each)
                runs[str(each)[6:]] = rotated(case, case.prepare(x[0.0], weight), options.cache_bytes)
            for name, case in chosen.items():
                operands = case.prepare(x[case.outliers], weight.to(dtype))
                if not is_right(case, operands, case.run(*operands)):
                    wrong.append(name)
                    continue
                runs[name] = rotated(case, operands, options.cache_bytes)
            taken = seconds(runs, options.seconds, options.rounds, CLOCKS[options.clock])
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
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="process: of one thread, on a machine that is not idle"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="at most, for each line")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write, or add to, a file of records")
    options = parser.parse_args()
    options.cache_bytes = 0 if options.cache == "hot" else last_cache_bytes()
    return options


def main() -> None:
    """Measure, and write the records where asked for."""
    options = arguments()
    torch.manual_seed(0)
    here = machine() | {"clock": options.clock}
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
