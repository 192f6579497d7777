"""What came of a recovery: how much was read, how the loss fell, and what it did to perplexity."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Recovered:
    """What a training of a transformed model did.

    Attributes:
        dataset: the text's name.
        tokens: tokens that were read, those of every pass over the text.
        text_tokens: tokens that the text has in windows.
        steps: steps of the optimizer, each of `step_tokens` tokens.
        step_tokens: tokens of a step.
        seq_len: tokens of a window.
        processes: how many processes shared a step.
        precision: what products were computed in: `no` is float32.
        trained: how many numbers were trained.
        layers: how many linear layers LoRA was put on; 0 without it.
        original: the model whose predictions were imitated, or whose perplexity is held against; or None.
        distill: the share of the loss that is the divergence from it.
        zeros: which weights stayed zero: see `Masks.to_dict`.
        first_loss: the mean loss of the first twentieth of the steps.
        last_loss: that of the last.
        losses: some points of the curve: after how many tokens, and the mean loss since the point before.
        skipped: steps that fp16's loss scaling left out.
        perplexity: of the original, after the transform (`transformed`) and after recovery (`recovered`), with standard
            errors, the data set's name, the protocol and the tokens predicted; None without an evaluation.
        seconds: of the training alone.
        versions: of packages that take part in training alone.
    """

    dataset: str
    tokens: int
    text_tokens: int
    steps: int
    step_tokens: int
    seq_len: int
    processes: int
    precision: str
    trained: int
    layers: int
    original: str | None
    distill: float
    zeros: dict[str, Any]
    first_loss: float
    last_loss: float
    losses: list[tuple[int, float]]
    skipped: int = 0
    perplexity: dict[str, Any] | None = None
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def passes(self) -> float:
        """How often the text was read."""
        return self.tokens / self.text_tokens

    def lines(self) -> list[str]:
        """What was done and what it did, a line each."""
        what = f"{self.trained:,} numbers" + (f" of LoRA on {self.layers} linear layers" if self.layers else "")
        lines = [
            f"{what}, {self.tokens:,} tokens of {self.dataset} ({self.passes:.2f} passes) in {self.steps:,} steps, "
            f"loss {self.first_loss:.4f} -> {self.last_loss:.4f}, {self.seconds:.0f} s"
        ]
        if self.distill:
            lines.append(f"{self.distill:.0%} of the loss is the divergence from {self.original}")
        if self.zeros["parameters"]:
            patterns = ", ".join(f"{count} {pattern}" for pattern, count in self.zeros["patterns"].items())
            lines.append(f"{self.zeros['zeros']:,} zeros stayed zero ({patterns})")
        if self.perplexity is not None:
            lines.append(perplexity_line(self.perplexity))
        return lines


def perplexity_line(found: Mapping[str, Any]) -> str:
    """One line of the perplexities before and after."""

    def number(key: str, said: str) -> list[str]:
        error = found.get(f"{key}_stderr")
        spread = "" if error is None else f" ± {error:.4f}"
        return [] if found.get(key) is None else [f"{found[key]:.4f}{spread} {said}"]

    named = (("original", "of the original"), ("transformed", "after the transform"), ("recovered", "after recovery"))
    parts = [part for key, said in named for part in number(key, said)]
    return f"perplexity {', '.join(parts)}; {found['tokens']:,} tokens of {found['dataset']}"
