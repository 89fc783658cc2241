"""The Kinetics layout: one folder per class, in it one folder of frames or one video file per clip.

In comes the folder of classes, out goes a manifest whose rows carry the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cosettle_cache.videos.build import (
    BuildResult,
    Clip,
    Source,
    build,
    choose,
    entries,
    is_video_file,
    name_clips,
    subfolders,
)


def build_kinetics_manifest(
    root: Path, data_root: Path, split: str = "", names: Sequence[str] = ()
) -> BuildResult:
    """Return the clips `class/video/*.jpg` and `class/video.mp4` in natural order or as `names`.

    `names` are ids (`class/video`) or videos alone. Without them a class folder without clips counts as a
    failure, so that a half-copied dataset shows.
    """
    clips = [clip for folder in subfolders(root) for clip in _kinetics_clips(folder, root)]
    return build(choose(clips, names, root), Source("kinetics", split, root, data_root))


def _kinetics_clips(folder: Path, root: Path) -> list[Clip]:
    media = [path for path in entries(folder) if path.is_dir() or is_video_file(path)]
    return list(name_clips(media or [folder], root, folder.name))
