"""The command line: one module per command, in story order; heavy imports happen inside commands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from cosettle_cache.cli import (
    analyze,
    extract,
    manifest,
    propagate,
    recipes,
    report,
    score,
    store,
    track,
    train,
)
from cosettle_cache.cli.options import exits

# Before any OpenMP runtime loads: waiting threads sleep instead of spinning. On a machine of one's own it
# costs nothing measurable; beside one other busy process spinning made propagation over five times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

HELP = """Run a frozen image encoder once; train, propagate and measure on its stored tokens.

The order of work: manifest, extract, train, propagate, analyze, report. Without data the built-in
sprites clips serve.
"""

#: Commands and groups in the order of the story, as `--help` lists them.
COMMANDS: dict[str, Any] = {
    "manifest": manifest.app,
    "backbones": extract.backbones,
    "extract": extract.extract,
    "train": train.train,
    "protocols": propagate.protocols,
    "propagate": propagate.propagate,
    "track": track.track,
    "pca": analyze.pca,
    "score": score.score,
    "analyze": analyze.analyze,
    "report": report.report,
    "probe": analyze.probe,
    "export": analyze.app,
    "projection": train.app,
    "store": store.app,
    "run": recipes.run,
    "demo": recipes.demo,
}


class StoryOrder(TyperGroup):
    """A command group that lists its commands in the order of the story."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the command names."""
        return list(COMMANDS)


app = typer.Typer(
    name="cosettle-cache",
    cls=StoryOrder,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for name, command in COMMANDS.items():
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
    else:
        app.command(name)(exits(command))


def main() -> None:
    """Entry point of the `cosettle-cache` script."""
    app()


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line in this process and return its exit code."""
    try:
        app(args=list(arguments), prog_name="cosettle-cache")
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("a command line ends by exiting")
