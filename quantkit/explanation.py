"""A plan in words: what would happen to every tensor and why, and with detail what discovery saw, group by group."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from quantkit import spared
from quantkit.activating import THRESHOLD
from quantkit.discovery import Group, Structure
from quantkit.planning import Plan
from quantkit.recipe import Recipe
from quantkit.servers import Verdict, of_recipe


def plan_to_dict(plan: Plan, recipe: Recipe, model: str) -> dict[str, Any]:
    """The plan as plain JSON values."""
    findings = plan.findings
    return {
        "model": model,
        "recipe": recipe.to_dict(),
        "format": "float" if plan.layout is None else plan.layout.NAME,
        "output_bytes": plan.output_bytes,
        "targets": [
            {
                "modules": list(target.modules),
                "key": target.key,
                "shape": [target.out_features, target.in_features],
                "experts": target.experts,
                "scheme": target.scheme.label,
            }
            for target in plan.targets.values()
        ],
        "left_alone": [{"module": m.module, "shape": list(m.shape), "reason": m.reason} for m in plan.left],
        "pruned": [layer.name for layer in plan.pruned],
        "activations": [] if plan.activating is None else [asdict(place) for place in plan.activating.places],
        "thresholds": [] if plan.activating is None else [layer.name for layer in plan.activating.inputs],
        "copied_unused": list(plan.unused),
        "blocks": findings.blocks,
        "groups": [
            {"block": f"{findings.blocks}.{number}", **_group_to_dict(group)}
            for number, structure in sorted(findings.structures.items())
            for group in structure.groups
        ],
        "refused": [
            {"block": f"{findings.blocks}.{number}", **asdict(each)}
            for number, structure in sorted(findings.structures.items())
            for each in structure.refusals
        ],
        "notes": list(plan.notes),
        "servers": [verdict.to_dict() for verdict in _servers(plan, recipe, model)],
    }


def _servers(plan: Plan, recipe: Recipe, model: str) -> list[Verdict]:
    """What servers would do with the result, as far as format and scheme say it."""
    stored = plan.quantization_config()
    return of_recipe(stored, {}, model, experts=any(each.experts for each in plan.quantized))


def _group_to_dict(group: Group) -> dict[str, Any]:
    return {
        "producer": group.name,
        "kind": group.kind,
        "channels": group.channels,
        "divides": sorted({edit.parameter for edit in group.producers}),
        "multiplies": sorted({edit.parameter for edit in group.consumers}),
        "one_plus_weight": any(edit.offset for edit in group.producers),
        "proven": False,
    }


def plan_to_text(plan: Plan, recipe: Recipe, model: str, *, explain: bool, more: Sequence[str] = ()) -> str:
    """The plan on a screen, with `more` lines in it; `explain` adds what was seen of every kind of block."""
    form = "float" if plan.layout is None else plan.layout.NAME
    lines = [f"{model}: {', '.join(map(str, recipe.steps))}, as {form}"]
    counts: dict[str, int] = {}
    for target in plan.targets.values():
        counts[target.scheme.label] = counts.get(target.scheme.label, 0) + (target.experts or 1)
    kind = "packed" if recipe.scheme is None else "quantized"
    lines += [f"  {kind:<10} {count} linear layers: {label}" for label, count in counts.items()]
    if plan.pruning is not None:
        how = plan.pruning.parameters
        lines.append(f"  pruned     {len(plan.pruned)} linear layers to {how['pattern']} by {how['criterion']}")
    if plan.activating is not None:
        counts = Counter(place.kind for place in plan.activating.places)
        counts.update({THRESHOLD: len(plan.activating.inputs)} if plan.activating.inputs else {})
        told = (spared.counted(kind, count) for kind, count in counts.items())
        lines.append(f"  changed    {', '.join(told)}")
    lines.append(f"  size       {plan.output_bytes:,} bytes of tensors")
    for reason, names in _by_reason((left.module, left.reason) for left in plan.left).items():
        lines.append(f"  left alone {_shortened(names)}: {reason}")
    if plan.unused:
        lines.append(f"  copied, though the model does not use them: {_shortened(plan.unused)}")
    groups = sum(len(structure.groups) for structure in plan.findings.structures.values())
    if groups:
        lines.append(f"  smoothing  {groups} groups found (each is proven on the weights when it is folded)")
    lines += [f"  servers    {verdict.headline()}" for verdict in _servers(plan, recipe, model)]
    lines += [f"  note: {note}" for note in plan.notes]
    return "\n".join([*lines, *more, *(_explained(plan) if explain else [])])


def _explained(plan: Plan) -> list[str]:
    """What every block's data flow showed; blocks that are alike are told together."""
    alike: dict[str, list[int]] = {}
    for number, structure in sorted(plan.findings.structures.items()):
        alike.setdefault("\n".join(_structure_lines(structure)), []).append(number)
    lines: list[str] = []
    for text, numbers in alike.items():
        lines.append(f"{plan.findings.blocks}: block{'s' if len(numbers) > 1 else ''} {_runs(numbers)}")
        lines += [f"  {line}" for line in text.splitlines()]
    return lines


def _structure_lines(structure: Structure) -> list[str]:
    lines = []
    for group in structure.groups:
        consumers = sorted({edit.parameter for edit in group.consumers})
        also = sorted({edit.parameter for edit in group.producers} - {group.name})
        gain = ", multiplies by 1 + weight" if any(edit.offset for edit in group.producers) else ""
        divided = f" (with {', '.join(also)})" if also else ""
        lines.append(f"{group.kind} {group.name}{divided}{gain}, {group.channels} channels -> {', '.join(consumers)}")
    lines += [f"no group at {each.kind} {each.parameter}: {each.reason}" for each in structure.refusals]
    for use in structure.linears:
        kind = "experts" if use.expert_axis is not None else use.role
        lines.append(f"{kind} {use.parameter}{': ' + use.reason if use.reason else ''}")
    lines += [f"other {name}: {what}" for name, what in sorted(structure.others.items())]
    lines += [f"activation {each.module} -> {', '.join(each.feeds)}" for each in structure.activations]
    lines += [f"norm {each.module} -> {', '.join(each.feeds)}" for each in structure.norms]
    lines += [f"no relu at {name}: {why}" for name, why in sorted(structure.unchanged.items())]
    return lines


def _by_reason(items: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, reason in items:
        groups.setdefault(reason, []).append(name)
    return groups


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _runs(numbers: Sequence[int]) -> str:
    """Ascending numbers as `0`, `0 to 5` or `0, 2 to 4`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
