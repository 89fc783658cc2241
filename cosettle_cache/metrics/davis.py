"""J&F of the DAVIS-2017 benchmark (semi-supervised rules), frame by frame straight from the index maps.

In come the true and the predicted mask of each frame, in order; out goes one `ObjectScore` per object, equal
to the official tool's figures (PROTOCOLS 4). Nothing is expanded per object beyond the object's own box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from cosettle_cache.core.errors import InputError
from cosettle_cache.metrics._arrays import check_lengths, size_text, to_numpy

#: Index of pixels that belong to nobody; in the truth they count as background, in a prediction as an error.
VOID = 255
#: Boundary tolerance as a share of the image diagonal (davis2017-evaluation).
TOLERANCE_SHARE = 0.008

Mask = UInt8[np.ndarray, "height width"]
# A prediction's size is checked by hand: a wrong one is an input error, not a bug.
AnyMask = UInt8[np.ndarray, "_ _"]


@dataclass(frozen=True, slots=True, eq=False)
class ObjectScore:
    """J and F of one object in every scored frame, and the benchmark's three statistics of each.

    Mean and recall (frames strictly above 0.5) are shares from 0 to 1. Decay is the mean of the first quarter
    of the frames less that of the last; neighbouring quarters share a frame.
    """

    object_id: int
    j: Float64[np.ndarray, " frame"]
    f: Float64[np.ndarray, " frame"]
    j_mean: float
    j_recall: float
    j_decay: float
    f_mean: float
    f_recall: float
    f_decay: float

    @property
    def jf_mean(self) -> float:
        """Mean of J and F, the main figure of DAVIS."""
        return (self.j_mean + self.f_mean) / 2


def davis_j_and_f(
    truth: UInt8[Any, "frame height width"], prediction: UInt8[Any, "_ _ _"]
) -> list[ObjectScore]:
    """Score every object of a clip under the semi-supervised rules.

    Both arrays, of numpy or torch, hold index maps `[frame height width]` from the annotated frame on, 0
    for background. The objects are 1 to the largest index of the first true frame, void (255) aside; the
    first and the last frame are not scored. An object that the prediction lacks counts as empty; one that
    the truth lacks raises `InputError`.
    """
    check_lengths(truth, prediction)
    if not len(truth):
        raise _too_short(0)
    true_masks, masks = to_numpy(truth), to_numpy(prediction)
    scorer = DavisScorer.from_first_mask(true_masks[0])
    for pair in zip(true_masks, masks, strict=True):
        scorer.add(*pair)
    return scorer.finish()


class DavisScorer:
    """J&F of one clip as its frames come; besides the figures it holds one pair of masks at any time.

    Pass every annotated frame to `add`, the first one and the last one too: they are left out here. `begins`
    numbers the frame, among those, in which a later object is given: it is scored after that.
    """

    def __init__(
        self, n_objects: int, height: int, width: int, begins: Mapping[int, int] | None = None
    ) -> None:
        if n_objects < 1:
            raise InputError(
                "the first true mask holds no object", wanted="an index from 1 to 254", found="0"
            )
        self.object_ids, self._begins = range(1, n_objects + 1), begins or {}
        self.tolerance = boundary_tolerance(height, width)
        self._size = (height, width)
        row, col = np.ogrid[-self.tolerance : self.tolerance + 1, -self.tolerance : self.tolerance + 1]
        self._disk = np.asarray(row**2 + col**2 <= self.tolerance**2, dtype=np.uint8)
        self._n_added = 0
        self._pending: tuple[Mask, AnyMask] | None = None
        self._figures: list[list[tuple[float, float]]] = []

    @classmethod
    def from_first_mask(cls, mask: Mask) -> DavisScorer:
        """Return a scorer for the objects and the size of the first true mask."""
        n_objects = np.where(mask == VOID, 0, mask).max(initial=0)
        return cls(int(n_objects), *mask.shape)

    def add(self, truth: AnyMask, prediction: AnyMask) -> None:
        """Take the next frame; raise `InputError` for a mask of another size or with an unknown object."""
        for which, mask in (("true", truth), ("predicted", prediction)):
            if mask.shape != self._size:
                raise InputError(
                    f"the {which} mask of frame {self._n_added} has another size",
                    wanted=size_text(self._size),
                    found=size_text(mask.shape),
                    hint="score at the annotation's own size; resize predicted masks by nearest neighbour",
                )
        if self._pending is not None and self._n_added > 1:
            self._score(*self._pending)
        # That a frame is not the last shows one frame later; meanwhile the caller may reuse its arrays.
        self._pending = (truth.copy(), prediction.copy())
        self._n_added += 1

    def finish(self) -> list[ObjectScore]:
        """Return one score per object, in order; raise `InputError` for a clip of fewer than three frames."""
        if not self._figures:
            raise _too_short(self._n_added)
        figures = np.asarray(self._figures, dtype=np.float64).transpose(1, 2, 0)
        # Frame 1 is the first that has figures.
        cut = {i: figures[place][:, self._begins.get(i, 0) :] for place, i in enumerate(self.object_ids)}
        scored = [(i, j, f) for i, (j, f) in cut.items() if len(j)]
        return [ObjectScore(i, j, f, *_statistics(j), *_statistics(f)) for i, j, f in scored]

    def _score(self, truth: Mask, prediction: Mask) -> None:
        if prediction.max() > self.object_ids[-1]:
            unknown = sorted(set(np.unique(prediction).tolist()) - {0, *self.object_ids})
            raise InputError(
                f"the predicted mask of frame {self._n_added - 1} has objects that the first true mask lacks",
                wanted=f"indices 0 to {self.object_ids[-1]}",
                found=", ".join(map(str, unknown)),
            )
        self._figures.append([_j_and_f(truth, prediction, i, self._disk) for i in self.object_ids])


def boundary_tolerance(height: int, width: int) -> int:
    """Return how many pixels two boundaries may lie apart and still match."""
    return math.ceil(TOLERANCE_SHARE * math.hypot(height, width))


def _j_and_f(truth: Mask, prediction: Mask, object_id: int, disk: AnyMask) -> tuple[float, float]:
    true, predicted = (np.asarray(mask == object_id).view(np.uint8) for mask in (truth, prediction))
    # The box of their union and the pixel around it: no boundary lies beyond.
    box = _grown_box(true | predicted, 1)
    true, predicted = true[box], predicted[box]
    union = np.count_nonzero(true | predicted)
    if union == 0:
        return 1.0, 1.0
    return np.count_nonzero(true & predicted) / union, _boundary_f(true, predicted, disk)


def _boundary_f(truth: Mask, prediction: Mask, disk: AnyMask) -> float:
    # Edges are the pixels that differ from their right, lower or lower-right neighbour; not the rim.
    square = np.ones((2, 2), np.uint8)
    masks = (truth, prediction)
    edges: list[Any] = [cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, square, anchor=(0, 0)) for mask in masks]
    n_true, n_predicted = map(np.count_nonzero, edges)
    if n_true == 0 or n_predicted == 0:
        return float(n_true == n_predicted)
    # Only where pixels of one may lie near pixels of the other: a few stray pixels far away, as predictions
    # have them, would make the box of both nearly the image.
    axes = zip(*(_grown_box(edge, len(disk) // 2) for edge in edges), strict=True)
    meeting = tuple(slice(max(a.start, b.start), max(min(a.stop, b.stop), 0)) for a, b in axes)
    true_edge, predicted_edge = (edge[meeting] for edge in edges)
    if not true_edge.size:
        return 0.0
    precision = np.count_nonzero(predicted_edge & cv2.dilate(true_edge, disk)) / n_predicted
    recall = np.count_nonzero(true_edge & cv2.dilate(predicted_edge, disk)) / n_true
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def _grown_box(mask: Mask, margin: int) -> tuple[slice, slice]:
    left, top, width, height = cv2.boundingRect(mask)
    rows = slice(max(top - margin, 0), top + height + margin)
    return rows, slice(max(left - margin, 0), left + width + margin)


def _statistics(figures: Float64[np.ndarray, " frame"]) -> tuple[float, float, float]:
    """Return mean, recall and decay; the quarters' ends are rounded half up, as the official tool does.

    The official tool keeps the ends in 8 bits, so that its decay fails beyond 256 frames (PROTOCOLS 4.1).
    """
    last = len(figures) - 1
    second, fourth = (last + 2) // 4, (3 * last + 2) // 4
    decay = figures[: second + 1].mean() - figures[fourth:].mean()
    return float(figures.mean()), float((figures > 0.5).mean()), float(decay)


def _too_short(n_frames: int) -> InputError:
    return InputError(
        "the clip is too short to be scored", wanted="at least 3 frames", found=f"{n_frames} frames"
    )
