"""The ops against float64 with derived bounds, element by element; registration; torch.compile."""

import math
import shutil

import pytest
import torch
from quantkit_kernels import formats, ops, reference
from quantkit_kernels.errors import KernelError

INT8 = torch.int8
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
QUANTIZED = (INT8, *FP8)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
N, K = 13, 70
U32 = 2.0**-24


def roundoff(dtype: torch.dtype) -> float:
    """Return u, the relative error of one rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return numbers whose rows differ in size, one row in seven zero, with outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x[torch.rand(shape, generator=generator) < 0.03] *= 20.0
    if len(shape) > 1:
        x = x * (0.05 + 3 * torch.rand((*shape[:-1], 1), generator=generator))
        x.view(-1, shape[-1])[3::7] = 0
    return x.to(dtype)


def inputs(seed: int, shape: tuple[int, ...], x_dtype: torch.dtype, with_bias: bool):
    weight = random(seed, N, K, dtype=x_dtype)
    bias = random(seed + 1, N, dtype=x_dtype) if with_bias else None
    return random(seed + 2, *shape, K, dtype=x_dtype), weight, bias


def within(out: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """Assert |out - expected| <= bound at every element, and that a wrong row would have been seen."""
    assert out.shape == expected.shape
    error = (out.double() - expected).abs()
    worst = (error / bound).nan_to_num(math.inf).amax().item() if out.numel() else 0.0
    assert (error <= bound).all(), f"the worst error is {worst:.3g} of its bound"
    if expected.numel():  # the bound says something: it is far below the size of what is compared
        assert bound.mean() < 0.1 * expected.abs().mean()


def dynamic_bound(x, weight, scale, bias, expected):
    """Return the bound of `linear_dynamic` and `scaled_mm` against float64 on the same codes.

    Int8: the integer product is exact; three products and the sum round in float32 (4 u each at most), then one
    rounding to the result. Fp8: float32 sums of K products add K u of the absolute product.
    """
    codes, x_scale = reference.quantize_per_token(x.reshape(-1, K), weight.dtype)
    absolute = reference.scaled_mm(codes.abs(), weight.double().abs(), x_scale, scale, None)
    absolute = absolute.reshape(expected.shape)
    size = absolute if bias is None else absolute + bias.double().abs()
    terms = 4 if weight.dtype == INT8 else 4 + K
    float32_error = terms * U32 * size * 1.01
    return float32_error + roundoff(x.dtype) * (expected.abs() + float32_error) + torch.finfo(x.dtype).tiny


SHAPES = [(), (1,), (5,), (2, 3), (2, 0)]


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_dynamic(dtype, x_dtype, with_bias, shape):
    x, weight, bias = inputs(0, shape, x_dtype, with_bias)
    codes, scale = formats.quantize_weight(weight, dtype)
    out = ops.linear_dynamic(x, codes, scale, bias)
    assert out.dtype == x_dtype
    assert out.shape == (*shape, N)
    expected = reference.linear_dynamic(x, codes, scale, bias)
    within(out, expected, dynamic_bound(x, codes, scale, bias, expected))


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_scaled_mm(dtype, out_dtype, tokens):
    x, weight, bias = inputs(1, (tokens,), torch.float32, True)
    a, a_scale = ops.quantize_per_token(x, dtype)
    b, b_scale = formats.quantize_weight(weight.bfloat16(), dtype)
    out = ops.scaled_mm(a, b, a_scale, b_scale, bias, out_dtype)
    assert out.dtype == out_dtype
    expected = reference.scaled_mm(a, b, a_scale, b_scale, bias)
    within(out, expected, dynamic_bound(x.to(out_dtype), b, b_scale, bias, expected) + 1e-30 if tokens else expected)


def test_scaled_mm_with_scales_of_one_is_the_integer_product():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (9, 100), generator=generator, dtype=INT8)
    b = torch.randint(-127, 128, (11, 100), generator=generator, dtype=INT8)
    out = ops.scaled_mm(a, b, torch.ones(9, 1), torch.ones(11, 1), None, torch.float32)
    assert torch.equal(out.long(), a.long() @ b.long().T)


def weight_only_bound(x, decoded, bias, expected):
    """Return the bound of a float linear layer against float64 on the same decoded weight.

    Float32 sums of K products, in any order: K u32 of the absolute product. Libraries may round to x's dtype before
    they add the bias and again after it: two roundings of what is there at that point.
    """
    absolute = x.double().abs() @ decoded.abs().T
    size = absolute if bias is None else absolute + bias.double().abs()
    float32_error = (K + 1) * U32 * size
    return float32_error + 2 * roundoff(x.dtype) * (expected.abs() + size * (bias is not None)) + 1e-30


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_weight_only(dtype, x_dtype, scale_dtype, shape):
    x, weight, bias = inputs(2, shape, x_dtype, len(shape) == 1)
    codes, scale = formats.quantize_weight(weight.to(scale_dtype), dtype)
    out = ops.linear_weight_only(x, codes, scale, bias)
    assert out.dtype == x_dtype
    expected = reference.linear_weight_only(x, codes, scale, bias)
    within(out, expected, weight_only_bound(x, reference.decoded_weight(codes, scale, x_dtype), bias, expected))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("group_size", [None, 14])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)])
def test_linear_weight_only_packed(bits, x_dtype, group_size, shape):
    x, weight, bias = inputs(3, shape, x_dtype, True)
    codes, scale = formats.quantize_weight(weight, INT8, group_size)
    codes = codes >> (8 - bits)
    packed = formats.pack_int32(codes, bits)
    out = ops.linear_weight_only_packed(x, packed, scale, bias, bits)
    assert out.dtype == x_dtype
    expected = reference.linear_weight_only_packed(x, packed, scale, bias, bits)
    within(out, expected, weight_only_bound(x, reference.decoded_weight(codes, scale, x_dtype), bias, expected))


def all_ops(dtype: torch.dtype, bits: int = 4):
    """Return name -> (op, its arguments) for every registered op, on small inputs with a bias."""
    x, weight, bias = inputs(4, (5,), torch.float32, True)
    codes, scale = formats.quantize_weight(weight, dtype)
    x_codes, x_scale = formats.quantize_per_token(x, dtype)
    packed = formats.pack_int32((weight * 0).to(INT8) + 3, bits)
    namespace = torch.ops.quantkit
    return {
        "quantize_per_token": (namespace.quantize_per_token.default, (x, dtype)),
        "scaled_mm": (
            namespace.scaled_mm.default,
            (x_codes, codes, x_scale, scale, bias, torch.bfloat16),
        ),
        "linear_dynamic": (namespace.linear_dynamic.default, (x, codes, scale, bias)),
        "linear_weight_only": (namespace.linear_weight_only.default, (x, codes, scale, bias)),
        "linear_weight_only_packed": (
            namespace.linear_weight_only_packed.default,
            (x, packed, scale, bias, bits),
        ),
    }


OP_NAMES = [
    "quantize_per_token", "scaled_mm", "linear_dynamic", "linear_weight_only", "linear_weight_only_packed",
]  # fmt: skip


def same(left: object, right: object) -> None:
    pairs = zip(left, right, strict=True) if isinstance(left, tuple) else [(left, right)]
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one.float(), other.float())


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("name", OP_NAMES)
def test_opcheck(name, dtype):
    op, arguments = all_ops(dtype)[name]
    takes_fp8 = any(isinstance(value, torch.Tensor) and value.dtype in FP8 for value in arguments)
    gives_fp8 = name == "quantize_per_token" and dtype in FP8
    if takes_fp8 or gives_fp8:
        # torch's schema check compares inputs before and after with allclose, which fp8 does not have (torch 2.13)
        copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
        op(*arguments)
        for value, copy in zip(arguments, copies, strict=True):
            if isinstance(value, torch.Tensor):
                assert torch.equal(value.float(), copy.float())
        checks = ("test_faketensor", "test_autograd_registration")
        checks += () if gives_fp8 else ("test_aot_dispatch_dynamic",)
        torch.library.opcheck(op, arguments, test_utils=checks)
    else:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", ["linear_dynamic", "linear_weight_only", "linear_weight_only_packed"])
@pytest.mark.parametrize("dtype", QUANTIZED)
def test_non_contiguous_x_gives_the_same_bits_and_contiguous_outputs(name, dtype):
    op, (x, *rest) = all_ops(dtype)[name]
    wide = torch.cat([x, x * 3]).reshape(2, 5, K)
    expected = op(wide, *rest)
    for view in (
        wide.mT.contiguous().mT,
        wide.transpose(0, 1).contiguous().transpose(0, 1),
        wide.repeat_interleave(2, dim=2)[..., ::2],
        wide.new_zeros(2, 5, K + 3)[..., 1:-2].copy_(wide),
    ):
        assert not view.is_contiguous()
        out = op(view, *rest)
        assert out.is_contiguous()
        assert (
            torch.allclose(out, expected, rtol=1e-5, atol=1e-4)
            if name != "linear_dynamic"
            else torch.equal(out, expected)
        )


@pytest.mark.parametrize("name", OP_NAMES)
@pytest.mark.parametrize("dtype", [INT8, torch.float8_e4m3fn])
def test_compiled_is_eager_bit_for_bit_in_one_graph(name, dtype):
    op, arguments = all_ops(dtype)[name]

    def program(*values):
        return getattr(ops, name)(*values)

    torch._dynamo.reset()
    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        same(compiled(*arguments), op(*arguments))
        if arguments[0].is_floating_point() and arguments[0].dtype not in FP8:  # another number of tokens
            more = torch.cat([arguments[0], arguments[0]])
            same(compiled(more, *arguments[1:]), op(more, *arguments[1:]))


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_inductor_gives_the_same_within_one_rounding_of_what_it_fuses():
    """The ops are opaque to inductor, so their bits don't change; x * 2 is exact; only `+ residual` may be fused."""
    _, (x, codes, scale, bias) = all_ops(INT8)["linear_dynamic"]
    residual = random(9, 5, N)

    def program(values):
        return ops.linear_dynamic(values * 2, codes, scale, bias) * 3 + residual

    torch._dynamo.reset()
    with torch.no_grad():
        expected = program(x)
        out = torch.compile(program, fullgraph=True)(x)
    # a fused multiply-add leaves out the rounding of the product
    assert ((out - expected).abs() <= 2 * U32 * (expected.abs() + (expected - residual).abs())).all()


def test_meta_tensors_give_shapes():
    x = torch.empty(2, 7, K, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(N, K, dtype=INT8, device="meta")
    out = ops.linear_dynamic(x, weight, torch.empty(N, 1, device="meta"), None)
    assert out.shape == (2, 7, N)
    assert out.dtype == torch.bfloat16
    assert out.device.type == "meta"


@pytest.mark.parametrize("name", ["linear_dynamic", "linear_weight_only", "linear_weight_only_packed"])
def test_backward_refuses_instead_of_differentiating_through_rounding(name):
    op, (x, *rest) = all_ops(INT8)[name]
    out = op(x.requires_grad_(), *rest)
    with pytest.raises(KernelError, match=f"quantkit.{name} has no gradient"):
        out.sum().backward()


def bad_calls():
    x, codes, scale = torch.ones(5, K), torch.ones(N, K, dtype=INT8), torch.ones(N, 1)
    packed = formats.pack_int32(codes, 4)
    ones = torch.ones
    long_codes = torch.ones(1, 2**17, dtype=INT8)
    return [
        (lambda: ops.quantize_per_token(ones(2, 3, 4), INT8), r"\[2, 3, 4\]: expected \[M, K\]"),
        (lambda: ops.quantize_per_token(x, torch.uint8), "torch.uint8"),
        (lambda: ops.linear_dynamic(x[:, 1:], codes, scale, None), r"expected \[\.\.\., 70\]"),
        (lambda: ops.linear_dynamic(x.double(), codes, scale, None), "torch.float64"),
        (lambda: ops.linear_dynamic(x, codes.int(), scale, None), "torch.int32"),
        (lambda: ops.linear_dynamic(x, codes, scale[:, 0], None), r"scale is torch.float32 \[13\]"),
        (lambda: ops.linear_dynamic(x, codes, scale, ones(N + 1)), r"bias is .* \[14\]: expected float \[13\]"),
        (lambda: ops.linear_dynamic(x, codes, scale, None, "cuda"), "expected one of auto, torch, triton"),
        (lambda: ops.linear_dynamic(x, codes, scale.to("meta"), None), "cpu and meta: expected one device"),
        (lambda: ops.linear_weight_only(x, codes, ones(N, 3), None), "G dividing K = 70"),
        (lambda: ops.linear_dynamic(x, codes, ones(N, 2), None), r"expected float \[13, 1\]"),
        (lambda: ops.linear_weight_only(x, codes, scale, None, "triton"), "no kernel for linear_weight_only"),
        (lambda: ops.linear_weight_only_packed(x, packed, scale, None, 5), r"expected torch.int32 \[N, 11\]"),
        (lambda: ops.linear_weight_only_packed(x, packed, ones(N, 3), None, 4), "G dividing K = 70"),
        (lambda: ops.linear_weight_only_packed(x, packed, scale, None, 9), "9 bits: expected 1 to 8"),
        (lambda: ops.scaled_mm(codes, codes.float(), scale, scale, None, torch.float32), "expected both int8"),
        (lambda: ops.scaled_mm(codes, codes, scale.half(), scale, None, torch.float32), "a_scale is torch.float16"),
        (lambda: ops.scaled_mm(codes, codes, scale, scale, None, torch.int32), "out_dtype is torch.int32"),
        (
            lambda: ops.scaled_mm(long_codes, long_codes, ones(1, 1), ones(1, 1), None, torch.float32),
            "overflows int32 beyond 131071",
        ),
    ]


@pytest.mark.parametrize("case", range(len(bad_calls())))
def test_what_does_not_fit_is_refused_by_name(case):
    call, message = bad_calls()[case]
    with pytest.raises(KernelError, match=message):
        call()
