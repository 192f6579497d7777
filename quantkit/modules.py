"""QuantizedLinear: a linear layer that stays packed in memory, with one op call in forward."""

from collections.abc import Callable
from types import ModuleType

import torch
from quantkit_kernels import ops
from quantkit_kernels.formats import quantize_weight
from torch import nn

from quantkit.formats import FORMATS
from quantkit.scheme import Scheme


def quantize_linear(
    weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] and their scale [N, G], [1] or [ceil(N / 128), ceil(K / 128)], as the scheme says.

    The scale is what `quantize_weight` finds, rounded to its dtype; codes are the weight / that rounded scale.
    LLM.int8's scale is float32, the largest magnitude of the row / 127 (arXiv:2208.07339, equation 5).

    Args:
        weight: [N, K], float32, bfloat16 or float16, all finite.
        scheme: what the numbers shall look like.
        dtype: dtype of the scale (but LLM.int8's), by default the weight's: a weight in float32 that was changed keeps
            its bits until it is quantized, and its scale has the dtype that the model is stored in.
    """
    return quantize_weight(
        weight,
        getattr(torch, scheme.weight_dtype),
        scheme.group_size,
        scheme.weight_range,
        scheme.weight_granularity,
        scale_dtype=torch.float32 if scheme.threshold is not None else dtype,
    )


def op_of(scheme: Scheme, packed: bool) -> str:
    """The name of the op that multiplies activations with a weight of the scheme."""
    if scheme.activation_dtype is None:
        return "linear_weight_only_packed" if packed else "linear_weight_only"
    if scheme.threshold is not None:
        return "linear_llm_int8"
    kinds = {"tensor": "linear_tensor", "tensor-static": "linear_tensor", "group": "linear_block"}
    return kinds.get(scheme.activation, "linear_dynamic")


class QuantizedLinear(nn.Module):
    """A linear layer [N, K] whose buffers are the tensors of its format, as they lie on disk.

    So `state_dict()` is what was loaded, byte for byte, and nothing is unpacked but inside the op. A change of dtype of
    the module (`model.half()`) changes the bias only: codes and scales keep theirs.

    Args:
        in_features: K.
        out_features: N.
        scheme: what the numbers look like.
        layout: the format that its tensors are in.
        bias: whether it has a bias.
        dtype: dtype of the bias, and of the scales until they are loaded.
        backend: `auto`, `torch` or `triton`.
        transposed: whether the float weight lies in the model as [K, N]; some formats then store codes so.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        layout: ModuleType,
        *,
        bias: bool,
        dtype: torch.dtype,
        backend: str = "auto",
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.backend, self.transposed = scheme, backend, transposed
        self.format = layout.NAME
        self.stored = layout.tensor_specs(scheme, out_features, in_features, dtype, transposed)
        for name, spec in self.stored.items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    @property
    def _layout(self) -> ModuleType:
        """The format's module, looked up by name: a copy of the layer can hold a name, but no module."""
        return FORMATS[self.format]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output [..., N] in x's dtype, for x [..., K]."""
        op, scheme, bias, backend = self.op, self.scheme, self.bias, self.backend
        if op == "linear_weight_only_packed":
            packed, scale = self.get_buffer("weight_packed"), self._by_row(self.get_buffer("weight_scale"))
            return ops.linear_weight_only_packed(x, packed, scale, bias, scheme.bits, backend)
        codes, scale = self.codes_and_scale()
        if op == "linear_tensor":
            input_scale = self.get_buffer("input_scale") if scheme.is_static else None
            return ops.linear_tensor(x, codes, scale, input_scale, bias, backend)
        if op == "linear_block":
            return ops.linear_block(x, codes, scale, bias, backend)
        scale = self._by_row(scale)
        if op == "linear_llm_int8":
            return ops.linear_llm_int8(x, codes, scale, bias, float(scheme.threshold or 0.0), backend)
        product = ops.linear_weight_only if op == "linear_weight_only" else ops.linear_dynamic
        return product(x, codes, scale, bias, backend)

    def _by_row(self, scale: torch.Tensor) -> torch.Tensor:
        """The weight's scale as [N, G], also where the whole weight has one."""
        return scale.expand(self.out_features, 1).contiguous() if scale.ndim == 1 else scale

    def __getattr__(self, name: str) -> torch.Tensor | nn.Module:
        """`weight` of a packed layer is its packed words: models that look at every layer's weight when they are built
        (to initialize it, say, which transformers skips for what was loaded) find something there."""
        if name == "weight" and "weight_packed" in self.__dict__.get("_buffers", {}):
            return self.get_buffer("weight_packed")
        found: torch.Tensor | nn.Module = super().__getattr__(name)
        return found

    @property
    def op(self) -> str:
        """The name of the op that the layer's product is."""
        return op_of(self.scheme, self._layout.is_packed(self.scheme))

    @property
    def backend_in_use(self) -> str:
        """What the layer's product runs on where its tensors are: `triton`, `cpu` or `torch`."""
        packed = self._layout.is_packed(self.scheme)
        codes = self.get_buffer("weight_packed") if packed else self.codes_and_scale()[0]
        return ops.select_backend(self.op, codes.dtype, codes.device, self.backend)

    def codes_and_scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [N, K] and their scale [N, G], [1] or [ceil(N / 128), ceil(K / 128)]."""
        stored = {name: self.get_buffer(name) for name in self.stored}
        codes, scale = self._layout.decompress(self.scheme, stored, self.in_features, self.transposed)
        return codes, scale

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Move buffers as bytes, so that a change of dtype passes them by."""
        kept = {name: self.get_buffer(name) for name in self.stored}
        for name, buffer in kept.items():
            self._buffers[name] = buffer.view(torch.uint8)
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for name, buffer in kept.items():
                moved = self.get_buffer(name)
                # `module.type(dtype)` casts bytes as well: then the buffer stays what it was.
                self._buffers[name] = moved.view(buffer.dtype) if moved.dtype == torch.uint8 else buffer
        return self

    def extra_repr(self) -> str:
        """Sizes and scheme, for printing."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.scheme.label}"
