"""Compress any Hugging Face causal language model, show what it cost, and run the result fast.

    import quantkit

    report = quantkit.quantize("path/of/model", "OUT", steps=["w8a8"])
    model = quantkit.load("OUT")
    result = quantkit.evaluate("OUT", "wikitext2", baseline="path/of/model")

Importing this loads no torch; the functions do, when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.benchmark import benchmark
    from quantkit.evaluation import evaluate
    from quantkit.loading import load
    from quantkit.pipeline import quantize
    from quantkit.publishing import push
    from quantkit.recipe import Recipe
    from quantkit.recovery import recover
    from quantkit.report import Report
    from quantkit.transcoding import convert

_HOME = {
    "Recipe": "quantkit.recipe",
    "Report": "quantkit.report",
    "benchmark": "quantkit.benchmark",
    "convert": "quantkit.transcoding",
    "evaluate": "quantkit.evaluation",
    "load": "quantkit.loading",
    "push": "quantkit.publishing",
    "quantize": "quantkit.staging",
    "recover": "quantkit.recovery",
}

__all__ = ["Recipe", "Report", "__version__", "benchmark", "convert", "evaluate", "load", "push", "quantize", "recover"]


def __getattr__(name: str) -> Any:
    """The public function or class of that name, imported when first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
