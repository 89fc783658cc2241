"""What a tracker is asked and what the answer is: queries, from true tracks or from a table of points.

In come a manifest row and the data root, or a file; out go tracks and queries in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Int64

from cosettle_cache.core.errors import InputError, MediaError, UsageError
from cosettle_cache.core.settings import QUERY_MODES
from cosettle_cache.core.tables import read_table, table_rows
from cosettle_cache.core.types import LabelKind, Manifest, Video
from cosettle_cache.videos.sprites import read_settings
from cosettle_cache.videos.tapvid import PointTracks, read_shares

#: A file of points: one row per query, pixels of the video.
_QUERY_SCHEMA = pa.schema(
    [("video_id", pa.string()), ("frame", pa.int64()), ("x", pa.float64()), ("y", pa.float64())]
)


@dataclass(frozen=True, slots=True, eq=False)
class Queries:
    """Points to be tracked: in which frame each one is given, where, and which track it belongs to.

    `points` are (x, y) in pixels from the corner of the image. Several queries may ask for one track.
    """

    frames: Int64[np.ndarray, " query"]
    points: Float64[np.ndarray, "query 2"]
    tracks: Int64[np.ndarray, " query"]

    def __len__(self) -> int:
        return len(self.frames)


def open_tracks(video: Video, data_root: str | Path) -> PointTracks:
    """Return the true tracks of one manifest row, in pixels of the video.

    Those of the sprites follow from their settings; others lie in the row's file. Raises `MediaError` for a
    row without tracks and for a file that does not fit.
    """
    if video.dataset == "sprites":
        from cosettle_cache.videos.sprites.tracks import sprites_tracks

        return sprites_tracks(video.video_id, read_settings(Path(data_root)))
    if video.labels is None or video.label_kind is not LabelKind.TRACKS:
        raise MediaError(
            f"{video.video_id} has no tracks",
            wanted="a manifest of the layout tapvid",
            found=f"labels of the kind {video.label_kind}" if video.label_kind else "no labels",
            hint="--queries FILE tracks points of your own, without scores",
        )
    return read_shares(Path(data_root) / video.labels, video)


def sample_queries(tracks: PointTracks, query_mode: str, stride: int = 5) -> Queries:
    """Return the queries that TAP-Vid asks of true tracks.

    `first` asks for each point once, where it is first visible; `strided` in every `stride`-th frame, from
    frame 0, for all points that are visible there. A point that is never visible is not asked for.
    """
    if query_mode not in QUERY_MODES:
        raise UsageError("unknown query mode", wanted=" or ".join(QUERY_MODES), found=query_mode)
    if query_mode == "first":
        index = np.flatnonzero(tracks.visible.any(axis=1))
        frames = tracks.visible[index].argmax(axis=1)
    else:
        if stride < 1:
            raise UsageError("the stride of queries is a number of frames", wanted="at least 1", found=stride)
        nth, index = np.nonzero(tracks.visible[:, ::stride].T)
        frames = nth * stride
    return Queries(frames, tracks.points[index, frames], index)


def read_queries(path: str | Path, manifest: Manifest) -> dict[str, Queries]:
    """Return a file's points by video; columns `video_id` (if there are several videos), `frame`, `x`, `y`.

    `frame` counts from 0, `x` and `y` are pixels from the corner of the image. Raises `InputError` naming the
    row that is not in a video of the manifest.
    """
    table = read_table(Path(path), _QUERY_SCHEMA)
    missing = [name for name in ("frame", "x", "y") if name not in table.column_names]
    if missing:
        columns = ", ".join(table.column_names)
        raise InputError(
            f"{path} lacks the column {missing[0]}", wanted="video_id, frame, x, y", found=columns
        )
    rows: dict[str, list[tuple[int, float, float]]] = {}
    videos = {video.video_id: video for video in manifest}
    for number, row in enumerate(table_rows(table, path), start=1):
        video = _video_of(row, videos, f"row {number} of {path}")
        rows.setdefault(video.video_id, []).append(_checked(row, video, f"row {number} of {path}"))
    if not rows:
        raise InputError(f"{path} lists no points", wanted="at least one row")
    queries = {}
    for video_id, found in rows.items():
        frames, *places = zip(*found, strict=True)
        points = np.array(places, np.float64).T
        queries[video_id] = Queries(np.array(frames, np.int64), points, np.arange(len(found)))
    return queries


def _video_of(row: Mapping[str, Any], videos: Mapping[str, Video], where: str) -> Video:
    video_id = row.get("video_id")
    if video_id is None and len(videos) == 1:
        return next(iter(videos.values()))
    if str(video_id) not in videos:
        raise InputError(
            f"{where} is of no video of the store", wanted=", ".join(list(videos)[:8]), found=video_id
        )
    return videos[str(video_id)]


def _checked(row: Mapping[str, Any], video: Video, where: str) -> tuple[int, float, float]:
    try:
        frame, x, y = int(row["frame"]), float(row["x"]), float(row["y"])
        if frame != row["frame"]:
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where} is no point", wanted="numbers", found=str(dict(row))) from error
    if not 0 <= frame < video.n_frames:
        wanted = f"a frame from 0 to {video.n_frames - 1}"
        raise InputError(f"{where} is beyond {video.video_id}", wanted=wanted, found=f"frame {frame}")
    if not (0 <= x <= video.width and 0 <= y <= video.height):
        wanted = f"x from 0 to {video.width}, y from 0 to {video.height}"
        raise InputError(f"{where} lies outside {video.video_id}", wanted=wanted, found=f"({x:g}, {y:g})")
    return frame, x, y
