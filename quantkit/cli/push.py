"""`quantkit push`: a finished checkpoint to the hub."""

from typing import Any

import click

from quantkit.cli.options import CONTEXT, json_option, log_options, push_options, say


@click.command("push", context_settings=CONTEXT)
@click.argument("folder", metavar="OUT")
@click.argument("repo", metavar="REPO")
@push_options
@click.option("--token", metavar="TOKEN", help="Access token. [default: HF_TOKEN, or that of hf auth login]")
@log_options
@json_option
def command(folder: str, repo: str, as_json: bool, **options: Any) -> None:
    """Send OUT, which quantkit quantize wrote, to the repository REPO of the hub.

    REPO is owner/name and is made if it doesn't exist. All files of OUT go there in one commit, but those whose names
    begin with a dot; what an earlier upload that failed has brought there is not sent again.

    \b
    quantkit push OUT org/name --private
    """
    from quantkit.publishing import push
    from quantkit.report import pushed_line

    pushed = push(folder, repo, **options)
    if as_json:
        import json

        say(json.dumps(pushed, indent=2))
    else:
        say(f"pushed {pushed_line(pushed)}")
