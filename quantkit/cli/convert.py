"""`quantkit convert`: a compressed checkpoint in another format."""

from typing import Any

import click

from quantkit.cli.options import CONTEXT, hub_options, json_option, log_options, say


@click.command("convert", context_settings=CONTEXT)
@click.argument("model", metavar="SRC")
@click.option("-o", "--output", required=True, metavar="OUT", help="Where to write; must not exist, or be empty.")
@click.option(
    "--to",
    required=True,
    type=click.Choice(["dense", "compressed-tensors", "bitsandbytes", "quantkit"]),
    help="What to make of it; dense is float.",
)
@click.option(
    "--activations",
    type=click.Choice(["same", "none", "token"]),
    default="same",
    show_default=True,
    help="Leave activations in float (none), or quantize them by token.",
)
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest file to write.")
@hub_options
@log_options
@json_option
def command(model: str, as_json: bool, max_shard_size: str, **options: Any) -> None:
    """Write the checkpoint SRC to OUT in another format, without quantizing anything again.

    Codes are kept bit for bit. 2:4 sparse checkpoints of compressed-tensors up to 0.14 (sparse-24-bitmask), which other
    software no longer reads, become ordinary ones with their zeros in them, or stay packed in quantkit's own format.
    There every layer whose codes are 2:4 sparse is packed, and every such weight of a float checkpoint. LLM.int8's
    activations, which compressed-tensors doesn't know, are left in float there unless --activations token is given.
    With --to dense anything that can be decoded becomes a float checkpoint.

    \b
    quantkit convert path/of/sparse -o OUT --to compressed-tensors
    quantkit convert path/of/sparse -o OUT --to quantkit
    quantkit convert path/of/bitsandbytes -o OUT --to compressed-tensors --activations token
    """
    from quantkit.checkpoint import quiet_transformers
    from quantkit.pipeline import parse_size
    from quantkit.transcoding import convert

    quiet_transformers()
    done = convert(model, max_shard_bytes=parse_size(max_shard_size), **options)
    if as_json:
        import json

        say(json.dumps(done.to_dict(), indent=2))
    else:
        say(done.to_text())
        say(f"written to {options['output']}")
