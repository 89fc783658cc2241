"""Dataset folders: which layout holds which videos and labels where.

In comes a folder in a public layout, out goes a manifest of it and, for evaluation, the labels of its videos.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cosettle_cache.core.errors import UsageError
from cosettle_cache.videos.build import BuildResult
from cosettle_cache.videos.davis import (
    DavisSequence,
    build_davis_manifest,
    build_masks_manifest,
    open_sequence,
)
from cosettle_cache.videos.folders import (
    build_classes_manifest,
    build_folder_manifest,
    build_hmdb51_manifest,
    build_kinetics_manifest,
    build_ucf101_manifest,
)
from cosettle_cache.videos.jhmdb import JointSequence, build_jhmdb_manifest, open_joints
from cosettle_cache.videos.sprites import build_sprites_manifest
from cosettle_cache.videos.tapvid import build_tapvid_manifest
from cosettle_cache.videos.vip import PartSequence, build_vip_manifest, open_parts

__all__ = [
    "BUILDERS",
    "BuildResult",
    "DavisSequence",
    "JointSequence",
    "PartSequence",
    "build_manifest",
    "open_joints",
    "open_parts",
    "open_sequence",
]

BUILDERS: dict[str, Callable[..., BuildResult]] = {
    "davis": build_davis_manifest,
    "vip": build_vip_manifest,
    "jhmdb": build_jhmdb_manifest,
    "masks": build_masks_manifest,
    "kinetics": build_kinetics_manifest,
    "classes": build_classes_manifest,
    "ucf101": build_ucf101_manifest,
    "hmdb51": build_hmdb51_manifest,
    "folder": build_folder_manifest,
    "sprites": build_sprites_manifest,
    "tapvid": build_tapvid_manifest,
}


def build_manifest(name: str, root: Path, data_root: Path, **options: Any) -> BuildResult:
    """Return the manifest of the folder `root` in the layout `name`, and the reasons of what was left out.

    Media paths are relative to `data_root`. `options` are the layout's own; all have `split`, and `names` to
    restrict and order the clips. Raises
    `UsageError` for an unknown layout and `InputError` for a folder without a usable clip.
    """
    if name not in BUILDERS:
        raise UsageError(f"there is no dataset layout {name}", wanted=" ".join(BUILDERS), found=name)
    return BUILDERS[name](root, data_root, **options)
