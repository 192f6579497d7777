"""Program: compile the LLM.int8 kernels without a GPU and print, one JSON object a line, what became of them.

Run by test_llm_int8_kernels.py in a process of its own. Arguments: "one" (the largest tile of each architecture's
table, and the kernel for one token) or "all", then the architectures, such as 80 90 100.
"""

import itertools
import sys
from dataclasses import asdict

import offline
import triton.language as tl
from quantkit_kernels import configurations
from quantkit_kernels.gpu import llm_int8
from quantkit_kernels.gpu.tiles import GROUP_M, SWAP_BELOW, UNALIGNED, TileConfig

COMPUTE = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.bfloat16}
SIZES = ("M", "N", "K", "stride_xm", "stride_wn", "stride_cm")


def emit(kernel, architecture, signature, constants, aligned, options, **what):
    """Print what became of one compilation; numbers but M are multiples of 16 where `aligned`."""
    divisible = [key for key, kind in signature.items() if aligned and key not in ("M", "limit") and kind != "fp32"]
    options = {"enable_fp_fusion": False, **options}
    line = offline.compiled(kernel, architecture, signature, constants, divisible, **options)
    offline.emit({"kernel": kernel.__name__, "aligned": aligned, **what, **line})


def product(architecture, config: TileConfig, dtype, has_bias=True, aligned=True):
    """Compile the product as `launch` would launch it."""
    signature = {"codes_mk": "*i8", "x_mk": f"*{dtype}", "w_nk": "*i8", "c_mn": f"*{dtype}", "scale_m": "*fp32"}
    signature |= {"columns_o": "*i32", "scale_n": "*fp32", "bias_n": f"*{dtype}"} | dict.fromkeys(SIZES, "i32")
    constants = {
        "HAS_BIAS": has_bias,
        "EVEN_K": aligned,
        "SWAP": config.block_m < SWAP_BELOW,
        "COMPUTE": COMPUTE[dtype],
        "OUTLIERS": llm_int8.OUTLIERS,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": GROUP_M,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    what = {"config": asdict(config), "dtype": dtype}
    emit(llm_int8.product_kernel, architecture, signature, constants, aligned, options, **what)


def token(architecture, dtype, has_bias=True, aligned=True):
    """Compile the kernel for one token as `launch` would launch it."""
    config = llm_int8.UNALIGNED_TOKEN
    if aligned:
        config = configurations.configuration("llm_int8_token", 1, 4096, 4096, architecture)
    signature = {"x_k": f"*{dtype}", "w_nk": "*i8", "c_n": f"*{dtype}", "scale_n": "*fp32", "bias_n": f"*{dtype}"}
    signature |= dict.fromkeys(("N", "K", "stride_wn"), "i32") | {"limit": "fp32"}
    constants = {
        "HAS_BIAS": has_bias,
        "EVEN_K": aligned,
        "SCAN": llm_int8.SCAN,
        "NARROW": llm_int8.NARROW,
        "BLOCK_N": config["block_n"],
        "BLOCK_K": config["block_k"],
    }
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    emit(llm_int8.token_kernel, architecture, signature, constants, aligned, options, dtype=dtype)


def quantization(architecture, dtype, tokens, one_block):
    """Compile what comes before the product, for few tokens or (0) for many."""
    signature = {"x_mk": f"*{dtype}", "found_k": "*i8"} | dict.fromkeys(("M", "K", "stride_xm"), "i32")
    signature |= {"limit": "fp32"}
    if not tokens:
        constants = {"BLOCK_M": 32, "BLOCK_K": 128, "STEPS": 4}
        emit(llm_int8.find_columns_kernel, architecture, signature, constants, True, {"num_warps": 4}, dtype=dtype)
    signature |= {"found_k": "*i32" if tokens else "*i8", "codes_mk": "*i8", "scale_m": "*fp32", "columns_o": "*i32"}
    rows = max(tokens, 1)
    block = llm_int8.FEW_NUMBERS // rows
    constants = {"FEW": bool(tokens), "ONE_BLOCK": one_block, "BLOCK_M": rows, "BLOCK_K": block}
    emit(llm_int8.quantize_rest_kernel, architecture, signature, constants, True, {"num_warps": 16}, dtype=dtype)


def main() -> None:
    """Compile what was asked for and print a line for each."""
    amount, *architectures = sys.argv[1:]
    for architecture in map(int, architectures):
        tiles = offline.configs("llm_int8", architecture)
        if amount == "one":
            product(architecture, tiles[-1], "bf16")
            token(architecture, "bf16")
            continue
        for dtype, has_bias in itertools.product(COMPUTE, (True, False)):
            for config in tiles:
                product(architecture, config, dtype, has_bias)
            product(architecture, UNALIGNED, dtype, has_bias, aligned=False)
            token(architecture, dtype, has_bias)
            token(architecture, dtype, has_bias, aligned=False)
        for dtype, tokens, one_block in itertools.product(COMPUTE, (0, 1, 16), (True, False)):
            quantization(architecture, dtype, tokens, one_block)


if __name__ == "__main__":
    main()
