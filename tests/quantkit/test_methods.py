import itertools

import pytest

from quantkit.methods import METHODS, method_class
from quantkit.scheme import Scheme


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name):
    method = method_class(name)
    assert method.summary
    assert "arXiv:" in method.paper
    assert all(parameter.help and parameter.choices for parameter in method.parameters)
    assert len({parameter.name for parameter in method.parameters}) == len(method.parameters)


@pytest.mark.parametrize("name", METHODS)
def test_every_combination_of_values_gives_another_scheme(name):
    method = method_class(name)
    names = [parameter.name for parameter in method.parameters]
    combinations = list(itertools.product(*(parameter.choices for parameter in method.parameters)))
    schemes = {method().scheme(dict(zip(names, values, strict=True))) for values in combinations}
    assert all(isinstance(scheme, Scheme) for scheme in schemes)
    assert len(schemes) == len(combinations)
