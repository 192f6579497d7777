"""Models on Triton's kernels are as good as on torch: perplexities in the interpreter, recipe by recipe."""

import pytest

pytest.importorskip("triton", reason="Triton exists on Linux only")

import offline

RECIPES = ("w8a8", "w8a8-static", "fp8", "fp8-block", "int8", "int4", "llm-int8")


@pytest.mark.parametrize(
    ("recipes", "count"), [(RECIPES, len(RECIPES)), pytest.param((), 9, marks=pytest.mark.exhaustive)]
)
def test_perplexities_on_triton_are_those_on_torch(tmp_path, recipes, count):
    out = offline.run("interpret_perplexity.py", *recipes, cache=tmp_path, interpret=True)
    assert out.splitlines()[-1] == f"{count} models agree"
