"""`cosettle-cache run` and `demo`: recipes (`pipelines/*.toml`), step by step, and their expectations.

A recipe holds no logic: a step is a command and its options, an expectation is a value with a tolerance,
measured by us or published by others. The data root given to `run` is passed to every step that takes one.
"""

from __future__ import annotations

import math
import shlex
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeGuard

import typer

from cosettle_cache.cli.options import DataRoot, Mode, Quiet, Weights, only_checked
from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import CheckpointError, ExitCode, InputError, UncleanError, UsageError
from cosettle_cache.core.files import find_file, our_files, read_json, read_text

#: The recipes that come with the package; `run` takes their names, as `demo` does the first one's.
OURS, DEMO = "pipelines/*.toml", "sprites"
#: Most letters of a recipe: time and memory of reading TOML grow with the square of the parts of a key.
_MOST_LETTERS = 2**14
#: Commands that take `--data-root`.
_TAKES_DATA_ROOT = ("manifest build", "manifest check", "extract", "propagate", "report")


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
            if isinstance(value, bool):
                options += [name] if value else []
            else:
                options += [word for item in values for word in (name, str(item))]
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
    summary: Path
    source: str = ""
    published: bool = False
    measured: float = math.nan

    @property
    def met(self) -> bool:
        """Whether the measured figure lies within the tolerance."""
        return abs(self.measured - self.value) <= self.tolerance

    @property
    def title(self) -> str:
        """The kind of tokens and the figure."""
        return f"{self.tokens} {self.metric}"

    @property
    def expected(self) -> str:
        """Value and tolerance, and whose they are where they are not ours."""
        whose = f" (published, not measured here: {self.source})" if self.published else ""
        return f"{self.value:.4f} ± {self.tolerance:.4f}{whose}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Title, steps in order, and expectations of the figures in summary files."""

    title: str
    steps: tuple[Step, ...]
    expectations: tuple[Expectation, ...]

    def option(self, key: str) -> Any:
        """Return the value of the first step that has the option `key`."""
        return next(step.options[key] for step in self.steps if key in step.options)

    def with_option(self, key: str, value: Any) -> Recipe:
        """Return the recipe with another value of `key` where a step has it, False for the option's default.

        As it is another run now, it has no expectations.
        """
        steps = (
            replace(step, options={**step.options, key: value}) if key in step.options else step
            for step in self.steps
        )
        return replace(self, steps=tuple(steps), expectations=())


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A file, or a name such as sprites.")],
    mode: Mode,
    data_root: DataRoot = None,
) -> int:
    """Run a recipe and compare with the numbers it expects.

    Example: cosettle-cache run vit_tiny_davis --data-root /data
    """
    chosen, talk = read_recipe(find_file(recipe, OURS), data_root), Talk(quiet=mode.quiet)
    # Of a JSON run stdout holds one document; what the steps print goes where talk goes.
    with redirect_stdout(sys.stderr) if mode.as_json else nullcontext():
        code = _run_steps(chosen, talk, dry_run=mode.dry_run)
    found = [] if code or mode.dry_run else check_expectations(chosen)
    if mode.as_json:
        figures = [{**asdict(item), "summary": str(item.summary), "met": item.met} for item in found]
        document = {"title": chosen.title, "steps": [step.line for step in chosen.steps], "figures": figures}
        talk.json(document)
    elif found:
        columns = ["figure", "expected", "measured", "met"]
        rows = [[o.title, o.expected, f"{o.measured:.4f}", "yes" if o.met else "NO"] for o in found]
        talk.table("expectations", columns, rows)
    if missed := [item.title for item in found if not item.met]:
        raise UncleanError(f"{len(missed)} expectations were missed", details=missed)
    return code


def demo(weights: Weights = None, quiet: Quiet = False) -> int:
    """Extract, train, propagate and report on the built-in sprites clips; two minutes on two CPU cores.

    Without --weights: the published ones where the hub or its cache has them, else seeded random ones.

    Example: cosettle-cache demo
    """
    from cosettle_cache.heads.kinds import RAW
    from cosettle_cache.metrics.rows import SCORES_FILE, best_gain, read_scores

    talk, recipe = Talk(quiet=quiet), read_recipe(our_files(OURS)[DEMO])
    recipe = recipe.with_option("weights", weights) if weights else _with_best_weights(recipe, talk)
    if code := _run_steps(recipe, talk):
        return code
    outs = {step.command: Path(step.options["out"]) for step in recipe.steps}
    gained = best_gain(read_scores(outs["propagate"] / SCORES_FILE), RAW)
    used = recipe.option("weights") or "published"
    talk.result(f"{gained} The encoder's weights: {used}.\nall of it in one page: {outs['report']}")
    for outcome in check_expectations(recipe):
        kept = "as expected" if outcome.met else f"expected {outcome.value:.4f}"
        talk.note(f"{outcome.title} {outcome.measured:.4f}, {kept}")
    return ExitCode.DONE


def _run_steps(recipe: Recipe, talk: Talk, *, dry_run: bool = False) -> int:
    """Run the steps of a recipe in this process; the first that does not end clean ends the run.

    Before the first one the options of all are checked: a misspelt one would be found after hours.
    """
    from cosettle_cache.cli import run_command

    with only_checked():
        for step in recipe.steps:
            if run_command(step.arguments):
                raise UsageError("a step of the recipe cannot be run; nothing was done", found=step.line)
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
        before = open_store(features).encoder["weights_argument"]
        talk.note(f"encoder: {name} with the weights of the earlier demo ({before or 'published'})")
        if before == recipe.option("weights"):
            return recipe
        return recipe.with_option("weights", before or False)
    try:
        load_backbone(name)
    except CheckpointError as error:
        talk.note(f"encoder: {name} with seeded random weights ({error.message})")
        return recipe
    talk.note(f"encoder: {name} with its published weights")
    return recipe.with_option("weights", False)


def read_recipe(path: Path, data_root: Path | None = None) -> Recipe:
    """Read a recipe; raise `InputError` when it is missing, malformed or has unknown keys."""
    try:
        if len(text := read_text(path)) > _MOST_LETTERS:
            raise ValueError(f"{len(text)} letters, more than {_MOST_LETTERS}")
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not TOML", found=str(error)) from error
    steps: Any = document.get("step")
    if document.keys() - {"title", "about", "step", "expect"} or not _is_list_of(dict, steps):
        wanted, found = "title, about, [[step]], [expect]", ", ".join(document) or "nothing"
        raise InputError(f"{path} is not a recipe", wanted=wanted, found=found)
    expect = document.get("expect", [])
    tables = [expect] if isinstance(expect, dict) else expect
    if tables != [] and not _is_list_of(dict, tables):
        raise InputError(f"[expect] of {path} is no table", found=repr(expect))
    return Recipe(
        title=str(document.get("title", path.stem)),
        steps=tuple(_read_step(table, data_root, path) for table in steps),
        expectations=tuple(item for table in tables for item in _read_table(table, path)),
    )


def _read_table(expect: Mapping[str, Any], path: Path) -> list[Expectation]:
    """Return what one `[expect]` says of one summary file."""
    summary, source = expect.get("summary"), expect.get("source", "")
    published = expect.get("published", False)
    if not isinstance(published, bool) or not isinstance(source, str) or (published and not source):
        wanted = "published = true with source = TEXT, or neither"
        raise InputError(f"[expect] of {path} does not say whose figures it has", wanted=wanted)
    file = Path(summary) if isinstance(summary, str) else Path()
    found = [replace(item, source=source, published=published) for item in _read_figures(expect, file)]
    if not found or not file.name:
        wanted = 'summary = "FILE" and figures of it, METRIC = { value = NUMBER, tolerance = NUMBER }'
        raise InputError(f"[expect] of {path} expects nothing", wanted=wanted, found=", ".join(expect))
    return found


def _read_figures(expect: Mapping[str, Any], summary: Path) -> Iterator[Expectation]:
    for tokens, metrics in expect.items():
        for metric, entry in metrics.items() if isinstance(metrics, dict) else ():
            numbers: Any = (
                [entry.get(key) for key in ("value", "tolerance")] if isinstance(entry, dict) else []
            )
            if not numbers or not all(map(_is_number, numbers)) or numbers[1] < 0:
                raise InputError(
                    "an expectation of the recipe is malformed",
                    wanted="METRIC = { value = NUMBER, tolerance = NUMBER }",
                    found=f"{metric} of {tokens}: {entry!r}",
                )
            yield Expectation(tokens, metric, float(numbers[0]), float(numbers[1]), summary)


def _read_step(table: Mapping[str, Any], data_root: Path | None, path: Path) -> Step:
    command, positional = table.get("command"), table.get("arguments", [])
    if not isinstance(command, str) or not command.strip():
        raise InputError(f"a step of {path} has no command", found=", ".join(table))
    if command.split()[0] in ("run", "demo"):
        raise InputError(f"a step of {path} runs a recipe", wanted="another command", found=command)
    options = {key: value for key, value in table.items() if key not in ("command", "arguments")}
    words = (str, int, float)  # truth values are numbers
    right = all(isinstance(value, words) or _is_list_of(words, value) for value in options.values())
    if not right or (positional != [] and not _is_list_of(words, positional)):
        wanted = "arguments: a list; options: text, a number, true, false or a list"
        raise InputError(f"the step {command} of {path} is malformed", wanted=wanted, found=repr(table))
    if data_root is not None and command in _TAKES_DATA_ROOT:
        options.setdefault("data_root", str(data_root))
    return Step(command, tuple(map(str, positional)), options)


def check_expectations(recipe: Recipe) -> list[Expectation]:
    """Return every expectation with the figure in its summary file."""
    means = {path: _read_means(path) for path in {item.summary for item in recipe.expectations}}
    outcomes = []
    for item in recipe.expectations:
        figures = means[item.summary].get(item.tokens)
        figure = figures.get(item.metric) if isinstance(figures, dict) else None
        if not _is_number(figure):
            missing = f"{item.summary} has no {item.metric} of {item.tokens}"
            raise InputError(missing, found=", ".join(means[item.summary]))
        outcomes.append(replace(item, measured=float(figure)))
    return outcomes


def _read_means(summary: Path) -> dict[str, Any]:
    document = read_json(summary)
    means = document.get("means") if isinstance(document, dict) else None
    if not isinstance(means, dict):
        raise InputError(f"{summary} is no summary of scores", wanted="the means of every metric")
    return means


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_list_of(kinds: type | tuple[type, ...], value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kinds) for item in value)
