"""Label maps laid over frames: one MP4 per video and a few PNG stills of it.

Frames and index masks go in, one after the other; files come out. Nothing is kept beyond the frame in hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from cosettle_cache.datasets.davis import PALETTE
from cosettle_cache.frames import Image8
from cosettle_cache.pictures.video import write_film

#: Share of an object's colour in the pixels it covers; its outline is drawn in full colour.
OPACITY = 0.5

Mask = UInt8[np.ndarray, "height width"]


def draw_overlay(image: Image8, mask: Mask) -> Image8:
    """Return the frame with every object in its palette colour and outlined; the background is untouched."""
    colours = PALETTE[mask]
    mixed = cv2.addWeighted(image, 1 - OPACITY, colours, OPACITY, 0.0)
    drawn = np.where((mask > 0)[..., None], mixed, image)
    outline = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    return np.where((outline & (mask > 0))[..., None], colours, drawn)


def write_overlays(
    images: Iterable[Image8], masks: Iterable[Mask], n_frames: int, fps: float | None, folder: Path, name: str
) -> None:
    """Write `folder/name.mp4` with every overlay and `folder/name_FRAME.png` with four of them.

    Raises `OutputError` when they cannot be written.
    """
    drawn = (draw_overlay(image, mask) for image, mask in zip(images, masks, strict=True))
    write_film(drawn, n_frames, fps, folder, name)
