"""NVIDIA's sparse tensor cores through cuSPARSELt, where torch offers it: 2:4 weights times many tokens.

Triton cannot drive these cores. They take a weight in an order of their own, made from the dense weight by
`torch._cslt_compress`; what is stored stays in quantkit's order, so the weight is put into theirs at every call. That
pays from TOKENS on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit_kernels.configurations import architecture

TOKENS = 2048
"""From so many tokens on it is taken. Compressing reads the dense weight and writes 9/16 of it: 3.1 bytes a weight,
0.73 picoseconds at 4.3 TB/s. A token's products with a weight take 2.6 femtoseconds at 770 TFLOP/s; if the sparse cores
are 1.3 times as fast, 0.6 less, which pays from 1200 tokens on, if 1.16 times, from 2000."""

OLDEST = {80: 400, 86: 400, 89: 400, 90: 600, 100: 701, 120: 701}
"""The version of cuSPARSELt (as torch counts it: 602 is 0.6.2) from which on we take it, by architecture."""

SHAPES = {torch.bfloat16: 16, torch.float16: 16}
"""For each dtype what must divide N and K (torch.sparse.SparseSemiStructuredTensorCUSPARSELT)."""

TOKEN_STEP = 8
"""Tokens are filled up to a multiple of this many."""


def reason_against(dtype: torch.dtype, out_features: int, in_features: int, device: torch.device) -> str:
    """Return why cuSPARSELt cannot multiply with such a weight on the device; "" where it can."""
    if device.type != "cuda":
        return f"cuSPARSELt needs a CUDA device and this is {device}"
    if not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt"
    found = architecture(device)
    version = torch.backends.cusparselt.version() or 0
    if found not in OLDEST or version < OLDEST[found]:
        least = f"version {OLDEST[found]}" if found in OLDEST else f"one of sm_{', sm_'.join(map(str, OLDEST))}"
        return f"cuSPARSELt is version {version} on sm_{found}: expected {least}"
    if dtype not in SHAPES:
        return f"activations are {dtype}: expected bfloat16 or float16"
    step = SHAPES[dtype]
    if out_features % step or in_features % step or not out_features or not in_features:
        return f"the weight is {out_features} x {in_features}: expected multiples of {step}"
    return ""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ weight.T + bias, [M, N] in x's dtype, summed in float32; `reason_against` must have none.

    Args:
        x: [M, K], bfloat16 or float16.
        weight: [N, K], x's dtype, contiguous, of every four neighbours along K at least two zero.
        bias: [N], x's dtype, or None.
    """
    tokens = x.shape[0]
    rows = F.pad(x, (0, 0, 0, -tokens % TOKEN_STEP)) if tokens % TOKEN_STEP else x.contiguous()
    compressed = torch._cslt_compress(weight)
    out = torch._cslt_sparse_mm(compressed, rows.t(), bias=bias, transpose_result=True)
    return out[:tokens]
