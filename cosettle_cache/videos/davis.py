"""Object masks of one video, in DAVIS' sense: maps of object numbers, the first frame's known to trackers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cosettle_cache.core.errors import MediaError
from cosettle_cache.core.types import Video
from cosettle_cache.videos.masks import VOID, Mask, MaskFiles, open_mask_files

#: The benchmark scores neither the first nor the last frame.
MIN_SCORED_FRAMES = 3


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
