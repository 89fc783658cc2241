"""What scoring one video needs, whatever the benchmark: its row, its truth, somebody's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cosettle_cache.types import Grid, Video

#: Names of missing files that one line lists.
_LISTED_NAMES = 6


@dataclass(frozen=True, slots=True)
class Case:
    """One video to score; `number` is its place in the manifest, by which released scripts name joints.

    `grid` is what predicted joints are counted in.
    """

    video: Video
    number: int
    data_root: Path
    predictions: Path
    grid: Grid


def lacking(what: str, missing: Sequence[str], n_wanted: int) -> list[str]:
    """Return no line, or one that says how many of the files wanted are missing and names the first."""
    if not missing:
        return []
    more = ", ..." if len(missing) > _LISTED_NAMES else ""
    return [f"lacks {len(missing)} of {n_wanted} {what}: {', '.join(missing[:_LISTED_NAMES])}{more}"]
