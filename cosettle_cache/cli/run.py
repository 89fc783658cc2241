"""`cosettle-cache run`: a recipe, step by step, and its expectations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cosettle_cache.cli.options import DataRoot, DryRun, Quiet
from cosettle_cache.console import Talk
from cosettle_cache.errors import ExitCode, UncleanError
from cosettle_cache.recipes import Outcome, Recipe, check_expectations, read_recipe


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A file such as pipelines/sprites.toml.")],
    data_root: DataRoot = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> int:
    """Run a recipe and compare with the numbers it expects.

    Example: cosettle-cache run pipelines/vit_tiny_davis.toml --data-root /data
    """
    return run_recipe(read_recipe(recipe, data_root), Talk(quiet=quiet), dry_run=dry_run)


def run_recipe(recipe: Recipe, talk: Talk, *, dry_run: bool = False) -> int:
    """Run the steps of a recipe in this process; the first step that does not end clean ends the run."""
    talk.note(recipe.title)
    for step in recipe.steps:
        talk.note(f"$ {step.line}")
        code = 0 if dry_run else _run_step(step.arguments)
        if code:
            return code
    return int(ExitCode.DONE) if dry_run else _report(check_expectations(recipe), talk)


def _run_step(arguments: list[str]) -> int:
    # Imported here: the command table imports this module.
    from cosettle_cache.cli import run_command

    return run_command(arguments)


def _report(outcomes: list[Outcome], talk: Talk) -> int:
    rows = [
        [
            f"{item.expectation.tokens} {item.expectation.metric}",
            f"{item.expectation.value:.4f} ± {item.expectation.tolerance:.4f}",
            f"{item.measured:.4f}",
            "yes" if item.met else "NO",
        ]
        for item in outcomes
    ]
    if rows:
        talk.table("expectations", ["figure", "expected", "measured", "met"], rows)
    missed = [row[0] for row, item in zip(rows, outcomes, strict=True) if not item.met]
    if missed:
        raise UncleanError(f"{len(missed)} expectations were missed", details=missed)
    return int(ExitCode.DONE)
