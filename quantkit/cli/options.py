"""Options that several commands share."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import click

from quantkit.launched import is_silent
from quantkit.untrusted import printable

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

F = TypeVar("F", bound=Callable[..., Any])

_HUB = (
    click.option("--revision", metavar="REVISION", help="The model's branch, tag or commit on the hub."),
    click.option("--token", metavar="TOKEN", help="Access token for the hub."),
    click.option("--cache-dir", metavar="DIR", help="The hub's cache."),
    click.option("--trust-remote-code", is_flag=True, help="Let the model's folder run its own Python code."),
)


_RECIPE = (
    click.option(
        "-m", "--step", "steps", multiple=True, metavar="STEP", help="name[:key=value[,key=value...]]; repeatable."
    ),
    click.option("--recipe", metavar="NAME|FILE", help="A recipe that comes with quantkit, or a .toml or .json file."),
    click.option("--include", multiple=True, metavar="PATTERN", help="Quantize only these modules; repeatable."),
    click.option("--ignore", multiple=True, metavar="PATTERN", help="Leave these modules in float; repeatable."),
    click.option(
        "--format",
        type=click.Choice(["auto", "compressed-tensors", "bitsandbytes", "quantkit", "dense"]),
        default="auto",
        show_default=True,
        help="How it lies on disk; quantkit packs 2:4 pruned weights, dense (like auto) writes their zeros.",
    ),
    click.option(
        "--dequantize", is_flag=True, help="Take a model that is compressed already, turned into float first."
    ),
)


def recipe_options(function: F) -> F:
    """The function with the options that say what is done to a model."""
    for option in reversed(_RECIPE):
        function = option(function)
    return function


def hub_options(function: F) -> F:
    """The function with the options that say how to find a model on the hub."""
    for option in reversed(_HUB):
        function = option(function)
    return function


_PUSH = (
    click.option("--private", is_flag=True, help="If the repository is made, make it a private one."),
    click.option("--replace-weights", is_flag=True, help="Replace other weights that the repository holds already."),
    click.option("--commit-message", metavar="TEXT", help="What the commit on the hub says."),
)


def push_options(function: F) -> F:
    """The function with the options that say how a checkpoint goes to the hub."""
    for option in reversed(_PUSH):
        function = option(function)
    return function


LEVELS = ("debug", "info", "warning", "error")
MESSAGES = logging.StreamHandler()
"""Writes what quantkit warns of and tells on stderr."""


def _set_level(context: click.Context, key: str, value: Any) -> None:
    """What `--quiet` and `--log-level` say together about messages on stderr; the run's log has them in any case."""
    context.meta[f"quantkit.{key}"] = value
    level = context.meta.get("quantkit.level") or ("error" if context.meta.get("quantkit.quiet") else "warning")
    show_messages(level)


def show_messages(level: str = "warning") -> None:
    """Show messages of this level and above on stderr."""
    number = logging.getLevelNamesMapping()[level.upper()]
    MESSAGES.setLevel(number if not is_silent() else logging.CRITICAL + 1)
    logging.getLogger("quantkit").setLevel(min(number, logging.WARNING))  # a run's log has all warnings


def _quiet(context: click.Context, _: click.Parameter, value: bool) -> bool:
    _set_level(context, "quiet", value)
    return not value


def _level(context: click.Context, _: click.Parameter, value: str | None) -> None:
    _set_level(context, "level", value)


def log_options(function: F) -> F:
    """The function with the options that say what goes to stderr; it is given `progress`."""
    options = (
        click.option("--quiet", "progress", is_flag=True, callback=_quiet, help="No progress, no warnings."),
        click.option(
            "--log-level",
            type=click.Choice(LEVELS),
            expose_value=False,
            callback=_level,
            help="What is told on stderr. [default: warning]",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def say(text: str) -> None:
    """Print a result on stdout; what a terminal would obey in names that a checkpoint made up is written out."""
    if not is_silent():
        click.echo(printable(text, keep="\n\t"))


def note(text: str) -> None:
    """Print a line on stderr, as `say` prints a result on stdout."""
    if not is_silent():
        click.echo(printable(text), err=True)


device_option = click.option(
    "--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda or cuda:N."
)
max_memory_option = click.option(
    "--max-memory", metavar="SIZE", help="The most memory it may take: it works in smaller parts, or refuses."
)
backend_option = click.option(
    "--backend",
    type=click.Choice(["auto", "triton", "torch"]),
    default="auto",
    show_default=True,
    help="What compressed layers run on.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
data_dir_option = click.option("--data-dir", metavar="DIR", help="Where known data sets lie, as DIR/NAME/.")
SPEC_HELP = (
    "A .txt, .jsonl, .json or .parquet file (FILE:field for a field other than text or messages), a save_to_disk "
    "folder, a known name (wikitext2, c4, ptb, lambada, demo), or a hub data set as org/name[:config[:split]]."
)
