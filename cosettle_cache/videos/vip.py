"""Body parts of one video as VIP has them: a map of part classes per image.

Images and annotations are pairs; the frames between them lie elsewhere in the data set and play no role
(PROTOCOLS 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cosettle_cache.core.errors import MediaError
from cosettle_cache.core.types import Video
from cosettle_cache.videos.masks import Mask, MaskFiles, open_mask_files

#: Class of every value in `Category_ids`.
PARTS = (
    *("background", "hat", "hair", "sun-glasses", "upper-clothes", "dress", "coat", "socks"),
    *("pants", "gloves", "scarf", "skirt", "torso-skin", "face", "right-arm", "left-arm"),
    *("right-leg", "left-leg", "right-shoe", "left-shoe"),
)


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
