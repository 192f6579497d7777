"""The arithmetic under discovery: folds, random weights, labels."""

import math
from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from quantkit.discovery import Edit, Group, apply_group, channel_absmax, randomize_
from quantkit.discovery.labels import ANY, Signatures, channel_of, collapse, encode, positions, power_of
from quantkit.discovery.trace import Slot, record


def test_apply_group_is_the_formula() -> None:
    """Powers of two are exact, so that the result is the formula's, bit for bit; untouched positions stay."""
    parameters = {"gain": torch.tensor([0.5, -0.25, 3.0]), "bias": torch.randn(3), "weight": torch.randn(2, 5, 4)}
    group = Group(
        "gain",
        "norm",
        2,
        (Edit("gain", 0, (1, -1, 0), -1, 1.0), Edit("bias", 0, (1, -1, 0), -1)),
        (Edit("weight", 2, (0, -1, 1, 1), 2),),
    )
    before = {name: value.clone() for name, value in parameters.items()}
    changed = apply_group(parameters, group, torch.tensor([2.0, 4.0]))
    assert torch.equal(changed["gain"], torch.tensor([1.5 / 4 - 1, -0.25, 4.0 / 2 - 1]))
    assert torch.equal(changed["bias"], before["bias"] / torch.tensor([4.0, 1.0, 2.0]))
    assert torch.equal(changed["weight"], before["weight"] * torch.tensor([4.0, 1.0, 16.0, 16.0]))
    assert all(torch.equal(parameters[name], value) for name, value in before.items())


def test_apply_group_edits_one_parameter_along_two_axes() -> None:
    """Producer and consumer of one group may be the same parameter: both factors apply, in the parameter's dtype."""
    weight = torch.randn(3, 3).bfloat16()
    group = Group("w", "linear", 3, (Edit("w", 0, (0, 1, 2), -1),), (Edit("w", 1, (2, 1, 0), 1),))
    changed = apply_group({"w": weight}, group, torch.tensor([1.0, 2.0, 4.0]))["w"]
    factor = torch.tensor([4.0, 2.0, 1.0]) / torch.tensor([1.0, 2.0, 4.0])[:, None]
    assert changed.dtype == torch.bfloat16
    assert torch.equal(changed, (weight.float() * factor).bfloat16())


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=12), st.integers(0, 2**31))
def test_channel_absmax_is_a_loop(channels: list[int], seed: int) -> None:
    values = torch.randn(len(channels), generator=torch.Generator().manual_seed(seed))
    expected = [0.0] * 5
    for value, channel in zip(values.tolist(), channels, strict=True):
        if channel >= 0:
            expected[channel] = max(expected[channel], abs(value))
    found = channel_absmax(values, Edit("w", 0, tuple(channels), 1), 5)
    assert found.tolist() == expected


def test_randomize_looks_at_nothing_and_keeps_activations_near_one() -> None:
    linear, other = nn.Linear(256, 64), nn.Linear(256, 64)
    other.weight.data.fill_(math.nan)
    for module in (linear, other):
        randomize_(module, torch.Generator().manual_seed(0))
    assert torch.equal(linear.weight, other.weight)
    assert 0.5 < float(linear(torch.randn(100, 256)).detach().std()) < 2
    assert 0 < linear.bias.min().item() < linear.bias.max().item() < 1


@given(st.integers(1, 5000), st.sampled_from([1, 2, -1, -2]), st.integers(0, 2**31))
def test_signatures_spell_every_channel(channels: int, power: int, seed: int) -> None:
    """Scaling by signatures and reading them again gives the channel and power of every element."""
    generator = torch.Generator().manual_seed(seed)
    label = encode(torch.randint(-1, channels, (2, 7), generator=generator), power)
    value = torch.randn(2, 7, generator=generator)
    value[0, 0] = 0
    signatures = Signatures.of(channels)
    read, bad = signatures.spell(value, [signatures.scaled(value, label, turn) for turn in range(signatures.rounds)])
    label[0, 0] = ANY
    assert torch.equal(read, label)
    assert not bad.any()
    assert torch.equal(power_of(read[read > 0]), torch.full_like(read[read > 0], power))
    assert torch.equal(encode(channel_of(read), power)[read >= 0], read[read >= 0])


def test_signatures_are_not_fooled_by_other_ratios() -> None:
    signatures = Signatures.of(40)
    value, label = torch.rand(40) + 0.5, encode(torch.arange(40), 1)
    scaled = [signatures.scaled(value, label, turn) for turn in range(signatures.rounds)]
    for spoil in (
        lambda x: x + 0.01,
        lambda x: -x,
        lambda x: x * 1.001,
        torch.tanh,
        lambda x: x * 0,
        lambda x: x.roll(1),
    ):
        _, bad = signatures.spell(spoil(value), [spoil(x) for x in scaled[:1]] + scaled[1:])
        assert bad.any()


@given(st.data())
def test_positions_of_views(data: st.DataObject) -> None:
    """The positions along an axis of any view of a parameter are those of a view of the positions themselves."""
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    parameter = torch.zeros(4 + math.prod(shape))[4:].view(shape)
    axis = data.draw(st.integers(0, len(shape) - 1))
    expected = torch.arange(shape[axis]).view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)
    views: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.transpose(0, -1),
        lambda x: x[..., ::2],
        lambda x: x[1:],
        lambda x: x.unsqueeze(1).expand(-1, 3, *x.shape[1:]),
        lambda x: x.narrow(0, 0, 1).squeeze(0) if x.ndim > 1 else x,
        lambda x: x.unflatten(-1, (-1, 2)) if x.shape[-1] % 2 == 0 else x,
    ]
    view, number = parameter, expected.contiguous()
    for choice in data.draw(st.lists(st.sampled_from(views), max_size=3)):
        if view.numel():
            view, number = choice(view), choice(number)
    if not view.numel():
        return
    size, stride = tuple(view.shape), tuple(view.stride())
    slot = Slot(view, view, 0, size, stride, int(view.storage_offset()), "p", False, frozenset(("p",)))
    found = positions(slot, parameter, axis)
    assert torch.equal(found.expand(view.shape), number)


def test_collapse_lets_zeros_agree() -> None:
    label = torch.tensor([[20, ANY, 40], [20, 0, 40], [ANY, 0, 40]])
    assert torch.equal(collapse(label, 0), torch.tensor([[20, 0, 40]]))
    assert collapse(label, 1) is None
    assert torch.equal(collapse(torch.zeros(0, 3, dtype=torch.int64), 0), torch.full((1, 3), ANY))


class InPlace(nn.Module):
    """Changes a tensor, part of it, and reads it before and after."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        before = y * 2
        y[:, 1:] += 1
        return before - y.mul_(3)


def test_a_trace_holds_the_values_of_its_time() -> None:
    x = torch.randn(2, 3)
    trace = record(InPlace().eval(), [((x,), {})])
    ops = {op.name: op for op in trace.ops}
    first, last = (op for op in trace.ops if op.name == "mul")
    changed = torch.cat([x[:, :1], x[:, 1:] + 1], 1)
    assert torch.equal(first.slots[0].value, x)
    assert torch.equal(last.slots[0].value, changed)
    assert torch.equal(last.replay({})[0], changed * 3)
    assert torch.equal(last.slots[0].value, changed)
    assert torch.equal(ops["sub"].replay({})[0], x * 2 - changed * 3)
    assert {first.slots[0].storage} == {slot.storage for slot in (*ops["add"].results, *last.results)}
