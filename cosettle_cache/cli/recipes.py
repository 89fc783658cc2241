"""`cosettle-cache run` and `demo`: recipes (`pipelines/*.toml`), step by step, and their expectations.

A recipe holds no logic: a step is a command and its options, an expectation is a value with a tolerance. The
data root given to `run` is passed to every step that takes one.
"""

from __future__ import annotations

import math
import shlex
import sys
import tomllib
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cosettle_cache.cli.options import DataRoot, Mode, Quiet
from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import CheckpointError, ExitCode, InputError, UncleanError

#: The recipe of the demo, in a checkout; an installed package has no recipes.
DEMO = Path(__file__).parents[2] / "pipelines" / "sprites.toml"
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
        options = []
        for key, value in self.options.items():
            name = "--" + key.replace("_", "-")
            values = value if isinstance(value, list) else [value]
            options += [name] if value is True else [word for item in values for word in (name, str(item))]
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
    measured: float = math.nan

    @property
    def met(self) -> bool:
        """Whether the measured figure lies within the tolerance."""
        return abs(self.measured - self.value) <= self.tolerance

    @property
    def title(self) -> str:
        """The kind of tokens and the figure."""
        return f"{self.tokens} {self.metric}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Title, steps in order, expectations and the summary file they are about."""

    title: str
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


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A file such as pipelines/sprites.toml.")],
    mode: Mode,
    data_root: DataRoot = None,
) -> int:
    """Run a recipe and compare with the numbers it expects.

    Example: cosettle-cache run pipelines/vit_tiny_davis.toml --data-root /data
    """
    chosen, talk = read_recipe(recipe, data_root), Talk(quiet=mode.quiet)
    # Of a JSON run stdout holds one document; what the steps print goes where talk goes.
    with redirect_stdout(sys.stderr) if mode.as_json else nullcontext():
        code = _run_steps(chosen, talk, dry_run=mode.dry_run)
    found = [] if code or mode.dry_run else check_expectations(chosen)
    if mode.as_json:
        figures = [{**asdict(item), "met": item.met} for item in found]
        document = {"title": chosen.title, "steps": [step.line for step in chosen.steps], "figures": figures}
        talk.json(document)
    elif found:
        columns = ["figure", "expected", "measured", "met"]
        expected = [f"{item.value:.4f} ± {item.tolerance:.4f}" for item in found]
        met = ["yes" if item.met else "NO" for item in found]
        rows = [[o.title, e, f"{o.measured:.4f}", m] for o, e, m in zip(found, expected, met, strict=True)]
        talk.table("expectations", columns, rows)
    if missed := [item.title for item in found if not item.met]:
        raise UncleanError(f"{len(missed)} expectations were missed", details=missed)
    return code


def demo(quiet: Quiet = False) -> int:
    """Extract, train and propagate on the built-in sprites clips; two minutes on two CPU cores.

    Example: cosettle-cache demo
    """
    talk = Talk(quiet=quiet)
    recipe = _with_best_weights(read_recipe(DEMO), talk)
    if code := _run_steps(recipe, talk):
        return code
    talk.result("pictures: demo/sprites/curves.png and demo/propagated/overlays")
    for outcome in check_expectations(recipe):
        kept = "as expected" if outcome.met else f"expected {outcome.value:.4f}"
        talk.note(f"{outcome.title} {outcome.measured:.4f}, {kept}")
    return ExitCode.DONE


def _run_steps(recipe: Recipe, talk: Talk, *, dry_run: bool = False) -> int:
    """Run the steps of a recipe in this process; the first that does not end clean ends the run."""
    from cosettle_cache.cli import run_command

    talk.note(recipe.title)
    for step in recipe.steps:
        talk.note(f"$ {step.line}")
        if not dry_run and (code := run_command(step.arguments)):
            return code
    return ExitCode.DONE


def _with_best_weights(recipe: Recipe, talk: Talk) -> Recipe:
    """Return the recipe with published weights where the hub can be reached, else as it is: seeded random.

    A demo that was run before keeps the weights it had.
    """
    from cosettle_cache.encoders import load_backbone
    from cosettle_cache.store import open_store

    name, features = recipe.option("backbone"), Path(recipe.option("features"))
    if features.exists():
        before = open_store(features).encoder["weights_argument"] or "published"
        talk.note(f"encoder: {name} with the weights of the earlier demo ({before})")
        return recipe if before == recipe.option("weights") else recipe.without_option("weights")
    try:
        load_backbone(name)
    except CheckpointError as error:
        talk.note(f"encoder: {name} with seeded random weights ({error.message})")
        return recipe
    talk.note(f"encoder: {name} with its published weights")
    return recipe.without_option("weights")


def read_recipe(path: Path, data_root: Path | None = None) -> Recipe:
    """Read a recipe; raise `InputError` when it is missing, malformed or has unknown keys."""
    try:
        document = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        wanted = "a recipe, such as pipelines/sprites.toml"
        raise InputError(f"{path} does not exist", wanted=wanted) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML", found=str(error)) from error
    if document.keys() - {"title", "about", "step", "expect"} or not document.get("step"):
        wanted, found = "title, about, [[step]], [expect]", ", ".join(document) or "nothing"
        raise InputError(f"{path} is not a recipe", wanted=wanted, found=found)
    expect = document.get("expect", {})
    try:
        expectations = [
            Expectation(tokens, metric, float(entry["value"]), float(entry["tolerance"]))
            for tokens, metrics in expect.items()
            if isinstance(metrics, Mapping)
            for metric, entry in metrics.items()
        ]
    except (KeyError, TypeError, ValueError) as error:
        wanted = "METRIC = { value = NUMBER, tolerance = NUMBER }"
        said = "an expectation of the recipe is malformed"
        raise InputError(said, wanted=wanted, found=repr(error)) from error
    return Recipe(
        title=document.get("title", path.stem),
        steps=tuple(_read_step(table, data_root, path) for table in document["step"]),
        summary=Path(expect["summary"]) if "summary" in expect else None,
        expectations=tuple(expectations),
    )


def _read_step(table: Mapping[str, Any], data_root: Path | None, path: Path) -> Step:
    if "command" not in table:
        raise InputError(f"a step of {path} has no command", found=", ".join(table))
    command = str(table["command"])
    options = {key: value for key, value in table.items() if key not in ("command", "arguments")}
    if data_root is not None and command in _TAKES_DATA_ROOT:
        options.setdefault("data_root", str(data_root))
    return Step(command, tuple(map(str, table.get("arguments", ()))), options)


def check_expectations(recipe: Recipe) -> list[Expectation]:
    """Return every expectation with the figure in the recipe's summary file."""
    from cosettle_cache.core.files import read_json

    if recipe.summary is None:
        return []
    means = read_json(recipe.summary)["means"]
    outcomes = []
    for item in recipe.expectations:
        figures = means.get(item.tokens, {})
        if item.metric not in figures:
            missing = f"{recipe.summary} has no {item.metric} of {item.tokens}"
            raise InputError(missing, found=", ".join(means))
        outcomes.append(replace(item, measured=float(figures[item.metric])))
    return outcomes
