"""Packed V:N:M weights: bytes, order, round trips and the choice of columns, against loops over Python numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantkit_kernels import sparse24, venom
from quantkit_kernels.sparse24 import VALUE_DTYPES

SIZES = {
    "out_features": st.integers(0, 21),
    "tiles": st.integers(0, 9),
    "v": st.sampled_from([1, 3, 8, 32]),
    "m": st.sampled_from([4, 8, 12, 16]),
    "seed": st.integers(0, 2**31),
}


def random_scores(out_features: int, tiles: int, m: int, seed: int) -> torch.Tensor:
    """Few different scores, so that equal ones are common."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 6, (out_features, tiles * m), generator=generator).float()


def random_weight(
    out_features: int, tiles: int, v: int, m: int, dtype: torch.dtype, seed: int, *, fewer: bool = True
) -> torch.Tensor:
    """A V:N:M weight of any bits of the dtype but -0 (NaN too); with `fewer` some tiles keep less than they may."""
    generator = torch.Generator().manual_seed(seed)
    kept = venom.mask(torch.rand(out_features, tiles * m, generator=generator), v, m)
    if fewer:
        kept &= torch.rand(kept.shape, generator=generator) < 0.7
    data = torch.randint(0, 256, (*kept.shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    if dtype.is_floating_point:
        kept &= (data[..., :-1] != 0).any(-1) | (data[..., -1] & 127 != 0)
    return (data * kept.unsqueeze(-1)).view(dtype).reshape(kept.shape).contiguous()


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@settings(max_examples=80, deadline=None)
@given(**SIZES, dtype=st.sampled_from(VALUE_DTYPES))
def test_what_was_packed_comes_back_bit_for_bit(out_features, tiles, v, m, seed, dtype) -> None:
    weight = random_weight(out_features, tiles, v, m, dtype, seed)
    values, indices, columns = venom.pack(weight, v, m)
    assert (values.shape, values.dtype) == ((out_features, 2 * tiles), dtype)
    assert (indices.shape, indices.dtype) == ((out_features, -(-tiles // 8)), torch.int32)
    assert (columns.shape, columns.dtype) == ((-(-out_features // v), 4 * tiles), torch.uint8)
    assert sparse24.are_ascending(indices, 4 * tiles)
    assert venom.are_columns(columns, m)
    back = venom.unpack(values, indices, columns, tiles * m, v, m)
    assert torch.equal(raw(back), raw(weight))


@settings(max_examples=40, deadline=None)
@given(**SIZES)
def test_four_bits_come_back(out_features, tiles, v, m, seed) -> None:
    codes = random_weight(out_features, tiles, v, m, torch.int8, seed)
    codes = torch.where(codes == 0, 0, codes.remainder(16) - 8).to(torch.int8)
    words, indices, columns = venom.pack_int4(codes, v, m)
    assert words.shape == (out_features, -(-2 * tiles // 8))
    assert torch.equal(venom.unpack_int4(words, indices, columns, tiles * m, v, m), codes)


@settings(max_examples=40, deadline=None)
@given(**SIZES)
def test_values_meet_the_inputs_that_columns_and_indices_name(out_features, tiles, v, m, seed) -> None:
    """Each row of indices as one long integer, place by place, as a kernel reads it."""
    weight = random_weight(out_features, tiles, v, m, torch.int8, seed)
    values, indices, columns = (part.tolist() for part in venom.pack(weight, v, m))
    found = [[0] * (tiles * m) for _ in range(out_features)]
    for n in range(out_features):
        row = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(indices[n]))
        for j, value in enumerate(values[n]):
            place = (row >> (2 * j)) % 4
            found[n][m * (j // 2) + columns[n // v][4 * (j // 2) + place]] += value
        assert row >> (4 * tiles) == 0  # the rest of the last word
    assert found == weight.tolist()


def test_the_order_is_the_documented_one() -> None:
    """By hand, 2:2:8: columns 1, 4 and 6 are in use, and 0 fills up."""
    weight = torch.tensor(
        [[0, 5, 0, 0, 0, 0, -6, 0], [0, 0, 0, 0, 7, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 9]], dtype=torch.int8
    )
    values, indices, columns = venom.pack(weight, 2, 8)
    assert columns.tolist() == [[0, 1, 4, 6], [0, 1, 2, 7]]
    assert values.tolist() == [[5, -6], [0, 7], [0, 9]]
    assert indices.tolist() == [[1 | 3 << 2], [0 | 2 << 2], [0 | 3 << 2]]


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_four_of_four_columns_are_the_2_of_4_format(dtype) -> None:
    weight = random_weight(7, 11, 3, 4, dtype, 0)
    values, indices, columns = venom.pack(weight, 3, 4)
    expected = sparse24.pack(weight)
    assert torch.equal(raw(values), raw(expected[0]))
    assert torch.equal(indices, expected[1])
    assert torch.equal(columns, torch.arange(4, dtype=torch.uint8).repeat(3, 11))


def test_bytes_are_as_documented() -> None:
    weight = random_weight(128, 16, 64, 8, torch.bfloat16, 0, fewer=False)
    share = sum(part.nbytes for part in venom.pack(weight, 64, 8)) / weight.nbytes
    assert share == 2 / 8 + 1 / (4 * 8) + 2 / (8 * 64)


@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_the_mask_keeps_what_loops_over_numbers_keep(out_features, tiles, v, m, seed) -> None:
    scores = random_scores(out_features, tiles, m, seed)
    table = scores.tolist()
    expected = [[False] * (tiles * m) for _ in range(out_features)]
    for top in range(0, out_features, v):
        rows = range(top, min(top + v, out_features))
        for left in range(0, tiles * m, m):
            by_sum = sorted(range(left, left + m), key=lambda k: (-sum(table[n][k] for n in rows), k))
            for n in rows:
                for k in sorted(by_sum[:4], key=lambda k: (-table[n][k], k))[:2]:
                    expected[n][k] = True
    kept = venom.mask(scores, v, m)
    assert kept.dtype == torch.bool
    assert kept.tolist() == expected
    venom.pack(scores * kept, v, m)  # is one


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float64]))
def test_scores_of_every_dtype_with_negative_and_infinite_ones(seed, dtype) -> None:
    scores = torch.randn(10, 48, generator=torch.Generator().manual_seed(seed)).to(dtype)
    scores[0, 3] = -torch.inf
    kept = venom.mask(scores, 4, 12)
    assert (kept.view(10, 4, 12).sum(-1) == 2).all()
    assert not kept[0, 3]
    assert torch.equal(kept, venom.mask(scores.double(), 4, 12))


def test_many_pieces_are_as_one(monkeypatch) -> None:
    weight = random_weight(21, 5, 4, 8, torch.bfloat16, 1)
    scores = random_scores(21, 5, 8, 1)
    whole, kept = venom.pack(weight, 4, 8), venom.mask(scores, 4, 8)
    monkeypatch.setattr(venom, "_PIECE", 1)
    for one, other in zip(venom.pack(weight, 4, 8), whole, strict=True):
        assert torch.equal(raw(one), raw(other))
    assert torch.equal(raw(venom.unpack(*whole, 40, 4, 8)), raw(weight))
    assert torch.equal(venom.mask(scores, 4, 8), kept)


def test_a_fifth_column_is_refused_with_its_place() -> None:
    weight = torch.zeros(10, 24)
    for n in range(5):
        weight[4 + n % 4, 8 + n] = 1.0
    with pytest.raises(ValueError, match=r"no 4:2:8 weight: in rows 4 to 7 more than 4 of columns 8 to 15 are in use"):
        venom.pack(weight, 4, 8)


def test_a_third_number_of_a_row_is_refused() -> None:
    weight = torch.zeros(2, 8)
    weight[1, [0, 3, 5]] = 1.0
    with pytest.raises(ValueError, match="row 1 of the weight is no 2:4 row"):
        venom.pack(weight, 2, 8)


@pytest.mark.parametrize(
    ("in_features", "v", "m", "says"),
    [
        (24, 0, 8, "V is 0: expected the number of rows that share their columns"),
        (24, 4, 6, "M is 6: expected a multiple of 4 from 4 to 256"),
        (24, 4, 0, "M is 0: expected a multiple of 4"),
        (520, 4, 260, "M is 260: expected a multiple of 4 from 4 to 256"),
        (20, 4, 8, "K is 20: 4:2:8 needs a multiple of 8 in features, leave the layer dense"),
    ],
)
def test_patterns_that_cannot_be_are_refused_by_name(in_features, v, m, says) -> None:
    with pytest.raises(ValueError, match=says):
        venom.mask(torch.zeros(4, in_features), v, m)
    with pytest.raises(ValueError, match=says):
        venom.pack(torch.zeros(4, in_features), v, m)
    parts = torch.zeros(4, 2), torch.zeros(4, 1, dtype=torch.int32), torch.zeros(1, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=says):
        venom.unpack(*parts, in_features, v, m)


def test_wrong_dtypes_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores are torch.int64 \[4, 8\]: expected"):
        venom.mask(torch.zeros(4, 8, dtype=torch.int64), 2, 8)
    with pytest.raises(ValueError, match="scores hold NaN"):
        venom.mask(torch.full((4, 8), torch.nan), 2, 8)
    with pytest.raises(ValueError, match=r"weight is torch.int64"):
        venom.pack(torch.zeros(4, 8, dtype=torch.int64), 2, 8)
    values, indices, columns = venom.pack(torch.zeros(4, 16), 2, 8)
    with pytest.raises(ValueError, match=r"columns are torch.uint8 \[2, 8\]: expected torch.uint8 \[4, 8\]"):
        venom.unpack(values, indices, columns, 16, 1, 8)
    with pytest.raises(ValueError, match=r"indices are torch.int32 \[4, 0\]: expected torch.int32 \[4, 1\]"):
        venom.unpack(values, indices[:, :0], columns, 16, 2, 8)
    with pytest.raises(ValueError, match=r"values are torch.float32 \[4, 4\]: expected \[..., 8\]"):
        venom.unpack(values, indices, columns, 32, 2, 8)


def test_columns_that_do_not_ascend_are_seen() -> None:
    right = torch.tensor([[0, 1, 2, 7, 0, 3, 4, 5]], dtype=torch.uint8)
    assert venom.are_columns(right, 8)
    assert not venom.are_columns(right, 4)
    assert not venom.are_columns(right.flip(1), 8)
