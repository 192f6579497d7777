"""Program: compile the sparse24 kernels without a GPU and print, one JSON object a line, what became of them.

Run by test_sparse24_kernels.py in a process of its own. Arguments: "one" (int8 in rows, as for one token and for 16) or
"all" (every kind of value with every configuration, 2:4 and V:N:M), then the architectures, such as 80 90 100.
"""

import itertools
import sys

import offline
import triton.language as tl
from quantkit_kernels import configurations
from quantkit_kernels.gpu import sparse24, sparse24_dense, sparse24_units
from quantkit_kernels.gpu.sparse24_tiles import sparse24_kernel
from quantkit_kernels.gpu.sparse24_token import sparse24_token_kernel

COMPUTE = {"bf16": tl.bfloat16, "fp16": tl.float16}
KINDS = {  # NUMBERS: types of a word and of a unit of indices, pairs in a word, bits of a value
    "int8": ("i32", "u8", 2, 8),
    "e4m3": ("i32", "u8", 2, 8),
    "e5m2": ("i32", "u8", 2, 8),
    "fp8": ("fp8e4nv", "u8", 2, 8),
    "offset4": ("i32", "i16", 4, 4),
    "bf16": ("i64", "u8", 2, 16),
    "fp16": ("i64", "u8", 2, 16),
}
TOKENS = (16, 32, sparse24.TILE_TOKENS)


def signature(numbers, dtype, out, sizes):
    """Return the types of the arguments: pointers, then whole numbers."""
    word, unit, _, _ = KINDS[numbers]
    pointers = {"w_nu": f"*{word}", "index_nu": f"*{unit}", "column_bk": "*u8", "scale_ng": f"*{dtype}"}
    return {**pointers, "bias_n": f"*{dtype}", **out, **dict.fromkeys(sizes, "i32")}


def report(function, architecture, types, constants, aligned, options, **what):
    """Print what one compilation became, and what was asked for."""
    unknown = ("M", "steps", "exponent", "group", "rows", "tile", "N")
    divisible = [name for name in types if aligned and name not in unknown]
    line = offline.compiled(function, architecture, types, constants, divisible, **options)
    offline.emit({**line, **what, "aligned": aligned})


def token(architecture, numbers, scales, dtype, columns=False, aligned=True):
    """Compile the kernel for one token as a launch would."""
    word, _, pairs, bits = KINDS[numbers]
    config = configurations.configuration(f"sparse24_token_{bits}bit", 1, 4096, 4096, architecture)
    sizes = ["N", "units", "group", "exponent", "rows", "tile"]
    sizes += [f"stride_{name}" for name in ("wn", "in", "cb", "sn")]
    types = {"x_k": f"*{dtype}", **signature(numbers, dtype, {"out_n": f"*{dtype}"}, sizes)}
    constants = {
        "stride_sg": 1, "NUMBERS": numbers, "PAIRS": pairs, "SCALES": scales, "COLUMNS": columns, "HAS_BIAS": True,
        "BLOCK_N": config["block_n"], "LANES": 32 * config["num_warps"],
        "WIDE": sparse24_units.TOKEN_BYTES // {"i64": 8}.get(word, 4),
    }  # fmt: skip
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    what = {"kernel": "token", "numbers": numbers, "scales": scales, "dtype": dtype, "columns": columns}
    report(sparse24_token_kernel, architecture, types, constants, aligned, options, config=config, **what)


def tiles(architecture, numbers, scales, dtype, tokens, columns=False, aligned=True, block_n=None):
    """Compile the kernel for tiles as a launch with so many tokens would."""
    _, _, pairs, bits = KINDS[numbers]
    config = sparse24.UNALIGNED
    if aligned:
        config = configurations.configuration(f"sparse24_{bits}bit", tokens, 4096, 4096, architecture)
    sizes = ["M", "N", "K", "units", "group", "exponent", "steps", "rows", "tile"]
    sizes += [f"stride_{name}" for name in ("xm", "wn", "in", "cb", "sn", "os", "om")]
    out = {"out_smn": "*fp32" if tokens <= 16 else f"*{dtype}"}
    types = {"x_mk": f"*{dtype}", **signature(numbers, dtype, out, sizes)}
    constants = {
        "stride_sg": 1, "NUMBERS": numbers, "PAIRS": pairs, "SCALES": scales, "COLUMNS": columns,
        "HAS_BIAS": tokens > 16, "COMPUTE": COMPUTE[dtype], "BLOCK_M": config["block_m"],
        "BLOCK_N": block_n or config["block_n"],
        "BLOCK_K": 64 * pairs if block_n else max(config["block_k"], 64 * pairs),
    }  # fmt: skip
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    what = {"kernel": "tiles", "numbers": numbers, "scales": scales, "dtype": dtype, "columns": columns}
    what |= {"tokens": tokens, "block_n": constants["BLOCK_N"]}
    report(sparse24_kernel, architecture, types, constants, aligned, options, config=config, **what)


def dense(architecture, numbers, kind, scales, columns):
    """Compile the kernel that makes the weight dense."""
    types = {"w_nk": f"*{kind}", "index_nb": "*u8", "column_bk": "*u8", "scale_ng": "*bf16", "out_nk": "*bf16"}
    sizes = ["N", "pairs", "group", "rows", "tile"]
    sizes += [f"stride_{name}" for name in ("wn", "in", "cb", "sn", "on")]
    types |= dict.fromkeys(sizes, "i32")
    constants = {
        "stride_sg": 1, "NUMBERS": numbers, "SCALES": scales, "COLUMNS": columns,
        "BLOCK_N": sparse24_dense.BLOCK_N, "BLOCK_P": sparse24_dense.BLOCK_P,
    }  # fmt: skip
    what = {"kernel": "dense", "numbers": numbers, "scales": scales, "columns": columns}
    options = {"num_warps": sparse24_dense.NUM_WARPS}
    report(sparse24_dense.dense_kernel, architecture, types, constants, True, options, **what)


def everything(architecture):
    """Compile each kernel for every kind of value, at every number of tokens that has a configuration."""
    known = [numbers for numbers in KINDS if numbers != "fp8" or architecture >= 89]
    for numbers in known:
        scales = ("none",) if numbers in ("bf16", "fp16") else ("row", "group")
        for each, columns in itertools.product(scales, (False, True)):
            token(architecture, numbers, each, "bf16", columns)
        token(architecture, numbers, scales[-1], "fp32", aligned=False)
        if numbers == "fp8":  # only for one token
            continue
        dtype = "fp16" if numbers == "fp16" else "bf16"
        tiles(architecture, numbers, scales[0], dtype, 16, aligned=False)
        tiles(architecture, numbers, scales[0], dtype, sparse24.COLUMN_TOKENS, columns=True)
        tiles(architecture, numbers, scales[0], dtype, 16, columns=True, block_n=sparse24.LEAST_ROWS)
        for tokens in TOKENS:
            tiles(architecture, numbers, scales[0], dtype, tokens)
            if scales[0] == "row":
                tiles(architecture, numbers, "code", "bf16", tokens)
                tiles(architecture, numbers, "row", "fp16", tokens)
    kinds = [("offset4", "i32"), ("int8", "i8"), ("e4m3", "u8"), ("fp8", "fp8e5"), ("float", "bf16"), ("float", "fp32")]
    for (numbers, kind), columns in itertools.product(kinds, (False, True)):
        for scales in ("none",) if numbers == "float" else ("pair", "code"):
            dense(architecture, numbers, kind, scales, columns)


def main() -> None:
    """Compile what was asked for and print a line for each."""
    amount, *architectures = sys.argv[1:]
    for architecture in map(int, architectures):
        if amount == "all":
            everything(architecture)
        else:
            tiles(architecture, "int8", "row", "bf16", 16)
            token(architecture, "int8", "row", "bf16")


if __name__ == "__main__":
    main()
