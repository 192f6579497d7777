"""QuantizedLinear: a linear layer that stays packed in memory, with one op call in forward."""

from collections.abc import Callable
from types import ModuleType

import torch
from quantkit_kernels import ops
from torch import nn

from quantkit.formats import FORMATS
from quantkit.scheme import Scheme


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
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.backend = scheme, backend
        self.format = layout.NAME
        self.stored = layout.tensor_specs(scheme, out_features, in_features, dtype)
        for name, spec in self.stored.items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    @property
    def _layout(self) -> ModuleType:
        """The format's module, looked up by name: a copy of the layer can hold a name, but no module."""
        return FORMATS[self.format]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output [..., N] in x's dtype, for x [..., K]."""
        if self._layout.is_packed(self.scheme):
            return ops.linear_weight_only_packed(
                x,
                self.get_buffer("weight_packed"),
                self.get_buffer("weight_scale"),
                self.bias,
                self.scheme.bits,
                self.backend,
            )
        codes, scale = self.codes_and_scale()
        product = ops.linear_weight_only if self.scheme.activation_dtype is None else ops.linear_dynamic
        return product(x, codes, scale, self.bias, self.backend)

    def __getattr__(self, name: str) -> torch.Tensor | nn.Module:
        """`weight` of a packed layer is its packed words: models that look at every layer's weight when they are built
        (to initialize it, say, which transformers skips for what was loaded) find something there."""
        if name == "weight" and "weight_packed" in self.__dict__.get("_buffers", {}):
            return self.get_buffer("weight_packed")
        found: torch.Tensor | nn.Module = super().__getattr__(name)
        return found

    @property
    def backend_in_use(self) -> str:
        """What the layer's product runs on where its tensors are: `triton`, `cpu` or `torch`."""
        packed = self._layout.is_packed(self.scheme)
        codes = self.get_buffer("weight_packed") if packed else self.codes_and_scale()[0]
        op = "linear_weight_only_packed" if packed else "linear_weight_only"
        if self.scheme.activation_dtype is not None:
            op = "linear_dynamic"
        return ops.select_backend(op, codes.dtype, codes.device, self.backend)

    def codes_and_scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [N, K] and scale [N, G]."""
        stored = {name: self.get_buffer(name) for name in self.stored}
        codes, scale = self._layout.decompress(self.scheme, stored, self.in_features)
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
