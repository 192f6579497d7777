"""What zeros before linear layers spare at decode, as numbers and as lines of a report.

A token's product with a linear layer [N, K] takes 2 N K operations and reads N K weights. Where a share s of its input
is zero, the s K columns of the weight that these numbers meet need not be read, nor multiplied: 2 N K s operations and
N K s weights are spared. Of experts a token meets those that it is sent to. Aggregated over gamma tokens that are
decoded at once s is the share of neurons that all of them leave unused. What finding the zeros costs, and what of a
gate's zeros could be spared in the up projection, isn't counted.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from quantkit.outcome import ChangedActivation, SparsityReport

WORDS = {
    "activation": "relu in place of {} activations",
    "norm": "relu behind {} norms",
    "up": "relu behind {} up projections",
    "threshold": "thresholds before {} linear layers",
}
SHOWN = 0.001
"""The least share of zeros before or after a change that a screen shows."""


def totals(layers: Sequence[SparsityReport]) -> dict[str, float]:
    """What the linear layers of the blocks take for a token, and what of that zeros spare: operations and bytes."""
    return {
        "flops": sum(layer.flops for layer in layers),
        "flops_spared": sum(layer.flops * layer.spared for layer in layers),
        "bytes": sum(layer.nbytes for layer in layers),
        "bytes_spared": sum(layer.nbytes * layer.spared for layer in layers),
    }


def to_list(layers: Sequence[SparsityReport]) -> list[dict[str, Any]]:
    """The layers as plain JSON values, each with what a token's zeros spare."""
    return [
        asdict(each) | {"flops_spared": each.flops * each.spared, "bytes_spared": each.nbytes * each.spared}
        for each in layers
    ]


def counted(kind: str, count: int) -> str:
    """So many changes of a kind, in words."""
    words = WORDS[kind].format(count)
    return words.removesuffix("s") if count == 1 else words


def changed_line(changes: Sequence[ChangedActivation]) -> str | None:
    """What was changed, in a line; None where nothing was."""
    found = []
    for kind in WORDS:
        values = [each.value for each in changes if each.kind == kind]
        if not values:
            continue
        low, high = min(values), max(values)
        of = "" if high == low == 0 else f" ({low:.4g})" if low == high else f" ({low:.4g} to {high:.4g})"
        found.append(counted(kind, len(values)) + of)
    return ", ".join(found) or None


def zeros_lines(layers: Sequence[SparsityReport]) -> list[str]:
    """How much is zero before linear layers, those of one name together: in a token, and in all of several."""
    groups: dict[str, list[SparsityReport]] = {}
    for each in layers:
        groups.setdefault(each.module.rpartition(".")[2], []).append(each)
    alike: dict[str, list[str]] = {}
    for name, members in groups.items():
        before, after = _mean([each.before for each in members]), _mean([each.after for each in members])
        if max(before.get("1", 0.0), after.get("1", 0.0)) < SHOWN:
            continue
        was = f"{before['1']:.1%} -> " if before.get("1") not in (None, after.get("1")) else ""
        several = [gamma for gamma in after if gamma != "1"]
        shares = ", ".join(f"{after[gamma]:.1%}" for gamma in several)
        more = f"; in all of {', '.join(several)} tokens {shares}" if several else ""
        alike.setdefault(f"{was}{after.get('1', 0.0):.1%} of the input{more}", []).append(name)
    return [f"{', '.join(names)}: {text}" for text, names in alike.items()]


def decode_line(layers: Sequence[SparsityReport]) -> str:
    """What that spares at decode, in a line."""
    found = totals(layers)
    share = found["flops_spared"] / found["flops"] if found["flops"] else 0.0
    flops = f"{found['flops_spared']:.3g} of {found['flops']:.3g}"
    megabytes = f"{found['bytes_spared'] / 1e6:,.3g} of {found['bytes'] / 1e6:,.3g} MB"
    return f"a token's zeros spare {share:.1%} of the blocks' linear layers: {flops} operations, {megabytes} of weights"


def _mean(shares: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of several layers' shares by gamma."""
    known = dict.fromkeys(gamma for each in shares for gamma in each)
    return {gamma: sum(each.get(gamma, 0.0) for each in shares) / len(shares) for gamma in known}
