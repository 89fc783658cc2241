"""What frozen tokens are worth for whole videos and for single frames, raw and through projections.

A frames store comes in; `plan_probe` says what will be measured without reading a token, `run_probe` reads
every video once, whatever the number of tasks and projections, and returns rows and an answer per video.

Rows of `probe` on disk and in tables: every figure with its whole provenance, every video's answer.

Rows come in; `scores.parquet`, `answers.parquet` and `summary.json` go out, and the table that people read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from cosettle_cache.analysis.pooling import FramePooler, check_frames_plan
from cosettle_cache.analysis.probe.frames import SegmentPlan, frame_counts, plan_segments, segment
from cosettle_cache.analysis.probe.order import check_order, frames_per_video, spread, tell_order
from cosettle_cache.analysis.probe.outcome import Outcome
from cosettle_cache.analysis.probe.videos import (
    Labelled,
    VideoTask,
    check_knn,
    check_linear,
    check_retrieval,
    fit_linear,
    retrieve,
    select_videos,
    vote,
)
from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import DamagedStoreError, InputError, UsageError
from cosettle_cache.core.files import make_folder
from cosettle_cache.core.settings import ProbeSettings, package_versions
from cosettle_cache.core.tables import make_table, read_table, write_json, write_table
from cosettle_cache.core.types import Manifest, ProbeAnswer, ProbeScore
from cosettle_cache.heads.kinds import TokenKind, make_kinds
from cosettle_cache.heads.projection import Projection
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frame_labels import FrameLabels

__all__ = ["TASKS", "VIDEO_TASKS", "ProbePlan", "ProbeReport", "plan_probe", "run_probe"]

VIDEO_TASKS = ("retrieval", "knn", "linear", "order")
TASKS = (*VIDEO_TASKS, "segments")

_CHECKS: Mapping[str, Callable[[VideoTask], None]] = {
    "retrieval": check_retrieval,
    "knn": check_knn,
    "linear": check_linear,
}
_ON_MEANS: Mapping[str, Callable[[VideoTask, Float32[np.ndarray, "video dim"]], Outcome]] = {
    "retrieval": retrieve,
    "knn": vote,
    "linear": fit_linear,
}


@dataclass(frozen=True, slots=True)
class ProbePlan:
    """What will be measured: tasks, videos with classes, videos with frame labels, frames of the order."""

    store: FeatureStore
    tasks: tuple[str, ...]
    settings: ProbeSettings
    labelled: Labelled | None
    segments: SegmentPlan | None
    order_frames: int

    @property
    def video_ids(self) -> tuple[str, ...]:
        """The videos that are read, in the order of the store."""
        wanted = {video.video_id for video in self.labelled.videos} if self.labelled else set()
        wanted |= set(self.segments.video_ids) if self.segments else set()
        return tuple(video_id for video_id in self.store.video_ids if video_id in wanted)

    @property
    def incomplete(self) -> dict[str, str]:
        """By id why the store lacks videos that would take part: they failed, or are not extracted yet."""
        missing = dict(self.labelled.missing) if self.labelled else {}
        return missing | (dict(self.segments.missing) if self.segments else {})

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        labelled = self.labelled
        return {
            "tasks": list(self.tasks),
            "videos": len(self.video_ids),
            "classes": labelled.names if labelled else [],
            "left_out": dict(labelled.left_out) if labelled else {},
            "incomplete": self.incomplete,
            "order_frames": self.order_frames,
            "settings": asdict(self.settings),
        }


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """Rows, answers and warnings; `failures` has by id the reason of every video that could not be read."""

    scores: tuple[ProbeScore, ...]
    answers: tuple[ProbeAnswer, ...]
    failures: Mapping[str, str]
    warnings: tuple[str, ...]


def plan_probe(
    store: FeatureStore,
    tasks: Sequence[str],
    settings: ProbeSettings,
    *,
    manifest: Manifest | None = None,
    frame_labels: FrameLabels | None = None,
) -> ProbePlan:
    """Return what `run_probe` will do, after every check that needs no tokens.

    `manifest` counts for classes and splits in place of the store's. Raises `InputError` for a store of
    another plan and for videos that a task cannot use, `UsageError` for segments without frame labels.
    """
    for task in tasks:
        if task not in TASKS:
            raise UsageError(f"there is no task {task}", wanted=", ".join(TASKS), found=task)
    check_frames_plan(store, "probe")
    if "segments" in tasks and frame_labels is None:
        raise UsageError("segments needs frame labels", hint="--labels FOLDER with groundTruth/, mapping.txt")
    labelled = select_videos(store, settings, manifest) if set(tasks) & set(VIDEO_TASKS) else None
    segments = None
    if "segments" in tasks and frame_labels is not None:
        segments = plan_segments(store, frame_labels, settings)
    order_frames = _check(store, tasks, settings, labelled) if labelled else 0
    return ProbePlan(store, tuple(dict.fromkeys(tasks)), settings, labelled, segments, order_frames)


def _check(store: FeatureStore, tasks: Sequence[str], settings: ProbeSettings, labelled: Labelled) -> int:
    """Check every task on classes; return the frames that the order is told from (0 without that task)."""
    task = VideoTask(labelled, settings)
    for name in tasks:
        if name in _CHECKS:
            _CHECKS[name](task)
    if "order" not in tasks:
        return 0
    lengths = frame_counts(store, [video.video_id for video in labelled.videos])
    check_order(task, lengths)
    return frames_per_video(task, lengths)


def run_probe(
    plan: ProbePlan,
    *,
    projections: Sequence[tuple[str, Projection]] = (),
    search: str = "auto",
    device: str = "cpu",
    progress: Progress = SILENT,
) -> ProbeReport:
    """Read every video once, do all tasks for raw tokens and for each projection, and return the rows.

    A video that cannot be read is a named failure and the others are measured; see `plan_probe` for the rest.
    """
    kinds = make_kinds(projections, plan.store.arrays[0].n_channels, device=device)
    vectors = _read(plan, FramePooler(plan.store, tuple(kinds), plan.settings.unit, device), progress)
    labelled = plan.labelled.without(vectors.failures) if plan.labelled else None
    segments = plan.segments.without(vectors.failures) if plan.segments else None
    if vectors.failures and labelled:
        _check(plan.store, plan.tasks, plan.settings, labelled)
    rows = _Rows(plan, labelled, segments)
    for name in plan.tasks:
        for number, kind in enumerate(kinds):
            if name == "segments" and segments:
                of_kind = {video: frames[number] for video, frames in vectors.frames.items()}
                outcome = segment(segments, of_kind)
            elif labelled:
                task = VideoTask(labelled, plan.settings, search)
                outcome = _video_outcome(name, task, vectors, number)
            rows.add(name, kind, outcome)
    return ProbeReport(tuple(rows.scores), tuple(rows.answers), vectors.failures, tuple(rows.warnings))


def _video_outcome(name: str, task: VideoTask, vectors: _Vectors, kind: int) -> Outcome:
    ids = [video.video_id for video in task.labelled.videos]
    if name == "order":
        return tell_order(task, np.stack([vectors.sampled[video_id][kind] for video_id in ids]))
    return _ON_MEANS[name](task, np.stack([vectors.means[video_id][kind] for video_id in ids]))


@dataclass(frozen=True, slots=True)
class _Vectors:
    """What is kept of every video, by id: its mean, frames in order, or all frames, one layer per kind."""

    means: dict[str, Float32[np.ndarray, "kind dim"]]
    sampled: dict[str, Float32[np.ndarray, "kind order_frame dim"]]
    frames: dict[str, Float32[np.ndarray, "kind frame dim"]]
    failures: dict[str, str]


def _read(plan: ProbePlan, pooler: FramePooler, progress: Progress) -> _Vectors:
    kept = _Vectors({}, {}, {}, plan.incomplete)
    in_segments = set(plan.segments.video_ids) if plan.segments else set()
    labelled = {video.video_id for video in plan.labelled.videos} if plan.labelled else set()
    progress.start(len(plan.video_ids), "videos")
    try:
        for video_id in plan.video_ids:
            try:
                frames = pooler.pool(video_id)
            except (InputError, DamagedStoreError) as error:
                kept.failures[video_id] = error.summary
                continue
            finally:
                progress.advance()
            if video_id in labelled:
                kept.means[video_id] = frames.mean(1)
            if video_id in labelled and plan.order_frames:
                kept.sampled[video_id] = frames[:, spread(frames.shape[1], plan.order_frames)]
            if video_id in in_segments:
                kept.frames[video_id] = frames
    finally:
        progress.finish()
    return kept


class _Rows:
    """Gathers outcomes as rows with their provenance."""

    def __init__(self, plan: ProbePlan, labelled: Labelled | None, segments: SegmentPlan | None) -> None:
        self._store, self._labelled, self._segments = plan.store, labelled, segments
        self.scores: list[ProbeScore] = []
        self.answers: list[ProbeAnswer] = []
        self.warnings: list[str] = []

    def add(self, task: str, kind: TokenKind, outcome: Outcome) -> None:
        """Add what a task found for one kind of tokens."""
        fingerprint = self._store.fingerprint
        versions = {
            "extract": dict(fingerprint.versions),
            "probe": package_versions("scikit-learn", "faiss-cpu"),
        }
        for figure in outcome.figures:
            self.scores.append(
                ProbeScore(
                    task=task,
                    dataset=_dataset(self._store),
                    tokens=kind.name,
                    case=figure.case,
                    metric=figure.metric,
                    value=figure.value,
                    std=figure.std,
                    n_videos=figure.n_videos,
                    n_classes=outcome.n_classes,
                    protocol_json=json.dumps(dict(outcome.protocol), sort_keys=True),
                    labels_digest=self._labels_digest(task),
                    manifest_digest=fingerprint.manifest_digest,
                    backbone=fingerprint.backbone,
                    weights_sha256=fingerprint.weights_sha256,
                    projection_sha256=kind.sha256,
                    versions_json=json.dumps(versions, sort_keys=True),
                )
            )
        self.answers += [ProbeAnswer(task, kind.name, *_fields(item)) for item in outcome.answers]
        self.warnings += [f"{task}, {kind.name}: {text}" for text in outcome.warnings]

    def _labels_digest(self, task: str) -> str:
        source = self._segments if task == "segments" else self._labelled
        return source.digest if source else ""


def _fields(answer: Any) -> tuple[str, str, str, float]:
    return (answer.video_id, answer.class_name, answer.predicted, answer.value)


def _dataset(store: FeatureStore) -> str:
    return "; ".join(dict.fromkeys(video.dataset for video in store.manifest if video.dataset))


SCORES_FILE, ANSWERS_FILE, SUMMARY_FILE = "scores.parquet", "answers.parquet", "summary.json"

_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), float | None: pa.float64()}

#: Fields that are reported once per summary.
_PROVENANCE = ("dataset", "manifest_digest", "backbone", "weights_sha256")

#: How figures are headed in a table.
_HEADINGS = {
    "map": "mAP",
    "recall_at_1": "R@1",
    "recall_at_5": "R@5",
    "accuracy": "accuracy",
    "class_accuracy": "by class",
    "foreground_accuracy": "foreground",
    "edit": "edit",
    "f1_10": "F1@10",
    "f1_25": "F1@25",
    "f1_50": "F1@50",
}


def _schema(row: type) -> pa.Schema:
    return pa.schema([(name, _ARROW[kind]) for name, kind in get_type_hints(row).items()])


SCORES_SCHEMA, ANSWERS_SCHEMA = _schema(ProbeScore), _schema(ProbeAnswer)


def write_probe(
    folder: Path,
    scores: Sequence[ProbeScore],
    answers: Sequence[ProbeAnswer],
    left_out: Mapping[str, str],
    failures: Mapping[str, str],
) -> None:
    """Write rows, answers and the summary into `folder`; the summary comes last and vouches for the rest."""
    write_table(folder / SCORES_FILE, make_table([asdict(row) for row in scores], SCORES_SCHEMA))
    answer_rows = [asdict(row) for row in answers]
    write_table(folder / ANSWERS_FILE, make_table(answer_rows, ANSWERS_SCHEMA))
    write_json(folder / SUMMARY_FILE, summary_json(scores, left_out, failures))


def remove_probe(folder: Path) -> None:
    """Remove what an earlier run wrote, so that its figures cannot pass for those of a run that failed.

    The folder is made, so that one that cannot be written shows before anything is measured.
    """
    make_folder(folder)
    for name in (SUMMARY_FILE, SCORES_FILE, ANSWERS_FILE):
        (folder / name).unlink(missing_ok=True)


def read_probe_scores(path: Path) -> list[ProbeScore]:
    """Read the rows of a `scores.parquet`."""
    return [ProbeScore(**row) for row in read_table(path, SCORES_SCHEMA).to_pylist()]


def summary_json(
    scores: Sequence[ProbeScore], left_out: Mapping[str, str], failures: Mapping[str, str]
) -> dict[str, Any]:
    """Return every figure by task, kind of tokens, case and metric, with protocols and provenance."""
    figures: dict[str, Any] = {}
    for row in scores:
        of_kind = figures.setdefault(row.task, {}).setdefault(row.tokens, {})
        of_case = of_kind.setdefault("cases", {}).setdefault(row.case, {}) if row.case else of_kind
        of_case[row.metric] = {"value": row.value, "std": row.std, "videos": row.n_videos}
    return {
        "complete": not failures,
        "figures": figures,
        "protocols": {row.task: json.loads(row.protocol_json) for row in scores},
        "labels_digest": {row.task: row.labels_digest for row in scores},
        "projections": {row.tokens: row.projection_sha256 for row in scores},
        "provenance": {name: getattr(scores[0], name) for name in _PROVENANCE} if scores else {},
        "versions": json.loads(scores[0].versions_json) if scores else {},
        "left_out": dict(left_out),
        "failures": dict(failures),
    }


def probe_tables(scores: Sequence[ProbeScore]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, header and rows of one table per task, in percent, a line per tokens and case."""
    return [_table(task, [row for row in scores if row.task == task]) for task in _order(scores, "task")]


def _table(task: str, rows: Sequence[ProbeScore]) -> tuple[str, list[str], list[list[str]]]:
    metrics = _order(rows, "metric")
    with_cases = any(row.case for row in rows)
    lines = []
    # The mean over cases stands last, as in the tables of papers.
    for case in sorted(_order(rows, "case"), key=lambda name: not name):
        for kind in _order(rows, "tokens"):
            cells = {row.metric: _cell(row) for row in rows if (row.case, row.tokens) == (case, kind)}
            if cells:
                lines.append(
                    [*([case or "mean"] if with_cases else []), kind, *map(cells.__getitem__, metrics)]
                )
    header = [*(["case"] if with_cases else []), "tokens", *(_HEADINGS[name] for name in metrics)]
    title = f"{task}: percent, {rows[0].n_videos} videos, {rows[0].n_classes} classes"
    return title, header, lines


def _cell(row: ProbeScore) -> str:
    spread = "" if row.std is None else f" ± {100 * row.std:.2f}"
    return f"{100 * row.value:.2f}{spread}"


def _order(rows: Sequence[ProbeScore], name: str) -> list[str]:
    return list(dict.fromkeys(getattr(row, name) for row in rows))
