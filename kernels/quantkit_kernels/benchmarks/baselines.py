"""What else multiplies quantized weights, as cases: torch's own products, torchao and bitsandbytes where installed.

Other libraries quantize in their own ways, so that no bound of single numbers is known: their results must be near the
float layer's in norm. They are called as their documentation says; torchao's layers are compiled, which they need.
"""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit_kernels import formats
from quantkit_kernels.benchmarks.cases import Case, Given, Operands, llm_int8, product
from quantkit_kernels.benchmarks.gpu_clock import installed_version

NEAR = {"int8": 2.0**-4, "fp8": 2.0**-3, "nf4": 2.0**-2}
"""How near in norm another library's layer must be to the float layer: some six times what its codes cost."""


@functools.cache
def baselines(device: torch.device) -> tuple[dict[str, Case], dict[str, str]]:
    """Return what is measured beside the ops of a linear layer, on a CPU nothing; and of each library, what is there.

    Both by name. A library that is installed and cannot be imported, or is another than is known here, is said so.
    """
    on_gpu = device.type == "cuda"
    found = _of_torch() if on_gpu else {}
    said = {}
    for package, layers in {"torchao": _of_torchao, "bitsandbytes": _of_bitsandbytes}.items():
        version = installed_version(package)
        said[package] = version or "is not installed"
        if version and on_gpu:
            try:
                found |= layers()
            except Exception as error:  # whatever an import of another's code raises
                said[package] = f"{version} cannot be used: {type(error).__name__}: {str(error).splitlines()[:1]}"
    return found, said


def _of_torch() -> dict[str, Case]:
    """Return torch's products: of codes that are there already, as "int8 product" and "fp8 product" have them."""

    def int_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
        return (torch._int_mm(a, b.t()) * a_scale * b_scale.t()).to(dtype)

    def by_rows(
        a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool = False
    ) -> Tensor:
        # torch wants one scale an out feature as [1, N], and no stride in what it has one of
        columns = b_scale.t().contiguous()
        return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=columns, out_dtype=dtype, use_fast_accum=fast)

    return {
        "torch._int_mm, then scaled": product("int8", int_mm),
        "torch._scaled_mm rows": product("fp8", by_rows),
        "torch._scaled_mm rows, fast sums": product("fp8", functools.partial(by_rows, fast=True)),
        "torch._scaled_mm tensor": _scaled_mm_of_tensor(),
    }


def _scaled_mm_of_tensor() -> Case:
    dtype = torch.float8_e4m3fn

    def prepare(x: Tensor, weight: Tensor) -> Operands:
        a, a_scale = formats.quantize_per_tensor(x, dtype)
        b, b_scale = formats.quantize_weight(weight, dtype, granularity="tensor", scale_dtype=torch.float32)
        return a, b, a_scale, b_scale, x.dtype

    def run(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
        return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=out_dtype)

    def given(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, _: torch.dtype) -> Given:
        return a.double() * a_scale.double(), b.double() * b_scale.double(), math.inf, 1

    return Case(prepare, run, given, multiplies=8)


def _layer(
    make: Callable[[nn.Linear], Any], codes: str, multiplies: int, outliers: float = 0.0, graph: bool = True
) -> Case:
    """Return the case of another library's layer, which `make` makes of a float one, with codes of that name."""

    def prepare(x: Tensor, weight: Tensor) -> Operands:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        return x, make(layer), weight

    return Case(
        prepare,
        lambda x, layer, _: layer(x),
        lambda x, layer, weight: (x.double(), weight.double(), math.inf, -1),
        outliers,
        reads=2,
        layer_bits=4 if codes == "nf4" else 8,
        multiplies=multiplies,
        tolerance=NEAR[codes],
        graph=graph,
    )


def _of_torchao() -> dict[str, Case]:
    """Return torchao's layers by name, compiled."""
    from torchao import quantization

    def made(config: Any) -> Callable[[nn.Linear], Any]:
        def make(layer: nn.Linear) -> Any:
            holder = nn.Sequential(layer)
            quantization.quantize_(holder, config)
            return _Compiled(holder[0])

        return make

    return {
        "torchao int8 weights": _layer(made(quantization.Int8WeightOnlyConfig()), "int8", 16),
        "torchao w8a8": _layer(made(quantization.Int8DynamicActivationInt8WeightConfig()), "int8", 8),
        "torchao fp8": _layer(
            made(quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())), "fp8", 8
        ),
    }


class _Compiled:
    """A layer whose weight is an argument of one compiled function, so that copies share its code."""

    def __init__(self, layer: nn.Module) -> None:
        self.weight = layer.weight

    def __call__(self, x: Tensor) -> Tensor:
        return _compiled_linear()(x, self.weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Compiled":
        other = copy.copy(self)
        other.weight = copy.deepcopy(self.weight, memo)
        return other


@functools.cache
def _compiled_linear() -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = 1024  # one for each shape
    return torch.compile(lambda x, weight: F.linear(x, weight), dynamic=False)


def _of_bitsandbytes() -> dict[str, Case]:
    """Return bitsandbytes' layers by name; with outliers the host waits for the device, and no graph is captured."""
    import bitsandbytes

    def eight_bits(threshold: float) -> Callable[[nn.Linear], Any]:
        def make(layer: nn.Linear) -> Any:
            made = bitsandbytes.nn.Linear8bitLt(
                layer.in_features, layer.out_features, bias=False, has_fp16_weights=False, threshold=threshold
            )
            made.weight = bitsandbytes.nn.Int8Params(layer.weight.data.cpu(), requires_grad=False)
            return made.to(layer.weight.device).eval()

        return make

    def four_bits(layer: nn.Linear) -> Any:
        made = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        made.weight = bitsandbytes.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        return made.to(layer.weight.device).eval()

    outliers = llm_int8(0.001).outliers
    return {
        "bitsandbytes int8, no threshold": _layer(eight_bits(0.0), "int8", 8),
        "bitsandbytes llm-int8, 0.1 % outliers": _layer(eight_bits(6.0), "int8", 8, outliers, graph=False),
        "bitsandbytes nf4": _layer(four_bits, "nf4", 16),
    }
