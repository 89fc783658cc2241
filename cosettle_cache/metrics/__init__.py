"""Scores from arrays: what a benchmark's official tool computes, in a fraction of its time and memory.

In come index maps of the truth and of the prediction; out go small records of figures, per object or class.
"""

from cosettle_cache.metrics.davis import DavisScorer, ObjectScore, boundary_tolerance, davis_j_and_f

__all__ = ["DavisScorer", "ObjectScore", "boundary_tolerance", "davis_j_and_f"]
