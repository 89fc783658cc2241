"""mIoU of the VIP benchmark: pixels are counted once into a confusion matrix, and counts of clips add up.

In come the true and the predicted class maps; out goes one `MeanIoU`, over all frames of all clips together
as the released scripts have it (PROTOCOLS 3.3), or as a mean over clips as the paper writes it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from cosettle_cache.core.errors import InputError
from cosettle_cache.metrics._arrays import check_lengths, size_text, to_numpy


@dataclass(frozen=True, slots=True, eq=False)
class MeanIoU:
    """Shares from 0 to 1; NaN in `per_class` marks a class that neither truth nor prediction shows."""

    miou: float
    per_class: Float64[np.ndarray, " class"]
    pixel_accuracy: float


@dataclass(frozen=True, slots=True, eq=False)
class Confusion:
    """Pixels by true and by predicted class; `a + b` is what both clips give together."""

    counts: Int64[np.ndarray, "class class"]

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(self.counts + other.counts)

    def score(self) -> MeanIoU:
        """Return the mean over the classes that occur, background included."""
        correct, n_pixels = np.diag(self.counts), self.counts.sum()
        iou = self.class_iou()
        return MeanIoU(_mean(iou), iou, float(correct.sum() / n_pixels) if n_pixels else math.nan)

    def class_iou(self) -> Float64[np.ndarray, " class"]:
        """Return the IoU of every class, NaN for one that does not occur."""
        correct = np.diag(self.counts)
        union = self.counts.sum(axis=0) + self.counts.sum(axis=1) - correct
        return np.where(union > 0, correct / np.maximum(union, 1), np.nan)


def count_pixels(
    truth: UInt8[np.ndarray, "height width"], prediction: UInt8[np.ndarray, "_ _"], n_classes: int
) -> Confusion:
    """Return the confusion of one frame; true values from `n_classes` on (void, say) are left out.

    Raises `InputError` for a prediction of another size or with a class that does not exist.
    """
    if truth.shape != prediction.shape:
        raise InputError(
            "truth and prediction differ in size",
            wanted=size_text(truth.shape),
            found=size_text(prediction.shape),
            hint="resize predictions to the annotation's size by nearest neighbour",
        )
    if prediction.max(initial=0) >= n_classes:
        raise InputError(
            "the prediction has a class that does not exist",
            wanted=f"classes 0 to {n_classes - 1}",
            found=int(prediction.max()),
        )
    scored = truth < n_classes
    pairs = truth[scored].astype(np.int64) * n_classes + prediction[scored]
    counts = np.bincount(pairs, minlength=n_classes**2).astype(np.int64)
    return Confusion(counts.reshape(n_classes, n_classes))


def no_pixels(n_classes: int) -> Confusion:
    """Return the confusion of no frame, to start sums from."""
    return Confusion(np.zeros((n_classes, n_classes), np.int64))


def mean_iou(
    truth: UInt8[Any, "frame height width"], prediction: UInt8[Any, "_ _ _"], n_classes: int
) -> MeanIoU:
    """Score class maps under the released rule: all frames in one confusion, mean IoU over the classes.

    Both arrays, of numpy or torch, hold classes from 0 (background, which counts as a class). True values
    from `n_classes` on are left out; see `count_pixels` for what raises `InputError`.
    """
    check_lengths(truth, prediction)
    pairs = zip(to_numpy(truth), to_numpy(prediction), strict=True)
    frames = (count_pixels(*pair, n_classes) for pair in pairs)
    return sum(frames, start=no_pixels(n_classes)).score()


def clip_miou(clips: Sequence[Confusion]) -> float:
    """Return the paper's mIoU: IoU per clip, averaged over the clips that show a class, then over classes."""
    per_clip = np.stack([clip.class_iou() for clip in clips])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return _mean(np.nanmean(per_clip, axis=0))


def _mean(figures: Float64[np.ndarray, " class"]) -> float:
    known = figures[~np.isnan(figures)]
    return float(known.mean()) if len(known) else math.nan
