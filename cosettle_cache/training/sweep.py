"""Sweeps: which settings are trained at the same time from one stream of batches.

Base settings and axes (`temperature=0.02,0.03`) go in; one member per combination comes out. A run of one
projection is a sweep without axes: it has one member, whose results lie in the run's own folder.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.settings import TrainSettings, settings_json

Value = str | int | float

#: Settings that decide the stream of batches or how it is worked through: all members share them.
STREAM_SETTINGS = frozenset(
    {
        "epochs",
        "batch_size",
        "accumulate",
        "precision",
        "seed",
        "order",
        "shard_window",
        "validation",
        "palindrome",
        "gap",
        "checkpoint_every",
    }
)

#: Type of every setting, and those that may differ between the members of a sweep.
_KINDS: dict[str, Callable[[str], Value]] = {
    name: type(value) for name, value in settings_json(TrainSettings()).items()
}
SWEEPABLE = tuple(name for name in _KINDS if name not in STREAM_SETTINGS)


@dataclass(frozen=True, slots=True)
class Axis:
    """A setting and the values that it takes."""

    name: str
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Member:
    """One combination: its name (a folder; empty without axes) and its complete settings."""

    name: str
    settings: TrainSettings


def parse_axis(text: str) -> Axis:
    """Return the axis written as `name=value,value`; raise `UsageError` when it means nothing."""
    name, _, values = text.partition("=")
    name = name.strip().replace("-", "_")
    _check_name(name)
    parsed = tuple(_parse_value(name, value.strip()) for value in values.split(","))
    if len(set(parsed)) < len(parsed):
        raise UsageError(f"the sweep over {name} names a value twice", found=values)
    return Axis(name, parsed)


def make_members(settings: TrainSettings, axes: Sequence[Axis]) -> tuple[Member, ...]:
    """Return all combinations of the axes' values, the last axis fastest."""
    names = [axis.name for axis in axes]
    if len(set(names)) < len(names):
        raise UsageError("a setting is swept twice", found=", ".join(names))
    changes: list[dict[str, Any]] = [
        dict(zip(names, values, strict=True)) for values in product(*(axis.values for axis in axes))
    ]
    return tuple(Member(_name(change), replace(settings, **change)) for change in changes)


def _name(change: dict[str, Value]) -> str:
    return ",".join(f"{name}={_text(value)}" for name, value in change.items())


def _text(value: Value) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _check_name(name: str) -> None:
    if name in STREAM_SETTINGS:
        raise UsageError(
            f"{name} cannot be swept: all members of a sweep learn from the same batches",
            wanted=", ".join(SWEEPABLE),
            found=name,
            hint="train once per value, each with its own --out",
        )
    if name not in SWEEPABLE:
        close = difflib.get_close_matches(name, SWEEPABLE, n=1)
        hint = f"did you mean {close[0]}?" if close else None
        raise UsageError(
            "a sweep over an unknown setting", wanted=", ".join(SWEEPABLE), found=name, hint=hint
        )


def _parse_value(name: str, text: str) -> Value:
    kind = _KINDS[name]
    if kind is str or (name == "separability_weight" and text == "auto"):
        return text
    try:
        value: Value = kind(text)
    except ValueError as error:
        raise UsageError(
            f"{name} cannot be {text!r}", wanted=f"{kind.__name__} values", found=text
        ) from error
    return value
