"""What is drawn on frames: masks as veils with outlines, joints as a skeleton, tokens in colours, tracks.

Frames and what is drawn of them come in one after the other; films and stills go out, of every kind of tokens
by itself and of all side by side. Nothing is kept beyond the frame in hand. Colours are for the eye only.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image, ImageDraw, ImageFont

from cosettle_cache.core.files import make_folder, output_errors, printable
from cosettle_cache.pictures.film import Film, Movie
from cosettle_cache.videos.tapvid import PointTracks

# Sizes differ by design: a canvas is larger than its frame, a panel smaller.
Image8 = UInt8[np.ndarray, "_ _ 3"]
Mask = UInt8[np.ndarray, "_ _"]
#: Key points in pixels of the frame: x, then y; lost ones are negative.
Points = Float[np.ndarray, "2 joint"]
#: A place in pixels of the frame: x, then y.
Place = Float[np.ndarray, "2"]
Colour = tuple[int, int, int]

#: Share of an object's colour in the pixels that it covers.
_OPACITY = 0.45
#: Frames are enlarged by a whole factor until their short side has so many pixels, for lines to be fine.
_SHORT_SIDE = 480
#: Longer side of a panel among others.
PANEL_SIDE = 640

_BACKGROUND: Colour = (24, 26, 30)
_TEXT: Colour = (235, 237, 240)
_WHITE = [255, 255, 255]
_GAP = 4
#: One step of hue from an index to the next: neighbours differ most, and no index repeats another's hue.
_GOLDEN = 0.618034

#: The bones of JHMDB's fifteen joints (PROTOCOLS 2.1), with their colour: trunk, right side, left side.
_BONES: tuple[tuple[int, int, Colour], ...] = (
    *((a, b, (250, 222, 80)) for a, b in ((2, 0), (0, 1))),
    *((a, b, (255, 112, 67)) for a, b in ((0, 3), (3, 7), (7, 11), (1, 5), (5, 9), (9, 13))),
    *((a, b, (64, 180, 255)) for a, b in ((0, 4), (4, 8), (8, 12), (1, 6), (6, 10), (10, 14))),
)
#: Fraction bits of OpenCV's coordinates.
_SHIFT = 4
#: Frames that the tail of a track goes back, and the radius of its dot as a share of the image's height.
_TAIL, _DOT = 10, 1 / 120
#: From blue over green to red.
_TURBO = cv2.applyColorMap(np.arange(256, dtype=np.uint8), cv2.COLORMAP_TURBO)[0, :, ::-1]

#: Red, green and blue of every object or class but 0; three strengths in turn tell close hues apart.
_STRENGTHS = ((0.85, 1.0), (0.6, 1.0), (0.9, 0.72))
_SHADES = [
    colorsys.hsv_to_rgb(0.97 + index * _GOLDEN, *_STRENGTHS[index // 7 % 3]) for index in range(1, 256)
]
COLOURS: UInt8[np.ndarray, "256 3"] = np.round(255 * np.array([(0, 0, 0), *_SHADES])).astype(np.uint8)

#: Name of the film that shows all kinds; no kind bears it.
SIDE_BY_SIDE = "side_by_side"
#: Title of the panel of annotations, and of the first one where later frames have none.
_TRUTH, _GIVEN = "truth", "frame 0, as given"


def canvas_scale(height: int, width: int) -> int:
    """Return the whole factor that frames of a size are enlarged by before they are drawn on."""
    return max(1, -(-_SHORT_SIDE // min(height, width)))


def enlarge(image: Image8, scale: int) -> Image8:
    """Return the frame `scale` times as large."""
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) if scale > 1 else image


def draw_mask(image: Image8, mask: Mask, scale: int = 1) -> Image8:
    """Return `image`, `scale` times as large as `mask`, with every object in its colour and outlined."""
    mask = mask.repeat(scale, 0).repeat(scale, 1)
    veiled = cv2.addWeighted(image, 1 - _OPACITY, COLOURS[mask], _OPACITY, 0.0)
    drawn = np.where((mask > 0)[..., None], veiled, image)
    for index in np.unique(mask[mask > 0]).tolist():
        shape = (mask == index).astype(np.uint8)
        outline, _ = cv2.findContours(shape, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        lighter = [round(255 - 0.55 * (255 - value)) for value in COLOURS[index].tolist()]
        cv2.drawContours(drawn, outline, -1, lighter, 2, cv2.LINE_AA)
    return drawn


def draw_joints(image: Image8, points: Points, scale: int = 1) -> Image8:
    """Return `image` with the skeleton of fifteen joints; lost ones, and bones that end in one, are left out.

    `points` are pixels of the frame, of which `image` is `scale` times the size. The person's right side is
    orange, the left blue, the trunk yellow.
    """
    drawn = image.copy()
    places = np.round(((points + 0.5) * scale - 0.5) * 2**_SHIFT).astype(int).T.tolist()
    seen: Bool[np.ndarray, " joint"] = np.asarray((points >= 0).all(axis=0))
    thick = max(2, round(min(image.shape[:2]) / 150))
    bones = [(a, b, colour) for a, b, colour in _BONES if seen[a] and seen[b]]
    # A dark rim first, under everything: bright lines stay legible on bright frames.
    for a, b, _ in bones:
        cv2.line(drawn, places[a], places[b], _BACKGROUND, thick + 3, cv2.LINE_AA, _SHIFT)
    for a, b, colour in bones:
        cv2.line(drawn, places[a], places[b], colour, thick, cv2.LINE_AA, _SHIFT)
    for joint in np.flatnonzero(seen).tolist():
        own = next(colour for a, b, colour in _BONES if joint in (a, b))
        for radius, shade in ((1.75 * thick + 1.5, _BACKGROUND), (1.75 * thick, _TEXT), (1.2 * thick, own)):
            size = round(radius * 2**_SHIFT)
            cv2.circle(drawn, places[joint], size, shade, cv2.FILLED, cv2.LINE_AA, _SHIFT)
    return drawn


def side_by_side(panels: Mapping[str, Image8]) -> Image8:
    """Return the panels, all of one size, under their titles, in rows of up to three."""
    titled = []
    for title, image in panels.items():
        height, width = image.shape[:2]
        ratio = PANEL_SIDE / max(height, width)
        size = (round(width * ratio), round(height * ratio))
        fitted = image if ratio >= 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        titled.append(np.concatenate([_strip(title, fitted.shape[1]), fitted]))
    n_cols = 2 if len(titled) == 4 else min(len(titled), 3)
    titled += [np.full_like(titled[0], _BACKGROUND)] * (-len(titled) % n_cols)
    rows = [_joined(titled[start : start + n_cols], 1) for start in range(0, len(titled), n_cols)]
    return _joined(rows, 0)


def _joined(images: Sequence[Image8], axis: int) -> Image8:
    edge = [(0, 0), (0, 0), (0, 0)]
    edge[axis] = (0, _GAP)
    return np.concatenate([*(np.pad(image, edge) for image in images[:-1]), images[-1]], axis=axis)


@cache
def _strip(title: str, width: int) -> Image8:
    """Return a strip with as much of the title as fits."""
    font = ImageFont.load_default(20)
    strip, title = Image.new("RGB", (width, 34), _BACKGROUND), printable(title)
    draw = ImageDraw.Draw(strip)
    while len(title) > 1 and draw.textlength(title, font) > width - 20:
        title = title[:-2].rstrip() + "…"
    draw.text((10, 17), title, _TEXT, font, anchor="lm")
    return np.asarray(strip)


_Labels = TypeVar("_Labels")
#: Draws labels, in pixels of the frame, on a frame that was enlarged by a whole factor.
Draw = Callable[[Image8, _Labels, int], Image8]


def write_overlays(
    images: Iterable[Image8],
    kinds: Mapping[str, Iterable[_Labels]],
    draw: Draw[_Labels],
    *,
    truth: Iterable[_Labels | None],
    n_frames: int,
    fps: float | None,
    folder: Path,
) -> None:
    """Write `folder/KIND.mp4` of every kind and `folder/side_by_side.mp4`, and four PNG stills of each.

    `kinds` are the labels by kind of tokens, `truth` the annotations, None for frames without; the first has
    one. Small frames are enlarged. Raises `OutputError` when something cannot be written.
    """
    make_folder(folder)
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(Film(folder, name, n_frames, fps)) for name in (*kinds, SIDE_BY_SIDE)
        }
        given: Image8 | None = None
        for image, annotation, *labels in zip(images, truth, *kinds.values(), strict=True):
            scale = canvas_scale(*image.shape[:2])
            canvas = enlarge(image, scale)
            panels = {name: draw(canvas, label, scale) for name, label in zip(kinds, labels, strict=True)}
            for name, panel in panels.items():
                writers[name].add(panel)
            if annotation is not None:
                true = draw(canvas, annotation, scale)
                given = true if given is None else given
                panels = {_TRUTH: true, **panels}
            elif given is not None:
                panels = {_GIVEN: given, **panels}
            writers[SIDE_BY_SIDE].add(side_by_side(panels))


def write_pictures(
    frames: Iterable[tuple[str, Image8, Mapping[str, Image8]]],
    fps: float | None,
    folder: Path,
    *,
    film: str = "mp4",
    stills: bool = True,
) -> None:
    """Write, per frame (name, image, a colour per token by kind), `folder/KIND/NAME.png`, and `folder.mp4`.

    Every token becomes the rectangle of pixels that it stands for. The film, another by its suffix or none,
    shows the frame and all kinds side by side. Raises `OutputError` when something cannot be written.
    """
    make_folder(folder)
    path = folder.with_name(f"{folder.name}.{film}")
    with Movie(path, fps) if film != "none" else nullcontext() as movie:
        for name, image, colours in frames:
            size = image.shape[1::-1]
            panels = {
                kind: cv2.resize(item, size, interpolation=cv2.INTER_NEAREST_EXACT)
                for kind, item in colours.items()
            }
            for kind, panel in panels.items() if stills else ():
                still = make_folder(folder / kind) / f"{name}.png"
                with output_errors(still):
                    Image.fromarray(panel).save(still)
            if movie is not None:
                movie.add(side_by_side({"frame": image, **panels}))


@dataclass(frozen=True, slots=True, eq=False)
class DrawnTracks:
    """What is drawn of one video: found tracks, the frame in which each one was given, the true ones."""

    found: PointTracks
    given: Int64[np.ndarray, " point"]
    truth: PointTracks | None = None


def write_tracks(
    images: Iterable[Image8], tracks: DrawnTracks, fps: float | None, folder: Path, name: str
) -> None:
    """Write `folder/name.mp4` and four stills, small frames enlarged; raise `OutputError` if it cannot be."""
    # One colour per point, by its place from the top left to the bottom right where it was given.
    starts = tracks.found.points[np.arange(len(tracks.given)), tracks.given]
    order = np.argsort(np.argsort(starts.sum(axis=1)))
    shades = np.asarray(256 * (0.05 + 0.9 * order / max(len(order) - 1, 1)), np.uint8)
    colours = _TURBO[shades].tolist()
    make_folder(folder)
    with Film(folder, name, tracks.found.n_frames, fps) as film:
        for frame, image in enumerate(images):
            scale = canvas_scale(*image.shape[:2])
            canvas = enlarge(image.copy(), scale)
            _draw_tracks(canvas, tracks, frame, colours, scale)
            film.add(canvas)


def _draw_tracks(
    canvas: Image8, tracks: DrawnTracks, frame: int, colours: Sequence[list[int]], scale: int
) -> None:
    """Draw all tails and then all dots; where the true place shows, a cross there is tied to the dot."""
    found, truth, radius = tracks.found, tracks.truth, canvas.shape[0] * _DOT
    given, size = np.flatnonzero(tracks.given <= frame).tolist(), round(radius * 2**_SHIFT)

    def fixed(place: Place) -> list[int]:
        # As OpenCV counts: in parts of a pixel, from the first pixel's centre.
        counted: list[int] = np.round((place * scale - 0.5) * 2**_SHIFT).astype(int).tolist()
        return counted

    def line(start: Place, end: Place, colour: list[int]) -> None:
        cv2.line(canvas, fixed(start), fixed(end), colour, 1, cv2.LINE_AA, _SHIFT)

    for point in given:
        for index in range(max(tracks.given[point], frame - _TAIL) + 1, frame + 1):
            if found.visible[point, index - 1] and found.visible[point, index]:
                line(found.points[point, index - 1], found.points[point, index], colours[point])
    for point in given:
        place = found.points[point, frame]
        if truth is not None and truth.visible[point, frame]:
            true = truth.points[point, frame]
            line(true, place, _WHITE)
            for reach in radius / scale * np.eye(2):
                line(true - reach, true + reach, _WHITE)
        filled = -1 if found.visible[point, frame] else 1
        cv2.circle(canvas, fixed(place), size, (0, 0, 0), 2, cv2.LINE_AA, _SHIFT)
        cv2.circle(canvas, fixed(place), size, colours[point], filled, cv2.LINE_AA, _SHIFT)
