"""Temporal segmentation: how well predicted classes of frames cut a video into the right pieces.

In come the true and the predicted class of every frame; out go frame accuracy, edit score and segmental F1 as
the field computes them (Lea et al., CVPR 2017; MS-TCN). Counts of videos add up.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from cosettle_cache.core.errors import InputError

#: Overlaps (intersection over union) at which a predicted segment counts as found.
OVERLAPS = (0.10, 0.25, 0.50)

FrameClasses = Int64[np.ndarray, " frame"]
# A prediction's length is checked by hand: a wrong one is an input error, not a bug.
AnyFrames = Int64[np.ndarray, "_"]


class Segment(NamedTuple):
    """Frames `start` to `stop` (without it) that have one class."""

    label: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SegmentCounts:
    """What one video, or several, count: `a + b` pools them.

    Foreground are the frames whose true class is not background. `edit` sums the edit scores of `n_videos`;
    `found`, `spurious` and `missed` count segments per overlap.
    """

    n_videos: int
    n_frames: int
    n_correct: int
    n_foreground: int
    n_correct_foreground: int
    edit: float
    found: tuple[int, ...]
    spurious: tuple[int, ...]
    missed: tuple[int, ...]

    def __add__(self, other: SegmentCounts) -> SegmentCounts:
        sums: dict[str, Any] = {}
        for item in fields(self):
            one, two = getattr(self, item.name), getattr(other, item.name)
            per_overlap = isinstance(one, tuple)
            sums[item.name] = tuple(map(sum, zip(one, two, strict=True))) if per_overlap else one + two
        return SegmentCounts(**sums)

    @property
    def accuracy(self) -> float:
        """Share of frames with the right class, all videos' frames together."""
        return self.n_correct / self.n_frames

    @property
    def foreground_accuracy(self) -> float:
        """The same share of the foreground; 1 where there is none."""
        return self.n_correct_foreground / self.n_foreground if self.n_foreground else 1.0

    @property
    def mean_edit(self) -> float:
        """Mean edit score of the videos, from 0 to 1."""
        return self.edit / self.n_videos

    @property
    def f1(self) -> tuple[float, ...]:
        """Segmental F1 per overlap from 0 to 1, all videos' segments together; 1 where there are none."""
        counts = zip(self.found, self.spurious, self.missed, strict=True)
        return tuple(2 * a / (2 * a + b + c) if a + b + c else 1.0 for a, b, c in counts)


def count_segments(
    truth: FrameClasses, prediction: AnyFrames, *, background: Collection[int] = ()
) -> SegmentCounts:
    """Return the counts of one video; segments of a class in `background` are left out of edit and F1.

    FACT leaves out SIL on Breakfast and reports accuracy on the foreground; MS-TCN leaves nothing out there.
    Raises `InputError` for videos without frames or of different lengths.
    """
    if not len(truth) or len(truth) != len(prediction):
        raise InputError(
            "truth and prediction differ in frames",
            wanted=f"{len(truth)} frames, at least one",
            found=f"{len(prediction)}",
        )
    true, predicted = find_segments(truth, background), find_segments(prediction, background)
    right, foreground = truth == prediction, ~np.isin(truth, list(background))
    found = tuple(_count_found(true, predicted, overlap) for overlap in OVERLAPS)
    return SegmentCounts(
        n_videos=1,
        n_frames=len(truth),
        n_correct=int(right.sum()),
        n_foreground=int(foreground.sum()),
        n_correct_foreground=int((right & foreground).sum()),
        edit=edit_score([item.label for item in true], [item.label for item in predicted]),
        found=found,
        spurious=tuple(len(predicted) - count for count in found),
        missed=tuple(len(true) - count for count in found),
    )


def find_segments(classes: FrameClasses, background: Collection[int] = ()) -> list[Segment]:
    """Return the longest stretches of one class in order, without those of a class in `background`."""
    cuts = np.flatnonzero(np.diff(classes)) + 1
    starts, stops = [0, *cuts.tolist()], [*cuts.tolist(), len(classes)]
    segments = (Segment(int(classes[a]), a, b) for a, b in zip(starts, stops, strict=True))
    return [item for item in segments if item.label not in background]


def edit_score(truth: Sequence[int], prediction: Sequence[int]) -> float:
    """Return 1 minus the Levenshtein distance over the longer length; 1 for two empty sequences."""
    longest = max(len(truth), len(prediction))
    columns, places = np.asarray(prediction), np.arange(len(prediction) + 1)
    row: np.ndarray = places
    for number, symbol in enumerate(truth, start=1):
        replaced = row[:-1] + (columns != symbol)
        best = np.concatenate([[number], np.minimum(replaced, row[1:] + 1)])
        # A deletion chain costs one per place: the best start before, brought here.
        row = np.minimum.accumulate(best - places) + places
    return 1 - int(row[-1]) / longest if longest else 1.0


def _count_found(true: Sequence[Segment], predicted: Sequence[Segment], overlap: float) -> int:
    """Count predictions whose best overlap with a true segment of their class suffices.

    The first prediction takes a segment; a later one that overlaps the same one best is spurious, and so are
    its chances elsewhere: the rule of the published code.
    """
    labels, starts, stops = np.array(true, np.int64).reshape(-1, 3).T
    free = np.ones(len(true), bool)
    for item in predicted if true else ():
        shared = np.minimum(stops, item.stop) - np.maximum(starts, item.start)
        spanned = np.maximum(stops, item.stop) - np.minimum(starts, item.start)
        # Segments apart have a negative share, which is never the best of a class that is there.
        overlaps = np.where(labels == item.label, shared / spanned, 0.0)
        best = int(overlaps.argmax())
        if overlaps[best] >= overlap and free[best]:
            free[best] = False
    return int((~free).sum())
