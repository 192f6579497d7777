"""Scales of least squared error for whole numbers of a few bits: the search behind "mse" with 4 bits.

With so few codes the range decides most of the error: what it leaves out is clipped, and what it takes in is rounded to
fewer steps. The error as a function of the scale is jagged, so that a descent alone stops anywhere: a coarse grid finds
the valley, and a few steps of Lloyd's alternation (Lloyd 1982, IEEE Transactions on Information Theory 28, section IV)
go down in it: for codes as they are the best scale is sum(w * code) / sum(code**2), and for a scale the best codes are
the nearest ones. It looks at few candidates, in few passes over numbers that stay in cache, and takes memory for
CHUNK_ELEMENTS weights, whatever the weight's size.
"""

import torch
from torch import Tensor

CANDIDATES = 24
SMALLEST = 0.2
"""The grid: that many factors of the scale of absmax, from 1 down to this one, each the same part of the last."""

DESCENTS = 2
"""Steps of Lloyd's alternation after it."""

CHUNK_ELEMENTS = 1 << 17
"""Weights are looked at this many at a time: half a MiB in float32."""


def least_squares_scale(rows: Tensor, absmax_scale: Tensor, low: int, high: int) -> Tensor:
    """Return the best scale found for each row, [R, 1], in the dtype of `absmax_scale`.

    Errors are sums of squares of w - code * scale in float32, codes being w / scale rounded half to even and clamped to
    low .. high. The scale of absmax is among the candidates and wins a tie.

    Args:
        rows: [R, L], float32, bfloat16 or float16, finite.
        absmax_scale: [R, 1], positive; what is found is rounded to its dtype before it is judged.
        low: the smallest code.
        high: the largest code.
    """
    found = torch.empty_like(absmax_scale)
    step = max(1, CHUNK_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        found[part] = _Search(rows[part].float(), absmax_scale[part], low, high).run()
    return found


class _Search:
    """The best scale so far of some rows [R, L], and its error.

    Attributes:
        codes: scratch for codes and differences, [R, L] in float32.
        best: scales [R, 1] in float32, numbers of the dtype that they are stored in.
        error: the norm of each row's difference, [R, 1].
    """

    def __init__(self, rows: Tensor, absmax_scale: Tensor, low: int, high: int) -> None:
        self.rows, self.low, self.high = rows, low, high
        self.dtype, self.tiny = absmax_scale.dtype, torch.finfo(absmax_scale.dtype).tiny
        self.codes = torch.empty_like(rows)
        self.best = absmax_scale.float()
        self.error = self._error(self.best)

    def run(self) -> Tensor:
        """Return the best scales [R, 1] in the dtype of those that the search began with."""
        start = self.best
        for step in range(1, CANDIDATES + 1):
            self._try(start * SMALLEST ** (step / CANDIDATES))
        for _ in range(DESCENTS):
            codes = self._encode(self.best)
            length = (codes * codes).sum(dim=1, keepdim=True)
            # Without codes, a row of zeros, the quotient is no number: the scale stays.
            self._try(torch.where(length > 0, (codes * self.rows).sum(dim=1, keepdim=True) / length, self.best))
        return self.best.to(self.dtype)

    def _try(self, scale: Tensor) -> None:
        """Take the scales, rounded as they are stored, in rows where they are better."""
        scale = scale.to(self.dtype).clamp_(min=self.tiny).float()
        error = self._error(scale)
        better = error < self.error
        self.best = torch.where(better, scale, self.best)
        self.error = torch.where(better, error, self.error)

    def _encode(self, scale: Tensor) -> Tensor:
        """Return the codes for the scales, as float32 numbers in the scratch."""
        return torch.div(self.rows, scale, out=self.codes).round_().clamp_(self.low, self.high)

    def _error(self, scale: Tensor) -> Tensor:
        difference = self._encode(scale).mul_(scale).sub_(self.rows)
        norm: Tensor = torch.linalg.vector_norm(difference, dim=1, keepdim=True)
        return norm
