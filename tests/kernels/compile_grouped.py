"""Program: compile the kernel for experts without a GPU and print, one JSON object a line, what became of it.

Run by test_grouped_kernel.py in a process of its own. Arguments: "one" (the largest tile of each architecture's table
for each kind of product) or "all", then the architectures, such as 80 90 100.
"""

import itertools
import sys
from dataclasses import asdict, replace

import offline
import triton.language as tl
from quantkit_kernels.gpu.fp8_scaled_mm import LEAST_ARCHITECTURE, promotes
from quantkit_kernels.gpu.grouped import grouped_kernel
from quantkit_kernels.gpu.tiles import GROUP_M, SWAP_BELOW, UNALIGNED, TileConfig

COMPUTE = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.bfloat16}
SIZES = ("M", "N", "K", "E", "tiles", "stride_am", "stride_we", "stride_wn", "stride_wk")


def compiled(
    architecture: int,
    config: TileConfig,
    kind: str,
    numbers: str,
    a: str,
    w: str,
    out: str,
    aligned: bool = True,
    transposed: bool = False,
) -> dict[str, object]:
    """Return what became of the kernel; `transposed`: out features are contiguous in the weight, not in features."""
    signature = {"a_mk": f"*{a}", "w_enk": f"*{w}", "c_mn": f"*{out}", "scale_m": "*fp32", "scale_en": "*bf16"}
    signature |= {"offsets_e": "*i32"} | dict.fromkeys(SIZES, "i32")
    constants: dict[str, object] = {
        "KIND": kind,
        "NUMBERS": numbers,
        "COMPUTE": tl.float16 if kind == "half" else COMPUTE[out],
        "EVEN_K": aligned,
        "SWAP": config.block_m < SWAP_BELOW and kind in ("int8", "fp8"),
        "PROMOTE": promotes(architecture),
        "EXPERTS": 128,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": GROUP_M,
        "stride_wn" if transposed else "stride_wk": 1,
    }
    result = offline.compiled(
        grouped_kernel,
        architecture,
        signature,
        constants,
        [name for name in signature if aligned and name not in ("M", "E", "tiles")],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
    )
    return {"config": asdict(config), "kind": kind, "w": w, "out": out, "aligned": aligned, **result}


def shipped(architecture: int) -> list[tuple[object, ...]]:
    """Return the arguments of `compiled` for every product that the architecture is given, the largest tile last."""
    native = architecture >= LEAST_ARCHITECTURE
    fp8 = ("fp8", "fp8e4nv") if native else ("e4m3", "u8")
    weights = [("int8", "i8"), fp8, ("fp8", "fp8e5")]
    found: list[tuple[object, ...]] = []
    for numbers, w in weights:
        kind = "int8" if w == "i8" else ("fp8" if native else "half")
        tiles = offline.configs("grouped_half" if kind == "half" else "grouped", architecture)
        for out, config in itertools.product(("fp16", "fp32", "bf16"), [UNALIGNED, *tiles]):
            found.append((config, kind, numbers, w, w, out, config != UNALIGNED))
        found.append((UNALIGNED, kind, numbers, w, w, "bf16", False, True))
        tiles = offline.configs("grouped_float", architecture)
        for out, config in itertools.product(("fp16", "fp32", "bf16"), [UNALIGNED, *tiles]):
            cut = replace(config, block_k=config.block_k // 2) if out == "fp32" else config
            found.append((cut, "float", numbers, out, w, out, config != UNALIGNED))
        found.append((UNALIGNED, "float", numbers, "bf16", w, "bf16", False, True))
    return found


def main() -> None:
    """Compile what was asked for and print a line for each."""
    amount, *architectures = sys.argv[1:]
    for architecture in map(int, architectures):
        all_of_it = shipped(architecture)
        aligned = [what for what in all_of_it if what[6] and what[4] != "fp8e5" and what[5] == "bf16"]
        largest = {what[1]: what for what in aligned}
        for what in largest.values() if amount == "one" else all_of_it:
            offline.emit(compiled(architecture, *what))


if __name__ == "__main__":
    main()
