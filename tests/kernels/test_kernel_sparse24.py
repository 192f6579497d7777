"""Packed 2:4 weights: bytes, order and round trips, against lists of Python numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantkit_kernels import sparse24
from quantkit_kernels.sparse24 import VALUE_DTYPES


def random_weight(rows: int, groups: int, dtype: torch.dtype, seed: int, *, fewer: bool = True) -> torch.Tensor:
    """A 2:4 weight [rows, 4 * groups] of any bits of the dtype (NaN too); with `fewer` some fours have fewer."""
    generator = torch.Generator().manual_seed(seed)
    size = dtype.itemsize
    data = torch.randint(0, 256, (rows, groups, 4, size), dtype=torch.uint8, generator=generator)
    kept = torch.rand((rows, groups, 4), generator=generator).argsort(-1) < 2
    if fewer:
        kept &= torch.rand(kept.shape, generator=generator) < 0.8
    if dtype.is_floating_point:  # -0 comes back as 0, which another test is about
        kept &= (data[..., :-1] != 0).any(-1) | (data[..., -1] & 127 != 0)
    return (data * kept.unsqueeze(-1)).view(dtype).reshape(rows, 4 * groups).contiguous()


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 5),
    groups=st.integers(0, 21),
    dtype=st.sampled_from(VALUE_DTYPES),
    seed=st.integers(0, 2**31),
)
def test_what_was_packed_comes_back_bit_for_bit(rows: int, groups: int, dtype: torch.dtype, seed: int) -> None:
    weight = random_weight(rows, groups, dtype, seed)
    values, indices = sparse24.pack(weight)
    assert values.shape == (rows, 2 * groups)
    assert values.dtype == dtype
    assert indices.shape == (rows, -(-groups // 8))
    assert indices.dtype == torch.int32
    assert sparse24.are_ascending(indices, 4 * groups)
    back = sparse24.unpack(values, indices, 4 * groups)
    assert torch.equal(raw(back), raw(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_negative_zero_is_a_zero(dtype: torch.dtype) -> None:
    weight = torch.tensor([[-0.0, 1.0, -0.0, 2.0]]).to(dtype)
    values, indices = sparse24.pack(weight)
    assert values.float().tolist() == [[1.0, 2.0]]
    assert sparse24.unpack(values, indices, 4).float().tolist() == [[0.0, 1.0, 0.0, 2.0]]


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 4), groups=st.integers(1, 19), seed=st.integers(0, 2**31))
def test_four_bits_come_back(rows: int, groups: int, seed: int) -> None:
    weight = random_weight(rows, groups, torch.int8, seed).remainder(16).sub(8)
    weight *= random_weight(rows, groups, torch.int8, seed) != 0
    words, indices = sparse24.pack_int4(weight)
    assert words.shape == (rows, -(-2 * groups // 8))
    assert torch.equal(sparse24.unpack_int4(words, indices, 4 * groups), weight)


def test_the_order_is_the_documented_one() -> None:
    """By hand: places (1, 3), (0, 2), none (0, 1), and one that is filled up (2 with 0)."""
    weight = torch.tensor([[0, 5, 0, -6, 7, 0, 8, 0, 0, 0, 0, 0, 0, 0, 9, 0]], dtype=torch.int8)
    values, indices = sparse24.pack(weight)
    assert values.tolist() == [[5, -6, 7, 8, 0, 0, 0, 9]]
    places = [1, 3, 0, 2, 0, 1, 0, 2]
    assert indices.tolist() == [[sum(place << 2 * j for j, place in enumerate(places))]]


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 4), groups=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_values_meet_the_inputs_that_the_indices_name(rows: int, groups: int, seed: int) -> None:
    """Each row as one long integer, place by place, as a kernel reads it."""
    weight = random_weight(rows, groups, torch.int8, seed)
    values, indices = sparse24.pack(weight)
    found = [[0] * (4 * groups) for _ in range(rows)]
    for n in range(rows):
        row = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(indices[n].tolist()))
        for j, value in enumerate(values[n].tolist()):
            found[n][4 * (j // 2) + (row >> (2 * j)) % 4] += value
        assert row >> (4 * groups) == 0  # the rest of the last word
    assert found == weight.tolist()


@pytest.mark.parametrize(
    ("dtype", "share"),
    [
        (torch.bfloat16, 9 / 16),
        (torch.float16, 9 / 16),
        (torch.int8, 5 / 16),
        (torch.float8_e4m3fn, 5 / 16),
        (torch.float8_e5m2, 5 / 16),
        ("int4", 3 / 16),
    ],
)
def test_bytes_are_the_theoretical_share_of_bfloat16(dtype: torch.dtype | str, share: float) -> None:
    if isinstance(dtype, str):
        weight = random_weight(8, 64, torch.int8, 0).clamp(-8, 7)
        parts = sparse24.pack_int4(weight)
    else:
        weight = random_weight(8, 64, dtype, 0)
        parts = sparse24.pack(weight)
    assert sum(part.nbytes for part in parts) == share * 2 * weight.numel()


def test_three_of_four_are_refused_with_their_place() -> None:
    weight = torch.zeros(3, 12)
    weight[2, 4:7] = 1
    with pytest.raises(ValueError, match=r"row 2 of the weight is no 2:4 row: of columns 4 to 7 more than two"):
        sparse24.pack(weight)


@pytest.mark.parametrize("in_features", [1, 2, 6, 31])
def test_k_that_four_does_not_divide_is_refused_by_name(in_features: int) -> None:
    says = rf"K is {in_features}: 2:4 needs a multiple of 4 in features"
    with pytest.raises(ValueError, match=says):
        sparse24.pack(torch.zeros(2, in_features))
    with pytest.raises(ValueError, match=says):
        sparse24.unpack(torch.zeros(2, in_features // 2), torch.zeros(2, 1, dtype=torch.int32), in_features)
    with pytest.raises(ValueError, match=says):
        sparse24.indices_of_bitmask(torch.zeros(2, 1, dtype=torch.uint8), in_features)


def test_wrong_dtypes_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is torch.int64"):
        sparse24.pack(torch.zeros(2, 4, dtype=torch.int64))
    values, indices = sparse24.pack(torch.zeros(2, 36))
    with pytest.raises(ValueError, match=r"values are torch.float32 \[2, 18\]: expected \[..., 20\]"):
        sparse24.unpack(values, indices, 40)
    with pytest.raises(ValueError, match=r"indices are torch.int32 \[2, 1\]: expected torch.int32 \[2, 2\]"):
        sparse24.unpack(values, indices[:, :1], 36)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 4), groups=st.integers(1, 21), seed=st.integers(0, 2**31))
def test_bitmasks_become_the_same_indices(rows: int, groups: int, seed: int) -> None:
    weight = torch.where(random_weight(rows, groups, torch.int8, seed, fewer=False) != 0, 1, 0)
    weight = weight.view(rows, groups, 4)
    short = weight.sum(-1) < 2  # a kept byte happened to be 0: any other place will do
    weight[short] = torch.tensor([1, 0, 0, 1])
    weight = weight.view(rows, 4 * groups).to(torch.int8)
    mask = torch.zeros(rows, -(-groups // 2), dtype=torch.uint8)
    for n in range(rows):
        for k in range(4 * groups):
            mask[n, k // 8] |= int(weight[n, k]) << k % 8
    assert torch.equal(sparse24.indices_of_bitmask(mask, 4 * groups), sparse24.pack(weight)[1])


@pytest.mark.parametrize("byte", [0x00, 0x37, 0x71, 0xFF, 0x13])
def test_bitmasks_of_other_patterns_are_refused(byte: int) -> None:
    mask = torch.tensor([[0x35, byte]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="not just two are stored"):
        sparse24.indices_of_bitmask(mask, 16)


def test_bits_beyond_the_row_are_refused() -> None:
    with pytest.raises(ValueError, match="beyond its 4 columns"):
        sparse24.indices_of_bitmask(torch.tensor([[0x33]], dtype=torch.uint8), 4)
