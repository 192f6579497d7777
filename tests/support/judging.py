"""What holds a checkpoint of ours, or of others, against plain transformers with compressed-tensors or bitsandbytes."""

from pathlib import Path
from typing import Any

import torch
from quantkit_kernels.formats import dequantize_weight
from torch import nn

from quantkit.modules import QuantizedLinear


def reference(folder: Path, *, decoded: bool) -> nn.Module:
    """The checkpoint through plain transformers: decoded once, or with activations quantized as it says."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    words: dict[str, Any] = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if decoded else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **words).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(
            module, "quantization_scheme"
        ):  # attention with a cache has one too
            _give_three_axes(module)
    return model


def _give_three_axes(layer: nn.Module) -> None:
    """Make the layer see tokens [M, K] as [1, M, K]: of two axes compressed-tensors takes both for the tokens', so that
    a layer whose model flattens its tokens (OPT's fc1) would get one scale for all of them, whatever the config says.
    """
    flat = []

    def before(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        flat.append(args[0].ndim == 2)
        return (args[0][None],) if flat[-1] else args

    def after(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        return out[0] if flat.pop() else out

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


def inputs_of(model: nn.Module, names: set[str], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What reaches each layer of a model."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].detach())
        )
        for name in names
    ]
    with torch.inference_mode():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def bound(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """How far two right implementations of the layer may be apart, for x [M, K]: [M, N] in float64.

    The outputs differ by at most the sum over K of |w| times how far the rounded activations are apart. Then each
    rounds its result, and where it computes in a narrower dtype its operands (x / scale too) and partial sums, by at
    most a few eps of the sum of |w||x|; float32 sums add K eps.
    """
    codes, scale = layer.codes_and_scale()
    weight = dequantize_weight(codes, scale, layer.scheme.weight_granularity).double().abs()
    x = x.double().abs()
    bias = layer.bias.double().abs() if layer.bias is not None else torch.zeros(1, dtype=torch.float64)
    eps = torch.finfo(scale.dtype).eps
    rounding = 4 * eps + 2 * x.shape[-1] * torch.finfo(torch.float32).eps
    reach = 128 if layer.scheme.weight_dtype == "int8" else 448
    kept = torch.minimum(x, reach * layer.get_buffer("input_scale").double()) if layer.scheme.is_static else x
    return _apart(layer, x) @ weight.T + rounding * (kept @ weight.T + bias)


def _apart(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """How far two right roundings of activations of the magnitudes x [M, K] may be apart.

    Both round to within half a step. Int8: the step is absmax/127 here and absmax/127.5 there, so each errs by at most
    absmax/254, a step together. A stored scale is one step here and there; beyond its reach codes end at -127 here and
    at -128 there, a step apart again. E4M3: half a unit in the last place is 2**-4 of a normal number, and 2**-10 steps
    near zero. Scales found at run time round too: twice that is enough. A stored one is the same number here and there,
    and an eighth more is for x / scale in a narrower dtype; beyond its reach both end at 448.
    """
    dtype, shared = layer.scheme.activation_dtype, layer.scheme.activation
    if dtype is None:
        return torch.zeros_like(x)
    largest = 127 if dtype == "int8" else 448
    if shared == "tensor-static":
        step = layer.get_buffer("input_scale").double().expand_as(x)
    elif shared == "group":
        step = x.unflatten(-1, (-1, 128)).amax(-1).repeat_interleave(128, -1) / largest
    else:
        absmax = x.amax(-1, keepdim=True) if shared == "token" else x.amax()
        step = (absmax / largest).expand_as(x)
    if dtype == "int8":
        return step
    half = torch.maximum(x * 2.0**-4, step * 2.0**-10)
    return 4 * half if shared != "tensor-static" else 2.25 * half * (x < 1.01 * 448 * step)


def divergence(base: nn.Module, model: nn.Module, tokens: torch.Tensor) -> float:
    """Kullback-Leibler divergence from the base, in nats a token."""
    total = 0.0
    with torch.inference_mode():
        for batch in tokens.split(8):
            p = torch.log_softmax(base(batch).logits.double(), -1)
            q = torch.log_softmax(model(batch).logits.double(), -1)
            total += float((p.exp() * (p - q)).sum(-1).sum())
    return total / tokens.numel()
