"""Program: compile the kernels that skip rows, without a GPU, and print, one JSON object a line, what became of them.

Run by test_skipping_kernels.py in a process of its own. Arguments: "one" (bfloat16 and int8, as configured) or "all"
(every dtype, with and without gaps), then the architectures, such as 80 90 100.
"""

import itertools
import sys

import offline
from quantkit_kernels import configurations
from quantkit_kernels.gpu.skipping_tiles import neurons_kernel, rows_kernel

KERNELS = {"rows": rows_kernel, "neurons": neurons_kernel}
POINTERS = {"rows": ("x_mk", "w_kn", "scale_n", "bias_n", "out_smn"),
            "neurons": ("x_mk", "gate_mn", "w_nk", "scale_n", "bias_n", "out_mn")}  # fmt: skip


def one(architecture, kernel, dtype, weight, aligned=True, out="fp32"):
    """Compile a kernel with its shipped configuration as a launch would; not aligned: with gaps between columns too."""
    table = f"sparse_{kernel}_{8 if weight == 'i8' else 16}bit"
    config = configurations.configuration(table, 1, 4096, 4096, architecture)
    names = [name for name in KERNELS[kernel].arg_names if name.islower() or name in ("N", "K")]
    types = dict.fromkeys(names, "i32")
    types |= dict.fromkeys(POINTERS[kernel], f"*{dtype}")
    types["w_kn" if kernel == "rows" else "w_nk"] = f"*{weight}"
    types[POINTERS[kernel][-1]] = f"*{out}"
    constants = {"HAS_SCALE": weight == "i8", "HAS_BIAS": True,
                 "BLOCK_N": config["block_n"], "BLOCK_K": config["block_k"]}  # fmt: skip
    if aligned:
        constants |= {"stride_xk": 1, **({"stride_wn": 1} if kernel == "rows" else {"stride_wk": 1, "stride_gn": 1})}
    divisible = [name for name in types if aligned and name != "steps"]
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    line = offline.compiled(KERNELS[kernel], architecture, types, constants, divisible, **options)
    offline.emit({**line, "kernel": kernel, "dtype": dtype, "weight": weight, "aligned": aligned, "config": config})


def main() -> None:
    """Compile what was asked for and print a line for each."""
    amount, *architectures = sys.argv[1:]
    for architecture in map(int, architectures):
        if amount == "one":
            one(architecture, "rows", "bf16", "i8")
            one(architecture, "neurons", "bf16", "bf16")
            continue
        weights = ("bf16", "fp16", "fp32", "i8")
        for kernel, dtype, weight in itertools.product(KERNELS, ("bf16", "fp16", "fp32"), weights):
            one(architecture, kernel, dtype, weight, out=dtype)
            one(architecture, kernel, dtype, weight, aligned=False)


if __name__ == "__main__":
    main()
