"""`quantkit recover`: a transformed float model is trained on text."""

from typing import Any

import click

from quantkit.cli.options import (
    CONTEXT,
    SPEC_HELP,
    data_dir_option,
    hub_options,
    json_option,
    log_options,
    say,
)


@click.command("recover", context_settings=CONTEXT)
@click.argument("model")
@click.option("-o", "--output", required=True, metavar="OUT", help="Where to write; must not exist, or be empty.")
@click.option("--dataset", required=True, metavar="SPEC", help="What to train on. " + SPEC_HELP)
@click.option("--tokens", default="2M", show_default=True, metavar="N", help="Tokens to read: such as 500k, 2M, 1B.")
@click.option("--teacher", metavar="MODEL", help="The original, whose predictions are imitated.")
@click.option(
    "--distill",
    metavar="W",
    help="Share of the loss that is the divergence from the teacher. [default: 0.5 with one]",
)
@click.option("--lr", "learning_rate", default="1e-4", show_default=True, help="The largest learning rate.")
@click.option("--warmup", default="0.03", show_default=True, help="Share of steps in which the rate rises.")
@click.option("--batch-tokens", default="8192", show_default=True, metavar="N", help="Tokens of a step.")
@click.option(
    "--train",
    type=click.Choice(["all", "linear"]),
    default="all",
    show_default=True,
    help="Train all parameters, or linear layers.",
)
@click.option(
    "--lora",
    type=click.IntRange(min=0),
    default=0,
    metavar="R",
    help="Train LoRA of this rank on linear layers (pip install 'quantkit[recover]').",
)
@click.option("--seq-len", type=int, metavar="N", help="Tokens of a window. [default: 2048, or the model's context]")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Windows that go through the model at once. [default: some 2048 tokens of them]",
)
@click.option(
    "--mixed-precision",
    type=click.Choice(["no", "bf16", "fp16"]),
    default="no",
    show_default=True,
    help="What products are computed in; weights stay in float32.",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Compute blocks again for gradients, for less memory.")
@click.option(
    "--checkpoint-every",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    metavar="N",
    help="Steps between two that are kept.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
@click.option("--eval-dataset", metavar="SPEC", help="Measure perplexity on this data set, before and after.")
@click.option("--eval-tokens", type=click.IntRange(min=2), metavar="N", help="Only on so many tokens from its start.")
@click.option("--max-memory", metavar="SIZE", help="Refuse what takes more memory than this.")
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest file to write.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--restart", is_flag=True, help="Begin anew, whatever a run that was stopped has finished.")
@data_dir_option
@hub_options
@log_options
@json_option
def command(model: str, as_json: bool, **options: Any) -> None:
    """Train the float model MODEL on text and write it to OUT as it was stored.

    MODEL is what a transform such as sparse24 left, a folder or a hub id; its zeros stay zero. With --teacher the
    original's predictions are imitated. A run that was stopped goes on by the same command, bit for bit as if it
    hadn't been. The report says how many tokens were read and, with --eval-dataset, the perplexity of the original,
    after the transform and after recovery. Under `accelerate launch -m quantkit recover ...` several processes share
    each step.

    \b
    quantkit recover SPARSE -o OUT --dataset text.txt --tokens 2M --teacher ORIGINAL --eval-dataset held.txt
    quantkit recover SPARSE -o OUT --dataset c4 --tokens 20M --lora 16 --mixed-precision bf16
    """
    from quantkit.checkpoint import quiet_transformers
    from quantkit.recovery import recover

    quiet_transformers()
    report = recover(model, **options)
    if report is None:  # another process than the first
        return
    if as_json:
        import json

        say(json.dumps(report.to_dict(), indent=2))
    else:
        say(report.to_text())
        say(f"written to {options['output']}; load it with quantkit.load({options['output']!r})")
