import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import RecipeError
from quantkit.scheme import WEIGHT_DTYPES, Scheme

dtypes = st.sampled_from(WEIGHT_DTYPES)
schemes = st.builds(Scheme, dtypes, st.none() | st.integers(1, 512), weight_range=st.sampled_from(["absmax", "mse"]))
schemes |= dtypes.map(lambda dtype: Scheme(dtype, activation_dtype=dtype))


@given(schemes)
def test_schemes_survive_their_dict(scheme):
    assert Scheme(**scheme.to_dict()) == scheme


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"weight_dtype": "int4"}, "'int4'"),
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
