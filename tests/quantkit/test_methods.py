import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import RecipeError
from quantkit.methods import METHODS, method_class
from quantkit.methods.base import POSITIVE, Parameter, number_between
from quantkit.scheme import Scheme

QUANTIZERS = [name for name in METHODS if method_class(name).quantizes]


def combinations(name):
    """Every combination of the values that a method's parameters name."""
    parameters = method_class(name).parameters
    names = [parameter.name for parameter in parameters]
    for values in itertools.product(*(parameter.choices for parameter in parameters)):
        yield dict(zip(names, values, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name):
    method = method_class(name)
    assert method.summary
    assert "arXiv:" in method.paper
    assert all(parameter.help and parameter.choices for parameter in method.parameters)
    assert all((parameter.check is None) == (not parameter.other) for parameter in method.parameters)
    assert len({parameter.name for parameter in method.parameters}) == len(method.parameters)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_combination_of_values_gives_another_scheme_or_is_refused(name):
    """What is refused chooses the range of a stored scale where none is stored, and nothing else."""
    schemes, asked = set(), 0
    for values in combinations(name):
        static = "static" in (values.get("scheme"), values.get("activation", "").removeprefix("tensor-"))
        if values.get("activation_range", "absmax") != "absmax" and not static:
            with pytest.raises(RecipeError, match="activation_range"):
                method_class(name)().scheme(values)
            continue
        schemes.add(method_class(name)().scheme(values))
        asked += 1
    assert all(isinstance(scheme, Scheme) for scheme in schemes)
    assert len(schemes) == asked


@pytest.mark.parametrize("name", METHODS)
def test_only_what_is_stored_of_activations_and_transforms_that_look_at_them_observe(name):
    for values in combinations(name):
        with contextlib.suppress(RecipeError):
            static = {values.get("scheme"), values.get("activation")} & {"static", "tensor-static"}
            stored = static or values.get("outlier_weight") == "float"
            looks = name in ("smoothquant", "activation-threshold")
            looks |= values.get("criterion") in ("wanda", "sparsegpt") or values.get("shift", "").startswith("auto")
            assert method_class(name)().observes(values) == bool(stored or looks)


def test_smoothquant_leaves_layers_in_float():
    method = method_class("smoothquant")
    assert not method.quantizes
    assert method().scheme({"alpha": "0.5"}) is None


def test_the_schemes_are_the_ones_of_the_papers():
    def scheme(name, **values):
        defaults = {parameter.name: parameter.default for parameter in method_class(name).parameters}
        return method_class(name)().scheme(defaults | values)

    int8, e4m3, e5m2 = "int8", "float8_e4m3fn", "float8_e5m2"
    assert scheme("w8a8") == Scheme(int8, None, int8)
    assert scheme("w8a8", activation="tensor") == Scheme(int8, None, int8, activation="tensor")
    static = Scheme(int8, None, int8, activation="tensor-static", activation_range="mse")
    assert scheme("w8a8", activation="tensor-static", activation_range="mse") == static
    assert scheme("llm-int8") == Scheme(int8, None, int8, threshold=6.0)
    assert scheme("llm-int8", threshold="5") == Scheme(int8, None, int8, threshold=5.0)
    kept = Scheme(int8, None, int8, threshold=6.0, outlier_columns=0)
    assert scheme("llm-int8", outlier_weight="float") == kept
    assert scheme("fp8") == Scheme(e4m3, None, e4m3)
    assert scheme("fp8", scheme="weight-only") == Scheme(e4m3)
    assert scheme("fp8", scheme="static") == Scheme(
        e4m3, None, e4m3, weight_granularity="tensor", activation="tensor-static"
    )
    assert scheme("fp8", scheme="block", dtype="e5m2") == Scheme(
        e5m2, None, e5m2, weight_granularity="block", activation="group"
    )


@pytest.mark.parametrize("text", ["6", "6.0", "0.5", "1e3", "2.5E-2", "007"])
def test_numbers_are_taken(text):
    assert POSITIVE(text)


NOT_NUMBERS = ["", "-1", "+1", "nan", "inf", "1e999", "0", "0.0", "1_0", " 1", "1 ", "1.", ".5", "٣", "0x10", "auto"]


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_what_is_no_positive_number_is_not_taken(text):
    assert not POSITIVE(text)


@given(st.floats(0, 2, allow_subnormal=False))
def test_a_range_holds_its_ends(value):
    assert number_between(0, 1)(repr(value)) == (value <= 1)


def test_a_parameter_says_what_it_takes():
    parameter = Parameter("alpha", ("0.5", "auto"), "how much", number_between(0, 1), "a number from 0 to 1")
    assert parameter.default == "0.5"
    assert parameter.values == "0.5|auto, or a number from 0 to 1"
    assert [parameter.takes(text) for text in ("0.5", "auto", "0", "1.0", "1.1", "automatic")] == [True] * 4 + [
        False
    ] * 2
    assert Parameter("range", ("absmax", "mse"), "how").values == "absmax|mse"
