"""Tracked points drawn over frames: dots with tails, rings where a point is thought hidden.

Tracks of one video and its frames go in; a film and a few stills come out. True positions, where they are
known, are small crosses tied to the dots.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, Int64, UInt8
from matplotlib import colormaps

from cosettle_cache.datasets.point_tracks import PointTracks
from cosettle_cache.frames import Image8
from cosettle_cache.pictures.video import write_film

#: Frames that a tail goes back.
TAIL = 10
#: Sub-pixels per pixel in which OpenCV takes places, as a power of two.
_SHIFT = 4
#: The radius of a dot as a share of the image's height.
_DOT = 1 / 120


@dataclass(frozen=True, slots=True, eq=False)
class DrawnTracks:
    """What is drawn of one video: found tracks, the frame in which each one was given, the true ones."""

    found: PointTracks
    given: Int64[np.ndarray, " point"]
    truth: PointTracks | None = None

    @property
    def colours(self) -> UInt8[np.ndarray, "point 3"]:
        """One colour per point, by its place from the top left to the bottom right where it was given."""
        starts = self.found.points[np.arange(len(self.given)), self.given]
        order = np.argsort(np.argsort(starts.sum(axis=1)))
        shades = colormaps["turbo"](0.05 + 0.9 * order / max(len(order) - 1, 1))
        return np.asarray(255 * shades[:, :3], np.uint8)


def write_tracks(
    images: Iterable[Image8], tracks: DrawnTracks, fps: float | None, folder: Path, name: str
) -> None:
    """Write `folder/name.mp4` and four stills of it; raise `OutputError` when they cannot be written."""
    drawn = (draw_tracks(image, tracks, index) for index, image in enumerate(images))
    write_film(drawn, tracks.found.n_frames, fps, folder, name)


def draw_tracks(image: Image8, tracks: DrawnTracks, frame: int) -> Image8:
    """Return the frame with every point that was given by then."""
    canvas = np.ascontiguousarray(image).copy()
    radius = max(2.0, image.shape[0] * _DOT)
    for point, colour in enumerate(tracks.colours.tolist()):
        if tracks.given[point] <= frame:
            _draw_tail(canvas, tracks, point, frame, colour)
    for point, colour in enumerate(tracks.colours.tolist()):
        if tracks.given[point] <= frame:
            _draw_truth(canvas, tracks, point, frame, radius)
            _draw_dot(canvas, tracks.found, point, frame, colour, radius)
    return canvas


def _draw_tail(canvas: Image8, tracks: DrawnTracks, point: int, frame: int, colour: list[int]) -> None:
    first = max(int(tracks.given[point]), frame - TAIL)
    points, visible = tracks.found.points[point], tracks.found.visible[point]
    for index in range(first + 1, frame + 1):
        if visible[index - 1] and visible[index]:
            _line(canvas, points[index - 1], points[index], colour)


def _draw_dot(
    canvas: Image8, found: PointTracks, point: int, frame: int, colour: list[int], radius: float
) -> None:
    place, size = _fixed(found.points[point, frame]), round(radius * 2**_SHIFT)
    if found.visible[point, frame]:
        cv2.circle(canvas, place, size, (0, 0, 0), 2, cv2.LINE_AA, _SHIFT)
        cv2.circle(canvas, place, size, colour, -1, cv2.LINE_AA, _SHIFT)
    else:
        cv2.circle(canvas, place, size, colour, 1, cv2.LINE_AA, _SHIFT)


def _draw_truth(canvas: Image8, tracks: DrawnTracks, point: int, frame: int, radius: float) -> None:
    """Tie the true place to the found one; nothing where the point does not show."""
    if tracks.truth is None or not tracks.truth.visible[point, frame]:
        return
    true, found = tracks.truth.points[point, frame], tracks.found.points[point, frame]
    _line(canvas, true, found, [255, 255, 255])
    for step in ((radius, 0.0), (0.0, radius)):
        _line(canvas, true - step, true + step, [255, 255, 255])


def _line(
    canvas: Image8, start: Float[np.ndarray, "2"], end: Float[np.ndarray, "2"], colour: list[int]
) -> None:
    cv2.line(canvas, _fixed(start), _fixed(end), colour, 1, cv2.LINE_AA, _SHIFT)


def _fixed(point: Float[np.ndarray, "2"]) -> tuple[int, int]:
    """Return a place as OpenCV counts: in parts of a pixel, from the first pixel's centre."""
    x, y = np.round((point - 0.5) * 2**_SHIFT).astype(int).tolist()
    return x, y
