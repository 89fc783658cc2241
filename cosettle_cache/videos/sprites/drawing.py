"""A canvas that paints textured outlines and knows, exactly, what covers each pixel most.

In come outlines with their placement, back to front; out go the picture and the index of the topmost piece.
Points are (x, y) in pixels with the origin at the corner of the picture; a pixel's centre lies at one half.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from cosettle_cache.videos.sprites.textures import TILE, Picture, Tile

#: Sub-pixels per pixel and axis in which coverage is counted; rims come out right to 1/20 pixel on average.
FINENESS = 8
#: Texture pixels per unit of an outline's own coordinates.
TEXTURE_DENSITY = 48.0

Outline = Float[np.ndarray, "point 2"]
Placement = Float[np.ndarray, "3 3"]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A closed outline in its own units, where it lies, its texture, and the index it leaves in the map."""

    outline: Outline
    placement: Placement
    texture: Tile
    index: int = 0


@dataclass(frozen=True, slots=True)
class _Box:
    left: int
    top: int
    right: int
    bottom: int

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, as OpenCV orders them."""
        return self.right - self.left, self.bottom - self.top


class Canvas:
    """A picture under construction and, per pixel, the index of the piece that covers most of it."""

    def __init__(self, background: Picture) -> None:
        self.image = background.copy()
        self.indices = np.zeros(background.shape[:2], np.uint8)
        # Share of the pixel that its index covers. A new piece shrinks all older shares alike, so the largest
        # of them stays the largest and one number per pixel is enough.
        self._share = np.ones(background.shape[:2], np.float32)

    def paint(self, piece: Piece) -> None:
        """Lay a piece over what is there; what lies outside the picture is cut off."""
        points = transform(piece.placement, piece.outline)
        box = self._visible_box(points)
        if box is None:
            return
        cover, colour = _coverage(points, box), _textured(piece, box)
        image, share = self.image[box.slices], self._share[box.slices]
        image += cover[..., None] * (colour * _relief(cover)[..., None] - image)
        share *= 1 - cover
        self.indices[box.slices][cover > share] = piece.index
        np.maximum(share, cover, out=share)

    def picture(self) -> UInt8[np.ndarray, "height width 3"]:
        """Return the picture as 8-bit RGB."""
        return np.asarray(np.clip(self.image * 255 + 0.5, 0, 255), dtype=np.uint8)

    def _visible_box(self, points: Outline) -> _Box | None:
        height, width = self.image.shape[:2]
        left, top = np.maximum(np.floor(points.min(0)).astype(int), 0).tolist()
        right, bottom = np.minimum(np.ceil(points.max(0)).astype(int) + 1, (width, height)).tolist()
        return _Box(left, top, right, bottom) if left < right and top < bottom else None


def transform(placement: Placement, points: Outline) -> Outline:
    """Return `points` moved by an affine placement."""
    return np.asarray(points @ placement[:2, :2].T + placement[:2, 2])


def move(x: float, y: float) -> Placement:
    """Return the placement that shifts by (x, y)."""
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], dtype=np.float64)


def turn(angle: float) -> Placement:
    """Return the placement that turns clockwise (as seen, y pointing down) by `angle` radians."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])


def stretch(x: float, y: float) -> Placement:
    """Return the placement that scales x and y; negative values mirror."""
    return np.diag([x, y, 1.0])


def warp(texture: Float32[np.ndarray, "_ _ 3"], to_texture: Placement, size: tuple[int, int]) -> Picture:
    """Return `size` (width, height) pixels looked up in `texture`; it goes on mirrored beyond its rim."""
    centred = move(-0.5, -0.5) @ to_texture @ move(0.5, 0.5)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(texture, centred[:2], size, flags=flags, borderMode=cv2.BORDER_REFLECT)


def _coverage(points: Outline, box: _Box) -> Float32[np.ndarray, "height width"]:
    """Return the share of each pixel of `box` that lies inside the outline."""
    width, height = box.size
    fine = np.zeros((height * FINENESS, width * FINENESS), np.uint8)
    corners = (points - (box.left, box.top)) * FINENESS - 0.5
    cv2.fillPoly(fine, [np.round(corners * 16).astype(np.int32)], 255, shift=4)
    return cv2.resize(fine, box.size, interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _textured(piece: Piece, box: _Box) -> Picture:
    to_tile = move(TILE / 2, TILE / 2) @ stretch(TEXTURE_DENSITY, TEXTURE_DENSITY)
    to_texture = to_tile @ np.linalg.inv(piece.placement) @ move(float(box.left), float(box.top))
    return warp(piece.texture, to_texture, box.size)


def _relief(cover: Float32[np.ndarray, "height width"]) -> Float32[np.ndarray, "height width"]:
    """Darken towards the rim, so that pieces look round and stand out from each other."""
    reach = max(3, min(cover.shape) // 5)
    padded = cv2.copyMakeBorder(cover, reach, reach, reach, reach, cv2.BORDER_CONSTANT, value=0)
    depth = cv2.blur(padded, (reach, reach))[reach:-reach, reach:-reach]
    return 0.45 + 0.6 * depth
