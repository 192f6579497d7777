"""Compile a Triton kernel without a GPU and say what became of it; run the programs that do so.

Used by the programs `compile_*.py` and by the tests beside them. An interpreted kernel cannot be compiled, so the
programs of the two kinds each run in a process of their own: `run`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import triton
from quantkit_kernels import configurations
from quantkit_kernels.gpu.tiles import TileConfig
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HERE = Path(__file__).parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one program may use, in bytes (CUDA C++ Programming Guide, technical specifications)."""

TENSOR_CORE = re.compile(r"(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*")

FP8 = {"fp8e4nv": "e4m3", "fp8e5": "e5m2"}
FP8_INSTRUCTION = {
    89: r"mma\.sync\.aligned\.m16n8k32\.row\.col\.f32\.{0}\.{0}\.f32",
    90: r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.{0}\.{0}",
    100: r"tcgen05\.mma\.cta_group::1\.kind::f8f6f4",
    120: r"mma\.sync\.aligned\.m16n8k32\.row\.col\.f32\.{0}\.{0}\.f32",
}
"""What an fp8 product becomes, and nothing else: wider codes would be float16 products at half of the speed."""


def source(
    kernel: object,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    divisible: Iterable[str] = (),
) -> ASTSource:
    """Return the kernel with the specialization that a launch would give it.

    Args:
        kernel: a function under `triton.jit`.
        signature: the type of each argument that is not a constant, such as "*bf16", "*i8", "*fp8e4nv", "i32".
        constants: compile-time constants; also arguments that are None or 1 (Triton makes them constants).
        divisible: arguments that are multiples of 16 (pointers: addresses). Without it loads are not vectorized.
    """
    names = kernel.arg_names
    types = {name: kind for name, kind in signature.items() if name not in constants}
    missing = set(names) ^ (set(types) | set(constants))
    assert not missing, f"arguments without a type, or unknown: {sorted(missing)}"
    return ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible if name in types},
    )


def compiled(
    kernel: object,
    architecture: int,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    divisible: Iterable[str] = (),
    **options: object,
) -> dict[str, object]:
    """Return what one compilation became, as JSON can hold it; `options` are num_warps, num_stages and the like.

    The keys: architecture; instructions (tensor core instructions in the PTX, each once); shared (bytes);
    registers (of a thread); spilled (bytes of stack and local memory of a thread); fused (float32 fused multiply-adds);
    added (float32 additions in the PTX, but for the packed ones of sm_100 and later);
    rounds_to_bf16 (whether something is rounded to bfloat16); loads (the kinds of load from global memory).
    """
    made = triton.compile(
        source(kernel, signature, constants, divisible), target=GPUTarget("cuda", architecture, 32), options=options
    )
    ptx, cubin = made.asm["ptx"], made.asm["cubin"]
    usage = _cuobjdump("--dump-resource-usage", cubin=cubin)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "architecture": architecture,
        "instructions": sorted(set(TENSOR_CORE.findall(ptx))),
        "shared": made.metadata.shared,
        "registers": numbers["REG"],
        "spilled": numbers["STACK"] + numbers["LOCAL"],
        "fused": len(re.findall(r"\bFFMA\b", _cuobjdump("-sass", cubin=cubin))),
        "added": len(re.findall(r"\b(?:add|sub)(?:\.rn)?\.f32\b", ptx)),
        "rounds_to_bf16": "cvt.rn.bf16" in ptx,
        "loads": sorted(set(re.findall(r"\b(?:ld\.global|cp\.async\.c[ag])[\w.:]*", ptx))),
    }


def configs(kernel: str, architecture: int) -> list[TileConfig]:
    """Return the configurations of a scaled product in the package's table of the architecture, each once."""
    path = configurations.PACKAGE_TABLES / f"sm_{architecture}.json"
    return list(dict.fromkeys(TileConfig(**entry.config) for entry in configurations.table(path).kernels[kernel]))


def _cuobjdump(*arguments: str, cubin: bytes) -> str:
    """Return what NVIDIA's cuobjdump, which comes with Triton, says about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = os.pathsep.join((str(TOOLS), os.environ.get("PATH", "")))
        command = [str(TOOLS / "cuobjdump"), *arguments, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path})
    return done.stdout


def emit(line: Mapping[str, object]) -> None:
    """Print one JSON object as a line: what `lines` reads in the test."""
    print(json.dumps(line), flush=True)  # noqa: T201 (what the test reads)


def run(program: str, *arguments: str, cache: Path, interpret: bool = False) -> str:
    """Return what the program beside this file printed, in a process of its own; show all of it where it failed."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["XDG_CACHE_HOME"] = str(cache)  # configurations that a user has measured are not what we test
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(HERE / program), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{program} failed\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def lines(program: str, *arguments: str, cache: Path) -> list[dict[str, object]]:
    """Return the JSON objects that a `compile_*.py` program printed."""
    return [json.loads(line) for line in run(program, *arguments, cache=cache).splitlines()]


def check(line: Mapping[str, object], instruction: str) -> None:
    """Assert that a compilation uses just this tensor core instruction (a pattern), fits into shared memory and spills
    nothing. An empty pattern: no tensor cores at all."""
    found = line["instructions"]
    if instruction:
        assert len(found) == 1, line
        assert re.fullmatch(instruction, found[0]), line
    else:
        assert not found, line
    assert line["shared"] <= SHARED_LIMIT[line["architecture"]], line
    assert line["spilled"] == 0, line
