"""Which implementation an op runs: chosen by argument, never by environment, never in silence.

"auto" takes a Triton kernel where there is one for the op and dtype, Triton is installed and the tensors are on a
CUDA device that can run it; else torch. "torch" means torch code: the CPU's own where there is one, the generic one
elsewhere. "triton" is an order: where it cannot be obeyed it raises and says why.
"""

import functools
import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from quantkit_kernels.configurations import architecture
from quantkit_kernels.errors import KernelError

BACKENDS = ("auto", "torch", "triton")

_QUANTIZED = frozenset({torch.int8, torch.float8_e4m3fn, torch.float8_e5m2})

_ROWS = frozenset({torch.int8, torch.float32, torch.bfloat16, torch.float16})

_SPARSE = _QUANTIZED | {torch.int32, torch.float32, torch.bfloat16, torch.float16}

TRITON_KERNELS: dict[str, frozenset[torch.dtype]] = {
    "quantize_per_token": _QUANTIZED,
    "quantize_per_tensor": _QUANTIZED,
    "quantize_per_group": _QUANTIZED,
    "rms_norm_quantize": _QUANTIZED,
    "silu_mul_quantize": _QUANTIZED,
    "linear_llm_int8": frozenset({torch.int8}),
    "linear_grouped": _QUANTIZED,
    "scaled_mm": _QUANTIZED,
    "linear_dynamic": _QUANTIZED,
    "linear_tensor": _QUANTIZED,
    "linear_block": _QUANTIZED - {torch.int8},
    "linear_weight_only": _QUANTIZED,
    "linear_weight_only_packed": frozenset({torch.int32}),
    "dequantize": _QUANTIZED,
    "linear_sparse24": _SPARSE,
    "linear_venom": _SPARSE,
    "linear_sparse_input": _ROWS,
    "mlp_sparse": _ROWS,
}
"""For each op the dtypes of weights, quantized or not, that a Triton kernel exists for."""

FP8_PRODUCTS = frozenset({"scaled_mm", "linear_dynamic", "linear_tensor", "linear_block"})
"""Ops whose Triton kernels multiply fp8 codes by fp8 codes, which needs tensor cores of sm_89 or later."""

CPU_PATHS = frozenset(
    {
        "scaled_mm",
        "linear_dynamic",
        "linear_tensor",
        "linear_block",
        "linear_grouped",
        "linear_llm_int8",
        "linear_weight_only",
        "linear_weight_only_packed",
        "linear_sparse24",
        "linear_venom",
        "linear_sparse_input",
        "mlp_sparse",
    }
)
"""Ops with an implementation of their own for the CPU; the others run the generic torch one there."""


def select_backend(op: str, dtype: torch.dtype, device: torch.device, backend: str) -> str:
    """Return "triton", "torch" (the generic implementation) or "cpu" (torch, made for the CPU).

    Args:
        op: name of the op, such as "scaled_mm".
        dtype: dtype of the quantized weight: torch.int8, an fp8 dtype, or torch.int32 where it is packed.
        device: device of the tensors.
        backend: "auto", "torch" or "triton".

    Raises:
        KernelError: for another backend, or when "triton" cannot run; the message says why.
    """
    if backend not in BACKENDS:
        raise KernelError(f"backend is {backend!r}: expected one of {', '.join(BACKENDS)}")
    has_kernel = dtype in TRITON_KERNELS.get(op, ())
    if backend == "triton":
        _require_triton(op, dtype, device, has_kernel)
        return "triton"
    on_gpu = has_kernel and device.type == "cuda" and triton_installed()
    if backend == "auto" and on_gpu and architecture(device) >= _least_architecture(op, dtype):
        return "triton"
    return "cpu" if device.type == "cpu" and op in CPU_PATHS else "torch"


class Call(NamedTuple):
    """What served a call of an op.

    Attributes:
        op: name of the op.
        dtype: dtype of the quantized numbers: torch.int8, an fp8 dtype, or torch.int32 where they are packed.
        backend: "triton", "torch" or "cpu", as `select_backend` gives it.
    """

    op: str
    dtype: torch.dtype
    backend: str


_counting: dict[object, Counter[Call]] = {}


@contextmanager
def counted(calls: Counter[Call] | None = None) -> Iterator[Counter[Call]]:
    """Give the counter that is added to at every call of an op until the end of the context.

    Calls are counted where they run, so a compiled model's are too; what a CUDA graph replays is not called again.
    It is a counter of the process: calls of other threads are among them.

    Args:
        calls: a counter to go on with; by default a new one.
    """
    calls = Counter() if calls is None else calls
    mine = object()
    _counting[mine] = calls
    try:
        yield calls
    finally:
        del _counting[mine]


def count(op: str, dtype: torch.dtype, backend: str) -> None:
    """Add a call that runs now to the counters that are open."""
    for calls in _counting.values():
        calls[Call(op, dtype, backend)] += 1


def take_backend(op: str, dtype: torch.dtype, device: torch.device, backend: str) -> str:
    """Return what `select_backend` returns, for a call that runs now: it is counted."""
    taken = select_backend(op, dtype, device, backend)
    if _counting:
        count(op, dtype, taken)
    return taken


@functools.cache
def triton_installed() -> bool:
    """Return whether Triton can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


def _require_triton(op: str, dtype: torch.dtype, device: torch.device, has_kernel: bool) -> None:
    """Raise KernelError, with the reason, unless a Triton kernel can run here."""
    if not has_kernel:
        raise KernelError(f"backend 'triton' has no kernel for {op} with {dtype} yet: use backend 'auto' or 'torch'")
    if not triton_installed():
        raise KernelError(
            f"backend 'triton' cannot run {op}: Triton is not installed (it exists on Linux only): "
            "use backend 'auto' or 'torch'"
        )
    if device.type != "cuda" and not (device.type == "cpu" and _interpreting()):
        raise KernelError(
            f"backend 'triton' cannot run {op} on device {device}: expected tensors on a CUDA device "
            "(on the CPU Triton runs only in its interpreter): use backend 'auto' or 'torch'"
        )
    found, least = architecture(device), _least_architecture(op, dtype)
    if found < least:
        raise KernelError(
            f"backend 'triton' cannot run {op} with {dtype} on sm_{found}: expected sm_{least} or later, "
            "use backend 'auto' or 'torch'"
        )


def _least_architecture(op: str, dtype: torch.dtype) -> int:
    """Return the first architecture that runs the op's Triton kernel: sm_80 is the first that Triton compiles for."""
    return 89 if op in FP8_PRODUCTS and dtype.is_floating_point else 80


def _interpreting() -> bool:
    """Return whether Triton runs kernels in its interpreter, on CPU tensors."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
