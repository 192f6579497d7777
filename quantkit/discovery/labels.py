"""Labels: which channel's scale each element of a tensor carries, and to which power.

A label is an integer tensor: 0 for an element that no scale touches, `ANY` for one that is zero whatever the scale,
else a code of (channel, power), where the value is `base / s[channel] ** power`. Where a label is the same along an
axis, that axis may have size 1.

Labels are found by trying: each channel gets powers of two as scales (its signature, one exponent a round). Powers of
two are exact in floating point, so that an operation which keeps scales gives the base's own digits with other
exponents, and the exponents spell the channel. In one round every channel is multiplied by 512 or more, so that a clamp
shows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.discovery.trace import Slot

UNSCALED, ANY = 0, -1
_POWERS = 16
_FIRST, _DIGITS = 4, 16
TOLERANCE = 2.0**-16
"""How far from a power of two a ratio may be, for operations that sum in another order when values change."""


def encode(channel: Tensor, power: int) -> Tensor:
    """Codes of channels (untouched ones are negative) at one power."""
    return torch.where(channel < 0, UNSCALED, (channel + 1) * _POWERS + power + _POWERS // 2)


def channel_of(codes: Tensor) -> Tensor:
    """The channel of each code, -1 where there is none."""
    return torch.where(codes > 0, codes // _POWERS - 1, -1)


def power_of(codes: Tensor) -> Tensor:
    """The power of each code, 0 where there is none."""
    return torch.where(codes > 0, codes % _POWERS - _POWERS // 2, 0)


def opposite(codes: Tensor) -> Tensor:
    """The codes that undo these: the same channels, opposite powers."""
    return torch.where(codes > 0, codes - 2 * power_of(codes), codes)


def channels_in(*labels: Tensor) -> set[int]:
    """Every channel that occurs."""
    found: set[int] = set()
    for label in labels:
        found.update(channel_of(torch.unique(label[label > 0])).tolist())
    return found


def collapse(label: Tensor, *axes: int) -> Tensor | None:
    """The label with size 1 along some axes, or None if it isn't the same along them (`ANY` agrees with everything)."""
    axes = tuple(axis % label.ndim for axis in axes)
    if not axes or all(label.size(axis) == 1 for axis in axes):
        return label
    if label.numel() == 0:
        shape = [1 if i in axes else n for i, n in enumerate(label.shape)]
        return torch.full(shape, ANY)
    high = label.amax(axes, keepdim=True)
    low = torch.where(label == ANY, torch.iinfo(label.dtype).max, label).amin(axes, keepdim=True)
    return high if bool(((high == ANY) | (high == low)).all()) else None


def compact(label: Tensor) -> Tensor:
    """The label with size 1 along every axis where it doesn't change."""
    for axis in range(label.ndim):
        smaller = collapse(label, axis)
        label = label if smaller is None else smaller
    return label


def positions(slot: Slot, parameter: Tensor, axis: int) -> Tensor:
    """For each element of a view of a parameter its position along one of the parameter's axes, compacted."""
    stride, size = parameter.stride(axis), parameter.size(axis)
    shape = [1] * len(slot.size)
    start = slot.offset - int(parameter.storage_offset())
    if stride == 0 or size == 1:
        return torch.zeros(shape, dtype=torch.int64)
    period = stride * size
    steps = [(i, n, step) for i, (n, step) in enumerate(zip(slot.size, slot.stride, strict=True)) if n > 1]
    steps = [(i, n, step) for i, n, step in steps if step % period]  # the others move by whole turns
    inner = sum((n - 1) * step for _, n, step in steps if step < stride)
    if start % stride + inner < stride:  # those don't leave the position
        steps = [(i, n, step) for i, n, step in steps if step >= stride]
    index = torch.full(shape, start, dtype=torch.int64)
    for i, n, step in steps:
        line = torch.arange(n) * step
        index = index + line.view([n if j == i else 1 for j in range(len(shape))])
    return (index // stride) % size


@dataclass(frozen=True)
class Signatures:
    """The exponents [rounds, channels] that spell each channel's number."""

    exponents: Tensor

    @classmethod
    def of(cls, channels: int) -> "Signatures":
        """The shortest signatures that tell some channels apart."""
        number = torch.arange(channels)
        rows = [-(9 + 2 * (number % _FIRST))]
        rest, capacity = number // _FIRST, _FIRST
        while capacity < channels:
            rows.append(2 * (rest % _DIGITS) - (_DIGITS - 1))
            rest, capacity = rest // _DIGITS, capacity * _DIGITS
        return cls(torch.stack(rows))

    @property
    def rounds(self) -> int:
        """How many trials tell all channels apart."""
        return self.exponents.size(0)

    def scaled(self, value: Tensor, label: Tensor, turn: int) -> Tensor:
        """The value with every element divided by its scale in one round."""
        exponent = self.exponents[turn][channel_of(label).clamp(min=0)] * power_of(label)
        return value * torch.exp2(-exponent.to(torch.float32)).to(value.real.dtype)

    def spell(self, base: Tensor, tried: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The label of a result, and where it has none, from its base value and its value in every round."""
        exponents, blank, dirty = [], torch.ones_like(base, dtype=torch.bool), torch.zeros_like(base, dtype=torch.bool)
        for value in tried:
            ratio = base.double() / value.double()
            number = torch.isfinite(ratio) & (ratio > 0)
            exponent = torch.where(number, ratio.abs(), 1.0).log2().round()
            near = (ratio * torch.exp2(-exponent) - 1).abs() <= TOLERANCE
            same = (base == value) | (base.isnan() & value.isnan())  # zeros and infinities tell nothing
            blank &= same & ~number
            dirty |= ~(number & near) & ~same
            exponents.append(torch.where(number, exponent, 0.0).to(torch.int64))
        label, known = self._read(torch.stack(exponents))
        return torch.where(blank, ANY, label), (dirty | ~known) & ~blank

    def _read(self, exponents: Tensor) -> tuple[Tensor, Tensor]:
        """The codes that some exponents [rounds, ...] spell, and where they spell one."""
        if not bool(exponents.any()):
            return torch.zeros_like(exponents[0]), torch.ones_like(exponents[0], dtype=torch.bool)
        # The first round's exponents are odd and negative at power 1, so they tell the power.
        power = -exponents[0].sign() * torch.where(exponents[0] % 2 == 1, 1, 2)
        digits = exponents * power.sign() // power.abs().clamp(min=1)
        channel = (-digits[0] - 9) // 2
        valid = (power != 0) & (channel >= 0) & (channel < _FIRST)
        for i, digit in enumerate(digits[1:]):
            channel = channel + (digit + _DIGITS - 1) // 2 * (_FIRST * _DIGITS**i)
        valid &= (channel >= 0) & (channel < self.exponents.size(1))
        channel = torch.where(valid, channel, 0)
        valid &= (self.exponents[(slice(None), channel)] * power == exponents).all(0)
        label = torch.where(valid, (channel + 1) * _POWERS + power + _POWERS // 2, UNSCALED)
        return label, valid | (exponents == 0).all(0)
