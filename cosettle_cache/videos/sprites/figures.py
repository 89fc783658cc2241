"""The cast of the sprites clips, their textures, and the canvas that paints them with exact coverage.

A creature is a list of textured pieces that move with a phase. Units are its own: about one from its middle
to its side; x to the right, y down, facing right. In pictures, points are (x, y) in pixels from the corner; a
pixel's centre lies at one half. Textures are square tiles of two colours, RGB float32 from 0 to 1.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8
from numpy.random import Generator

#: Pixels per side of a tile.
TILE = 192

Tile = Float32[np.ndarray, "side side 3"]
Picture = Float32[np.ndarray, "height width 3"]
Colour = Float32[np.ndarray, "3"]
Pattern = Float[np.ndarray, "side side"]


def plain(colour: tuple[float, float, float]) -> Tile:
    """Return a tile of one colour (red, green, blue from 0 to 1)."""
    return np.full((TILE, TILE, 3), colour, np.float32)


def sprite_texture(rng: Generator, hue: float) -> Tile:
    """Return a vivid tile around `hue` (0 to 1): any pattern, its two colours far apart in brightness."""
    pattern = _PATTERNS[rng.integers(len(_PATTERNS))](rng)
    dark = _colour(hue + rng.uniform(-0.04, 0.04), rng.uniform(0.7, 1.0), rng.uniform(0.25, 0.5))
    light = _colour(hue + rng.uniform(-0.12, 0.12), rng.uniform(0.35, 0.8), rng.uniform(0.8, 1.0))
    return _painted(pattern, dark, light, rng, grain=0.1)


def background_texture(rng: Generator, hue: float, height: int, width: int) -> Picture:
    """Return a muted texture of the given size: large patches of two colours under a finer pattern."""
    side = max(height, width)
    patches = _noise(rng, side, cells=int(rng.integers(4, 8)), octaves=6)
    pattern = _PATTERNS[rng.integers(len(_PATTERNS))](rng).astype(np.float32)
    detail = cv2.resize(pattern, (side, side), interpolation=cv2.INTER_LINEAR)
    dark = _colour(hue, rng.uniform(0.2, 0.45), rng.uniform(0.2, 0.35))
    light = _colour(hue + rng.uniform(-0.2, 0.2), rng.uniform(0.1, 0.4), rng.uniform(0.6, 0.85))
    return _painted(0.65 * patches + 0.35 * detail, dark, light, rng, grain=0.2)[:height, :width]


def _colour(hue: float, saturation: float, value: float) -> Colour:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def _painted(pattern: Pattern, dark: Colour, light: Colour, rng: Generator, grain: float) -> Tile:
    tile = np.asarray(dark + pattern[..., None].astype(np.float32) * (light - dark))
    noise = _noise(rng, len(tile), cells=len(tile) // 16, octaves=2)[..., None]
    return np.clip(tile * (1 + grain * (2 * noise - 1)), 0, 1).astype(np.float32)


def _noise(rng: Generator, side: int, cells: int, octaves: int) -> Pattern:
    """Value noise from 0 to 1: random grids, each twice as fine and half as strong as the one before."""
    total = np.zeros((side, side), np.float32)
    for octave in range(octaves):
        grid = rng.random((cells * 2**octave, cells * 2**octave), dtype=np.float32)
        total += cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC) / 2**octave
    low, high = np.percentile(total, (1, 99))
    return np.asarray(np.clip((total - low) / (high - low), 0, 1))


def _coordinates(rng: Generator) -> tuple[Pattern, Pattern]:
    """Return a rotated, slightly warped pair of coordinates in pixels."""
    angle = rng.uniform(0, np.pi)
    row, col = np.mgrid[:TILE, :TILE].astype(np.float32)
    row = row + 9 * _noise(rng, TILE, cells=4, octaves=1)
    col = col + 9 * _noise(rng, TILE, cells=4, octaves=1)
    return row * np.cos(angle) + col * np.sin(angle), col * np.cos(angle) - row * np.sin(angle)


def _soft_step(wave: Pattern) -> Pattern:
    return np.clip(0.5 + 2.5 * wave, 0, 1)


def _clouds(rng: Generator) -> Pattern:
    return _noise(rng, TILE, cells=int(rng.integers(6, 11)), octaves=3)


def _stripes(rng: Generator) -> Pattern:
    along, _ = _coordinates(rng)
    return _soft_step(np.sin(2 * np.pi * along / rng.uniform(16, 30)))


def _checks(rng: Generator) -> Pattern:
    along, across = _coordinates(rng)
    period = rng.uniform(27, 42)
    return _soft_step(np.sin(2 * np.pi * along / period) * np.sin(2 * np.pi * across / period))


def _dots(rng: Generator) -> Pattern:
    along, across = _coordinates(rng)
    period = rng.uniform(20, 30)
    wave = np.cos(2 * np.pi * along / period) + np.cos(2 * np.pi * across / period)
    return _soft_step(wave - 0.5)


def _cells(rng: Generator) -> Pattern:
    """Cobbles: every pixel takes the shade of the nearest of some points, dark where two are equally near."""
    points = rng.uniform(0, TILE, (int(rng.integers(40, 80)), 2)).astype(np.float32)
    seeds = np.full((TILE, TILE), 255, np.uint8)
    seeds[points[:, 0].astype(int), points[:, 1].astype(int)] = 0
    _, nearest = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    shade = rng.uniform(0.35, 1.0, int(nearest.max()) + 1)[nearest].astype(np.float32)
    seams = cv2.morphologyEx(nearest.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((3, 3))) > 0
    return np.where(seams, np.float32(0), shade)


_PATTERNS: tuple[Callable[[Generator], Pattern], ...] = (_clouds, _stripes, _checks, _dots, _cells)


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
        height, width = self.image.shape[:2]
        left, top = np.maximum(np.floor(points.min(0)).astype(int), 0).tolist()
        right, bottom = np.minimum(np.ceil(points.max(0)).astype(int) + 1, (width, height)).tolist()
        if left >= right or top >= bottom:
            return
        box, size = (slice(top, bottom), slice(left, right)), (right - left, bottom - top)
        cover = _coverage(points - (left, top), size)
        to_tile = move(TILE / 2, TILE / 2) @ stretch(TEXTURE_DENSITY, TEXTURE_DENSITY)
        to_texture = to_tile @ np.linalg.inv(piece.placement) @ move(float(left), float(top))
        colour = warp(piece.texture, to_texture, size) * _relief(cover)[..., None]
        image, share = self.image[box], self._share[box]
        image += cover[..., None] * (colour - image)
        share *= 1 - cover
        self.indices[box][cover > share] = piece.index
        np.maximum(share, cover, out=share)

    def picture(self) -> UInt8[np.ndarray, "height width 3"]:
        """Return the picture as 8-bit RGB."""
        return np.asarray(np.clip(self.image * 255 + 0.5, 0, 255), dtype=np.uint8)


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


def _coverage(points: Outline, size: tuple[int, int]) -> Float32[np.ndarray, "height width"]:
    """Return the share that lies inside the outline of each of `size` (width, height) pixels."""
    fine = np.zeros((size[1] * FINENESS, size[0] * FINENESS), np.uint8)
    cv2.fillPoly(fine, [np.round((points * FINENESS - 0.5) * 16).astype(np.int32)], 255, shift=4)
    return cv2.resize(fine, size, interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _relief(cover: Float32[np.ndarray, "height width"]) -> Float32[np.ndarray, "height width"]:
    """Darken towards the rim, so that pieces look round and stand out from each other."""
    reach = max(3, min(cover.shape) // 5)
    padded = cv2.copyMakeBorder(cover, reach, reach, reach, reach, cv2.BORDER_CONSTANT, value=0)
    depth = cv2.blur(padded, (reach, reach))[reach:-reach, reach:-reach]
    return 0.45 + 0.6 * depth


#: VIP's classes (PROTOCOLS 3.1) of the figure's pieces.
HAIR, SHIRT, PANTS, FACE = 2, 4, 8, 13
RIGHT_ARM, LEFT_ARM, RIGHT_LEG, LEFT_LEG, RIGHT_SHOE, LEFT_SHOE = 14, 15, 16, 17, 18, 19

_WHITE, _BLACK = plain((0.97, 0.97, 0.95)), plain((0.05, 0.05, 0.08))

Joints = Float[np.ndarray, "joint 2"]


@dataclass(frozen=True, slots=True, eq=False)
class Pose:
    """A creature at one phase: pieces from back to front, and the joints if it has any (JHMDB's order)."""

    pieces: tuple[Piece, ...]
    joints: Joints | None = None


Creature = Callable[[float], Pose]


@dataclass(frozen=True, slots=True)
class Kind:
    """How a kind of creature is made and moves.

    `size` of its unit and `level` of its home (0 is the top) are shares of the frame's height; `spins` says
    that it turns on its way, where others face ahead.
    """

    make: Callable[[Generator, float], Creature]
    size: float
    level: float
    spins: bool = False


def _ellipse(x: float, y: float, cx: float = 0.0, cy: float = 0.0) -> Outline:
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.stack([cx + x * np.cos(angle), cy + y * np.sin(angle)], axis=1)


def _limb(length: float, start: float, end: float) -> Outline:
    """Return a tapered limb from the origin downwards; `start` and `end` are its radii."""
    angle = np.concatenate([np.linspace(np.pi, 2 * np.pi, 12), np.linspace(0, np.pi, 12)])
    radius, base = np.repeat([start, end], 12), np.repeat([0.0, length], 12)
    return np.stack([radius * np.cos(angle), base + radius * np.sin(angle)], axis=1)


def _points(*points: tuple[float, float]) -> Outline:
    return np.array(points, dtype=np.float64)


def _star(n_rays: int, inner: float) -> Outline:
    angle = np.arange(2 * n_rays) * np.pi / n_rays
    radius = np.where(np.arange(2 * n_rays) % 2, inner, 1.0)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


def _eye(x: float, y: float, size: float) -> tuple[Piece, ...]:
    return (
        Piece(_ellipse(size, size, x, y), np.eye(3), _WHITE),
        Piece(_ellipse(size / 2, size / 2, x + size / 3, y), np.eye(3), _BLACK),
    )


def _make_ball(rng: Generator, hue: float) -> Creature:
    ball = Piece(_ellipse(1.0, 1.0), np.eye(3), sprite_texture(rng, hue))
    patch = Piece(_ellipse(0.45, 0.45), np.eye(3), sprite_texture(rng, hue + 0.5))
    return lambda _: Pose((ball, patch))


def _make_star(rng: Generator, hue: float) -> Creature:
    n_rays = int(rng.integers(5, 8))
    star = Piece(_star(n_rays, rng.uniform(0.45, 0.6)), np.eye(3), sprite_texture(rng, hue))
    middle = Piece(_ellipse(0.3, 0.3), np.eye(3), sprite_texture(rng, hue + 0.35))
    return lambda _: Pose((star, middle))


def _make_fish(rng: Generator, hue: float) -> Creature:
    scales, fins = sprite_texture(rng, hue), sprite_texture(rng, hue + 0.15)
    tail = _points((0.05, -0.08), (-0.55, -0.5), (-0.42, 0.0), (-0.55, 0.5), (0.05, 0.08))
    top_fin = _points((-0.35, -0.4), (-0.2, -0.85), (0.4, -0.4))
    side_fin = _ellipse(0.3, 0.14, -0.25, 0.0)

    def pose(phase: float) -> Pose:
        wag = 0.45 * np.sin(phase)
        return Pose(
            (
                Piece(tail, move(-0.9, 0.0) @ turn(wag), fins),
                Piece(top_fin, np.eye(3), fins),
                Piece(_ellipse(1.1, 0.56), np.eye(3), scales),
                Piece(side_fin, move(0.15, 0.15) @ turn(0.3 + 0.5 * wag), fins),
                *_eye(0.7, -0.14, 0.13),
            )
        )

    return pose


def _make_bird(rng: Generator, hue: float) -> Creature:
    plumage, wings = sprite_texture(rng, hue), sprite_texture(rng, hue + 0.12)
    beak = plain((0.95, 0.65, 0.1))
    wing = _points((-0.35, 0.05), (-0.6, -0.7), (-0.3, -1.15), (0.1, -0.75), (0.3, 0.05))

    def pose(phase: float) -> Pose:
        beat = np.sin(phase)
        return Pose(
            (
                Piece(wing, move(0.1, -0.05) @ stretch(0.9, 0.25 + 0.7 * beat), wings),
                Piece(_points((-0.7, -0.1), (-1.3, -0.32), (-1.25, 0.22)), np.eye(3), wings),
                Piece(_points((1.0, -0.35), (1.42, -0.2), (1.0, -0.1)), np.eye(3), beak),
                Piece(_ellipse(0.9, 0.4), turn(-0.12), plumage),
                Piece(_ellipse(0.33, 0.31, 0.8, -0.24), np.eye(3), plumage),
                *_eye(0.88, -0.3, 0.09),
                Piece(wing, move(-0.08, 0.0) @ stretch(1.0, 0.25 + 0.8 * beat), wings),
            )
        )

    return pose


def _make_car(rng: Generator, hue: float) -> Creature:
    paint, hub = sprite_texture(rng, hue), sprite_texture(rng, hue + 0.5)
    tyre, glass = plain((0.12, 0.12, 0.14)), plain((0.62, 0.78, 0.86))
    body = _points((-1.4, 0.1), (-1.25, -0.2), (1.1, -0.2), (1.42, 0.05), (1.42, 0.42), (-1.4, 0.42))
    cabin = _points((-0.85, -0.15), (-0.6, -0.65), (0.35, -0.65), (0.75, -0.15))
    window = _points((-0.62, -0.22), (-0.48, -0.55), (0.25, -0.55), (0.5, -0.22))

    def wheel(x: float, phase: float) -> tuple[Piece, ...]:
        place = move(x, 0.45) @ turn(phase)
        return Piece(_ellipse(0.3, 0.3), place, tyre), Piece(_star(5, 0.5) * 0.24, place, hub)

    def pose(phase: float) -> Pose:
        return Pose(
            (
                Piece(cabin, np.eye(3), paint),
                Piece(window, np.eye(3), glass),
                Piece(body, np.eye(3), paint),
                *wheel(-0.8, phase),
                *wheel(0.85, phase),
            )
        )

    return pose


def _make_figure(rng: Generator, hue: float) -> Creature:
    tone = rng.uniform(0.45, 0.95)
    wear = {
        "skin": plain((tone, tone * 0.76, tone * 0.6)),
        "hair": sprite_texture(rng, rng.uniform(0, 0.12)),
        "shirt": sprite_texture(rng, hue),
        "pants": sprite_texture(rng, hue + 0.4),
        "legs": sprite_texture(rng, hue + 0.55),
        "shoes": sprite_texture(rng, hue + 0.8),
    }
    return lambda phase: _figure_pose(phase, wear)


def _figure_pose(phase: float, wear: dict[str, Tile]) -> Pose:
    right_arm, right_leg, right = _side(0.1, phase, wear, (RIGHT_ARM, RIGHT_LEG, RIGHT_SHOE))
    left_arm, left_leg, left = _side(-0.1, phase + np.pi, wear, (LEFT_ARM, LEFT_LEG, LEFT_SHOE))
    trunk = _points((-0.3, -0.72), (0.3, -0.72), (0.27, -0.2), (0.24, 0.12), (-0.24, 0.12), (-0.27, -0.2))
    seat = _points((-0.25, 0.02), (0.25, 0.02), (0.27, 0.36), (-0.27, 0.36))
    hair = transform(turn(-0.3), _ellipse(0.31, 0.3, -0.03, -0.09))
    head = move(0.0, -1.06)
    pieces = (
        *left_arm,
        *left_leg,
        *right_leg,
        Piece(seat, np.eye(3), wear["pants"], PANTS),
        Piece(_limb(0.2, 0.1, 0.1), move(0.0, -0.88), wear["skin"], FACE),
        Piece(trunk, np.eye(3), wear["shirt"], SHIRT),
        Piece(hair, head, wear["hair"], HAIR),
        Piece(_ellipse(0.24, 0.27, 0.06, 0.03), head, wear["skin"], FACE),
        Piece(_ellipse(0.04, 0.06, 0.17, -0.02), head, _BLACK, FACE),
        *right_arm,
    )
    # Neck, belly, face; then right and left of shoulder, hip, elbow, knee, wrist, ankle (PROTOCOLS 2.1).
    middle = _points((0.0, -0.74), (0.0, -0.15), (0.05, -1.04))
    pairs = [joint for pair in zip(right, left, strict=True) for joint in pair]
    return Pose(pieces, np.stack([*middle, *pairs]))


def _side(
    offset: float, phase: float, wear: dict[str, Tile], classes: tuple[int, int, int]
) -> tuple[tuple[Piece, ...], tuple[Piece, ...], list[Float[np.ndarray, "2"]]]:
    """Return the pieces of an arm and of a leg, and shoulder, hip, elbow, knee, wrist, ankle."""
    swing = np.sin(phase)
    shoulder = move(2.2 * offset, -0.62) @ turn(-0.65 * swing - 0.8 * offset)
    elbow = shoulder @ move(0.0, 0.46) @ turn(-0.45 - 0.25 * swing)
    hip = move(1.2 * offset, 0.26) @ turn(0.55 * swing)
    knee = hip @ move(0.0, 0.55) @ turn(0.1 + 0.7 * max(0.0, -np.cos(phase - 0.4)))
    ankle = knee @ move(0.0, 0.52)
    arm_class, leg_class, shoe_class = classes
    arm = (
        Piece(_limb(0.46, 0.13, 0.11), shoulder, wear["shirt"], arm_class),
        Piece(_limb(0.42, 0.1, 0.08), elbow, wear["skin"], arm_class),
    )
    leg = (
        Piece(_limb(0.55, 0.17, 0.13), hip, wear["legs"], leg_class),
        Piece(_limb(0.5, 0.125, 0.09), knee, wear["legs"], leg_class),
        Piece(_ellipse(0.2, 0.095, 0.09, 0.06), ankle, wear["shoes"], shoe_class),
    )
    places = (shoulder, hip, elbow, knee, elbow @ move(0.0, 0.42), ankle)
    return arm, leg, [place[:2, 2] for place in places]


#: Who can appear in a clip.
KINDS = {
    "figure": Kind(_make_figure, size=0.24, level=0.5),
    "ball": Kind(_make_ball, size=0.15, level=0.6, spins=True),
    "star": Kind(_make_star, size=0.2, level=0.4, spins=True),
    "fish": Kind(_make_fish, size=0.2, level=0.55),
    "bird": Kind(_make_bird, size=0.18, level=0.35),
    "car": Kind(_make_car, size=0.2, level=0.68),
}
