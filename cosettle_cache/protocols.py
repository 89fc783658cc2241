"""Named label-propagation protocols: a preset's name and a task go in, an `EvalProtocol` comes out.

Any field can be overridden; the protocol's name then says which, so that no score row can hide it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import TypeVar

from cosettle_cache.errors import UsageError
from cosettle_cache.sizes import resolve_size
from cosettle_cache.types import EvalProtocol

WINDOWS = ("disc", "square")

_T = TypeVar("_T")

# T-CORE's engine with the values of the paper's Table 8c; the temperature is T-CORE's, the table has none.
_COSETTLE = EvalProtocol(
    name="cosettle",
    size="480x880",
    top_k=7,
    n_context=20,
    radius=20.0,
    temperature=0.7,
    window="disc",
    mask_first=False,
    first_frame_copies=True,
)

#: Preset -> task -> protocol.
PRESETS: Mapping[str, Mapping[str, EvalProtocol]] = MappingProxyType(
    # The sprites clips are small and made for any patch of 16: resizing them would only cost time.
    {"cosettle": MappingProxyType({"davis": _COSETTLE, "sprites": replace(_COSETTLE, size="native")})}
)


def list_protocols(task: str = "davis") -> tuple[EvalProtocol, ...]:
    """Return every preset that knows `task`."""
    return tuple(by_task[task] for by_task in PRESETS.values() if task in by_task)


def make_protocol(name: str = "cosettle", *, task: str = "davis", **overrides: object) -> EvalProtocol:
    """Return preset `name` for `task` with fields replaced.

    Raises `UsageError` for an unknown preset, task or field (naming the nearest) and for values that no
    propagation can honour.
    """
    preset = _find(_find(PRESETS, name, "protocol"), task, f"task of the {name} protocol")
    settable = {item.name: getattr(preset, item.name) for item in fields(preset) if item.name != "name"}
    changed: dict[str, object] = {}
    for key, value in overrides.items():
        default = _find(settable, key, "protocol field")
        typed = _same_type(key, value, default)
        if typed != default:
            changed[key] = typed
    title = " ".join([name, *(f"{key}={value}" for key, value in sorted(changed.items()))])
    protocol = replace(preset, name=title, **changed)  # type: ignore[arg-type]
    check_protocol(protocol)
    return protocol


def check_protocol(protocol: EvalProtocol) -> None:
    """Raise `UsageError` unless every field of `protocol` can be honoured."""
    _check(protocol.top_k >= 1, "top_k", "at least 1", protocol.top_k)
    _check(protocol.n_context >= 0, "n_context", "at least 0 frames", protocol.n_context)
    _check(_positive(protocol.radius), "radius", "a positive number of patches", protocol.radius)
    _check(_positive(protocol.temperature), "temperature", "a positive number", protocol.temperature)
    _check(protocol.window in WINDOWS, "window", " or ".join(WINDOWS), protocol.window)
    resolve_size(protocol.size, 480, 854)


def _find(known: Mapping[str, _T], key: str, what: str) -> _T:
    if key in known:
        return known[key]
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else None
    raise UsageError(f"{key!r} is no {what}", wanted=", ".join(known), found=key, hint=hint)


def _same_type(key: str, value: object, default: object) -> object:
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _check(type(value) is type(default), key, f"a value of type {type(default).__name__}", repr(value))
    return value


def _check(ok: bool, key: str, wanted: str, found: object) -> None:
    if not ok:
        raise UsageError(f"the protocol field {key} has no meaning as given", wanted=wanted, found=found)


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
