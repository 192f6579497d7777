"""Candidates: every linear layer that a model has, what it is stored as, and why it stays in float if it does.

A candidate is a module that computes a linear function (whatever its class), or a parameter with an axis of experts
that the data flow shows to be multiplied like a linear weight. Where it lies in the checkpoint is found by the
conversions of transformers (`naming`), so that experts that are merged while they are loaded are written one layer an
expert again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from quantkit.checkpoint import Source, is_usual_linear, output_head, tied_parameters
from quantkit.discovery import LinearUse, weights_read_elsewhere
from quantkit.exploration import Findings
from quantkit.linears import linear_modules
from quantkit.naming import Names
from quantkit.recipe import Recipe, matches

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Candidate:
    """A linear layer, or a parameter that holds one an expert.

    Attributes:
        name: the module's name, or the parameter's where it holds experts.
        parameter: the name of the weight.
        out_features: N.
        in_features: K.
        transposed: whether the parameter holds K before N.
        experts: how many linear layers the parameter holds, or 0 for a plain one.
        keys: the checkpoint keys that it is written to, each with whether it holds K before N there.
        fused: whether a key holds all experts together.
        special: whether it is a module of a class that other software doesn't know for a linear layer.
        converted: whether its tensors are merged, split or changed while they are loaded.
    """

    name: str
    parameter: str
    out_features: int
    in_features: int
    transposed: bool
    experts: int
    keys: dict[str, bool]
    fused: bool
    special: bool = False
    converted: bool = False

    @property
    def owners(self) -> list[str]:
        """What the names of its experts' layers begin with, in the model and on disk."""
        on_disk = {key.removesuffix(".weight").rsplit(".", 1 if self.fused else 2)[0] for key in self.keys}
        return sorted({self.name.rpartition(".")[0], *on_disk})

    @property
    def in_axis(self) -> int:
        """The parameter's axis of the in features."""
        return (1 if self.experts else 0) + (0 if self.transposed else 1)


def candidates_of(source: Source, names: Names, findings: Findings) -> list[Candidate]:
    """Every linear layer of the model, in the order of its modules, experts after the layers of their block."""
    found = []
    for name, module, in_features, out_features, transposed in linear_modules(source.skeleton):
        parameter = f"{name}.weight"
        if parameter in names.keys:
            keys = {names.keys[parameter]: transposed}
        else:
            keys = names.pieces(parameter, 0 if transposed else 1) or {}
        special = not is_usual_linear(module)
        changed = parameter not in names.keys
        found.append(
            Candidate(
                name,
                parameter,
                out_features,
                in_features,
                transposed,
                0,
                keys,
                fused=False,
                special=special,
                converted=changed,
            )
        )
    for name, use in raw_uses(findings):
        shape = source.skeleton.get_parameter(name).shape
        if use.expert_axis == 0 and len(shape) == 3:
            transposed = use.in_axis == 1
            keys = {names.keys[name]: transposed} if name in names.keys else names.pieces(name, use.in_axis) or {}
            fused = any(len(source.weights.tensors[key].shape) == 3 for key in keys)
            rows, columns = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
            found.append(Candidate(name, name, rows, columns, transposed, shape[0], keys, fused))
    return found


def raw_uses(findings: Findings) -> Iterator[tuple[str, LinearUse]]:
    """Every parameter of a block that is used as a linear weight with its full name, modules' weights included."""
    for number, structure in findings.structures.items():
        for use in structure.linears:
            yield f"{findings.blocks}.{number}.{use.parameter}", use


class Reasons:
    """Why candidates stay in float, whatever the format."""

    def __init__(self, source: Source, recipe: Recipe, names: Names, findings: Findings) -> None:
        self.source, self.recipe, self.findings = source, recipe, findings
        self.head = output_head(source.skeleton)
        self.tied = tied_parameters(source.skeleton)
        self.shared = {*self.tied, *self.tied.values()}
        self.uses = dict(raw_uses(findings))
        self.elsewhere, self.ended = weights_read_elsewhere(source.skeleton)

    def of(self, candidate: Candidate) -> str | None:
        """The reason, or None for what can be quantized."""
        return self._choice(candidate) or self._data_flow(candidate) or self._storage(candidate)

    def _choice(self, candidate: Candidate) -> str | None:
        """What the user, or the model's own output, decides."""
        name, recipe = candidate.name, self.recipe
        included = [pattern for pattern in recipe.include if matches(pattern, name)]
        ignored = [pattern for pattern in recipe.ignore if matches(pattern, name)]
        if candidate.parameter in self.shared:
            partner = self.tied.get(candidate.parameter, "another layer").removesuffix(".weight")
            return f"shares its weight with {partner}"
        if ignored:
            return f"ignored by {ignored[0]!r}"
        if recipe.include and not included:
            return "no include pattern matches it"
        if name == self.head and not included:
            return "makes the logits; --include it to quantize it"
        return None

    def _data_flow(self, candidate: Candidate) -> str | None:
        """What the model does with it."""
        use = self.uses.get(candidate.parameter)
        if use is not None and use.role != "linear":
            return use.reason or f"is a {use.role}"
        if candidate.name in self.elsewhere:
            return "has a weight that other code reads without calling the layer"
        what = self.findings.otherwise(candidate.parameter)
        if what is not None:
            return f"has a weight that isn't only a linear layer's: {what}"
        inside = candidate.name.startswith(f"{self.findings.blocks}.")
        seen = inside or candidate.name in self.findings.ran or candidate.name == self.head
        return None if seen or self.findings.ended is not None else "does not run when the model reads text"

    def _storage(self, candidate: Candidate) -> str | None:
        """What the checkpoint holds of it."""
        if not candidate.keys:
            return "its weight is merged or changed while the checkpoint is loaded"
        dtypes = {self.source.weights.tensors[key].dtype for key in candidate.keys}
        odd = next((dtype for dtype in dtypes if dtype not in FLOAT_DTYPES), None)
        return None if odd is None else f"its weight is stored as {odd}"
