"""Random weights for a trace: a block whose real weights aren't there shows its data flow all the same."""

import torch
from torch import nn


def randomize_(module: nn.Module, generator: torch.Generator) -> None:
    """Fill every parameter of a module with random numbers that keep activations near one; buffers are left alone.

    Matrices get a standard deviation of 1 / sqrt(features), the geometric mean of their last two axes standing for the
    features, since either axis may be the input. Vectors are 0.5 ± 0.1: whatever they are (a gain, `1 + gain`, a bias,
    the logarithm of a decay), that is neither 0 nor 1 and breaks nothing. What the parameters held isn't looked at.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim > 1:
                parameter.mul_((parameter.size(-1) * parameter.size(-2)) ** -0.25)
            else:
                parameter.clamp_(-4, 4).mul_(0.1).add_(0.5)
