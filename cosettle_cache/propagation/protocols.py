"""Named label-propagation protocols: a preset's name and a task go in, an `EvalProtocol` comes out.

Any field can be overridden; the protocol's name then says which, so that no score row can hide it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.settings import replace_red_std
from cosettle_cache.core.types import EvalProtocol
from cosettle_cache.propagation.presets import check_field, check_protocol
from cosettle_cache.propagation.tasks import TASKS

#: Fields that decide which neighbours a query has among given tokens; labels and weights come after.
SEARCH_FIELDS = ("top_k", "keep_ties", "n_context", "radius", "window", "mask_first", "first_frame_copies")


_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Preset:
    """A protocol as one code base has it for one task, and where its values were read."""

    task: str
    protocol: EvalProtocol
    source: str


def list_presets(task: str | None = None) -> tuple[Preset, ...]:
    """Return the presets of `task`, or all by protocol; raise `UsageError` for a task that none knows."""
    rows = TASKS if task is None else {task: _find(TASKS, task, "task")}
    known = [Preset(name, *pair) for name, row in rows.items() for pair in row.presets]
    names = list(dict.fromkeys(preset.protocol.name for preset in known))
    return tuple(sorted(known, key=lambda preset: names.index(preset.protocol.name)))


def make_protocol(name: str = "cosettle", *, task: str = "davis", **overrides: object) -> EvalProtocol:
    """Return preset `name` for `task` with fields replaced.

    Raises `UsageError` for an unknown preset, task or field (naming the nearest) and for values that no
    propagation can honour.
    """
    by_name: dict[str, dict[str, EvalProtocol]] = {}
    for item in list_presets():
        by_name.setdefault(item.protocol.name, {})[item.task] = item.protocol
    preset = _find(_find(by_name, name, "protocol"), task, f"task of the {name} protocol")
    settable = {key: value for key, value in preset.to_json().items() if key != "name"}
    changed: dict[str, object] = {}
    for key, value in overrides.items():
        default = _find(settable, key, "protocol field")
        typed = float(value) if isinstance(default, float) and type(value) is int else value
        check_field(
            type(typed) is type(default), key, f"a value of type {type(default).__name__}", repr(value)
        )
        if typed != default:
            changed[key] = typed
    title = " ".join([name, *(f"{key}={value}" for key, value in sorted(changed.items()))])
    protocol = replace(preset, name=title, **changed)  # type: ignore[arg-type]
    check_protocol(protocol)
    return protocol


def image_std(protocol: EvalProtocol, encoder_std: tuple[float, float, float]) -> tuple[float, float, float]:
    """Return the deviations that images are divided by: the encoder's, with the protocol's red if ImageNet's.

    An encoder with statistics of its own keeps them: the slip that `red_std` repeats is one in ImageNet's.
    """
    return replace_red_std(encoder_std, protocol.red_std)


def _find(known: Mapping[str, _T], key: str, what: str) -> _T:
    if key in known:
        return known[key]
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else None
    raise UsageError(f"{key!r} is no {what}", wanted=", ".join(known), found=key, hint=hint)
