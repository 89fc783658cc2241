"""Object masks: the DAVIS layout, and anybody's own clips with a first mask.

In comes a folder `JPEGImages/480p/NAME/00000.jpg`, `Annotations/480p/NAME/00000.png` with lists of names, or
one of `CLIP.mp4` (or a folder `CLIP` of frames) with `CLIP.png` beside it; out go a manifest, and a
sequence's masks as maps of object numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cosettle_cache.core.errors import InputError, MediaError, UsageError
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
    subfolders,
)
from cosettle_cache.videos.masks import PALETTE, VOID, Mask, MaskFiles, open_mask_files, read_mask, write_mask

__all__ = [
    "MIN_SCORED_FRAMES",
    "PALETTE",
    "VOID",
    "DavisSequence",
    "Mask",
    "build_davis_manifest",
    "open_sequence",
    "read_mask",
    "write_mask",
]

#: The resolution folder that is meant when several lie side by side.
USUAL_RESOLUTION = "480p"
#: The benchmark scores neither the first nor the last frame.
MIN_SCORED_FRAMES = 3


def build_davis_manifest(
    root: Path,
    data_root: Path,
    split: str = "val",
    names: Sequence[str] = (),
    resolution: str | None = None,
    dataset: str = "davis",
) -> BuildResult:
    """Return the sequences `names`, or those of `ImageSets/2017/SPLIT.txt`, or all where there are no lists.

    `root` holds `JPEGImages`; a sequence without a folder of annotations becomes a row without labels.
    """
    resolution = resolution or _only_resolution(root)
    frames, masks = root / "JPEGImages" / resolution, root / "Annotations" / resolution
    names = names or _listed_names(root, split)
    source = Source(dataset, split if names else "", root, data_root)
    names = names or [path.name for path in subfolders(frames)]
    return build([Clip(name, frames / name, labels=masks / name) for name in names], source)


def _only_resolution(root: Path) -> str:
    found = [path.name for path in subfolders(root / "JPEGImages")]
    if USUAL_RESOLUTION in found or len(found) == 1:
        return USUAL_RESOLUTION if USUAL_RESOLUTION in found else found[0]
    raise InputError(
        f"{root} has no single resolution folder",
        wanted=f"JPEGImages/{USUAL_RESOLUTION}, or one other",
        found=", ".join(found) or "none",
    )


def _listed_names(root: Path, split: str) -> list[str]:
    folder = root / "ImageSets" / "2017"
    lists = {path.stem: path for path in entries(folder) if path.suffix == ".txt"} if folder.is_dir() else {}
    if not lists:
        return []
    if split not in lists:
        raise UsageError(f"{root} has no split {split}", wanted=", ".join(lists), found=split)
    names = list(dict.fromkeys(lists[split].read_text().split()))
    if not names:
        raise InputError(f"{lists[split]} lists no sequences", wanted="one name per line")
    return names


@dataclass(frozen=True, slots=True)
class DavisSequence:
    """One video and its annotated objects: 1 to `n_objects`, the largest index of the first annotation."""

    files: MaskFiles
    n_objects: int

    @property
    def video(self) -> Video:
        """The manifest row."""
        return self.files.video

    @property
    def frame_names(self) -> tuple[str, ...]:
        """The frames' names without suffix; masks bear them."""
        return self.files.frame_names

    @property
    def labelled(self) -> frozenset[int]:
        """The frames (from 0 in the row's range) that have an annotation: all, or the first alone."""
        return self.files.labelled

    @property
    def scorable(self) -> bool:
        """Whether every frame is annotated and there are frames besides the first and the last."""
        return len(self.labelled) == self.video.n_frames >= MIN_SCORED_FRAMES

    def first_mask(self) -> Mask:
        """Return the annotation of the first frame; void is background."""
        return _read_objects(self.files, 0)

    def mask(self, index: int) -> Mask | None:
        """Return the annotation of a frame, None where there is none; void is read as background.

        Raises `MediaError` for an unreadable one and for one with an object that the first lacks.
        """
        if index not in self.labelled:
            return None
        mask = _read_objects(self.files, index)
        unknown = np.unique(mask[mask > self.n_objects])
        if len(unknown):
            raise MediaError(
                f"{self.files.path_of(index)} has objects that the first annotation lacks",
                wanted=f"indices 0 to {self.n_objects}",
                found=", ".join(map(str, unknown)),
            )
        return mask


def open_sequence(video: Video, data_root: str | Path) -> DavisSequence:
    """Return the annotated sequence of one manifest row, after a look at every annotation's name and size.

    See `open_mask_files` for what raises `MediaError`; so does a first annotation without an object.
    """
    files = open_mask_files(video, data_root)
    n_objects = int(_read_objects(files, 0).max())
    if n_objects == 0:
        raise MediaError(
            f"{files.path_of(0)} shows no object",
            wanted="object indices from 1 to 254",
            found="background and void only",
            hint=f"write the object as 1 where a mask of two values has {VOID}",
        )
    return DavisSequence(files, n_objects)


def _read_objects(files: MaskFiles, index: int) -> Mask:
    mask = files.read(index)
    return np.where(mask == VOID, np.uint8(0), mask)


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
    if not mask.is_file():
        source.video(clip)  # what is wrong with the clip itself comes first
        raise MediaError(
            f"{clip.video_id} has no first mask",
            wanted=f"{mask.name} beside it, of the frames' size",
            hint="save object numbers (0 for the background) as a palette or grey PNG",
        )
    return source.labelled(replace(clip, labels=mask), LabelKind.MASKS)
