"""Recipes: `pipelines/*.toml`, lists of commands with the numbers we measured for them.

A recipe holds no logic: a step is a command and its options, an expectation is a value with a tolerance. The
data root given to `run` is handed to every step that takes one.

`cosettle-cache run`: a recipe, step by step, and its expectations.

`cosettle-cache demo`: the whole path on the built-in clips.
"""

from __future__ import annotations

import json
import shlex
import sys
import tomllib
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cosettle_cache.cli.options import DataRoot, DryRun, Json, Quiet
from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import CheckpointError, ExitCode, InputError, UncleanError

#: Commands that take `--data-root`.
_TAKES_DATA_ROOT = ("manifest build", "manifest check", "extract", "propagate")


@dataclass(frozen=True, slots=True)
class Step:
    """One command of a recipe: its words, its positional arguments, its options by key."""

    command: str
    positional: tuple[str, ...]
    options: Mapping[str, Any]

    @property
    def arguments(self) -> list[str]:
        """The step as command-line arguments."""
        options = [word for key, value in self.options.items() for word in _option(key, value)]
        return [*self.command.split(), *self.positional, *options]

    @property
    def line(self) -> str:
        """The step as one would type it."""
        return shlex.join(["cosettle-cache", *self.arguments])


@dataclass(frozen=True, slots=True)
class Expectation:
    """A figure of a summary (shares from 0 to 1) that a run should reproduce within `tolerance`."""

    tokens: str
    metric: str
    value: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """An expectation beside what the run measured."""

    expectation: Expectation
    measured: float

    @property
    def met(self) -> bool:
        """Whether the measured figure lies within the tolerance."""
        return abs(self.measured - self.expectation.value) <= self.expectation.tolerance


@dataclass(frozen=True, slots=True)
class Recipe:
    """Title, steps in order, expectations and the summary file they are about."""

    title: str
    about: str
    steps: tuple[Step, ...]
    summary: Path | None
    expectations: tuple[Expectation, ...]

    def option(self, key: str) -> Any:
        """Return the value of the first step that has the option `key`."""
        return next(step.options[key] for step in self.steps if key in step.options)

    def without_option(self, key: str) -> Recipe:
        """Return the recipe with `key` left to its default and, as it is another run now, no expectations."""
        steps = (
            replace(step, options={name: value for name, value in step.options.items() if name != key})
            for step in self.steps
        )
        return replace(self, steps=tuple(steps), summary=None, expectations=())


def read_recipe(path: Path, data_root: Path | None = None) -> Recipe:
    """Read a recipe; raise `InputError` when it is missing, malformed or has unknown keys."""
    document = _read_toml(path)
    unknown = document.keys() - {"title", "about", "step", "expect"}
    if unknown or not document.get("step"):
        raise InputError(
            f"{path} is not a recipe",
            wanted="title, about, [[step]], [expect]",
            found=", ".join(document) or "nothing",
        )
    expect = document.get("expect", {})
    return Recipe(
        title=document.get("title", path.stem),
        about=document.get("about", ""),
        steps=tuple(_step(table, data_root, path) for table in document["step"]),
        summary=Path(expect["summary"]) if "summary" in expect else None,
        expectations=tuple(_expectations(expect)),
    )


def check_expectations(recipe: Recipe) -> list[Outcome]:
    """Return every expectation beside the figure in the recipe's summary file."""
    from cosettle_cache.core.tables import read_json

    if recipe.summary is None:
        return []
    means = read_json(recipe.summary)["means"]
    outcomes = []
    for expectation in recipe.expectations:
        found = means.get(expectation.tokens, {})
        if expectation.metric not in found:
            raise InputError(
                f"{recipe.summary} has no {expectation.metric} of {expectation.tokens}",
                found=", ".join(means),
            )
        outcomes.append(Outcome(expectation, float(found[expectation.metric])))
    return outcomes


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(
            f"{path} does not exist", wanted="a recipe, such as pipelines/sprites.toml"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML", found=str(error)) from error


def _step(table: Mapping[str, Any], data_root: Path | None, path: Path) -> Step:
    if "command" not in table:
        raise InputError(f"a step of {path} has no command", found=", ".join(table))
    command = str(table["command"])
    options = {key: value for key, value in table.items() if key not in ("command", "arguments")}
    if data_root is not None and command in _TAKES_DATA_ROOT:
        options.setdefault("data_root", str(data_root))
    return Step(command, tuple(map(str, table.get("arguments", ()))), options)


def _option(key: str, value: Any) -> list[str]:
    name = "--" + key.replace("_", "-")
    if value is True:
        return [name]
    values = value if isinstance(value, list) else [value]
    return [text for item in values for text in (name, str(item))]


def _expectations(expect: Mapping[str, Any]) -> list[Expectation]:
    kinds = {key: value for key, value in expect.items() if isinstance(value, Mapping)}
    try:
        return [
            Expectation(tokens, metric, float(entry["value"]), float(entry["tolerance"]))
            for tokens, metrics in kinds.items()
            for metric, entry in metrics.items()
        ]
    except (KeyError, TypeError, ValueError) as error:
        wanted = "METRIC = { value = NUMBER, tolerance = NUMBER }"
        raise InputError(
            "an expectation of the recipe is malformed", wanted=wanted, found=repr(error)
        ) from error


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


#: The recipe of the demo, in a checkout; an installed package has no recipes.
RECIPE = Path(__file__).parents[2] / "pipelines" / "sprites.toml"


def demo(quiet: Quiet = False) -> int:
    """Extract, train and propagate on the built-in sprites clips; two minutes on two CPU cores.

    Example: cosettle-cache demo
    """
    talk = Talk(quiet=quiet)
    recipe = _with_best_weights(read_recipe(RECIPE), talk)
    code = run_steps(recipe, talk)
    if code:
        return code
    talk.result("pictures: demo/sprites/curves.png and demo/propagated/overlays")
    for outcome in check_expectations(recipe):
        kept = "as expected" if outcome.met else f"expected {outcome.expectation.value:.4f}"
        talk.note(f"{outcome.expectation.tokens} {outcome.expectation.metric} {outcome.measured:.4f}, {kept}")
    return int(ExitCode.DONE)


def _with_best_weights(recipe: Recipe, talk: Talk) -> Recipe:
    """Return the recipe with published weights where the hub can be reached, else as it is: seeded random.

    A demo that was run before keeps the weights it had.
    """
    from cosettle_cache.encoders import load_backbone

    name = recipe.option("backbone")
    if (before := _earlier_weights(Path(recipe.option("features")))) is not None:
        talk.note(f"encoder: {name} with the weights of the earlier demo ({before})")
        return recipe if before == recipe.option("weights") else recipe.without_option("weights")
    try:
        load_backbone(name)
    except CheckpointError as error:
        talk.note(f"encoder: {name} with seeded random weights ({error.message})")
        return recipe
    talk.note(f"encoder: {name} with its published weights")
    return recipe.without_option("weights")


def _earlier_weights(features: Path) -> str | None:
    """Return which weights an existing store was made with, None where there is none."""
    if not features.exists():
        return None
    from cosettle_cache.store import open_store

    return open_store(features).encoder["weights_argument"] or "published"
