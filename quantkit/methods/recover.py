"""recover: the float weights that a transform left are trained on text, before a quantizer."""

import re
from collections.abc import Mapping
from typing import ClassVar

from quantkit.errors import RecipeError
from quantkit.methods.base import POSITIVE, Method, Parameter, number_between

UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}
SHARE = number_between(0, 1)


def count_of(text: str) -> int:
    """The number that `2M`, `500k`, `1.5B` or `4096` says; ValueError for another text, or below 1."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)([kMB]?)", text)
    count = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if count < 1:
        raise ValueError(f"{text!r} is no number such as 2M, 500k or 4096")
    return count


def is_count(text: str) -> bool:
    """Whether a text says a number above 0, such as `2M`."""
    try:
        return count_of(text) > 0
    except ValueError:
        return False


def is_rank(text: str) -> bool:
    """Whether a text is a whole number of at most 5 digits."""
    return re.fullmatch(r"[0-9]{1,5}", text) is not None


class Recover(Method):
    """Float weights are trained on text; zeros of pruned weights stay zero, and layers stay in float."""

    summary = "trains what a transform before it left, on text; zeros stay zero"
    paper = (
        "Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW); Hinton et al. 2015, arXiv:1503.02531 (distillation); Hu "
        "et al. 2021, arXiv:2106.09685 (LoRA)"
    )
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("tokens", ("2M",), "how many tokens are read, in whole steps", is_count, "a number such as 500k"),
        Parameter("lr", ("0.0001",), "the largest learning rate", POSITIVE, "another positive number"),
        Parameter("batch", ("8192",), "tokens of a step", is_count, "another number"),
        Parameter("warmup", ("0.03",), "the share of steps in which the rate rises", SHARE, "a number from 0 to 1"),
        Parameter(
            "distill",
            ("0",),
            "the share of the loss that is the KL divergence from the original's predictions",
            SHARE,
            "a number from 0 to 1",
        ),
        Parameter("train", ("all", "linear"), "all parameters, or the weights and biases of linear layers"),
        Parameter("lora", ("0",), "the rank of LoRA for linear layers; 0 trains parameters", is_rank, "a whole number"),
        Parameter("precision", ("no", "bf16", "fp16"), "what products are computed in; weights stay in float32"),
    )
    trains = True

    def scheme(self, parameters: Mapping[str, str]) -> None:
        """None: layers stay in float.

        Raises:
            RecipeError: what is trained is said twice.
        """
        if int(parameters["lora"]) and parameters["train"] != "all":
            raise RecipeError(
                f"lora={parameters['lora']} trains linear layers by itself, and train={parameters['train']} says "
                "nothing of it; leave one of them out"
            )
