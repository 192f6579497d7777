"""docs/architectures.md out of the lines that run.py wrote.

python tests/coverage/table.py RESULTS.jsonl > docs/architectures.md
"""

import json
import sys
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

RECIPES = ("smoothquant+w8a8", "fp8", "int8", "llm-int8")
EXPLAINED = 3.0
"""An error of at most so many times what random rounding errors cost is one that 8 bits explain."""

EXACT = 1e-4
"""Weight-only logits differ from those of the float model with decoded weights by float32 rounding alone."""

HEAD = """# Architectures

Every entry of transformers' table of causal language models, built tiny with random weights
(`tests/coverage/tiny.py`: hidden size 64, every kind of layer that the architecture has), and taken through the whole
pipeline by four recipes: quantized (calibrated on text where the recipe observes), written, read back with
`quantkit.load`, run, and compared with the float model. No architecture has code or a table entry of its own in
quantkit.

```
python tests/coverage/run.py RESULTS.jsonl            # some five minutes on two cores
python tests/coverage/table.py RESULTS.jsonl > docs/architectures.md
```

- **error**: the norm of the difference of the logits over that of the float logits about their mean. Tiny random
  models are sensitive, mixtures most of all: a token that is sent to another expert changes everything after it.
- **×**: that error over what *random* rounding errors of the same size cost the float model (every quantized weight
  moved by a random share of half a step, by √2 of it where activations are quantized; the mean of three draws). About 1
  is what 8 bits cost; a wrong scale, a swapped expert or a group folded wrongly would be many times that.
- **decoded** (int8 weights only): how far the packed model's logits are from those of the float model with the decoded
  weights, loaded by transformers: float32 rounding, unless something is in the wrong place.
- **share**: quantized weights over all parameters. The embedding is a large part of so small a model; under llm-int8
  experts stay in float, as bitsandbytes has none (`--format quantkit` quantizes them).
- **groups**: smoothing groups that were folded and proven, norm → linears and linear → linear; then what was refused
  and why.

"""


def main() -> None:
    """Print the page."""
    from architectures import ENTRIES, UNBUILDABLE

    rows: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["model_type"]][row["recipe"]] = row
    missing = [entry for entry in ENTRIES if entry not in UNBUILDABLE and set(rows[entry]) != set(RECIPES)]
    if missing:
        sys.exit(f"not every architecture has been run with every recipe: {', '.join(missing)}")
    built = [entry for entry in ENTRIES if entry not in UNBUILDABLE]
    versions = f"transformers {version('transformers')}, torch {version('torch').partition('+')[0]}"
    print(HEAD + summary(built, rows, versions))
    print("## Results\n")
    print("| architecture | smoothquant + w8a8: error, × | fp8 | int8, decoded | llm-int8 | share | groups |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for entry in built:
        cells = [cell(rows[entry][recipe]) for recipe in RECIPES]
        share = rows[entry]["int8"].get("quantized")
        shown = "" if share is None else f"{share:.0%}"
        print(f"| {entry} | {' | '.join(cells)} | {shown} | {groups(rows[entry]['smoothquant+w8a8'])} |")
    print("\n## In plain transformers\n")
    print(
        "The same checkpoints loaded by transformers with compressed-tensors or bitsandbytes, without quantkit, where\n"
        "they are in these formats (quantkit's own needs `import quantkit.hf`), and what stops the others. Some of it\n"
        "is due to dimensions of 16 and 32.\n"
    )
    for recipe in RECIPES:
        print(f"- {recipe}: {plain(built, rows, recipe)}")
    print("\n## Not built\n")
    for entry, reason in UNBUILDABLE.items():
        print(f"- {entry}: {reason}")
    print("\n## What stays in float\n")
    print("Reasons beside embeddings, norms, convolutions and the output layer, with the architectures.\n")
    for reason, names in left(built, rows).items():
        print(f"- {reason}: {', '.join(names)}")
    print("\n## Why norms are not folded\n")
    for reason, names in refused(built, rows).items():
        print(f"- {reason}: {', '.join(names)}")


def fine(row: dict[str, Any]) -> bool:
    """Whether a recipe finished with an error that 8 bits explain."""
    return "error" in row and row["error"] <= EXPLAINED * row["noise"] and (row["decoded"] or 0.0) <= EXACT


def summary(built: list[str], rows: dict[str, dict[str, dict[str, Any]]], versions: str) -> str:
    """The counts."""
    lines = [f"Measured with {versions}: {len(built)} of {len(rows)} entries can be built.\n"]
    lines += ["| recipe | finished, error explained | refused before any work | worst × |", "| --- | --- | --- | --- |"]
    for recipe in RECIPES:
        found = [rows[entry][recipe] for entry in built]
        good, no = sum(map(fine, found)), sum("refused" in row for row in found)
        worst = max((row["error"] / row["noise"] for row in found if "error" in row), default=0.0)
        lines.append(f"| {recipe} | {good} of {len(built)} | {no} | {worst:.1f} |")
    folded = [entry for entry in built if rows[entry]["smoothquant+w8a8"].get("groups", {}).get("norm folded")]
    states = Counter[str]()
    for entry in built:
        states.update(rows[entry]["smoothquant+w8a8"].get("groups", {}))
    undone = sum(len(rows[entry]["smoothquant+w8a8"].get("undone", [])) for entry in built)
    lines += [
        "",
        f"Norm groups are folded in {len(folded)} of {len(built)} architectures; in the others no norm feeds linear "
        f"layers alone (the reasons are at the end). Of all groups {states['norm folded']} norm → linears and "
        f"{states['linear folded']} linear → linear were folded and proven, {undone} undone.",
        "",
        "For comparison: of 139 causal architectures built tiny, llm-compressor 0.14's SmoothQuant W8A8 compresses, "
        "saves and reloads 58, and its FP8 123.",
        "",
    ]
    return "\n".join(lines) + "\n"


def cell(row: dict[str, Any]) -> str:
    """One recipe's result."""
    if "refused" in row:
        return f"refused: {row['refused']}"
    if "error" not in row:
        return "failed"
    decoded = "" if row["decoded"] is None else f", {row['decoded']:.0e}"
    mark = "" if fine(row) else " **!**"
    return f"{row['error']:.1%}, {row['error'] / row['noise']:.1f}{decoded}{mark}"


def plain(built: list[str], rows: dict[str, dict[str, dict[str, Any]]], recipe: str) -> str:
    """How many checkpoints plain transformers runs with an error that 8 bits explain, and why not the others."""
    found = {entry: rows[entry][recipe].get("plain") for entry in built}
    held = {entry: value for entry, value in found.items() if value is not None}
    good = [e for e, value in held.items() if value.get("error", 1e9) <= EXPLAINED * rows[e][recipe]["noise"]]
    reasons: dict[str, list[str]] = defaultdict(list)
    for entry in sorted(set(held) - set(good)):
        value = held[entry]
        reason = value.get("reason") or f"it runs with an error of {value['error']:.0%}"
        reasons["".join("N" if c.isdigit() else c for c in reason)[:110]].append(entry)
    lines = [f"{len(good)} of {len(held)} in these formats load and run with an error that 8 bits explain"]
    lines += [f"  - {reason}: {', '.join(names)}" for reason, names in sorted(reasons.items())]
    return "\n".join(lines)


def groups(row: dict[str, Any]) -> str:
    """What was folded."""
    found = row.get("groups", {})
    return f"{found.get('norm folded', 0)} norm, {found.get('linear folded', 0)} linear"


def left(built: list[str], rows: dict[str, dict[str, dict[str, Any]]]) -> dict[str, list[str]]:
    """Reasons for weights in float, with the architectures where they occur."""
    found: dict[str, list[str]] = defaultdict(list)
    for entry in built:
        for reason in rows[entry]["int8"].get("left", []):
            plain = reason.startswith(("belongs to", "makes the logits")) or "embed" in reason
            if not plain:
                found[reason.split(" with model")[0]].append(entry)
    return {reason: sorted(set(names)) for reason, names in sorted(found.items())}


def refused(built: list[str], rows: dict[str, dict[str, dict[str, Any]]]) -> dict[str, list[str]]:
    """Reasons for norms that don't fold, in architectures where no norm does."""
    found: dict[str, list[str]] = defaultdict(list)
    for entry in built:
        row = rows[entry]["smoothquant+w8a8"]
        if not row.get("groups", {}).get("norm folded"):
            for reason in row.get("refused_norms", []) or ["no norm with a gain feeds anything in a block"]:
                found[reason].append(entry)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    main()
