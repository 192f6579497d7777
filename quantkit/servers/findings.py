"""What a check says: findings one by one, and the verdict of a server."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

SEVERITIES = ("error", "warning", "note")
HARDWARE = {
    "cpu": "a CPU without AMX",
    "cpu-amx": "an Intel CPU with AMX",
    "sm75": "Turing",
    "sm80": "Ampere",
    "sm89": "Ada",
    "sm90": "Hopper",
    "sm100": "Blackwell",
    "sm120": "Blackwell RTX",
}
"""What a server can run on, as far as quantkit knows rules for it."""
CPUS = ("cpu", "cpu-amx")
GPUS = tuple(name for name in HARDWARE if name not in CPUS)


@dataclass(frozen=True)
class Finding:
    """One rule and what it says of a checkpoint.

    Attributes:
        severity: `error` where the server refuses or computes something else than the checkpoint means; `warning` for
            a limit of hardware, or for what the server does beside the checkpoint's intention; `note` for the rest,
            and for what wasn't checked.
        where: the tensors, layers or keys of config.json that it is about.
        rule: what the server demands or does, and the remedy if there is one.
        source: what the rule was read in, with its version.
        hardware: where it counts; empty for everywhere. A warning with hardware refuses there and nowhere else.
    """

    severity: str
    where: tuple[str, ...]
    rule: str
    source: str
    hardware: tuple[str, ...] = ()

    def to_text(self) -> str:
        """One line: severity, place, rule and source."""
        limits = f" ({', '.join(self.hardware)})" if self.hardware else ""
        shown = ", ".join(self.where[:3])
        more = f" and {len(self.where) - 3} more" if len(self.where) > 3 else ""
        return f"{self.severity}{limits}: {shown}{more}: {self.rule} [{self.source}]"


@dataclass(frozen=True)
class Verdict:
    """What a server would do with a checkpoint.

    Attributes:
        server: its name.
        version: the version whose rules these are.
        state: `served`, `refused` (also for a checkpoint that it would compute something else with), or `not checked`
            where quantkit doesn't know the rules.
        hardware: what was looked at.
        served_on: the part of it on which the server takes the checkpoint.
        findings: errors first, then warnings and notes.
    """

    server: str
    version: str
    state: str
    hardware: tuple[str, ...]
    served_on: tuple[str, ...]
    findings: tuple[Finding, ...]

    @classmethod
    def of(
        cls,
        server: str,
        version: str,
        findings: Iterable[Finding],
        hardware: tuple[str, ...],
        *,
        known: bool = True,
    ) -> "Verdict":
        """The verdict that follows from findings on this hardware; `known` says whether there are rules at all.

        A finding about other hardware is left out, and a limit of all the hardware that is looked at is an error.
        """
        kept = [_on(finding, hardware) for finding in findings]
        ordered = sorted(_merged(f for f in kept if f is not None), key=lambda f: SEVERITIES.index(f.severity))
        limited = {name for finding in ordered if finding.severity == "warning" for name in finding.hardware}
        broken = any(finding.severity == "error" for finding in ordered)
        served = () if broken else tuple(name for name in hardware if name not in limited)
        state = "refused" if not served else "served" if known else "not checked"
        return cls(server, version, state, hardware, () if state == "not checked" else served, tuple(ordered))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        findings = [{**asdict(f), "where": list(f.where), "hardware": list(f.hardware)} for f in self.findings]
        lists = {"hardware": list(self.hardware), "served_on": list(self.served_on), "findings": findings}
        return {**asdict(self), **lists}

    def headline(self) -> str:
        """One line: the server, its version and what it would do."""
        if self.state == "served" and self.served_on != self.hardware:
            others = [name for name in self.hardware if name not in self.served_on]
            text = f"served on: {', '.join(self.served_on)}; refused on: {', '.join(others)}"
        elif self.state == "served":
            text = "served" if len(self.hardware) > 1 else f"served on: {self.hardware[0]}"

        elif self.state == "refused":
            errors = [finding for finding in self.findings if finding.severity == "error"]
            why = f"{_first(errors[0].where)}: {errors[0].rule}" if errors else "each of these has its own reason"
            rest = f" ({len(errors)} errors)" if len(errors) > 1 else ""
            text = f"refused: {why}{rest}"
        else:
            text = "not checked: quantkit knows no rules for this"
        return f"{self.server} {self.version}: {text}"

    def to_text(self) -> str:
        """The headline and a line for every finding."""
        return "\n".join([self.headline(), *(f"  {finding.to_text()}" for finding in self.findings)])


def _first(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _on(finding: Finding, hardware: tuple[str, ...]) -> Finding | None:
    """The finding as it counts on this hardware, or None where it doesn't."""
    if not finding.hardware:
        return finding
    left = tuple(name for name in hardware if name in finding.hardware)
    if not left:
        return None
    if finding.severity == "warning" and left == hardware:
        return replace(finding, severity="error", hardware=())
    return replace(finding, hardware=() if left == hardware else left)


def _merged(findings: Iterable[Finding]) -> list[Finding]:
    """The findings, with those that say the same of several places made one."""
    places: dict[Finding, Counter[str]] = {}
    for finding in findings:
        places.setdefault(replace(finding, where=()), Counter()).update(finding.where)
    return [replace(finding, where=tuple(where)) for finding, where in places.items()]
