"""The VIP layout: `Images/NAME/*.jpg` and one map of part classes per image, under `Category_ids/NAME`.

In comes a folder in this layout, out go a manifest and a clip's parts. Images and annotations are pairs; the
frames between them lie elsewhere in the data set and play no role (PROTOCOLS 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cosettle_cache.core.errors import MediaError
from cosettle_cache.core.types import Video
from cosettle_cache.videos.build import BuildResult, Clip, Source, build, subfolders
from cosettle_cache.videos.lists import Listed, locate, read_list
from cosettle_cache.videos.masks import Mask, MaskFiles, open_mask_files

#: Class of every value in `Category_ids`.
PARTS = (
    *("background", "hat", "hair", "sun-glasses", "upper-clothes", "dress", "coat", "socks"),
    *("pants", "gloves", "scarf", "skirt", "torso-skin", "face", "right-arm", "left-arm"),
    *("right-leg", "left-leg", "right-shoe", "left-shoe"),
)
#: Where the two published archives keep the classes.
_LABELS = ("Annotations/Category_ids", "Category_ids")


def build_vip_manifest(
    root: Path, data_root: Path, split: str = "val", names: Sequence[str] = ()
) -> BuildResult:
    """Return the clips `names`, or those of `lists/SPLIT_videos.txt`, or all where there is no list.

    A clip without annotations becomes a row without labels.
    """
    labels = next((root / name for name in _LABELS if (root / name).is_dir()), root / _LABELS[0])
    listed = [Listed(name) for name in names] or _read_lists(root, split)
    clips = [_clip(item, root, labels) for item in listed] or [
        Clip(path.name, path, labels=labels / path.name) for path in subfolders(root / "Images")
    ]
    source = Source("vip", split if listed else "", root, data_root)
    return build(clips, source)


def _read_lists(root: Path, split: str) -> list[Listed]:
    for name in (f"{split}_videos.txt", f"vip_{split}list.txt"):
        for folder in (root / "lists", root):
            if (folder / name).is_file():
                return list(read_list(folder / name))
    return []


def _clip(item: Listed, root: Path, labels: Path) -> Clip:
    if item.media is None or item.labels is None:
        return Clip(item.name, root / "Images" / item.name, labels=labels / item.name)
    return Clip(item.name, locate(root, item.media), labels=locate(root, item.labels))


@dataclass(frozen=True, slots=True)
class PartSequence:
    """One clip and its parts; `first_classes` are those of the first frame, background aside."""

    files: MaskFiles
    first_classes: tuple[int, ...]

    @property
    def n_objects(self) -> int:
        """Number of parts in the first frame."""
        return len(self.first_classes)

    def first_mask(self) -> Mask:
        """Return the classes of the first frame; a value that is no class is background."""
        return _known(self.files.read(0))

    def mask(self, index: int) -> Mask | None:
        """Return the classes of a frame as annotated, None where it is not; other values are not scored."""
        return self.files.read(index) if index in self.files.labelled else None


def open_parts(video: Video, data_root: str | Path) -> PartSequence:
    """Return the parts of one manifest row, after a look at every annotation's name and size.

    See `open_mask_files` for what raises `MediaError`; so does a first frame without any part.
    """
    files = open_mask_files(video, data_root, numbered=False)
    classes = np.unique(_known(files.read(0)))
    if not classes.any():
        raise MediaError(
            f"{files.path_of(0)} shows no part",
            wanted=f"classes from 1 to {len(PARTS) - 1}",
            found="background only",
        )
    return PartSequence(files, tuple(classes[classes > 0].tolist()))


def _known(mask: Mask) -> Mask:
    return np.where(mask < len(PARTS), mask, np.uint8(0))
