"""The CPU's ways by number of tokens and shape give what the generic way gives: bits, or a derived bound."""

import itertools
import math

import pytest
import torch
from quantkit_kernels import cpu, cpu_decoding, decoded, dispatch, formats, generic, ops, reference

INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
U32 = 2.0**-24
vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this processor has no VNNI")


def draw(seed, *shape, dtype=torch.float32):
    """Return rows that differ in size, with some outliers and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * (0.05 + 3 * torch.rand((*shape[:-1], 1), generator=generator))
    x[torch.rand(shape, generator=generator) < 0.02] *= 20.0
    x.view(-1, shape[-1])[3::7] = 0
    return x.to(dtype)


def views(x):
    return [x, x.mT.contiguous().mT, x.repeat_interleave(2, dim=1)[:, ::2]]


@vnni
@pytest.mark.parametrize("tokens", [1, 2, 6, 7, 8, 9, 15, 16, 17, 33, 95, 96, 97, 130])
@pytest.mark.parametrize(("out_features", "in_features"), [(40, 64), (1, 2), (33, 71)])
def test_the_integer_product_is_exact_for_every_number_of_tokens(tokens, out_features, in_features):
    generator = torch.Generator().manual_seed(tokens)
    a = torch.randint(-128, 128, (tokens, in_features), generator=generator, dtype=INT8)
    b = torch.randint(-128, 128, (out_features, in_features), generator=generator, dtype=INT8)
    wide = torch.zeros(out_features, in_features + 5, dtype=INT8)
    wide[:, 3:-2] = b
    for left, right in itertools.product(views(a), [*views(b), wide[:, 3:-2]]):
        out = cpu.int_mm(left, right)
        assert out.is_contiguous()
        assert torch.equal(out, (a.double() @ b.double().T).to(torch.int32))


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("acc_dtype", [torch.int32, torch.float32])
@pytest.mark.parametrize("elements", [1, 50, 1 << 20])
def test_the_epilogue_by_parts_is_the_epilogue(monkeypatch, out_dtype, acc_dtype, elements):
    monkeypatch.setattr(cpu, "_CHUNK_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    acc = torch.randint(-(2**26), 2**26, (7, 20), generator=generator, dtype=torch.int32).to(acc_dtype)
    scales = [torch.rand(7, 1, generator=generator), torch.rand(1, generator=generator)]
    rows = [torch.rand(20, 1, generator=generator), torch.rand(1, generator=generator).bfloat16()]
    for scale, row, bias in itertools.product(scales, rows, [None, torch.randn(20, generator=generator).half()]):
        expected = generic.epilogue(acc.clone(), scale, row, bias, out_dtype)
        out = cpu.epilogue(acc.clone(), scale, row, bias, out_dtype)
        assert out.dtype == out_dtype
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [INT8, E4M3, E5M2])
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("elements", [1, 150, 1 << 20])
def test_tokens_are_quantized_as_in_formats(monkeypatch, dtype, x_dtype, elements):
    monkeypatch.setattr(cpu, "_CHUNK_ELEMENTS", elements)
    x = draw(1, 11, 70, dtype=x_dtype)
    x[5] *= 1e-38 if x_dtype != torch.float16 else 1e-6  # a subnormal scale, where float32 has one
    before = x.clone()
    expected, scale = formats.quantize_per_token(x, dtype)
    left = torch.tensor([3, 60])
    without, its_scale = formats.quantize_per_token(x.index_fill(1, left, 0.0), dtype)
    for view in views(x):
        for given, (codes, scales) in ((None, (expected, scale)), (left, (without, its_scale))):
            out, out_scale = cpu.quantize_per_token(view, dtype, given)
            assert torch.equal(out.float(), codes.float())
            assert torch.equal(out_scale.where(codes.float().any(1, keepdim=True), 1.0), scales)
    assert torch.equal(x, before)


DAMAGE = {
    "nothing": lambda x: x,
    "zeros": lambda x: x * 0,
    "minus zeros": lambda x: x * -0.0,
    "a NaN": lambda x: x.index_fill(1, torch.tensor([2]), math.nan),
    "an infinity": lambda x: x.index_fill(1, torch.tensor([2]), math.inf),
    "tiny numbers": lambda x: x * 1e-39,
    "half of a step": lambda x: (x * 0 + 0.5).index_fill(1, torch.tensor([0]), 127.0),
}


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 2, 7, 20])
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("scales", ["row", "tensor", "bfloat16"])
def test_int8_layers_give_the_bits_of_the_generic_way(x_dtype, tokens, damage, scales):
    x, bias = DAMAGE[damage](draw(2, tokens, 70).clamp(-5, 5)).to(x_dtype), draw(3, 1, 13, dtype=x_dtype)[0]
    codes, scale = formats.quantize_weight(draw(4, 13, 70), INT8, granularity="tensor" if scales == "tensor" else "row")
    scale = scale.bfloat16() if scales == "bfloat16" else scale
    for some_bias, given in itertools.product((bias, None), (None, 0.001, 0.03, 3.0)):
        static = None if given is None else torch.tensor([given])
        expected = generic.linear_tensor(x, codes, scale, static, some_bias)
        assert same(cpu.linear_tensor(x, codes, scale, static, some_bias), expected)
        if scales != "tensor" and given is None:
            expected = generic.linear_dynamic(x, codes, scale, some_bias)
            assert same(cpu.linear_dynamic(x, codes, scale, some_bias), expected)
            if damage not in ("an infinity", "half of a step"):
                assert same(cpu.linear_llm_int8(x, codes, scale, some_bias, 6.0), expected)


def same(left, right):
    """Whether results are the same bits, or NaN both."""
    return left.dtype == right.dtype and torch.equal(left.nan_to_num(7.0, 8.0, 9.0), right.nan_to_num(7.0, 8.0, 9.0))


# Weights alone quantized


def int8_kernel_bound(x, codes, scale, bias):
    """Return the exact product and the bound of `_weight_int8pack_mm`: sums in float32, scaled there, rounded to
    bfloat16, and again once the bias is added."""
    exact = (x.double() @ codes.double().T) * scale.double().T
    size = (x.double().abs() @ codes.double().abs().T) * scale.double().T
    bound = (x.shape[1] + 1) * U32 * size
    total = exact if bias is None else exact + bias.double()
    return total, bound + 2.0**-8 * (exact.abs() + bound) * 1.01 + 2.0**-8 * total.abs() * (bias is not None)


@pytest.mark.parametrize("tokens", [1, 3, 16, 17])
@pytest.mark.parametrize("in_features", [32, 64, 96, 70, 48, 33])
@pytest.mark.parametrize("with_bias", [True, False])
def test_int8_weights_with_bfloat16_activations(tokens, in_features, with_bias):
    """By torch's kernel where it can, and else decoded: the weight is rounded to bfloat16 first then, 2**-8 of the sum
    of magnitudes more. The kernel reads beyond rows that its blocks don't divide, so it must not be asked there."""
    x, bias = draw(5, tokens, in_features, dtype=torch.bfloat16), draw(6, 1, 21, dtype=torch.bfloat16)[0]
    codes, scale = formats.quantize_weight(draw(7, 21, in_features, dtype=torch.bfloat16), INT8)
    packed = formats.pack_int32(codes, 8)
    some_bias = bias if with_bias else None
    exact, bound = int8_kernel_bound(x, codes, scale, some_bias)
    rounded = 2.0**-8 * 1.01 * (x.double().abs() @ codes.double().abs().T) * scale.double().T
    out = ops.linear_weight_only(x, codes, scale, some_bias)
    allowed = bound if cpu_decoding._has_int8_kernel(x, scale) else bound + rounded
    assert bool(((out.double() - exact).abs() <= allowed).all())
    assert torch.equal(ops.linear_weight_only_packed(x, packed, scale, some_bias, 8), out)
    # words that don't begin on eight bytes can't be read as int64: they are decoded
    lying = torch.cat([torch.zeros(1, dtype=torch.int32), packed.view(-1)])[1:].view(packed.shape)
    out = ops.linear_weight_only_packed(x, lying, scale, some_bias, 8)
    assert bool(((out.double() - exact).abs() <= bound + rounded).all())


def test_the_int8_kernel_is_asked_only_for_what_it_can():
    x, scale = torch.ones(1, 64).bfloat16(), torch.ones(9, 1).bfloat16()
    assert cpu_decoding._has_int8_kernel(x, scale)
    for bad_x, bad_scale in (
        (x.float(), scale), (x, scale.float()), (x, torch.ones(9, 2).bfloat16()), (x[:, :40], scale), (x[:0], scale),
        (x[:, :0], scale), (torch.ones(17, 64).bfloat16(), scale), (x, scale[:0]),
    ):  # fmt: skip
        assert not cpu_decoding._has_int8_kernel(bad_x, bad_scale)


@pytest.mark.parametrize("dtype", [INT8, E4M3, E5M2])
@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("groups", [1, 4])
def test_a_decoded_weight_is_the_dequantized_one_bit_for_bit(dtype, scale_dtype, to, groups):
    """On all codes, with scales from the smallest to the largest of the dtype."""
    codes = torch.arange(256, dtype=torch.uint8).view(INT8).view(dtype).repeat(9, 1)
    scale = torch.logspace(-37, 30, 9 * groups) if scale_dtype != torch.float16 else torch.logspace(-7, 4, 9 * groups)
    scale = scale.to(scale_dtype).view(9, groups)
    for view in (codes, codes.view(INT8).t().contiguous().t().view(dtype)):
        expected = formats.dequantize(view, scale).to(to)
        assert same(cpu_decoding.decoded_rows(view, scale, to).float(), expected.float())
        assert torch.equal(expected.isnan(), cpu_decoding.decoded_rows(view, scale, to).isnan())


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("elements", [1, 300, 1 << 20])
def test_weights_by_parts_are_the_whole(monkeypatch, bits, elements):
    """Small whole numbers, so that every order of the sums is exact."""
    monkeypatch.setattr(cpu_decoding, "_DECODED_ELEMENTS", elements)
    monkeypatch.setattr(cpu_decoding, "_UNPACKED_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(8)
    for tokens, groups in itertools.product((0, 1, 5, 20), (1, 4)):
        codes = torch.randint(-7, 8, (13, 64), generator=generator, dtype=INT8)
        x = torch.randint(-3, 4, (tokens, 64), generator=generator).bfloat16()
        scale = torch.full((13, groups), 0.5).bfloat16()
        bias = torch.arange(13.0)
        weight = codes if bits is None else formats.pack_int32(codes, bits)
        rest = () if bits is None else (bits,)
        op = cpu_decoding.linear_weight_only if bits is None else cpu_decoding.linear_weight_only_packed
        out = op(x, weight, scale, bias, *rest)
        exact = x.double() @ codes.double().T * 0.5
        assert torch.equal(out, (exact.bfloat16() + bias.bfloat16()) if tokens else exact.bfloat16())


@pytest.mark.parametrize("elements", [1, 600, 1 << 20])
def test_blocks_by_parts_are_the_whole(monkeypatch, elements):
    monkeypatch.setattr(cpu_decoding, "_DECODED_ELEMENTS", elements)
    for tokens, out_features in ((0, 5), (1, 130), (3, 257), (2, 0)):
        x = draw(9, max(tokens, 1), 256)[:tokens]
        codes, scale = formats.quantize_weight(draw(10, max(out_features, 1), 256), E4M3, granularity="block")
        codes, scale = codes[:out_features], scale[: -(-out_features // 128)]
        out = cpu_decoding.linear_block(x, codes, scale, None)
        expected = generic.linear_block(x, codes, scale, None)
        assert out.shape == (tokens, out_features)
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-4)


# A decoded weight that is kept


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("op", ["linear_dynamic", "linear_tensor", "linear_tensor static", "linear_block"])
@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_products_with_a_kept_weight(dtype, x_dtype, op, tokens):
    """The op's bound, float32 sums of K terms and two roundings of activations and weights where a block's scales are
    applied to them; in bfloat16 the roundings that `decoded.linear` names."""
    op, _, static = op.partition(" ")
    x, bias = draw(11, max(tokens, 1), 256, dtype=x_dtype)[:tokens], draw(12, 1, 21, dtype=x_dtype)[0]
    granularity = "block" if op == "linear_block" else "row"
    codes, scale = formats.quantize_weight(draw(13, 21, 256), dtype, granularity=granularity)
    given = torch.tensor([0.02]) if static else None
    kept = decoded.decode_weight(op, codes, scale, x_dtype)
    assert kept.dtype == (torch.bfloat16 if x_dtype == torch.bfloat16 else torch.float32)
    arguments = (given,) if op == "linear_tensor" else ()
    for some_bias in (bias, None):
        out = decoded.linear(op, x, kept, dtype, scale, given, some_bias)
        assert (out.dtype, out.shape) == (x_dtype, (tokens, 21))
        expected = getattr(reference, op)(x, codes, scale, *arguments, some_bias)
        values, weight = x.double().abs(), formats.dequantize_weight(codes, scale.double(), granularity).abs()
        if static:
            values = values.clamp(max=0.02 * formats.QMAX[dtype])
        size = values * (1 + 2.0**-2) @ weight.T + (0 if some_bias is None else some_bias.double().abs())
        unit = torch.finfo(x_dtype).eps / 2
        low = expected.abs()
        if x_dtype == torch.bfloat16:  # sums are rounded before the bias is added
            product = expected if some_bias is None else expected - some_bias.double()
            low = 3.0 * size if op == "linear_block" else low + product.abs()
        bound = 1.01 * (260 * U32 * size + unit * low) + torch.finfo(x_dtype).tiny
        assert bool(((out.double() - expected).abs() <= bound).all())


# Calls without the dispatcher


class _Named(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def arguments():
    codes, scale = formats.quantize_weight(draw(14, 13, 70), INT8)
    return draw(15, 2, 70), codes, scale, None


def test_a_plain_call_is_one_that_nobody_sees():
    x, codes, scale, _ = arguments()
    assert dispatch.is_plain_call(x, codes, scale, None)
    assert dispatch.is_plain_call(torch.nn.Parameter(x, requires_grad=False))
    assert not dispatch.is_plain_call(x, codes, scale.clone().requires_grad_())
    with torch.no_grad():
        assert dispatch.is_plain_call(x.clone().requires_grad_())
    with torch.inference_mode():
        assert dispatch.is_plain_call(x, codes)
    assert not dispatch.is_plain_call(x.to("meta"))
    assert not dispatch.is_plain_call(x.as_subclass(_Subclass))
    with torch.device("cpu"):  # a mode that sees functions
        assert not dispatch.is_plain_call(x)
    with torch.autograd.forward_ad.dual_level():
        assert not dispatch.is_plain_call(x)
    seen = []
    torch.func.vmap(lambda row: seen.append(dispatch.is_plain_call(row)) or row)(x)
    torch.jit.trace(lambda value: seen.append(dispatch.is_plain_call(value)) or value * 2, (x,), check_trace=False)
    assert seen == [False, False]


class _Subclass(torch.Tensor):
    pass


def test_a_mode_sees_the_op_and_the_result_is_the_same():
    plain = ops.linear_dynamic(*arguments())
    with _Named() as mode:
        seen = ops.linear_dynamic(*arguments())
    assert any("quantkit.linear_dynamic" in name for name in mode.seen)
    assert torch.equal(seen, plain)
    assert torch.equal(torch.ops.quantkit.linear_dynamic(*arguments()), plain)


def test_a_gradient_is_refused_by_the_functions_too():
    x, *rest = arguments()
    out = ops.linear_dynamic(x.requires_grad_(), *rest)
    with pytest.raises(ops.KernelError, match="linear_dynamic has no gradient"):
        out.sum().backward()
