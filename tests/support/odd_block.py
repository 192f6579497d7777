"""A decoder block as nobody names it: parallel branches, a norm by `1 + weight`, fused and raw parameters."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, HEAD, EXPERTS, INNER = 32, 4, 8, 4, 24


class PlusOne(nn.Module):
    """A norm that multiplies by `1 + flair`."""

    def __init__(self) -> None:
        super().__init__()
        self.flair = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + self.flair)


class Chooser(nn.Module):
    """A router [in, E] and experts [E, in, 2 inner] (gate and up taking turns), [E, inner, out], all raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.taste = nn.Parameter(torch.zeros(WIDTH, EXPERTS))
        self.wide = nn.Parameter(torch.zeros(EXPERTS, WIDTH, 2 * INNER))
        self.narrow = nn.Parameter(torch.zeros(EXPERTS, INNER, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, chosen = torch.topk((flat @ self.taste).softmax(-1), 2)
        result = torch.zeros_like(flat)
        for expert in range(EXPERTS):
            token, place = torch.where(chosen == expert)
            both = flat[token] @ self.wide[expert]
            inner = F.silu(both[:, ::2]) * both[:, 1::2]
            result.index_add_(0, token, weights[token, place, None] * (inner @ self.narrow[expert]))
        return result.view_as(x)


class OddBlock(nn.Module):
    """`x + attention(a) + mlp(a)` with one norm for both branches, then experts behind a LayerNorm with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = PlusOne()
        self.mixed = nn.Linear(WIDTH, 3 * WIDTH)  # rows [heads, (q, k, v), head]
        self.back = nn.Linear(WIDTH, WIDTH, bias=False)
        self.swell = nn.Linear(WIDTH, INNER)
        self.shrink = nn.Linear(INNER, WIDTH)
        self.beta = nn.LayerNorm(WIDTH)
        self.chooser = Chooser()

    def forward(self, hidden: Tensor, rotation: Tensor | None = None) -> tuple[Tensor]:
        a = self.alpha(hidden)
        batch, length, _ = hidden.shape
        q, k, v = self.mixed(a).view(batch, length, HEADS, 3, HEAD).transpose(1, 2).unbind(3)
        seen = (q @ k.transpose(-1, -2) / HEAD**0.5).softmax(-1) @ v
        attention = self.back(seen.transpose(1, 2).reshape(batch, length, WIDTH))
        hidden = hidden + attention + self.shrink(F.relu(self.swell(a)))
        return (hidden + self.chooser(self.beta(hidden)),)
