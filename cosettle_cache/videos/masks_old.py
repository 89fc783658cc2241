"""Anybody's own clips with a first mask: `CLIP.mp4` or a folder `CLIP` of frames, and `CLIP.png` beside it.

In comes a folder of such clips, or one clip and its mask; out goes a manifest whose rows are annotated in the
first frame. Nothing else need be known to propagate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cosettle_cache.core.errors import MediaError
from cosettle_cache.core.types import LabelKind, Video
from cosettle_cache.videos.build import (
    BuildResult,
    Clip,
    Source,
    build,
    choose,
    entries,
    is_video_file,
    name_clips,
    path_in,
)
from cosettle_cache.videos.davis import open_sequence


def build_masks_manifest(
    root: Path, data_root: Path, split: str = "", names: Sequence[str] = (), mask: Path | None = None
) -> BuildResult:
    """Return the clips directly in `root`, each with its mask; a clip without one is a named failure.

    Where `root` is itself a clip (a folder of images), it is the only one, and its mask is `mask` or the
    PNG file beside it. `mask` lies under the data root.
    """
    found = list(_find(root))
    parent = root.parent if found == [root] else root
    clips = choose(list(name_clips(found, parent)), names, parent)
    source = Source("masks", split, parent, data_root)
    return build(clips, source, lambda clip: _masked_clip(clip, mask or _beside(clip.path), source))


def _find(root: Path) -> Iterator[Path]:
    media = [path for path in entries(root) if path.is_dir() or is_video_file(path)]
    yield from media or [root]


def _beside(path: Path) -> Path:
    return path.parent / f"{path.stem if is_video_file(path) else path.name}.png"


def _masked_clip(clip: Clip, mask: Path, source: Source) -> Video:
    video = source.video(clip)
    if not mask.is_file():
        raise MediaError(
            f"{clip.video_id} has no first mask",
            wanted=f"{mask.name} beside it, of the frames' size",
            hint="save object numbers (0 for the background) as a palette or grey PNG",
        )
    labels = path_in(mask, source.data_root).as_posix()
    video = replace(video, labels=labels, label_kind=LabelKind.MASKS)
    sequence = open_sequence(video, source.data_root)
    return replace(video, n_objects=sequence.n_objects, labelled_frames=1)
