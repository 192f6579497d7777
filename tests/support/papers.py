"""The recipes' papers as plain arithmetic in float64: what a model with quantized weights and activations computes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LARGEST = {"int8": 127, "w8a8": 127, "llm-int8": 127, "fp8": 448}
"""The largest code of each step's numbers."""
OUTLIER = 6.0
PRODUCTS = (F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


def relative(logits: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of the expected logits about their mean."""
    logits, expected = logits.double(), expected.double()
    return float((logits - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm())


def agree(logits: Tensor, expected: Tensor, floats: Tensor, step: str) -> bool:
    """Whether float32 logits [B, T, V] are those expected in float64.

    Without codes of activations: within float32 roundings, 1e-5 relative to their size (seen: 8e-7). With them such a
    rounding may turn a code over that was next to a tie, for that token and those after it (seen: one in forty models).
    So the logits of some token must agree within 1e-5, and all together within a third of what was lost against the
    float model.
    """
    if step == "int8":
        return relative(logits, expected) < 1e-5
    size = (expected - expected.mean(-1, keepdim=True)).double().norm(dim=-1)
    rows = (logits.double() - expected.double()).norm(dim=-1) / size
    return bool(rows.min() < 1e-5) and 3 * relative(logits, expected) < relative(logits, floats)


def coded(values: Tensor, scale: Tensor, step: str) -> Tensor:
    """Values divided by their scale, as codes of a step's number format, in float64."""
    if step == "fp8":
        return (values / scale).float().to(torch.float8_e4m3fn).double()
    return (values / scale).round()


def rounded_weight(weight: Tensor, step: str, in_axis: int = -1, group: int | None = None) -> Tensor:
    """A float32 weight's value after its quantization by rows of in features, or by groups of them; float64.

    The scale, absmax / largest code, is a float32 number as it lies on disk.
    """
    moved = weight.movedim(in_axis, -1)
    grouped = moved.unflatten(-1, (-1, group or moved.shape[-1]))
    scale = grouped.abs().amax(-1, keepdim=True).float() / LARGEST[step]
    values = coded(grouped.float(), scale, step) * scale.double()
    return values.flatten(-2).movedim(-1, in_axis)


class Rounded(TorchFunctionMode):
    """While it is on, what meets these weights in a product is rounded token by token, as the step says.

    LLM.int8 (arXiv:2208.07339): columns in which any token reaches the threshold stay as they are.

    Attributes:
        products: how many products were rounded.
        outliers: how many columns stayed.
    """

    def __init__(self, step: str, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.step, self.homes = step, {weight.untyped_storage().data_ptr() for weight in weights}
        self.products, self.outliers = 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and self.step != "int8" and args[1].untyped_storage().data_ptr() in self.homes:
            self.products += 1
            args = (self.rounded(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))

    def rounded(self, x: Tensor) -> Tensor:
        """Activations [..., K] as they are multiplied."""
        outlier = torch.zeros(x.shape[-1], dtype=torch.bool)
        if self.step == "llm-int8":
            outlier = (x.abs() >= OUTLIER).reshape(-1, x.shape[-1]).any(0)
            self.outliers += int(outlier.sum())
        regular = x.masked_fill(outlier, 0)
        scale = regular.abs().amax(-1, keepdim=True).clamp(min=1e-30) / LARGEST[self.step]
        return torch.where(outlier, x, coded(regular, scale, self.step) * scale)
