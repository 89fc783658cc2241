"""Recipes: `pipelines/*.toml`, lists of commands with the numbers we measured for them.

A recipe holds no logic: a step is a command and its options, an expectation is a value with a tolerance. The
data root given to `run` is handed to every step that takes one.
"""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cosettle_cache.core.errors import InputError

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
