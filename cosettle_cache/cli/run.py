"""`cosettle-cache run`: a recipe, step by step, and its expectations."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cosettle_cache.cli.options import DataRoot, DryRun, Json, Quiet
from cosettle_cache.cli.recipes import Outcome, Recipe, check_expectations, read_recipe
from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import ExitCode, UncleanError


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A file such as pipelines/sprites.toml.")],
    data_root: DataRoot = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Run a recipe and compare with the numbers it expects.

    Example: cosettle-cache run pipelines/vit_tiny_davis.toml --data-root /data
    """
    chosen, talk = read_recipe(recipe, data_root), Talk(quiet=quiet)
    # Of a JSON run stdout holds one document; what the steps print goes where talk goes.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        code = run_steps(chosen, talk, dry_run=dry_run)
    outcomes = [] if code or dry_run else check_expectations(chosen)
    report(chosen, outcomes, talk, as_json)
    return code


def run_steps(recipe: Recipe, talk: Talk, *, dry_run: bool = False) -> int:
    """Run the steps of a recipe in this process; the first that does not end clean ends the run."""
    # Imported here: the command table imports this module.
    from cosettle_cache.cli import run_command

    talk.note(recipe.title)
    for step in recipe.steps:
        talk.note(f"$ {step.line}")
        code = 0 if dry_run else run_command(step.arguments)
        if code:
            return code
    return int(ExitCode.DONE)


def report(recipe: Recipe, outcomes: list[Outcome], talk: Talk, as_json: bool) -> None:
    """Print expectations beside what was measured; raise `UncleanError` when one was missed."""
    if as_json:
        figures = [
            {**asdict(item.expectation), "measured": item.measured, "met": item.met} for item in outcomes
        ]
        document = {"title": recipe.title, "steps": [step.line for step in recipe.steps], "figures": figures}
        talk.result(json.dumps(document, indent=2))
    elif outcomes:
        talk.table(
            "expectations", ["figure", "expected", "measured", "met"], [_row(item) for item in outcomes]
        )
    missed = [_row(item)[0] for item in outcomes if not item.met]
    if missed:
        raise UncleanError(f"{len(missed)} expectations were missed", details=missed)


def _row(outcome: Outcome) -> list[str]:
    expectation = outcome.expectation
    return [
        f"{expectation.tokens} {expectation.metric}",
        f"{expectation.value:.4f} ± {expectation.tolerance:.4f}",
        f"{outcome.measured:.4f}",
        "yes" if outcome.met else "NO",
    ]
