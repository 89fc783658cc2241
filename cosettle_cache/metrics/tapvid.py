"""The TAP-Vid figures of tracked points: position accuracy, occlusion accuracy, average Jaccard.

In come true and predicted tracks of queries, in pixels of 256x256; out go counts of one video, and shares.
The benchmark averages shares over videos.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Int64

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.settings import QUERY_MODES

#: Distances in pixels that count as near, and the size of picture that they are pixels of.
THRESHOLDS = (1, 2, 4, 8, 16)
SIZE = 256

Points = Float[np.ndarray, "query frame 2"]
# Shapes of predictions are checked by hand: a wrong one is an input error, not a bug.
AnyPoints = Float[np.ndarray, "_ _ 2"]
Visible = Bool[np.ndarray, "query frame"]
AnyVisible = Bool[np.ndarray, "_ _"]


@dataclass(frozen=True, slots=True, eq=False)
class TrackCounts:
    """How many pairs of query and frame there were, and what became of them.

    `scored` pairs count at all; in `agreed` of them the prediction is right about visibility; `visible` and
    `shown` are those truly and those supposedly visible. Per threshold, `near` are the visible ones found
    within it, `hits` those of them that the prediction shows.
    """

    scored: int
    agreed: int
    visible: int
    shown: int
    near: Int64[np.ndarray, " threshold"]
    hits: Int64[np.ndarray, " threshold"]

    @property
    def deltas(self) -> Float[np.ndarray, " threshold"]:
        """Share of the visible points found within each threshold; the prediction's visibility is ignored."""
        return _ratio(self.near, self.visible)

    @property
    def jaccards(self) -> Float[np.ndarray, " threshold"]:
        """Hits over truly visible points and false alarms: points shown where none is, or too far away."""
        return _ratio(self.hits, self.visible + self.shown - self.hits)

    @property
    def delta_avg(self) -> float:
        """Mean of `deltas`; not a number where no point is visible."""
        return float(self.deltas.mean())

    @property
    def aj(self) -> float:
        """Average Jaccard, the mean of `jaccards`; not a number where nothing is visible nor shown."""
        return float(self.jaccards.mean())

    @property
    def oa(self) -> float:
        """Occlusion accuracy: share of the scored pairs whose visibility is right."""
        return self.agreed / self.scored if self.scored else float("nan")


def count_tracks(
    truth: Points,
    truth_visible: Visible,
    prediction: AnyPoints,
    shown: AnyVisible,
    query_frames: Int[np.ndarray, " query"],
    query_mode: str = "first",
) -> TrackCounts:
    """Return the counts of one video; positions are (x, y) in pixels of a picture of 256x256.

    A point is near when its distance is below the threshold. Where the truth is not visible its position is
    ignored. Source: the benchmark's released evaluation (Doersch et al. 2022, section 3.3).
    """
    if prediction.shape != truth.shape or shown.shape != truth_visible.shape:
        raise InputError("the predicted tracks do not fit", wanted=truth.shape, found=prediction.shape)
    scored = scored_frames(query_frames, truth.shape[1], query_mode)
    squared = ((prediction - truth) ** 2).sum(axis=-1)
    near = (squared < np.square(THRESHOLDS)[:, None, None]) & truth_visible & scored
    return TrackCounts(
        scored=int(scored.sum()),
        agreed=int(((truth_visible == shown) & scored).sum()),
        visible=int((truth_visible & scored).sum()),
        shown=int((shown & scored).sum()),
        near=near.sum(axis=(1, 2)),
        hits=(near & shown).sum(axis=(1, 2)),
    )


def scored_frames(query_frames: Int[np.ndarray, " query"], n_frames: int, query_mode: str) -> Visible:
    """Say which frames count for each query: those after its own (`first`), all but its own (`strided`)."""
    if query_mode not in QUERY_MODES:
        raise UsageError("unknown query mode", wanted=" or ".join(QUERY_MODES), found=query_mode)
    counts = np.greater if query_mode == "first" else np.not_equal
    return np.asarray(counts(np.arange(n_frames), query_frames[:, None]))


def _ratio(
    part: Int64[np.ndarray, " threshold"], whole: Int64[np.ndarray, " threshold"] | int
) -> Float[np.ndarray, " threshold"]:
    whole = np.broadcast_to(whole, part.shape)
    return np.asarray(np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0))
