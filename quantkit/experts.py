"""QuantizedExperts: the weights of all experts of a mixture, packed in memory, where a 3-D parameter stood.

The module takes the parameter's place, so that the model's own code goes on running its experts: what it does with the
parameter is answered by the `PackedWeight` that the module holds. E experts, K in features, N out features; a parameter
is out x in, [E, N, K], or in x out, [E, K, N].
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from quantkit_kernels import ops
from torch import nn

from quantkit.errors import QuantkitError
from quantkit.modules import op_of, quantize_linear
from quantkit.packed import Holder, PackedWeight, is_groupable, refusal
from quantkit.scheme import Scheme


def quantize_experts(
    weight: torch.Tensor, scheme: Scheme, in_axis: int, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [E, A, B] in the weight's own layout, and their scale: [E, A, G] out x in, or [E, 1, B] in x out.

    Each expert is quantized by rows (out features), one expert after the other; the scale has the weight's dtype, but
    for LLM.int8, whose scales are float32.

    Args:
        weight: [E, A, B], float32, bfloat16 or float16, all finite.
        scheme: what the numbers shall look like.
        in_axis: the axis of the in features: 2 when the weight is out x in, 1 when it is in x out.
        dtype: dtype of the scale (but LLM.int8's), by default the weight's.

    Raises:
        QuantkitError: scales that aren't by row, a group size that doesn't divide the in features, or groups of in
            features that aren't the last axis.
    """
    size = scheme.group_size
    if scheme.weight_granularity != "row":
        raise QuantkitError(f"experts have a scale a row, and {scheme.label!r} has none; leave them in float")
    if size is not None and (in_axis != 2 or weight.shape[2] % size):
        raise QuantkitError(
            f"experts {list(weight.shape)} with in features on axis {in_axis} have no groups of {size}: groups need "
            "out x in weights whose in features they divide; use group=channel"
        )
    codes = torch.empty(weight.shape, dtype=getattr(torch, scheme.code_dtype), device=weight.device)
    scales = []
    for expert, float_weight in enumerate(weight):
        rows = float_weight.t() if in_axis == 1 else float_weight
        found, scale = quantize_linear(rows, scheme, dtype)
        codes[expert] = found.t() if in_axis == 1 else found
        scales.append(scale.t() if in_axis == 1 else scale)
    return codes, torch.stack(scales)


class QuantizedExperts(Holder, nn.Module):
    """The experts' weights [E, A, B] as buffers, used like the parameter that they stand for.

    `weight` holds the codes in the parameter's own layout, `weight_scale` their scales and, for static activations,
    `input_scale` [E] those; `state_dict()` is just these. `packed` is what a model's code multiplies with, and the
    module itself is taken for it. A change of the model's dtype changes nothing here.

    Args:
        codes: [E, A, B], int8 or fp8.
        scale: [E, A, G] with in features on axis 2, [E, 1, B] with in features on axis 1.
        in_axis: the axis of the in features, 1 or 2.
        scheme: what the numbers look like.
        dtype: the dtype of the float parameter; by default that of the scale. Code that casts activations to the
            parameter's dtype sees this one.
        input_scale: [E], for static activations.
        backend: `auto`, `torch` or `triton`.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        in_axis: int,
        scheme: Scheme,
        *,
        dtype: torch.dtype | None = None,
        input_scale: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.in_axis, self.scheme, self.backend = in_axis, scheme, backend
        self.float_dtype = scale.dtype if dtype is None else dtype
        self.register_buffer("weight", codes.contiguous())
        self.register_buffer("weight_scale", scale.contiguous())
        if input_scale is not None:
            self.register_buffer("input_scale", input_scale.contiguous())

    @property
    def packed(self) -> PackedWeight:
        """The weights of all experts."""
        return PackedWeight(
            self.get_buffer("weight"),
            self.get_buffer("weight_scale"),
            self.in_axis,
            self.scheme,
            dtype=self.float_dtype,
            input_scale=self._buffers.get("input_scale"),
            backend=self.backend,
        )

    @property
    def op(self) -> str:
        """The name of the op that an expert's product is."""
        return op_of(self.scheme, packed=False)

    @property
    def backend_in_use(self) -> str:
        """What an expert's product runs on where the codes are: `triton`, `cpu` or `torch`."""
        codes = self.get_buffer("weight")
        return ops.select_backend(self.op, codes.dtype, codes.device, self.backend)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(torch.Tensor, name):
                raise
            raise refusal(f"{name!r}", self.packed) from None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizedExperts":
        """Move buffers as bytes, so that a change of dtype passes them by."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        for name, buffer in kept.items():
            self._buffers[name] = buffer.view(torch.uint8)
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for name, buffer in kept.items():
                moved = self.get_buffer(name)
                self._buffers[name] = moved.view(buffer.dtype) if moved.dtype == torch.uint8 else buffer
        return self

    def extra_repr(self) -> str:
        """Shape and scheme, for printing."""
        return f"{list(self.shape)}, in_axis={self.in_axis}, {self.scheme.label}"


def quantized_experts(model: nn.Module) -> Iterator[tuple[str, QuantizedExperts]]:
    """Every QuantizedExperts by the name of the parameter that it stands for."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            yield name, module


def put_experts(model: nn.Module, name: str, experts: QuantizedExperts) -> None:
    """Put experts in place of the parameter of that name, or of experts that stand there already."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    module._parameters.pop(leaf, None)
    setattr(module, leaf, experts)


def use_packed_experts(model: nn.Module, grouped: str = "eager") -> None:
    """Make a model that holds packed experts run code that knows them: its own, expert by expert, or `grouped`.

    transformers swaps a model's own code for its experts, by a word in the model's configs, for products over the whole
    parameter at once, and some of those need float weights.

    Args:
        model: a model whose experts lie where they will run.
        grouped: the word for code that calls grouped products. It is taken on a GPU, where they wait for no device, if
            every scheme of the model's experts has them (`packed.is_groupable`).
    """
    experts = [module for _, module in quantized_experts(model)]
    if not experts:
        return
    fits = all(is_groupable(each.scheme) and each.device.type != "cpu" for each in experts)
    word = grouped if fits else "eager"
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_experts_implementation", word) != word:
            config._experts_implementation = word
