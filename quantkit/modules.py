"""QuantizedLinear: a linear layer that stays packed in memory, with one op call in forward."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from quantkit_kernels import cpu_int4, decoded, ops
from quantkit_kernels.dispatch import is_plain_call
from quantkit_kernels.formats import quantize_weight
from torch import nn

from quantkit.formats import FORMATS
from quantkit.scheme import Scheme


def quantize_linear(
    weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] and their scale [N, G], [1] or [ceil(N / 128), ceil(K / 128)], as the scheme says.

    The scale is what `quantize_weight` finds, rounded to its dtype; codes are the weight / that rounded scale.
    LLM.int8's scale is float32, the largest magnitude of the row / 127 (arXiv:2208.07339, equation 5). Weights in float
    are their own codes, in `dtype`, with scales of 1.

    Args:
        weight: [N, K], float32, bfloat16 or float16, all finite.
        scheme: what the numbers shall look like.
        dtype: dtype of the scale (but LLM.int8's), by default the weight's: a weight in float32 that was changed keeps
            its bits until it is quantized, and its scale has the dtype that the model is stored in.
    """
    if scheme.is_float:
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("the weight holds NaN or infinity: it cannot be packed")
        codes = weight.to(dtype or weight.dtype)
        return codes, codes.new_ones(len(codes), 1)
    return quantize_weight(
        weight,
        getattr(torch, scheme.code_dtype),
        scheme.group_size,
        scheme.weight_range,
        scheme.weight_granularity,
        scale_dtype=torch.float32 if scheme.threshold is not None else dtype,
        bits=scheme.bits,
    )


def op_of(scheme: Scheme, packed: bool) -> str:
    """The name of the op that multiplies activations with a weight of the scheme."""
    if scheme.activation_dtype is None and scheme.sparsity is not None:
        return "linear_sparse24" if scheme.tiles is None else "linear_venom"
    if scheme.activation_dtype is None:
        return "linear_weight_only_packed" if packed else "linear_weight_only"
    if scheme.threshold is not None:
        return "linear_llm_int8"
    kinds = {"tensor": "linear_tensor", "tensor-static": "linear_tensor", "group": "linear_block"}
    return kinds.get(scheme.activation, "linear_dynamic")


SPARSE = ("linear_sparse24", "linear_venom")
"""The ops whose weights are packed without their zeros."""


@dataclass(frozen=True)
class Decoded:
    """A decoded weight [N, K] that a layer keeps, and what it was made for.

    Attributes:
        weight: what `quantkit_kernels.decoded.decode_weight` gave.
        code_dtype: the dtype of the codes.
        scale: the weight's scale, as the op takes it.
        dtype: that of the activations.
        sources: each buffer that it was made from, with its place in memory and its version.
    """

    weight: torch.Tensor
    code_dtype: torch.dtype
    scale: torch.Tensor
    dtype: torch.dtype
    sources: tuple[tuple[torch.Tensor, int, int], ...]

    def is_of(self, dtype: torch.dtype, buffers: list[torch.Tensor]) -> bool:
        """Whether it was made for activations of the dtype, from these buffers as they are now."""
        return self.dtype == dtype and all(
            buffer is source and buffer.data_ptr() == place and buffer._version == version
            for buffer, (source, place, version) in zip(buffers, self.sources, strict=True)
        )


class QuantizedLinear(nn.Module):
    """A linear layer [N, K] whose buffers are the tensors of its format, as they lie on disk.

    So `state_dict()` is what was loaded, byte for byte, and nothing is unpacked but inside the op. A change of dtype of
    the module (`model.half()`) changes the bias only: codes and scales keep theirs.

    On a CPU weights in FP8, and weights that alone are quantized, are decoded at every call, and with few tokens that
    takes longer than the product. `keep_decoded = True` (or `keep_decoded(model)` for all layers) keeps what was
    decoded in the first call, in the order that the product reads: with few tokens faster than the float layer, for 2
    bytes a weight more in bfloat16 and 4 in float32. It changes nothing for int8 weights with int8 activations. What is
    kept follows the buffers: it is decoded anew where one was replaced, moved or written to (but not through `.data`,
    which leaves no trace).

    4-bit weights alone, with activations in bfloat16, are kept in the order that a kernel of torch reads, half a byte a
    weight beside what is stored, whatever `keep_decoded` says: see `quantkit_kernels.cpu_int4`.

    A 2:4 sparse weight is unpacked in the op. On a CPU that takes longer than the product with any number of tokens, so
    that there it is kept decoded unless `keep_decoded` is False. With activations in 8 bits no op takes it packed:
    codes are unpacked in the first call and kept, 1 byte a weight beside what is stored.

    Args:
        in_features: K.
        out_features: N.
        scheme: what the numbers look like.
        layout: the format that its tensors are in.
        bias: whether it has a bias.
        dtype: dtype of the bias, and of the scales until they are loaded.
        backend: `auto`, `torch` or `triton`.
        transposed: whether the float weight lies in the model as [K, N]; some formats then store codes so.

    Attributes:
        keep_decoded: whether a decoded weight is kept on a CPU; None is for sparse weights alone.
        is_merged: whether its tensors are made of others while they are loaded.
    """

    keep_decoded: bool | None = None
    is_merged = False

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
        self.format, self._op = layout.NAME, op_of(scheme, layout.is_packed(scheme))
        self._decoded: Decoded | None = None
        self.stored = layout.tensor_specs(scheme, out_features, in_features, dtype, transposed)
        for name, spec in self.stored.items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    @property
    def _words(self) -> str:
        """The name of the buffer that holds packed codes."""
        return "weight_packed" if "weight_packed" in self.stored else "weight"

    @property
    def _layout(self) -> ModuleType:
        """The format's module, looked up by name: a copy of the layer can hold a name, but no module."""
        return FORMATS[self.format]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output [..., N] in x's dtype, for x [..., K]."""
        op, scheme, bias, backend = self._op, self.scheme, self._parameters.get("bias"), self.backend
        keeps = op in SPARSE if self.keep_decoded is None else self.keep_decoded
        keeps = keeps and backend != "triton"  # which is an order: the op obeys it, or says why not
        if keeps and scheme.activation_dtype != "int8" and is_plain_call(x, bias):
            found = self._decoded_for(x.dtype)
            if found is not None:
                given = self.get_buffer("input_scale") if scheme.is_static else None
                return decoded.linear(op, x, found.weight, found.code_dtype, found.scale, given, bias)
        if op == "linear_weight_only_packed":
            reordered = self._reordered_for(x)
            if reordered is not None:
                return cpu_int4.linear(x, reordered.weight, reordered.scale, bias)
            packed, scale = self.get_buffer(self._words), self._by_row(self.get_buffer("weight_scale"))
            return ops.linear_weight_only_packed(x, packed, scale, bias, scheme.bits, backend)
        if op in SPARSE:
            parts = self.sparse_parts()
            sparse_scale = None if scheme.is_float else self._by_row(self.get_buffer("weight_scale"))
            if scheme.tiles is not None:
                v, m = scheme.tiles
                return ops.linear_venom(x, parts[0], parts[1], parts[2], sparse_scale, bias, v, m, backend)
            return ops.linear_sparse24(x, parts[0], parts[1], sparse_scale, bias, backend)
        kept = scheme.sparsity is not None and (is_plain_call(x, bias) or _is_eager_on_gpu(x))
        codes, scale = self._unpacked() if kept else self.codes_and_scale()
        if op == "linear_tensor":
            input_scale = self.get_buffer("input_scale") if scheme.is_static else None
            return ops.linear_tensor(x, codes, scale, input_scale, bias, backend)
        if op == "linear_block":
            return ops.linear_block(x, codes, scale, bias, backend)
        scale = self._by_row(scale)
        columns = self._buffers.get("outlier_columns")
        if columns is not None and columns.numel():
            return self._with_float_columns(x, codes, scale, columns.long())
        if op == "linear_llm_int8":
            return ops.linear_llm_int8(x, codes, scale, bias, float(scheme.threshold or 0.0), backend)
        product = ops.linear_weight_only if op == "linear_weight_only" else ops.linear_dynamic
        return product(x, codes, scale, bias, backend)

    def _decoded_for(self, dtype: torch.dtype) -> Decoded | None:
        """The decoded weight for activations of the dtype; None where a change of its buffers would leave no trace."""

        def decode(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scale = scale if self._op in ("linear_tensor", "linear_block") else self._by_row(scale)
            return decoded.decode_weight(self._op, codes, scale, dtype), scale

        return self._kept(dtype, decode)

    def _reordered_for(self, x: torch.Tensor) -> Decoded | None:
        """4-bit codes in the order of a CPU's kernel, made once and kept; None where it takes no such x, or layer."""
        taken = self.scheme.weight_dtype == "int4" and self.backend != "triton" and x.dtype == torch.bfloat16
        if not (taken and is_plain_call(x, self.bias)):  # first of all: a compiler is not to ask how many tokens
            return None
        if not 0 < x.numel() <= cpu_int4.TOKENS * self.in_features:
            return None
        scale = self._by_row(self.get_buffer("weight_scale"))
        if cpu_int4.group_size(self.out_features, self.in_features, scale) is None:
            return None
        return self._kept(torch.uint8, lambda codes, scale: cpu_int4.repack(codes, self._by_row(scale)))

    def _unpacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What `codes_and_scale` gives, unpacked once where a weight is 2:4 sparse."""
        found = self._kept(getattr(torch, self.scheme.code_dtype), lambda codes, scale: (codes, scale))
        return self.codes_and_scale() if found is None else (found.weight, found.scale)

    def _kept(
        self,
        dtype: torch.dtype,
        make: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ) -> Decoded | None:
        """What `make` made of codes and scale, for this dtype and the buffers as they are; made anew where it wasn't.

        None where a change of the buffers would leave no trace.
        """
        held = self._buffers  # `get_buffer` takes microseconds for each
        buffers = [buffer for name in self.stored if (buffer := held[name]) is not None]
        if any(buffer.is_inference() for buffer in buffers):
            return None
        if self._decoded is None or not self._decoded.is_of(dtype, buffers):
            self._decoded = None  # its memory is free before the next is made
            codes, scale = self.codes_and_scale()
            weight, scale = make(codes, scale)
            sources = tuple((buffer, buffer.data_ptr(), buffer._version) for buffer in buffers)
            self._decoded = Decoded(weight, codes.dtype, scale, dtype, sources)
        return self._decoded

    def __getstate__(self) -> dict[str, Any]:
        """What a copy holds: not the decoded weight, which it makes for itself."""
        return self.__dict__ | {"_decoded": None}

    def _with_float_columns(
        self, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """The output [..., N] where columns [O] of the weight are in float: they meet x as it is, LLM.int8 the rest.

        Both products are summed in float32, and rounded to x's dtype once.
        """
        values, threshold = x.float(), float(self.scheme.threshold or 0.0)
        rest = values.index_fill(-1, columns, 0.0)
        out = ops.linear_llm_int8(rest, codes, scale, self.bias, threshold, self.backend)
        return (out + values[..., columns] @ self.get_buffer("outlier_weight").float().t()).to(x.dtype)

    def _by_row(self, scale: torch.Tensor) -> torch.Tensor:
        """The weight's scale as [N, G], also where the whole weight has one."""
        return scale.expand(self.out_features, 1).contiguous() if scale.ndim == 1 else scale

    def __getattr__(self, name: str) -> torch.Tensor | nn.Module:
        """`weight` of a packed layer is its packed words: models that look at every layer's weight when they are built
        (to initialize it, say, which transformers skips for what was loaded) find something there."""
        if name == "weight":
            held = self.__dict__.get("_buffers", {})
            words = next((leaf for leaf in ("weight_packed", "compressed") if leaf in held), None)
            if words is not None:
                return self.get_buffer(words)
        found: torch.Tensor | nn.Module = super().__getattr__(name)
        return found

    @property
    def op(self) -> str:
        """The name of the op that the layer's product is."""
        return self._op

    @property
    def backend_in_use(self) -> str:
        """What the layer's product runs on where its tensors are: `triton`, `cpu` or `torch`."""
        if self.op in ("linear_sparse24", "linear_venom"):
            codes = self.sparse_parts()[0]
        elif self._layout.is_packed(self.scheme) and self.scheme.sparsity is None:
            codes = self.get_buffer(self._words)
        else:
            codes = self.codes_and_scale()[0]
        return ops.select_backend(self.op, codes.dtype, codes.device, self.backend)

    def sparse_parts(self) -> tuple[torch.Tensor, ...]:
        """The kept codes of a sparse weight and their indices, as `ops.linear_sparse24` takes them; or with the columns
        that `ops.linear_venom` takes."""
        stored = {name: self.get_buffer(name) for name in self.stored}
        parts: tuple[torch.Tensor, ...] = self._layout.sparse_parts(self.scheme, stored, self.in_features)
        return parts

    def codes_and_scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [N, K] and their scale [N, G], [1] or [ceil(N / 128), ceil(K / 128)]."""
        buffers = self._buffers
        stored = {name: buffers[name] for name in self.stored}
        codes, scale = self._layout.decompress(self.scheme, stored, self.in_features, self.transposed)
        return codes, scale

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Move buffers as bytes, so that a change of dtype passes them by."""
        self._decoded = None
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


def _is_eager_on_gpu(x: torch.Tensor) -> bool:
    """Whether activations lie on a GPU, and what is made of them now is there at once: no compiler, no graph."""
    return not torch.compiler.is_compiling() and x.is_cuda and not torch.cuda.is_current_stream_capturing()


def keep_decoded(model: nn.Module, keep: bool | None = True) -> int:
    """How many weights of the model are kept decoded on a CPU from their next product on, or are no longer.

    With `keep` None it is decided for each layer: sparse weights are kept.

    They cost 2 bytes each for activations in bfloat16, 4 for float32, and 1 where they are unpacked codes. See
    `QuantizedLinear`.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for layer in layers:
        layer.keep_decoded = keep
        layer._decoded = layer._decoded if keep else None
    schemes = [(each.scheme, each.in_features * each.out_features) for each in layers]
    return sum(size for scheme, size in schemes if scheme.activation_dtype != "int8" or scheme.sparsity is not None)
