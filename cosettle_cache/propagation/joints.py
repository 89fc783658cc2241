"""Joints as the released scripts write them: `NUMBER.dat`, a pickled `[2 joint frame]` in cells of the grid.

In comes a case, out goes one row with the clip's counts in both readings of PCK. NUMBER is the clip's place
in the list; `CLIP.npy` under the clip's own name is read as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float

from cosettle_cache.core.errors import MediaError
from cosettle_cache.core.types import Score
from cosettle_cache.metrics.rows import clip_row
from cosettle_cache.propagation.case import Case
from cosettle_cache.videos.jhmdb import cells_to_pixels, open_joints, read_predicted_joints

#: Suffix of files that bear a clip's number, not its name.
_NUMBERED = ".dat"


def check_joints(case: Case) -> list[str]:
    """Return what keeps the clip from being scored: no file, fewer frames, or another grid."""
    truth = open_joints(case.video, case.data_root).joints
    path = _find_joints(case)
    if path is None:
        return [f"neither {case.number}.dat nor {case.video.video_id}.npy"]
    try:
        points = read_predicted_joints(path)
    except MediaError as error:
        return [error.summary]
    return [f"{path.name} {fault}" for fault in _faults(points, truth.shape, path, case)]


def _faults(
    points: Float[np.ndarray, "2 joint frame"], wanted: tuple[int, ...], path: Path, case: Case
) -> Iterator[str]:
    if points.shape[1] != wanted[1] or points.shape[2] < wanted[2]:
        counts = (f"{shape[1]} joints in {shape[2]} frames" for shape in (points.shape, wanted))
        yield "has {}, not {}".format(*counts)
    if not np.isfinite(points).all():
        yield "has joints that are nowhere: -1 marks a lost one"
    highest = points.max(axis=(1, 2))
    if highest[0] >= case.grid.cols or highest[1] >= case.grid.rows:
        reach = f"column {highest[0]:.1f} and row {highest[1]:.1f}"
        yield f"goes up to {reach}: no grid of {case.grid}"
    if path.suffix == _NUMBERED and (n_files := _count_numbered(case.predictions)) > case.n_videos:
        yield f"is one of {n_files} numbered files for {case.n_videos} clips: whose is which?"


def score_joints(case: Case, row: Score) -> list[Score]:
    """Return the clip's row."""
    truth = open_joints(case.video, case.data_root).joints
    path = _find_joints(case)
    assert path is not None
    size = (case.video.height, case.video.width)
    pixels = cells_to_pixels(read_predicted_joints(path), size, case.grid)
    return [clip_row(row, truth, pixels, size)]


def _find_joints(case: Case) -> Path | None:
    names = (f"{case.video.video_id}.npy", f"{case.number}{_NUMBERED}")
    return next((path for name in names if (path := case.predictions / name).is_file()), None)


def _count_numbered(folder: Path) -> int:
    return sum(path.stem.isdecimal() for path in folder.glob(f"*{_NUMBERED}"))
