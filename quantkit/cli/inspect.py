"""`quantkit inspect`: what a checkpoint holds, and whether it is what its loaders demand."""

import click

from quantkit.cli.options import CONTEXT, hub_options, json_option


@click.command("inspect", context_settings=CONTEXT)
@click.argument("checkpoint", metavar="OUT")
@hub_options
@json_option
def command(
    checkpoint: str,
    revision: str | None,
    token: str | None,
    cache_dir: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Show the tensors, schemes and bits per weight of OUT, and check it against what its loaders demand.

    Every tensor must be there with the shape and dtype that the config asks for, and every scale positive and finite.
    Exits with 1 when something is wrong.
    """
    from quantkit.checkpoint import Hub, quiet_transformers
    from quantkit.inspection import inspect_checkpoint

    quiet_transformers()
    found = inspect_checkpoint(checkpoint, Hub(revision, token, cache_dir, trust_remote_code))
    if as_json:
        import json

        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        click.echo(found.to_text())
    if found.problems:
        raise click.exceptions.Exit(1)
