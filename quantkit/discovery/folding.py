"""Folds: the arithmetic of scaling the parameters of a group. Pure functions."""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.discovery.structure import Edit, Group


def apply_group(parameters: Mapping[str, Tensor], group: Group, s: Tensor) -> dict[str, Tensor]:
    """New values of every parameter of a group under scales `s` [channels], in each parameter's dtype.

    Producers are divided, consumers multiplied: `(w + offset) * s ** power - offset` in float32, rounded once. The
    given tensors are left alone.
    """
    changed: dict[str, Tensor] = {}
    for edit in (*group.producers, *group.consumers):
        value = changed.get(edit.parameter, parameters[edit.parameter])
        changed[edit.parameter] = apply_edit(value, edit, s)
    return changed


def apply_edit(value: Tensor, edit: Edit, s: Tensor) -> Tensor:
    """The new value of one parameter."""
    channels = torch.tensor(edit.channels, device=value.device)
    factor = s.to(value.device, torch.float32)[channels.clamp(min=0)].pow(edit.power)
    factor = torch.where(channels < 0, 1.0, factor)
    factor = factor.view([-1 if axis == edit.axis % value.ndim else 1 for axis in range(value.ndim)])
    if not edit.offset:
        return (value.float() * factor).to(value.dtype)
    return ((value.float() + edit.offset) * factor - edit.offset).to(value.dtype)


def channel_absmax(values_along_axis: Tensor, edit: Edit, channels: int) -> Tensor:
    """The largest magnitude [channels] of each channel over the positions [n] of an edit's axis that carry it.

    0 for a channel that no position carries; float32.
    """
    place = torch.tensor(edit.channels, device=values_along_axis.device)
    used = place >= 0
    result = torch.zeros(channels, device=values_along_axis.device)
    return result.scatter_reduce(0, place[used], values_along_axis.abs().float()[used], "amax")
