"""What quantizes activations as cases: per token, per group, per tensor; alone, or right after a norm or SiLU * mul."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit_kernels import formats, ops
from quantkit_kernels.benchmarks.cases import CODES, STATIC, Case, Operands

EPS = 1e-5


def _alone(x: Tensor, weight: Tensor) -> Operands:
    return (x,)


def _gain(x: Tensor, weight: Tensor) -> Operands:
    return x, torch.rand(x.shape[1], device=x.device, dtype=x.dtype) + 0.5


def _up(x: Tensor, weight: Tensor) -> Operands:
    return x, torch.randn_like(x)


def _normed(x: Tensor, gain: Tensor) -> Tensor:
    values = x.double()
    return values * (values.square().mean(1, keepdim=True) + EPS).rsqrt() * gain.double()


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.double()) * up.double()


def _case(
    prepare: Callable[[Tensor, Tensor], Operands],
    run: Callable[..., Any],
    expected: Callable[..., tuple[Tensor, Tensor | None]],
) -> Case:
    return Case(prepare, run, kind="quantizer", multiplies=0, expected=expected)


def _of(dtype: torch.dtype) -> tuple[dict[str, Case], Case, Case]:
    """Return, for codes in the dtype, the cases that quantize alone by name, after a norm, and after SiLU * mul."""

    def with_scale(x: Tensor, weight: Tensor) -> Operands:
        return x, torch.full((1,), STATIC / formats.QMAX[dtype], device=x.device)

    alone = {
        "token": _case(_alone, lambda x: ops.quantize_per_token(x, dtype), lambda x: (x.double(), None)),
        "tensor": _case(_alone, lambda x: ops.quantize_per_tensor(x, dtype), lambda x: (x.double(), None)),
        "static": _case(
            with_scale, lambda x, scale: ops.quantize_per_tensor(x, dtype, scale), lambda x, scale: (x.double(), scale)
        ),
        "group": _case(_alone, lambda x: ops.quantize_per_group(x, dtype), lambda x: (x.double(), None)),
    }
    norm = _case(
        _gain,
        lambda x, gain: ops.rms_norm_quantize(x, gain, EPS, 0.0, dtype),
        lambda x, gain: (_normed(x, gain), None),
    )
    silu = _case(_up, lambda gate, up: ops.silu_mul_quantize(gate, up, dtype), lambda g, up: (_gated(g, up), None))
    return alone, norm, silu


def quantizer_cases() -> list[tuple[dict[str, Case], dict[str, Case]]]:
    """Return pairs: what does the same work in x's dtype and quantizes nothing, and the cases, both by name."""
    alone: dict[str, Case] = {}
    norm: dict[str, Case] = {}
    silu: dict[str, Case] = {}
    for name, dtype in CODES.items():
        plain, normed, gated = _of(dtype)
        alone |= {f"quantize {name}, {what}": case for what, case in plain.items()}
        norm[f"norm, quantize {name}"] = normed
        silu[f"silu mul, quantize {name}"] = gated
    return [
        ({"copy": _float(_alone, lambda x: x.clone(), lambda x: x.double())}, alone),
        ({"norm": _float(_gain, lambda x, gain: F.rms_norm(x, gain.shape, gain, EPS), _normed)}, norm),
        ({"silu mul": _float(_up, lambda gate, up: F.silu(gate) * up, _gated)}, silu),
    ]


def _float(
    prepare: Callable[[Tensor, Tensor], Operands], run: Callable[..., Tensor], exact: Callable[..., Tensor]
) -> Case:
    """Return the case of work that gives numbers in x's dtype: checked as a product with one number is."""

    def given(*operands: Tensor) -> tuple[Tensor, Tensor, float, int]:
        numbers = exact(*operands)
        return numbers, torch.eye(numbers.shape[1], dtype=torch.float64, device=numbers.device), 64.0, -3

    return Case(prepare, run, given, multiplies=0)
