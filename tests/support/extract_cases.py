"""Tiny real clips for the tests of extraction, and what a finished store holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cosettle_cache.core.types import Encoding, Manifest
from cosettle_cache.extraction.images import Views
from cosettle_cache.videos import build_manifest


def make_clips(root: Path, n_clips: int, n_frames: int = 9) -> Path:
    """Draw short clips of smooth moving texture; the fourth is portrait."""
    for clip in range(n_clips):
        height, width = (72, 96) if clip != 3 else (96, 72)
        rows, cols = np.mgrid[:height, :width]
        (root / f"clip{clip}").mkdir(parents=True)
        for frame in range(n_frames):
            phase = 0.13 * (cols + 2 * frame) + 0.07 * rows * (clip + 1)
            image = np.stack([128 + 100 * np.sin(phase + k) for k in range(3)], -1).astype(np.uint8)
            Image.fromarray(image).save(root / f"clip{clip}" / f"{frame}.jpg", quality=95)
    return root


def prepared(views: Views, image: np.ndarray, encoding: Encoding) -> torch.Tensor:
    """The view of one encoding of a frame."""
    view = torch.empty(3, views.height, views.width)
    views.write(views.resize(image), {(encoding.crop, encoding.flip): view})
    return view


def manifest_of(root: Path) -> Manifest:
    return build_manifest("folder", root, root).manifest


def tree(path: Path) -> dict[str, bytes]:
    """All files of a store that hold tokens or index, by name."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
