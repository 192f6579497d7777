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
        ("linear_dynamic", E4M3, CUDA, "auto", "triton"),
        ("linear_weight_only_packed", torch.int32, CUDA, "auto", "triton"),
        ("linear_weight_only", E4M3, CUDA, "auto", "triton"),
        ("dequantize", E4M3, CUDA, "auto", "triton"),
        ("dequantize", E4M3, CPU, "auto", "torch"),
        ("linear_dynamic", torch.int8, CPU, "auto", "cpu"),
        ("linear_dynamic", torch.int8, CPU, "torch", "cpu"),
        ("linear_weight_only", E4M3, CPU, "auto", "cpu"),
        ("linear_weight_only_packed", torch.int32, CPU, "torch", "cpu"),
        ("scaled_mm", torch.int8, META, "auto", "torch"),
        ("linear_tensor", torch.int8, CPU, "auto", "cpu"),
        ("linear_tensor", torch.int8, CUDA, "auto", "triton"),
        ("linear_llm_int8", torch.int8, CPU, "auto", "cpu"),
        ("linear_llm_int8", torch.int8, CUDA, "auto", "triton"),
        ("linear_grouped", torch.int8, CUDA, "auto", "triton"),
        ("linear_grouped", E4M3, CPU, "auto", "cpu"),
        ("rms_norm_quantize", E4M3, CUDA, "auto", "triton"),
        ("rms_norm_quantize", E4M3, CPU, "auto", "torch"),
        ("linear_block", E4M3, CPU, "auto", "cpu"),
        ("linear_block", E4M3, CUDA, "auto", "triton"),
    ],
)
def test_selection(monkeypatch, op, dtype, device, backend, expected):
    monkeypatch.setattr(backends, "triton_installed", lambda: True)
    monkeypatch.setattr(backends, "architecture", lambda device: 90)
    assert ops.select_backend(op, dtype, device, backend) == expected


@pytest.mark.parametrize(
    ("op", "dtype", "least"),
    [
        ("scaled_mm", torch.int8, 80),
        ("linear_tensor", torch.int8, 80),
        ("linear_weight_only", E4M3, 80),
        ("linear_grouped", E4M3, 80),
        ("quantize_per_group", E4M3, 80),
        ("dequantize", E4M3, 80),
        ("scaled_mm", E4M3, 89),
        ("linear_dynamic", torch.float8_e5m2, 89),
        ("linear_tensor", E4M3, 89),
        ("linear_block", E4M3, 89),
    ],
)
def test_devices_too_old_for_a_kernel_take_torch_or_refuse(monkeypatch, op, dtype, least):
    monkeypatch.setattr(backends, "triton_installed", lambda: True)
    monkeypatch.setattr(backends, "architecture", lambda device: least)
    assert ops.select_backend(op, dtype, CUDA, "auto") == ops.select_backend(op, dtype, CUDA, "triton") == "triton"
    before = {80: 75, 89: 86}[least]
    monkeypatch.setattr(backends, "architecture", lambda device: before)
    assert ops.select_backend(op, dtype, CUDA, "auto") == "torch"
    with pytest.raises(KernelError, match=f"on sm_{before}: expected sm_{least} or later"):
        ops.select_backend(op, dtype, CUDA, "triton")


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
        ("linear_weight_only", torch.uint8, CUDA, "triton", "no kernel for linear_weight_only with torch.uint8 yet"),
        ("linear_block", torch.int8, CUDA, "triton", "no kernel for linear_block with torch.int8 yet"),
        ("linear_llm_int8", E4M3, CUDA, "triton", "no kernel for linear_llm_int8 with torch.float8_e4m3fn yet"),
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
