"""Exact tracks of points on the sprites clips, from the scenes themselves: a point keeps to its piece.

In comes a clip's plan or row, out go positions and visibility in every frame, equal for equal settings.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Float64
from numpy.random import Generator, default_rng

from cosettle_cache.core.errors import InputError
from cosettle_cache.core.settings import SpritesSettings
from cosettle_cache.videos.masks import Mask
from cosettle_cache.videos.sprites.figures import Placement, transform
from cosettle_cache.videos.sprites.scenes import Scene, background_look, draw_scene, poses, render
from cosettle_cache.videos.sprites.write import CASTS, plan_split
from cosettle_cache.videos.tapvid import PointTracks

#: Points on each object, and on the background.
POINTS_PER_OBJECT = 12
#: A piece seen edge on, smaller than this by area, has no place for a point.
_LEAST_AREA = 1e-3
_MAX_DRAWS = 200
#: Number of the background among the pieces, and its index in the masks.
_BACKGROUND = 0
#: Added to a clip's seed, so that its points do not follow from the draws of its scene.
_SEED = 7


@dataclass(frozen=True, slots=True, eq=False)
class _Stage:
    """What lies where at one moment, from back to front; the background is the first and has no outline.

    `placements` map the pieces' own units to pixels, `outlines` are in pixels.
    """

    owners: list[int]
    placements: list[Placement]
    outlines: list[Float[np.ndarray, "_ 2"]]

    def covers(self, number: int, point: Float[np.ndarray, "2"]) -> bool:
        """Say whether the outline of piece `number` covers a point in pixels."""
        if number == _BACKGROUND:
            return True
        contour = self.outlines[number].astype(np.float32)
        return cv2.pointPolygonTest(contour, (float(point[0]), float(point[1])), False) >= 0

    def topmost(self, point: Float[np.ndarray, "2"]) -> int:
        """Return the piece that shows at a point."""
        return next(number for number in reversed(range(len(self.owners))) if self.covers(number, point))


#: A piece, and a place on it in the piece's own units.
_Anchor = tuple[int, Float64[np.ndarray, "1 2"]]


def sprites_tracks(name: str, settings: SpritesSettings) -> PointTracks:
    """Return the tracks of the clip called `name`: some points on every object and on the background.

    Half of them are chosen among what shows in the first frame, half in any frame. A point is visible while
    it lies in the image and no other piece, of its own creature or of another, covers it.
    """
    plans = {plan.name: plan for split in CASTS for plan in plan_split(split, settings)}
    if name not in plans:
        raise InputError(f"no sprites clip is called {name}", found=", ".join(plans))
    plan = plans[name]
    scene = draw_scene(plan.cast, plan.seed, settings.height, settings.width)
    return scene_tracks(scene, plan.moments, default_rng([*plan.seed, _SEED]))


def scene_tracks(
    scene: Scene, moments: list[float], rng: Generator, n_points: int = POINTS_PER_OBJECT
) -> PointTracks:
    """Return the tracks of `n_points` points on every object of a scene, and as many on its background."""
    stages = [_stage(scene, moment) for moment in moments]
    shown = [render(scene, moment).objects for moment in moments]
    anchors: list[_Anchor] = []
    for owner in (_BACKGROUND, *sorted(scene.objects)):
        for number in range(n_points):
            frame = 0 if number < n_points // 2 else int(rng.integers(len(moments)))
            # Everything shows in the first frame; later it may have left.
            tries = (_draw_anchor(shown[at], stages[at], owner, rng) for at in (frame, 0))
            anchors.append(next(anchor for anchor in tries if anchor is not None))
    places = [[transform(stage.placements[piece], place)[0] for stage in stages] for piece, place in anchors]
    points = np.array(places)
    inside = ((points >= 0) & (points < (scene.width, scene.height))).all(axis=-1)
    on_top = [
        [stage.topmost(point) == piece for stage, point in zip(stages, track, strict=True)]
        for (piece, _), track in zip(anchors, points, strict=True)
    ]
    return PointTracks(points, inside & np.array(on_top))


def _stage(scene: Scene, moment: float) -> _Stage:
    stage = _Stage([_BACKGROUND], [np.linalg.inv(background_look(scene, moment))], [np.zeros((0, 2))])
    for object_id, placement, pose in poses(scene, moment):
        for piece in pose.pieces:
            stage.owners.append(object_id)
            stage.placements.append(placement @ piece.placement)
            stage.outlines.append(transform(stage.placements[-1], piece.outline))
    return stage


def _draw_anchor(shown: Mask, stage: _Stage, owner: int, rng: Generator) -> _Anchor | None:
    """Return a random place of `owner` that shows; None where hardly anything of it does."""
    row, col = np.nonzero(shown == owner)
    for _ in range(_MAX_DRAWS if len(row) else 0):
        pick = int(rng.integers(len(row)))
        point = np.array([col[pick], row[pick]]) + rng.uniform(size=2)
        number = stage.topmost(point)
        placement = stage.placements[number]
        # At a soft rim the pixel is one piece's and the point another's.
        if stage.owners[number] == owner and abs(np.linalg.det(placement)) > _LEAST_AREA:
            return number, transform(np.linalg.inv(placement), point[None])
    return None
