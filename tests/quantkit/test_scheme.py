import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import RecipeError
from quantkit.scheme import ACTIVATION_RANGES, WEIGHT_DTYPES, Scheme

dtypes = st.sampled_from(WEIGHT_DTYPES)
fp8 = st.sampled_from(["float8_e4m3fn", "float8_e5m2"])
ranges = st.sampled_from(["absmax", "mse"])
granularities = st.sampled_from(["row", "tensor"])
schemes = st.one_of(
    st.builds(Scheme, dtypes, st.none() | st.integers(1, 512), weight_range=ranges),
    st.builds(
        lambda dtype, **words: Scheme(dtype, activation_dtype=dtype, **words),
        dtypes,
        weight_range=ranges,
        weight_granularity=granularities,
        activation=st.sampled_from(["token", "tensor"]),
    ),
    st.builds(
        lambda dtype, **words: Scheme(dtype, activation_dtype=dtype, activation="tensor-static", **words),
        dtypes,
        weight_granularity=granularities,
        activation_range=st.sampled_from(ACTIVATION_RANGES),
    ),
    fp8.map(lambda dtype: Scheme(dtype, None, dtype, weight_granularity="block", activation="group")),
    st.floats(1e-3, 1e3).map(lambda number: Scheme("int8", activation_dtype="int8", threshold=number)),
)


@given(schemes)
def test_schemes_survive_their_dict(scheme):
    assert Scheme(**json.loads(json.dumps(scheme.to_dict()))) == scheme


INT8 = {"weight_dtype": "int8", "activation_dtype": "int8"}
E4M3 = {"weight_dtype": "float8_e4m3fn", "activation_dtype": "float8_e4m3fn"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"weight_dtype": "int3"}, "'int3'"),
        ({"weight_dtype": "int4", "activation_dtype": "int4"}, "activations in int4"),
        ({"weight_dtype": None}, "None"),
        ({"weight_dtype": "int8", "activation_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"weight_dtype": "int8", "group_size": 0}, "0"),
        ({"weight_dtype": "int8", "group_size": -128}, "-128"),
        ({"weight_dtype": "int8", "group_size": 1.5}, "1.5"),
        ({"weight_dtype": "int8", "group_size": "128"}, "'128'"),
        ({"weight_dtype": "int8", "group_size": True}, "True"),
        ({"weight_dtype": "int8", "group_size": 128, "activation_dtype": "int8"}, "128"),
        ({"weight_dtype": "int8", "weight_range": "percentile"}, "'percentile'"),
        ({"weight_dtype": "int8", "weight_range": ["mse"]}, "['mse']"),
        (INT8 | {"weight_granularity": "column"}, "'column'"),
        (INT8 | {"activation": "row"}, "'row'"),
        (INT8 | {"activation": None}, "None"),
        (INT8 | {"activation_range": "entropy"}, "'entropy'"),
        (INT8 | {"activation_range": "mse"}, "activation_range=mse"),
        (INT8 | {"activation_range": "percentile", "activation": "tensor"}, "activation_range=percentile"),
        ({"weight_dtype": "int8", "activation_range": "mse", "activation": "tensor-static"}, "tensor-static"),
        ({"weight_dtype": "int8", "activation": "tensor"}, "tensor"),
        ({"weight_dtype": "int8", "group_size": 128, "weight_granularity": "tensor"}, "128"),
        (INT8 | {"weight_granularity": "block", "activation": "group"}, "int8 weights by block"),
        (E4M3 | {"weight_granularity": "block"}, "by block with activations by token"),
        (E4M3 | {"activation": "group"}, "by row with activations by group"),
        ({"weight_dtype": "float8_e4m3fn", "weight_granularity": "block"}, "by block"),
        (INT8 | {"threshold": 0.0}, "0.0"),
        (INT8 | {"threshold": -6}, "-6"),
        (INT8 | {"threshold": True}, "True"),
        (INT8 | {"threshold": "6.0"}, "'6.0'"),
        (INT8 | {"threshold": float("nan")}, "nan"),
        (INT8 | {"threshold": float("inf")}, "inf"),
        (INT8 | {"threshold": 6.0, "activation": "tensor"}, "6.0"),
        (INT8 | {"threshold": 6.0, "weight_granularity": "tensor"}, "6.0"),
        (E4M3 | {"threshold": 6.0}, "6.0"),
        ({"weight_dtype": "int8", "threshold": 6.0}, "6.0"),
    ],
)
def test_impossible_schemes_are_refused(words, says):
    with pytest.raises(RecipeError) as error:
        Scheme(**words)
    assert says in str(error.value)


def test_labels_tell_schemes_apart():
    assert Scheme("int8").label == "int8"
    assert Scheme("int8", 128).label == "int8 g128"
    assert Scheme("int8", activation_dtype="int8").label == "int8, activations per token"
    assert Scheme("int8", activation_dtype="int8", activation="tensor").label == "int8, activations per tensor"
    assert Scheme("int8", activation_dtype="int8", threshold=6.0).label == (
        "int8, activations per token, outliers from 6 in float"
    )
    block = Scheme(**E4M3, weight_granularity="block", activation="group")
    assert block.label == "float8_e4m3fn per block, activations per group"


@given(schemes)
def test_only_schemes_that_store_a_scale_of_the_activations_are_static(scheme):
    assert scheme.is_static == (scheme.activation == "tensor-static")
