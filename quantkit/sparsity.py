"""Patterns of zeros in a weight: what they are called, and whether a weight has them. It needs no torch itself.

A pattern is written `2:4` (of every 4 weights along K at most 2 aren't zero), `4:8`, `unstructured:0.5` (this share of
all weights is zero, wherever), or V:N:M as in VENOM (Castro et al. 2023, arXiv:2310.02065), such as `64:2:8`: of every
8 columns 4 are kept for 64 rows together, and within these 4 it is 2:4.
"""

import re
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Pattern = tuple[int, int] | tuple[int, int, int] | float
"""(2, 4): of every 4 weights along K 2 are kept; (64, 2, 8): V, N and M; 0.5: this share of all weights is zeroed."""

GROUPS = {"2:4": (2, 4), "4:8": (4, 8)}
UNSTRUCTURED = "unstructured:"
MOST_COLUMNS, MOST_ROWS = 256, 2**20
"""The largest M and V."""


def is_pattern(text: str) -> bool:
    """Whether a text names a pattern: `2:4`, `4:8`, `unstructured:R` with R between 0 and 1, or V:2:M."""
    ratio = text.removeprefix(UNSTRUCTURED)
    plain = re.fullmatch(r"0?\.[0-9]{1,9}", ratio) is not None
    share = text.startswith(UNSTRUCTURED) and plain and 0 < float(ratio) < 1
    return text in GROUPS or share or tiles_of(text) is not None


def tiles_of(text: str | None) -> tuple[int, int] | None:
    """V and M of a pattern V:2:M, or None of any other text. M is a multiple of 4 from 8 to 256."""
    found = re.fullmatch(r"([1-9][0-9]{0,6}):2:([1-9][0-9]{0,2})", text or "", re.ASCII)
    if found is None:
        return None
    v, m = int(found[1]), int(found[2])
    return (v, m) if v <= MOST_ROWS and m % 4 == 0 and 8 <= m <= MOST_COLUMNS else None


def pattern_of(text: str) -> Pattern:
    """The pattern that a text names; ValueError when it names none."""
    if not is_pattern(text):
        raise ValueError(
            f"{text!r} is no pattern: expected 2:4, 4:8, unstructured:R with R between 0 and 1, or V:2:M such as 64:2:8"
        )
    tiles = tiles_of(text)
    if tiles is not None:
        return tiles[0], 2, tiles[1]
    return GROUPS[text] if text in GROUPS else float(text.removeprefix(UNSTRUCTURED))


def is_packable(text: object) -> bool:
    """Whether weights of that pattern are stored without their zeros: 2:4, or V:2:M."""
    return isinstance(text, str) and (text == "2:4" or tiles_of(text) is not None)


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


def has_tiles(weight: "torch.Tensor", v: int, m: int, in_axis: int = -1) -> bool:
    """Whether a weight [N, K] is V:2:M: of every M columns at most 4 are in use in V rows, and 2 in each of these."""
    matrix = weight.movedim(in_axis, -1)
    if matrix.shape[1] % m:
        return False
    for rows in matrix.split(v):  # type: ignore[no-untyped-call]
        used = rows.unflatten(1, (-1, m)) != 0
        if bool((used.any(0).sum(-1) > 4).any()) or bool((used.sum(-1) > 2).any()):
            return False
    return True
