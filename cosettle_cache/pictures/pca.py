"""Tokens in colours beside the frame that they are of: one PNG per frame and kind of tokens, and a film.

Frames and the colours of their tokens go in one after the other; nothing is kept beyond the frame in hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cosettle_cache.core.files import make_folder, output_errors
from cosettle_cache.pictures.film import Movie
from cosettle_cache.videos.frames import Image8

Colours = UInt8[np.ndarray, "row col 3"]
AnyImage = UInt8[np.ndarray, "_ _ 3"]

#: Films: by the suffix of their name.
FILMS = ("mp4", "webp", "none")
#: Height of a caption as a share of the frame's, at least so many pixels.
_CAPTION, _LEAST_CAPTION = 0.06, 16
_GAP = 4


def enlarge_tokens(colours: Colours, height: int, width: int) -> UInt8[np.ndarray, "_ _ 3"]:
    """Return every token as the rectangle of pixels that it stands for."""
    return cv2.resize(colours, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def beside_frame(panels: Mapping[str, AnyImage]) -> AnyImage:
    """Return pictures of one size in a row, each under its name."""
    height = next(iter(panels.values())).shape[0]
    drawn = [_captioned(panel, name) for name, panel in panels.items()]
    gap = np.full((drawn[0].shape[0], _GAP, 3), 255, np.uint8)
    row = [part for panel in drawn for part in (panel, gap)][:-1]
    assert all(part.shape[0] == drawn[0].shape[0] >= height for part in row)
    return np.concatenate(row, axis=1)


def write_pictures(
    frames: Iterable[tuple[str, Image8, Mapping[str, Colours]]],
    fps: float | None,
    folder: Path,
    *,
    film: str = "mp4",
    stills: bool = True,
) -> None:
    """Write, per frame (name, image, colours by kind of tokens), `folder/KIND/NAME.png`, and `folder.mp4`.

    A film shows the frame and all kinds beside each other. Raises `OutputError` when they cannot be written.
    """
    make_folder(folder)
    path = folder.with_name(f"{folder.name}.{film}")
    with Movie(path, fps) if film != "none" else nullcontext() as running:
        for name, image, colours in frames:
            height, width = image.shape[:2]
            panels = {kind: enlarge_tokens(item, height, width) for kind, item in colours.items()}
            if stills:
                _write_stills(folder, name, panels)
            if running is not None:
                running.add(beside_frame({"frame": image, **panels}))


def _write_stills(folder: Path, name: str, panels: Mapping[str, AnyImage]) -> None:
    for kind, panel in panels.items():
        path = make_folder(folder / kind) / f"{name}.png"
        with output_errors(path):
            Image.fromarray(panel).save(path)


def _captioned(panel: AnyImage, name: str) -> AnyImage:
    size = max(_LEAST_CAPTION, round(panel.shape[0] * _CAPTION))
    strip = np.full((size, panel.shape[1], 3), 255, np.uint8)
    scale = size / 32
    place = (round(size / 4), round(size * 0.75))
    cv2.putText(
        strip, name, place, cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), max(1, round(scale)), cv2.LINE_AA
    )
    return np.concatenate([strip, panel])
