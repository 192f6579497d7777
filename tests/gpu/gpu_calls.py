"""Every op on a linear layer as a call with all that varies, and what float64 says of it: `reference.py` on the CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from quantkit_kernels import formats, ops, reference, sparse24, venom
from torch import Tensor

INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
U32 = 2.0**-24
THRESHOLD = 6.0
CUDA = torch.device("cuda")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device to run the kernels on"),
]


@dataclass(frozen=True)
class Call:
    """One op with one kind of weight.

    Attributes:
        prepare: a float weight on the CPU to the op's tensors for it, on the CPU.
        run: x, these tensors, a bias or None and a backend to the output.
        left: x on the CPU to what is multiplied, [M, K] in float64.
        right: these tensors, K and x's dtype to what it is multiplied with, [N, K] in float64.
        terms: K to how many float32 roundings of the sum of magnitudes there may be.
        weights: whether the decoded weight may be rounded to its scale's dtype and x's.
        fp8: whether tensor cores add up fp8 products: those of sm_90 keep 13 bits of up to 128 of them.
        blocks: whether K must be a multiple of 128.
    """

    prepare: Callable[[Tensor], tuple[Tensor, ...]]
    run: Callable[[Tensor, tuple[Tensor, ...], Tensor | None, str], Tensor]
    left: Callable[[Tensor], Tensor]
    right: Callable[[tuple[Tensor, ...], int, torch.dtype], Tensor]
    terms: Callable[[int], int] = lambda in_features: in_features + 6
    weights: bool = False
    fp8: bool = False
    blocks: bool = False


def _token(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def left(x: Tensor) -> Tensor:
        codes, scale = reference.quantize_per_token(x, dtype)
        return codes * scale

    return left


def _tensor(dtype: torch.dtype, given: float | None) -> Callable[[Tensor], Tensor]:
    def left(x: Tensor) -> Tensor:
        codes, scale = reference.quantize_per_tensor(x, dtype, given)
        return codes * scale

    return left


def _groups(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def left(x: Tensor) -> Tensor:
        codes, scale = reference.quantize_per_group(x, dtype, 128)
        return codes * scale.repeat_interleave(128, dim=1)

    return left


def _mixed(x: Tensor) -> Tensor:
    outlier = (x.float().abs() >= THRESHOLD).any(0)
    codes, scale = reference.quantize_per_token(x.masked_fill(outlier, 0.0), INT8)
    return torch.where(outlier, x.double(), codes * scale)


def _rows(tensors: tuple[Tensor, ...], in_features: int, x_dtype: torch.dtype) -> Tensor:
    codes, scale = tensors
    return codes.double() * scale.double().repeat_interleave(in_features // scale.shape[1], dim=1)


def _blocks(tensors: tuple[Tensor, ...], in_features: int, x_dtype: torch.dtype) -> Tensor:
    codes, scale = tensors
    each = scale.double().repeat_interleave(128, dim=0)[: codes.shape[0]].repeat_interleave(128, dim=1)
    return codes.double() * each[:, :in_features]


def _unpacked(bits: int) -> Callable[..., Tensor]:
    def right(tensors: tuple[Tensor, ...], in_features: int, x_dtype: torch.dtype) -> Tensor:
        return _rows((reference.unpack(tensors[0], bits, in_features), tensors[1]), in_features, x_dtype)

    return right


def _quantized(dtype: torch.dtype, group: int | None = None, granularity: str = "row") -> Callable[..., Any]:
    return lambda weight: formats.quantize_weight(weight, dtype, group, granularity=granularity)


def _packed(bits: int, group: int | None) -> Callable[..., Any]:
    def prepare(weight: Tensor) -> tuple[Tensor, ...]:
        codes, scale = formats.quantize_weight(weight, INT8, group, bits=4 if bits == 4 else 8)
        return formats.pack_int32(codes, bits), scale

    return prepare


def _thinned(x: Tensor) -> Tensor:
    """Return x with its small numbers zero."""
    return x.masked_fill(x.abs() < 0.4, 0.0)


def _by_column(weight: Tensor) -> tuple[Tensor, ...]:
    codes, scale = formats.quantize_weight(weight, INT8)
    return codes.t().contiguous(), scale


def _sparse(dtype: torch.dtype | None, group: int | None, pattern: tuple[int, int] | None) -> Call:
    """Return the call with a packed 2:4 weight, or V:N:M one: float, int8, fp8, or codes of 4 bits (INT32)."""
    module, more = (sparse24, ()) if pattern is None else (venom, pattern)

    def prepare(weight: Tensor) -> tuple[Tensor, ...]:
        weight = weight * venom.mask(weight.abs(), *(pattern or (1, 4)))
        if dtype is None:
            return module.pack(weight, *more)
        bits = 4 if dtype == torch.int32 else 8
        codes, scale = formats.quantize_weight(weight, INT8 if bits == 4 else dtype, group, bits=bits)
        return *(module.pack_int4 if bits == 4 else module.pack)(codes, *more), scale

    def run(x: Tensor, w: tuple[Tensor, ...], bias: Tensor | None, way: str) -> Tensor:
        *parts, scale = (*w, None) if dtype is None else w
        if pattern is None:
            return ops.linear_sparse24(x, *parts, scale, bias, way)
        return ops.linear_venom(x, *parts, scale, bias, *pattern, way)

    def right(tensors: tuple[Tensor, ...], in_features: int, x_dtype: torch.dtype) -> Tensor:
        *parts, scale = (*tensors, None) if dtype is None else tensors
        if pattern is None:
            codes = reference.unpack_sparse24(*parts, in_features)
        else:
            codes = reference.unpack_venom(*parts, in_features, *pattern)
        return codes if scale is None else _rows((codes, scale), in_features, x_dtype)

    return Call(
        prepare,
        run,
        lambda x: x.double(),
        right,
        terms=lambda in_features: in_features + 8,
        weights=True,
        blocks=group is not None,
    )


def _four(in_features: int) -> int:
    return 6


def calls() -> dict[str, Call]:
    """Return every call by name."""
    found: dict[str, Call] = {}
    for dtype in (INT8, E4M3, E5M2):
        name = str(dtype).removeprefix("torch.")
        fp8 = dtype != INT8
        more = {"fp8": fp8} if fp8 else {"terms": _four}
        found[f"dynamic {name}"] = Call(
            _quantized(dtype),
            lambda x, w, bias, way: ops.linear_dynamic(x, *w, bias, way),
            _token(dtype),
            _rows,
            **more,
        )
        static = 3.0 / formats.QMAX[dtype]  # what is above 3 saturates
        scale = torch.tensor([static])
        found[f"static {name}"] = Call(
            _quantized(dtype),
            lambda x, w, bias, way, scale=scale: ops.linear_tensor(x, *w, scale.to(x.device), bias, way),
            _tensor(dtype, scale.item()),
            _rows,
            **more,
        )
        found[f"tensor {name}"] = Call(
            _quantized(dtype),
            lambda x, w, bias, way: ops.linear_tensor(x, *w, None, bias, way),
            _tensor(dtype, None),
            _rows,
            **more,
        )
        for group in (None, 32, 128):
            found[f"weights {name}, group {group}"] = Call(
                _quantized(dtype, group),
                lambda x, w, bias, way: ops.linear_weight_only(x, *w, bias, way),
                lambda x: x.double(),
                _rows,
                weights=True,
                blocks=group is not None,
            )
        if fp8:
            found[f"block {name}"] = Call(
                _quantized(dtype, granularity="block"),
                lambda x, w, bias, way: ops.linear_block(x, *w, bias, way),
                _groups(dtype),
                _blocks,
                fp8=True,
                blocks=True,
            )
    for bits, group in ((4, 128), (4, 32), (4, None), (8, None), (8, 128), (3, None)):
        found[f"packed {bits} bits, group {group}"] = Call(
            _packed(bits, group) if bits != 3 else lambda w: (formats.pack_int32(_three(w)[0], 3), _three(w)[1]),
            lambda x, w, bias, way, bits=bits: ops.linear_weight_only_packed(x, *w, bias, bits, way),
            lambda x: x.double(),
            _unpacked(bits),
            weights=True,
            blocks=group is not None,
        )
    kinds = {"float": (None, None), "int8": (INT8, None), "e4m3": (E4M3, None), "e5m2": (E5M2, None)}
    kinds |= {"int8, group 128": (INT8, 128), "4 bits": (torch.int32, None), "4 bits, group 128": (torch.int32, 128)}
    for kind, (dtype, group) in kinds.items():
        found[f"2:4 {kind}"] = _sparse(dtype, group, None)
        found[f"64:2:8 {kind}"] = _sparse(dtype, group, (64, 8))
    found["16:2:8 int8"] = _sparse(INT8, None, (16, 8))
    found["zeros, weights float"] = Call(
        lambda weight: (weight.t().contiguous(),),
        lambda x, w, bias, way: ops.linear_sparse_input(_thinned(x), *w, None, bias, way),
        lambda x: _thinned(x).double(),
        lambda tensors, in_features, x_dtype: tensors[0].double().t(),
    )
    found["zeros, weights int8"] = Call(
        _by_column,
        lambda x, w, bias, way: ops.linear_sparse_input(_thinned(x), *w, bias, way),
        lambda x: _thinned(x).double(),
        lambda tensors, in_features, x_dtype: tensors[0].double().t() * tensors[1].double(),
        weights=True,
    )
    found["llm-int8"] = Call(
        _quantized(INT8), lambda x, w, bias, way: ops.linear_llm_int8(x, *w, bias, THRESHOLD, way), _mixed, _rows
    )
    return found


def _three(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes of 3 bits and scales of rows."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 3).clamp_min(1e-6).to(weight.dtype)
    return (weight.float() / scale.float()).round().clamp(-4, 3).to(INT8), scale


CALLS = calls()


def random(seed: int, *shape: int, dtype: torch.dtype, outliers: bool = False) -> Tensor:
    """Return numbers on the CPU whose rows differ in size, one row in seven zero, with outliers where asked for."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).clamp_(-5, 5)
    x = x * (0.05 + torch.rand((*shape[:-1], 1), generator=generator))
    if len(shape) > 1:
        x.view(-1, shape[-1])[3::7] = 0
        if outliers and x.numel():
            x[..., ::37] += 9.0
    return x.to(dtype)


def expected(call: Call, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the output in float64 and the bound of each number's error, from tensors on the CPU.

    Float32 roundings of the sum of magnitudes; of fp8, what tensor cores that keep 13 bits may lose of 128 products;
    where the weight is decoded, its roundings; then one rounding to x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    left, right = call.left(rows), call.right(tensors, x.shape[-1], x.dtype)
    exact, size = left @ right.T, left.abs() @ right.abs().T
    if bias is not None:
        rounded = bias.to(x.dtype).double() if call.weights else bias.double()
        exact, size = exact + rounded, size + rounded.abs()
    unit = torch.finfo(x.dtype).eps / 2
    float32 = 2 * call.terms(x.shape[-1]) * U32 * size
    if call.fp8:
        float32 = float32 + 128 * 2.0**-13 * size
    if call.weights:
        scale = tensors[-1].dtype  # a weight in float has none
        float32 = float32 + (unit + (torch.finfo(scale).eps / 2 if scale.is_floating_point else 0.0)) * 1.01 * size
    bound = float32 + 1.01 * unit * (exact.abs() + float32) + torch.finfo(x.dtype).tiny
    shape = (*x.shape[:-1], right.shape[0])
    return exact.view(shape), bound.view(shape)


def check(out: Tensor, exact: Tensor, bound: Tensor, x_dtype: torch.dtype) -> None:
    """Assert that the output is there, within the bound number by number, and near in norm: bounds alone are wide."""
    assert out.dtype == x_dtype
    assert out.shape == exact.shape
    error = (out.cpu().double() - exact).abs()
    assert (error <= bound).all(), f"the worst error is {(error / bound).max().item():.3g} of its bound"
    if exact.numel():
        assert error.norm() <= 2.0**-7 * exact.norm()


def moved(tensors: tuple[Tensor, ...], device: torch.device = CUDA) -> tuple[Tensor, ...]:
    """Return the tensors on a device."""
    return tuple(tensor.to(device) for tensor in tensors)
