"""sparse24: weights of linear layers are pruned, so that of every 4 along K 2 are zero (or in another pattern)."""

from collections.abc import Mapping
from typing import ClassVar

from quantkit.errors import RecipeError
from quantkit.methods.base import Method, Parameter, number_between
from quantkit.sparsity import is_pattern

COST = (
    "2:4 costs quality: WikiText-2 perplexity of Llama-2 7B, 13B and 70B, 5.12, 4.57 and 3.12 dense, was 54.59, 8.33 "
    "and 6.33 by magnitude, 11.02, 8.27 and 5.16 by Wanda, 10.17, 8.32 and 5.40 by SparseGPT (Sun et al. 2023, "
    "arXiv:2306.11695); measure yours with `quantkit eval`"
)


class Sparse24(Method):
    """Weights are set to zero by a criterion; layers stay in float, and a quantizer that follows keeps the zeros."""

    summary = "prunes linear layers: 2 of every 4 weights are kept; the others are zero, in a quantizer's codes as well"
    paper = (
        "Frantar and Alistarh 2023, arXiv:2301.00774 (SparseGPT); Sun et al. 2023, arXiv:2306.11695 (Wanda); Mishra et "
        "al. 2021, arXiv:2104.08378 (2:4); Castro et al. 2023, arXiv:2310.02065 (V:N:M)"
    )
    cost = COST
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(
            "criterion",
            ("sparsegpt", "wanda", "magnitude"),
            "which weights go: those whose loss the others can best make up for, and do; those of least |W| times the "
            "norm of what they meet; or those of least |W|, which needs no data",
        ),
        Parameter(
            "pattern",
            ("2:4", "4:8", "unstructured:0.5", "64:2:8"),
            "how many weights are kept of every 4 or 8 along K, which share of a weight is zeroed anywhere, or V:N:M: "
            "of every M columns 4 for V rows together, and of these 4 in each row N = 2",
            is_pattern,
            "unstructured:R with another R between 0 and 1, or V:2:M with M a multiple of 4 from 8 to 256",
        ),
        Parameter(
            "dampening",
            ("0.01",),
            "for sparsegpt: what is added to the diagonal of H = X X^T, as a share of its mean",
            number_between(0, 1, open_ends=True),
            "another number between 0 and 1",
        ),
    )
    prunes = True

    def scheme(self, parameters: Mapping[str, str]) -> None:
        """None: layers stay in float.

        Raises:
            RecipeError: a dampening is given to a criterion that has none.
        """
        criterion, dampening = parameters["criterion"], parameters["dampening"]
        if criterion != "sparsegpt" and float(dampening) != 0.01:
            raise RecipeError(
                f"dampening={dampening} goes with criterion=sparsegpt, and {criterion} has no use for it; leave it out"
            )

    def observes(self, parameters: Mapping[str, str]) -> bool:
        """Whether the criterion looks at activations: all but magnitude do."""
        return parameters["criterion"] != "magnitude"
