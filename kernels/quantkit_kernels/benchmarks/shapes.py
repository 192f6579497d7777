"""Linear layers of known models, as data, and what a user may write instead of a model's name."""

from collections.abc import Iterable
from dataclasses import dataclass

from quantkit_kernels.errors import KernelError


@dataclass(frozen=True)
class Shape:
    """A linear layer with N out features and K in features; with experts, that of each of them in one call.

    Attributes:
        name: what it is in a model, or N x K.
        out_features: N.
        in_features: K.
        experts: how many experts have a weight of this shape; 0 for a plain layer.
        top: experts that a token goes through.
    """

    name: str
    out_features: int
    in_features: int
    experts: int = 0
    top: int = 0

    def __str__(self) -> str:
        size = f"{self.out_features} x {self.in_features}"
        each = f", {self.experts} experts, {self.top} a token" if self.experts else ""
        return f"{self.name}: {size}{each}" if self.name else size + each


def _attention(hidden: int, queries: int, keys: int) -> dict[str, tuple[int, int]]:
    """Return the layers of an attention by name, as transformers has them and with q, k and v in one as servers do."""
    return {
        "q": (queries, hidden),
        "k, v": (keys, hidden),
        "o": (hidden, queries),
        "q, k and v in one": (queries + 2 * keys, hidden),
    }


def _mlp(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    """Return the layers of a gated MLP by name, as transformers has them and with gate and up in one."""
    return {"gate, up": (inner, hidden), "down": (hidden, inner), "gate and up in one": (2 * inner, hidden)}


MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "Llama-3-8B": {**_attention(4096, 4096, 1024), **_mlp(4096, 14336)},
    "Llama-3-70B": {**_attention(8192, 8192, 1024), **_mlp(8192, 28672)},
    "Qwen3-32B": {**_attention(5120, 8192, 1024), **_mlp(5120, 25600)},
    "Mixtral-8x7B": _attention(4096, 4096, 1024),
}
"""Layers (N, K) of each model. The sizes are those of the models' published configs."""

EXPERTS: dict[str, tuple[dict[str, tuple[int, int]], int, int]] = {"Mixtral-8x7B": (_mlp(4096, 14336), 8, 2)}
"""Layers (N, K) of each expert, the number of experts, and of those that a token goes through."""


def of_model(name: str) -> list[Shape]:
    """Return the layers of a model in `MODELS`, each shape once, under the names of all layers that have it."""
    names: dict[tuple[int, int], list[str]] = {}
    for layer, size in MODELS[name].items():
        names.setdefault(size, []).append(layer)
    found = [Shape(f"{name} {'; '.join(layers)}", *size) for size, layers in names.items()]
    layers, experts, top = EXPERTS.get(name, ({}, 0, 0))
    return found + [Shape(f"{name} experts' {layer}", *size, experts, top) for layer, size in layers.items()]


def parsed(words: Iterable[str]) -> list[Shape]:
    """Return the shapes that the words mean, each once: a model's name, NxK, or NxKxE for E experts, 2 a token.

    Raises:
        KernelError: for a word that is none of them.
    """
    found: dict[tuple[int, int, int], Shape] = {}
    known = {name.lower(): name for name in MODELS}
    for word in words:
        shapes = of_model(known[word.lower()]) if word.lower() in known else [_written(word)]
        for shape in shapes:
            found.setdefault((shape.out_features, shape.in_features, shape.experts), shape)
    return list(found.values())


def _written(word: str) -> Shape:
    """Return the shape that NxK or NxKxE says."""
    numbers = word.lower().split("x")
    if len(numbers) not in (2, 3) or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise KernelError(
            f"shape is {word!r}: expected a model ({', '.join(MODELS)}), NxK such as 4096x4096, or NxKxE for E experts"
        )
    out_features, in_features, *rest = map(int, numbers)
    experts = rest[0] if rest else 0
    return Shape("", out_features, in_features, experts, min(2, experts))
