"""Program: compile the weight-only kernels without a GPU and print, one JSON object a line, what became of them.

Run by test_weight_only.py in a process of its own. Arguments: "one" (packed 4 bits in groups, as for one token and for
16) or "all" (every kind of weight with every configuration), then the architectures, such as 80 90 100.
"""

import itertools
import sys

import offline
import triton.language as tl
from quantkit_kernels import configurations
from quantkit_kernels.gpu import codes, dequantize, units, weight_only, weight_only_tiles
from quantkit_kernels.gpu.weight_only_token import weight_only_token_kernel

COMPUTE = {"bf16": tl.bfloat16, "fp16": tl.float16}
WORDS = [("int8", "i32", 4), ("offset8", "i32", 4), ("offset4", "i32", 8)]
BYTES = [("int8", "i8", 1), ("offset8", "u8", 1), ("fp8", "fp8e5", 1)]
TOKENS = (16, 32, 64, weight_only.WHOLE_TOKENS)


def kinds(architecture):
    """Return (NUMBERS, a unit's type, codes in a unit) of every kind of weight that the architecture is given."""
    if architecture < 89:
        return [*WORDS, *BYTES, ("e4m3", "i32", 4), ("e4m3", "u8", 1)]
    return [*WORDS, *BYTES, ("fp8", "fp8e4nv", 1)]


def table(architecture, kernel, numbers, tokens):
    """Return the shipped configuration for so many tokens."""
    bits = 4 if numbers == "offset4" else 8
    return configurations.configuration(f"{kernel}_{bits}bit", tokens, 4096, 4096, architecture)


def report(function, architecture, signature, constants, aligned, options, **what):
    """Print what one compilation became, and what was asked for.

    With "ones" among that all numbers but `exponent` are 1, which Triton makes constants.
    """
    if what.get("ones"):
        numbers = [name for name, kind in signature.items() if kind == "i32" and name != "exponent"]
        constants = {**constants, **dict.fromkeys(numbers, 1)}
    divisible = [name for name in signature if aligned and name not in ("M", "PARTS", "steps", "exponent")]
    line = offline.compiled(function, architecture, signature, constants, divisible, **options)
    offline.emit({**line, **what, "aligned": aligned})


def tiles(architecture, kind, scales, dtype, tokens, aligned=True, ones=False):
    """Compile the kernel for tiles as a launch with so many tokens would."""
    numbers, unit, per_unit = kind
    config = table(architecture, "weight_only", numbers, tokens) if aligned else weight_only.UNALIGNED
    strides = [f"stride_{name}" for name in ("xm", "wn", "sn", "os", "om")]
    sizes = ["M", "N", "K", "units", "group", "exponent", "steps", *strides]
    signature = {"x_mk": f"*{dtype}", "w_nu": f"*{unit}", "scale_ng": f"*{dtype}", "bias_n": f"*{dtype}"}
    signature |= {"out_smn": "*fp32" if tokens <= 16 else f"*{dtype}", **dict.fromkeys(sizes, "i32")}
    constants = {
        "stride_sg": 1, "NUMBERS": numbers, "PER_UNIT": per_unit, "SCALES": scales, "HAS_BIAS": tokens > 16,
        "COMPUTE": COMPUTE[dtype], "BLOCK_M": config["block_m"], "BLOCK_N": config["block_n"],
        "BLOCK_K": max(config["block_k"], 16 * per_unit),
    }  # fmt: skip
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    what = {"kernel": "tiles", "kind": kind, "scales": scales, "dtype": dtype, "tokens": tokens, "config": config}
    what["ones"] = ones
    report(weight_only_tiles.weight_only_kernel, architecture, signature, constants, aligned, options, **what)


def token(architecture, kind, by_row, dtype, aligned=True, ones=False):
    """Compile the kernel for one token."""
    numbers, unit, per_unit = kind
    config = table(architecture, "weight_only_token", numbers, 1)
    signature = {"x_k": f"*{dtype}", "w_nu": f"*{unit}", "scale_ng": f"*{dtype}", "bias_n": f"*{dtype}"}
    signature |= {"out_n": f"*{dtype}"}
    signature |= dict.fromkeys(["N", "units", "group", "exponent", "stride_wn", "stride_sn"], "i32")
    constants = {
        "stride_sg": 1, "NUMBERS": numbers, "PER_UNIT": per_unit, "ROW_SCALE": by_row, "HAS_BIAS": True,
        "BLOCK_N": config["block_n"], "LANES": 32 * config["num_warps"],
        "WIDE": units.TOKEN_BYTES // (4 if unit == "i32" else 1),
    }  # fmt: skip
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    what = {"kernel": "token", "kind": kind, "by_row": by_row, "dtype": dtype, "config": config}
    what["ones"] = ones
    report(weight_only_token_kernel, architecture, signature, constants, aligned, options, **what)


def whole(architecture, unit, numbers, bits, share=8):
    """Compile the kernel that decodes."""
    signature = {"w_nk": f"*{unit}", "scale_ng": "*bf16", "out_nk": "*bf16"}
    signature |= dict.fromkeys(["N", "K", "group", "stride_wn", "stride_sn", "stride_on"], "i32")
    constants = {
        "stride_wk": 1, "stride_sg": 1, "NUMBERS": numbers, "BITS": bits, "SHARE": share, "BLOCK_N": dequantize.BLOCK_N,
        "BLOCK_K": dequantize.BLOCK_K,
    }  # fmt: skip
    options = {"num_warps": dequantize.NUM_WARPS}
    what = {"kernel": "dequantize", "kind": (numbers, unit, bits), "share": share}
    report(dequantize.dequantize_kernel, architecture, signature, constants, True, options, **what)


def parts(architecture):
    """Compile the kernel that adds up the parts of K."""
    signature = {"part_smn": "*fp32", "bias_n": "*bf16", "out_mn": "*bf16"}
    signature |= dict.fromkeys(["N", "stride_ps", "stride_om", "PARTS"], "i32")
    constants = {"HAS_BIAS": True, "BLOCK": weight_only.SUM_BLOCK}
    report(
        weight_only_tiles.sum_parts_kernel, architecture, signature, constants, True, {"num_warps": 4}, kernel="parts"
    )


def everything(architecture):
    """Compile each kernel for every kind of weight, at every number of tokens that has a configuration."""
    for kind, tokens in itertools.product(kinds(architecture), TOKENS):
        words = kind[2] == 4
        if words and tokens > units.WORD_TOKENS:
            continue
        tiles(architecture, kind, "row", "bf16", tokens)
        if tokens in (16, TOKENS[-1]):
            tiles(architecture, kind, "step", "fp16", tokens)
            tiles(architecture, kind, "code", "bf16", tokens)
    for kind, scales in itertools.product(kinds(architecture), ("row", "code")):
        tiles(architecture, kind, scales, "bf16", 16, aligned=False)
    for kind, by_row in itertools.product(kinds(architecture), (True, False)):
        if kind[2] > 1 or kind[0] == "fp8":
            token(architecture, kind, by_row, "bf16")
            token(architecture, kind, by_row, "fp32", aligned=False)
    tiles(architecture, BYTES[0], "code", "bf16", 16, aligned=False, ones=True)
    token(architecture, WORDS[0], False, "bf16", aligned=False, ones=True)
    for numbers, unit, per_unit in kinds(architecture):
        if per_unit == 1 and numbers != "offset8":
            whole(architecture, unit, numbers, 0)
    for bits in range(1, 9):
        whole(architecture, "i32", "int8", bits)
    whole(architecture, "i32", "int8", 3, share=1)
    parts(architecture)


def main() -> None:
    """Compile what was asked for and print a line for each."""
    assert codes.EXPONENT == 127 + 23 << 23
    amount, *architectures = sys.argv[1:]
    for architecture in map(int, architectures):
        if amount == "all":
            everything(architecture)
        else:
            tiles(architecture, WORDS[2], "step", "bf16", 16)
            token(architecture, WORDS[2], False, "bf16")


if __name__ == "__main__":
    main()
