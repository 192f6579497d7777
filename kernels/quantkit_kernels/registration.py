"""How an op becomes torch's: its schema, its implementation, its shape function, and backward that refuses."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from quantkit_kernels.errors import KernelError

SCHEMAS: dict[str, str] = {}
"""Every op that is registered, by name, and its schema."""


def register(name: str, schema: str, implementation: Callable[..., object], fake: Callable[..., object]) -> None:
    """Define `quantkit::name` with its implementation for all devices and its shape function; backward raises."""
    op = f"quantkit::{name}"
    torch.library.define(op, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(op, "CompositeExplicitAutograd", implementation)
    torch.library.register_fake(op, fake)
    torch.library.register_autograd(op, functools.partial(_refuse_backward, name))
    SCHEMAS[name] = schema


def linear_fake(check: Callable[..., None]) -> Callable[..., Tensor]:
    """Return the fake of a linear op: its check, then an output [..., N] in x's dtype for x [..., K].

    Args:
        check: takes the op's arguments but those that the schema has after them (the backend).
    """
    checked = len(inspect.signature(check).parameters)

    def fake(*arguments: Any) -> Tensor:
        check(*arguments[:checked])
        x, weight = arguments[:2]
        out: Tensor = x.new_empty((*x.shape[:-1], weight.shape[0]))
        return out

    return fake


def _refuse_backward(name: str, ctx: object, *grads: Tensor) -> NoReturn:
    """Raise KernelError: without this, autograd would differentiate through rounding and call it a gradient."""
    raise KernelError(f"quantkit.{name} has no gradient: run it under torch.no_grad(), or train the float model")
