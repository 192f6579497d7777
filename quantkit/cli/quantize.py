"""`quantkit quantize`: from a float model to a compressed checkpoint."""

from typing import Any

import click

from quantkit.cli.options import (
    CONTEXT,
    SPEC_HELP,
    data_dir_option,
    device_option,
    hub_options,
    json_option,
    log_options,
    max_memory_option,
    push_options,
    recipe_options,
    say,
)


@click.command("quantize", context_settings=CONTEXT)
@click.argument("model")
@click.option("-o", "--output", required=True, metavar="OUT", help="Where to write; must not exist, or be empty.")
@recipe_options
@click.option("--dataset", metavar="SPEC", help="What to calibrate on. " + SPEC_HELP)
@click.option("--recover", metavar="N", help="After the transforms train on so many tokens of it, such as 2M.")
@click.option("--samples", type=click.IntRange(min=1), default=128, show_default=True, help="Windows to calibrate on.")
@click.option("--seq-len", type=int, metavar="N", help="Tokens of a window. [default: 2048, or the model's context]")
@click.option("--seed", type=int, help="Seed of everything random. [default: the recipe's, or 0]")
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest file to write.")
@data_dir_option
@device_option
@max_memory_option
@click.option("--restart", is_flag=True, help="Begin anew, whatever a run that was stopped has finished.")
@click.option("--eval-dataset", metavar="SPEC", help="Evaluate the result against the float model on this data set.")
@click.option("--push-to-hub", metavar="REPO", help="Then send the result to this repository of the hub (owner/name).")
@push_options
@hub_options
@log_options
@json_option
def command(model: str, as_json: bool, **options: Any) -> None:
    """Compress MODEL and write it to OUT.

    MODEL is a folder or a hub id. The work goes block by block, never the whole model in memory; what was written is
    read back from disk and verified, and OUT appears only when all of it is right. A run that was stopped, however it
    was, goes on by the same command from the last finished block. PATTERN matches module names: a
    glob on the whole name, or a regex after re:. The layer that makes the logits stays float unless included.
    -m sparse24 costs quality: perplexity of Llama-2 7B went from 5.12 to 10.17 and more in the papers, see
    `quantkit methods`.
    Whether a result may be pushed to the hub is found out before the work begins; when the upload fails, OUT is safe.

    \b
    quantkit quantize path/of/model -o OUT -m w8a8
    quantkit quantize path/of/model -o OUT -m smoothquant:alpha=auto -m w8a8 --dataset text.txt
    quantkit quantize path/of/model -o OUT -m sparse24:criterion=wanda,pattern=2:4 -m w8a8 --dataset text.txt
    quantkit quantize org/name -o OUT -m int8:group=128,weight_range=mse --ignore '*.down_proj'
    """
    from quantkit.checkpoint import quiet_transformers
    from quantkit.staging import quantize

    quiet_transformers()
    report = quantize(model, **options)
    if as_json:
        import json

        say(json.dumps(report.to_dict(), indent=2))
    else:
        say(report.to_text())
        say(f"written to {options['output']}; load it with quantkit.load({options['output']!r})")
