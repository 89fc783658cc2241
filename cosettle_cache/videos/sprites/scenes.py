"""Scenes: who moves where over which background, drawn from a seed, and each frame with its exact labels.

In come a cast and a seed; out come frames: picture, objects, parts and joints, all in agreement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from numpy.random import Generator, default_rng

from cosettle_cache.videos.masks import Mask
from cosettle_cache.videos.sprites.figures import (
    KINDS,
    Canvas,
    Creature,
    Joints,
    Kind,
    Placement,
    Pose,
    background_texture,
    move,
    stretch,
    transform,
    turn,
    warp,
)

#: Every object shows at least this share of the frame's pixels at the start, and of its own.
MIN_SHARE_OF_FRAME, MIN_SHARE_OF_OBJECT = 0.006, 0.5
#: The background texture is larger than the frame by this factor, so that it can drift.
BACKGROUND_MARGIN = 1.5
#: Share of the actors that head for the rim they go towards, so that they leave the frame in part.
LEAVING = 0.3
_MAX_DRAWS = 200

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One frame: RGB, object and part index of every pixel, and the joints of the (topmost) figure.

    `joints` are (x, y) in pixels, the first pixel's centre 0; `visible` where the figure shows there.
    """

    image: UInt8[np.ndarray, "height width 3"]
    objects: Mask
    parts: Mask
    joints: Joints | None
    visible: Bool[np.ndarray, " joint"] | None


@dataclass(frozen=True, slots=True, eq=False)
class Actor:
    """A creature and its way across the clip; places are shares of the frame's width and height.

    `sizes` are pixels per unit, `turns` radians per clip, `beats` the phases per clip, `bob` a share of the
    height by which the way swings up and down.
    """

    creature: Creature
    start: Point
    end: Point
    sizes: tuple[float, float]
    tilt: float
    turns: float
    beats: float
    bob: float
    phase: float

    def placement(self, moment: float, height: int, width: int) -> Placement:
        """Return where the creature lies at `moment` (0 start, 1 end of the clip), in pixels."""
        x, y = (a + (b - a) * moment for a, b in zip(self.start, self.end, strict=True))
        y += self.bob * np.sin(2 * np.pi * moment + self.phase)
        size = float(np.interp(moment, (0, 1), self.sizes))
        facing = 1.0 if self.turns or self.end[0] >= self.start[0] else -1.0
        angle = self.tilt * np.sin(2 * np.pi * moment + self.phase) + self.turns * moment
        placement: Placement = move(x * width, y * height) @ turn(angle) @ stretch(facing * size, size)
        return placement

    def pose(self, moment: float) -> Pose:
        """Return how the creature stands at `moment`."""
        return self.creature(self.phase + 2 * np.pi * self.beats * moment)


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A background that drifts and actors from back to front; `objects` are their indices in the masks."""

    height: int
    width: int
    background: Float32[np.ndarray, "_ _ 3"]
    drift: Point
    zoom: float
    roll: float
    actors: tuple[Actor, ...] = ()
    objects: tuple[int, ...] = ()


def draw_scene(cast: Sequence[str], seed: Sequence[int], height: int, width: int) -> Scene:
    """Return a scene of `cast` (of `KINDS`), each well visible at first; equal seeds give equal scenes."""
    rng = default_rng(list(seed))
    scene = _draw_background(rng, height, width)
    # Hues are as far apart as their number allows.
    hues = rng.uniform() + rng.permutation(len(cast)) / len(cast)
    kinds = [KINDS[name] for name in cast]
    creatures = [kind.make(rng, float(hue)) for kind, hue in zip(kinds, hues, strict=True)]
    for _ in range(_MAX_DRAWS):
        order = rng.permutation(len(cast))
        ways = _draw_ways(len(cast), rng)
        actors = [_draw_actor(kinds[i], creatures[i], rng, ways[i], height) for i in range(len(cast))]
        objects = tuple(int(i) + 1 for i in order)
        scene = replace(scene, actors=tuple(actors[i] for i in order), objects=objects)
        if _starts_well(scene):
            return scene
    raise AssertionError(f"no scene of {cast} fits into {height}x{width}")


def render(scene: Scene, moment: float) -> Frame:
    """Return the frame at `moment`, from 0 (first frame) to 1 (last)."""
    look, size = background_look(scene, moment), (scene.width, scene.height)
    canvas = Canvas(warp(scene.background, look, size))
    # Piece 0 is the background; `owner` and `part` say what the later ones belong to.
    owner, part = [0], [0]
    joints: Joints | None = None
    figure = 0
    for object_id, placement, pose in poses(scene, moment):
        for piece in pose.pieces:
            canvas.paint(replace(piece, placement=placement @ piece.placement, index=len(owner)))
            owner.append(object_id)
            part.append(piece.index)
        if pose.joints is not None:
            joints, figure = transform(placement, pose.joints) - 0.5, object_id
    objects = np.array(owner, np.uint8)[canvas.indices]
    parts = np.array(part, np.uint8)[canvas.indices]
    visible = None if joints is None else _shows(objects, joints, figure)
    return Frame(canvas.picture(), objects, parts, joints, visible)


def poses(scene: Scene, moment: float) -> Iterator[tuple[int, Placement, Pose]]:
    """Yield every actor's object index, place and pose from back to front, its pieces in one order always."""
    for actor, object_id in zip(scene.actors, scene.objects, strict=True):
        yield object_id, actor.placement(moment, scene.height, scene.width), actor.pose(moment)


def _shows(objects: Mask, joints: Joints, figure: int) -> Bool[np.ndarray, " joint"]:
    col, row = np.round(joints).astype(int).T
    height, width = objects.shape
    inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
    there = objects[np.clip(row, 0, height - 1), np.clip(col, 0, width - 1)]
    return np.asarray(inside & (there == figure))


def background_look(scene: Scene, moment: float) -> Placement:
    """Return the map from the frame's pixels to those of the background's texture."""
    height, width = scene.height, scene.width
    zoom = scene.zoom**moment
    shift = move(scene.drift[0] * width * moment, scene.drift[1] * height * moment)
    centre = move(*(side / 2 for side in scene.background.shape[1::-1]))
    look: Placement = centre @ shift @ turn(scene.roll * moment) @ stretch(zoom, zoom)
    return np.asarray(look @ move(-width / 2, -height / 2))


def _draw_background(rng: Generator, height: int, width: int) -> Scene:
    margin = [int(side * BACKGROUND_MARGIN) for side in (height, width)]
    return Scene(
        height,
        width,
        background_texture(rng, rng.uniform(0.03, 0.66), *margin),
        drift=(rng.uniform(-0.12, 0.12), rng.uniform(-0.05, 0.05)),
        zoom=rng.uniform(0.93, 1.07),
        roll=rng.uniform(-0.06, 0.06),
    )


def _draw_ways(n_actors: int, rng: Generator) -> list[Point]:
    """Return a first and a last x for every actor; they trade places, so that their ways cross."""
    places = [0.25, 0.75] if n_actors == 1 else list((np.arange(n_actors) + 0.5) / n_actors)
    step = int(rng.integers(1, len(places)))
    first = rng.permutation(len(places))[:n_actors]
    return [(places[i], places[(i + step) % len(places)]) for i in first]


def _draw_actor(kind: Kind, creature: Creature, rng: Generator, way: Point, height: int) -> Actor:
    start, end = way
    size = kind.size * height * rng.uniform(0.85, 1.15)
    level = kind.level + rng.uniform(-0.1, 0.1)
    if rng.random() < LEAVING:
        end = float(end > start)
    return Actor(
        creature,
        start=(start + rng.uniform(-0.04, 0.04), level),
        end=(end + rng.uniform(-0.06, 0.06), level + rng.uniform(-0.08, 0.08)),
        sizes=(size, size * rng.uniform(0.85, 1.2)),
        tilt=rng.uniform(0.0, 0.08),
        turns=float(np.sign(end - start) * rng.uniform(1.5, 4.0)) if kind.spins else 0.0,
        beats=rng.uniform(1.5, 2.5),
        bob=rng.uniform(0.0, 0.04),
        phase=rng.uniform(0, 2 * np.pi),
    )


def _starts_well(scene: Scene) -> bool:
    first = render(scene, 0.0)
    shown = np.bincount(first.objects.ravel(), minlength=len(scene.objects) + 1)[1:]
    if int(shown.min()) < MIN_SHARE_OF_FRAME * first.objects.size:
        return False
    if first.visible is not None and first.visible.mean() < 0.8:
        return False
    for actor, object_id in zip(scene.actors, scene.objects, strict=True):
        # What the actor would cover at the start, were it alone in a frame without end.
        lone = replace(actor, start=(0.5, 0.5), end=(0.5, 0.5), bob=0.0)
        alone = render(replace(scene, actors=(lone,), objects=(1,)), 0.0).objects
        if shown[object_id - 1] < MIN_SHARE_OF_OBJECT * int(np.count_nonzero(alone)):
            return False
    return True
