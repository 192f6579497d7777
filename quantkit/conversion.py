"""Codes and scales on their way through transformers' conversion of a checkpoint, and back when a model is saved.

Where a checkpoint holds one linear layer an expert and the model one parameter for all, transformers' converters merge
the weights while it loads them; others split a merged q/k/v weight. Rows keep their scales on such a way: what a
converter does to a float weight [N, K] it does to codes [N, K] and to scales [N, 1] alike. Float experts that lie in
one tensor are stored quantized one by one, with their number before the last part of the name, and stacked again.

For every weight of the model that is made so there is a `Merged`, which knows the tensors on disk and takes them
through the model's own converter. `naming` is about float checkpoints, this about quantized ones.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import nn

from quantkit.errors import CheckpointError
from quantkit.formats import Layout
from quantkit.pieces import SCALE, STATIC, Stored, stored_as
from quantkit.scheme import Scheme
from quantkit.shards import TensorInfo

Weight = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Codes, their scale with an axis for the in features, and the scale of static activations."""


@dataclass(frozen=True)
class Piece:
    """A quantized linear layer on disk that makes a part of a weight of the model, or several weights.

    Attributes:
        prefix: what its tensors' names begin with.
        key: the name of its float weight among the model's converters, after all renamings.
        pattern: the converter's pattern that it matches, or None without a converter.
        expert: its number, where the float weight holds all experts together.
    """

    prefix: str
    key: str
    pattern: str | None
    expert: int | None


@dataclass(frozen=True)
class Merged:
    """Weights of the model that are made together of quantized layers on disk.

    Attributes:
        targets: the weights' names in the float model, to their shapes.
        experts: whether they are parameters that hold experts, or else weights of linear layers.
        pieces: the layers on disk, in the order in which a converter takes them.
        stored: how the tensors of each piece lie on disk.
        scheme: what the numbers look like.
        converter: transformers' converter between both, or None where experts are only stacked.
        swapped: whether the converter swaps the axes of the weights.
    """

    targets: dict[str, tuple[int, ...]]
    experts: bool
    pieces: tuple[Piece, ...]
    stored: tuple[Stored, ...]
    scheme: Scheme
    converter: Any
    swapped: bool = False

    def names(self) -> list[str]:
        """The names on disk of all its tensors."""
        return [p.prefix + leaf for p, stored in zip(self.pieces, self.stored, strict=True) for leaf in stored.leaves]

    def decoded(self, tensors: Mapping[str, torch.Tensor]) -> list[Weight]:
        """The numbers of every piece, of tensors by their names on disk."""
        return [
            stored.decode({leaf: tensors[piece.prefix + leaf] for leaf in stored.leaves})
            for piece, stored in zip(self.pieces, self.stored, strict=True)
        ]

    def merge(self, tensors: Mapping[str, torch.Tensor], config: Any) -> dict[str, Weight]:
        """The weights by target, of tensors by their names on disk.

        Raises:
            CheckpointError: they don't make the weights.
        """
        decoded = self.decoded(tensors)
        try:
            codes = self._forward([each[0] for each in decoded], config, is_scale=False)
            scales = self._forward([each[1] for each in decoded], config, is_scale=True)
        except Exception as error:  # whatever an operation does with tensors that don't fit it
            raise CheckpointError(
                f"{next(iter(self.targets))!r} cannot be made of {self.pieces[0].prefix + SCALE!r} and its like "
                f"({' '.join(str(error).split()) or repr(error)}); a shard may be missing: download it again"
            ) from error
        static = self._static([each[2] for each in decoded])
        return {name: (codes[name], scales[name], static) for name in self.targets}

    def parts(self, weights: Mapping[str, Weight], config: Any) -> list[Weight]:
        """The numbers of every piece, of the weights by target."""
        codes = self._backward({name: weight[0] for name, weight in weights.items()}, config)
        scales = self._backward({name: weight[1] for name, weight in weights.items()}, config)
        _, scale, static = next(iter(weights.values()))
        wide = scale.shape[-2] == 1 and not self.swapped
        found = []
        for piece, place in zip(self.pieces, self._places(), strict=True):
            one = scales[piece.prefix]
            if one.ndim < 2:  # transformers 5.21 drops every axis of size 1
                one = one.reshape(1, -1) if wide else one.reshape(-1, 1)
            found.append((codes[piece.prefix], one, None if static is None else static[place].reshape(1)))
        return found

    def split(self, weights: Mapping[str, Weight], config: Any) -> dict[str, torch.Tensor]:
        """The tensors by their names on disk, of the weights by target."""
        found: dict[str, torch.Tensor] = {}
        for piece, stored, part in zip(self.pieces, self.stored, self.parts(weights, config), strict=True):
            found |= {piece.prefix + leaf: tensor for leaf, tensor in stored.encode(*part).items()}
        return found

    def _forward(self, values: list[torch.Tensor], config: Any, is_scale: bool) -> dict[str, torch.Tensor]:
        """What the converter makes of one tensor a piece, by target."""
        first = next(iter(self.targets))
        collected: defaultdict[str | None, list[torch.Tensor]] = defaultdict(list)
        for piece, value in zip(self.pieces, values, strict=True):
            collected[piece.pattern].append(value)
        if self.pieces[0].expert is not None:
            for pattern, experts in collected.items():
                collected[pattern] = [torch.stack(experts)]
        if self.converter is None:
            return {first: collected[None][0]}
        converter = copy.deepcopy(self.converter)
        shapes = _Shapes(self._seen(collected, is_scale))
        converter.collected_tensors.update(collected)
        return _single(converter.convert(first, model=shapes, config=config))

    def _backward(self, values: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """What the converter, reversed, makes of one tensor a target, by the pieces' prefixes."""
        if self.converter is None:
            (merged,) = values.values()
            return {piece.prefix: merged[piece.expert] for piece in self.pieces}
        back, key = self.converter.reverse_transform(), ""
        for name, value in values.items():
            key, pattern = back.rename_source_key(name)
            back.collected_tensors[pattern].append(value)
        shapes = _Shapes(self._seen(back.collected_tensors, is_scale=True))
        made = _single(back.convert(key, model=shapes, config=config))
        if self.pieces[0].expert is None:
            return {piece.prefix: made[piece.key] for piece in self.pieces}
        return {piece.prefix: made[piece.key][piece.expert] for piece in self.pieces}

    def _seen(self, collected: Mapping[Any, list[torch.Tensor]], is_scale: bool) -> dict[str, tuple[int, ...]]:
        """The shapes that a converter sees of the model's parameters, which it may compare with those of its tensors.

        One that swaps axes only where the shapes differ must do with scales as it did with codes.
        """
        if self.pieces[0].expert is None or not is_scale:
            return self.targets
        *lead, rows, columns = next(iter(collected.values()))[0].shape
        return dict.fromkeys(self.targets, (*lead, columns, rows) if self.swapped else (*lead, rows, columns))

    def _static(self, scales: list[torch.Tensor | None]) -> torch.Tensor | None:
        """The scales of static activations: [E] for experts, [1] for linear layers."""
        if not self.scheme.is_static:
            return None
        found = torch.cat([scale.reshape(1) for scale in scales if scale is not None])
        places = self._places()
        merged = torch.stack([found[places.index(place)] for place in range(max(places) + 1)])
        if not found.is_meta and not torch.equal(found, merged[places]):
            raise CheckpointError(
                f"layers that make {next(iter(self.targets))!r} have different scales of the same activations "
                f"({self.pieces[0].prefix + STATIC!r} is one); quantize the model again"
            )
        return merged

    def _places(self) -> list[int]:
        """Each piece's place among the scales of static activations: its expert's, or 0 for linear layers."""
        counts: defaultdict[str | None, int] = defaultdict(int)
        places = []
        for piece in self.pieces:
            number = counts[piece.pattern] if piece.expert is None else piece.expert
            places.append(number if self.experts else 0)
            counts[piece.pattern] += 1
        return places


class _Shapes:
    """Stands for the model where a converter asks for a parameter's shape."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def get_parameter(self, name: str) -> torch.Tensor:
        """A tensor of the parameter's shape."""
        return torch.empty(self._shapes.get(name, next(iter(self._shapes.values()))), device="meta")


def _single(values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A converter's result without the lists around single tensors."""
    return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}


def find_merged(
    model: nn.Module, layout: ModuleType, parsed: Layout, tensors: Mapping[str, TensorInfo]
) -> list[Merged]:
    """Every weight of a float model that a checkpoint's quantized layers make together, planned from headers.

    Raises:
        CheckpointError: tensors are missing or have another shape or dtype than their scheme demands, or there is none.
    """
    if not any(key.endswith(f".{SCALE}") for key in tensors):
        return []
    found = _Finder(model, tensors)
    merged: list[Merged] = []
    known: dict[tuple[object, ...], bool] = {}
    for name, pieces in found.groups.items():
        plan = found.merged(name, pieces, layout, parsed)
        converter = None if plan.converter is None else plan.converter.source_patterns
        sizes = tuple(tensors[each].shape for each in plan.names())
        like = (str(converter), tuple(plan.targets.values()), sizes, plan.stored)
        if like not in known:
            known[like] = found.checked(plan)
        merged.append(replace(plan, swapped=known[like]))
    return merged


class _Finder:
    """Which layers on disk make which weights of the model together.

    Attributes:
        groups: the first weight that they make, to the layers.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, TensorInfo]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

        mapping = get_model_conversion_mapping(model) or []
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.converters += _named_after_targets(self.converters)
        self.model, self.tensors = model, tensors
        self.state = {**model.state_dict(), **dict(model.named_buffers())}
        self.leaves: defaultdict[str, dict[str, TensorInfo]] = defaultdict(dict)
        for key, info in tensors.items():
            owner, _, leaf = key.rpartition(".")
            self.leaves[f"{owner}."][leaf] = info
        self.groups: defaultdict[str, list[Piece]] = defaultdict(list)
        others = []
        for prefix in sorted(self.leaves, key=dot_natural_key):
            if SCALE in self.leaves[prefix]:
                self._place(prefix)
            elif {"weight", "weight_packed"} & self.leaves[prefix].keys():
                others.append(prefix)
        for prefix in others if self.groups else ():
            name = self._resolved(f"{prefix}weight")[0]
            if name in self.groups:
                raise CheckpointError(
                    f"tensor {prefix + SCALE!r} is missing, though {self.groups[name][0].prefix + SCALE!r} is there; "
                    "download the checkpoint again"
                )

    def _resolved(self, key: str) -> tuple[str, str, str | None]:
        """What a float key makes in the model, its name before the converters, and the converter's pattern."""
        from transformers.core_model_loading import apply_converters, apply_renamings, rename_source_key

        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, self.renamings, self.converters, prefix, self.state)
        renamed = apply_renamings(key, self.renamings)
        raw, _ = apply_converters(renamed, self.converters)
        if name == f"{prefix}.{raw}":
            renamed = f"{prefix}.{renamed}"
        elif raw == f"{prefix}.{name}":
            renamed = renamed.removeprefix(f"{prefix}.")
        return name, renamed, pattern

    def _place(self, prefix: str) -> None:
        """Put a quantized layer into its group, unless it is a layer of the model as it stands."""
        name, key, pattern = self._resolved(f"{prefix}weight")
        if name in self.state:
            if pattern is not None:
                self.groups[name].append(Piece(prefix, key, pattern, None))
            return
        numbered = re.fullmatch(r"(.*)\.(\d+)\.([^.]+)\.", prefix)
        if numbered is None:
            return
        owner, number, leaf = numbered.groups()
        for together in (f"{owner}.{leaf}.weight", f"{owner}.{leaf}"):
            name, key, pattern = self._resolved(together)
            if name in self.state:
                self.groups[name].append(Piece(prefix, key, pattern, int(number)))
                return

    def merged(self, name: str, pieces: list[Piece], layout: ModuleType, parsed: Layout) -> Merged:
        """The plan for one group."""
        converter = next((each for each in self.converters if pieces[0].pattern in each.source_patterns), None)
        targets = [name]
        if converter is not None:
            first, *rest = converter.target_patterns
            targets += [name.replace(first, other) for other in rest]
        absent = next((each for each in targets if each not in self.state), None)
        if absent is not None:
            raise CheckpointError(f"the model has no weight {absent!r}, which the checkpoint's layers would make")
        scheme = self._scheme(pieces[0], targets, parsed)
        shapes = {each: tuple(self.state[each].shape) for each in targets}
        columns, rows = shapes[name][-1], shapes[name][-2]
        rows = rows if len(shapes[name]) > 2 else rows // len(pieces)
        sizes: list[tuple[int | None, int, bool]] = [(None, columns, False), (None, rows, False)]
        if converter is None:
            sizes = [(rows, columns, False), (columns, rows, True)]
        stored = tuple(self._stored(piece, layout, scheme, sizes) for piece in pieces)
        experts = pieces[0].expert is not None or len(shapes[name]) > 2
        return Merged(shapes, experts, tuple(pieces), stored, scheme, converter)

    def _scheme(self, piece: Piece, targets: Iterable[str], parsed: Layout) -> Scheme:
        """The scheme that the config gives a layer on disk, or the weight that it makes a part of."""
        names = [piece.prefix.removesuffix("."), *targets, *(each.removesuffix(".weight") for each in targets)]
        found = next((scheme for scheme in map(parsed.scheme_of, names) if scheme is not None), None)
        if found is None:
            raise CheckpointError(
                f"tensor {piece.prefix + SCALE!r} belongs to a layer that quantization_config gives no scheme; "
                "the files and their config don't belong together: download both again"
            )
        return found

    def _stored(
        self, piece: Piece, layout: ModuleType, scheme: Scheme, sizes: list[tuple[int | None, int, bool]]
    ) -> Stored:
        infos = {leaf: (info.shape, info.dtype) for leaf, info in self.leaves[piece.prefix].items() if leaf != "bias"}
        return stored_as(layout, scheme, piece.prefix, infos, sizes)

    def checked(self, plan: Merged) -> bool:
        """Whether its converter swaps axes, once the plan has been tried on tensors without values, there and back.

        Raises:
            CheckpointError: it doesn't make weights of the shapes that the model has.
        """
        empty = {name: _on_meta(self.tensors[name]) for name in plan.names()}
        config, decoded = self.model.config, plan.decoded(empty)
        made = plan.merge(empty, config)
        first, piece = next(iter(plan.targets)), decoded[0][0].shape
        ends = made[first][0].shape[-2:]
        if plan.pieces[0].expert is not None and ends == piece[::-1] and ends != piece:
            plan = replace(plan, swapped=True)
            made = plan.merge(empty, config)
        for name, shape in plan.targets.items():
            codes, scale, static = made[name]
            by_rows = scale.shape[-2] == codes.shape[-2] and codes.shape[-1] % scale.shape[-1] == 0
            in_out = scale.shape[-2] == 1 and scale.shape[-1] == codes.shape[-1]
            counted = static is None or not plan.experts or len(static) == len(codes)
            fits = codes.shape == shape or (len(shape) == 2 and codes.flatten(0, -2).shape == shape)
            if not fits or not (by_rows or in_out) or not counted:
                raise CheckpointError(
                    f"{name!r} is {list(shape)} in the model, and {plan.pieces[0].prefix + SCALE!r} and its like make "
                    f"{list(codes.shape)} with scales {list(scale.shape)}; a shard may be missing: download it again"
                )
        back = plan.parts(made, config)
        if [(one.shape, other.shape) for one, other, _ in back] != [
            (one.shape, other.shape) for one, other, _ in decoded
        ]:
            raise CheckpointError(f"{first!r} could not be saved again as it is on disk; use another transformers")
        return plan.swapped


def _named_after_targets(converters: Iterable[Any]) -> list[Any]:
    """Converters of experts whose layers are named after the parameter that they make together.

    llm-compressor 0.14 splits a parameter `gate_up_proj` into layers `gate_proj` and `up_proj` and saves them by these
    names, whatever the architecture calls them on disk (Mixtral: `w1` and `w3`).
    """
    converters, found = list(converters), []
    known = {source for each in converters for source in each.source_patterns}
    for each in converters:
        *words, kind = each.target_patterns[0].rpartition(".")[2].split("_")
        sources = [
            re.sub(r"\.\*\.[^.*]+\.weight$", f".*.{word}_{kind}.weight", source)
            for word, source in zip(words, each.source_patterns, strict=False)
        ]
        one_each = len(each.target_patterns) == 1 and len(words) == len(each.source_patterns)
        if one_each and known.isdisjoint(sources):
            found.append(type(each)(sources, list(each.target_patterns), each.operations))
    return found


def _on_meta(info: TensorInfo) -> torch.Tensor:
    """A tensor of that shape and dtype without values."""
    return torch.empty(info.shape, dtype=info.dtype, device="meta")
