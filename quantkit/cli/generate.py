"""`quantkit generate`: a quick look at what a model says."""

import click

from quantkit.cli.options import CONTEXT, backend_option, device_option, hub_options, note, say


@click.command("generate", context_settings=CONTEXT)
@click.argument("checkpoint", metavar="OUT")
@click.option("--prompt", required=True, help="The text to go on from.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, metavar="N", help="Tokens to add."
)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 takes the likeliest."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
@click.option(
    "--skip-zeros", is_flag=True, help="Read only the weights that meet no zeros, where activations often are zero."
)
@click.option(
    "--reuse-neurons",
    type=click.IntRange(min=0),
    default=0,
    metavar="G",
    help="For G tokens at a time, compute only neurons that were active in the G before; changes the text. 0: never.",
)
@backend_option
@device_option
@hub_options
def command(
    checkpoint: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    skip_zeros: bool,
    reuse_neurons: int,
    backend: str,
    device: str,
    revision: str | None,
    token: str | None,
    cache_dir: str | None,
    trust_remote_code: bool,
) -> None:
    """Print what OUT (a folder or hub id, compressed or not) says after a prompt."""
    from quantkit.checkpoint import Hub, quiet_transformers
    from quantkit.generation import complete

    quiet_transformers()
    hub = Hub(revision, token, cache_dir, trust_remote_code)
    text = complete(
        checkpoint,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=device,
        backend=backend,
        skip_zeros=skip_zeros,
        reuse_neurons=reuse_neurons,
        tell=note,
        hub=hub,
    )
    say(text)
