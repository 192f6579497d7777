"""`quantkit eval`: perplexity or last-word accuracy, tasks of lm-eval, and what was lost against a baseline."""

from typing import Any

import click

from quantkit.cli.options import (
    CONTEXT,
    SPEC_HELP,
    backend_option,
    data_dir_option,
    device_option,
    hub_options,
    json_option,
    log_options,
    say,
)

TASK_FACTS = ("samples", "shots", "version")
"""What stands beside a task's metrics."""


@click.command("eval", context_settings=CONTEXT)
@click.argument("model")
@click.option("--dataset", metavar="SPEC", help=SPEC_HELP + " This or --tasks, or both.")
@click.option("--baseline", metavar="BASE", help="The float model to compare with, on the same tokens.")
@click.option("--seq-len", type=int, metavar="N", help="Tokens of a window. [default: 2048, or the model's context]")
@click.option("--max-tokens", type=int, metavar="N", help="Read only so many tokens from the start.")
@click.option("--batch-size", type=int, metavar="N", help="Windows at once. [default: some 2048 tokens of them]")
@click.option("--tasks", metavar="A,B", help="Tasks of lm-eval to run (pip install 'quantkit[lm-eval]').")
@click.option("--include-path", metavar="DIR", help="A folder with further tasks for lm-eval.")
@click.option("--num-fewshot", type=int, metavar="N", help="Examples in the tasks' prompts. [default: each task's own]")
@click.option("--limit", type=int, metavar="N", help="Run only so many samples of each task.")
@click.option("--restart", is_flag=True, help="Begin anew, whatever the same evaluation did before it was stopped.")
@backend_option
@device_option
@data_dir_option
@hub_options
@log_options
@json_option
def command(model: str, dataset: str | None, tasks: str | None, as_json: bool, **options: Any) -> None:
    """Measure MODEL on a text: perplexity ± standard error, or last-word accuracy; and on tasks of lm-eval.

    MODEL is a folder or a hub id, compressed or not. The text is one stream of tokens without special ones, its
    documents joined by two newlines, cut into windows that don't overlap. With --baseline the same tokens go through
    both models and what was lost is said as well: KL divergence, how often the first choice agrees, and how far the
    probability of the true token moved, with a warning where the mean KL is above 0.1 nats. Tasks are run on both
    models.
    """
    from quantkit.checkpoint import quiet_transformers
    from quantkit.evaluation import evaluate

    quiet_transformers()
    result = evaluate(model, dataset, tasks=tasks.split(",") if tasks is not None else None, **options)
    if as_json:
        import json

        say(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        say(table(result))


def table(result: dict[str, Any]) -> str:
    """The result as lines of label and value, the baseline's numbers beside the model's."""
    rows = [("model", result["model"])]
    if "dataset" in result:
        rows += _text_rows(result)
    rows += _task_rows(result.get("tasks", {}), result.get("baseline_tasks", {}))
    rows += [("seconds", f"{result['seconds']:.1f}"), ("peak memory", _mebibytes(result["peak_memory_bytes"]))]
    for number, each in enumerate(result.get("ranks", ())):
        peak = _mebibytes(each["peak_memory_bytes"])
        rows.append((f"rank {number}", f"{each['seconds']:.1f} s, {each['waited']:.1f} of them waiting; {peak}"))
    rows.append(("backend", result["backend"]))
    rows += _served_rows(result)
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _served_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """A row for each op that packed weights ran, with what ran it and how often; the baseline's where it has any."""
    rows = [
        (label, f"{row['op']} ({row['dtype']}) on {row['backend']}: {row['calls']:,} calls")
        for label, key in (("served", "served"), ("served baseline", "baseline_served"))
        for row in result.get(key, [])
    ]
    return rows if result["served"] else [("served", "no compressed layer: all of the model is float"), *rows]


def _text_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured on a text."""
    rows = [("dataset", result["dataset"]), ("protocol", result["protocol"])]
    if "passages" in result:
        words = {"truncated": "cut on the left", "split": "encoded in two parts", "skipped": "more left out"}
        notes = [f", {result[f'{key}_passages']:,} {said}" for key, said in words.items() if result[f"{key}_passages"]]
        rows.append(("passages", f"{result['passages']:,}" + "".join(notes)))
        rows.append(("accuracy", _beside(result, "accuracy", 100, 2, " %")))
    rows.append(("tokens predicted", f"{result['tokens']:,}"))
    rows.append(("perplexity", _beside(result, "perplexity", 1, 4, "")))
    if result["bits_per_byte"] is not None:
        rows.append(("bits per byte", f"{result['bits_per_byte']:.4f}"))
    if "kl_mean" in result:
        rows += [
            ("KL divergence", f"mean {result['kl_mean']:.3g}, 99th percentile {result['kl_p99']:.3g} nats"),
            ("top-1 agreement", f"{100 * result['top1_agreement']:.2f} %"),
            ("probability change", f"{100 * result['delta_p_rms']:.3g} % (root mean square, true token)"),
        ]
        rows += [("warning", result["warning"])] if "warning" in result else []
    return rows


def _task_rows(tasks: dict[str, dict[str, Any]], baseline: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """A row for every metric of every task, the baseline's number beside the model's."""
    rows = []
    for task, row in tasks.items():
        for key, value in row.items():
            if key in TASK_FACTS or "_stderr" in key or not isinstance(value, (int, float)):
                continue
            text = _with_error(row, key)
            if isinstance(baseline.get(task, {}).get(key), (int, float)):
                text += f" (baseline {_with_error(baseline[task], key)})"
            rows.append((f"{task} {key}", text))
    return rows


def _with_error(row: dict[str, Any], key: str) -> str:
    """`0.4321 ± 0.0102`; without an error where lm-eval gives none. A filter's name comes after a comma."""
    metric, comma, kind = key.partition(",")
    error = row.get(f"{metric}_stderr{comma}{kind}")
    return f"{row[key]:.4f}" if error is None else f"{row[key]:.4f} ± {error:.4f}"


def _beside(result: dict[str, Any], key: str, factor: int, digits: int, unit: str) -> str:
    """`4.6312 ± 0.0813 (baseline 4.6306 ± 0.0812)`; without an error where a single sample has none."""

    def number(name: str) -> str:
        error = result[f"{name}_stderr"]
        text = f"{factor * result[name]:.{digits}f}"
        return text + unit if error is None else f"{text} ± {factor * error:.{digits}f}{unit}"

    baseline = f"baseline_{key}"
    return number(key) + (f" (baseline {number(baseline)})" if baseline in result else "")


def _mebibytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:,.0f} MiB"
