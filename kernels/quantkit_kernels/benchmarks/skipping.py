"""Products that skip rows as cases: activations of which a share is zero, as they come before a down projection.

Each is beside the float layer on the same activations, zeros and all, which multiplies every row.
"""

import torch
from torch import Tensor

from quantkit_kernels import formats, ops
from quantkit_kernels.benchmarks.cases import Case, Operands, decoded

SPARSITIES = (0.5, 0.8, 0.9, 0.95)


def thinned(x: Tensor, share: float) -> Tensor:
    """Return x with so large a share of each token's numbers zero, at random places."""
    left = x.shape[1] - round(share * x.shape[1])
    order = torch.rand(x.shape, device=x.device).argsort(1)
    return x.masked_fill(order >= left, 0.0)


def _floats(share: float) -> Case:
    def prepare(x: Tensor, weight: Tensor) -> Operands:
        return thinned(x, share), weight.to(x.dtype).t().contiguous()

    return Case(
        prepare,
        lambda x, weight_t: ops.linear_sparse_input(x, weight_t, None, None),
        lambda x, weight_t: (x.double(), weight_t.double().t(), 2.0 * (x.shape[1] + 4), -3),
        skipped=share,
    )


def _codes(share: float) -> Case:
    def prepare(x: Tensor, weight: Tensor) -> Operands:
        codes, scale = formats.quantize_weight(weight, torch.int8)
        return thinned(x, share), codes.t().contiguous(), scale

    return Case(
        prepare,
        lambda x, codes_t, scale: ops.linear_sparse_input(x, codes_t, scale, None),
        lambda x, codes_t, scale: (x.double(), decoded(codes_t.t(), scale), 2.0 * (x.shape[1] + 4), -3),
        skipped=share,
    )


def skipping_cases() -> dict[str, Case]:
    """Return the op that skips rows by name, at each sparsity, with weights in x's dtype and in int8."""
    found: dict[str, Case] = {}
    for share in SPARSITIES:
        found[f"zeros {share:.0%}"] = _floats(share)
        found[f"zeros {share:.0%}, int8 weights"] = _codes(share)
    return found
