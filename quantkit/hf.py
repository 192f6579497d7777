"""Importing this registers quantkit's own format with transformers, so that `AutoModelForCausalLM` loads it.

The same quantizer serves `quantkit.load` for every format that quantkit reads.
"""

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from quantkit_kernels.formats import FLOAT_DTYPES
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantkit import activations, formats, slicing
from quantkit.checkpoint import output_head, tied_parameters
from quantkit.conversion import Merged, Weight, find_merged
from quantkit.errors import CheckpointError
from quantkit.experts import QuantizedExperts, put_experts, use_packed_experts
from quantkit.formats.places import misplaced
from quantkit.linears import linear_modules
from quantkit.modules import QuantizedLinear
from quantkit.scheme import Scheme
from quantkit.shards import DTYPES, TensorInfo

_WRAPPED = "stored"
_TOKEN = re.compile(r"quantkit:(\d+):")


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
    """Puts packed layers and experts into a model before its weights are loaded."""

    requires_calibration = True
    is_cut = False

    def __init__(self, quantization_config: QuantkitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        layout = formats.of_config(quantization_config.stored, "the checkpoint")
        self.format = layout.NAME
        self.parsed = layout.parse(quantization_config.stored)
        self.stored_names: set[str] = set()
        self.conversions = Conversions(())

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # By name: a model keeps its quantizer, and a copy of the model can hold a name, but no module.
        layout, tensors = formats.FORMATS[self.format], read_headers(kwargs.get("checkpoint_files") or ())
        self.conversions = put_layers(model, layout, self.parsed, tensors, self.quantization_config.backend)
        self.stored_names = {f"{name}.{leaf}" for name, layer in quantized_layers(model) for leaf in layer.stored}
        self.stored_names.update(name for name in tensors if name.rpartition(".")[2] in self.parsed.cache_scales)
        activations.apply(model, self.parsed.activations)
        merged = {name.rpartition(".")[0] for name in self.conversions.buffers}
        for name, layer in quantized_layers(model):
            layer.is_merged = name in merged
        return model

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Have packed layers cut as the plan says, where a model is spread over several ranks."""
        super().update_parallel_plan(model, plan)
        slicing.plan_slices(model, plan)

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """The model's own conversions, and ours around them."""
        return self.conversions.around(weight_conversions)

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """None (as stored) for what a packed layer stores; the model's dtype for the rest."""
        names = getattr(converter, "target_patterns", None) or []
        if isinstance(converter, _Packing) or self.stored_names.intersection(names):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self.is_cut = slicing.settle(model) > 0
        for name, layer in quantized_layers(model):
            for leaf, spec in layer.stored.items():
                buffer = layer.get_buffer(leaf)
                any_float = has_any_float(leaf, layer.scheme)
                right = buffer.dtype in FLOAT_DTYPES if any_float else buffer.dtype == spec.dtype
                if not right or tuple(buffer.shape) != spec.shape:
                    raise CheckpointError(
                        f"tensor '{name}.{leaf}' is {buffer.dtype} {list(buffer.shape)} where {spec.dtype} "
                        f"{list(spec.shape)} is expected; the files and their quantization_config don't belong "
                        "together: download both again"
                    )
            if "outlier_columns" in layer.stored:
                _check_columns(f"{name}.outlier_columns", layer.get_buffer("outlier_columns"), layer.in_features)
            for leaf in layer.stored:
                wrong = misplaced(leaf, layer.get_buffer(leaf), layer.scheme, layer.in_features)
                if wrong is not None:
                    raise CheckpointError(f"tensor '{name}.{leaf}' {wrong}; download the checkpoint again")
        use_packed_experts(model, GROUPED)
        whole: Any = model
        whole.is_quantized = not self.is_trainable  # so that a model in float may change its dtype, and be trained
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """Whether save_pretrained works: it writes what was loaded, if that is all of the model."""
        return not self.is_cut

    @property
    def is_trainable(self) -> bool:
        """Whether all weights are in float: the ops have no gradient."""
        return not self.parsed.groups and not self.parsed.sparse

    @property
    def is_compileable(self) -> bool:
        """Yes: every layer is one op with a schema and a fake."""
        return True


def has_any_float(leaf: str, scheme: Scheme) -> bool:
    """Whether a layer's tensor may have any float dtype that the ops take: a scale, or a weight in float."""
    return leaf.endswith(("scale", "outlier_weight")) or (scheme.is_float and leaf in ("weight", "compressed"))


GROUPED = "quantkit_grouped"
"""Our name for transformers' code for grouped products: as `grouped_mm` it is swapped in decoding for other code, which
copies experts' weights for each token."""

ALL_EXPERTS_FUNCTIONS.register(GROUPED, ALL_EXPERTS_FUNCTIONS["grouped_mm"])


def _check_columns(name: str, columns: torch.Tensor, count: int) -> None:
    """Return nothing; raise CheckpointError when these aren't numbers of columns, each once and in order."""
    numbers = columns.tolist()
    if any(one >= other for one, other in itertools.pairwise([-1, *numbers, count])):
        raise CheckpointError(
            f"tensor {name!r} does not hold numbers of columns from 0 to {count - 1} in ascending order; "
            "download the checkpoint again"
        )


def read_headers(files: Iterable[str | Path]) -> dict[str, TensorInfo]:
    """Shape and dtype of every tensor in safetensors files, by name."""
    found = {}
    for path in [Path(file) for file in files if str(file).endswith(".safetensors")]:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is no dict)
                view = file.get_slice(name)
                found[name] = TensorInfo(path, tuple(view.get_shape()), DTYPES.get(view.get_dtype(), torch.uint8))
    return found


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Every QuantizedLinear by name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module


def put_layers(
    model: nn.Module, layout: ModuleType, parsed: formats.Layout, tensors: Mapping[str, TensorInfo], backend: str
) -> "Conversions":
    """Put packed layers and experts, still without values, into a float model, and return how a checkpoint fills them.

    Args:
        model: a float model, on the meta device.
        layout: the checkpoint's format.
        parsed: which of its layers have which scheme.
        tensors: shapes and dtypes of all that it holds, by name.
        backend: which implementation of the ops to use.

    Raises:
        CheckpointError: the config names no layer of this model, or tensors don't fit it.
    """
    merged = find_merged(model, layout, parsed, tensors)
    schemes = {
        name.removesuffix(".weight"): each.scheme for each in merged if not each.experts for name in each.targets
    }
    count = replace_linears(model, layout, parsed, backend, schemes)
    for each in merged:
        if each.experts:
            count += len(each.targets)
            _put_experts(model, each, tensors, backend)
    if not count and (parsed.groups or not parsed.activations):
        raise CheckpointError("the checkpoint's quantization_config names no linear layer of this model")
    _hold_cache_scales(model, parsed, tensors)
    return Conversions(tuple(merged), model)


def replace_linears(
    model: nn.Module,
    layout: ModuleType,
    parsed: formats.Layout,
    backend: str,
    schemes: Mapping[str, Scheme] | None = None,
) -> int:
    """Put a QuantizedLinear, still without values, in place of every linear layer that has a scheme; their number.

    `schemes` holds schemes by module name that the checkpoint's tensors tell, whatever its config calls the layers.
    """
    spared = set()
    if parsed.spares_head:
        tied = tied_parameters(model)
        spared = {output_head(model), *(name.removesuffix(".weight") for name in (*tied, *tied.values()))}
    count = 0
    for name, module, in_features, out_features, transposed in list(linear_modules(model)):
        scheme = (schemes or {}).get(name) or parsed.scheme_of(name)
        if scheme is None or name in spared:
            continue
        weight = module.get_parameter("weight")
        with torch.device(weight.device):
            quantized = QuantizedLinear(
                in_features,
                out_features,
                scheme,
                layout,
                bias=getattr(module, "bias", None) is not None,
                dtype=weight.dtype,
                backend=backend,
                transposed=transposed,
            )
        model.set_submodule(name, quantized)
        count += 1
    return count


def _hold_cache_scales(model: nn.Module, parsed: formats.Layout, tensors: Mapping[str, TensorInfo]) -> None:
    """Give modules the scales of a server's cache that a checkpoint holds for them, so that they are saved again."""
    modules = dict(model.named_modules())
    for key, info in tensors.items():
        owner, _, leaf = key.rpartition(".")
        if leaf in parsed.cache_scales:
            if owner not in modules:
                raise CheckpointError(
                    f"tensor {key!r} scales the cache of a layer that this model doesn't have; the files and their "
                    "config don't belong together: download both again"
                )
            empty = torch.empty(info.shape, dtype=info.dtype, device=next(model.parameters()).device)
            modules[owner].register_buffer(leaf, empty)


def _put_experts(model: nn.Module, merged: Merged, tensors: Mapping[str, TensorInfo], backend: str) -> None:
    """Put experts without values in place of the parameters that these tensors make."""
    empty = {
        name: torch.empty(tensors[name].shape, dtype=tensors[name].dtype, device="meta") for name in merged.names()
    }
    for name, (codes, scale, static) in merged.merge(empty, model.config).items():
        in_axis = 1 if scale.shape[1] == 1 and scale.shape[2] == codes.shape[2] else 2
        dtype, scheme = model.get_parameter(name).dtype, replace(merged.scheme, sparsity=None)  # they are unpacked
        experts = QuantizedExperts(codes, scale, in_axis, scheme, dtype=dtype, input_scale=static, backend=backend)
        put_experts(model, name, experts)


class Conversions:
    """How a checkpoint's tensors fill packed weights that transformers' own conversion makes, and back.

    Transformers' list of conversions gets two more: the first gives tensors on disk names that no other conversion
    knows (and after a save gives them back their names on disk), the last makes of them what the packed layers hold.

    Args:
        merged: the weights that are made so; their tensors' shapes and dtypes have been found right.
        model: the model with its packed layers.

    Attributes:
        names: the tensors on disk that are used.
        buffers: the full names of what is made of them, to the first that the same tensors make.
    """

    def __init__(self, merged: tuple[Merged, ...], model: nn.Module | None = None) -> None:
        self.merged: dict[str, Merged] = {}
        self.anchors: dict[str, str] = {}
        self.names: list[str] = []
        self.buffers: dict[str, str] = {}
        for each in merged:
            assert model is not None
            held = [buffer for name in each.targets for buffer in _buffers(model, name, each)]
            self.merged[held[0]] = each
            self.anchors |= dict.fromkeys(each.names(), held[0])
            self.buffers |= dict.fromkeys(held, held[0])
        self.names = list(self.anchors)
        self.numbers = {name: number for number, name in enumerate(self.names)}

    def around(self, conversions: list[Any]) -> list[Any]:
        """A list of transformers' conversions with ours at its ends."""
        return [_Naming(self), *conversions, _Packing(self)] if self.merged else list(conversions)

    def packed(self, anchor: str, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        """What the layers of a group hold, by full name, of its tensors on disk.

        Raises:
            CheckpointError: a tensor is missing, or they don't fit together.
        """
        merged, found = self.merged[anchor], dict[str, torch.Tensor]()
        for name, (codes, scale, static) in merged.merge(tensors, model.config).items():
            if merged.experts:
                held = {"weight": codes, "weight_scale": scale, "input_scale": static}
                found |= {f"{name}.{leaf}": value.contiguous() for leaf, value in held.items() if value is not None}
            else:
                layer = _layer(model, name)
                if merged.scheme.weight_granularity == "tensor":
                    scale = _one_scale(name, scale)
                stored = formats.FORMATS[layer.format].compress(
                    merged.scheme, codes, scale, static, transposed=layer.transposed
                )
                found |= {f"{name.removesuffix('weight')}{leaf}": value for leaf, value in stored.items()}
        return found

    def unpacked(self, anchor: str, held: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        """The tensors on disk of what the layers of a group hold, by full name."""
        merged = self.merged[anchor]
        weights: dict[str, Weight] = {}
        for name in merged.targets:
            if merged.experts:
                weights[name] = (held[f"{name}.weight"], held[f"{name}.weight_scale"], held.get(f"{name}.input_scale"))
            else:
                layer, prefix = _layer(model, name), name.removesuffix("weight")
                stored = {leaf: held[prefix + leaf] for leaf in layer.stored}
                codes, scale = formats.FORMATS[layer.format].decompress(
                    merged.scheme, stored, layer.in_features, layer.transposed
                )
                rows = scale.reshape(1, 1).expand(layer.out_features, 1) if scale.ndim == 1 else scale
                weights[name] = (codes, rows, stored.get("input_scale"))
        return merged.split(weights, model.config)


def _one_scale(name: str, scale: torch.Tensor) -> torch.Tensor:
    """The scale [1] that all rows share.

    Raises:
        CheckpointError: they don't.
    """
    if not bool((scale == scale[:1, :1]).all()):
        raise CheckpointError(
            f"{name!r} is made of layers with a scale each, and its scheme has one for all of it; "
            "quantize the model again with a scale a row"
        )
    return scale.reshape(-1)[:1]


def _layer(model: nn.Module, weight: str) -> QuantizedLinear:
    """The packed layer that stands where a float layer's weight was."""
    layer = model.get_submodule(weight.removesuffix(".weight"))
    assert isinstance(layer, QuantizedLinear)
    return layer


def _buffers(model: nn.Module, name: str, merged: Merged) -> list[str]:
    """The full names of what a packed layer or experts hold."""
    if not merged.experts:
        return [name.removesuffix("weight") + leaf for leaf in _layer(model, name).stored]
    return [f"{name}.{leaf}" for leaf, _ in model.get_submodule(name).named_buffers()]


class _Kept(ConversionOps):  # type: ignore[misc]
    """An operation that transformers wants to see in a converter; ours does its work as a whole."""

    def convert(self, input_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """What came in."""
        return input_dict


class _Naming(WeightRenaming):  # type: ignore[misc]
    """Tensors on disk that make packed weights together, to names that no other conversion knows; or back."""

    def __init__(self, conversions: Conversions, back: bool = False) -> None:
        super().__init__("quantkit:naming", "quantkit:naming")
        self.conversions, self.back = conversions, back

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Naming":
        return type(self)(self.conversions, self.back)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The new name, or the one that it has."""
        if self.back:
            found = _TOKEN.search(source_key)
            return (source_key if found is None else self.conversions.names[int(found[1])]), None
        number = self.conversions.numbers.get(source_key)
        if number is None:
            return source_key, None
        self._was_used = True
        return f"quantkit:{number}:", None

    def reverse_transform(self) -> "_Naming":
        """The same, back."""
        return type(self)(self.conversions, not self.back)


class _Packing(WeightConverter):  # type: ignore[misc]
    """Tensors on disk, by those names, to what packed layers hold; or back."""

    def __init__(self, conversions: Conversions, back: bool = False) -> None:
        super().__init__("quantkit:packing", "quantkit:packing", [_Kept()])
        self.conversions, self.back = conversions, back

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Packing":
        return type(self)(self.conversions, self.back)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The first thing that the group's layers hold, whatever the group's tensor; and this converter's pattern."""
        if self.back:
            anchor = self.conversions.buffers.get(source_key)
        else:
            found = _TOKEN.search(source_key)
            anchor = None if found is None else self.conversions.anchors[self.conversions.names[int(found[1])]]
        if anchor is None:
            return source_key, None
        self._was_used = True
        return anchor, self.source_patterns[0]

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        """Take a tensor, by its own name: on disk, or in the model."""
        super().add_tensor(target_key, source_key, source_key, future)

    def convert(self, layer_name: str, model: Any = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        """What the group's layers hold, by full name; or its tensors on disk."""
        tensors = {name: values[0] for name, values in self.materialize_tensors().items()}
        if not self.back:
            return self.conversions.packed(layer_name, tensors, model)
        numbers = self.conversions.numbers
        made = self.conversions.unpacked(layer_name, tensors, model)
        return {f"quantkit:{numbers[name]}:": tensor for name, tensor in made.items()}

    def reverse_transform(self) -> "_Packing":
        """The same, back."""
        return type(self)(self.conversions, not self.back)
