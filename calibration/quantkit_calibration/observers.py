"""Running statistics of a stream of tensors: `update(x)` takes in more of it, `result()` says what was seen.

Each keeps O(channels) numbers (`Gram` their square), however long the stream is, and depends on nothing but the values:
not on how they were cut into updates, but for the rounding of sums (`ChannelNorm`, `Gram`). NaN or infinity in the
stream is in the result as well, or refused there; never left out.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

Encode = Callable[[Tensor, Tensor], Tensor]
"""(values, scale) -> the values that the quantizer makes of them: codes times scale, saturating."""

RANGES = ("absmax", "percentile", "mse")


class ChannelAbsmax:
    """The largest magnitude of each channel of a stream [..., K]."""

    def __init__(self) -> None:
        self._absmax: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in x [..., K], float of any dtype; it may hold no row at all. Raises ValueError for another K."""
        if x.ndim < 1 or (self._absmax is not None and x.shape[-1] != self._absmax.shape[0]):
            known = "at least one axis" if self._absmax is None else f"[..., {self._absmax.shape[0]}]"
            raise ValueError(f"x has shape {tuple(x.shape)}: expected {known}")
        x = x.detach()
        if x.numel() == 0:
            return
        rows = tuple(range(x.ndim - 1))
        # Two reductions and no copy of x, which |x| would be.
        self._add(torch.maximum(x.amax(rows), -x.amin(rows)).float() if rows else x.abs().float())

    @classmethod
    def of(cls, absmax: Tensor) -> "ChannelAbsmax":
        """One that was given a stream with these largest magnitudes, float32 [K]."""
        made = cls()
        made._add(absmax)
        return made

    def merge(self, other: "ChannelAbsmax") -> None:
        """Take in all that another one was given. Raises ValueError for another K."""
        if other._absmax is None:
            return
        if self._absmax is not None and self._absmax.shape != other._absmax.shape:
            raise ValueError(f"{other._absmax.shape[0]} channels: expected {self._absmax.shape[0]}")
        self._add(other._absmax)

    def _add(self, absmax: Tensor) -> None:
        if self._absmax is None:
            self._absmax = absmax.clone()
        else:
            torch.maximum(self._absmax, absmax, out=self._absmax)  # what stays must not scatter in memory

    def result(self) -> Tensor:
        """float32 [K], NaN where a channel holds one. Raises ValueError when no row was given."""
        if self._absmax is None:
            raise ValueError("no row was given")
        return self._absmax.clone()


class ChannelNorm:
    """The l2 norm of each channel of a stream [..., K]: what Wanda weighs weights by (arXiv:2306.11695, equation 1)."""

    def __init__(self) -> None:
        self._squares: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in x [..., K], float of any dtype. Raises ValueError for another K."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if self._squares is not None and rows.shape[1] != self._squares.shape[0]:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected [..., {self._squares.shape[0]}]")
        squares = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).square()
        self._squares = squares if self._squares is None else self._squares.add_(squares)

    def sums(self, channels: int, device: torch.device) -> Tensor:
        """float64 [K], the statistic's own memory: the sums of squares, 0 where no row was given."""
        if self._squares is None:
            self._squares = torch.zeros(channels, dtype=torch.float64, device=device)
        return self._squares

    def result(self) -> Tensor:
        """float32 [K], NaN where a channel holds one. Raises ValueError when no row was given."""
        if self._squares is None:
            raise ValueError("no row was given")
        return self._squares.sqrt().float()


class Gram:
    """X^T X of a stream of rows X [..., K]: half the Hessian of a layer's squared error, in K^2 numbers.

    float32 sums. The order of the updates and how the stream is cut decide the rounding, and nothing else.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in x [..., K], float of any dtype. Raises ValueError for another K."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if self._sum is None:
            self._sum = rows.new_zeros(rows.shape[1], rows.shape[1])
        if rows.shape[1] != len(self._sum):
            raise ValueError(f"x has shape {tuple(x.shape)}: expected [..., {len(self._sum)}]")
        self._sum.addmm_(rows.t(), rows)

    def sums(self, channels: int, device: torch.device) -> Tensor:
        """float32 [K, K], the statistic's own memory: 0 where no row was given."""
        if self._sum is None:
            self._sum = torch.zeros(channels, channels, device=device)
        return self._sum

    def result(self) -> Tensor:
        """float32 [K, K], the statistic's own memory. Raises ValueError when no row was given."""
        if self._sum is None:
            raise ValueError("no row was given")
        return self._sum


class TokenCount:
    """How many tokens each expert of a layer was given."""

    def __init__(self, experts: int) -> None:
        self._counts = torch.zeros(experts, dtype=torch.int64)

    def update(self, experts: Tensor) -> None:
        """Take in the numbers of the experts that tokens were sent to: integers of any shape, one a token and choice.

        Raises ValueError for a number that is no expert's.
        """
        chosen = experts.detach().flatten()
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < self._counts.numel():
            raise ValueError(f"experts {int(chosen.min())} to {int(chosen.max())} of {self._counts.numel()}")
        self._counts += torch.bincount(chosen, minlength=self._counts.numel()).cpu()

    def add(self, expert: int, tokens: int) -> None:
        """Take in that one expert was given some tokens more."""
        self._counts[expert] += tokens

    def result(self) -> Tensor:
        """int64 [experts]."""
        return self._counts.clone()


class Reservoir:
    """A random sample of at most R rows of a stream of rows [..., K], each row as likely as any other.

    Each row draws a number, and the rows with the R smallest stay (priority sampling): the sample depends on the
    generator and on how many rows came before, not on how the stream is cut.

    A stream may be cut into parts that go to several samples, of which `choose` then makes the one of the whole: each
    row has a place in the stream, and `go_on_at` says what the place of the next is.
    """

    def __init__(self, rows: int, generator: torch.Generator) -> None:
        """Args: rows: R, at least 1. generator: on the CPU, for this stream alone."""
        if rows < 1:
            raise ValueError(f"a sample of {rows} rows: expected at least 1")
        self._size = rows
        self._generator = generator
        self._rows: Tensor | None = None
        self._keys = torch.empty(0, dtype=torch.float64)
        self._places = torch.empty(0, dtype=torch.int64)
        self._place = 0
        self.seen = 0

    def update(self, x: Tensor) -> None:
        """Take in x [..., K], of one dtype and K throughout, else ValueError."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if self._rows is not None and (rows.shape[1], rows.dtype) != (self._rows.shape[1], self._rows.dtype):
            raise ValueError(f"rows of {rows.shape[1]} {rows.dtype} after {self._rows.shape[1]} {self._rows.dtype}")
        self.seen += rows.shape[0]
        places = torch.arange(self._place, self._place + rows.shape[0])
        self._place += rows.shape[0]
        keys = torch.cat([self._keys, torch.rand(rows.shape[0], generator=self._generator, dtype=torch.float64)])
        # Stable, so that of equal numbers the earlier row stays; then back into the order of the stream.
        kept = keys.sort(stable=True).indices[: self._size].sort().values
        held = self._keys.shape[0]
        self._keys, self._places = keys[kept], torch.cat([self._places, places])[kept]
        new = rows[(kept[kept >= held] - held).to(rows.device)]
        if self._rows is not None:
            new = torch.cat([self._rows[kept[kept < held].to(rows.device)], new])
        self._rows = new

    def go_on_at(self, place: int, generator: torch.Generator | None = None) -> None:
        """The next row is the one at this place of the stream, and draws its number from this generator from now on.

        Without a generator the rows in between draw their numbers too, so that those after them draw what they would
        have drawn; a place that is passed already changes nothing.
        """
        if generator is not None and (place > self._place or not self.seen):
            self._generator, self._place = generator, place
        while self._place < place:
            count = min(place - self._place, 2**20)
            torch.rand(count, generator=self._generator, dtype=torch.float64)
            self._place += count

    def drawn(self) -> tuple[Tensor, Tensor]:
        """The numbers (float64) and places (int64) of the rows that are kept."""
        return self._keys, self._places

    def choose(self, drawn: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Of what several samples have `drawn`, the numbers and places that the sample of the whole keeps, in order.

        Then which of this one's rows are among them: [kept], the index of the row, or -1.
        """
        keys, places = (torch.cat([each[part] for each in drawn]) for part in (0, 1))
        order = places.sort(stable=True).indices
        keys, places = keys[order], places[order]
        kept = keys.sort(stable=True).indices[: self._size].sort().values
        keys, places = keys[kept], places[kept]
        own = torch.full((len(kept),), -1)
        for index, place in enumerate(self._places.tolist()):
            own[places == place] = index
        return keys, places, own

    def rows(self, own: Tensor, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[kept, K]: this sample's rows by `choose`, and zeros where a row is another's."""
        made = torch.zeros(len(own), channels, dtype=dtype, device=device)
        if self._rows is not None:
            there = (own >= 0).to(device)
            made[there] = self._rows[own[own >= 0].to(self._rows.device)].to(device)
        return made

    def take(self, keys: Tensor, places: Tensor, rows: Tensor, seen: int) -> None:
        """Hold these rows of a stream of which so many were seen."""
        self._keys, self._places, self._rows, self.seen = keys, places, rows, seen

    def copy(self) -> "Reservoir":
        """Another sample of the same stream up to now, which goes on by itself."""
        made = Reservoir(self._size, self._generator.clone_state())
        made._rows, made._keys, made.seen = self._rows, self._keys, self.seen
        made._places, made._place = self._places, self._place
        return made

    def result(self) -> Tensor:
        """[min(R, rows seen), K] in the order of the stream. Raises ValueError when no row was given."""
        if self._rows is None or not self.seen:
            raise ValueError("no row was given")
        return self._rows.clone()


class TensorRange:
    """The range of a whole stream: what one static scale for all of its values is made of.

    The histogram counts magnitudes by the upper 15 bits below the sign of their float32, which are bfloat16's: bins
    2**-7 of a power of two wide, from the smallest number to the largest, 2**15 of them and 256 KiB whatever the range.
    A bin of bfloat16 values holds one value, so that percentile and mse are those of the values themselves; in other
    dtypes they are known to a bin.
    """

    BINS = 2**15
    CHUNK = 2**22  # values whose bins are found at a time

    def __init__(self, histogram: bool = True) -> None:
        """Args: histogram: False where nothing but `absmax` is asked for, which costs far less."""
        self._absmax: Tensor | None = None
        self._counts: Tensor | None = None
        self._histogram = histogram
        self._one_value_a_bin = True

    def update(self, x: Tensor) -> None:
        """Take in x, float of any shape; it may be empty. float64 is rounded to float32 first."""
        x = x.detach()
        if x.numel() == 0:
            return
        absmax = torch.maximum(x.amax(), -x.amin()).float()
        self._absmax = absmax if self._absmax is None else torch.maximum(self._absmax, absmax)
        if not self._histogram:
            return
        self._one_value_a_bin &= x.dtype == torch.bfloat16
        if self._counts is None:
            self._counts = torch.zeros(self.BINS, dtype=torch.int64, device=x.device)
        for part in torch.split(x.reshape(-1), self.CHUNK):
            self._counts += torch.bincount(_bin(part), minlength=self.BINS)

    def merge(self, other: "TensorRange") -> None:
        """Take in all that another one, with a histogram like this one's or without, was given."""
        if self._histogram != other._histogram:
            raise ValueError("one has a histogram and the other hasn't")
        if other._absmax is None:
            return
        self._absmax = other._absmax if self._absmax is None else torch.maximum(self._absmax, other._absmax)
        self._one_value_a_bin &= other._one_value_a_bin
        if other._counts is not None:
            self._counts = other._counts.clone() if self._counts is None else self._counts + other._counts

    def parts(self) -> tuple[float | None, bool, Tensor | None]:
        """The largest magnitude, whether each bin holds one value, and the histogram int64 [BINS], its own memory.

        The first is None where no value was given; then the histogram is of zeros, if there is to be one.
        """
        if self._histogram and self._counts is None:
            self._counts = torch.zeros(self.BINS, dtype=torch.int64)
        return None if self._absmax is None else float(self._absmax), self._one_value_a_bin, self._counts

    def take(self, absmax: float, one_value_a_bin: bool) -> None:
        """Hold these; the histogram was changed where it lies."""
        self._absmax, self._one_value_a_bin = torch.tensor(absmax), one_value_a_bin

    def result(self) -> float:
        """The largest magnitude; NaN if there is one. Raises ValueError when no value was given."""
        if self._absmax is None:
            raise ValueError("no value was given")
        return float(self._absmax)

    def range(
        self,
        kind: str,
        dtype_max: float | None = None,
        encode: Encode | None = None,
        percentile: float = 99.99,
    ) -> float:
        """The largest magnitude that a quantizer better represents: its scale is this / `dtype_max`. 0 if all are 0.

        - "absmax": the largest that was seen.
        - "percentile": the smallest magnitude that at least so many percent of the values other than 0 don't exceed (0
          has a code whatever the range; below 2**-133 counts as 0); in other dtypes than bfloat16 up to 2**-7 of it
          more, the upper end of its bin, and never above absmax.
        - "mse": the range of least squared error, sum (x - encode(x, scale))**2, among absmax and shares of it down to
          2**-16 (in steps of 2**(1/8), then 2**(1/64) around the best). Nagel et al. 2021, arXiv:2106.08295,
          section 3.1.

        Args:
            kind: as above.
            dtype_max: the largest code; for "mse".
            encode: the quantizer, (values [n], scale []) -> dequantized values [n], all float32 on the CPU; for "mse".
            percentile: above 0, at most 100.

        Raises:
            ValueError: another kind; no value, NaN or infinity was given; no histogram; no `encode` or `dtype_max`.
        """
        absmax = self.result()
        if kind not in RANGES:
            raise ValueError(f"range {kind!r}: expected one of {', '.join(RANGES)}")
        if not math.isfinite(absmax):
            raise ValueError(f"the largest magnitude is {absmax}: the values hold NaN or infinity")
        if kind == "absmax" or absmax == 0:
            return absmax
        if self._counts is None:
            raise ValueError(f"range {kind!r} needs the histogram")
        counts = self._counts.cpu()
        if kind == "percentile":
            return min(absmax, self._percentile(counts, percentile))
        if encode is None or dtype_max is None:
            raise ValueError("range 'mse' needs encode and dtype_max")
        values, weights = self._points(counts, absmax)
        return _least_error(values, weights, absmax, dtype_max, encode)

    def _percentile(self, counts: Tensor, percentile: float) -> float:
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile {percentile}: expected above 0 and at most 100")
        total = counts[1:].cumsum(0)
        rank = math.ceil(int(total[-1]) * Fraction(str(percentile)) / 100)
        index = int(torch.searchsorted(total, rank)) + 1
        return float(_lower_end(torch.tensor(index if self._one_value_a_bin else index + 1)))

    def _points(self, counts: Tensor, absmax: float) -> tuple[Tensor, Tensor]:
        """float32: each bin's value or its middle; float64: how many it stands for."""
        filled = counts.nonzero().flatten()
        low, weights = _lower_end(filled), counts[filled].double()
        if self._one_value_a_bin:
            return low, weights
        high = _lower_end(filled + 1).clamp(max=absmax)
        return low + (high - low) / 2, weights


def _bin(x: Tensor) -> Tensor:
    """Each value's bin: the bits of the float32 without the sign and the lower 16."""
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16) & 0x7FFF
    return (x.float().contiguous().view(torch.int32) & 0x7FFFFFFF) >> 16


def _lower_end(index: Tensor) -> Tensor:
    """float32: the smallest magnitude in each bin."""
    return (index.to(torch.int32) << 16).view(torch.float32)


def _least_error(values: Tensor, weights: Tensor, absmax: float, dtype_max: float, encode: Encode) -> float:
    """The range among the candidates with the least weighted squared error; of equal ones the largest."""

    def error(found: float) -> float:
        scale = torch.tensor(found / dtype_max, dtype=torch.float32)
        total = float(((values - encode(values, scale)).double().square() * weights).sum())
        return math.inf if math.isnan(total) else total  # a scale that float32 can't hold

    coarse = [absmax * 2 ** (-step / 8) for step in range(8 * 16 + 1)]
    best = min(coarse, key=error)
    fine = [best * 2 ** (step / 64) for step in range(7, -8, -1)]
    return min([absmax, best, *(found for found in fine if found < absmax)], key=error)
