"""A plain folder of clips, at any depth: video files and folders of frames.

In comes the folder, out goes a manifest; nothing is known about the clips but what they hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cosettle_cache.videos.build import (
    BuildResult,
    Source,
    build,
    choose,
    entries,
    is_video_file,
    name_clips,
)


def build_folder_manifest(
    root: Path, data_root: Path, split: str = "", names: Sequence[str] = ()
) -> BuildResult:
    """Return every clip under `root` in natural order, or those of `names` in theirs.

    A clip is a video file, or a folder that holds neither folders nor video files: its images are the frames,
    and without images it counts as a failure. Images beside clips (a contact sheet, say) are no clip.
    """
    clips = choose(list(name_clips(find_media(root), root)), names, root)
    return build(clips, Source("folder", split, root, data_root))


def find_media(folder: Path) -> Iterator[Path]:
    """Yield the video files and the folders of images at any depth, in natural order."""
    nested = [path for path in entries(folder) if path.is_dir() or is_video_file(path)]
    if not nested:
        yield folder
    for path in nested:
        if path.is_dir():
            yield from find_media(path)
        else:
            yield path
