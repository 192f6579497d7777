"""quantize() for recipes with a `recover` step: transforms, training and quantizer, each from a checkpoint to the next.

What lies between two of them is an ordinary checkpoint inside of `OUT.partial`, which a run that was stopped takes up;
each stage goes on by itself where it was stopped. Recipes without such a step go to `pipeline.quantize` as they are.
"""

import functools
import inspect
import json
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from quantkit import pipeline
from quantkit.checkpoint import Hub
from quantkit.durable import write_text, writing
from quantkit.errors import QuantkitError, RecipeError
from quantkit.identity import identity, refuse_changed
from quantkit.journal import STATE, outcome_of, records, write_whole
from quantkit.launched import launched
from quantkit.methods import method_class
from quantkit.output import MARKER, partial_folder, refuse_existing
from quantkit.publishing import Publication
from quantkit.recipe import Recipe, Step
from quantkit.recovered import Recovered
from quantkit.recovery import recover as train
from quantkit.report import REPORT_FILE, Report, model_card, write_report
from quantkit.runlog import log_path
from quantkit.version import __version__

BEGUN = "record-stages.json"
RESULT = "result"

WORDS = inspect.signature(pipeline.quantize)

OF_RECOVERY = ("max_memory", "data_dir", "token", "cache_dir", "trust_remote_code", "progress", "device", "seq_len")
"""Words of `quantize` that `recover` has too."""
OF_THE_END = ("push_to_hub", "private", "replace_weights", "commit_message", "eval_dataset", "restart", "format")
"""Words that concern the result alone."""


@functools.wraps(pipeline.quantize)
def quantize(model: str | Path | nn.Module, output: str | Path, **words: Any) -> Report:
    """Compress a model, with a training in between where the recipe says `recover`; see `pipeline.quantize`."""
    tokens = words.pop("recover", None)
    recipe = _recipe(words, tokens)
    if not recipe.trains:
        return pipeline.quantize(model, output, **words)
    if launched().count > 1:
        raise QuantkitError(
            f"a recipe with recover runs in one process, and WORLD_SIZE is {launched().count}: quantize first, then "
            "launch `quantkit recover` for several"
        )
    if isinstance(model, nn.Module):
        raise QuantkitError("a model in memory cannot be recovered; save it, and give its folder")
    return _Staged(model, refuse_existing(output), recipe, _bound(words)).run()


quantize.__signature__ = WORDS.replace(  # type: ignore[attr-defined]
    parameters=[
        *WORDS.parameters.values(),
        inspect.Parameter("recover", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="str | int | None"),
    ]
)


def _bound(words: Mapping[str, Any]) -> dict[str, Any]:
    """All words of `pipeline.quantize`, defaults filled in."""
    bound = WORDS.bind("", "", **words)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name not in ("model", "output")}


def _recipe(words: Mapping[str, Any], tokens: str | int | None) -> Recipe:
    """The recipe that the words say; with `tokens` it is trained on so many, after all transforms."""
    given = {"steps": (), "recipe": None, "include": (), "ignore": (), "seed": None} | dict(words)
    found = pipeline.recipe_of(*(given[name] for name in ("recipe", "steps", "include", "ignore", "seed")))
    if tokens is None:
        return found
    if found.trains:
        raise RecipeError("--recover is given, and the recipe has a recover step; leave one of them out")
    step = Step("recover", {"tokens": str(tokens), "distill": "0.5"})
    transforms = len(found.transforms)
    return replace(found, steps=(*found.steps[:transforms], step, *found.steps[transforms:]))


def split(recipe: Recipe) -> list[tuple[Step, ...]]:
    """The steps of each stage, in order: those of `pipeline.quantize` together, and every training by itself."""
    stages: list[tuple[Step, ...]] = []
    for step in recipe.steps:
        alone = method_class(step.name).trains
        if stages and not alone and not method_class(stages[-1][-1].name).trains:
            stages[-1] += (step,)
        else:
            stages.append((step,))
    return stages


@dataclass
class _Staged:
    """One run.

    Attributes:
        model: a folder or hub id.
        target: where the result goes.
        recipe: all of it.
        words: those of `pipeline.quantize`.
    """

    model: str | Path
    target: Path
    recipe: Recipe
    words: dict[str, Any]

    def run(self) -> Report:
        """Carry out every stage that isn't done yet; the result's report."""
        started, words = time.monotonic(), self.words
        if words["dataset"] is None:
            raise RecipeError(
                f"{', '.join(map(str, self.recipe.steps))} is trained on text; give --dataset SPEC (a file such as "
                "text.txt, or a data set)"
            )
        publication = None
        if words["push_to_hub"] is not None:
            options = (words[name] for name in ("private", "replace_weights", "commit_message", "token"))
            publication = Publication(words["push_to_hub"], *options)
            publication.check()
        hub = Hub(*(words[name] for name in ("revision", "token", "cache_dir", "trust_remote_code", "progress")))
        source = pipeline.open_source(self.model, hub, words["tokenizer"], dequantize=words["dequantize"])
        evaluation = None
        if words["eval_dataset"] is not None:
            evaluation = pipeline.prepare_evaluation(
                source,
                self.model,
                self.recipe,
                words["eval_dataset"],
                words["seq_len"],
                words["data_dir"],
                hub,
                words["device"],
                words["progress"],
            )
        known = self._fingerprint(identity(source))
        with partial_folder(self.target, known, restart=words["restart"]) as folder:
            report = self._stages(folder)
            refuse_changed(source, known["model"])
            report.model, report.bytes_before = source.name, source.weights.nbytes
            report.seconds = max(report.seconds, time.monotonic() - started)
            recipe = replace(self.recipe, dataset=report.recipe["dataset"])
            write_text(folder / pipeline.RECIPE_FILE, recipe.to_json())
            report.recipe = recipe.to_dict()
            self._finish(folder, report, source)
        if evaluation is not None:
            try:
                report.evaluation = evaluation(self.target)
            except QuantkitError as error:
                raise QuantkitError(
                    f"{self.target} is written and verified, but its evaluation failed: {error}"
                ) from error
            self._finish(self.target, report, source)
        if publication is not None:
            report.pushed = publication.push(self.target, words["progress"])
        return report

    @staticmethod
    def _finish(folder: Path, report: Report, source: Any) -> None:
        write_report(folder, report)
        write_text(folder / "README.md", model_card(report, source))

    def _fingerprint(self, model: dict[str, Any]) -> dict[str, Any]:
        names = ("dataset", "samples", "seq_len", "format", "max_shard_size", "device", "eval_dataset")
        return {
            "version of quantkit": __version__,
            "recipe": self.recipe.to_dict(),
            "model": model,
            **{name: None if self.words[name] is None else str(self.words[name]) for name in names},
        }

    def _stages(self, folder: Path) -> Report:
        """The report of the last stage, whose files lie in the folder then."""
        write_whole(folder / STATE / BEGUN, {"stages": len(split(self.recipe))})
        stages = split(self.recipe)
        made: list[Path] = []
        try:
            for number, steps in enumerate(stages[:-1]):
                output = folder / f"stage-{number}"
                if not output.is_dir():
                    self._stage(steps, made[-1] if made else self.model, output, first=not made)
                made.append(output)
            self._clean(folder, made)
            report = self._stage(
                stages[-1], made[-1] if made else self.model, folder / RESULT, first=not made, last=True
            )
        except BaseException:
            if not made and not any(records(path) for path in folder.glob("*.partial")):
                with suppress(OSError):
                    (folder / STATE / BEGUN).unlink()  # nothing is finished that would be worth keeping
            raise
        self._gather(report, made)
        with writing(folder):
            for path in (folder / RESULT).iterdir():
                path.replace(folder / path.name)
            (folder / RESULT).rmdir()
            for output in made:
                shutil.rmtree(output)
        return report

    def _clean(self, folder: Path, made: list[Path]) -> None:
        """Remove what a run that was stopped between its last stage and its end had put together."""
        kept = {MARKER, STATE, *(path.name for path in made), f"{RESULT}.partial", f"{RESULT}.log.jsonl"}
        with writing(folder):
            for path in folder.iterdir():
                if path.name not in kept and path.is_dir():
                    shutil.rmtree(path)
                elif path.name not in kept:
                    path.unlink()

    def _stage(
        self, steps: tuple[Step, ...], model: str | Path, output: Path, *, first: bool, last: bool = False
    ) -> Report:
        """Carry out one stage; its log goes to the end of the run's."""
        words = self.words
        if method_class(steps[0].name).trains:
            report = self._train(steps[0], model, output, first=first)
        else:
            mine = {name: value for name, value in words.items() if name not in OF_THE_END}
            recipe = Recipe(steps, self.recipe.include, self.recipe.ignore, self.recipe.seed)
            mine |= {"steps": (), "recipe": recipe, "include": (), "ignore": (), "seed": None}
            mine |= {} if first else {"revision": None, "dequantize": False}
            mine |= {} if recipe.reports else {"dataset": None, "seq_len": None}
            report = pipeline.quantize(model, output, **mine, **({"format": words["format"]} if last else {}))
        log = log_path(output)
        with suppress(OSError), log_path(self.target).open("ab") as whole:
            whole.write(log.read_bytes())
            log.unlink()
        return report

    def _train(self, step: Step, model: str | Path, output: Path, *, first: bool) -> Report:
        values, words = step.parameters, self.words
        report = train(
            model,
            output,
            dataset=words["dataset"],
            tokens=values["tokens"],
            learning_rate=values["lr"],
            batch_tokens=values["batch"],
            warmup=values["warmup"],
            teacher=self.model if float(values["distill"]) or not first else None,
            distill=values["distill"],
            train=values["train"],
            lora=int(values["lora"]),
            mixed_precision=values["precision"],
            seed=self.recipe.seed,
            eval_dataset=words["eval_dataset"],
            max_shard_size=words["max_shard_size"],
            revision=words["revision"] if first else None,
            **{name: words[name] for name in OF_RECOVERY},
        )
        if report is None:
            raise QuantkitError("a recipe with recover runs in one process; launch `quantkit recover` for several")
        return report

    def _gather(self, report: Report, made: list[Path]) -> None:
        """Put into the result's report what the stages before it did."""
        seconds, peaks = report.seconds, [report.peak_memory_bytes or 0]
        for output in reversed(made):
            said = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))
            before = outcome_of(said)
            for name in ("pruned", "groups", "activations", "sparsity"):
                if not getattr(report, name):
                    setattr(report, name, getattr(before, name))
            report.notes += [note for note in before.notes if note not in report.notes]
            report.recipe["dataset"] = report.recipe["dataset"] or said["recipe"]["dataset"]
            if report.recovery is None and said.get("recovery") is not None:
                report.recovery = Recovered(**said["recovery"])
            seconds, peaks = seconds + said["seconds"], [*peaks, said["peak_memory_bytes"] or 0]
        report.seconds, report.peak_memory_bytes = seconds, max(peaks) or None
