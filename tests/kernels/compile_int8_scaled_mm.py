"""Program: compile the W8A8 kernel without a GPU and print, one JSON object a line, what became of it.

Run by test_int8_scaled_mm.py in a process of its own. Arguments: "one" (the large tile, aligned) or "all", then the
architectures, such as 80 90 100.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import triton
from quantkit_kernels.int8_scaled_mm import CONFIGS, GROUP_M, UNALIGNED, TileConfig, int8_scaled_mm_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "a_mk": "*i8", "b_nk": "*i8", "c_mn": "*bf16", "scale_m": "*fp32", "scale_n": "*bf16", "bias_n": "*bf16",
}  # fmt: skip
SIZES = ("M", "N", "K", "stride_am", "stride_bn", "stride_cm")
TENSOR_CORE = re.compile(r"(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*")


def source(config: TileConfig, aligned: bool, out: str, has_bias: bool, ones: bool) -> ASTSource:
    """Return the kernel with the specialization that a launch would give it.

    `aligned`: all numbers but M are multiples of 16. `ones`: M, N, K and strides are 1, which Triton makes constants.
    """
    constants: dict[str, object] = {
        "HAS_BIAS": has_bias,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": GROUP_M,
    }
    if ones:
        constants |= dict.fromkeys(SIZES, 1)
    signature = {**POINTERS, "c_mn": f"*{out}", **dict.fromkeys(SIZES, "i32")}
    signature |= dict.fromkeys(constants, "constexpr")
    names = int8_scaled_mm_kernel.arg_names
    divisible = [name for name in (*POINTERS, *SIZES) if aligned and name != "M" and name not in constants]
    return ASTSource(
        int8_scaled_mm_kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )


def tool(*arguments: str, cubin: bytes) -> str:
    """Return what NVIDIA's cuobjdump, which comes with Triton, says about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = os.pathsep.join((str(TOOLS), os.environ.get("PATH", "")))
        command = [str(TOOLS / "cuobjdump"), *arguments, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path})
    return done.stdout


def compiled(architecture: int, config: TileConfig, **what: object) -> dict[str, object]:
    """Return instruction, shared memory, registers, spilled bytes and fused multiply-adds of one compilation."""
    kernel = triton.compile(
        source(config, **what),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": False},
    )
    usage = tool("--dump-resource-usage", cubin=kernel.asm["cubin"])
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "architecture": architecture,
        "config": asdict(config),
        **what,
        "instructions": sorted(set(TENSOR_CORE.findall(kernel.asm["ptx"]))),
        "shared": kernel.metadata.shared,
        "registers": numbers["REG"],
        "spilled": numbers["STACK"] + numbers["LOCAL"],
        "fused": len(re.findall(r"\bFFMA\b", tool("-sass", cubin=kernel.asm["cubin"]))),
        "rounds_to_bf16": "cvt.rn.bf16" in kernel.asm["ptx"],
    }


def main() -> None:
    """Compile what was asked for and print a line for each."""
    amount, *architectures = sys.argv[1:]
    large = CONFIGS[-1][1]
    kinds = [(large, True, "bf16", True, False)]
    if amount == "all":
        configs = [config for _, config in CONFIGS]
        kinds = list(itertools.product(configs, [True], ["bf16", "fp16", "fp32"], [True, False], [False]))
        kinds += list(itertools.product([UNALIGNED], [False], ["bf16", "fp16", "fp32"], [True, False], [False]))
        kinds += [(UNALIGNED, False, "bf16", True, True)]
    for architecture, (config, aligned, out, has_bias, ones) in itertools.product(map(int, architectures), kinds):
        what = {"aligned": aligned, "out": out, "has_bias": has_bias, "ones": ones}
        print(json.dumps(compiled(architecture, config, **what)), flush=True)  # noqa: T201 (what the test reads)


if __name__ == "__main__":
    main()
