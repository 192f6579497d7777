"""The methods by name. Names are known without torch; a method's file is imported when it is used.

Adding one is one file here, one line in METHODS and one test.
"""

import importlib
from functools import cache

from quantkit.methods.base import Method, Parameter

METHODS = {
    "smoothquant": "quantkit.methods.smoothquant:SmoothQuant",
    "sparse24": "quantkit.methods.sparse24:Sparse24",
    "relu": "quantkit.methods.relu:Relu",
    "activation-threshold": "quantkit.methods.activation_threshold:ActivationThreshold",
    "recover": "quantkit.methods.recover:Recover",
    "w8a8": "quantkit.methods.w8a8:W8A8",
    "int8": "quantkit.methods.int8:Int8",
    "int4": "quantkit.methods.int4:Int4",
    "llm-int8": "quantkit.methods.llm_int8:LLMInt8",
    "fp8": "quantkit.methods.fp8:FP8",
}

__all__ = ["METHODS", "Method", "Parameter", "method_class"]


@cache
def method_class(name: str) -> type[Method]:
    """The class of the method of that name."""
    module, _, attribute = METHODS[name].partition(":")
    found: type[Method] = getattr(importlib.import_module(module), attribute)
    return found
