"""`quantkit demo`: the whole of it on the bundled model, offline."""

import click

from quantkit.cli.options import CONTEXT, device_option, json_option

COLUMNS = ("recipe", "bits/weight", "bytes", "perplexity", "KL", "top-1", "quantize s", "eval s")


@click.command("demo", context_settings=CONTEXT)
@click.option("-o", "--output", metavar="DIR", help="Keep the checkpoints here. [default: a temporary folder]")
@click.option("--max-tokens", type=int, default=32768, show_default=True, metavar="N", help="Tokens to evaluate on.")
@device_option
@json_option
def command(output: str | None, max_tokens: int, device: str, as_json: bool) -> None:
    """Compress the bundled model by every recipe, evaluate each result, and print one table.

    The model (3.7 million parameters) was trained on the documentation that comes with CPython; it is evaluated on the
    part of it that was held out. Nothing is downloaded.
    """
    from quantkit.checkpoint import quiet_transformers
    from quantkit.demonstration import demonstrate

    quiet_transformers()
    rows = demonstrate(output, max_tokens=max_tokens, device=device)
    if as_json:
        import json

        click.echo(json.dumps(rows, indent=2))
        return
    lines = [COLUMNS, *((_cells(row)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    for line in lines:
        first, *rest = (
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        click.echo("  ".join([first, *rest]))


def _cells(row: dict[str, float | str | None]) -> tuple[str, ...]:
    """One line of the table."""
    error = row["perplexity_stderr"]
    perplexity = f"{row['perplexity']:.4f}" + ("" if error is None else f" ± {error:.4f}")
    if row["recipe"] == "float":
        return ("float", f"{row['bits_per_weight']:.2f}", f"{row['bytes']:,}", perplexity, "", "", "", "")
    return (
        str(row["recipe"]),
        f"{row['bits_per_weight']:.2f}",
        f"{row['bytes']:,}",
        perplexity,
        f"{row['kl_mean']:.2e}",
        f"{row['top1_agreement']:.2%}",
        f"{row['quantize_seconds']:.1f}",
        f"{row['eval_seconds']:.1f}",
    )
