"""Slices of packed layers hold what a slice of the layer would: the same codes, the same scales."""

import pytest
import torch
from sliced import slice_of

from quantkit.errors import CheckpointError
from quantkit.formats import FORMATS
from quantkit.modules import QuantizedLinear, quantize_linear
from quantkit.scheme import Scheme
from quantkit.slicing import placements

ROWS, COLUMNS = 512, 768
SCHEMES = {
    "w8a8": Scheme("int8", activation_dtype="int8"),
    "w8a8 tensor": Scheme("int8", activation_dtype="int8", weight_granularity="tensor", activation="tensor"),
    "int8": Scheme("int8"),
    "int8 group": Scheme("int8", group_size=128),
    "int4": Scheme("int4"),
    "int4 group": Scheme("int4", group_size=128),
    "fp8": Scheme("float8_e4m3fn", activation_dtype="float8_e4m3fn"),
    "fp8 block": Scheme(
        "float8_e4m3fn", activation_dtype="float8_e4m3fn", weight_granularity="block", activation="group"
    ),
    "2:4 int8": Scheme("int8", sparsity="2:4"),
    "2:4 w8a8": Scheme("int8", activation_dtype="int8", sparsity="2:4"),
    "llm-int8": Scheme("int8", activation_dtype="int8", threshold=6.0),
}


def layer_of(scheme, layout, weight, transposed=False):
    """A packed layer of a weight."""
    rows, columns = weight.shape
    made = QuantizedLinear(columns, rows, scheme, layout, bias=False, dtype=weight.dtype, transposed=transposed)
    for name, value in layout.compress(scheme, *quantize_linear(weight, scheme), transposed=transposed).items():
        made._buffers[name] = value
    return made


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize(
    ("form", "name"),
    [
        (form, name)
        for form in ("compressed-tensors", "quantkit")
        for name in SCHEMES
        if name != "llm-int8" and (form == "quantkit" or SCHEMES[name].sparsity is None)
    ]
    + [("bitsandbytes", "llm-int8"), ("quantkit", "llm-int8")],
)
def test_a_slice_decodes_to_the_slice_of_the_weight(form, name, rows):
    scheme, layout = SCHEMES[name], FORMATS[form]
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    if scheme.sparsity is not None:
        weight = weight.view(ROWS, -1, 4).index_fill(2, torch.tensor([1, 2]), 0.0).view(ROWS, COLUMNS)
    layer = layer_of(scheme, layout, weight)
    codes, scale = layer.codes_and_scale()
    for ranks in (2, 4) if (ROWS if rows else COLUMNS) // 4 % 128 == 0 else (2,):
        for number in range(ranks):
            found = slice_of(layer, number, ranks, rows)
            own, own_scale = found.codes_and_scale()
            axis = 0 if rows else 1
            assert torch.equal(own.float(), codes.chunk(ranks, axis)[number].float())
            is_cut = scale.ndim == 2 and scale.shape[axis] > 1
            scale_slice = scale.chunk(ranks, axis)[number] if is_cut else scale
            assert torch.equal(own_scale.float(), scale_slice.float())


@pytest.mark.parametrize(
    ("name", "rows", "ranks", "told"),
    [
        ("int4 group", False, 4, "each a multiple of 128"),
        ("fp8 block", True, 8, "each a multiple of 128"),
        ("w8a8", True, 3, "cannot be cut into 3 slices"),
        ("int4", True, 128, "each a multiple of 8"),
    ],
)
def test_what_cannot_be_cut(name, rows, ranks, told):
    layer = layer_of(SCHEMES[name], FORMATS["compressed-tensors"], torch.randn(ROWS, COLUMNS))
    with pytest.raises(CheckpointError, match=told):
        placements(layer, ranks, rows)
