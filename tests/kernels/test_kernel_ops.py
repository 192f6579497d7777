"""The ops against float64 with derived bounds, element by element; registration; torch.compile."""

import math
import shutil

import pytest
import torch
from quantkit_kernels import cpu, formats, generic, ops, reference, sparse24, venom
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


def halved(weight: torch.Tensor) -> torch.Tensor:
    """Return the first 68 columns with zeros in two of every four: in places that differ from four to four."""
    mask = torch.tensor([1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0]).repeat(5)[:68]
    raw = weight[:, :68].contiguous().view(torch.int8 if weight.dtype.itemsize == 1 else weight.dtype)
    return (raw * mask).to(raw.dtype).view(weight.dtype)


@pytest.mark.parametrize("dtype", [*QUANTIZED, *FLOATS, "int4"])
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("groups", [1, 17])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)])
def test_linear_sparse24(dtype, x_dtype, groups, shape):
    x, weight, bias = inputs(3, shape, x_dtype, True)
    x, scale = x[..., :68], None
    if dtype in FLOATS:
        decoded = halved(weight.to(dtype))
        parts = sparse24.pack(decoded)
        decoded = decoded.to(x_dtype).double()
    else:
        kind, bits = (INT8, 4) if dtype == "int4" else (dtype, 8)
        codes, scale = formats.quantize_weight(weight[:, :68], kind, 68 // groups, bits=bits)
        codes = halved(codes)
        parts = sparse24.pack_int4(codes) if bits == 4 else sparse24.pack(codes)
        decoded = reference.decoded_weight(codes, scale, x_dtype)
    out = ops.linear_sparse24(x, *parts, scale, bias)
    assert out.dtype == x_dtype
    expected = reference.linear_sparse24(x, *parts, scale, bias)
    within(out, expected, weight_only_bound(x, decoded, bias, expected))
    assert torch.equal(out, generic.linear_sparse24(x, *parts, scale, bias)) or x_dtype != torch.float32


@pytest.mark.parametrize("dtype", [*QUANTIZED, *FLOATS, "int4"])
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize(("groups", "v", "m"), [(1, 4, 8), (16, 32, 16)])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)])
def test_linear_venom(dtype, x_dtype, groups, v, m, shape):
    x, weight, bias = inputs(3, shape, x_dtype, True)
    x, weight, scale = x[..., :64], weight[:, :64], None
    weight = weight * venom.mask(weight.float().abs(), v, m)
    if dtype in FLOATS:
        decoded = weight.to(dtype)
        parts = venom.pack(decoded, v, m)
        decoded = decoded.to(x_dtype).double()
    else:
        kind, bits = (INT8, 4) if dtype == "int4" else (dtype, 8)
        codes, scale = formats.quantize_weight(weight, kind, 64 // groups, bits=bits)
        parts = (venom.pack_int4 if bits == 4 else venom.pack)(codes, v, m)
        decoded = reference.decoded_weight(codes, scale, x_dtype)
    out = ops.linear_venom(x, *parts, scale, bias, v, m)
    assert out.dtype == x_dtype
    expected = reference.linear_venom(x, *parts, scale, bias, v, m)
    within(out, expected, weight_only_bound(x, decoded, bias, expected))
    by_generic = generic.linear_venom(x, *parts, scale, bias, v, m)
    within(by_generic, expected, weight_only_bound(x, decoded, bias, expected))


@pytest.mark.parametrize("tokens", [1, 16, 17])
@pytest.mark.parametrize("bits", [4, 8])
def test_unpacked_codes_meet_the_int8_kernel_where_there_are_few_tokens(tokens, bits, monkeypatch):
    """As `linear_weight_only` of the dense codes does: to the bit the same, and packed 2:4 and V:N:M alike."""
    monkeypatch.setattr("quantkit_kernels.cpu_decoding._DECODED_ELEMENTS", 1000)  # by many parts
    weight = random(5, 40, 96) * venom.mask(random(5, 40, 96).abs(), 8, 8)
    codes, scale = formats.quantize_weight(weight.bfloat16(), INT8, bits=bits)
    x, bias = random(6, tokens, 96).bfloat16(), random(7, 40).bfloat16()
    expected = ops.linear_weight_only(x, codes, scale, bias)
    pack = "pack_int4" if bits == 4 else "pack"
    assert torch.equal(ops.linear_sparse24(x, *getattr(sparse24, pack)(codes), scale, bias), expected)
    assert torch.equal(ops.linear_venom(x, *getattr(venom, pack)(codes, 8, 8), scale, bias, 8, 8), expected)


OFFSETS = torch.tensor([0, 2, 5], dtype=torch.int32)


def all_ops(dtype: torch.dtype, bits: int = 4):
    """Return name -> (op, its arguments) for every registered op that takes the dtype, on small inputs with a bias."""
    x, weight, bias = inputs(4, (5,), torch.float32, True)
    codes, scale = formats.quantize_weight(weight, dtype)
    x_codes, x_scale = formats.quantize_per_token(x, dtype)
    packed = formats.pack_int32((weight * 0).to(INT8) + 3, bits)
    arguments = {
        "quantize_per_token": (x, dtype),
        "quantize_per_tensor": (x, dtype),
        "quantize_per_tensor static": (x, dtype, torch.full((1,), 0.04)),
        "quantize_per_group": (random(6, 5, 256), dtype),
        "rms_norm_quantize": (x, weight[0], 1e-6, 1.0, dtype),
        "silu_mul_quantize": (x, x + 1, dtype),
        "dequantize": (codes, scale, torch.float16),
        "scaled_mm": (x_codes, codes, x_scale, scale, bias, torch.bfloat16),
        "linear_dynamic": (x, codes, scale, bias),
        "linear_tensor": (x, codes, scale, None, bias),
        "linear_tensor static": (x, codes, torch.full((1,), 0.01), torch.full((1,), 0.04), bias),
        "linear_weight_only": (x, codes, scale, bias),
        "linear_grouped": (x, *(torch.stack([each, each]) for each in (codes, scale)), OFFSETS, "token"),
        "linear_grouped weights": (x, *(torch.stack([each, each]) for each in (codes, scale)), OFFSETS, "none"),
        "linear_weight_only_packed": (x, packed, scale, bias, bits),
        "linear_sparse24": (x[:, :68], *sparse24.pack(halved(codes)), scale, bias),
        "linear_sparse24 float": (x[:, :68], *sparse24.pack(halved(weight)), None, bias),
        "linear_venom": (x[:, :68], *venom.pack(halved(codes), 5, 4), scale, bias, 5, 4),
    }
    if dtype == INT8:
        arguments["linear_llm_int8"] = (x, codes, scale, bias, 6.0)
        rows = formats.quantize_weight(weight.t().contiguous(), dtype)  # a down projection of as many neurons
        arguments["linear_sparse_input"] = (x.relu(), codes.t().contiguous(), scale, bias)
        arguments["mlp_sparse"] = (
            x,
            x[:, : len(codes)].relu(),
            codes,
            scale,
            bias,
            rows[0].t().contiguous(),
            rows[1],
            None,
        )
    else:
        blocks = formats.quantize_weight(random(5, N, 256), dtype, granularity="block")
        arguments["linear_block"] = (random(6, 5, 256), *blocks, bias)
    return {name: (getattr(torch.ops.quantkit, name.split()[0]).default, values) for name, values in arguments.items()}


CASES = [(name, dtype) for dtype in QUANTIZED for name in all_ops(dtype)]
LINEARS = [(name, dtype) for name, dtype in CASES if name.startswith("linear") and "grouped" not in name]
EXACT = ("linear_dynamic", "linear_tensor", "linear_tensor static")
"""Ops whose bits do not depend on strides: int8 products are exact, and fp8 is decoded to dense rows of x."""


def test_every_registered_op_is_tested():
    from quantkit_kernels.registration import SCHEMAS

    assert {name.split()[0] for name, _ in CASES} == set(SCHEMAS)


def same(left: object, right: object) -> None:
    pairs = zip(left, right, strict=True) if isinstance(left, tuple) else [(left, right)]
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one.float(), other.float())


@pytest.mark.parametrize(("name", "dtype"), LINEARS)
def test_non_contiguous_x_gives_the_same_bits_and_contiguous_outputs(name, dtype):
    op, (x, *rest) = all_ops(dtype)[name]
    wide = torch.cat([x, x * 3]).reshape(2, 5, x.shape[1])
    expected = op(wide, *rest)
    for view in (
        wide.mT.contiguous().mT,
        wide.transpose(0, 1).contiguous().transpose(0, 1),
        wide.repeat_interleave(2, dim=2)[..., ::2],
        wide.new_zeros(2, 5, x.shape[1] + 3)[..., 1:-2].copy_(wide),
    ):
        assert not view.is_contiguous()
        out = op(view, *rest)
        assert out.is_contiguous()
        assert torch.equal(out, expected) if name in EXACT else torch.allclose(out, expected, rtol=1e-5, atol=1e-4)


def strided(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the same matrix with other strides: stored [K, N], as every other row and column, inside a larger one."""
    rows, columns = tensor.shape
    as_bytes = tensor.view(torch.int8)
    inside = as_bytes.new_zeros(rows + 2, columns + 3)
    inside[1 : rows + 1, 2 : columns + 2] = as_bytes
    around = inside.t().contiguous().t()
    return {
        "transposed": as_bytes.t().contiguous().t().view(tensor.dtype),
        "steps": as_bytes.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3].view(tensor.dtype),
        "inside": inside[1 : rows + 1, 2 : columns + 2].view(tensor.dtype),
        "inside, transposed": around[1 : rows + 1, 2 : columns + 2].view(tensor.dtype),
    }


@pytest.mark.parametrize("with_vnni", [True, False])
@pytest.mark.parametrize(
    ("name", "dtype"), [case for case in LINEARS if "packed" not in case[0] and "float" not in case[0]]
)
def test_weights_of_any_strides(monkeypatch, name, dtype, with_vnni):
    """Int8 gives the same bits (LLM.int8: where no column is an outlier); float sums may be added in another order."""
    if with_vnni and not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has no VNNI")
    monkeypatch.setattr(cpu, "has_exact_int_mm", lambda: with_vnni)
    op, (x, weight, *rest) = all_ops(dtype)[name]
    for tokens in (0, 1, 5):
        for values in (x[:tokens], x[:tokens].clamp(-5, 5)):
            expected = op(values, weight, *rest)
            exact = dtype == INT8 and (name in EXACT or (name == "linear_llm_int8" and bool((values.abs() < 6).all())))
            for view in strided(weight).values():
                assert torch.equal(view.float(), weight.float())
                assert not view.is_contiguous()
                out = op(values, view, *rest)
                assert torch.equal(out, expected) if exact else torch.allclose(out, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("name", "dtype"), [case for case in CASES if case[1] != torch.float8_e5m2])
def test_compiled_is_eager_bit_for_bit_in_one_graph(name, dtype):
    op, arguments = all_ops(dtype)[name]

    def program(*values):
        return getattr(ops, name.split()[0])(*values)

    torch._dynamo.reset()
    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        same(compiled(*arguments), op(*arguments))
        if arguments[0].dtype in FLOATS and "grouped" not in name and name != "mlp_sparse":  # another number of tokens
            x = arguments[0]
            of_tokens = [isinstance(value, torch.Tensor) and value.shape == x.shape for value in arguments]
            more = [torch.cat([value, value]) if of else value for value, of in zip(arguments, of_tokens, strict=True)]
            same(compiled(*more), op(*more))


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


@pytest.mark.parametrize(("name", "dtype"), LINEARS)
@pytest.mark.parametrize("backend", [(), ("torch",)])
def test_meta_tensors_give_shapes(name, dtype, backend):
    op, (x, *rest) = all_ops(dtype)[name]
    rest = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in rest]
    out = op(torch.empty(2, 7, x.shape[1], dtype=torch.bfloat16, device="meta"), *rest, *backend)
    assert out.shape == (2, 7, N)
    assert out.dtype == torch.bfloat16
    assert out.device.type == "meta"


@pytest.mark.parametrize(("name", "dtype"), [case for case in LINEARS if case[1] != torch.float8_e5m2])
def test_backward_refuses_instead_of_differentiating_through_rounding(name, dtype):
    op, (x, *rest) = all_ops(dtype)[name]
    out = op(x.requires_grad_(), *rest)
    with pytest.raises(KernelError, match=f"quantkit.{name.split()[0]} has no gradient"):
        out.sum().backward()


def bad_calls():
    x, codes, scale = torch.ones(5, K), torch.ones(N, K, dtype=INT8), torch.ones(N, 1)
    packed = formats.pack_int32(codes, 4)
    ones = torch.ones
    long_codes = torch.ones(1, 2**17, dtype=INT8)
    wide, blocks, one = ones(5, 256), torch.ones(130, 256).to(FP8[0]), ones(1)
    too_long = "overflows int32 beyond 131071"
    return [
        (lambda: ops.linear_dynamic(ones(1, 2**17), long_codes, ones(1, 1), None), too_long),
        (lambda: ops.linear_tensor(ones(1, 2**17), long_codes, one, None, None), too_long),
        (lambda: ops.linear_llm_int8(ones(1, 2**17), long_codes, ones(1, 1), None, 6.0), too_long),
        (lambda: ops.linear_tensor(x, codes, ones(N), None, None), r"\[13\]: expected float \[13, 1\] or \[1\]"),
        (lambda: ops.linear_tensor(x, codes, scale, ones(1, 1), None), r"input_scale is torch.float32 \[1, 1\]"),
        (lambda: ops.linear_tensor(x, codes, scale, one.int(), None), r"input_scale is torch.int32 \[1\]"),
        (lambda: ops.linear_tensor(x, codes, scale, one.to("meta"), None), "cpu and meta: expected one device"),
        (lambda: ops.linear_tensor(x, codes, scale, None, one), r"bias is .* \[1\]: expected float \[13\]"),
        (lambda: ops.linear_tensor(x, codes, one, None, None, "triton"), "cannot run linear_tensor on device cpu"),
        (lambda: ops.linear_block(wide, blocks, ones(2, 1), None), r"\[2, 1\]: expected float \[2, 2\]"),
        (lambda: ops.linear_block(x, codes.to(FP8[0]), ones(1, 1), None), "K is 70: blocks need a multiple of 128"),
        (lambda: ops.linear_block(wide, blocks.to(INT8), ones(2, 2), None), "int8 .*: expected .* in float8_e4m3fn"),
        (lambda: ops.linear_block(wide, blocks, ones(2, 2), None, "triton"), "cannot run linear_block on device cpu"),
        (lambda: ops.linear_llm_int8(x, codes.to(FP8[0]), scale, None, 6.0), r"expected \[N, K\] in int8"),
        (lambda: ops.linear_llm_int8(x, codes, one, None, 6.0), r"expected float \[13, 1\]"),
        (lambda: ops.linear_llm_int8(x, codes, scale, None, 0.0), "threshold is 0.0: expected a positive number"),
        (lambda: ops.linear_llm_int8(x, codes, scale, None, math.nan), "threshold is nan"),
        (lambda: ops.linear_llm_int8(x, codes, scale, None, 6.0, "triton"), "linear_llm_int8 on device cpu: expected"),
        (lambda: ops.quantize_per_token(ones(2, 3, 4), INT8), r"\[2, 3, 4\]: expected \[M, K\]"),
        (lambda: ops.quantize_per_token(x, torch.uint8), "torch.uint8"),
        (lambda: ops.quantize_per_token(x, INT8, "triton"), "quantize_per_token on device cpu: expected"),
        (lambda: ops.quantize_per_tensor(x.double(), INT8), "torch.float64"),
        (lambda: ops.quantize_per_tensor(x, torch.int32), "torch.int32"),
        (lambda: ops.quantize_per_tensor(x, INT8, ones(1, 1)), r"scale is torch.float32 \[1, 1\]"),
        (lambda: ops.quantize_per_tensor(x, INT8, one.int()), r"scale is torch.int32 \[1\]"),
        (lambda: ops.quantize_per_tensor(x, INT8, one.to("meta")), "cpu and meta: expected one device"),
        (lambda: ops.quantize_per_group(x, INT8), "K is 70: groups need a multiple of 128"),
        (lambda: ops.rms_norm_quantize(x, ones(K + 1), 1e-6, 0.0, INT8), r"gain is .* \[71\]: expected float \[70\]"),
        (lambda: ops.rms_norm_quantize(x, ones(K), -1e-6, 0.0, INT8), "eps is -1e-06: expected a number from 0"),
        (lambda: ops.rms_norm_quantize(x, ones(K), math.nan, 0.0, INT8), "eps is nan"),
        (lambda: ops.rms_norm_quantize(x, ones(K), 1e-6, math.inf, INT8), "offset is inf: expected 0, or 1"),
        (
            lambda: ops.silu_mul_quantize(x, x[:, 1:], INT8),
            r"gate is .*\[5, 70\] and up .*\[5, 69\]: expected the same",
        ),
        (lambda: ops.silu_mul_quantize(x, x.half(), INT8), "expected the same dtype and shape"),
        (lambda: ops.linear_dynamic(x[:, 1:], codes, scale, None), r"expected \[\.\.\., 70\]"),
        (lambda: ops.linear_dynamic(x.double(), codes, scale, None), "torch.float64"),
        (lambda: ops.linear_dynamic(x, codes.int(), scale, None), "torch.int32"),
        (lambda: ops.linear_dynamic(x, codes, scale[:, 0], None), r"scale is torch.float32 \[13\]"),
        (lambda: ops.linear_dynamic(x, codes, scale, ones(N + 1)), r"bias is .* \[14\]: expected float \[13\]"),
        (lambda: ops.linear_dynamic(x, codes, scale, None, "cuda"), "expected one of auto, torch, triton"),
        (lambda: ops.linear_dynamic(x, codes, scale.to("meta"), None), "cpu and meta: expected one device"),
        (lambda: ops.linear_weight_only(x, codes, ones(N, 3), None), "G dividing K = 70"),
        (lambda: ops.linear_dynamic(x, codes, ones(N, 2), None), r"expected float \[13, 1\]"),
        (lambda: ops.linear_weight_only(x, codes, scale, None, "triton"), "linear_weight_only on device cpu: expected"),
        (lambda: ops.dequantize(codes[0], scale, torch.half), r"codes are torch.int8 \[70\]: expected \[N, K\]"),
        (lambda: ops.dequantize(codes, ones(N, 3), torch.half), "G dividing K = 70"),
        (lambda: ops.dequantize(codes, one.int(), torch.half), r"scale is torch.int32 \[1\]: expected float \[1\]"),
        (lambda: ops.dequantize(codes, scale, torch.double), "dtype is torch.float64: expected float32"),
        (lambda: ops.dequantize(codes, one.to("meta"), torch.half), "cpu and meta: expected one device"),
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
