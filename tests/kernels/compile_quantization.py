"""Program: compile the quantization kernels without a GPU and print, one JSON object a line, what became of them.

Run by test_quantization_kernels.py in a process of its own. Arguments: "one" (one token's row of bfloat16 for each
dtype of codes) or "all", then the architectures, such as 80 90 100.
"""

import itertools
import sys

import offline
from quantkit_kernels import formats
from quantkit_kernels.gpu import quantization

QMAX = {name: formats.QMAX[dtype] for dtype, name in quantization.FORMATS.items()}
FLOATS = ("bf16", "fp16", "fp32")


def emit(kernel, architecture, name, signature, constants, warps, aligned=True, **what):
    """Print what became of one compilation; numbers but M are multiples of 16 where `aligned`."""
    constants = {"FORMAT": name, "QMAX": QMAX[name], "HARDWARE": architecture >= 89} | constants
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    divisible = [key for key, kind in signature.items() if aligned and kind != "fp32" and key not in ("M", "total")]
    options = {"num_warps": warps, "enable_fp_fusion": False}
    line = offline.compiled(kernel, architecture, signature, constants, divisible, **options)
    offline.emit({"kernel": kernel.__name__, "format": name, "aligned": aligned, **what, **line})


def rows(architecture, name, dtype, what, block, one_block, aligned=True):
    """Compile the kernel of rows as `launch_rows` would launch it."""
    pointers = {"x_mk": f"*{dtype}", "other": f"*{dtype}", "codes_mk": "*i8", "scale_m": "*fp32"}
    signature = pointers | dict.fromkeys(("K", "stride_xm", "stride_om"), "i32") | {"eps": "fp32", "offset": "fp32"}
    constants = {"WHAT": what, "ONE_BLOCK": one_block, "BLOCK_K": block}
    kernel, warps = quantization.quantize_rows_kernel, quantization._warps(block)
    emit(kernel, architecture, name, signature, constants, warps, aligned, dtype=dtype, what=what, block=block)


def groups(architecture, name, dtype):
    """Compile the kernel of groups."""
    signature = {"x_mk": f"*{dtype}", "codes_mk": "*i8", "scale_mg": "*fp32"}
    signature |= dict.fromkeys(("total", "groups", "stride_xm"), "i32")
    constants = {"GROUP": formats.BLOCK, "GROUPS": quantization.GROUPS}
    emit(quantization.quantize_groups_kernel, architecture, name, signature, constants, 4, dtype=dtype)


def tensors(architecture, name, dtype, static):
    """Compile both kernels of a whole tensor."""
    block, parts = quantization.TENSOR_BLOCK, quantization.PARTS
    signature = {"x_mk": f"*{dtype}", "largest_p": "*i32"} | dict.fromkeys(("M", "K", "stride_xm"), "i32")
    warps = quantization._warps(block)
    if not static:
        constants = {"PARTS": parts, "BLOCK_K": block}
        emit(quantization.largest_kernel, architecture, name, signature, constants, warps, dtype=dtype)
    signature = {"x_mk": f"*{dtype}", "codes_mk": "*i8", "given": "*fp32" if static else "*i32", "found": "*fp32"}
    signature |= dict.fromkeys(("K", "stride_xm"), "i32")
    constants = {"STATIC": static, "PARTS": 1 if static else parts, "BLOCK_K": block}
    emit(quantization.quantize_tensor_kernel, architecture, name, signature, constants, warps, dtype=dtype)


def main() -> None:
    """Compile what was asked for and print a line for each."""
    amount, *architectures = sys.argv[1:]
    for architecture, name in itertools.product(map(int, architectures), QMAX):
        rows(architecture, name, "bf16", "norm", 4096, True)
        if amount == "one":
            continue
        for dtype, what in itertools.product(FLOATS, ("plain", "norm", "silu")):
            rows(architecture, name, dtype, what, quantization.LONGEST_ROW, True)
            rows(architecture, name, dtype, what, quantization.LONGEST_ROW, False)
            rows(architecture, name, dtype, what, 128, True, aligned=False)
        for dtype in FLOATS:
            groups(architecture, name, dtype)
            tensors(architecture, name, dtype, static=True)
            tensors(architecture, name, dtype, static=False)


if __name__ == "__main__":
    main()
