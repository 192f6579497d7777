"""Program: compile a scaled product without a GPU and print, one JSON object a line, what became of it.

Run by test_{int8,fp8,block}_scaled_mm.py in a process of its own. Arguments: the kernel, such as fp8_scaled_mm; "one"
(the largest tile of each architecture's table) or "all"; then the architectures, such as 80 90 100.
"""

import itertools
import sys
from dataclasses import asdict

import offline
from quantkit_kernels.gpu.block_scaled_mm import UNALIGNED_BLOCKS, block_scaled_mm_kernel
from quantkit_kernels.gpu.fp8_scaled_mm import fp8_scaled_mm_kernel, promotes
from quantkit_kernels.gpu.int8_scaled_mm import int8_scaled_mm_kernel
from quantkit_kernels.gpu.tiles import GROUP_M, SWAP_BELOW, UNALIGNED, TileConfig

KERNELS = {
    "int8_scaled_mm": (int8_scaled_mm_kernel, ("i8",)),
    "fp8_scaled_mm": (fp8_scaled_mm_kernel, ("fp8e4nv", "fp8e5")),
    "block_scaled_mm": (block_scaled_mm_kernel, ("fp8e4nv", "fp8e5")),
}
SIZES = ("M", "N", "K", "stride_am", "stride_bn", "stride_cm")
SCALES = ("stride_scale_m", "stride_scale_n", "stride_scale_h")


def compiled(
    name: str,
    architecture: int,
    config: TileConfig,
    codes: str,
    out: str,
    has_bias: bool,
    aligned: bool = True,
    even: bool = True,
    ones: bool = False,
) -> dict[str, object]:
    """Return what became of the kernel.

    `aligned`: all numbers but M are multiples of 16. `even`: BLOCK_K divides K. `ones`: M, N, K and strides are 1,
    which Triton makes constants.
    """
    kernel, _ = KERNELS[name]
    blocks = name == "block_scaled_mm"
    constants: dict[str, object] = {
        "HAS_BIAS": has_bias,
        "EVEN_K": even,
        "SWAP": config.block_m < SWAP_BELOW,
        "DESCRIPTORS": bool(config.descriptors),
        "PROMOTE": promotes(architecture),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "HALVES": config.halves,
        "GROUP_M": GROUP_M,
    }
    constants |= dict.fromkeys(SIZES if ones else (), 1) | dict.fromkeys(() if blocks else SCALES, 1)
    signature = {"a_mk": f"*{codes}", "b_nk": f"*{codes}", "c_mn": f"*{out}"}
    if config.descriptors:
        signature["a_mk"] = f"tensordesc<{codes}[{config.block_m}, {config.block_k}]>"
        signature["b_nk"] = f"tensordesc<{codes}[{config.block_n // config.halves}, {config.block_k}]>"
    signature |= {"scale_m": "*fp32", "scale_mg": "*fp32"} | dict.fromkeys(("scale_n", "scale_hg", "bias_n"), "*bf16")
    pointers = {argument for argument, kind in signature.items() if kind.startswith("*")}
    signature |= dict.fromkeys((*SIZES, *SCALES), "i32")
    result = offline.compiled(
        kernel,
        architecture,
        {argument: kind for argument, kind in signature.items() if argument in kernel.arg_names},
        {argument: value for argument, value in constants.items() if argument in kernel.arg_names},
        [argument for argument in (*pointers, *SIZES) if aligned and argument != "M" and argument in kernel.arg_names],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=blocks,
    )
    return {"config": asdict(config), "codes": codes, "out": out, "has_bias": has_bias, **result}


def variants(name: str, architecture: int) -> list[dict[str, object]]:
    """Return the arguments of `compiled` for everything that is shipped for the architecture."""
    _, codes = KERNELS[name]
    epilogues = list(itertools.product(("bf16", "fp16", "fp32"), (True, False)))
    found = []
    for config, of, (out, has_bias) in itertools.product(offline.configs(name, architecture), codes, epilogues):
        found.append({"config": config, "codes": of, "out": out, "has_bias": has_bias})
        if name != "block_scaled_mm" and has_bias:
            found.append({**found[-1], "even": False})
    unaligned = UNALIGNED_BLOCKS if name == "block_scaled_mm" else UNALIGNED
    for of, (out, has_bias) in itertools.product(codes, epilogues):
        what = {"config": unaligned, "codes": of, "out": out, "has_bias": has_bias, "aligned": False, "even": False}
        found += [what, {**what, "ones": True}]
    return found


def main() -> None:
    """Compile what was asked for and print a line for each."""
    name, amount, *architectures = sys.argv[1:]
    for architecture in map(int, architectures):
        shipped = variants(name, architecture)
        largest = offline.configs(name, architecture)[-1]
        one = [what for what in shipped if what["config"] == largest][:1]
        for what in one if amount == "one" else shipped:
            offline.emit(compiled(name, architecture, **what))


if __name__ == "__main__":
    main()
