"""`quantkit plan`: what would be done to a model and what that takes, from its config and its files' headers."""

import click

from quantkit.cli.options import CONTEXT, hub_options, json_option, max_memory_option, recipe_options, say


@click.command("plan", context_settings=CONTEXT)
@click.argument("model")
@recipe_options
@click.option("-o", "--output", metavar="OUT", help="Where it would be written: is there room for it?")
@click.option(
    "--samples", type=click.IntRange(min=1), default=128, show_default=True, help="Calibration windows, for the time."
)
@click.option(
    "--seq-len",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of a window. [default: 2048, or the model's context]",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where it would be done."
)
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Processes that would share it; memory and time are those of each.",
)
@max_memory_option
@click.option("--explain", is_flag=True, help="Say what the data flow showed, group by group.")
@hub_options
@json_option
def command(model: str, explain: bool, as_json: bool, **options: object) -> None:
    """Say what would be done to MODEL, why, and what that takes, without reading a weight.

    Of a model on the hub only config.json and the headers of its files are fetched. What a model does with its
    parameters is seen in one short pass with random weights, a block at a time. Every weight matrix has its place,
    quantized or left alone with the reason (--json names them all, the text the first of each kind); with --explain
    every smoothing group, too. It also says which bytes there would be, the room that they need on disk, the memory
    that the work takes at its peak, and whether it takes seconds, minutes, hours or days on this machine's CPU. Of -m
    sparse24 it says what 2:4 cost in the papers, and the bytes of a result with zeros and of a packed one.

    \b
    quantkit plan path/of/model -m smoothquant -m w8a8 --explain
    """
    from quantkit.checkpoint import quiet_transformers
    from quantkit.explanation import plan_to_dict, plan_to_text
    from quantkit.pipeline import foresee

    quiet_transformers()
    made, recipe, budget = foresee(model, **options)  # type: ignore[arg-type]
    if as_json:
        import json

        say(json.dumps(plan_to_dict(made, recipe, model) | {"budget": budget.to_dict()}, indent=2))
    else:
        say(plan_to_text(made, recipe, model, explain=explain, more=budget.lines()))
