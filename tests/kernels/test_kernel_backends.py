"""Backends are chosen as asked, or refused with the reason; imports stay light."""

import subprocess
import sys

import pytest
import torch
from quantkit_kernels import backends, ops
from quantkit_kernels.errors import KernelError

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("op", "dtype", "device", "backend", "expected"),
    [
        ("scaled_mm", torch.int8, CUDA, "auto", "triton"),
        ("linear_dynamic", torch.int8, CUDA, "auto", "triton"),
        ("linear_dynamic", torch.int8, CUDA, "triton", "triton"),
        ("linear_dynamic", torch.int8, CUDA, "torch", "torch"),
        ("linear_dynamic", E4M3, CUDA, "auto", "torch"),
        ("linear_weight_only_packed", torch.int32, CUDA, "auto", "torch"),
        ("linear_dynamic", torch.int8, CPU, "auto", "cpu"),
        ("linear_dynamic", torch.int8, CPU, "torch", "cpu"),
        ("linear_weight_only", E4M3, CPU, "auto", "cpu"),
        ("linear_weight_only_packed", torch.int32, CPU, "torch", "cpu"),
        ("scaled_mm", torch.int8, META, "auto", "torch"),
        ("linear_tensor", torch.int8, CPU, "auto", "cpu"),
        ("linear_tensor", torch.int8, CUDA, "auto", "torch"),
        ("linear_llm_int8", torch.int8, CPU, "auto", "cpu"),
        ("linear_llm_int8", torch.int8, CUDA, "auto", "torch"),
        ("linear_block", E4M3, CPU, "auto", "cpu"),
        ("linear_block", E4M3, CUDA, "auto", "torch"),
    ],
)
def test_selection(monkeypatch, op, dtype, device, backend, expected):
    monkeypatch.setattr(backends, "triton_installed", lambda: True)
    assert ops.select_backend(op, dtype, device, backend) == expected


def test_auto_without_triton_is_torch_and_triton_without_triton_is_refused(monkeypatch):
    monkeypatch.setattr(backends, "triton_installed", lambda: False)
    assert ops.select_backend("scaled_mm", torch.int8, CUDA, "auto") == "torch"
    with pytest.raises(KernelError, match="Triton is not installed"):
        ops.select_backend("scaled_mm", torch.int8, CUDA, "triton")


@pytest.mark.parametrize(
    ("op", "dtype", "device", "backend", "message"),
    [
        ("scaled_mm", torch.int8, CPU, "cuda", "'cuda': expected one of auto, torch, triton"),
        ("scaled_mm", torch.int8, CPU, "", "expected one of auto, torch, triton"),
        ("scaled_mm", torch.int8, CPU, "triton", "on device cpu: expected tensors on a CUDA device"),
        ("scaled_mm", E4M3, CUDA, "triton", "no kernel for scaled_mm with torch.float8_e4m3fn yet"),
        ("linear_weight_only", E4M3, CUDA, "triton", "no kernel for linear_weight_only"),
        ("linear_tensor", torch.int8, CUDA, "triton", "no kernel for linear_tensor with torch.int8 yet"),
        ("linear_block", E4M3, CUDA, "triton", "no kernel for linear_block with torch.float8_e4m3fn yet"),
        ("linear_llm_int8", torch.int8, CUDA, "triton", "no kernel for linear_llm_int8 with torch.int8 yet"),
    ],
)
def test_refusals_say_why(monkeypatch, op, dtype, device, backend, message):
    monkeypatch.setattr(backends, "triton_installed", lambda: True)
    if device == CPU and backend == "triton":
        pytest.importorskip("triton")
    with pytest.raises(KernelError, match=message):
        ops.select_backend(op, dtype, device, backend)


@pytest.mark.parametrize(
    ("module", "absent"),
    [("quantkit_kernels", "torch"), ("quantkit_kernels.ops", "triton"), ("quantkit_kernels.reference", "triton")],
)
def test_imports_stay_light(module, absent):
    program = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
