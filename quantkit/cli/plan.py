"""`quantkit plan`: what would be done to a model, from its config and its files' headers."""

import click

from quantkit.cli.options import CONTEXT, hub_options, json_option, recipe_options


@click.command("plan", context_settings=CONTEXT)
@click.argument("model")
@recipe_options
@click.option("--explain", is_flag=True, help="Say what the data flow showed, group by group.")
@hub_options
@json_option
def command(model: str, explain: bool, as_json: bool, **options: object) -> None:
    """Say what would be done to MODEL, and why, without reading a weight.

    What a model does with its parameters is seen in one short pass with random weights, a block at a time. Every
    weight matrix has its place, quantized or left alone with the reason (--json names them all, the text the first of
    each kind); with --explain every smoothing group, too.

    \b
    quantkit plan path/of/model -m smoothquant -m w8a8 --explain
    """
    from quantkit.checkpoint import quiet_transformers
    from quantkit.explanation import plan_to_dict, plan_to_text
    from quantkit.pipeline import prepare

    quiet_transformers()
    made, recipe = prepare(model, **options)  # type: ignore[arg-type]
    if as_json:
        import json

        click.echo(json.dumps(plan_to_dict(made, recipe, model), indent=2))
    else:
        click.echo(plan_to_text(made, recipe, model, explain=explain))
