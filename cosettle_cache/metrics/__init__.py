"""Scores from arrays: what a benchmark's official tool computes, in a fraction of its time and memory.

In come index maps or key points of the truth and of the prediction; out go small records of figures.
"""

from cosettle_cache.metrics.davis import DavisScorer, boundary_tolerance, davis_j_and_f
from cosettle_cache.metrics.jhmdb import count_joints, count_joints_strictly, pck, strict_pck
from cosettle_cache.metrics.tapvid import count_tracks
from cosettle_cache.metrics.vip import Confusion, clip_miou, count_pixels, mean_iou, no_pixels

__all__ = [
    "Confusion",
    "DavisScorer",
    "boundary_tolerance",
    "clip_miou",
    "count_joints",
    "count_joints_strictly",
    "count_pixels",
    "count_tracks",
    "davis_j_and_f",
    "mean_iou",
    "no_pixels",
    "pck",
    "strict_pck",
]
