"""Joints as the released scripts write them: `NUMBER.dat`, a pickled `[2 joint frame]` in cells of the grid.

In comes a case, out goes one row with the clip's counts in both readings of PCK. NUMBER is the clip's place
in the list; `CLIP.npy` under the clip's own name is read as well.
"""

from __future__ import annotations

from pathlib import Path

from cosettle_cache.datasets.jhmdb import cells_to_pixels, open_joints, read_predicted_joints
from cosettle_cache.errors import MediaError
from cosettle_cache.metrics.rows import clip_row
from cosettle_cache.scoring.case import Case
from cosettle_cache.types import Score


def check_joints(case: Case) -> list[str]:
    """Return what keeps the clip from being scored: no file, fewer frames, or another grid."""
    truth = open_joints(case.video, case.data_root).joints
    path = _find(case)
    if path is None:
        return [f"neither {case.number}.dat nor {case.video.video_id}.npy"]
    try:
        points = read_predicted_joints(path)
    except MediaError as error:
        return [error.summary]
    if points.shape[1] != truth.shape[1] or points.shape[2] < truth.shape[2]:
        wanted, found = (f"{shape[1]} joints in {shape[2]} frames" for shape in (truth.shape, points.shape))
        return [f"{path.name} has {found}, not {wanted}"]
    highest = points.max(axis=(1, 2))
    if highest[0] >= case.grid.cols or highest[1] >= case.grid.rows:
        return [
            f"{path.name} goes up to column {highest[0]:.1f} and row {highest[1]:.1f}: no grid of {case.grid}"
        ]
    return []


def score_joints(case: Case, row: Score) -> list[Score]:
    """Return the clip's row."""
    truth = open_joints(case.video, case.data_root).joints
    path = _find(case)
    assert path is not None
    size = (case.video.height, case.video.width)
    pixels = cells_to_pixels(read_predicted_joints(path), size, case.grid)
    return [clip_row(row, truth, pixels, size)]


def _find(case: Case) -> Path | None:
    by_name = case.predictions / f"{case.video.video_id}.npy"
    return next((path for path in (by_name, case.predictions / f"{case.number}.dat") if path.is_file()), None)
