"""Pruning, held against both papers restated as plain loops in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantkit_calibration import pruning
from quantkit_calibration.observers import ChannelNorm, Gram, Reservoir
from quantkit_kernels import venom

PATTERNS = [(2, 4), (4, 8)]
TILES = [(4, 2, 8), (4, 2, 12), (1, 2, 8), (5, 2, 24)]
"""V:N:M; V doesn't divide the rows of most."""


def kept_of(scores, keep):
    """The indices of the largest scores; of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda k: (-scores[k], k))
    return set(order[:keep])


def kept_of_tiles_by_loops(scores, pattern):
    """Castro et al. 2023: for V rows together the 4 of every M columns whose scores have the largest sum, then 2:4."""
    v, keep, of = pattern
    kept = set()
    for top in range(0, len(scores), v):
        rows = scores[top : top + v]
        for start in range(0, len(scores[0]), of):
            sums = [math.fsum(row[k] for row in rows) for k in range(start, start + of)]
            columns = sorted(kept_of(sums, 4))
            for n, row in enumerate(rows, top):
                kept |= {(n, start + columns[place]) for place in kept_of([row[start + k] for k in columns], keep)}
    return kept


def wanda_by_loops(weight, x, pattern):
    """Sun et al. 2023, equation 1 and section 3: |W_nk| ||X_k||, compared within a row (or a group of a row)."""
    norms = [math.sqrt(sum(float(v) ** 2 for v in x[:, k])) for k in range(x.shape[1])]
    out = torch.zeros_like(weight)
    if isinstance(pattern, tuple) and len(pattern) == 3:
        scores = [[abs(value) * norm for value, norm in zip(row, norms, strict=True)] for row in weight.tolist()]
        for n, k in kept_of_tiles_by_loops(scores, pattern):
            out[n, k] = weight[n, k]
        return out
    for n, row in enumerate(weight.tolist()):
        scores = [abs(value) * norm for value, norm in zip(row, norms, strict=True)]
        if isinstance(pattern, tuple):
            keep, of = pattern
            stays = {k + g for g in range(0, len(row), of) for k in kept_of(scores[g : g + of], keep)}
        else:
            stays = kept_of(scores, len(row) - int(pattern * len(row)))
        for k in stays:
            out[n, k] = row[k]
    return out


def sparsegpt_by_loops(weight, x, pattern, dampening, columns):
    """Frantar and Alistarh 2023 by its equations, without their algorithm's decompositions.

    Column by column: the inverse of H over the columns that are left (equation 4's H_U^-1, made anew each time) says
    what pruning w costs, w^2 / [H_U^-1]_kk (equation 3), and what the others change by (equation 2).
    """
    n_rows, k_all = weight.shape
    w, h = weight.double().clone(), x.double().t() @ x.double()
    h += dampening * h.diagonal().mean() * torch.eye(k_all, dtype=torch.float64)
    inverses = [torch.linalg.inv(h[k:, k:]) for k in range(k_all)]
    gone = torch.zeros(n_rows, k_all, dtype=torch.bool)
    for k in range(k_all):
        wide, of = not isinstance(pattern, tuple), columns if not isinstance(pattern, tuple) else pattern[-1]
        if k % of == 0:
            group = range(k, min(k + of, k_all))
            costs = {(n, j): float(w[n, j]) ** 2 / float(inverses[j][0, 0]) for n in range(n_rows) for j in group}
            if not wide and len(pattern) == 3:
                stays = kept_of_tiles_by_loops([[costs[n, j] for j in group] for n in range(n_rows)], pattern)
                cells = [(n, j) for n, j in costs if (n, j - k) not in stays]
            elif wide:
                cells = sorted(costs, key=lambda cell: costs[cell])[: int(pattern * len(costs))]
            else:
                cells = []
                for n in range(n_rows):
                    stays = kept_of([costs[n, j] for j in group], pattern[0])
                    cells += [(n, j) for place, j in enumerate(group) if place not in stays]
            for cell in cells:
                gone[cell] = True
        for n in range(n_rows):
            if gone[n, k]:
                w[n, k:] -= w[n, k] / inverses[k][0, 0] * inverses[k][0]
                w[n, k] = 0.0
    return w


def example(n=6, k=24, m=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(k, k, generator=generator)
    return torch.randn(n, k, generator=generator), torch.randn(m, k, generator=generator) @ mixed


@pytest.mark.parametrize("pattern", [*PATTERNS, *TILES, 0.5, 0.3])
def test_wanda_is_the_papers(pattern):
    weight, x = example()
    norm = ChannelNorm()
    for part in x.split(7):
        norm.update(part)
    kept = pruning.wanda(weight, norm.result(), pattern)
    assert torch.equal(pruning.pruned(weight, kept), wanda_by_loops(weight, x, pattern))


@pytest.mark.parametrize("pattern", [*PATTERNS, *TILES, 0.5, 0.3])
def test_magnitude_is_wanda_with_equal_norms_in_groups_and_ranks_the_whole_weight_otherwise(pattern):
    weight, x = example()
    kept = pruning.magnitude(weight, pattern)
    if isinstance(pattern, tuple):
        assert torch.equal(pruning.pruned(weight, kept), wanda_by_loops(weight, torch.ones_like(x), pattern))
        return
    stays = kept_of(weight.abs().flatten().tolist(), weight.numel() - int(pattern * weight.numel()))
    assert set(kept.flatten().nonzero().flatten().tolist()) == stays


@pytest.mark.parametrize("dampening", [0.01, 0.5])
@pytest.mark.parametrize("m", [40, 10])  # 10 tokens: H is singular but for the dampening
@pytest.mark.parametrize("pattern", [*PATTERNS, *TILES, 0.5])
def test_sparsegpt_is_the_papers(monkeypatch, pattern, m, dampening):
    """The same mask, and weights within 2**-16 of the row's largest: U in float64, updates of K columns in float32."""
    weight, x = example(m=m)
    monkeypatch.setattr(pruning, "COLUMNS", 8)
    gram = Gram()
    for part in x.double().split(7):
        gram.update(part.float())
    made = pruning.sparsegpt(weight, pruning.inverse_factor(gram.result(), dampening), pattern)
    expected = sparsegpt_by_loops(weight, x, pattern, dampening, 8)
    assert torch.equal(made != 0, expected != 0)
    assert ((made.double() - expected).abs() <= 2.0**-16 * expected.abs().amax(1, keepdim=True)).all()


def test_blocks_of_columns_change_nothing_but_rounding_in_groups(monkeypatch):
    weight, x = example(k=48, m=200)
    factor = pruning.inverse_factor(x.t() @ x, 0.01)
    whole = pruning.sparsegpt(weight, factor, (2, 4))
    monkeypatch.setattr(pruning, "COLUMNS", 16)
    assert torch.allclose(pruning.sparsegpt(weight, factor, (2, 4)), whole, rtol=1e-4, atol=1e-5)


def test_the_factor_is_the_cholesky_factor_of_the_inverse():
    _, x = example()
    gram = (x.t() @ x).double()
    h = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    made = pruning.inverse_factor(gram, 0.01)
    assert torch.allclose(made.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from(PATTERNS), st.integers(0, 3), st.integers(0, 10**6))
def test_exactly_so_many_of_a_group_are_kept_whatever_is_equal(n, groups, pattern, values, seed):
    keep, of = pattern
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, values + 1, (n, groups * of), generator=generator).float()
    kept = pruning.kept_of_groups(scores, keep, of)
    assert (kept.unflatten(1, (-1, of)).sum(-1) == keep).all()
    for row, stays in zip(scores.tolist(), kept.tolist(), strict=True):
        for start in range(0, len(row), of):
            here = {k for k in range(of) if stays[start + k]}
            assert here == kept_of(row[start : start + of], keep)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 99), st.integers(0, 3), st.integers(0, 10**6))
def test_a_share_of_each_row_goes_whatever_is_equal(n, k, percent, values, seed):
    scores = torch.randint(0, values + 1, (n, k), generator=torch.Generator().manual_seed(seed)).float()
    kept = pruning.kept_of_rows(scores, percent / 100)
    for row, stays in zip(scores.tolist(), kept.tolist(), strict=True):
        assert {i for i in range(k) if stays[i]} == kept_of(row, k - percent * k // 100)


def test_rows_of_many_elements_are_compared_in_parts(monkeypatch):
    weight, x = example(n=37)
    norms = x.norm(dim=0)
    patterns = [(2, 4), (8, 2, 8), (64, 2, 8)]
    whole = [(pruning.wanda(weight, norms, each), pruning.magnitude(weight, each)) for each in patterns]
    monkeypatch.setattr(pruning, "ELEMENTS", 100)
    for pattern, (wanda, magnitude) in zip(patterns, whole, strict=True):
        assert torch.equal(pruning.wanda(weight, norms, pattern), wanda)
        assert torch.equal(pruning.magnitude(weight, pattern), magnitude)


@pytest.mark.parametrize("pattern", [(4, 2, 8), (16, 2, 16), (3, 2, 12), (64, 2, 24)])
def test_tiles_are_those_of_the_packed_format(pattern):
    """Held against the kernels' own choice, where scores are equal too; what is kept can be packed."""
    weight = torch.randint(-3, 4, (37, 48), generator=torch.Generator().manual_seed(0)).float()
    v, _, m = pattern
    kept = pruning.magnitude(weight, pattern)
    assert torch.equal(kept, venom.mask(weight.abs(), v, m))
    assert (kept.unflatten(1, (-1, m)).sum(-1) == 2).all()
    packed = venom.pack(pruning.pruned(weight, kept), v, m)
    assert torch.equal(venom.unpack(*packed, 48, v, m), pruning.pruned(weight, kept))


@pytest.mark.parametrize("ways", [pruning.output_norms, pruning.output_norms_of])
def test_norms_of_outputs(ways):
    weight, x = example()
    changed = pruning.pruned(weight, pruning.magnitude(weight, (2, 4)))
    given_ = x if ways is pruning.output_norms_of else x.t() @ x
    expected = (x.double() @ weight.double().t()).norm(), (x.double() @ (weight - changed).double().t()).norm()
    assert ways(weight, changed, given_) == pytest.approx([float(value) for value in expected], rel=1e-4)


def test_what_cannot_be_pruned_is_said():
    with pytest.raises(ValueError, match="do not divide 6"):
        pruning.kept_of_groups(torch.ones(2, 6), 2, 4)
    with pytest.raises(ValueError, match="tiles of 8 columns do not divide 12"):
        pruning.kept_of_tiles(torch.ones(2, 12), 4, 2, 8)
    with pytest.raises(ValueError, match="mean square"):
        pruning.inverse_factor(torch.zeros(4, 4), 0.01)
    with pytest.raises(ValueError, match="mean square"):
        pruning.inverse_factor(torch.full((4, 4), float("nan")), 0.01)
    with pytest.raises(ValueError, match="not positive definite"):
        pruning.inverse_factor(torch.diag(torch.tensor([1.0, -1.0, 1.0, 1.0])), 0.01)


@pytest.mark.parametrize("observer", [Gram, ChannelNorm])
def test_observers_of_sums(observer):
    _, x = example(k=5)
    made = observer()
    with pytest.raises(ValueError, match="no row"):
        made.result()
    for part in x.view(4, 10, 5):
        made.update(part.bfloat16())
    exact = x.bfloat16().double()
    expected = exact.t() @ exact if observer is Gram else exact.norm(dim=0)
    assert torch.allclose(made.result().double(), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"expected \[..., 5\]"):
        made.update(torch.ones(2, 3))


def test_a_copied_sample_goes_on_as_the_first():
    rows = torch.arange(100.0).view(50, 2)
    first = Reservoir(8, torch.Generator().manual_seed(0))
    first.update(rows[:20])
    second = first.copy()
    first.update(rows[20:])
    second.update(rows[20:])
    assert torch.equal(first.result(), second.result())
