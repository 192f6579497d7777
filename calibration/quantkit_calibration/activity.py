"""Statistics of activations that may be zero: how many are, how many are for several tokens, and how they lie.

As those of `observers`: `update(x)` takes in more of a stream, and a result depends on nothing but its values.
"""

import math

import torch
from torch import Tensor

GAMMAS = (1, 2, 4, 8, 16)
"""Over so many tokens that follow one another zeros are aggregated."""


class Zeros:
    """The share of neurons that a stream of windows leaves unused, in a token and in all of several.

    Aggregated over gamma tokens (Mirzadeh et al. 2023, arXiv:2310.04564, section 5.1): the share of neurons that are
    zero in all tokens of a group, over all groups of gamma tokens that follow one another in a window, from its start;
    tokens that are left over at its end are in none. What decodes gamma tokens at once needn't read their weights.
    """

    def __init__(self, length: int | None) -> None:
        """Args: length: tokens of a window; None where tokens don't follow one another, as those of an expert."""
        self._length = length
        self._unused = dict.fromkeys(GAMMAS, 0)
        self._of = dict.fromkeys(GAMMAS, 0)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Take in x [..., K], whole windows one after another. Raises ValueError where that is no whole window."""
        zero = x.detach().reshape(-1, x.shape[-1]) == 0
        self.tokens += len(zero)
        self._count(1, zero)
        if self._length is None:
            return
        if len(zero) % self._length:
            raise ValueError(f"{len(zero)} tokens: expected windows of {self._length}")
        groups = zero.reshape(-1, self._length, zero.shape[1])
        for gamma in GAMMAS[1:]:
            count = self._length // gamma
            groups = groups[:, : 2 * count].reshape(len(groups), count, 2, zero.shape[1]).all(2)
            self._count(gamma, groups)

    def _count(self, gamma: int, zero: Tensor) -> None:
        self._unused[gamma] += int(zero.sum())
        self._of[gamma] += zero.numel()

    def merge(self, other: "Zeros") -> None:
        """Take in all that another one was given."""
        for gamma in GAMMAS:
            self._unused[gamma] += other._unused[gamma]
            self._of[gamma] += other._of[gamma]
        self.tokens += other.tokens

    def result(self) -> dict[int, float]:
        """The share by gamma, of those for which there was a group; empty when no token was given."""
        return {gamma: self._unused[gamma] / count for gamma, count in self._of.items() if count}


class Distribution:
    """How the numbers of a stream lie: a histogram from which quantiles are read, of them and of their magnitudes.

    Numbers are counted by the upper 16 bits of their float32, sign and all: bins 2**-7 of a power of two wide, 2**16 of
    them, 512 KiB whatever the range. A quantile is interpolated in its bin.
    """

    BINS = 2**15
    CHUNK = 2**20  # numbers whose bins are found at a time

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in x, float of any shape. NaN and infinity are counted beyond all others."""
        flat = x.detach().reshape(-1)
        if self._counts is None:
            self._counts = torch.zeros(2 * self.BINS, dtype=torch.int64, device=x.device)
        for part in torch.split(flat, self.CHUNK):
            bits = part.float().contiguous().view(torch.int32) >> 16  # negative numbers are -2**15 to -1
            self._counts += torch.bincount(bits & 0xFFFF, minlength=2 * self.BINS)

    def merge(self, other: "Distribution") -> None:
        """Take in all that another one was given."""
        if other._counts is not None:
            self._counts = other._counts.clone() if self._counts is None else self._counts + other._counts

    @property
    def count(self) -> int:
        """How many numbers were given."""
        return 0 if self._counts is None else int(self._counts.sum())

    def quantile(self, share: float) -> float:
        """The number that this share of all numbers isn't above."""
        positive, negative = self._halves()
        ends = _lower_ends(self.BINS)
        counts = torch.cat([negative.flip(0), positive])
        low = torch.cat([-ends[1:].flip(0), ends[:-1]])
        high = torch.cat([-ends[:-1].flip(0), ends[1:]])
        return _interpolated(counts, low, high, share)

    def magnitude(self, share: float) -> float:
        """The magnitude that the magnitudes of this share of all numbers aren't above."""
        positive, negative = self._halves()
        ends = _lower_ends(self.BINS)
        return _interpolated(positive + negative, ends[:-1], ends[1:], share)

    def _halves(self) -> tuple[Tensor, Tensor]:
        """The counts of numbers from 0 up, and of those below, by magnitude. Raises ValueError without any number."""
        if self._counts is None or not self.count:
            raise ValueError("no number was given")
        counts = self._counts.cpu()
        return counts[: self.BINS], counts[self.BINS :]


def _lower_ends(bins: int) -> Tensor:
    """float64 [bins + 1]: the smallest magnitude in each bin; of bins without finite numbers the largest that is."""
    ends = (torch.arange(bins + 1, dtype=torch.int64) << 16).to(torch.int32).view(torch.float32).double()
    largest = torch.finfo(torch.float32).max
    ends[-1] = largest
    return torch.nan_to_num(ends, nan=largest, posinf=largest).clamp(max=largest)


def _interpolated(counts: Tensor, low: Tensor, high: Tensor, share: float) -> float:
    """The value below which a share of what was counted lies, spread evenly over each bin."""
    if not 0 <= share <= 1:
        raise ValueError(f"share {share}: expected 0 to 1")
    total = counts.cumsum(0)
    rank = share * float(total[-1])
    index = min(int(torch.searchsorted(total.double(), rank)), len(counts) - 1)
    inside = int(counts[index])
    before = float(total[index]) - inside
    part = (rank - before) / inside if inside else 0.0
    found = float(low[index] + (high[index] - low[index]) * part)
    return found if math.isfinite(found) else float(high[index])
