"""What the ranks after the first do in a run: they work along, and leave the output to the first."""

from dataclasses import asdict
from typing import Any

from quantkit.errors import CheckpointError, RecipeError
from quantkit.footprint import Batching
from quantkit.journal import Journal
from quantkit.ranks import RankError, Ranks
from quantkit.recipe import Recipe
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


def refuse_idle(ranks: Ranks, windows: int, batching: Batching | None) -> None:
    """Return nothing; raise RecipeError where there are more ranks than batches of so many windows."""
    if batching is None:
        return
    batches = 1 + -(-(windows - 1) // batching.windows)
    if batches < ranks.count:
        raise RecipeError(
            f"{windows} calibration windows make {batches} batches, and there are {ranks.count} processes: give more "
            "--samples, or fewer processes"
        )


def lead(ranks: Ranks, journal: Journal, batching: Batching | None, recipe: Recipe) -> None:
    """Tell the other ranks what is finished, and how windows are to run.

    Raises:
        CheckpointError: the recipe's statistics are rounded by the number of ranks, and the run was begun with another.
    """
    if recipe.observes_pruning:
        begun = int(journal.setting("ranks", {"count": ranks.count})["count"])
        if begun != ranks.count:
            raise CheckpointError(
                f"{journal.writer.folder} was begun with {begun} process{'es' if begun > 1 else ''}, and sums of "
                f"products are rounded otherwise with {ranks.count}: give the same number to go on, --restart to begin "
                "anew, or another -o OUT"
            )
    if not ranks.is_alone:
        ranks.told((journal.taken(), None if batching is None else asdict(batching)))


def follow(ranks: Ranks) -> tuple[Journal, Batching | None]:
    """What `lead` tells."""
    told: tuple[dict[str, Any], dict[str, Any] | None] = ranks.told(({}, None))
    taken, batching = told
    return Journal.follow(taken, ranks.rank), None if batching is None else Batching(**batching)


def ended(ranks: Ranks) -> Report:
    """The report of the first rank, once its output is there; the share of the verification is done before."""
    verify_share()
    report: Report | None = ranks.told(None)
    if report is None:
        raise RankError("the first rank ended without a report")
    return report
