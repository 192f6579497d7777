"""Checkpoint names and parameter names: which file keys make which parameter, and which keys a parameter is written to.

transformers renames, merges, splits and transposes tensors while it loads a checkpoint (`core_model_loading`), and
undoes that when it saves. Both directions are used here on a few tensors at a time, so that one block can be read,
worked on and written without the others. The names come from a private module of transformers: the ranges in
pyproject.toml say which releases were tried.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint import Source, empty_copy, tied_parameters
from quantkit.errors import CheckpointError
from quantkit.linears import linear_modules


@dataclass(frozen=True)
class Origin:
    """What a checkpoint key becomes in the model.

    Attributes:
        parameter: the parameter or buffer that it makes (the first, where it makes several), or None when the model
            doesn't use it.
        converted: whether values are changed or merged on the way (then the key alone doesn't make the parameter).
    """

    parameter: str | None
    converted: bool


def names_of(source: Source) -> dict[str, Origin]:
    """What every checkpoint key becomes in the model, planned without reading a weight."""
    renamings, converters = _mapping(source.skeleton)
    return {
        key: Origin(name, pattern is not None)
        for key, (name, pattern) in _renamed(source.skeleton, source.weights.tensors, renamings, converters).items()
    }


def _mapping(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Transformers' renamings and converters for the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = get_model_conversion_mapping(model) or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in mapping if isinstance(entry, WeightConverter)]


def _renamed(
    model: nn.Module, keys: Iterable[str], renamings: list[Any], converters: list[Any]
) -> dict[str, tuple[str | None, str | None]]:
    """Every key's parameter (None where the model has none) and the pattern of its converter (None without one)."""
    from transformers.core_model_loading import rename_source_key

    state = {**model.state_dict(), **dict(model.named_buffers())}
    prefix = model.base_model_prefix
    found: dict[str, tuple[str | None, str | None]] = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        found[key] = (name if name in state else None, pattern)
    return found


def _reverted(
    model: nn.Module, conversions: Iterable[Any], parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors that these parameters are written as, by the conversions that were used to find out their names."""
    from transformers.core_model_loading import revert_weight_conversion

    absent = object()
    had = model.__dict__.get("_weight_conversions", absent)
    # What was used to read this checkpoint is what must be undone, as after from_pretrained.
    model._weight_conversions = [entry for entry in conversions if entry.was_used()]  # type: ignore[assignment]
    try:
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(parameters))
        return reverted
    finally:
        if had is absent:
            del model._weight_conversions
        else:
            model._weight_conversions = had  # type: ignore[assignment]


def float_layout(source: Source) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """What a compressed checkpoint's float tensors look like, for what its files leave open.

    Shapes by the key of the float tensor, as far as the model tells, and the keys of weights that it has as [K, N].
    """
    model = source.skeleton
    keys = dict.fromkeys(name for key in source.weights.tensors for name in _float_keys(key))
    renamings, converters = _mapping(model)
    renamed = _renamed(model, keys, renamings, converters)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    plain = {key: name for key, (name, pattern) in renamed.items() if name in parameters and pattern is None}
    shapes = {key: tuple(parameters[name].shape) for key, name in plain.items() if name is not None}
    if any(pattern is not None for _, pattern in renamed.values()):
        written = _reverted(model, [*renamings, *converters], parameters)
        shapes = {key: tuple(tensor.shape) for key, tensor in written.items() if key in keys} | shapes
    turned = {f"{name}.weight" for name, _, _, _, transposed in linear_modules(model) if transposed}
    return shapes, {key for key, name in plain.items() if name in turned}


def _float_keys(key: str) -> Iterator[str]:
    """The names that a stored tensor's float tensor may have: a layer's weight, or experts that lie apart on disk."""
    stem = re.sub(r"\.weight(_packed)?$", "", key)
    if stem == key:
        yield key
        return
    yield f"{stem}.weight"
    together = re.sub(r"\.\d+(\.[^.]+)$", r"\1", stem)
    if together != stem:
        yield from (together, f"{together}.weight")


class Names:
    """Both directions between a checkpoint's keys and a model's parameters.

    Attributes:
        origins: what every key becomes.
        keys: the key of every parameter that one key makes as it stands.
    """

    def __init__(self, source: Source) -> None:
        self._model, self._tensors = source.skeleton, source.weights.tensors
        self._renamings, self._converters = _mapping(self._model)
        renamed = _renamed(self._model, source.weights.tensors, self._renamings, self._converters)
        self._patterns = {key: pattern for key, (_, pattern) in renamed.items()}
        self.origins = {key: Origin(name, pattern is not None) for key, (name, pattern) in renamed.items()}
        self.keys = {
            origin.parameter: key for key, origin in self.origins.items() if origin.parameter and not origin.converted
        }

    def sources(self) -> dict[str, tuple[str, ...]]:
        """The keys that make each parameter or buffer; a converter's targets share theirs."""
        found: dict[str, tuple[str, ...]] = {name: (key,) for name, key in self.keys.items()}
        groups: dict[str, list[str]] = {}
        for key, origin in self.origins.items():
            if origin.parameter and origin.converted:
                groups.setdefault(origin.parameter, []).append(key)
        for keys in groups.values():
            found |= dict.fromkeys(self.parameters(keys, self._on_meta), tuple(keys))
        return found

    def _on_meta(self, key: str) -> torch.Tensor:
        info = self._tensors[key]
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    def parameters(self, keys: Iterable[str], get: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters and buffers that these keys make; a converter's keys must come together.

        Raises:
            CheckpointError: transformers cannot convert the tensors.
        """
        from transformers.core_model_loading import dot_natural_key

        made: dict[str, torch.Tensor] = {}
        waiting: dict[str, Any] = {}
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = self.origins[key].parameter, self._patterns[key]
            if name is None:
                continue
            if pattern is None:
                made[name] = get(key)
                continue
            converter = next(entry for entry in self._converters if pattern in entry.source_patterns)
            waiting.setdefault(name, copy.deepcopy(converter)).add_tensor(name, key, pattern, get(key))
        for name, converter in waiting.items():
            made |= self._converted(name, converter)
        return made

    def _converted(self, name: str, converter: Any) -> dict[str, torch.Tensor]:
        try:
            values = converter.convert(name, model=self._model, config=self._model.config)
        except Exception as error:  # whatever an operation does with tensors that don't fit it
            reason = " ".join(str(error).split()) or repr(error)
            raise CheckpointError(
                f"{name!r} cannot be made of its tensors ({reason}); a shard may be missing: download it again"
            ) from error
        return {key: value[0] if isinstance(value, list) else value for key, value in values.items()}

    def written(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that these parameters are written as, by checkpoint key; converted ones as transformers does."""
        found = {self.keys[name]: value for name, value in parameters.items() if name in self.keys}
        rest = {name: value for name, value in parameters.items() if name not in self.keys}
        return found | (self._reverted(rest) if rest else {})

    def _reverted(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return _reverted(self._model, [*self._renamings, *self._converters], parameters)

    def pieces(self, parameter: str, in_axis: int) -> dict[str, bool] | None:
        """The keys that a converted parameter [..., N, K] is written to, each with whether it holds K before N.

        None when some key doesn't hold whole rows (then it can't have a scale a row), or isn't in the checkpoint. A
        tensor that says for each element where it stands along K is written, without a weight being read.
        """
        shape = self._model.get_parameter(parameter).shape
        index = torch.arange(shape[in_axis], dtype=torch.int32)
        view = [1] * len(shape)
        view[in_axis] = shape[in_axis]
        try:
            written = self._reverted({parameter: index.view(view).expand(shape)})
        except Exception:
            return None
        found = {}
        for key, value in written.items():
            if key not in self.origins or value.ndim < 2:
                return None
            transposed, straight = (_runs_along(value, axis, index) for axis in (-2, -1))
            if transposed == straight:
                return None
            found[key] = transposed
        return found


def _runs_along(value: torch.Tensor, axis: int, index: torch.Tensor) -> bool:
    """Whether a tensor counts through `index` along an axis."""
    if value.shape[axis] != len(index):
        return False
    line = value.movedim(axis, -1).reshape(-1, len(index))[0]
    return bool((line == index).all())


def conversion_problems(source: Source, prepare: Callable[[nn.Module], None] | None = None) -> list[str]:
    """What transformers would miss or could not convert when it loads these tensors, one phrase each.

    Its own conversion runs, on tensors of the meta device: it sees names, shapes and dtypes, and no value is read. Tied
    parameters are made by either of their names. `prepare` changes the model first (puts quantized layers in).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    model = empty_copy(source.skeleton)
    if prepare is not None:
        prepare(model)
    ties = tied_parameters(model)
    state = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in source.weights.tensors.items()}
    mapping = get_model_conversion_mapping(model) or []
    for entry in mapping:
        if getattr(entry, "force_cpu", False):
            entry.force_cpu = False  # there is nothing to be moved
    settings = LoadStateDictConfig(device_map={"": "meta"}, weight_mapping=mapping)
    info, _ = convert_and_load_state_dict_in_model(model, state, settings)
    names = list(model.state_dict())
    made = set(names) - info.missing_keys
    made |= {first for second, first in ties.items() if second in made}
    absent = sorted(name for name in names if name not in made and ties.get(name) not in made)
    found = [f"no tensor makes {name!r}" for name in absent]
    found += [
        f"{item[0]!r} is {list(item[1])} where {list(item[2])} is expected" for item in sorted(info.mismatched_keys)
    ]
    return found + [
        f"{name!r} cannot be made: {str(why).strip().splitlines()[-1].strip()}"
        for name, why in info.conversion_errors.items()
    ]
