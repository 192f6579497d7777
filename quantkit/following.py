"""What the ranks after the first do in a run: they work along, and leave the output to the first."""

from dataclasses import asdict
from typing import Any

import torch

from quantkit.footprint import Batching
from quantkit.journal import Journal
from quantkit.ranks import Ranks, RankError
from quantkit.report import Report
from quantkit.verification import verify_share

SAME = ("version of quantkit", "version of torch", "version of transformers", "recipe", "format", "device")
"""What of a run's fingerprint must be the same for all ranks; of the model it is what lies in its files."""


def same_work(ranks: Ranks, known: dict[str, Any]) -> None:
    """Return nothing; raise RankError when ranks are about to work on different models, or by different software."""
    for key in SAME:
        ranks.agree(key, known[key])
    model = known["model"]
    files = {name: (size, header) for name, (size, _, header) in model.get("files", {}).items()}
    ranks.agree("model", [model["config"], files or model.get("tensors")])


def lead(ranks: Ranks, journal: Journal, batching: Batching | None) -> None:
    """Tell the other ranks what is finished, and how windows are to run."""
    if not ranks.is_alone:
        ranks.told((journal.taken(), None if batching is None else asdict(batching)))


def follow(ranks: Ranks) -> tuple[Journal, Batching | None]:
    """What `lead` tells."""
    taken, batching = ranks.told(({}, None))
    return Journal.follow(taken, ranks.rank), None if batching is None else Batching(**batching)


def ended(ranks: Ranks) -> Report:
    """The report of the first rank, once its output is there; the share of the verification is done before."""
    verify_share()
    report: Report | None = ranks.told(None)
    if report is None:
        raise RankError("the first rank ended without a report")
    return report


def batches_of(ranks: Ranks, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """This rank's batches of windows.

    Raises:
        RankError: there are more ranks than batches.
    """
    if len(parts) < ranks.count:
        raise RankError(
            f"{sum(map(len, parts))} calibration windows make {len(parts)} batches, and there are {ranks.count} ranks: "
            "give more --samples, or fewer processes"
        )
    return ranks.share(parts)
