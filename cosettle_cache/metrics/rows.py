"""Figures become score rows, and rows give back what pools over clips.

In come a row that holds provenance only and one video's figures; out goes the row that is kept.

Score rows on disk and in tables: one row per object or clip with its whole provenance, and their means.

A number never travels alone: protocol, sizes, digests and versions stand in every row and in the summary.
J&F is averaged over objects, AJ over clips; mIoU and PCK of a data set come from what its clips counted.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import numpy as np
import pyarrow as pa

from cosettle_cache.core.files import output_errors
from cosettle_cache.core.tables import make_table, read_table, write_json, write_table
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
from cosettle_cache.metrics.vip import Confusion, clip_miou

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


_ARROW = {
    str: pa.string(),
    int: pa.int64(),
    int | None: pa.int64(),
    float: pa.float64(),
    float | None: pa.float64(),
}
#: The fields of a row, and J&F besides for those who read the file elsewhere.
SCHEMA = pa.schema(
    [*((name, _ARROW[kind]) for name, kind in get_type_hints(Score).items()), ("jf_mean", pa.float64())]
)

_TEXTS = [name for name, kind in get_type_hints(Score).items() if kind is str]

SCORES_FILE, SUMMARY_FILE = "scores.parquet", "summary.json"
CHART_FILE, CHART_SVG = "scores.png", "scores.svg"

#: Fields that must agree within one summary; they are reported once.
PROVENANCE = (
    "task",
    "dataset",
    "protocol",
    "protocol_json",
    "manifest_digest",
    "backbone",
    "weights_sha256",
    "versions_json",
)


@dataclass(frozen=True, slots=True)
class ObjectsMean:
    """Unweighted means over objects (the rule of DAVIS) for one kind of tokens; shares from 0 to 1."""

    columns: ClassVar[tuple[str, ...]] = ("objects", "J&F", "J", "F")
    main_name: ClassVar[str] = "J&F"
    label: ClassVar[str] = "mean over objects"

    tokens: str
    n_videos: int
    n_objects: int
    jf_mean: float
    j_mean: float
    j_recall: float
    j_decay: float
    f_mean: float
    f_recall: float
    f_decay: float

    @property
    def main(self) -> float:
        """J&F."""
        return self.jf_mean

    def cells(self) -> list[str]:
        """Return what stands under `columns`."""
        return [str(self.n_objects), *_percent(self.jf_mean, self.j_mean, self.f_mean)]


@dataclass(frozen=True, slots=True)
class PartsMean:
    """Parts of all clips of one kind of tokens; shares from 0 to 1.

    `miou` and `pixel_accuracy` count all pixels together (the released rule); `clip_miou` averages the clips'
    IoU of each class first (the paper's formula).
    """

    columns: ClassVar[tuple[str, ...]] = ("mIoU", "mIoU by clip", "pixels")
    main_name: ClassVar[str] = "mIoU"
    label: ClassVar[str] = "all clips together"

    tokens: str
    n_videos: int
    miou: float
    clip_miou: float
    pixel_accuracy: float

    @property
    def main(self) -> float:
        """Return mIoU."""
        return self.miou

    def cells(self) -> list[str]:
        """Return what stands under `columns`."""
        return _percent(self.miou, self.clip_miou, self.pixel_accuracy)


@dataclass(frozen=True, slots=True)
class JointsMean:
    """Joints of all clips of one kind of tokens, pooled; shares from 0 to 1."""

    columns: ClassVar[tuple[str, ...]] = ("PCK@0.1", "PCK@0.2", "strict PCK@0.1", "strict PCK@0.2", "visible")
    main_name: ClassVar[str] = "PCK@0.1"
    label: ClassVar[str] = "all clips together"

    tokens: str
    n_videos: int
    pck_0_1: float
    pck_0_2: float
    pck_0_3: float
    pck_0_4: float
    pck_0_5: float
    strict_pck_0_1: float
    strict_pck_0_2: float
    strict_pck_0_3: float
    strict_pck_0_4: float
    strict_pck_0_5: float
    visible_share: float

    @property
    def main(self) -> float:
        """PCK@0.1."""
        return self.pck_0_1

    def cells(self) -> list[str]:
        """Return what stands under `columns`."""
        strict = (self.strict_pck_0_1, self.strict_pck_0_2)
        return _percent(self.pck_0_1, self.pck_0_2, *strict, self.visible_share)


@dataclass(frozen=True, slots=True)
class TracksMean:
    """Unweighted means over clips (the rule of TAP-Vid) for one kind of tokens; shares from 0 to 1.

    A figure is averaged over the clips that have it (all, unless a clip never shows a point again), and is
    None where none has.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "AJ",
        "delta_avg",
        "OA",
        "<1 px",
        "<2 px",
        "<4 px",
        "<8 px",
        "<16 px",
    )
    main_name: ClassVar[str] = "AJ"
    label: ClassVar[str] = "mean over clips"

    tokens: str
    n_videos: int
    aj: float | None
    delta_avg: float | None
    oa: float | None
    delta_1: float | None
    delta_2: float | None
    delta_4: float | None
    delta_8: float | None
    delta_16: float | None

    @property
    def main(self) -> float | None:
        """Average Jaccard."""
        return self.aj

    def cells(self) -> list[str]:
        """Return what stands under `columns`."""
        deltas = (self.delta_1, self.delta_2, self.delta_4, self.delta_8, self.delta_16)
        values = (self.aj, self.delta_avg, self.oa, *deltas)
        return ["-" if value is None else _percent(value)[0] for value in values]


Mean = ObjectsMean | PartsMean | JointsMean | TracksMean


def mean_scores(scores: Sequence[Score]) -> list[Mean]:
    """Return one mean per kind of tokens, in order of first appearance; all rows are of one benchmark."""
    kinds = dict.fromkeys(score.tokens for score in scores)
    return [_mean(kind, [score for score in scores if score.tokens == kind]) for kind in kinds]


def sequence_means(scores: Sequence[Score]) -> list[tuple[str, list[Mean]]]:
    """Return (video_id, its mean per kind of tokens) for every video."""
    ordered = sorted(scores, key=lambda score: score.video_id)
    grouped = groupby(ordered, key=lambda score: score.video_id)
    return [(video_id, mean_scores(list(rows))) for video_id, rows in grouped]


def write_scores(folder: Path, scores: Sequence[Score], *, complete: bool = True) -> tuple[Path, Path]:
    """Write `scores.parquet` (all rows) and `summary.json` (means and provenance) into `folder`.

    `complete` says whether every video had its turn; it stands in the summary.
    """
    rows, summary = folder / SCORES_FILE, folder / SUMMARY_FILE
    write_rows(rows, scores)
    write_json(summary, {"complete": complete, **summary_json(scores)})
    return rows, summary


def write_rows(path: Path, scores: Sequence[Score]) -> None:
    """Write all rows as Parquet, or as CSV when `path` ends in .csv."""
    rows = [{**asdict(score), "jf_mean": score.jf_mean} for score in scores]
    write_table(path, make_table(rows, SCHEMA))


def remove_scores(folder: Path) -> None:
    """Remove what an earlier run wrote, so that its figures cannot pass for those of a run that failed."""
    with output_errors(folder):
        for name in (SCORES_FILE, SUMMARY_FILE, CHART_FILE, CHART_SVG):
            (folder / name).unlink(missing_ok=True)


def read_scores(path: Path) -> list[Score]:
    """Read the rows of a `scores.parquet`; columns that it lacks, as older ones do, keep their defaults."""
    table = read_table(path, SCHEMA)
    known = [item.name for item in fields(Score) if item.name in table.column_names]
    # CSV does not tell an empty text from none.
    texts = [name for name in _TEXTS if name in known]
    rows = table.select(known).to_pylist()
    return [Score(**(row | {name: row[name] or "" for name in texts})) for row in rows]


def summary_json(scores: Sequence[Score]) -> dict[str, Any]:
    """Return means per kind of tokens and per sequence with the rows' common provenance."""
    return {
        "means": {mean.tokens: asdict(mean) for mean in mean_scores(scores)},
        "sequences": {
            video_id: {mean.tokens: mean.main for mean in means} for video_id, means in sequence_means(scores)
        },
        "projections": {score.tokens: score.projection_sha256 for score in scores},
        "scored_sizes": {score.video_id: score.scored_size for score in scores},
        "boundary_tolerance_px": {score.video_id: score.boundary_tolerance_px for score in scores},
        "provenance": {name: _common(scores, name) for name in PROVENANCE},
    }


def score_table(scores: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table people read: one line per sequence, then the whole; percent."""
    totals = mean_scores(scores)
    by_sequence = [(video_id, mean) for video_id, means in sequence_means(scores) for mean in means]
    lines = [*by_sequence, *((mean.label, mean) for mean in totals)]
    columns = totals[0].columns if totals else ()
    return ["sequence", "tokens", *columns], [[name, mean.tokens, *mean.cells()] for name, mean in lines]


def _mean(kind: str, scores: Sequence[Score]) -> Mean:
    n_videos = len({score.video_id for score in scores})
    if scores[0].miou is not None:
        return _parts_mean(kind, n_videos, [row_confusion(score) for score in scores])
    if scores[0].oa is not None:
        return _tracks_mean(kind, n_videos, scores)
    if scores[0].visible_share is not None:
        return _joints_mean(kind, n_videos, [row_joint_counts(score) for score in scores])
    names = ("jf_mean", "j_mean", "j_recall", "j_decay", "f_mean", "f_recall", "f_decay")
    means = {name: sum(getattr(score, name) for score in scores) / len(scores) for name in names}
    return ObjectsMean(kind, n_videos, len(scores), **means)


def _parts_mean(kind: str, n_videos: int, clips: Sequence[Confusion]) -> PartsMean:
    total = sum(clips[1:], start=clips[0]).score()
    return PartsMean(kind, n_videos, total.miou, clip_miou(clips), total.pixel_accuracy)


def _joints_mean(kind: str, n_videos: int, clips: Sequence[tuple[JointCounts, JointCounts]]) -> JointsMean:
    inherited, strict = (sum(counts[1:], start=counts[0]) for counts in zip(*clips, strict=True))
    return JointsMean(kind, n_videos, **joint_figures(inherited, strict))


def _tracks_mean(kind: str, n_videos: int, scores: Sequence[Score]) -> TracksMean:
    means: dict[str, float | None] = {}
    for name in ("aj", "delta_avg", "oa", *DELTA_COLUMNS):
        known = [value for value in (getattr(score, name) for score in scores) if value is not None]
        means[name] = sum(known) / len(known) if known else None
    return TracksMean(kind, n_videos, **means)


def _percent(*shares: float) -> list[str]:
    return [f"{100 * share:.2f}" for share in shares]


def _common(scores: Sequence[Score], name: str) -> str:
    return "; ".join(dict.fromkeys(str(getattr(score, name)) for score in scores))
