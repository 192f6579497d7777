"""`quantkit sparsity`: how much of what meets a model's linear layers is zero."""

import click

from quantkit.cli.options import CONTEXT, SPEC_HELP, data_dir_option, device_option, hub_options, json_option, say


@click.command("sparsity", context_settings=CONTEXT)
@click.argument("model")
@click.option("--dataset", required=True, metavar="SPEC", help="What to read. " + SPEC_HELP)
@click.option("--samples", type=click.IntRange(min=1), default=32, show_default=True, help="Windows to read.")
@click.option(
    "--seq-len",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of a window. [default: 2048, or the model's context]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the choice of windows.")
@data_dir_option
@device_option
@hub_options
@json_option
def command(
    model: str,
    dataset: str,
    samples: int,
    seq_len: int | None,
    seed: int,
    data_dir: str | None,
    device: str,
    revision: str | None,
    token: str | None,
    cache_dir: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Count the zeros in what meets the linear layers of MODEL while it reads text.

    MODEL is a folder or a hub id, compressed or not, and is only read. Zeros are counted in a token, and in all of 2,
    4, 8 and 16 tokens that follow one another; and what of the products and weights of the blocks' linear layers a
    token's zeros spare at decode (docs/activations.md).

    \b
    quantkit sparsity path/of/model --dataset text.txt
    """
    from quantkit.checkpoint import Hub, quiet_transformers
    from quantkit.sparse_inputs import input_sparsity

    quiet_transformers()
    hub = Hub(revision, token, cache_dir, trust_remote_code)
    words = {"samples": samples, "seq_len": seq_len, "seed": seed, "device": device, "data_dir": data_dir}
    found = input_sparsity(model, dataset, hub=hub, **words)  # type: ignore[arg-type]
    if as_json:
        import json

        say(json.dumps(found.to_dict(), indent=2))
    else:
        say(found.to_text())
