"""`quantkit bench`: how fast a model runs and what memory it takes, beside the float model."""

from typing import Any

import click

from quantkit.cli.options import CONTEXT, backend_option, device_option, hub_options, json_option, log_options, say

DTYPES = click.Choice(["float32", "bfloat16", "float16"])
MIB = 2**20


@click.command("bench", context_settings=CONTEXT)
@click.argument("model")
@click.option(
    "--baseline",
    metavar="BASE",
    help="The float model to compare with. [default: the folder that MODEL's report names, if it is there]",
)
@click.option("--prompt-tokens", type=int, default=512, show_default=True, metavar="N", help="Tokens of a prompt.")
@click.option(
    "--new-tokens", type=int, default=64, show_default=True, metavar="N", help="Steps after it; 0 measures none."
)
@click.option("--batch", type=int, default=1, show_default=True, metavar="N", help="Prompts at once.")
@click.option("--runs", type=int, default=5, show_default=True, metavar="N", help="Runs of each model, in turn.")
@click.option("--dtype", type=DTYPES, help="Of what isn't compressed. [default: what MODEL says]")
@click.option(
    "--baseline-dtype",
    type=DTYPES,
    help="Of the baseline. [default: float32 and bfloat16 on a CPU, bfloat16 on a GPU]",
)
@click.option(
    "--cache",
    type=click.Choice(["auto", "dynamic", "static"]),
    default="auto",
    show_default=True,
    help="The key-value cache; auto is static, and compiled, on a GPU where transformers offers it.",
)
@click.option(
    "--keep-decoded/--no-keep-decoded",
    default=None,
    help="On a CPU, keep weights that were decoded. [default: those that are packed without zeros]",
)
@click.option(
    "--attention",
    type=click.Choice(["auto", "transformers"]),
    default="auto",
    show_default=True,
    help="MODEL's on a CPU: quantkit's own call of sdpa, or as transformers does it, as for BASE.",
)
@click.option("--threads", type=int, metavar="N", help="Threads of a CPU. [default: what torch chooses]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the prompts' token ids.")
@backend_option
@device_option
@hub_options
@log_options
@json_option
def command(model: str, as_json: bool, **options: Any) -> None:
    """Measure how fast MODEL runs and what memory it takes.

    MODEL is a folder or a hub id, compressed or not; it needs no tokenizer, for the prompts are random tokens. Prefill
    is one forward pass over a prompt that fills the cache; decode is one token a step after it, the likeliest each
    time, and the time of the steps alone. Each model lies in a process of its own, with its own peak memory, and their
    runs take turns; every rate is the median with the smallest and largest, every ratio is against the baseline that is
    fastest at that.
    """
    from pathlib import Path

    from quantkit.benchmark import benchmark
    from quantkit.checkpoint import quiet_transformers
    from quantkit.errors import QuantkitError

    if model == "kernels" and not Path(model, "config.json").exists():
        raise QuantkitError("model is 'kernels' and there is no such model: quantkit bench-kernels measures kernels")
    quiet_transformers()
    result = benchmark(model, **options)
    if as_json:
        import json

        say(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        say(table(result))


def table(result: dict[str, Any]) -> str:
    """The result on one screen: a column a model, and the ratios."""
    models = result["models"]
    heads = [f"{each['role']}, {each['dtype']}" for each in models]
    rows = [["", *heads, "ratio" if result["ratios"] else ""]]
    for key in ("prefill", "decode"):
        rates = [each[f"{key}_tokens_per_second"] for each in models]
        if rates[0] is not None:
            rows.append([f"{key} tokens/s", *map(_rate, rates), _ratio(result, key, "as fast as")])
    for key, label in (("weight_bytes", "weights MiB"), ("peak_memory_bytes", "peak memory MiB")):
        values = ["unknown" if each[key] is None else f"{each[key] / MIB:,.0f}" for each in models]
        rows.append([label, *values, _ratio(result, key, "smaller than")])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*_introduction(result), "", *lines, "", *_served(models), *_where(result)])


def _introduction(result: dict[str, Any]) -> list[str]:
    """What was measured, and how."""
    tokens = f"prompt of {result['prompt_tokens']} tokens, {result['new_tokens']} steps after it"
    lines = [f"model     {result['model']}"]
    if result["baseline"] is not None:
        lines.append(f"baseline  {result['baseline']}")
    lines.append(
        f"measured  {tokens}, batch {result['batch']}: median (least to most) of {result['runs']} runs in turn"
    )
    return lines + [f"note      {note}" for note in result["notes"]]


def _served(models: list[dict[str, Any]]) -> list[str]:
    """Which kernels ran how often, a line each, and what attention and which cache."""
    lines = [
        f"served    {row['op']} on {row['backend']}: {row['calls_prefill']} calls a prefill, {row['calls_step']} a step"
        for row in models[0]["served"]
    ] or ["served    no compressed layer: all of the model is float"]
    beside = "" if len(models) == 1 else f"; baseline: attention {models[1]['attention']}"
    return [*lines, f"model     attention {models[0]['attention']}, {models[0]['cache']} cache{beside}"]


def _where(result: dict[str, Any]) -> list[str]:
    """The machine and the versions."""
    machine = result["machine"]
    device = "" if machine["device"] == "cpu" else f"{machine['device']}; "
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [
        f"machine   {device}{machine['processor']}, {machine['threads']} threads on {machine['cores']} cores",
        f"versions  {versions}",
    ]


def _rate(spread: dict[str, Any]) -> str:
    """`614.2 (600.1 to 620.9)`."""
    median, least, most = (
        f"{spread[key]:,.4g}" if spread[key] < 1000 else f"{spread[key]:,.0f}" for key in ("median", "min", "max")
    )
    return f"{median} ({least} to {most})"


def _ratio(result: dict[str, Any], key: str, words: str) -> str:
    """`2.13x (2.01 to 2.20) as fast as float32`; empty without a baseline."""
    found = result["ratios"].get(key)
    if found is None:
        return ""
    spread = f" ({found['min']:.2f} to {found['max']:.2f})" if "min" in found else ""
    return f"{found['ratio']:.2f}x{spread} {words} {found['against']}"
