"""LoRA through peft, for weights with zeros too: what is added to a pruned weight is zero where the weight is.

    y = (W + M · (alpha / r) B A) x        (Hu et al. 2021, arXiv:2106.09685; M is 0 where W is pruned)

The product B A is therefore made before it meets x where a layer has a mask, and merging it adds what was trained.
"""

from typing import Any

import torch
from torch import nn

from quantkit.checkpoint import is_usual_linear
from quantkit.errors import QuantkitError
from quantkit.linears import linear_modules
from quantkit.recovery.zeros import Masks

ALPHA = 2
"""LoRA's alpha over its rank."""

WITHIN = "base_model.model."
"""What peft puts before the names of a model's modules."""


def require_peft() -> Any:
    """The module peft, or QuantkitError where it isn't installed."""
    try:
        import peft
    except ImportError as error:
        raise QuantkitError(
            f"--lora takes peft, which cannot be imported ({error}); pip install 'quantkit[recover]'"
        ) from error
    return peft


def add_lora(model: nn.Module, rank: int, masks: Masks, seed: int, head: str | None) -> tuple[Any, list[str]]:
    """The model in peft's wrapper, and the names of the linear layers that got LoRA; all else is frozen.

    Linear layers of a class that peft doesn't know (and experts that lie together in one parameter) get none, nor does
    the layer that makes the logits.

    Raises:
        QuantkitError: peft isn't installed, or no layer is left.
    """
    peft = require_peft()
    names, transposed = [], False
    for name, module, _, _, turned in linear_modules(model):
        if name != head and (isinstance(module, nn.Linear) or is_usual_linear(module)):
            names.append(name)
            transposed = transposed or (turned and not isinstance(module, nn.Linear))
    if not names:
        raise QuantkitError("--lora finds no linear layer of a class that peft knows; leave it out")
    config = peft.LoraConfig(
        r=rank, lora_alpha=ALPHA * rank, target_modules=names, fan_in_fan_out=transposed, task_type="CAUSAL_LM"
    )
    kinds = {type(model.get_submodule(name)) for name in names}
    config._register_custom_module(dict.fromkeys(kinds, _masked_linear()))
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, config)
    for name in names:
        zeros = masks.zeros.get(f"{name}.weight")
        wrapped.get_submodule(WITHIN + name).keep_zeros(zeros)
    return wrapped, names


def merged(wrapped: Any) -> nn.Module:
    """The model with what was trained added to its weights."""
    model: nn.Module = wrapped.merge_and_unload()
    return model


def _masked_linear() -> type[nn.Module]:
    """The class of peft's LoRA layers whose weights may have zeros that stay."""
    from peft.tuners.lora import Linear

    class MaskedLinear(Linear):  # type: ignore[misc]
        """A LoRA layer; where its weight is pruned, what is added to it is zero."""

        def keep_zeros(self, zeros: torch.Tensor | None) -> None:
            """Take the weight's zeros, or None where it has none to keep."""
            self.register_buffer("zeros", zeros, persistent=False)

        def get_delta_weight(self, adapter: str) -> torch.Tensor:
            """What is added to the weight."""
            delta: torch.Tensor = super().get_delta_weight(adapter)
            return delta if self.zeros is None else delta.masked_fill(self.zeros, 0.0)

        def forward(self, x: torch.Tensor, *arguments: Any, **words: Any) -> torch.Tensor:
            """The layer's output."""
            if self.zeros is None or self.merged or self.disable_adapters:
                return super().forward(x, *arguments, **words)  # type: ignore[no-any-return]
            weight = self.base_layer.weight
            for adapter in self.active_adapters:
                weight = weight + self.get_delta_weight(adapter)
            return torch.func.functional_call(self.base_layer, {"weight": weight}, (x,))  # type: ignore[no-any-return]

    return MaskedLinear
