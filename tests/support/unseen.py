"""A causal language model that no table of architectures knows, written as somebody's own code in a model's folder.

Attention and a gated feed-forward read one norm side by side; behind another stands a mixture whose router and experts
are raw parameters. No name says what a thing is.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class DriftConfig(PreTrainedConfig):
    """Sizes, under names of its own."""

    model_type = "drift"

    def __init__(
        self,
        vocab_size: int = 260,
        breadth: int = 48,
        storeys: int = 2,
        voices: int = 4,
        choirs: int = 2,
        swell: int = 80,
        guilds: int = 4,
        guild_size: int = 40,
        reach: int = 64,
        fused: bool = False,
        tie_word_embeddings: bool = False,
        **more: Any,
    ) -> None:
        self.vocab_size, self.breadth, self.storeys = vocab_size, breadth, storeys
        self.voices, self.choirs, self.swell = voices, choirs, swell
        self.guilds, self.guild_size, self.reach, self.fused = guilds, guild_size, reach, fused
        super().__init__(tie_word_embeddings=tie_word_embeddings, **more)


class Flair(nn.Module):
    """A norm that multiplies by `1 + weight`."""

    def __init__(self, breadth: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(breadth))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)


class Turned(nn.Module):
    """A linear layer whose weight is [in, out]."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inside, outside))
        self.bias = nn.Parameter(torch.zeros(outside))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Gaze(nn.Module):
    """Causal attention, step by step or fused: queries, keys and values from one weight, fewer values than queries."""

    def __init__(self, config: DriftConfig) -> None:
        super().__init__()
        self.voices, self.choirs, self.pitch = config.voices, config.choirs, config.breadth // config.voices
        self.fused = config.fused
        self.braid = nn.Linear(config.breadth, (config.voices + 2 * config.choirs) * self.pitch)
        self.home = Turned(config.breadth, config.breadth)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, breadth = x.shape
        sizes = [self.voices * self.pitch, self.choirs * self.pitch, self.choirs * self.pitch]
        q, k, v = (
            part.view(batch, length, -1, self.pitch).transpose(1, 2) for part in self.braid(x).split(sizes, dim=-1)
        )
        if self.fused:
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.home(seen.transpose(1, 2).reshape(batch, length, breadth))
        k, v = (part.repeat_interleave(self.voices // self.choirs, dim=1) for part in (k, v))
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(-1, -2) / self.pitch**0.5).masked_fill(future, float("-inf"))
        seen = scores.softmax(-1) @ v
        return self.home(seen.transpose(1, 2).reshape(batch, length, breadth))


class Tide(nn.Module):
    """A gated feed-forward."""

    def __init__(self, config: DriftConfig) -> None:
        super().__init__()
        self.sluice = nn.Linear(config.breadth, config.swell, bias=False)
        self.flood = nn.Linear(config.breadth, config.swell, bias=False)
        self.ebb = Turned(config.swell, config.breadth)

    def forward(self, x: Tensor) -> Tensor:
        return self.ebb(F.silu(self.sluice(x)) * self.flood(x))


class Market(nn.Module):
    """A router [E, H] and experts [E, 2 I, H] (gate above up) and [E, I, H] (in x out), all raw parameters."""

    def __init__(self, config: DriftConfig) -> None:
        super().__init__()
        self.taste = nn.Parameter(torch.zeros(config.guilds, config.breadth))
        self.wide = nn.Parameter(torch.zeros(config.guilds, 2 * config.guild_size, config.breadth))
        self.narrow = nn.Parameter(torch.zeros(config.guilds, config.guild_size, config.breadth))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        shares, chosen = torch.topk((flat @ self.taste.t()).softmax(-1), 2)
        result = torch.zeros_like(flat)
        for guild in range(len(self.taste)):
            token, place = torch.where(chosen == guild)
            gate, up = F.linear(flat[token], self.wide[guild]).chunk(2, dim=-1)
            result.index_add_(0, token, shares[token, place, None] * ((F.silu(gate) * up) @ self.narrow[guild]))
        return result.view_as(x)


class Storey(nn.Module):
    """`h = x + gaze(a) + tide(a)` with `a = flair(x)`, and then `h + market(poise(h))`."""

    def __init__(self, config: DriftConfig) -> None:
        super().__init__()
        self.flair = Flair(config.breadth)
        self.gaze, self.tide = Gaze(config), Tide(config)
        self.poise = nn.LayerNorm(config.breadth)
        self.market = Market(config)

    def forward(self, x: Tensor) -> Tensor:
        a = self.flair(x)
        h = x + self.gaze(a) + self.tide(a)
        return h + self.market(self.poise(h))


class DriftPreTrainedModel(PreTrainedModel):
    """What transformers wants to know."""

    config_class = DriftConfig
    base_model_prefix = "house"


class DriftModel(DriftPreTrainedModel):
    """Embeddings of tokens and places, storeys, a norm."""

    def __init__(self, config: DriftConfig) -> None:
        super().__init__(config)
        self.sounds = nn.Embedding(config.vocab_size, config.breadth)
        self.places = nn.Embedding(config.reach, config.breadth)
        self.storeys = nn.ModuleList(Storey(config) for _ in range(config.storeys))
        self.roof = Flair(config.breadth)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.sounds

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.sounds = value

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.sounds(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for storey in self.storeys:
            x = storey(x)
        return self.roof(x)


class DriftForCausalLM(DriftPreTrainedModel):
    """The model with a layer that makes the logits."""

    _tied_weights_keys = {"speech.weight": "house.sounds.weight"}  # noqa: RUF012

    def __init__(self, config: DriftConfig) -> None:
        super().__init__(config)
        self.house = DriftModel(config)
        self.speech = nn.Linear(config.breadth, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.house.sounds

    def get_output_embeddings(self) -> nn.Module:
        return self.speech

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.speech = value

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        return CausalLMOutput(logits=self.speech(self.house(input_ids)))
