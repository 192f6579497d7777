import copy
import io

import models
import pytest
import torch
from quantkit_kernels.formats import dequantize, quantize_per_token, quantize_weight

from quantkit import formats
from quantkit.formats import native
from quantkit.modules import QuantizedLinear
from quantkit.recipe import load_recipe, recipe_names
from quantkit.scheme import Scheme

SCHEMES = {name: load_recipe(name).scheme for name in recipe_names()}
N, K = 24, 256


def layer(name, dtype=torch.float32, in_features=K, bias=True):
    """A layer of a recipe's scheme with random weights, and its codes and scale."""
    scheme = SCHEMES[name]
    layout = formats.choose(scheme)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, in_features, generator=generator).to(dtype)
    codes, scale = quantize_weight(weight, getattr(torch, scheme.weight_dtype), scheme.group_size, scheme.weight_range)
    made = QuantizedLinear(in_features, N, scheme, layout, bias=bias, dtype=dtype)
    for key, tensor in layout.compress(scheme, codes, scale).items():
        made.get_buffer(key).copy_(tensor)
    if bias:
        made.bias.data = torch.randn(N, generator=generator).to(dtype)
    return made, codes, scale


def saved_and_loaded(made):
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def stored(module):
    return {name: module.get_buffer(name).clone() for name in module.stored}


@pytest.mark.parametrize("name", SCHEMES)
def test_the_output_is_the_product_of_what_is_stored(name):
    """Float32 sums of K products are right to K * 2**-24 of the sum of magnitudes; five roundings more in the scales
    and the bias."""
    made, codes, scale = layer(name)
    x = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(1))
    weight, given = dequantize(codes, scale).double(), x.double()
    if SCHEMES[name].activation_dtype is not None:
        tokens, token_scale = quantize_per_token(x.reshape(-1, K), getattr(torch, SCHEMES[name].activation_dtype))
        given = (tokens.double() * token_scale.double()).view(x.shape)
        weight = codes.double() * scale.double()
    exact = given @ weight.t() + made.bias.double()
    bound = (K + 8) * 2**-24 * (given.abs() @ weight.abs().t() + made.bias.double().abs())
    out = made(x)
    assert (out.shape, out.dtype) == ((3, 5, N), torch.float32)
    assert bool(((out.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_has_the_inputs_dtype(name, dtype):
    made, _, _ = layer(name, dtype)
    assert made(torch.randn(2, K).to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", ["w8a8", "int8", "fp8", "fp8-e5m2", "fp8-e5m2-weight-only"])
def test_in_features_may_be_odd_and_bias_may_be_absent(name):
    made, codes, scale = layer(name, in_features=51, bias=False)
    assert made.bias is None
    found, found_scale = made.codes_and_scale()
    assert models.same(found, codes)
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
    expected = formats.choose(SCHEMES[name]).compress(SCHEMES[name], codes, scale)
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
