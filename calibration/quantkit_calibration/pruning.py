"""Pruning of a weight [N, K]: which of its elements are kept, and what the others' loss makes of those that stay.

Three criteria. Magnitude: |W|. Wanda (Sun et al. 2023, arXiv:2306.11695, equation 1): |W_nk| times the l2 norm of the
k-th feature over all tokens. SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774): with H = X X^T + lambda I,
columns are gone through from the left; what is lost of column k is made up for by the columns after it, as optimal
brain surgeon has it, and what is pruned is what can be made up for best.

A pattern is (2, 4): of every 4 elements along K 2 are kept, exactly, whatever their values; or 0.5: this share of the
elements goes; or (64, 2, 8), which is V:N:M (Castro et al. 2023, arXiv:2310.02065): of every 8 columns those 4 stay
whose scores over 64 rows have the largest sum, and of these 4 in each row 2. Of equal scores the element that comes
first stays.
"""

from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor

Pattern = tuple[int, int] | tuple[int, int, int] | float

COLUMNS = 128
"""Columns of a SparseGPT block: the columns after it are updated once for all of them."""
TILE = 4
"""Columns that are kept of every M by V:N:M."""
ELEMENTS = 2**18
"""About so many elements are compared with one another at a time."""


def magnitude(weight: Tensor, pattern: Pattern) -> Tensor:
    """Bool [N, K], True where an element is kept: those of largest |W|, in groups along K or of the whole weight."""
    scores = weight.abs()
    if isinstance(pattern, tuple):
        return _of_rows(scores, pattern)
    return kept_of_rows(scores.reshape(1, -1), pattern).view(weight.shape)


def wanda(weight: Tensor, norms: Tensor, pattern: Pattern) -> Tensor:
    """Bool [N, K], True where an element is kept: those of largest |W| norm, in groups along K or of each row.

    Args:
        weight: [N, K].
        norms: [K], the l2 norm of each feature over all tokens.
        pattern: see the module.
    """
    norms = norms.to(weight.device)
    together = pattern[0] if isinstance(pattern, tuple) and len(pattern) == 3 else 1  # rows that belong together
    parts = torch.split(weight, -(-_rows(weight) // together) * together)
    return torch.cat([_of_rows(rows.abs().float() * norms.float(), pattern) for rows in parts])


def _of_rows(scores: Tensor, pattern: Pattern) -> Tensor:
    if not isinstance(pattern, tuple):
        return kept_of_rows(scores, pattern)
    return kept_of_tiles(scores, *pattern) if len(pattern) == 3 else kept_of_groups(scores, *pattern)


def kept_of_tiles(scores: Tensor, v: int, keep: int, of: int) -> Tensor:
    """Bool [N, K], True for what V:N:M keeps: `keep` of every row's `of` scores, from four columns that V rows share.

    The four are those with the largest sums, in float64, over the V rows (the last rows may be fewer).

    Raises ValueError when `of` doesn't divide K.
    """
    if scores.shape[-1] % of:
        raise ValueError(f"tiles of {of} columns do not divide {scores.shape[-1]} features")
    kept = torch.zeros_like(scores, dtype=torch.bool)
    step = -(-_rows(scores) // v) * v
    for start in range(0, len(scores), step):
        rows = scores[start : start + step].unflatten(1, (-1, of))  # type: ignore[no-untyped-call]
        block = torch.arange(len(rows), device=scores.device) // v
        sums = rows.new_zeros((int(block[-1]) + 1, *rows.shape[1:]), dtype=torch.float64)
        sums.index_add_(0, block, rows.double())
        columns = sums.sort(dim=-1, descending=True, stable=True).indices[..., :TILE].sort(dim=-1).values[block]
        chosen = _largest(rows.gather(2, columns), keep)
        kept[start : start + step] = torch.zeros_like(rows, dtype=torch.bool).scatter_(2, columns, chosen).flatten(1)
    return kept


def kept_of_groups(scores: Tensor, keep: int, of: int) -> Tensor:
    """Bool [N, K], True for the `keep` largest of every `of` scores along K: exactly so many, also of equal ones.

    Raises ValueError when `of` doesn't divide K.
    """
    if scores.shape[-1] % of:
        raise ValueError(f"groups of {of} do not divide {scores.shape[-1]} features")
    parts = [_largest(part.reshape(len(part), -1, of), keep) for part in torch.split(scores, _rows(scores))]
    return torch.cat(parts).view(scores.shape) if parts else torch.ones_like(scores, dtype=torch.bool)


def _largest(groups: Tensor, keep: int) -> Tensor:
    """True [..., G] for the `keep` largest of the last axis: those that fewer than `keep` others come before."""
    size = groups.shape[-1]
    earlier = torch.ones(size, size, dtype=torch.bool, device=groups.device).tril(-1)  # [one, other]
    one, other = groups.unsqueeze(-1), groups.unsqueeze(-2)
    return ((other > one) | ((other == one) & earlier)).sum(-1) < keep


def kept_of_rows(scores: Tensor, ratio: float) -> Tensor:
    """Bool [N, K], False for this share of each row's scores, the smallest (rounded down to a whole number)."""
    zeros = int(Fraction(str(ratio)) * scores.shape[-1])
    if not zeros:
        return torch.ones_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(zeros, dim=-1, keepdim=True).values
    above, equal = scores > limit, scores == limit
    free = scores.shape[-1] - zeros - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= free))


def _rows(weight: Tensor) -> int:
    return max(1, ELEMENTS // max(1, weight.shape[-1]))


def pruned(weight: Tensor, kept: Tensor) -> Tensor:
    """The weight with zeros where it isn't kept."""
    return torch.where(kept, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def inverse_factor(gram: Tensor, dampening: float) -> Tensor:
    """float32 [K, K]: U, upper triangular with a positive diagonal, such that U^T U is the inverse of H.

    H = gram + lambda I, with lambda a share `dampening` of the mean of gram's diagonal. With J, which turns the order
    round, J H J = L L^T gives U = J L^-1 J: one Cholesky decomposition and one triangular inverse, in float64.

    Raises ValueError when gram holds NaN or infinity, is zero, or H isn't positive definite.
    """
    mean = float(gram.diagonal().double().mean())
    if not (0 < mean < float("inf")):
        raise ValueError(f"the mean square of what it meets is {mean}")
    turned = gram.double().flip(0, 1)
    turned.diagonal().add_(dampening * mean)
    lower, failed = torch.linalg.cholesky_ex(turned)
    del turned
    if int(failed) or not bool(torch.isfinite(lower.diagonal()).all()):
        raise ValueError(f"H is not positive definite with dampening {dampening}")
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    del lower, identity
    return inverse.float().flip(0, 1)


def sparsegpt(weight: Tensor, factor: Tensor, pattern: Pattern) -> Tensor:
    """float32 [N, K]: the pruned weight, what is kept of it changed so that it makes up for what isn't.

    What is kept is chosen by W^2 / diag(U)^2 on the weight as it is by then: in groups of (2, 4), and in the M columns
    of V:N:M, when the group is reached, over a block of 128 columns and all rows otherwise (algorithm 1 of the paper,
    and its section 3.3).

    Args:
        weight: [N, K].
        factor: [K, K], what `inverse_factor` gives.
        pattern: see the module.
    """
    columns = weight.float().t().contiguous()  # [K, N]: a column is a run of memory
    group = pattern[-1] if isinstance(pattern, tuple) else 1
    width = max(1, COLUMNS // group) * group  # no group lies in two blocks
    for start in range(0, len(columns), width):
        part, stop = columns[start : start + width], start + width
        errors = _block(part, factor[start:stop, start:stop], pattern)
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return columns.t()


def _block(part: Tensor, factor: Tensor, pattern: Pattern) -> Tensor:
    """What was lost of each column [C, N] over its factor; the block of columns is pruned in place."""
    diagonal, errors = factor.diagonal().unsqueeze(1), torch.empty_like(part)
    kept = torch.empty_like(part, dtype=torch.bool)
    if not isinstance(pattern, tuple):
        scores = (part / diagonal).square().t()
        kept = kept_of_rows(scores.reshape(1, -1), pattern).view(scores.shape).t()
    for column in range(len(part)):
        if isinstance(pattern, tuple) and column % pattern[-1] == 0:
            group = slice(column, column + pattern[-1])
            kept[group] = _of_rows((part[group] / diagonal[group]).square().t().contiguous(), pattern).t()
        gone = ~kept[column]
        errors[column] = torch.where(gone, part[column], 0.0) / diagonal[column]
        part[column].masked_fill_(gone, 0.0)
        part[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
    return errors


def output_norms(weight: Tensor, changed: Tensor, gram: Tensor) -> tuple[float, float]:
    """The Frobenius norms of X W^T and of X (W - changed)^T, from gram = X^T X [K, K]."""
    squares = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for exact, other in _parts(weight, changed):
        for place, rows in enumerate((exact, exact - other)):
            squares[place] += ((rows @ gram) * rows).sum(dtype=torch.float64)
    found: list[float] = squares.clamp(min=0).sqrt().tolist()
    return found[0], found[1]


def output_norms_of(weight: Tensor, changed: Tensor, x: Tensor) -> tuple[float, float]:
    """The Frobenius norms of X W^T and of X (W - changed)^T, from tokens x [M, K]."""
    squares = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for exact, other in _parts(weight, changed):
        for place, rows in enumerate((exact, exact - other)):
            squares[place] += (x @ rows.t()).square().sum(dtype=torch.float64)
    found: list[float] = squares.sqrt().tolist()
    return found[0], found[1]


def _parts(weight: Tensor, changed: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of both in float32 at a time."""
    size = 4 * _rows(weight)
    for exact, other in zip(torch.split(weight, size), torch.split(changed, size), strict=True):
        yield exact.float(), other.float()
