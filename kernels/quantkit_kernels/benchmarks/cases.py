"""Every op of a linear layer as a case: its operands, its call, and what its result must be.

M tokens, K in features, N out features. `correctness.py` compares the result with float64; what is rounded how often
on the way is said here for each case.
"""

import copy
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit_kernels import formats, generic, ops, sparse24, venom
from quantkit_kernels.errors import KernelError
from quantkit_kernels.packing import unpack_int32

E4M3 = torch.float8_e4m3fn
CODES = {"int8": torch.int8, "fp8": E4M3}
LARGEST = 5.5
"""The largest magnitude of activations without outliers: LLM.int8's threshold is 6."""
STATIC = 6.0
"""What a static scale's largest code stands for."""
THRESHOLD = 6.0
"""From what magnitude on LLM.int8 keeps a column in float."""
SOME_OUTLIERS = 0.001
"""The share of columns that are outliers: some of a thousand features, as in the models of LLM.int8's paper."""

Operands = tuple[Any, ...]
Given = tuple[Tensor, Tensor | Callable[[int], Tensor], float, int]


@dataclass(frozen=True)
class Case:
    """One op: how to prepare its operands, run it, and what it must give.

    Attributes:
        prepare: activations and a float weight [N, K] (experts: [E, N, K]) to the op's operands.
        run: the operands to the op's result.
        given: the operands to what the product's left [M, K] and right side [N, K] (of experts: a function of their
            number) are in float64, and how many float32 roundings (infinity: no bound of single numbers is known) and
            roundings to x's dtype the op may make; a negative number counts those of the weight or activations too.
        outliers: how many columns of x are outliers; below 1, which share of them.
        reads: how many of the operands the op reads, the first ones; None is all. The others are for `given`.
        layer_bits: where operands are x, a layer and its float weight: bits of a weight in the layer; else 0.
        multiplies: bits of the numbers that the tensor cores multiply: 16, or 8 for codes by codes; 0 for no product.
        kind: "linear", "experts" or "quantizer".
        tolerance: the largest relative error of 64 neighbouring outputs of one token, as a norm.
        graph: whether a CUDA graph can capture the call: nothing in it waits for the device.
        expected: for a quantizer, the operands to the numbers that codes times scales stand for, in float64, and to the
            scale that was given, or None where the largest of these numbers makes it.
        skipped: which share of the second operand's rows the op need not read.
    """

    prepare: Callable[[Tensor, Tensor], Operands]
    run: Callable[..., Any]
    given: Callable[..., Given] | None = None
    outliers: float = 0.0
    reads: int | None = None
    layer_bits: int = 0
    multiplies: int = 16
    kind: str = "linear"
    tolerance: float = 2.0**-6
    graph: bool = True
    expected: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    skipped: float = 0.0


def named(text: str) -> str:
    """Return a case's name as it is written on a command line: words joined by hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def chosen(known: dict[str, Case], words: Sequence[str]) -> dict[str, Case]:
    """Return the cases that the words name, all where there are none.

    Raises:
        KernelError: for a word that names none.
    """
    by_name = {named(name): name for name in known}
    unknown = [word for word in words if named(word) not in by_name]
    if unknown:
        raise KernelError(f"op is {unknown[0]!r}: expected one of {', '.join(by_name)}")
    wanted = {named(word) for word in words}
    return {name: case for name, case in known.items() if not words or named(name) in wanted}


def read_bytes(case: Case, operands: Operands) -> int:
    """Return the bytes of the tensors that the case's op reads."""
    read = [operand for operand in operands[: case.reads] if isinstance(operand, Tensor)]
    in_layer = operands[2].numel() * case.layer_bits // 8 if case.layer_bits else 0
    unread = int(case.skipped * operands[1].numel() * operands[1].element_size()) if case.skipped else 0
    return in_layer - unread + sum(tensor.numel() * tensor.element_size() for tensor in read)


def rotated(case: Case, operands: Operands, cache_bytes: int) -> list[Callable[[], Any]]:
    """Return calls of the case's op, each on operands of its own, which together are over twice the cache in bytes.

    With no cache to exceed it is one call.
    """
    count = 1 + -(-2 * cache_bytes // max(1, read_bytes(case, operands))) if cache_bytes else 1
    read = len(operands) if case.reads is None else case.reads
    others = [(*map(_copied, operands[:read]), *operands[read:]) for _ in range(min(count, 1024) - 1)]
    sets = [operands, *others]
    return [functools.partial(case.run, *each) for each in sets]


def _copied(operand: Any) -> Any:
    return operand.clone() if isinstance(operand, Tensor) else copy.deepcopy(operand)


def activations(tokens: int, in_features: int, dtype: torch.dtype, outliers: float, device: str = "cpu") -> Tensor:
    """Return random activations [M, K] below LARGEST, with outliers in some columns where asked for."""
    x = torch.randn(tokens, in_features, device=device).clamp_(-LARGEST, LARGEST)
    if outliers:
        count = int(outliers) if outliers >= 1 else max(1, round(outliers * in_features))
        columns = torch.randperm(in_features, device=device)[:count]
        x[:, columns] *= 20.0
        if tokens:  # each of them is one, also with few tokens
            x[0, columns] = 60.0
    return x.to(dtype)


def by_token(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x quantized per token, in float64."""
    codes, scale = formats.quantize_per_token(x, dtype)
    return codes.double() * scale.double()


def by_tensor(x: Tensor, dtype: torch.dtype, given: Tensor | None = None) -> Tensor:
    """Return x quantized with one scale, in float64."""
    codes, scale = formats.quantize_per_tensor(x, dtype, given)
    return codes.double() * scale.double()


def by_group(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x quantized in groups of 128, in float64."""
    codes, scale = formats.quantize_per_group(x, dtype)
    return (codes.double().view(*scale.shape, -1) * scale.double().unsqueeze(-1)).view(x.shape)


def mixed(x: Tensor, threshold: float) -> Tensor:
    """Return x as LLM.int8 multiplies it, in float64."""
    outlier = (x.abs() >= threshold).any(0)
    rest = by_token(x.masked_fill(outlier, 0.0), torch.int8)
    return torch.where(outlier, x.double(), rest)


def decoded(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the decoded weight in float64, from codes and scales of rows or groups of them."""
    return formats.dequantize(codes, scale.double())


def unpacked(packed: Tensor, scale: Tensor, bits: int, in_features: int) -> Tensor:
    """Return the decoded weight in float64, from a packed one."""
    return decoded(unpack_int32(packed, bits, in_features), scale)


def rows_of(name: str) -> Callable[[Tensor, Tensor], Operands]:
    """Return what prepares x, codes in the dtype of that name, and a scale a row."""
    return lambda x, weight: (x, *formats.quantize_weight(weight, CODES[name]))


def sums(x: Tensor, dtype: torch.dtype) -> float:
    """Return how many float32 roundings a product of codes in the dtype, and its epilogue, may make.

    4 in the epilogue. Int8 sums are exact. Fp8 sums are one each in float32; on a GPU tensor cores add up to 128
    products with some 13 bits, each losing at most 2**-13 of the sum of magnitudes of these: 2**18 roundings in all.
    """
    if dtype == torch.int8:
        return 4.0
    return x.shape[-1] + 4.0 + (2.0**18 if x.is_cuda else 0.0)


def floats(dtype: torch.dtype) -> Case:
    """Return the case of the float layer in the dtype: what the others are compared with."""
    return Case(
        lambda x, weight: (x.to(dtype), weight.to(dtype)),
        lambda x, weight: F.linear(x, weight),
        lambda x, weight: (x.double(), weight.double(), 2.0 * x.shape[-1] + 1, -3),
    )


def _dynamic(name: str) -> Case:
    dtype = CODES[name]
    return Case(
        rows_of(name),
        lambda x, codes, scale: ops.linear_dynamic(x, codes, scale, None),
        lambda x, codes, scale: (by_token(x, dtype), decoded(codes, scale), sums(x, dtype), 1),
        multiplies=8,
    )


def _by_tensor(name: str, static: bool) -> Case:
    dtype = CODES[name]

    def prepare(x: Tensor, weight: Tensor) -> Operands:
        scale = torch.full((1,), STATIC / formats.QMAX[dtype], device=x.device) if static else None
        return (x, *formats.quantize_weight(weight, dtype), scale)

    return Case(
        prepare,
        lambda x, codes, scale, given: ops.linear_tensor(x, codes, scale, given, None),
        lambda x, codes, scale, given: (by_tensor(x, dtype, given), decoded(codes, scale), sums(x, dtype), 1),
        multiplies=8,
    )


def _block() -> Case:
    return Case(
        lambda x, weight: (x, *formats.quantize_weight(weight, E4M3, granularity="block")),
        lambda x, codes, scale: ops.linear_block(x, codes, scale, None),
        lambda x, codes, scale: (
            by_group(x, E4M3),
            formats.dequantize_weight(codes, scale.double(), "block"),
            130 + x.shape[1] // 128 + (2.0**18 if x.is_cuda else 0.0),
            1,
        ),
        multiplies=8,
    )


def _weight_only(name: str) -> Case:
    return Case(
        rows_of(name),
        lambda x, codes, scale: ops.linear_weight_only(x, codes, scale, None),
        lambda x, codes, scale: (x.double(), decoded(codes, scale), 2.0 * (x.shape[1] + 4), -3),
    )


def _packed(bits: int, group_size: int | None) -> Case:
    def prepare(x: Tensor, weight: Tensor) -> Operands:
        codes, scale = formats.quantize_weight(weight, torch.int8, group_size, bits=4 if bits == 4 else 8)
        return x, formats.pack_int32(codes, bits), scale

    return Case(
        prepare,
        lambda x, packed, scale: ops.linear_weight_only_packed(x, packed, scale, None, bits),
        lambda x, packed, scale: (
            x.double(),
            unpacked(packed, scale, bits, x.shape[1]),
            2.0 * (x.shape[1] + 4),
            -3,
        ),
    )


def pruned(weight: Tensor, v: int = 1, m: int = 4) -> Tensor:
    """Return the weight with its smallest numbers set to zero, V:N:M; as it stands 2:4."""
    return weight * venom.mask(weight.abs(), v, m)


def coded(weight: Tensor, name: str) -> tuple[Tensor, Tensor | None, bool]:
    """Return a weight's codes and their scale, or itself and None where no name is, and whether they have 4 bits."""
    if not name:
        return weight, None, False
    if name == "int4":
        return *formats.quantize_weight(weight, torch.int8, 128, bits=4), True
    return *formats.quantize_weight(weight, CODES[name]), False


def product_with(x: Tensor, codes: Tensor, scale: Tensor | None) -> Given:
    """Return what a layer with such weights, unpacked, must give."""
    right = codes.double() if scale is None else decoded(codes, scale)
    return x.double(), right, 2.0 * (x.shape[1] + 8), -3


def _sparse24(name: str) -> Case:
    """Return the case of a packed 2:4 weight: in x's dtype where the name is empty, else codes."""

    def prepare(x: Tensor, weight: Tensor) -> Operands:
        codes, scale, four = coded(pruned(weight), name)
        return x, *(sparse24.pack_int4 if four else sparse24.pack)(codes), scale

    return Case(
        prepare,
        lambda x, values, indices, scale: ops.linear_sparse24(x, values, indices, scale, None),
        lambda x, values, indices, scale: product_with(x, generic.sparse24_codes(values, indices, x.shape[1]), scale),
    )


def _venom(name: str, v: int, m: int) -> Case:
    """Return the case of a packed V:N:M weight."""

    def prepare(x: Tensor, weight: Tensor) -> Operands:
        codes, scale, four = coded(pruned(weight, v, m), name)
        return x, *(venom.pack_int4 if four else venom.pack)(codes, v, m), scale

    return Case(
        prepare,
        lambda x, values, indices, columns, scale: ops.linear_venom(x, values, indices, columns, scale, None, v, m),
        lambda x, values, indices, columns, scale: product_with(
            x, generic.venom_codes(values, indices, columns, x.shape[1], v, m), scale
        ),
    )


def llm_int8(outliers: float) -> Case:
    """Return the case of LLM.int8 with so many outlier columns (below 1: that share of them)."""
    return Case(
        rows_of("int8"),
        lambda x, codes, scale: ops.linear_llm_int8(x, codes, scale, None, THRESHOLD),
        lambda x, codes, scale: (mixed(x, THRESHOLD), decoded(codes, scale), 2.0 * (x.shape[1] + 6), 1),
        outliers,
        multiplies=8,
    )


def product(name: str, run: Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]) -> Case:
    """Return the case of a scaled product of codes that are there already: `run(a, b, a_scale, b_scale, dtype)`.

    a is [M, K] with scales [M, 1], b [N, K] with scales [N, 1], all scales in float32.
    """
    dtype = CODES[name]

    def prepare(x: Tensor, weight: Tensor) -> Operands:
        a, a_scale = formats.quantize_per_token(x, dtype)
        b, b_scale = formats.quantize_weight(weight, dtype, scale_dtype=torch.float32)
        return a, b, a_scale, b_scale, x.dtype

    return Case(
        prepare,
        run,
        lambda a, b, a_scale, b_scale, _: (a.double() * a_scale.double(), decoded(b, b_scale), sums(a, dtype), 1),
        multiplies=8,
    )


def _scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return ops.scaled_mm(a, b, a_scale, b_scale, None, dtype)


def linear_cases() -> dict[str, Case]:
    """Return every op of a linear layer by name; the dtype of activations is that of x."""
    return {
        "w8a8": _dynamic("int8"),
        "w8a8 tensor": _by_tensor("int8", static=False),
        "w8a8 static": _by_tensor("int8", static=True),
        "int8 product": product("int8", _scaled_mm),
        "fp8": _dynamic("fp8"),
        "fp8 tensor": _by_tensor("fp8", static=False),
        "fp8 static": _by_tensor("fp8", static=True),
        "fp8 block": _block(),
        "fp8 product": product("fp8", _scaled_mm),
        "int8 weights": _weight_only("int8"),
        "int8 weights, packed": _packed(8, None),
        "int4 weights, packed": _packed(4, 128),
        "fp8 weights": _weight_only("fp8"),
        "2:4 weights": _sparse24(""),
        "2:4 int8 weights": _sparse24("int8"),
        "2:4 fp8 weights": _sparse24("fp8"),
        "2:4 int4 weights": _sparse24("int4"),
        "64:2:8 int8 weights": _venom("int8", 64, 8),
        "llm-int8, no outliers": llm_int8(0.0),
        "llm-int8, 0.1 % outliers": llm_int8(SOME_OUTLIERS),
    }
