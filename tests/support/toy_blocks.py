"""A model of a few linear layers whose forward pass calls its blocks as it is told."""

from typing import Any

import torch
from quantkit_calibration.sequential import Calls, run_blocks
from torch import nn


class Toy(nn.Module):
    """A model whose forward pass calls its blocks as it is told; `told` is the indices, or a function of the input."""

    def __init__(self, told: Any, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks))
        self.head = nn.Linear(4, 2)
        self.told = told
        self.heads = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in self.told(x) if callable(self.told) else self.told:
            x = self.blocks[index](x)
        self.heads += 1
        return self.head(x)


def inputs(count: int = 2) -> list[dict[str, Any]]:
    return [{"x": torch.full((3, 4), float(number))} for number in range(count)]


def run_toy(toy: Toy, **options: Any) -> list[tuple[int, int, bool]]:
    """The visits: index, number, last."""
    visits: list[tuple[int, int, bool]] = []

    def visit(index: int, calls: Calls) -> nn.Module:
        visits.append((index, calls.number, calls.last))
        return toy.blocks[index]

    run_blocks(toy, list(toy.blocks), inputs(), visit, **options)
    return visits
