"""What scoring one video needs, whatever the benchmark: its row, its truth, somebody's predictions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from cosettle_cache.core.types import Grid, Video


@dataclass(frozen=True, slots=True)
class Case:
    """One video to score; `number` is its place among `n_videos`, by which released scripts name joints.

    `grid` is what predicted joints are counted in.
    """

    video: Video
    number: int
    n_videos: int
    data_root: Path
    predictions: Path
    grid: Grid


def lacking(what: str, missing: Collection[str], wanted: Sequence[str]) -> list[str]:
    """Return no line, or one that names every missing file, neighbours in `wanted` as a range."""
    if not missing:
        return []
    runs = [list(run) for is_missing, run in groupby(wanted, key=set(missing).__contains__) if is_missing]
    names = [run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return [f"lacks {len(missing)} of {len(wanted)} {what}: {', '.join(names)}"]
