"""`quantkit inspect`: what a checkpoint holds, and whether it is what its loaders demand."""

from typing import Any

import click

from quantkit.cli.options import CONTEXT, hub_options, json_option, say

SERVERS = ("vllm", "sglang", "transformers")
HARDWARE = ("cpu", "cpu-amx", "sm75", "sm80", "sm89", "sm90", "sm100", "sm120")


def _split(_: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """The servers of `--for a,b --for c`, each once."""
    names = dict.fromkeys(name.strip() for value in values for name in value.split(","))
    unknown = [name for name in names if name not in SERVERS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(SERVERS)}", param=option)
    return tuple(names)


@click.command("inspect", context_settings=CONTEXT)
@click.argument("checkpoint", metavar="OUT")
@click.option(
    "--for",
    "servers",
    multiple=True,
    callback=_split,
    metavar="SERVER",
    help="Check it by the rules of vllm, sglang or transformers; repeatable, or a comma list.",
)
@click.option("--hardware", type=click.Choice(HARDWARE), help="What --for is to run on; all of these when left out.")
@click.option(
    "--tensor-parallel",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Over how many devices --for splits every layer.",
)
@hub_options
@json_option
def command(
    checkpoint: str,
    servers: tuple[str, ...],
    hardware: str | None,
    tensor_parallel: int,
    revision: str | None,
    token: str | None,
    cache_dir: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Show the tensors, schemes and bits per weight of OUT, and check it against what its loaders demand.

    Every tensor must be there with the shape and dtype that the config asks for, and every scale positive and finite.
    Exits with 1 when something is wrong.

    With --for it is checked instead against the rules of a server, which needs not be installed: what the server would
    do with it, on which hardware, and every rule with what it was read in. Exits with 1 when one would refuse it.

    \b
    quantkit inspect OUT --for vllm,sglang --tensor-parallel 2
    """
    from quantkit.checkpoint import Hub, quiet_transformers

    quiet_transformers()
    hub = Hub(revision, token, cache_dir, trust_remote_code)
    if not servers:
        if hardware is not None or tensor_parallel != 1:
            raise click.UsageError("--hardware and --tensor-parallel are about a server; name one with --for")
        from quantkit.inspection import inspect_checkpoint

        found = inspect_checkpoint(checkpoint, hub)
        _say(found.to_dict() if as_json else found.to_text(), wrong=bool(found.problems))
        return
    from quantkit.servers import check_all

    verdicts = check_all(checkpoint, servers, hardware, tensor_parallel, hub)
    refused = any(verdict.state == "refused" for verdict in verdicts)
    if as_json:
        _say({"checkpoint": checkpoint, "servers": [verdict.to_dict() for verdict in verdicts]}, wrong=refused)
    else:
        _say("\n".join(verdict.to_text() for verdict in verdicts), wrong=refused)


def _say(result: dict[str, Any] | str, *, wrong: bool) -> None:
    """Print a text, or an object as JSON; then leave with 1 if something is wrong."""
    import json

    say(result if isinstance(result, str) else json.dumps(result, indent=2))
    if wrong:
        raise click.exceptions.Exit(1)
