"""Figures become score rows, and rows give back what pools over clips.

In come a row that holds provenance only and one video's figures; out goes the row that is kept.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np

from cosettle_cache.core.types import Score
from cosettle_cache.metrics.davis import DavisScorer, ObjectScore
from cosettle_cache.metrics.jhmdb import (
    THRESHOLDS,
    AnyJoints,
    JointCounts,
    Joints,
    count_joints,
    count_joints_strictly,
)
from cosettle_cache.metrics.tapvid import THRESHOLDS as TRACK_THRESHOLDS
from cosettle_cache.metrics.tapvid import TrackCounts
from cosettle_cache.metrics.vip import Confusion

#: PCK at the benchmark's thresholds, in both readings, as a score row names them.
PCK_COLUMNS = tuple("pck_" + f"{threshold:g}".replace(".", "_") for threshold in THRESHOLDS)
STRICT_COLUMNS = tuple(f"strict_{name}" for name in PCK_COLUMNS)
#: Position accuracy of tracked points, likewise.
DELTA_COLUMNS = tuple(f"delta_{threshold}" for threshold in TRACK_THRESHOLDS)


def object_rows(row: Score, scorer: DavisScorer, shown: Collection[int]) -> list[Score]:
    """Return `row` with J and F once per object, of those `shown` in the first true mask.

    Where its numbers have gaps, the official tool also counts the numbers between, as objects that are never
    there and so always right; they get no row here.
    """
    items = [item for item in scorer.finish() if item.object_id in shown]
    return [object_row(row, item, scorer.tolerance) for item in items]


def object_row(row: Score, figures: ObjectScore, tolerance: int) -> Score:
    """Return `row` with J and F of one object; `tolerance` is the boundary's, in pixels."""
    return replace(
        row,
        object_id=figures.object_id,
        boundary_tolerance_px=tolerance,
        j_mean=figures.j_mean,
        j_recall=figures.j_recall,
        j_decay=figures.j_decay,
        f_mean=figures.f_mean,
        f_recall=figures.f_recall,
        f_decay=figures.f_decay,
    )


def parts_row(row: Score, confusion: Confusion) -> Score:
    """Return `row` with the parts of one clip."""
    figures = confusion.score()
    counts = json.dumps({"confusion": confusion.counts.tolist()}, separators=(",", ":"))
    return replace(row, miou=figures.miou, pixel_accuracy=figures.pixel_accuracy, counts_json=counts)


def joints_row(row: Score, counts: JointCounts, strict: JointCounts) -> Score:
    """Return `row` with the joints of one clip, counted at the benchmark's thresholds in both readings."""
    figures = joint_figures(counts, strict)
    plain = {"inherited": _plain(counts), "strict": _plain(strict)}
    return replace(row, **figures, counts_json=json.dumps(plain, separators=(",", ":")))


def tracks_row(row: Score, counts: TrackCounts, truth_sha256: str) -> Score:
    """Return `row` with the points of one clip; a figure that the clip does not have is None.

    `truth_sha256` identifies the true tracks: those of generated clips are in no file.
    """
    deltas = dict(zip(DELTA_COLUMNS, counts.deltas.tolist(), strict=True))
    figures = {"aj": counts.aj, "delta_avg": counts.delta_avg, "oa": counts.oa, **deltas}
    known: dict[str, Any] = {name: None if np.isnan(value) else value for name, value in figures.items()}
    plain = {
        "scored": counts.scored,
        "agreed": counts.agreed,
        "visible": counts.visible,
        "shown": counts.shown,
        "near": counts.near.tolist(),
        "hits": counts.hits.tolist(),
    }
    document = {"tracks": plain, "truth_sha256": truth_sha256}
    return replace(row, **known, counts_json=json.dumps(document, separators=(",", ":")))


def clip_row(row: Score, truth: Joints, prediction: AnyJoints, image_size: tuple[int, int]) -> Score:
    """Return `row` with the joints of one clip, true and predicted in pixels of images of (height, width)."""
    strict = count_joints_strictly(truth, prediction, image_size)
    return joints_row(row, count_joints(truth, prediction), strict)


def joint_figures(counts: JointCounts, strict: JointCounts) -> dict[str, Any]:
    """Return both readings' PCK and the visible share by their names in a row."""
    return {
        **dict(zip(PCK_COLUMNS, counts.shares().tolist(), strict=True)),
        **dict(zip(STRICT_COLUMNS, strict.shares().tolist(), strict=True)),
        "visible_share": counts.visible_share,
    }


def row_confusion(row: Score) -> Confusion:
    """Return the confusion of a row of parts."""
    return Confusion(np.array(json.loads(row.counts_json)["confusion"], dtype=np.int64))


def row_joint_counts(row: Score) -> tuple[JointCounts, JointCounts]:
    """Return the inherited and the strict counts of a row of joints."""
    document = json.loads(row.counts_json)
    return _counts(document["inherited"]), _counts(document["strict"])


def _plain(counts: JointCounts) -> dict[str, Any]:
    return {
        "correct": counts.correct.tolist(),
        "scored": counts.scored.tolist(),
        "visible": counts.visible,
        "annotated": counts.annotated,
    }


def _counts(document: dict[str, Any]) -> JointCounts:
    correct, scored = (np.array(document[name], dtype=np.int64) for name in ("correct", "scored"))
    return JointCounts(correct, scored, document["visible"], document["annotated"])
