import pytest
import torch

from quantkit.devices import pick_device
from quantkit.errors import QuantkitError


def test_devices_that_are_there():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("count", "device", "expected"), [(1, "auto", "cuda"), (1, "cuda", "cuda"), (2, "cuda:1", "cuda:1")]
)
def test_gpus_that_are_there(monkeypatch, count, device, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert pick_device(device) == torch.device(expected)


@pytest.mark.parametrize(
    "device", ["", "tpu", "cuda:", "cuda:x", "cpu:99999999999999999999", "meta", "mps", "xpu:0", "CPU"]
)
def test_unknown_devices_are_refused(device):
    with pytest.raises(QuantkitError, match=r"use auto, cpu, cuda or cuda:N"):
        pick_device(device)


@pytest.mark.parametrize(
    ("available", "count", "device"), [(False, 0, "cuda"), (False, 0, "cuda:0"), (True, 2, "cuda:2")]
)
def test_gpus_that_are_not_there_are_refused(monkeypatch, available, count, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(QuantkitError, match=rf"'{device}'.* sees {count} GPUs; use --device cpu"):
        pick_device(device)
