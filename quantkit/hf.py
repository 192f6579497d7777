"""Importing this registers quantkit's own format with transformers, so that `AutoModelForCausalLM` loads it.

The same quantizer serves `quantkit.load` for every format that quantkit reads.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from quantkit_kernels.formats import FLOAT_DTYPES
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantkit import formats
from quantkit.checkpoint import linears
from quantkit.errors import CheckpointError
from quantkit.modules import QuantizedLinear

_WRAPPED = "stored"


@register_quantization_config(formats.native.NAME)
class QuantkitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A checkpoint's `quantization_config`, kept as it stands on disk.

    Args:
        stored: the `quantization_config` itself.
        backend: which implementation of the ops to use; not part of the checkpoint.
    """

    def __init__(self, stored: dict[str, Any], backend: str = "auto") -> None:
        self.quant_method = formats.native.NAME
        self.backend = backend
        self.stored = stored

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config object of config.json's entry, or of what `wrapped` made of one."""
        wrapper = config_dict.get(_WRAPPED)
        config = cls(dict(config_dict)) if wrapper is None else cls(wrapper, config_dict["backend"])
        return (config, kwargs) if return_unused_kwargs else config

    @staticmethod
    def wrapped(stored: dict[str, Any], backend: str) -> dict[str, Any]:
        """A config entry that makes transformers use this quantizer for a checkpoint of any format quantkit reads."""
        return {"quant_method": formats.native.NAME, "backend": backend, _WRAPPED: stored}

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json: exactly what was there."""
        return copy.deepcopy(self.stored)

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`."""
        return self.to_dict()


@register_quantizer(formats.native.NAME)
class QuantkitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts QuantizedLinear modules into a model before its weights are loaded."""

    requires_calibration = True

    def __init__(self, quantization_config: QuantkitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        layout = formats.of_config(quantization_config.stored, "the checkpoint")
        self.format = layout.NAME
        self.parsed = layout.parse(quantization_config.stored)
        self.stored_names: set[str] = set()

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # By name: a model keeps its quantizer, and a copy of the model can hold a name, but no module.
        layout = formats.FORMATS[self.format]
        replace_linears(model, layout, self.parsed, self.quantization_config.backend)
        self.stored_names = {f"{name}.{leaf}" for name, layer in quantized_layers(model) for leaf in layer.stored}
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """None (as stored) for what a QuantizedLinear stores; the model's dtype for the rest."""
        names = getattr(converter, "target_patterns", None) or []
        if self.stored_names.intersection(names):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, layer in quantized_layers(model):
            for leaf, spec in layer.stored.items():
                buffer = layer.get_buffer(leaf)
                right = buffer.dtype in FLOAT_DTYPES if leaf.endswith("scale") else buffer.dtype == spec.dtype
                if not right or tuple(buffer.shape) != spec.shape:
                    raise CheckpointError(
                        f"tensor '{name}.{leaf}' is {buffer.dtype} {list(buffer.shape)} where {spec.dtype} "
                        f"{list(spec.shape)} is expected; the files and their quantization_config don't belong "
                        "together: download both again"
                    )
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """Whether save_pretrained works: yes, it writes what was loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: the ops have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Yes: every layer is one op with a schema and a fake."""
        return True


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Every QuantizedLinear by name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module


def replace_linears(model: nn.Module, layout: Any, parsed: formats.Layout, backend: str) -> None:
    """Put a QuantizedLinear, still without values, in place of every linear layer that has a scheme.

    Raises:
        CheckpointError: the config names no linear layer of this model.
    """
    found = 0
    for name, module in list(linears(model)):
        scheme = parsed.scheme_of(name)
        if scheme is None:
            continue
        with torch.device(module.weight.device):
            quantized = QuantizedLinear(
                module.in_features,
                module.out_features,
                scheme,
                layout,
                bias=module.bias is not None,
                dtype=module.weight.dtype,
                backend=backend,
            )
        model.set_submodule(name, quantized)
        found += 1
    if not found:
        raise CheckpointError("the checkpoint's quantization_config names no linear layer of this model")
