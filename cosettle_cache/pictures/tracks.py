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
from jaxtyping import Float, Int64
from matplotlib import colormaps

from cosettle_cache.core.files import make_folder
from cosettle_cache.pictures.drawing import canvas_scale, enlarge
from cosettle_cache.pictures.film import Film
from cosettle_cache.videos.frames import Image8
from cosettle_cache.videos.tapvid import PointTracks

#: Frames that a tail goes back.
_TAIL = 10
#: Sub-pixels per pixel in which OpenCV takes places, as a power of two.
_SHIFT = 4
#: The radius of a dot as a share of the image's height.
_DOT = 1 / 120
_WHITE = [255, 255, 255]

Place = Float[np.ndarray, "2"]


@dataclass(frozen=True, slots=True, eq=False)
class DrawnTracks:
    """What is drawn of one video: found tracks, the frame in which each one was given, the true ones."""

    found: PointTracks
    given: Int64[np.ndarray, " point"]
    truth: PointTracks | None = None


def write_tracks(
    images: Iterable[Image8], tracks: DrawnTracks, fps: float | None, folder: Path, name: str
) -> None:
    """Write `folder/name.mp4` and four stills of it, small frames enlarged.

    Raises `OutputError` when they cannot be written.
    """
    # One colour per point, by its place from the top left to the bottom right where it was given.
    starts = tracks.found.points[np.arange(len(tracks.given)), tracks.given]
    order = np.argsort(np.argsort(starts.sum(axis=1)))
    shades = colormaps["turbo"](0.05 + 0.9 * order / max(len(order) - 1, 1))
    colours = np.asarray(255 * shades[:, :3], np.uint8).tolist()
    make_folder(folder)
    with Film(folder, name, tracks.found.n_frames, fps) as film:
        for frame, image in enumerate(images):
            scale = canvas_scale(*image.shape[:2])
            canvas = enlarge(image.copy(), scale)
            given = np.flatnonzero(tracks.given <= frame).tolist()
            for point in given:
                _draw_tail(canvas, scale, tracks, point, frame, colours[point])
            for point in given:
                _draw_point(canvas, scale, tracks, point, frame, colours[point])
            film.add(canvas)


def _draw_tail(
    canvas: Image8, scale: int, tracks: DrawnTracks, point: int, frame: int, colour: list[int]
) -> None:
    first = max(int(tracks.given[point]), frame - _TAIL)
    points, visible = tracks.found.points[point], tracks.found.visible[point]
    for index in range(first + 1, frame + 1):
        if visible[index - 1] and visible[index]:
            _line(canvas, scale, points[index - 1], points[index], colour)


def _draw_point(
    canvas: Image8, scale: int, tracks: DrawnTracks, point: int, frame: int, colour: list[int]
) -> None:
    """Draw the dot of the found place, tied to the cross of the true one where the point shows."""
    radius, place = canvas.shape[0] * _DOT, tracks.found.points[point, frame]
    if tracks.truth is not None and tracks.truth.visible[point, frame]:
        true = tracks.truth.points[point, frame]
        _line(canvas, scale, true, place, _WHITE)
        for step in ((radius, 0.0), (0.0, radius)):
            reach = np.array(step) / scale
            _line(canvas, scale, true - reach, true + reach, _WHITE)
    centre, size = _fixed(place, scale), round(radius * 2**_SHIFT)
    cv2.circle(canvas, centre, size, (0, 0, 0), 2, cv2.LINE_AA, _SHIFT)
    filled = -1 if tracks.found.visible[point, frame] else 1
    cv2.circle(canvas, centre, size, colour, filled, cv2.LINE_AA, _SHIFT)


def _line(canvas: Image8, scale: int, start: Place, end: Place, colour: list[int]) -> None:
    cv2.line(canvas, _fixed(start, scale), _fixed(end, scale), colour, 1, cv2.LINE_AA, _SHIFT)


def _fixed(place: Place, scale: int) -> tuple[int, int]:
    """Return a place of the frame as OpenCV counts: in parts of a pixel, from the first pixel's centre."""
    x, y = np.round((place * scale - 0.5) * 2**_SHIFT).astype(int).tolist()
    return x, y
