"""The layers of a mixture's experts as cases: tokens sorted by expert, one call for all experts."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit_kernels import formats, ops
from quantkit_kernels.benchmarks.cases import CODES, Case, Operands, by_token, decoded, sums


def random_offsets(tokens: int, experts: int, device: torch.device) -> Tensor:
    """Return where each expert's tokens begin, and M, [E + 1] in int32: each token has an expert at random."""
    of_each = torch.bincount(torch.randint(experts, (tokens,)), minlength=experts)
    return torch.cat([torch.zeros(1, dtype=torch.int64), of_each.cumsum(0)]).to(device, torch.int32)


def _prepare(name: str, x: Tensor, weight: Tensor) -> Operands:
    codes, scale = formats.quantize_weight(weight, CODES[name])
    return x, codes, scale, random_offsets(x.shape[0], weight.shape[0], x.device)


def _experts(name: str, activations: str) -> Case:
    dtype = CODES[name]
    by_codes = activations == "token"
    return Case(
        lambda x, weight: _prepare(name, x, weight),
        lambda x, codes, scale, offsets: ops.linear_grouped(x, codes, scale, offsets, activations),
        lambda x, codes, scale, offsets: (
            by_token(x, dtype) if by_codes else x.double(),
            lambda expert: decoded(codes[expert], scale[expert]),
            sums(x, dtype) if by_codes else 2.0 * (x.shape[1] + 4),
            1,
        ),
        multiplies=8 if by_codes else 16,
        kind="experts",
    )


def expert_cases() -> dict[str, Case]:
    """Return the op on the experts of a mixture by name."""
    return {
        "experts w8a8": _experts("int8", "token"),
        "experts fp8": _experts("fp8", "token"),
        "experts int8 weights": _experts("int8", "none"),
        "experts fp8 weights": _experts("fp8", "none"),
    }


def float_experts(dtype: torch.dtype) -> dict[str, Case]:
    """Return the float layers of all experts by name: one call each, and torch's grouped product where it is there.

    The loop is given its experts' bounds as numbers: to read them from the device would be its greatest cost.
    """

    def prepare(x: Tensor, weight: Tensor) -> Operands:
        offsets = random_offsets(x.shape[0], weight.shape[0], x.device)
        return x.to(dtype), weight.to(dtype), offsets.tolist(), offsets

    def loop(x: Tensor, weight: Tensor, bounds: list[int], offsets: Tensor) -> Tensor:
        runs = enumerate(itertools.pairwise(bounds))
        return torch.cat([F.linear(x[start:stop], weight[e]) for e, (start, stop) in runs if stop > start])

    def grouped(x: Tensor, weight: Tensor, bounds: list[int], offsets: Tensor) -> Tensor:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:])

    def case(run: object) -> Case:
        return Case(
            prepare,
            run,  # type: ignore[arg-type]
            lambda x, weight, *_: (x.double(), lambda expert: weight[expert].double(), 2.0 * x.shape[1] + 1, -3),
            kind="experts",
        )

    name = str(dtype).removeprefix("torch.")
    found = {f"{name}, expert by expert": case(loop)}
    if dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
        found["bfloat16, torch grouped_mm"] = case(grouped)
    return found
