"""The report: what happened to every layer and what it cost, as text, JSON and a model card."""

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantkit import spared
from quantkit.checkpoint import Source
from quantkit.durable import put, write_json
from quantkit.methods import relu
from quantkit.methods.sparse24 import COST
from quantkit.outcome import ChangedActivation, GroupReport, LayerReport, Outcome, PrunedReport, SparsityReport
from quantkit.planning import LeftAlone, PatternMatch, Plan
from quantkit.recipe import Recipe
from quantkit.recovered import Recovered
from quantkit.scheme import FLOAT
from quantkit.sparsity import is_packable
from quantkit.version import __version__

REPORT_FILE = "quantkit_report.json"
LICENCE_KEYS = ("license", "license_name", "license_link")
MOST_LINES = 8
"""Lines of one kind that a screen has room for."""
PACKAGES = ("torch", "transformers", "safetensors")


@dataclass
class Report:
    """What a run did. `to_dict` is what `quantkit_report.json` holds.

    Attributes:
        model: what was compressed.
        recipe: the recipe, as in `quantkit_recipe.json`.
        format: the format on disk.
        layers: every linear layer that is quantized, or packed in float.
        left_alone: every other weight matrix, with the reason.
        copied_unused: tensors that the model doesn't use, copied as they were.
        renamed: tied tensors that were stored under their second name, to the first, under which they are written.
        patterns: what each pattern matched.
        bytes_before: bytes of the source's tensors.
        bytes_after: bytes of the written tensors.
        verified: how many tensors and layers were read back from disk and found right.
        seconds: wall-clock time, evaluation aside.
        peak_memory_bytes: the process's peak memory (VmHWM), or None where it can't be read.
        predicted_memory_bytes: what the plan said of that peak, or None.
        pruned: every linear layer of which weights were set to zero, if the recipe prunes.
        groups: what became of every smoothing group, if the recipe smooths.
        activations: every module whose input or output is put through something new, if the recipe changes such.
        sparsity: how much of every linear layer's input is zero, if it does and there were data.
        evaluation: what `quantkit eval` found, if asked.
        notes: what else a reader should know.
        pushed: where on the hub it lies, said by the run that sent it; `quantkit_report.json` was written before.
        recovery: what training the float weights did, if they were trained.
    """

    model: str
    recipe: dict[str, Any]
    format: str
    layers: list[LayerReport]
    left_alone: list[LeftAlone]
    copied_unused: list[str]
    renamed: dict[str, str]
    patterns: list[PatternMatch]
    bytes_before: int
    bytes_after: int
    verified: dict[str, int]
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    predicted_memory_bytes: int | None = None
    pruned: list[PrunedReport] = field(default_factory=list)
    groups: list[GroupReport] = field(default_factory=list)
    activations: list[ChangedActivation] = field(default_factory=list)
    sparsity: list[SparsityReport] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    pushed: dict[str, Any] | None = None
    recovery: Recovered | None = None

    @classmethod
    def of(
        cls,
        source: Source,
        recipe: Recipe,
        plan: Plan,
        done: Outcome,
        nbytes: int,
        verified: dict[str, int],
    ) -> "Report":
        """The report of a run that has just been written."""
        versions = {"quantkit": __version__, "python": platform.python_version()}
        versions |= {package: version(package) for package in PACKAGES}
        return cls(
            source.name,
            recipe.to_dict(),
            "float" if plan.layout is None else plan.layout.NAME,
            list(done.layers),
            list(plan.left),
            list(plan.unused),
            dict(plan.renamed),
            list(plan.patterns),
            source.weights.nbytes,
            nbytes,
            verified,
            pruned=list(done.pruned),
            groups=list(done.groups),
            activations=list(done.activations),
            sparsity=list(done.sparsity),
            notes=[*plan.notes, *done.notes],
            versions=versions,
        )

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights, of all quantized layers together."""
        weights = [layer.shape[0] * layer.shape[1] for layer in self.layers] or [1]
        bits = sum(layer.bits_per_weight * count for layer, count in zip(self.layers, weights, strict=False))
        return bits / sum(weights)

    @property
    def is_packed_float(self) -> bool:
        """Whether linear layers are packed without their zeros, and not quantized."""
        words = [layer.scheme.partition(" ") for layer in self.layers]
        return bool(words) and all(is_packable(pattern) and rest == FLOAT for pattern, _, rest in words)

    @property
    def worst(self) -> LayerReport | None:
        """The layer whose weight lost most; None when nothing is quantized."""
        return max(self.layers, key=lambda layer: layer.weight_error, default=None)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        values = {**asdict(self), "bits_per_weight": self.bits_per_weight}
        if self.pushed is None:
            del values["pushed"]
        if self.sparsity:
            values |= {"sparsity": spared.to_list(self.sparsity), "decode": spared.totals(self.sparsity)}
        if self.recovery is None:
            del values["recovery"]
        return values

    def _quantized_lines(self) -> list[str]:
        if self.worst is None:
            return ["  quantized  nothing: all weights stay in float"]
        size = f"{self.bits_per_weight:.2f} bits per weight"
        if self.is_packed_float:
            return [f"  packed     {len(self.layers)} linear layers in float, {size}"]
        return [
            f"  quantized  {len(self.layers)} linear layers, {size}",
            f"  worst      {self.worst.module}: weight error {self.worst.weight_error:.2%}",
            *self._outlier_lines(),
        ]

    def pruned_lines(self) -> list[str]:
        """Lines on weights that were set to zero, criterion by criterion; none where there are none."""
        lines = []
        for criterion in dict.fromkeys(layer.criterion for layer in self.pruned):
            layers = [layer for layer in self.pruned if layer.criterion == criterion]
            sizes = [layer.shape[0] * layer.shape[1] for layer in layers]
            zeros = sum(layer.sparsity * size for layer, size in zip(layers, sizes, strict=True)) / sum(sizes)
            worst = max(layers, key=lambda layer: layer.output_error or layer.weight_error)
            error, of = worst.output_error, "its output on calibration data"
            error, of = (worst.weight_error, "its weight") if error is None else (error, of)
            lines.append(
                f"{len(layers)} linear layers to {layers[0].pattern} by {criterion}, {zeros:.1%} of their weights are "
                f"zero; most changed {worst.module}: {error:.2%} of {of}"
            )
        return lines

    def activation_lines(self) -> list[tuple[str, str]]:
        """Lines on what is changed between linear layers and how much of their input is zero, each with its kind."""
        changed = spared.changed_line(self.activations)
        if changed is None:
            return []
        lines = [("changed", changed), *(("zeros", line) for line in spared.zeros_lines(self.sparsity))]
        return [*lines, ("decode", spared.decode_line(self.sparsity))] if self.sparsity else lines

    def _outlier_lines(self) -> list[str]:
        """A line on columns of weights that stay in float; none where the scheme has no such."""
        counts = {layer: layer.outlier_columns for layer in self.layers if layer.outlier_columns is not None}
        if not counts:
            return []
        most = max(counts, key=lambda layer: counts[layer] / layer.shape[1])
        return [
            f"  in float   {sum(counts.values()):,} columns of outliers, most of them in {most.module}: "
            f"{most.outlier_columns:,} of {most.shape[1]:,}"
        ]

    def to_text(self) -> str:
        """The report on one screen."""
        ratio = self.bytes_before / self.bytes_after
        lines = [
            f"{self.model}: {', '.join(self.recipe['steps'])}, as {self.format}",
            *self._quantized_lines(),
            *(f"  pruned     {line}" for line in self.pruned_lines()),
            *(f"  {kind:<10} {line}" for kind, line in self.activation_lines()),
            *(f"  recovered  {line}" for line in (self.recovery.lines() if self.recovery else ())),
            f"  size       {self.bytes_before:,} -> {self.bytes_after:,} bytes of tensors ({ratio:.2f}x smaller)",
            f"  verified   {self.verified['tensors']} tensors read back from disk",
            f"  cost       {self.seconds:.1f} s, {_megabytes(self.peak_memory_bytes)} peak memory "
            f"(predicted {_megabytes(self.predicted_memory_bytes)})",
        ]
        lines += group_lines(self.groups)
        more = [f"  --{match.kind} {match.pattern}: {match.matched} linear layers" for match in self.patterns]
        more += [f"  note: {note}" for note in self.notes]
        more += [f"  written as {new}, its tie: {old}" for old, new in self.renamed.items()]
        left = _by_reason(self.left_alone).items()
        more += [f"  left alone {_shortened(names)}: {reason}" for reason, names in left]
        lines += _first(more)
        if self.copied_unused:
            lines.append(f"  copied, though the model does not use them: {_shortened(self.copied_unused)}")
        if self.evaluation is not None:
            lines.append("  " + evaluation_line(self.evaluation))
            if "warning" in self.evaluation:
                lines.append(f"  warning    {self.evaluation['warning']}")
        if self.pushed is not None:
            lines.append("  pushed     " + pushed_line(self.pushed))
        return "\n".join(lines)


def group_lines(groups: Sequence[GroupReport]) -> list[str]:
    """A few lines on smoothing groups: how many were folded, and every kind of reason why others weren't."""
    if not groups:
        return []
    states = Counter(group.state for group in groups)
    lines = ["  smoothing  " + ", ".join(f"{count} groups {state}" for state, count in states.items())]
    reasons: dict[str, list[str]] = {}
    for group in groups:
        if group.state != "folded":
            reasons.setdefault(f"{group.state}: {group.reason}", []).append(f"{group.block}.{group.producer}")
    return lines + _first([f"  not folded {_shortened(names)}: {reason}" for reason, names in reasons.items()])


def evaluation_line(result: dict[str, Any]) -> str:
    """One line of what an evaluation with a baseline found."""
    error = result["perplexity_stderr"]
    spread = "" if error is None else f" ± {error:.4f}"
    return (
        f"evaluation perplexity {result['perplexity']:.4f}{spread} "
        f"(float {result['baseline_perplexity']:.4f}), KL {result['kl_mean']:.2e}, "
        f"top-1 {result['top1_agreement']:.2%}, {result['tokens']:,} tokens of {result['dataset']}"
    )


def pushed_line(pushed: dict[str, Any]) -> str:
    """One line of what was sent to the hub, and where it lies."""
    line = f"{len(pushed['files'])} files, {pushed['bytes']:,} bytes, to {pushed['url']} at commit {pushed['commit']}"
    if pushed["removed"]:
        line += f"; removed there: {', '.join(pushed['removed'])}"
    return line


def _by_reason(left: Sequence[LeftAlone]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for item in left:
        groups.setdefault(item.reason, []).append(item.module)
    return groups


def _first(lines: list[str]) -> list[str]:
    """As many lines as a screen has room for."""
    more = f"  and {len(lines) - MOST_LINES + 1} lines more, in {REPORT_FILE}"
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], more]


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _megabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:,.0f} MB"


def write_report(folder: Path, report: Report) -> None:
    """Write `quantkit_report.json`."""
    temporary = folder / f".{REPORT_FILE}.tmp"
    write_json(temporary, report.to_dict())
    put(temporary, folder / REPORT_FILE)


def model_card(report: Report, source: Source) -> str:
    """The README.md of the checkpoint."""
    front = _front_matter(report, source)
    steps = ", ".join(f"`{step}`" for step in report.recipe["steps"])
    body = [
        f"# {_title(report.model, source)}, compressed",
        "",
        f"Made from {_origin(report.model, source)} by quantkit {report.versions.get('quantkit')} with {steps}, "
        f"stored as {report.format}.",
        "",
        "```python",
        "import quantkit",
        "",
        'model = quantkit.load("path/of/this/folder")',
        "```",
        "",
        "| | |",
        "| --- | --- |",
        f"| bytes of tensors | {report.bytes_before:,} before, {report.bytes_after:,} after |",
    ]
    if report.is_packed_float:
        body.append(f"| packed linear layers, in float | {len(report.layers)} |")
        body.append(f"| bits per packed weight | {report.bits_per_weight:.2f} |")
    elif report.worst is not None:
        body.append(f"| quantized linear layers | {len(report.layers)} |")
        body.append(f"| bits per quantized weight | {report.bits_per_weight:.2f} |")
        body.append(f"| largest weight error | {report.worst.weight_error:.2%} ({report.worst.module}) |")
    body += [f"| pruned | {line} |" for line in report.pruned_lines()]
    body += [f"| {kind} | {line} |" for kind, line in report.activation_lines()]
    body += [f"| recovered | {line} |" for line in (report.recovery.lines() if report.recovery else ())]
    if report.pruned:
        body += ["", f"What that cost in the papers: {COST}."]
    if any(each.kind != "threshold" for each in report.activations):
        body += ["", f"What that cost in the papers: {relu.COST}."]
    if report.evaluation is not None:
        line = evaluation_line(report.evaluation).removeprefix("evaluation ")
        body += ["", line[0].upper() + line[1:] + "."]  # capitalize() would change the data set's name
        if "warning" in report.evaluation:
            body += ["", f"Warning: {report.evaluation['warning']}."]
    elif report.recovery is None or report.recovery.perplexity is None:
        body += ["", "Not evaluated yet: `quantkit eval THIS --dataset SPEC --baseline FLOAT_MODEL`."]
    return "\n".join([*front, "---", "", *body, ""])


def _front_matter(report: Report, source: Source) -> list[str]:
    """The lines of metadata, as the hub reads them, that a model card begins with."""
    front = ["---", "library_name: transformers"]
    if _commit(report.model, source) is not None:
        front.append(f"base_model: {report.model}")
        if report.layers and not report.is_packed_float:
            front.append("base_model_relation: quantized")
    front += ["tags:", "- quantkit"]
    if report.layers:
        front += [f"- {report.format}", f"- {report.recipe['steps'][-1].partition(':')[0]}"]
    return front + _licence(source)


def conversion_card(source: Source, form: str, facts: Mapping[str, str], notes: Sequence[str]) -> str:
    """The README.md of a checkpoint that was only converted: what it was made from, into which format, and how."""
    front = ["---", "library_name: transformers", "tags:", "- quantkit", f"- {form}", *_licence(source), "---"]
    body = [
        f"# {_title(source.name, source)}, as {form}",
        "",
        f"Made from {_origin(source.name, source)} by `quantkit convert` {__version__}: nothing was quantized again.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {what} | {value} |" for what, value in facts.items()),
        *(line for note in notes for line in ("", f"{note[0].upper()}{note[1:]}.")),
        "",
        "Not evaluated yet: `quantkit eval THIS --dataset SPEC --baseline FLOAT_MODEL`.",
    ]
    return "\n".join([*front, "", *body, ""])


def _commit(model: str, source: Source) -> str | None:
    """The commit of a model of the hub, which is the name of its folder in the cache; None for any other model."""
    if source.folder is None or source.folder.parent.name != "snapshots" or Path(model).is_dir():
        return None
    return source.folder.name


def _origin(model: str, source: Source) -> str:
    """What a model was made from, without the path of a folder, which is of no use to others."""
    commit = _commit(model, source)
    return f"`{_title(model, source)}`" if commit is None else f"`{model}` (commit `{commit}`)"


def _title(model: str, source: Source) -> str:
    """The model's own name, also where the user called it `.`, `..`, `~` or `/`."""
    name = Path(model).name
    if name in ("", "..", "~") and source.folder is not None:
        name = source.folder.resolve().name
    return name or model


def _licence(source: Source) -> list[str]:
    """What the source's own model card states of its licence, each on a line of its own; none where it says nothing."""
    card = source.folder / "README.md" if source.folder is not None else None
    if card is None or not card.is_file():
        return []
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    lines = parts[1].splitlines() if len(parts) == 3 and not parts[0].strip() else []
    stated: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        value = value.strip()
        # YAML for nothing, and the beginnings of lists, mappings, comments and texts of several lines.
        if key in LICENCE_KEYS and value not in ("", "~", "null", '""', "''") and value[0] not in "-[{#|>":
            stated.setdefault(key, value)
    return [f"{key}: {value}" for key, value in stated.items()] if "license" in stated else []
