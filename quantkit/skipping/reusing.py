"""The neurons of the last tokens, reused for the next ones: aggregated sparsity (arXiv:2310.04564, section 5.1).

Off by default, since it changes what a model says. After a prompt, and after every second run of G tokens from then on,
each MLP with zeros keeps to the neurons that were active in the G tokens before, for G tokens. All others are zero, so
that their weights aren't needed, neither in the layer that has zeros before it nor in those that make them. The
weights of the neurons that are kept are copied once for these G tokens. In between G tokens run in full, whose neurons
are the next ones to be kept.

`reusing` does so while a model generates; `as_if_reused` gives in one pass over a text what the model would have given
token by token, to measure what it costs.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from quantkit_kernels.formats import dequantize
from torch import Tensor, nn

from quantkit.errors import QuantkitError
from quantkit.modules import QuantizedLinear
from quantkit.skipping import WEIGHTS_ALONE, Found, counts_of, orientation_of, sparse_inputs


@dataclass
class Reused:
    """What was reused: of single tokens, the neurons that MLPs have, those that were kept, and how many tokens."""

    neurons: int = 0
    kept: int = 0
    tokens: int = 0

    @property
    def share(self) -> float:
        """The share of the neurons whose weights were used, of tokens that reused them."""
        return self.kept / self.neurons if self.neurons else 1.0


@dataclass
class _Set:
    """The active neurons of one MLP.

    Attributes:
        run: G.
        report: what is reused.
        reuses: whether the next tokens keep to `chosen`.
        done: tokens of this run so far.
        used: [K], the neurons that were active in it; while it reuses, those that are kept.
        chosen: their numbers.
        rows: the weights of these neurons, and their biases, of each layer that makes them; by id.
    """

    run: int
    report: Reused
    reuses: bool = False
    done: int = 0
    used: Tensor | None = None
    chosen: Tensor | None = None
    rows: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def after_prompt(self, active: Tensor) -> None:
        """Take the neurons of the last tokens of a prompt: [..., M, K], whether each is active."""
        self._keep(active[..., -self.run :, :].reshape(-1, active.shape[-1]).any(0))

    def next(self, x: Tensor, active: Tensor) -> Tensor:
        """What a token's x [..., 1, K] is to be; `active` says where it isn't zero. The token is counted."""
        active = active.reshape(-1, x.shape[-1]).any(0)
        self.done += 1
        if not self.reuses or self.used is None:
            self.used = active if self.used is None else self.used | active
            if self.done == self.run:
                self._keep(self.used)
            return x
        self.report.neurons += x.shape[-1]
        self.report.kept += 0 if self.chosen is None else len(self.chosen)
        self.report.tokens += 1
        x = x * self.used
        if self.done == self.run:
            self.reuses, self.done, self.used, self.chosen = False, 0, None, None
            self.rows.clear()
        return x

    def _keep(self, used: Tensor) -> None:
        self.reuses, self.done, self.used = True, 0, used
        self.chosen = used.nonzero().view(-1)
        self.rows.clear()


def check_run(tokens: int) -> None:
    """Return nothing; raise QuantkitError for a run that isn't at least a token long."""
    if tokens < 1:
        raise QuantkitError(f"reuse_neurons is {tokens}: expected a number of tokens from 1, or 0 to reuse none")


@contextmanager
def reusing(model: nn.Module, tokens: int) -> Iterator[Reused]:
    """While it lasts, generation with the model's key-value cache reuses active neurons for so many tokens at a time.

    A pass over several tokens is a prompt: it runs in full, and the neurons of its last tokens are kept first.

    Raises:
        QuantkitError: `tokens` isn't positive, or no layer of the model has zeros before it.
    """
    check_run(tokens)
    report = Reused()
    with ExitStack() as stack:
        for each in _found(model):
            kept, down = _Set(tokens, report), model.get_submodule(each.name)
            stack.callback(down.register_forward_pre_hook(_keeping(kept)).remove)
            for name in each.feeders:
                layer = model.get_submodule(name)
                if isinstance(layer, QuantizedLinear) and layer.op not in WEIGHTS_ALONE:
                    continue  # what it gives is zeroed instead
                layer.forward = _of_the_kept(layer, kept)  # type: ignore[method-assign]
                stack.callback(layer.__dict__.pop, "forward")
        yield report


@contextmanager
def as_if_reused(model: nn.Module, tokens: int) -> Iterator[Reused]:
    """While it lasts, a pass over texts gives what `reusing` would give token by token, the first tokens in full.

    Tokens 0 to G - 1 run in full, G to 2 G - 1 reuse their neurons, and so on; each text of a batch has its own.

    Raises:
        QuantkitError: `tokens` isn't positive, or no layer of the model has zeros before it.
    """
    check_run(tokens)
    report = Reused()

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        kept = kept_of(counts_of(module, x).reshape(-1, *x.shape[-2:]), tokens).view(x.shape)
        runs = torch.arange(x.shape[-2], device=x.device) // tokens % 2 == 1
        some = kept[..., runs, :]
        report.neurons += some.numel()
        report.kept += int(some.sum())
        report.tokens += some.shape[:-1].numel()
        return (x * kept, *args[1:])

    with ExitStack() as stack:
        for each in _found(model):
            layer = model.get_submodule(each.name)
            stack.callback(layer.register_forward_pre_hook(before).remove)
        yield report


def kept_of(active: Tensor, tokens: int) -> Tensor:
    """Which of [B, M, K] numbers aren't made zero: all in even runs of tokens, in odd ones those of active neurons."""
    batch, length, neurons = active.shape
    active = F.pad(active, (0, 0, 0, -length % (2 * tokens))).view(batch, -1, 2, tokens, neurons)
    kept = torch.ones_like(active)
    kept[:, :, 1] = active[:, :, 0].any(2, keepdim=True)
    return kept.view(batch, -1, neurons)[:, :length]


def _found(model: nn.Module) -> list[Found]:
    """The layers with zeros before them."""
    found = sparse_inputs(model)
    if not found:
        raise QuantkitError(
            "no linear layer of this model is given zeros often enough: there are no inactive neurons; make some with "
            "the relu step first"
        )
    return found


def _keeping(kept: _Set) -> Any:
    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0]
        active = counts_of(module, x)
        if not _is_step(x):
            kept.after_prompt(active)
            return None
        return (kept.next(x, active), *args[1:])

    return before


def _is_step(x: Tensor) -> bool:
    """Whether x [..., M, K] is one token of each text, and not a prompt."""
    return x.ndim < 2 or x.shape[-2] == 1


def _of_the_kept(layer: Any, kept: _Set) -> Any:
    """The layer's forward, which computes neurons that are kept and leaves the others 0."""

    def forward(x: Tensor) -> Tensor:
        if not kept.reuses or not _is_step(x) or kept.chosen is None:
            return type(layer).forward(layer, x)  # type: ignore[no-any-return]
        if id(layer) not in kept.rows:
            kept.rows[id(layer)] = _rows(layer, kept.chosen, x.dtype)
        weight, bias = kept.rows[id(layer)]
        out = x.new_zeros((*x.shape[:-1], layer_width(layer)))
        return out.index_copy_(-1, kept.chosen, F.linear(x, weight, bias))

    return forward


def layer_width(layer: Any) -> int:
    """N, the out features of a linear layer."""
    if isinstance(layer, QuantizedLinear):
        return layer.out_features
    return int(layer.weight.shape[1 if orientation_of(layer) == "in_out" else 0])


def _rows(layer: Any, chosen: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The weights [R, K] of some neurons, decoded to the dtype where they are packed, and their biases."""
    bias = layer._parameters.get("bias")
    bias = None if bias is None else bias.index_select(0, chosen).to(dtype)
    if isinstance(layer, QuantizedLinear):
        codes, scale = layer.codes_and_scale()
        rows = dequantize(codes.index_select(0, chosen), layer._by_row(scale).index_select(0, chosen))
        return rows.to(dtype), bias
    weight = layer.weight.t() if orientation_of(layer) == "in_out" else layer.weight
    return weight.index_select(0, chosen), bias
