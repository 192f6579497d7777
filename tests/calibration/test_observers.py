"""Observers against the same statistic of all data at once."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantkit_calibration.observers import RANGES, ChannelAbsmax, Encode, Reservoir, TensorRange, TokenCount

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QMAX = {"int4": 7.0, "int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stream(dtype: torch.dtype = torch.float32, rows: int = 3001, power: int = 3, outlier: float = 90) -> torch.Tensor:
    """Powers of normal values, some zeros and one outlier."""
    x = torch.randn(rows, 7, generator=seeded()).pow(power)
    x[::5, 2] = 0
    x[rows // 3, 4] = -outlier
    return x.to(dtype)


def parts(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows in uneven pieces, an empty one among them."""
    yield from x.split([1, 0, 15, 17, 400, x.shape[0] - 433])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_channel_absmax_is_that_of_all_rows(dtype: torch.dtype, axes: int) -> None:
    x = stream(dtype)
    found = ChannelAbsmax()
    for part in parts(x) if axes == 2 else list(x[:50]) if axes == 1 else x[:3000].view(3, 10, 100, 7):
        found.update(part.transpose(0, 1) if part.ndim == 3 else part)
    rows = {1: x[:50], 2: x, 3: x[:3000]}[axes]
    assert found.result().dtype == torch.float32
    assert found.result().tolist() == np.abs(rows.float().numpy()).max(0).tolist()


def test_channel_absmax_of_a_stream_with_nan_and_infinity_shows_them() -> None:
    found = ChannelAbsmax()
    found.update(torch.tensor([[1.0, math.nan, -math.inf]]))
    found.update(torch.tensor([[2.0, 2.0, 2.0]]))
    assert str(found.result().tolist()) == "[2.0, nan, inf]"


def test_channel_absmax_wrong_use() -> None:
    found = ChannelAbsmax()
    found.update(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="no row"):
        found.result()
    found.update(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\(2, 4\): expected \[\.\.\., 3\]"):
        found.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="at least one axis"):
        ChannelAbsmax().update(torch.tensor(1.0))


def test_an_observer_keeps_no_graph_and_no_data() -> None:
    x = torch.ones(4, 3, requires_grad=True)
    for observer in (ChannelAbsmax(), TensorRange(), Reservoir(2, seeded())):
        observer.update(x * 2)
        held = [value for value in vars(observer).values() if isinstance(value, torch.Tensor)]
        assert held
        assert not any(tensor.requires_grad for tensor in held)
        assert all(tensor.untyped_storage().nbytes() < 2**19 for tensor in held)


# The range of a tensor


@pytest.fixture(params=DTYPES, ids=str)
def seen(request: pytest.FixtureRequest) -> tuple[torch.Tensor, TensorRange]:
    """All data, and what observed it piece by piece."""
    x = stream(request.param)
    found = TensorRange()
    for part in parts(x):
        found.update(part)
    return x, found


def test_absmax_is_that_of_all_values(seen: tuple[torch.Tensor, TensorRange]) -> None:
    x, found = seen
    assert found.result() == found.range("absmax") == float(x.float().abs().max())
    plain = TensorRange(histogram=False)
    plain.update(x)
    assert plain.range("absmax") == found.result()
    with pytest.raises(ValueError, match="needs the histogram"):
        plain.range("percentile")


@pytest.mark.parametrize("percentile", [1e-6, 0.3, 50, 99, 99.9, 99.99, 100])
def test_percentile_is_that_of_all_values_to_a_bin(seen: tuple[torch.Tensor, TensorRange], percentile: float) -> None:
    """Of bfloat16 it is exact; else at most the 2**-7 of a bin above, and never above absmax."""
    x, found = seen
    values = x.float().abs()
    true = float(np.quantile(values[values > 0].numpy(), percentile / 100, method="inverted_cdf"))
    value = found.range("percentile", percentile=percentile)
    if x.dtype == torch.bfloat16:
        assert value == true
    assert true <= value <= min(true * (1 + 2**-7), found.result())


def test_percentile_counts_exactly() -> None:
    """99.9 % of 41,000 is 40,959, and not 40,960 as in floating point."""
    assert math.ceil(41000 * 99.9 / 100) == 40960
    found = TensorRange()
    found.update(torch.cat([torch.ones(40959), torch.full([41], 64.0)]).bfloat16())
    assert found.range("percentile", percentile=99.9) == 1.0
    found.update(torch.full([1], 64.0).bfloat16())
    assert found.range("percentile", percentile=99.9) == 64.0


def quantizer(target: str) -> Encode:
    def encode(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        codes = (values / scale).clamp(-QMAX[target], QMAX[target])
        return (codes.round() if target.startswith("int") else codes.to(getattr(torch, target)).float()) * scale

    return encode


@pytest.mark.parametrize("target", QMAX)
@pytest.mark.parametrize(("power", "outlier"), [(1, 0), (1, 9), (1, 120), (3, 90)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mse_is_the_best_range_for_all_values(dtype: torch.dtype, power: int, outlier: float, target: str) -> None:
    """The equation, over all values, in a loop over ranges 2**(1/64) apart: none is better by 1 %.

    Where the bins hold one value each, the search sees the errors themselves, so that absmax is never better.
    """
    x = stream(dtype, power=power, outlier=outlier)
    found = TensorRange()
    for part in parts(x):
        found.update(part)
    values, encode = x.float().flatten(), quantizer(target)

    def error(value: float) -> float:
        return float((values - encode(values, torch.tensor(value / QMAX[target]))).double().square().sum())

    chosen = error(found.range("mse", QMAX[target], encode))
    assert chosen <= 1.01 * min(error(found.result() * 2 ** (-step / 64)) for step in range(64 * 8))
    if dtype == torch.bfloat16:
        assert chosen <= error(found.result()) * (1 + 1e-12)
    if target == "int4":
        assert chosen < 0.8 * error(found.result())  # there was something to find


def test_the_whole_range_of_float32_is_counted() -> None:
    """Magnitudes 2**-126 to the largest of float32, and a subnormal one: nothing is left out or clipped."""
    x = torch.tensor([2.0**-126, 1e-39, 1.0, -torch.finfo(torch.float32).max])
    found = TensorRange()
    found.update(x)
    for percentile, true in ((1, 1e-39), (40, 2.0**-126), (60, 1.0), (100, torch.finfo(torch.float32).max)):
        value = found.range("percentile", percentile=percentile)
        assert true <= value
        assert value == pytest.approx(true, rel=2**-7, abs=2.0**-133)
    # The largest value is known to its bin of 2**-7, and ranges are 2**(1/64) apart.
    assert (1 - 2**-6) * found.result() < found.range("mse", 127, quantizer("int8")) <= found.result()


def test_a_tensor_of_zeros_has_the_range_0() -> None:
    found = TensorRange()
    found.update(torch.zeros(3, 4))
    assert [found.range(kind, 127, lambda values, scale: values) for kind in RANGES] == [0, 0, 0]


def test_tensor_range_wrong_use() -> None:
    found = TensorRange()
    found.update(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="no value"):
        found.range("absmax")
    found.update(torch.ones(2))
    with pytest.raises(ValueError, match="range 'max': expected one of absmax, percentile, mse"):
        found.range("max")
    with pytest.raises(ValueError, match="percentile 0"):
        found.range("percentile", percentile=0)
    with pytest.raises(ValueError, match="needs encode and dtype_max"):
        found.range("mse")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", RANGES)
def test_a_range_of_what_is_not_finite_is_refused(kind: str, value: float) -> None:
    found = TensorRange()
    found.update(torch.tensor([1.0, value]))
    found.update(torch.tensor([2.0]))
    with pytest.raises(ValueError, match="NaN or infinity"):
        found.range(kind, 127, lambda values, scale: values)


# Counts and samples


def test_tokens_are_counted_for_each_expert() -> None:
    chosen = torch.randint(0, 6, (40, 2), generator=seeded())
    found = TokenCount(7)
    for part in chosen.split([1, 0, 39]):
        found.update(part)
    found.add(5, 3)
    expected = np.bincount(chosen.flatten().numpy(), minlength=7)
    expected[5] += 3
    assert found.result().tolist() == expected.tolist()
    for wrong in (7, -1):
        with pytest.raises(ValueError, match="of 7"):
            found.update(torch.tensor([0, wrong]))
    assert found.result().tolist() == expected.tolist()


@given(cuts=st.lists(st.integers(0, 60), max_size=6), size=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_a_sample_is_rows_in_order_however_the_stream_is_cut(cuts: list[int], size: int, seed: int) -> None:
    x = torch.arange(60)[:, None].expand(60, 3).bfloat16()
    whole, pieces = Reservoir(size, seeded(seed)), Reservoir(size, seeded(seed))
    whole.update(x)
    edges = [0, *sorted(cuts), 60]
    for start, end in itertools.pairwise(edges):
        pieces.update(x[None, start:end])
    rows = pieces.result()
    assert torch.equal(rows, whole.result())
    assert rows.dtype == x.dtype
    numbers = rows[:, 0].tolist()
    assert numbers == sorted(set(numbers))
    assert len(numbers) == min(size, 60)
    assert torch.equal(rows, x[rows[:, 0].long()])
    assert pieces.seen == 60


def test_each_row_is_as_likely_as_any_other() -> None:
    """4 of 20 rows, 2,000 times: each row 400 times, give or take 5 standard deviations of sqrt(2000 * .2 * .8)."""
    x = torch.arange(20.0)[:, None]
    counts = torch.zeros(20)
    for seed in range(2000):
        sample = Reservoir(4, seeded(seed))
        for part in x.split([1, 6, 13]):
            sample.update(part)
        counts[sample.result()[:, 0].long()] += 1
    assert float((counts - 400).abs().max()) < 5 * math.sqrt(2000 * 0.2 * 0.8)


def test_reservoir_wrong_use() -> None:
    with pytest.raises(ValueError, match="0 rows"):
        Reservoir(0, seeded())
    sample = Reservoir(2, seeded())
    with pytest.raises(ValueError, match="no row"):
        sample.result()
    sample.update(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="no row"):
        sample.result()
    for wrong in (torch.zeros(1, 4), torch.zeros(1, 3).bfloat16()):
        with pytest.raises(ValueError, match=r"after 3 torch\.float32"):
            sample.update(wrong)


@pytest.mark.parametrize("histogram", [True, False])
def test_merging_is_what_updating_with_both_would_be(histogram: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(7, 5, generator=generator),
        torch.randn(3, 5, generator=generator).bfloat16(),
        torch.zeros(0, 5),
    ]
    all_channels, channels = ChannelAbsmax(), ChannelAbsmax()
    all_values, values = TensorRange(histogram), TensorRange(histogram)
    for part in [parts[2], *parts]:
        one, other = ChannelAbsmax(), TensorRange(histogram)
        for made in (one, all_channels, other, all_values):
            made.update(part)
        channels.merge(one)
        values.merge(other)
        before = None if part.numel() == 0 else one.result()
        channels.update(100 * torch.eye(5)[:1])
        all_channels.update(100 * torch.eye(5)[:1])
        assert before is None or torch.equal(one.result(), before)  # what was merged stays its own
    assert torch.equal(channels.result(), all_channels.result())
    assert values.result() == all_values.result()
    if histogram:
        assert values.range("percentile", percentile=60) == all_values.range("percentile", percentile=60)
    with pytest.raises(ValueError, match="4 channels: expected 5"):
        channels.merge(_given(torch.ones(1, 4)))
    with pytest.raises(ValueError, match="histogram"):
        values.merge(TensorRange(not histogram))


def _given(x: torch.Tensor) -> ChannelAbsmax:
    found = ChannelAbsmax()
    found.update(x)
    return found
