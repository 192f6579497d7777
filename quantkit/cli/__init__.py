"""The command line: one command a file. Nothing here imports torch; the commands do, inside their functions."""

import logging
import os
import signal
import sys
import threading
from typing import Any, NoReturn

import click
from quantkit_kernels.errors import KernelError

from quantkit.cli import (
    bench,
    bench_kernels,
    convert,
    demo,
    evaluate,
    generate,
    inspect,
    methods,
    plan,
    push,
    quantize,
    recover,
    sparsity,
)
from quantkit.cli.options import CONTEXT, MESSAGES, show_messages
from quantkit.errors import QuantkitError
from quantkit.launched import is_silent, launched
from quantkit.untrusted import printable
from quantkit.version import __version__

INTERRUPTED, TERMINATED = 130, 143

SHARED = ("quantize", "eval", "recover")
"""The commands whose work the processes of a job share."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came: what Ctrl-C does is done, and the exit code is another."""


def _terminate(*_: object) -> NoReturn:
    raise Terminated


LONGEST_SENTENCE = 4000
"""Characters of an error's message; some name every layer that something is wrong with."""


def sentence(error: Exception) -> str:
    """What an error says, on one line that a terminal shows as it is: names and values in it may be a stranger's."""
    text = printable(" ".join(str(error).split()))
    half = LONGEST_SENTENCE // 2
    return text if len(text) <= LONGEST_SENTENCE else f"{text[:half]} ... {text[-half:]}"


class _Line(logging.Formatter):
    """Keeps a warning on a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line."""
        return printable(super().format(record))


class Commands(click.Group):
    """A group that turns a user's mistake into one sentence and exit 1, and Ctrl-C into exit 130 (SIGTERM: 143)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of use."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is asked for; one that several processes can't share is refused in such a job."""
        found = super().resolve_command(ctx, args)
        place = launched()
        if place.count > 1 and found[0] not in SHARED:
            error = QuantkitError(
                f"quantkit {found[0]} works in one process, and WORLD_SIZE is {place.count}; give it without torchrun "
                "or accelerate launch"
            )
            error.told = not place.is_first
            raise error
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        MESSAGES.setStream(sys.stderr)
        MESSAGES.setFormatter(_Line("quantkit: %(message)s"))
        logging.basicConfig(handlers=[MESSAGES])
        log = logging.getLogger("quantkit")
        level = log.level
        show_messages()
        if os.environ.get("WORLD_SIZE", "1") != "1":  # or torch prints a stack for each store or socket that is gone
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        in_main = threading.current_thread() is threading.main_thread()  # no other may say what a signal does
        before = signal.signal(signal.SIGTERM, _terminate) if in_main else None
        try:
            return super().invoke(ctx)
        except (QuantkitError, KernelError) as error:
            if isinstance(error, QuantkitError) and error.told:
                ctx.exit(1)
            raise click.ClickException(sentence(error)) from error
        except Terminated:
            if not is_silent():
                click.echo("quantkit: terminated", err=True)
            ctx.exit(TERMINATED)
        except KeyboardInterrupt:
            if not is_silent():
                click.echo("quantkit: interrupted", err=True)
            ctx.exit(INTERRUPTED)
        finally:
            log.setLevel(level)
            if before is not None:
                signal.signal(signal.SIGTERM, before)


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="quantkit")
def main() -> None:
    """Compress any Hugging Face causal language model, show what it cost, and run the result.

    Results go to stdout, progress to stderr. A mistake is one sentence and exit code 1.
    """


for module in (
    *(quantize, recover, plan, evaluate, inspect, sparsity, generate, bench),
    *(bench_kernels, convert, push, methods, demo),
):
    main.add_command(module.command)
