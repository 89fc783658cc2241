"""The command line: one module per command, in the order of the story. Heavy imports happen inside commands.

Known errors become one sentence and an exit code here, and nowhere else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click
import typer

from cosettle_cache.cli import demo, extract, manifest, propagate, run, store, train
from cosettle_cache.console import Talk
from cosettle_cache.errors import CosettleError, ExitCode

HELP = """Run a frozen image encoder once; train, propagate and measure on its stored tokens.

The order of work: manifest, extract, train, propagate. Without any data the built-in sprites clips serve.
"""

app = typer.Typer(
    name="cosettle-cache",
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(manifest.app, name="manifest")
app.command()(extract.extract)
app.command()(train.train)
app.command()(propagate.propagate)
app.add_typer(store.app, name="store")
app.command()(run.run)
app.command()(demo.demo)


def main() -> None:
    """Entry point of the `cosettle-cache` script."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; only a bug leaves as an exception."""
    try:
        code = app(args=list(arguments), prog_name="cosettle-cache", standalone_mode=False)
    except CosettleError as error:
        Talk().error(error)
        return int(error.exit_code)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        Talk().warn("interrupted")
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone; say nothing more, not even while the interpreter closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.DONE)
    return int(code or ExitCode.DONE)
