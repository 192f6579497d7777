"""Patterns of zeros in a weight: what they are called, and whether a weight has them. It needs no torch itself.

A pattern is written `2:4` (of every 4 weights along K at most 2 aren't zero), `4:8`, or `unstructured:0.5` (this share
of all weights is zero, wherever).
"""

import re
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Pattern = tuple[int, int] | float
"""(2, 4): of every 4 weights along K 2 are kept; 0.5: this share of all weights is zeroed."""

GROUPS = {"2:4": (2, 4), "4:8": (4, 8)}
UNSTRUCTURED = "unstructured:"


def is_pattern(text: str) -> bool:
    """Whether a text names a pattern: `2:4`, `4:8` or `unstructured:R` with R between 0 and 1."""
    ratio = text.removeprefix(UNSTRUCTURED)
    plain = re.fullmatch(r"0?\.[0-9]{1,9}", ratio) is not None
    return text in GROUPS or (text.startswith(UNSTRUCTURED) and plain and 0 < float(ratio) < 1)


def pattern_of(text: str) -> Pattern:
    """The pattern that a text names; ValueError when it names none."""
    if not is_pattern(text):
        raise ValueError(f"{text!r} is no pattern: expected 2:4, 4:8 or unstructured:R with R between 0 and 1")
    return GROUPS[text] if text in GROUPS else float(text.removeprefix(UNSTRUCTURED))


def zeros_of(ratio: float, count: int) -> int:
    """How many of so many weights a ratio zeroes: the largest whole number that isn't above its share."""
    return int(Fraction(str(ratio)) * count)


def is_24(weight: "torch.Tensor", in_axis: int = -1) -> bool:
    """Whether of every 4 weights that follow one another along the in features at most 2 aren't zero.

    Args:
        weight: [..., N, K], or with the in features on another axis; float or integer codes. 4 must divide K, or it is
            False.
        in_axis: the axis of the in features.
    """
    return has_groups(weight, 2, 4, in_axis)


def has_groups(weight: "torch.Tensor", keep: int, of: int, in_axis: int = -1) -> bool:
    """Whether of every `of` weights that follow one another along an axis at most `keep` aren't zero."""
    if weight.shape[in_axis] % of:
        return False
    groups = weight.movedim(in_axis, -1).unflatten(-1, (-1, of))  # type: ignore[no-untyped-call]
    return bool(((groups != 0).sum(-1) <= keep).all())
