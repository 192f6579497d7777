"""Schemes for tests: those of every bundled recipe, and those that only a step can ask for or a checkpoint can hold."""

from quantkit.recipe import load_recipe, recipe_names
from quantkit.scheme import Scheme

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
SCHEMES = {name: load_recipe(name).scheme for name in recipe_names()} | {
    "int8-g1": Scheme("int8", 1),
    "int8-tensor": Scheme("int8", weight_granularity="tensor"),
    "w8a8-tensor": Scheme("int8", None, "int8", activation="tensor"),
    "fp8-weight-only-tensor": Scheme(E4M3, weight_granularity="tensor"),
    "fp8-tensor-token": Scheme(E4M3, None, E4M3, weight_granularity="tensor"),
    "fp8-e5m2-static": Scheme(E5M2, None, E5M2, weight_granularity="tensor", activation="tensor-static"),
    "fp8-e5m2-block": Scheme(E5M2, None, E5M2, weight_granularity="block", activation="group"),
}
