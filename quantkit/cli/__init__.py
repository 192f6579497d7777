"""The command line: one command a file. Nothing here imports torch; the commands do, inside their functions."""

import logging
import signal
import sys
import threading
from typing import Any, NoReturn

import click
from quantkit_kernels.errors import KernelError

from quantkit.cli import demo, evaluate, generate, inspect, methods, plan, quantize
from quantkit.cli.options import CONTEXT
from quantkit.errors import QuantkitError
from quantkit.version import __version__

INTERRUPTED, TERMINATED = 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM came: what Ctrl-C does is done, and the exit code is another."""


def _terminate(*_: object) -> NoReturn:
    raise Terminated


class Commands(click.Group):
    """A group that turns a user's mistake into one sentence and exit 1, and Ctrl-C into exit 130 (SIGTERM: 143)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of use."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        logging.basicConfig(stream=sys.stderr, format="quantkit: %(message)s", level=logging.WARNING)
        in_main = threading.current_thread() is threading.main_thread()  # no other may say what a signal does
        before = signal.signal(signal.SIGTERM, _terminate) if in_main else None
        try:
            return super().invoke(ctx)
        except (QuantkitError, KernelError) as error:
            raise click.ClickException(" ".join(str(error).split())) from error
        except Terminated:
            click.echo("quantkit: terminated", err=True)
            ctx.exit(TERMINATED)
        except KeyboardInterrupt:
            click.echo("quantkit: interrupted", err=True)
            ctx.exit(INTERRUPTED)
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="quantkit")
def main() -> None:
    """Compress any Hugging Face causal language model, show what it cost, and run the result.

    Results go to stdout, progress to stderr. A mistake is one sentence and exit code 1.
    """


for module in (quantize, plan, evaluate, inspect, generate, methods, demo):
    main.add_command(module.command)
