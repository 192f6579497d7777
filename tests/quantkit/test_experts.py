import contextlib
import copy
import io

import mixtures
import pytest
import torch
import torch.nn.functional as F
from quantkit_kernels import ops
from quantkit_kernels.formats import quantize_weight

from quantkit import formats
from quantkit.errors import QuantkitError
from quantkit.experts import (
    QuantizedExperts,
    put_experts,
    quantize_experts,
    quantized_experts,
    use_packed_experts,
)
from quantkit.hf import GROUPED
from quantkit.modules import QuantizedLinear, quantize_linear
from quantkit.scheme import Scheme

IDS = torch.arange(20).view(2, 10) * 7 % 256
E, N, K = 4, 24, 32
INT8, W8A8 = Scheme("int8"), Scheme("int8", activation_dtype="int8")
SCHEMES = {
    "int8": INT8,
    "w8a8": W8A8,
    "w8a8-tensor": Scheme("int8", activation_dtype="int8", activation="tensor"),
    "w8a8-static": Scheme("int8", activation_dtype="int8", activation="tensor-static"),
    "llm-int8": Scheme("int8", activation_dtype="int8", threshold=2.0),
    "fp8": Scheme("float8_e4m3fn", activation_dtype="float8_e4m3fn"),
    "fp8-e5m2-weight-only": Scheme("float8_e5m2"),
    "int4": Scheme("int4"),
    "int8-g8": Scheme("int8", 8),
}


@contextlib.contextmanager
def counting(used):
    """Notes every call of the grouped op."""
    given = ops.linear_grouped

    def counted(*args):
        used.append(args)
        return given(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "linear_grouped", counted)
        yield


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def experts(axis=2, scheme=INT8, dtype=torch.float32, **changes):
    """Packed experts of random weights, and the weights that they decode to."""
    codes, scale = quantize_experts(draw(E, *((N, K) if axis == 2 else (K, N)), dtype=dtype), scheme, axis)
    return QuantizedExperts(codes, scale, axis, scheme, **changes), mixtures.decoded_experts(codes, scale, axis)


def close(packed, exact, x, weight, axis):
    """Whether two products of the same float32 numbers differ by no more than the order of their sums allows."""
    size = F.linear(x.abs(), weight.abs()) if axis == 2 else x.abs() @ weight.abs()
    return packed.shape == exact.shape and bool(((packed - exact).abs() <= 2 * K * 2**-24 * size).all())


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("scheme", [INT8, SCHEMES["fp8"], Scheme("int8", weight_range="mse"), SCHEMES["int4"]])
def test_every_expert_is_quantized_by_its_out_features(axis, scheme):
    weight = draw(E, 6, 10, dtype=torch.bfloat16)
    codes, scale = quantize_experts(weight, scheme, axis)
    assert scale.shape == ((E, 6, 1) if axis == 2 else (E, 1, 10))
    assert scale.dtype == torch.bfloat16
    for expert in range(E):
        rows = weight[expert] if axis == 2 else weight[expert].t().contiguous()
        expected, its_scale = quantize_weight(rows, codes.dtype, weight_range=scheme.weight_range, bits=scheme.bits)
        expected, its_scale = (expected, its_scale) if axis == 2 else (expected.t(), its_scale.t())
        assert torch.equal(codes[expert].float(), expected.float())
        assert torch.equal(scale[expert], its_scale)


def test_groups_run_along_the_last_axis():
    codes, scale = quantize_experts(draw(E, N, K), Scheme("int8", 8), 2)
    expected, its_scale = quantize_weight(draw(E, N, K), torch.int8, 8)
    assert torch.equal(codes, expected)
    assert torch.equal(scale, its_scale)
    for shape, axis in (((E, N, K), 1), ((E, N, 12), 2)):
        with pytest.raises(QuantkitError, match="no groups of 8"):
            quantize_experts(draw(*shape), Scheme("int8", 8), axis)


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_other_scales_than_by_row_are_refused(granularity):
    block = {"activation_dtype": "float8_e4m3fn", "activation": "group"} if granularity == "block" else {}
    with pytest.raises(QuantkitError, match="scale a row"):
        quantize_experts(draw(E, N, K), Scheme("float8_e4m3fn", weight_granularity=granularity, **block), 2)


# What models' own code does with the parameter w [E, N, K], and x [T, K]

OUT_IN = {
    "linear": lambda x, w: F.linear(x, w[1]),
    "linear with a bias": lambda x, w: F.linear(x, w[1], torch.arange(N).to(x.dtype)),
    "linear by keyword": lambda x, w: F.linear(input=x, weight=w[1], bias=None),
    "an index of no axes": lambda x, w: F.linear(x, w[torch.tensor(1)]),
    "an index from the end": lambda x, w: F.linear(x, w[-3]),
    "T": lambda x, w: x @ w[1].T,
    "t": lambda x, w: torch.matmul(x, w[1].t()),
    "transpose": lambda x, w: x.matmul(w[1].transpose(-1, -2)),
    "torch.transpose": lambda x, w: torch.mm(x, torch.transpose(w[1], 0, 1)),
    "mT": lambda x, w: x @ w.mT[1],
    "float": lambda x, w: F.linear(x.float(), w[1].float()),
    "to": lambda x, w: F.linear(x, w[1].to(x.dtype).to(x.device)),
    "iteration": lambda x, w: [F.linear(x, weight) for weight in w][1],
    "unbind": lambda x, w: F.linear(x, torch.unbind(w)[1]),
    "addmm": lambda x, w: torch.addmm(torch.arange(N).to(x.dtype), x, w[1].T),
}
SLICED = {
    "a slice": lambda x, w: F.linear(x, w[1][:5]),
    "a slice with the index": lambda x, w: F.linear(x, w[1, 5:]),
    "an ellipsis": lambda x, w: F.linear(x, w[1, ..., :]),
    "chunk": lambda x, w: torch.cat([F.linear(x, half) for half in w[1].chunk(2, dim=0)], -1),
    "chunk of all": lambda x, w: F.linear(x, w.chunk(2, dim=1)[1][1]),
    "split": lambda x, w: F.linear(x, torch.split(w[1], [3, N - 3])[1]),
    "every other": lambda x, w: F.linear(x, w[1][::2]),
}
BATCHED = {
    "bmm": lambda x, w: torch.bmm(x.expand(E, *x.shape), w.transpose(1, 2)),
    "matmul of batches": lambda x, w: x.expand(E, *x.shape) @ w.transpose(1, 2),
    "matmul with one batch": lambda x, w: torch.matmul(x[None], w.mT),
    "matmul of a matrix": lambda x, w: x @ w.permute(0, 2, 1),
    "an index of one axis": lambda x, w: x @ w[torch.tensor([1])].mT,
    "a range of experts": lambda x, w: x @ w[1:3].mT,
    "baddbmm": lambda x, w: torch.baddbmm(torch.ones(E, 1, N).to(x.dtype), x.expand(E, *x.shape), w.mT),
}


@pytest.mark.parametrize("idiom", [*OUT_IN, *SLICED, *BATCHED])
def test_code_that_multiplies_by_expert_gets_the_product(idiom):
    """That of the decoded weight: both sum the same float32 products, in an order of their own."""
    run = (OUT_IN | SLICED | BATCHED)[idiom]
    packed, weight = experts()
    x = draw(5, K, seed=1)
    exact = run(x.double(), weight.double()) if "float" not in idiom else run(x, weight).double()
    out = run(x, packed)
    size = float(F.linear(x.abs(), weight.abs().amax((0, 1))[None]).max()) + N
    assert out.shape == exact.shape
    assert float((out.double() - exact).abs().max()) <= 2 * (K + 2) * 2**-24 * size


@pytest.mark.parametrize("idiom", OUT_IN)
def test_in_x_out_parameters_are_the_same_transposed(idiom):
    packed, weight = experts(axis=1)
    x = draw(5, K, seed=1)
    out = OUT_IN[idiom](x, packed.transpose(1, 2))
    exact = OUT_IN[idiom](x, weight.transpose(1, 2).contiguous())
    size = float(F.linear(x.abs(), weight.abs().amax((0, 2))[None]).max()) + N
    assert float((out - exact).abs().max()) <= 4 * (K + 2) * 2**-24 * size
    assert close(x @ packed[2], x @ weight[2], x, weight[2], 1)
    assert close(torch.bmm(x.expand(E, *x.shape), packed)[3], x @ weight[3], x, weight[3], 1)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "int8-g8"])
def test_a_product_is_that_of_a_linear_layer_with_the_same_numbers(name, axis):
    """Bit for bit, whatever the scheme."""
    scheme = SCHEMES[name]
    static = torch.tensor([0.01, 0.02, 0.03, 0.04]) if scheme.is_static else None
    weight = draw(E, *((N, K) if axis == 2 else (K, N)))
    codes, scale = quantize_experts(weight, scheme, axis)
    packed = QuantizedExperts(codes, scale, axis, scheme, input_scale=static)
    layout, x, bias = formats.choose(scheme, "quantkit"), draw(5, K, seed=1), draw(N, seed=2)
    for expert in range(E):
        rows = weight[expert] if axis == 2 else weight[expert].t().contiguous()
        layer = QuantizedLinear(K, N, scheme, layout, bias=True, dtype=torch.float32)
        layer.bias.data = bias
        one = None if static is None else static[expert].reshape(1)
        for key, value in layout.compress(scheme, *quantize_linear(rows, scheme), one).items():
            layer.get_buffer(key).copy_(value)
        own = packed[expert] if axis == 2 else packed[expert].T
        assert torch.equal(F.linear(x, own, bias), layer(x))


def test_groups_are_multiplied_with():
    packed, weight = experts(scheme=SCHEMES["int8-g8"])
    x = draw(5, K, seed=1)
    assert close(F.linear(x, packed[1][3:]), F.linear(x, weight[1][3:]), x, weight[1][3:], 2)


def test_it_says_of_itself_what_the_parameter_would():
    packed, weight = experts(dtype=torch.bfloat16)
    for view, tensor in ((packed, weight), (packed[1], weight[1]), (packed.transpose(1, 2), weight.transpose(1, 2))):
        assert (view.shape, view.size(), view.dtype) == (tensor.shape, tensor.size(), tensor.dtype)
        assert (view.ndim, view.dim(), view.numel(), len(view)) == (
            tensor.ndim,
            tensor.ndim,
            tensor.numel(),
            len(tensor),
        )
        assert view.device == tensor.device
        assert view.size(-1) == tensor.size(-1)
        assert not view.requires_grad
        assert view.view(-1, *tensor.shape[1:]).shape == tensor.shape
        assert view.data.shape == view.detach().shape == view.contiguous().shape == tensor.shape
    assert torch.numel(packed) == weight.numel()
    assert packed[1:2].squeeze(0).shape == weight[1].shape


def test_a_view_shares_the_codes():
    packed, _ = experts()
    start = packed.get_buffer("weight").data_ptr()
    assert packed[0].T.codes.data_ptr() == packed.mT[0].codes.data_ptr() == start
    assert packed[2, 4:].codes.data_ptr() == start + 2 * N * K + 4 * K


REFUSED = {
    "add": lambda w: torch.add(torch.ones(1), w),
    "mul": lambda w: torch.ones(1) * w[0],
    "stack": lambda w: torch.stack([w[0], w[1]]),
    "einsum": lambda w: torch.einsum("tk,enk->etn", torch.ones(2, K), w),
    "a product from the left": lambda w: torch.matmul(w[0], torch.ones(K)),
    "linear along axis 1": lambda w: F.linear(torch.ones(2, N), w[0].T),
    "matmul along axis 0": lambda w: torch.ones(2, N) @ w[0],
    "indexing axis 2": lambda w: w[0, :, :3],
    "indexing axis 0": lambda w: w[torch.tensor([0, 1])],
    "indexing axis 1 with 3": lambda w: w[0, 3],
    "indexing with 4 indices": lambda w: w[0, :, :, None],
    "view": lambda w: w.view(-1, K),
    "permute": lambda w: w.permute(1, 0, 2),
    "t()": lambda w: w.t(),
    "iteration over rows": lambda w: list(w[0]),
    "unbind(dim=1)": lambda w: w.unbind(1),
    "'data_ptr'": lambda w: w.data_ptr(),
    "'abs'": lambda w: w[0].abs(),
    "to(torch.int8": lambda w: w[0].to(torch.int8),
    "to('meta'": lambda w: w[0].to("meta"),
    "mm with [2, 3, 32]": lambda w: torch.bmm(torch.ones(2, 3, K), w.mT),
    "matmul with activations [2, 3, 32]": lambda w: torch.ones(2, 3, K) @ w.mT,
}


@pytest.mark.parametrize("what", REFUSED)
def test_anything_else_is_refused_by_name(what):
    with pytest.raises(QuantkitError) as error:
        REFUSED[what](experts()[0])
    assert what in str(error.value)
    assert "packed experts" in str(error.value)


def test_what_a_tensor_has_and_packed_weights_lack_is_not_there():
    packed, _ = experts()
    for view in (packed, packed[0]):
        assert not hasattr(view, "data_ptr")
        assert not hasattr(view, "nonesuch")
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = packed[0].nonesuch


def test_the_state_is_the_buffers_and_a_change_of_dtype_leaves_them():
    packed, _ = experts(scheme=SCHEMES["w8a8-static"], input_scale=torch.ones(E))
    before = {name: value.clone() for name, value in packed.state_dict().items()}
    assert list(before) == ["weight", "weight_scale", "input_scale"]
    assert not list(packed.parameters())
    for change in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.type(torch.float64)):
        after = change(packed).state_dict()
        assert all(
            torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items()
        )
    assert packed.to("meta").get_buffer("weight").is_meta


def test_it_can_be_copied_and_pickled():
    packed, _ = experts()
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    x = draw(3, K)
    for other in (copy.deepcopy(packed), torch.load(file, weights_only=False)):
        assert torch.equal(F.linear(x, other[2]), F.linear(x, packed[2]))
    assert "in_axis=2" in repr(packed)
    assert "in_axis=1" in repr(packed[0])


# Whole models


@pytest.mark.parametrize("name", mixtures.CONFIGS)
def test_weights_alone_give_the_logits_of_the_decoded_model(name):
    """Float32: what differs is the order of sums, 2 * K * 2**-24 of their size; two blocks and the logits make of it
    less than a hundred times that of the largest logit."""
    model = mixtures.build(name)
    made = mixtures.quantized(name, model, INT8)
    with torch.no_grad():
        out, expected = made(IDS).logits, mixtures.decoded(name, model, INT8)(IDS).logits
    count = sum(
        mixtures.in_axis(name, parameter, mixtures.EXPERTS) is not None for parameter, _ in model.named_parameters()
    )
    assert len(list(quantized_experts(made))) == count > 0
    assert float((out - expected).abs().max()) <= 100 * 2 * 48 * 2**-24 * float(expected.abs().max())


@pytest.mark.parametrize("name", mixtures.CONFIGS)
def test_dynamic_activations_stay_near_the_float_experts_of_each_block(name):
    """Each block's experts get the float block's inputs and routes. Codes of 8 bits by row and by token round with some
    0.7 % of a typical weight and activation: two products and the gate make a few percent at most, never nothing."""
    model = mixtures.build(name)
    made = mixtures.quantized(name, model, W8A8)
    holders = {
        p.rpartition(".")[0].removesuffix(".mlp") if name == "dbrx" else p.rpartition(".")[0]
        for p, _ in quantized_experts(made)
    }
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"
    calls = {}
    for holder in holders:

        def keep(_, args, kwargs, out, holder=holder):
            calls[holder] = (args, kwargs, out)

        model.get_submodule(holder).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(IDS)
        for holder, (args, kwargs, out) in calls.items():
            ours = made.get_submodule(holder)(*args, **kwargs)
            error = float((ours - out).norm() / out.norm())
            assert 1e-3 < error < 0.03, holder
    assert calls.keys() == holders


def test_a_model_that_swaps_its_experts_code_runs_its_own():
    made = mixtures.build("mixtral")
    assert made.config._experts_implementation == "grouped_mm"
    made = mixtures.quantized("mixtral", made, INT8)
    assert made.config._experts_implementation == "eager"
    made.set_experts_implementation("batched_mm")
    with pytest.raises(QuantkitError, match="packed experts"):
        made(IDS)


SWAPPED = [name for name in mixtures.CONFIGS if name not in ("dbrx", "llama4")]
"""Those whose code transformers can swap for grouped products."""


@pytest.mark.parametrize("scheme", [INT8, W8A8, SCHEMES["fp8"], SCHEMES["int4"]])
@pytest.mark.parametrize("name", SWAPPED)
def test_grouped_products_are_the_models_own_expert_by_expert(name, scheme):
    """Sums of at most 48 float32 products in another order; a token that rounds to another code moves by 1/127."""
    made = mixtures.quantized(name, mixtures.build(name), scheme)
    used = []
    with torch.no_grad():
        own = made(IDS).logits
        made.set_experts_implementation("grouped_mm")
        with counting(used):
            grouped = made(IDS).logits
    assert used
    tolerance = 1e-4 if scheme.activation_dtype is None else 2e-2
    assert float((grouped - own).abs().max()) <= tolerance * float(own.abs().max())


@pytest.mark.parametrize("scheme", [INT8, W8A8, SCHEMES["fp8"]])
def test_one_grouped_product_is_each_experts(scheme):
    packed, _ = experts(scheme=scheme)
    x, ends = draw(10, K, seed=5), torch.tensor([3, 3, 8, 10], dtype=torch.int32)
    parts = zip(packed, x.tensor_split([3, 3, 8]), strict=True)
    expected = torch.cat([F.linear(part, weight) for weight, part in parts])
    for product in (F.grouped_mm, torch._grouped_mm, torch.ops.transformers.grouped_mm_fallback):
        out = product(x, packed.transpose(-2, -1), offs=ends)
        assert torch.allclose(out, expected, rtol=0, atol=K * 2**-22 * float(expected.abs().max()))


@pytest.mark.parametrize("scheme", [SCHEMES["llm-int8"], SCHEMES["w8a8-static"], SCHEMES["int8-g8"]])
def test_schemes_without_a_grouped_product_are_refused_by_name(scheme):
    packed, _ = experts(scheme=scheme)
    with pytest.raises(QuantkitError, match="grouped_mm with"):
        F.grouped_mm(draw(4, K), packed.transpose(-2, -1), offs=torch.tensor([1, 2, 3, 4], dtype=torch.int32))


class _Elsewhere(QuantizedExperts):
    """Experts that say that they lie on a GPU."""

    device = torch.device("cuda")


@pytest.mark.parametrize(("scheme", "word"), [(W8A8, GROUPED), (SCHEMES["llm-int8"], "eager")])
def test_on_a_gpu_experts_run_in_grouped_products_where_their_scheme_has_them(scheme, word):
    made = mixtures.quantized("mixtral", mixtures.build("mixtral"), scheme)
    for _, packed in quantized_experts(made):
        packed.__class__ = _Elsewhere
    use_packed_experts(made, GROUPED)
    assert {module.config._experts_implementation for module in made.modules() if hasattr(module, "config")} == {word}
    for _, packed in quantized_experts(made):
        packed.__class__ = QuantizedExperts
    if word == GROUPED:
        assert made(IDS).logits.isfinite().all()


def test_experts_take_a_parameters_place():
    module = torch.nn.Module()
    module.register_parameter("P", torch.nn.Parameter(draw(E, N, K)))
    first, second = experts()[0], experts()[0]
    for packed in (first, second):
        put_experts(module, "P", packed)
        assert module.P is packed
    assert not list(module.parameters())
    assert list(module.state_dict()) == ["P.weight", "P.weight_scale"]
