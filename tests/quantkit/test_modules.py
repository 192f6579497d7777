import copy
import io

import models
import pytest
import torch
from quantkit_kernels.formats import (
    dequantize,
    dequantize_weight,
    quantize_per_group,
    quantize_per_tensor,
    quantize_per_token,
    quantize_weight,
)
from schemes import SCHEMES

from quantkit import formats, modules
from quantkit.formats import native
from quantkit.modules import QuantizedLinear, op_of, quantize_linear
from quantkit.scheme import Scheme

N, K = 136, 256


def layer(name, dtype=torch.float32, in_features=K, bias=True, form="auto", transposed=False):
    """A layer of a scheme with random weights, and its codes and scale. Static activations saturate beyond 2."""
    scheme = SCHEMES[name]
    layout = formats.choose(scheme, form)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, in_features, generator=generator).to(dtype)
    codes, scale = quantize_linear(weight, scheme)
    limit = 2 / (127 if scheme.code_dtype == "int8" else torch.finfo(codes.dtype).max)
    input_scale = torch.tensor([limit]) if scheme.is_static else None
    made = QuantizedLinear(in_features, N, scheme, layout, bias=bias, dtype=dtype, transposed=transposed)
    for key, tensor in layout.compress(scheme, codes, scale, input_scale, transposed).items():
        made.get_buffer(key).copy_(tensor)
    if bias:
        made.bias.data = torch.randn(N, generator=generator).to(dtype)
    return made, codes, scale


def activations(seed=1):
    """Inputs with an outlier beyond 6 in two of the features."""
    x = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(seed))
    x[0, 1, 7], x[2, 4, 200] = 9.0, -20.0
    return x


def as_multiplied(x, made):
    """What the layer multiplies its weight with, in float64, for x [M, K]."""
    scheme = made.scheme
    if scheme.activation_dtype is None:
        return x.double()
    dtype = getattr(torch, scheme.activation_dtype)
    if scheme.activation == "group":
        codes, scale = quantize_per_group(x, dtype, 128)
        return codes.double() * scale.double().repeat_interleave(128, 1)
    if scheme.activation != "token":
        codes, scale = quantize_per_tensor(x, dtype, made.input_scale if scheme.is_static else None)
        return codes.double() * scale.double()
    outliers = (x.abs() >= (scheme.threshold or torch.inf)).any(0)
    codes, scale = quantize_per_token(x.masked_fill(outliers, 0.0), dtype)
    return torch.where(outliers, x.double(), codes.double() * scale.double())


def decoded(codes, scale, scheme):
    """The weight in float64: the exact products, or what is decoded to float32 where weights only are quantized."""
    granularity = scheme.weight_granularity
    if scheme.activation_dtype is None:
        return dequantize_weight(codes, scale, granularity).double()
    return dequantize_weight(codes, scale.double(), granularity)


def saved_and_loaded(made):
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def stored(module):
    return {name: module.get_buffer(name).clone() for name in module.stored}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("form", ["auto", "quantkit"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_output_is_the_product_of_what_is_stored(name, form, transposed):
    """Float32 sums of K products are right to K * 2**-24 of the sum of magnitudes; eight roundings more in scales, the
    two sums of LLM.int8 and the bias."""
    made, codes, scale = layer(name, form=form, transposed=transposed)
    x = activations()
    given = as_multiplied(x.reshape(-1, K), made).view(x.shape)
    weight = decoded(codes, scale, SCHEMES[name])
    exact = given @ weight.t() + made.bias.double()
    bound = (K + 8) * 2**-24 * (given.abs() @ weight.abs().t() + made.bias.double().abs())
    out = made(x)
    assert (out.shape, out.dtype) == ((3, 5, N), torch.float32)
    assert bool(((out.double() - exact).abs() <= bound).all())


def test_outliers_of_llm_int8_are_not_quantized():
    """Quantized by token, the token with 20 in it would be off by 20 / 254 in each of the other features."""
    plain, llm = layer("w8a8")[0], layer("llm-int8")[0]
    x = activations().reshape(-1, K)
    error = {made: (as_multiplied(x, made) - x.double()).abs().amax(1)[14] for made in (plain, llm)}
    assert error[plain] > 20 / 254 * 0.9
    assert error[llm] < 6 / 254


def test_static_activations_saturate_and_dynamic_ones_do_not():
    x = activations().reshape(-1, K)
    for name in ("w8a8-static", "fp8-static"):
        assert float(as_multiplied(x, layer(name)[0]).abs().max()) == pytest.approx(2.0, rel=2**-20)
    assert float(as_multiplied(x, layer("w8a8-tensor")[0]).abs().max()) == pytest.approx(20.0)


OPS = {
    "int8": "linear_weight_only_packed",
    "int8-g128": "linear_weight_only_packed",
    "int4": "linear_weight_only_packed",
    "fp8-weight-only": "linear_weight_only",
    "w8a8": "linear_dynamic",
    "fp8": "linear_dynamic",
    "fp8-tensor-token": "linear_dynamic",
    "w8a8-tensor": "linear_tensor",
    "w8a8-static": "linear_tensor",
    "fp8-static": "linear_tensor",
    "fp8-block": "linear_block",
    "llm-int8": "linear_llm_int8",
}


@pytest.mark.parametrize("name", OPS)
def test_each_scheme_has_its_op_and_says_what_runs_it(name):
    made = layer(name)[0]
    assert made.op == OPS[name]
    assert made.backend_in_use == modules.ops.select_backend(
        OPS[name],
        torch.int32 if "packed" in OPS[name] else made.codes_and_scale()[0].dtype,
        torch.device("cpu"),
        "auto",
    )
    assert op_of(SCHEMES["int8"], packed=False) == "linear_weight_only"


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_is_quantized_as_its_scheme_says(name, dtype):
    scheme = SCHEMES[name]
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(4)).to(dtype)
    codes, scale = quantize_linear(weight, scheme)
    if scheme.threshold is not None:  # in float32, as LLM.int8 has it
        assert torch.equal(scale, weight.float().abs().amax(1, keepdim=True) / 127)
        assert torch.equal(codes, (weight.float() / scale).round().to(torch.int8))
        return
    kind, granularity = getattr(torch, scheme.code_dtype), scheme.weight_granularity
    bits = {"bits": 4} if name.startswith("int4") else {}
    expected = quantize_weight(weight, kind, scheme.group_size, scheme.weight_range, granularity, **bits)
    assert models.same(codes, expected[0])
    assert models.same(scale, expected[1])
    specs = native.tensor_specs(scheme, N, K, dtype)
    assert (tuple(scale.shape), scale.dtype) == (specs["weight_scale"].shape, specs["weight_scale"].dtype)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scale_of_another_dtype_than_the_weights_is_rounded_before_codes_are_found(name, dtype):
    """A float32 weight that float16 and bfloat16 can hold gets just the scale and codes of its copy in that dtype (with
    ranges by absmax); and whatever the weight, codes are the nearest of the weight / the rounded scale."""
    scheme = SCHEMES[name]
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(6)) * 0.05
    codes, scale = quantize_linear(weight, scheme, dtype)
    assert scale.dtype == (torch.float32 if scheme.threshold is not None else dtype)
    steps = dequantize_weight(torch.ones_like(codes, dtype=torch.int8), scale.float(), scheme.weight_granularity)
    quotients = weight / steps
    if codes.dtype == torch.int8:
        assert torch.equal(codes.float(), quotients.round().clamp(*((-8, 7) if scheme.bits == 4 else (-127, 127))))
    else:
        largest = torch.finfo(codes.dtype).max
        assert models.same(codes, quotients.clamp(-largest, largest).to(codes.dtype))
    if scheme.weight_range == "absmax":
        held = weight.to(dtype)
        for ours, expected in zip(
            quantize_linear(held.float(), scheme, dtype), quantize_linear(held, scheme), strict=True
        ):
            assert models.same(ours, expected)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_has_the_inputs_dtype(name, dtype):
    made, _, _ = layer(name, dtype)
    assert made(torch.randn(2, K).to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", ["w8a8", "llm-int8", "int8", "int4-channel", "fp8", "fp8-e5m2", "w8a8-static"])
@pytest.mark.parametrize("transposed", [False, True])
def test_in_features_may_be_odd_and_bias_may_be_absent(name, transposed):
    made, codes, scale = layer(name, in_features=51, bias=False, transposed=transposed)
    assert made.bias is None
    found, found_scale = made.codes_and_scale()
    assert models.same(found.contiguous(), codes)
    assert models.same(found_scale, scale)
    assert made(torch.randn(2, 51)).shape == (2, N)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("change", ["half", "double", "bfloat16", "float", "to", "type"])
def test_a_change_of_dtype_changes_the_bias_alone(name, change):
    made, _, _ = layer(name, torch.bfloat16)
    before = stored(made)
    dtype = {"half": torch.float16, "double": torch.float64, "bfloat16": torch.bfloat16, "float": torch.float32}
    if change in dtype:
        getattr(made, change)()
    elif change == "to":
        made.to(torch.float16)
    else:
        made.type(torch.float16)
    assert made.bias.dtype == dtype.get(change, torch.float16)
    assert all(models.same(made.get_buffer(key), tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", SCHEMES)
def test_a_device_that_is_not_there_leaves_the_layer_as_it_was(name):
    made, _, _ = layer(name)
    before = stored(made)

    def fail(tensor):
        raise RuntimeError("no such device")

    with pytest.raises(RuntimeError, match="no such device"):
        made._apply(fail)
    assert all(models.same(made.get_buffer(key), tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", SCHEMES)
def test_moving_to_another_device_moves_everything(name):
    made, _, _ = layer(name)
    shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in stored(made).items()}
    made.to("meta")
    assert all(buffer.is_meta for buffer in made.buffers())
    assert {key: (made.get_buffer(key).shape, made.get_buffer(key).dtype) for key in made.stored} == shapes


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("way", [copy.deepcopy, saved_and_loaded])
def test_a_copy_is_a_layer_of_its_own_with_the_same_output(name, way):
    made, _, _ = layer(name)
    other = way(made)
    x = torch.randn(2, K)
    assert torch.equal(other(x), made(x))
    assert all(models.same(other.get_buffer(key), tensor) for key, tensor in stored(made).items())
    assert all(other.get_buffer(key).data_ptr() != made.get_buffer(key).data_ptr() for key in made.stored)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_state_dict_is_what_the_format_stores(name):
    made, codes, scale = layer(name)
    given = made.input_scale if SCHEMES[name].is_static else None
    expected = formats.choose(SCHEMES[name]).compress(SCHEMES[name], codes, scale, given)
    state = made.state_dict()
    assert set(state) == {*expected, "bias"}
    assert all(models.same(state[key], tensor) for key, tensor in expected.items())


def test_nothing_is_trainable():
    made, _, _ = layer("w8a8")
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_it_prints_its_scheme():
    assert "int8, activations per token" in repr(layer("w8a8")[0])


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_quantkits_own_format_multiplies_in_groups(dtype):
    """Equal to the decoded weight's product to the last bit: both are F.linear of the same numbers."""
    scheme = Scheme(dtype, group_size=16)
    weight = torch.randn(N, 64, generator=torch.Generator().manual_seed(2))
    codes, scale = quantize_weight(weight, getattr(torch, dtype), 16)
    made = QuantizedLinear(64, N, scheme, native, bias=False, dtype=torch.float32)
    made.load_state_dict(native.compress(scheme, codes, scale))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(made(x), torch.nn.functional.linear(x, dequantize(codes, scale)))


# A decoded weight that is kept

DECODED = [name for name, scheme in SCHEMES.items() if scheme.activation_dtype != "int8"]


def kept(name, **options):
    made, _, _ = layer(name, **options)
    made.keep_decoded = True
    return made


@pytest.mark.parametrize("name", DECODED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_kept_weight_gives_the_output_of_the_decoded_one(name, dtype, transposed):
    """Sums in another order and, in bfloat16, four roundings more at most (blocks) of the sum of magnitudes."""
    made = kept(name, dtype=dtype, transposed=transposed)
    x = activations().to(dtype)
    with torch.no_grad():
        out = made(x)
    assert made._decoded.weight.shape == (N, K)
    made.keep_decoded = False
    expected = made(x)
    weight = decoded(*made.codes_and_scale(), made.scheme).abs()
    given = as_multiplied(x.float().reshape(-1, K), made).view(x.shape).abs()
    size = given @ weight.t() + made.bias.double().abs()
    unit = 4 * 2**-8 if dtype == torch.bfloat16 else 2 * (K + 8) * 2**-24
    assert (out.dtype, out.shape) == (dtype, expected.shape)
    assert bool(((out.double() - expected.double()).abs() <= unit * size).all())


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.activation_dtype == "int8"])
def test_nothing_is_kept_where_nothing_is_decoded(name):
    made = kept(name)
    made(activations())
    assert made._decoded is None


CHANGES = {
    "written to": lambda made: made.weight_scale.mul_(2),
    "replaced": lambda made: setattr(made, "weight_scale", made.weight_scale * 2),
    "new data": lambda made: setattr(made.weight_scale, "data", made.weight_scale * 2),
    "loaded": lambda made: made.load_state_dict(made.state_dict() | {"weight_scale": made.weight_scale * 2}),
    "assigned": lambda made: made.load_state_dict(
        made.state_dict() | {"weight_scale": made.weight_scale * 2}, assign=True
    ),
}


@pytest.mark.parametrize("name", ["int8", "fp8-weight-only", "fp8", "fp8-block"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_follows_the_buffers(name, change):
    made = kept(name, bias=False)
    x = activations()
    with torch.no_grad():
        before = made(x)
        assert torch.equal(made(x), before)
        CHANGES[change](made)
        assert torch.equal(made(x), before * 2)  # an exact factor in every sum


def test_what_is_kept_is_made_once_for_a_dtype():
    made = kept("fp8")
    with torch.no_grad():
        made(activations())
        first = made._decoded
        made(activations(2))
        assert made._decoded is first
        made(activations().bfloat16())
        assert made._decoded.weight.dtype == torch.bfloat16
        made.half()
        assert made._decoded is None


@pytest.mark.parametrize("way", [copy.deepcopy, saved_and_loaded])
def test_a_copy_of_a_layer_holds_nothing_that_is_kept(way):
    made = kept("fp8")
    with torch.no_grad():
        out = made(activations())
        other = way(made)
        assert other.keep_decoded
        assert other._decoded is None
        assert torch.equal(other(activations()), out)
    assert set(made.state_dict()) == {"weight", "weight_scale", "bias"}


def test_a_kept_weight_has_no_gradient_either():
    made = kept("int8")
    out = made(activations().requires_grad_())
    with pytest.raises(modules.ops.KernelError, match="has no gradient"):
        out.sum().backward()


def test_buffers_without_versions_are_decoded_every_time():
    with torch.inference_mode():
        made = kept("fp8", bias=False)
        out = made(activations())
        assert made._decoded is None
        made.weight_scale.mul_(2)
        assert torch.equal(made(activations()), out * 2)


def test_all_layers_of_a_model_keep_or_none():
    model = torch.nn.Sequential(layer("fp8")[0], torch.nn.Sequential(layer("w8a8")[0], layer("int8")[0]))
    assert modules.keep_decoded(model) == 2 * N * K
    with torch.no_grad():
        model[0](activations())
    assert model[0]._decoded is not None
    modules.keep_decoded(model, False)
    assert model[0]._decoded is None
    assert not any(each.keep_decoded for each in model.modules() if isinstance(each, QuantizedLinear))


def test_a_compiled_layer_is_the_layer():
    for name in ("w8a8", "fp8", "int8", "llm-int8"):
        made, x = kept(name), activations()
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(made, backend="aot_eager", fullgraph=True)(x)
            made.keep_decoded = False
            assert torch.equal(compiled, made(x))
