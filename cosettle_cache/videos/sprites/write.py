"""Sprites clips on disk in the public layouts: DAVIS masks, VIP's part classes, JHMDB's joints.

In come the settings, out goes a folder like any data root; clips with a figure have parts and joints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from cosettle_cache.core.settings import SpritesSettings
from cosettle_cache.videos.masks import Mask, write_mask
from cosettle_cache.videos.sprites.scenes import draw_scene, render

FIGURE = "figure"
_PARTS = "Annotations/Category_ids"
_JOINTS = "joint_positions/walk"
_JOINTS_FILE = "joint_positions.mat"
#: Who appears in each clip, by split; more clips than casts begin again with other seeds.
CASTS = {
    "train": (
        *("figure ball", "fish bird", "car star", "figure bird fish", "ball", "fish fish star", "figure car"),
        *("bird star ball", "figure figure", "car bird fish ball", "star fish", "figure ball bird star"),
    ),
    "val": ("figure", "figure ball", "fish bird star", "car figure ball bird"),
}


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """One clip to draw; `name` is its folder in every layout."""

    name: str
    cast: tuple[str, ...]
    seed: tuple[int, int, int]
    n_frames: int

    @property
    def moments(self) -> list[float]:
        """When each frame is, from 0 (first) to 1 (last)."""
        return [index / max(self.n_frames - 1, 1) for index in range(self.n_frames)]


def write_sprites(root: Path, settings: SpritesSettings) -> None:
    """Draw every clip of `settings` into the new folder `root`; equal settings give equal pixels."""
    for split in CASTS:
        plans = plan_split(split, settings)
        _write_lines(root / "ImageSets" / "2017" / f"{split}.txt", [plan.name for plan in plans])
        # The lists of the part and pose benchmarks: pairs of paths, relative to the data root.
        parts, joints = [], []
        for plan in plans:
            images = f"JPEGImages/{settings.resolution}/{plan.name}"
            if FIGURE in plan.cast:
                parts.append(f"{images} {_PARTS}/{plan.name}")
            if plan.cast.count(FIGURE) == 1:
                joints.append(f"{_JOINTS}/{plan.name}/{_JOINTS_FILE} {images}")
        _write_lines(root / "lists" / f"vip_{split}list.txt", parts)
        _write_lines(root / "lists" / f"jhmdb_{split}list.txt", joints)
        for plan in plans:
            _write_clip(root, plan, settings)


def plan_split(split: str, settings: SpritesSettings) -> list[ClipPlan]:
    """Return the clips of one split in order."""
    number, n_clips, n_frames = {
        "train": (0, settings.n_train, settings.train_frames),
        "val": (1, settings.n_val, settings.val_frames),
    }[split]
    casts = [tuple(cast.split()) for cast in CASTS[split]]
    return [
        ClipPlan(f"{split}{index:02d}-{'-'.join(cast)}", cast, (settings.seed, number, index), n_frames)
        for index, cast in zip(range(n_clips), cycle(casts), strict=False)
    ]


def _write_clip(root: Path, plan: ClipPlan, settings: SpritesSettings) -> None:
    scene = draw_scene(plan.cast, plan.seed, settings.height, settings.width)
    frames = [render(scene, moment) for moment in plan.moments]
    images = _new_folder(root / "JPEGImages" / settings.resolution / plan.name)
    for index, frame in enumerate(frames):
        Image.fromarray(frame.image).save(images / f"{index:05d}.jpg", quality=settings.jpeg_quality)
    _write_masks(root / "Annotations" / settings.resolution / plan.name, [f.objects for f in frames])
    if FIGURE in plan.cast:
        _write_masks(root / _PARTS / plan.name, [frame.parts for frame in frames])
    # JHMDB's files hold one person's joints: `pos_img` `[2 joint frame]`, (x, y) in pixels counted from 1.
    if plan.cast.count(FIGURE) == 1:
        joints = np.stack([frame.joints for frame in frames if frame.joints is not None])
        visible = np.stack([frame.visible for frame in frames if frame.visible is not None])
        content = {"pos_img": joints.transpose(2, 1, 0) + 1, "visible": visible.T.astype(np.uint8)}
        savemat(_new_folder(root / _JOINTS / plan.name) / _JOINTS_FILE, content)


def _write_masks(folder: Path, masks: Sequence[Mask]) -> None:
    _new_folder(folder)
    for index, mask in enumerate(masks):
        write_mask(folder / f"{index:05d}.png", mask)


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    _new_folder(path.parent)
    path.write_text("".join(f"{line}\n" for line in lines))


def _new_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
