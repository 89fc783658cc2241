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

from cosettle_cache.core.files import make_folder
from cosettle_cache.pictures.drawing import canvas_scale, enlarge
from cosettle_cache.pictures.film import Film
from cosettle_cache.videos.frames import Image8
from cosettle_cache.videos.tapvid import PointTracks

#: Frames that a tail goes back.
TAIL = 10
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
    make_folder(folder)
    with Film(folder, name, tracks.found.n_frames, fps) as film:
        for index, image in enumerate(images):
            film.add(draw_tracks(image, tracks, index))


def draw_tracks(image: Image8, tracks: DrawnTracks, frame: int) -> UInt8[np.ndarray, "_ _ 3"]:
    """Return the frame, enlarged if it is small, with every point that was given by then."""
    scale = canvas_scale(*image.shape[:2])
    canvas = enlarge(image.copy(), scale)
    brush = _Brush(canvas, scale, canvas.shape[0] * _DOT)
    colours = tracks.colours.tolist()
    given = np.flatnonzero(tracks.given <= frame).tolist()
    for point in given:
        _draw_tail(brush, tracks, point, frame, colours[point])
    for point in given:
        _draw_truth(brush, tracks, point, frame)
        shown = bool(tracks.found.visible[point, frame])
        brush.dot(tracks.found.points[point, frame], colours[point], shown)
    return canvas


@dataclass(frozen=True, slots=True, eq=False)
class _Brush:
    """Draws on a canvas that is `scale` times as large as the frame whose pixels places are given in."""

    canvas: Image8
    scale: int
    radius: float

    def line(self, start: Place, end: Place, colour: list[int]) -> None:
        cv2.line(self.canvas, self._fixed(start), self._fixed(end), colour, 1, cv2.LINE_AA, _SHIFT)

    def dot(self, place: Place, colour: list[int], filled: bool) -> None:
        centre, size = self._fixed(place), round(self.radius * 2**_SHIFT)
        cv2.circle(self.canvas, centre, size, (0, 0, 0), 2, cv2.LINE_AA, _SHIFT)
        cv2.circle(self.canvas, centre, size, colour, -1 if filled else 1, cv2.LINE_AA, _SHIFT)

    def cross(self, place: Place) -> None:
        for step in ((self.radius, 0.0), (0.0, self.radius)):
            reach = np.array(step) / self.scale
            self.line(place - reach, place + reach, _WHITE)

    def _fixed(self, place: Place) -> tuple[int, int]:
        """Return a place as OpenCV counts: in parts of a pixel, from the first pixel's centre."""
        x, y = np.round((place * self.scale - 0.5) * 2**_SHIFT).astype(int).tolist()
        return x, y


def _draw_tail(brush: _Brush, tracks: DrawnTracks, point: int, frame: int, colour: list[int]) -> None:
    first = max(int(tracks.given[point]), frame - TAIL)
    points, visible = tracks.found.points[point], tracks.found.visible[point]
    for index in range(first + 1, frame + 1):
        if visible[index - 1] and visible[index]:
            brush.line(points[index - 1], points[index], colour)


def _draw_truth(brush: _Brush, tracks: DrawnTracks, point: int, frame: int) -> None:
    """Tie the true place to the found one; nothing where the point does not show."""
    if tracks.truth is not None and tracks.truth.visible[point, frame]:
        true = tracks.truth.points[point, frame]
        brush.line(true, tracks.found.points[point, frame], _WHITE)
        brush.cross(true)
