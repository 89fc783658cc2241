"""The cast of the sprites clips: each creature is a list of textured pieces that move with a phase.

Units are the creature's own: about one from its middle to its side; x to the right, y down, facing right.
The figure is articulated and bears the part classes of VIP and the joints of JHMDB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.random import Generator

from cosettle_cache.videos.sprites.drawing import (
    Outline,
    Piece,
    move,
    stretch,
    transform,
    turn,
)
from cosettle_cache.videos.sprites.textures import Tile, plain, sprite_texture

#: VIP's classes (PROTOCOLS 3.1) of the figure's pieces.
HAIR, SHIRT, PANTS, FACE = 2, 4, 8, 13
RIGHT_ARM, LEFT_ARM, RIGHT_LEG, LEFT_LEG, RIGHT_SHOE, LEFT_SHOE = 14, 15, 16, 17, 18, 19

_WHITE, _BLACK = plain((0.97, 0.97, 0.95)), plain((0.05, 0.05, 0.08))

Joint = Float[np.ndarray, "2"]
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
    upper, lower = np.linspace(np.pi, 2 * np.pi, 12), np.linspace(0, np.pi, 12)
    top = np.stack([start * np.cos(upper), start * np.sin(upper)], axis=1)
    bottom = np.stack([end * np.cos(lower), length + end * np.sin(lower)], axis=1)
    return np.concatenate([top, bottom])


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
    skin = sprite_texture(rng, hue)
    patch = sprite_texture(rng, hue + 0.5)
    ball = Piece(_ellipse(1.0, 1.0), np.eye(3), skin)
    return lambda _: Pose((ball, Piece(_ellipse(0.45, 0.45), np.eye(3), patch)))


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


@dataclass(frozen=True, slots=True, eq=False)
class _Wardrobe:
    skin: Tile
    hair: Tile
    shirt: Tile
    pants: Tile
    legs: Tile
    shoes: Tile


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """One arm and one leg: their pieces, and the joints shoulder, elbow, wrist, hip, knee, ankle."""

    arm: tuple[Piece, ...]
    leg: tuple[Piece, ...]
    joints: tuple[Joint, ...]


def _make_figure(rng: Generator, hue: float) -> Creature:
    tone = rng.uniform(0.45, 0.95)
    wardrobe = _Wardrobe(
        skin=plain((tone, tone * 0.76, tone * 0.6)),
        hair=sprite_texture(rng, rng.uniform(0, 0.12)),
        shirt=sprite_texture(rng, hue),
        pants=sprite_texture(rng, hue + 0.4),
        legs=sprite_texture(rng, hue + 0.55),
        shoes=sprite_texture(rng, hue + 0.8),
    )
    return lambda phase: _figure_pose(phase, wardrobe)


def _figure_pose(phase: float, wear: _Wardrobe) -> Pose:
    right = _side(0.1, phase, wear, (RIGHT_ARM, RIGHT_LEG, RIGHT_SHOE))
    left = _side(-0.1, phase + np.pi, wear, (LEFT_ARM, LEFT_LEG, LEFT_SHOE))
    trunk = _points((-0.3, -0.72), (0.3, -0.72), (0.27, -0.2), (0.24, 0.12), (-0.24, 0.12), (-0.27, -0.2))
    seat = _points((-0.25, 0.02), (0.25, 0.02), (0.27, 0.36), (-0.27, 0.36))
    hair = transform(turn(-0.3), _ellipse(0.31, 0.3, -0.03, -0.09))
    head = move(0.0, -1.06)
    pieces = (
        *left.arm,
        *left.leg,
        *right.leg,
        Piece(seat, np.eye(3), wear.pants, PANTS),
        Piece(_limb(0.2, 0.1, 0.1), move(0.0, -0.88), wear.skin, FACE),
        Piece(trunk, np.eye(3), wear.shirt, SHIRT),
        Piece(hair, head, wear.hair, HAIR),
        Piece(_ellipse(0.24, 0.27, 0.06, 0.03), head, wear.skin, FACE),
        Piece(_ellipse(0.04, 0.06, 0.17, -0.02), head, _BLACK, FACE),
        *right.arm,
    )
    pairs = [joint for pair in zip(right.joints, left.joints, strict=True) for joint in pair]
    middle = _points((0.0, -0.74), (0.0, -0.15), (0.05, -1.04))
    return Pose(pieces, _jhmdb_order(list(middle), pairs))


def _jhmdb_order(middle: list[Joint], pairs: list[Joint]) -> Joints:
    """Neck, belly, face; then right and left shoulder, hip, elbow, knee, wrist, ankle (PROTOCOLS 2.1)."""
    shoulders, elbows, wrists, hips, knees, ankles = (pairs[i : i + 2] for i in range(0, 12, 2))
    return np.stack([*middle, *shoulders, *hips, *elbows, *knees, *wrists, *ankles])


def _side(offset: float, phase: float, wear: _Wardrobe, classes: tuple[int, int, int]) -> _Side:
    swing = np.sin(phase)
    shoulder = move(2.2 * offset, -0.62) @ turn(-0.65 * swing - 0.8 * offset)
    elbow = shoulder @ move(0.0, 0.46) @ turn(-0.45 - 0.25 * swing)
    hip = move(1.2 * offset, 0.26) @ turn(0.55 * swing)
    knee = hip @ move(0.0, 0.55) @ turn(0.1 + 0.7 * max(0.0, -np.cos(phase - 0.4)))
    ankle = knee @ move(0.0, 0.52)
    arm_class, leg_class, shoe_class = classes
    arm = (
        Piece(_limb(0.46, 0.13, 0.11), shoulder, wear.shirt, arm_class),
        Piece(_limb(0.42, 0.1, 0.08), elbow, wear.skin, arm_class),
    )
    leg = (
        Piece(_limb(0.55, 0.17, 0.13), hip, wear.legs, leg_class),
        Piece(_limb(0.5, 0.125, 0.09), knee, wear.legs, leg_class),
        Piece(_ellipse(0.2, 0.095, 0.09, 0.06), ankle, wear.shoes, shoe_class),
    )
    places = (shoulder, elbow, elbow @ move(0.0, 0.42), hip, knee, ankle)
    return _Side(arm, leg, tuple(place[:2, 2] for place in places))


#: Who can appear in a clip.
KINDS = {
    "figure": Kind(_make_figure, size=0.24, level=0.5),
    "ball": Kind(_make_ball, size=0.15, level=0.6, spins=True),
    "star": Kind(_make_star, size=0.2, level=0.4, spins=True),
    "fish": Kind(_make_fish, size=0.2, level=0.55),
    "bird": Kind(_make_bird, size=0.18, level=0.35),
    "car": Kind(_make_car, size=0.2, level=0.68),
}
