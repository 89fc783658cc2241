"""PCK of the JHMDB benchmark: joints are counted once per clip, and counts of clips add up.

In come true and predicted joints in pixels; out goes the share within a distance, in two readings. The
inherited one asks the prediction which joints are visible, so a lost joint counts for nothing; the strict
one asks the truth, so a lost joint counts as wrong (PROTOCOLS 2.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from cosettle_cache.core.errors import InputError
from cosettle_cache.metrics._arrays import to_numpy

#: The benchmark's distances, in shares of the scale.
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
#: The scale of a frame is this share of the diagonal of the joints' box.
SCALE_SHARE = 0.6

Joints = Float[np.ndarray, "2 joint frame"]
# Clips differ in length; a prediction's shape is checked by hand: a wrong one is an input error, not a bug.
AnyJoints = Float[np.ndarray, "2 _ _"]
AnyArray = Float[Any, "2 _ _"]
Visible = Bool[np.ndarray, "joint frame"]


@dataclass(frozen=True, slots=True, eq=False)
class JointCounts:
    """How many joints were scored and how many lie within each threshold; `a + b` pools two clips.

    `visible` counts the scored frames in which a joint was predicted at all, `annotated` all of them.
    """

    correct: Int64[np.ndarray, "threshold joint"]
    scored: Int64[np.ndarray, " joint"]
    visible: int
    annotated: int

    def __add__(self, other: JointCounts) -> JointCounts:
        return JointCounts(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    def shares(self) -> Float64[np.ndarray, " threshold"]:
        """Return PCK per threshold from 0 to 1: the unweighted mean over the joints that were scored."""
        known = self.scored > 0
        if not known.any():
            return np.full(len(self.correct), np.nan)
        return np.asarray((self.correct[:, known] / self.scored[known]).mean(axis=1))

    @property
    def visible_share(self) -> float:
        """Share of the joints that the prediction did not lose."""
        return self.visible / self.annotated if self.annotated else float("nan")


def pck(
    truths: Sequence[AnyArray], predictions: Sequence[AnyArray], thresholds: Sequence[float] = THRESHOLDS
) -> dict[float, float]:
    """Return PCK in percent per threshold as the inherited script computes it.

    Each clip, an array of numpy or torch, is (x, y) in pixels `[2 joint frame]`; a predicted x below 0
    marks a lost joint. Frame 0 is not scored. Distances are in scales of 0.6 times the diagonal of the box
    of the true joints that the prediction shows, lost joints are left out, clips are pooled per joint, and
    joints are averaged. Predicted frames beyond the truth's are ignored; fewer raise `InputError`.
    """
    pairs = zip(map(to_numpy, truths), map(to_numpy, predictions), strict=True)
    return _percent([count_joints(*pair, thresholds) for pair in pairs], thresholds)


def strict_pck(
    truths: Sequence[AnyArray],
    predictions: Sequence[AnyArray],
    image_sizes: Sequence[tuple[int, int]],
    thresholds: Sequence[float] = THRESHOLDS,
) -> dict[float, float]:
    """Return PCK in percent over the joints that the truth has inside the image; a lost joint is wrong.

    The scale's box is that of the same joints. Everything else is as in `pck`; `image_sizes` are (height,
    width).
    """
    triples = zip(map(to_numpy, truths), map(to_numpy, predictions), image_sizes, strict=True)
    return _percent([count_joints_strictly(*triple, thresholds) for triple in triples], thresholds)


def count_joints(
    truth: Joints, prediction: AnyJoints, thresholds: Sequence[float] = THRESHOLDS
) -> JointCounts:
    """Return the counts of one clip in the inherited reading: the prediction says what is visible."""
    return _count(truth, prediction, thresholds, inside=None)


def count_joints_strictly(
    truth: Joints,
    prediction: AnyJoints,
    image_size: tuple[int, int],
    thresholds: Sequence[float] = THRESHOLDS,
) -> JointCounts:
    """Return the counts of one clip in the strict reading: joints inside the image are visible."""
    height, width = image_size
    x, y = truth
    # The centres of pixels are whole numbers.
    inside = (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
    return _count(truth, prediction, thresholds, inside=inside)


def _count(
    truth: Joints, prediction: AnyJoints, thresholds: Sequence[float], *, inside: Visible | None
) -> JointCounts:
    """Add up frames after the first; the scale is the box of the joints `inside`, else of those predicted."""
    n_joints, n_frames = truth.shape[1:]
    if prediction.shape[1] != n_joints or prediction.shape[2] < n_frames:
        raise InputError(
            "truth and prediction differ in joints or frames",
            wanted=f"{n_joints} joints in {n_frames} frames",
            found=f"{prediction.shape[1]} joints in {prediction.shape[2]} frames",
        )
    prediction = prediction[:, :, :n_frames]
    shown = prediction[0] >= 0
    scored = shown if inside is None else inside
    low = np.where(scored, truth, np.inf).min(axis=1)
    high = np.where(scored, truth, -np.inf).max(axis=1)
    # A box of one joint has no size: whatever lies there is wrong, as a quotient of 0 and 0 is no number.
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = SCALE_SHARE * np.linalg.norm(high - low, axis=0)
        relative = np.linalg.norm(prediction - truth, axis=0) / scale
    correct = (relative <= np.reshape(thresholds, (-1, 1, 1))) & scored & shown
    return JointCounts(
        correct[:, :, 1:].sum(axis=2, dtype=np.int64),
        scored[:, 1:].sum(axis=1, dtype=np.int64),
        int(shown[:, 1:].sum()),
        shown[:, 1:].size,
    )


def _percent(clips: Sequence[JointCounts], thresholds: Sequence[float]) -> dict[float, float]:
    if not clips:
        raise InputError("there are no clips to score", wanted="at least one", found="none")
    shares = sum(clips[1:], start=clips[0]).shares()
    return {threshold: 100 * float(share) for threshold, share in zip(thresholds, shares, strict=True)}
