"""Tracked points as a table: one row per kind of tokens, query and frame.

In come the queries of one video and where they were found; out go rows for `tracks.parquet`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Float64

from cosettle_cache.core.types import Video
from cosettle_cache.videos.point_tracks import PointTracks
from cosettle_cache.videos.queries import Queries

#: One row per kind of tokens, query and frame; places in pixels of the video from the image's corner. True
#: places are null where nobody knows them.
SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("tokens", pa.string()),
        ("query", pa.int64()),
        ("track", pa.int64()),
        ("query_frame", pa.int64()),
        ("frame", pa.int64()),
        ("x", pa.float32()),
        ("y", pa.float32()),
        ("visible", pa.bool_()),
        ("cosine", pa.float32()),
        ("true_x", pa.float32()),
        ("true_y", pa.float32()),
        ("true_visible", pa.bool_()),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class TrackCase:
    """One video, what is asked about it and, where that is known, the truth of each query."""

    video: Video
    queries: Queries
    truth: PointTracks | None


@dataclass(frozen=True, slots=True, eq=False)
class FoundTracks:
    """Where the queries of one video were found, in pixels, by one kind of tokens."""

    points: Float64[np.ndarray, "query frame 2"]
    visible: Bool[np.ndarray, "query frame"]
    cosines: Float32[np.ndarray, "query frame"]

    @classmethod
    def empty(cls, n_queries: int, n_frames: int) -> FoundTracks:
        """Return room for so many queries and frames."""
        shape = (n_queries, n_frames)
        return cls(np.zeros((*shape, 2)), np.zeros(shape, np.bool_), np.zeros(shape, np.float32))


def track_rows(
    case: TrackCase, kind: str, found: FoundTracks, kept: Bool[np.ndarray, "query frame"]
) -> pa.RecordBatch:
    """Return the rows of the pairs of query and frame that are `kept`."""
    query, frame = np.nonzero(kept)
    places = found.points[query, frame]
    return pa.RecordBatch.from_arrays(
        [
            pa.array([case.video.video_id] * len(query), pa.string()),
            pa.array([kind] * len(query), pa.string()),
            pa.array(query),
            pa.array(case.queries.tracks[query]),
            pa.array(case.queries.frames[query]),
            pa.array(frame),
            *_floats(places),
            pa.array(found.visible[query, frame]),
            pa.array(found.cosines[query, frame]),
            *_truth(case.truth, query, frame),
        ],
        schema=SCHEMA,
    )


def _truth(truth: PointTracks | None, query: np.ndarray, frame: np.ndarray) -> list[pa.Array]:
    if truth is None:
        return [
            pa.nulls(len(query), SCHEMA.field(name).type) for name in ("true_x", "true_y", "true_visible")
        ]
    return [*_floats(truth.points[query, frame]), pa.array(truth.visible[query, frame])]


def _floats(places: Float64[np.ndarray, "row 2"]) -> list[pa.Array]:
    return [pa.array(places[:, axis].astype(np.float32)) for axis in (0, 1)]
