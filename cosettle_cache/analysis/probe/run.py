"""Probes of a store: `plan_probe` says what will be measured without reading a token, `run_probe` measures.

A frames store comes in; every video is read once, whatever the number of tasks and projections; tasks on
single tokens read their images themselves. The outcome of every task for every kind of tokens goes out, as
`scores.parquet`, `answers.parquet` and `summary.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from cosettle_cache.analysis.pooling import check_frames_plan, each_video, pool_frames
from cosettle_cache.analysis.probe import TASKS, Figure, Outcome
from cosettle_cache.analysis.probe.dense import (
    ImagePlan,
    match_key_points,
    plan_pairs,
    plan_segmentation,
    segment_images,
)
from cosettle_cache.analysis.probe.linear import SegmentPlan, plan_segments, segment
from cosettle_cache.analysis.probe.videos import (
    Labelled,
    check_task,
    fit_linear,
    retrieve,
    select_videos,
    spread,
    tell_order,
    vote,
)
from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.settings import ProbeSettings, make_provenance
from cosettle_cache.core.tables import make_table, write_json, write_table
from cosettle_cache.core.types import Manifest, Provenance
from cosettle_cache.heads.kinds import make_kinds
from cosettle_cache.heads.projection import Projection
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.find import media_root
from cosettle_cache.videos.frame_labels import open_frame_labels

SCORES_FILE, ANSWERS_FILE, SUMMARY_FILE = "scores.parquet", "answers.parquet", "summary.json"

_TYPES = {"value": pa.float64(), "std": pa.float64(), "n_videos": pa.int64(), "n_classes": pa.int64()}


def _schema(names: str) -> pa.Schema:
    return pa.schema([(name, _TYPES.get(name, pa.string())) for name in names.split()])


#: A row per figure; `labels_digest` identifies the classes and splits that were used.
SCORES_SCHEMA = _schema(
    "task dataset tokens case metric value std n_videos n_classes protocol_json labels_digest"
    " manifest_digest backbone weights_sha256 projection_sha256 versions_json"
)
ANSWERS_SCHEMA = _schema("task tokens video_id class_name predicted value")
#: What measures a task, by its name: from `Labelled` (or a `SegmentPlan`) and vectors to an `Outcome`, or
#: from an `ImagePlan`, kinds of tokens, failures and progress to an outcome per kind.
MEASURES: Mapping[str, Callable[..., Any]] = {
    "retrieval": retrieve,
    "knn": vote,
    "linear": fit_linear,
    "order": tell_order,
    "segments": segment,
    "segmentation": segment_images,
    "spair": match_key_points,
}


@dataclass(frozen=True, slots=True)
class ProbePlan:
    """What will be measured: by task the videos that take part, with their classes or labels of frames."""

    store: FeatureStore
    settings: ProbeSettings
    sources: Mapping[str, Labelled | SegmentPlan | ImagePlan]

    @property
    def labelled(self) -> Labelled | None:
        """The videos with classes, which all tasks on classes share; None without such a task."""
        return next((item for item in self.sources.values() if isinstance(item, Labelled)), None)

    @property
    def video_ids(self) -> tuple[str, ...]:
        """The videos that are read, in the order of the store."""
        wanted = {video_id for source in self.sources.values() for video_id in source.video_ids}
        return tuple(video_id for video_id in self.store.video_ids if video_id in wanted)

    @property
    def incomplete(self) -> dict[str, str]:
        """By id why the store lacks videos that would take part: they failed, or are not extracted yet."""
        missing = [source.missing for source in self.sources.values()]
        return {video_id: reason for of_source in missing for video_id, reason in of_source.items()}

    @property
    def left_out(self) -> dict[str, str]:
        """By id why videos do not take part."""
        return dict(self.labelled.left_out) if self.labelled else {}

    @property
    def order_frames(self) -> int:
        """The frames of each video that the order is told from; 0 without that task."""
        order = self.sources.get("order")
        return order.order_frames if isinstance(order, Labelled) else 0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "tasks": list(self.sources),
            "videos": len(self.video_ids),
            "classes": self.labelled.names if self.labelled else [],
            "left_out": self.left_out,
            "incomplete": self.incomplete,
            "order_frames": self.order_frames,
            "settings": asdict(self.settings),
        }

    def without(self, failed: Mapping[str, str]) -> ProbePlan:
        """Return the plan without some videos; raise `InputError` where a task cannot use the others."""
        sources = {name: source.without(failed) for name, source in self.sources.items()}
        for name, source in sources.items():
            if isinstance(source, Labelled):
                check_task(source, name)
        return replace(self, sources=sources)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one task found for one kind of tokens, and which labels and tokens it was asked with."""

    task: str
    tokens: str
    outcome: Outcome
    labels_digest: str
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """Outcomes by task and kind of tokens; by id why videos could not be read, or took no part."""

    measured: tuple[Measured, ...]
    failures: Mapping[str, str]
    left_out: Mapping[str, str]


def plan_probe(
    store: FeatureStore,
    tasks: Sequence[str],
    settings: ProbeSettings,
    *,
    manifest: Manifest | None = None,
    labels: Path | None = None,
    data_root: Path | None = None,
) -> ProbePlan:
    """Return what `run_probe` will do, after every check that needs no tokens.

    Without `tasks` all are done that need classes, or with `labels`, a folder of frame labels, those that
    need these; of spair it is that of the data set. `manifest` counts for classes and splits in place of the
    store's; masks of segmentation lie under `data_root`. Raises `InputError` for a store of another plan and
    for videos that a task cannot use, `UsageError` for segments and spair without labels.
    """
    for name in tasks:
        if name not in TASKS:
            raise UsageError(f"there is no task {name}", wanted=", ".join(TASKS), found=name)
    check_frames_plan(store, "probe")
    usual = ("mean", "order") if labels is None else ("frames",)
    sources: dict[str, Labelled | SegmentPlan | ImagePlan] = {}
    labelled = None
    for name in list(tasks) or [name for name, task in TASKS.items() if task.needs in usual]:
        if TASKS[name].needs in ("mean", "order"):
            labelled = sources[name] = labelled or select_videos(store, settings, manifest)
        elif name == "segmentation":
            sources[name] = plan_segmentation(store, settings, media_root(store.manifest, data_root))
        elif labels is None:
            what, inside = (
                ("pairs", "PairAnnotation/") if name == "spair" else ("frame labels", "groundTruth/")
            )
            raise UsageError(f"{name} needs {what}", hint=f"--labels FOLDER with {inside}")
        elif name == "spair":
            sources[name] = plan_pairs(store, settings, labels)
        else:
            sources[name] = plan_segments(store, open_frame_labels(labels), settings)
    return ProbePlan(store, settings, sources).without({})


def run_probe(
    plan: ProbePlan,
    *,
    projections: Sequence[tuple[str, Projection]] = (),
    device: str = "cpu",
    progress: Progress = SILENT,
) -> ProbeReport:
    """Read every video once and do all tasks for raw and projected tokens; unreadable videos are failures."""
    store, failures = plan.store, plan.incomplete
    kinds = make_kinds(projections, store.arrays[0].n_channels, device=device)
    pool = partial(pool_frames, store, kinds, unit=plan.settings.unit, device=device)
    needed: dict[str, set[str]] = {"mean": set(), "order": set(), "frames": set(), "tokens": set()}
    for name, source in plan.sources.items():
        needed[TASKS[name].needs].update(source.video_ids)
    # What tasks need of every video (see `ProbeTask.needs`), by id, one layer per kind of tokens.
    kept: dict[str, dict[str, Float32[np.ndarray, "kind *frame dim"]]] = {needs: {} for needs in needed}
    n_order = plan.order_frames
    pooled = needed["mean"] | needed["order"] | needed["frames"]
    pooled_ids = [video_id for video_id in plan.video_ids if video_id in pooled]
    for video_id, frames in each_video(pooled_ids, pool, failures, progress):
        if video_id in needed["mean"]:
            kept["mean"][video_id] = frames.mean(1)
        if video_id in needed["order"]:
            kept["order"][video_id] = frames[:, spread(frames.shape[1], n_order)]
        if video_id in needed["frames"]:
            kept["frames"][video_id] = frames
    left_out, plan = plan.left_out, plan.without(failures)
    dataset = "; ".join(dict.fromkeys(video.dataset for video in store.manifest if video.dataset))
    packages = ("scikit-learn", "faiss-cpu")
    measured = []
    for name, planned in plan.sources.items():
        source = planned if isinstance(planned, SegmentPlan) else replace(planned, device=device)
        if isinstance(source, ImagePlan):
            outcomes = MEASURES[name](source, kinds, failures, progress)
        else:
            outcomes = _measure(name, source, kept[TASKS[name].needs], len(kinds))
        for kind, outcome in zip(kinds, outcomes, strict=True):
            provenance = make_provenance("probe", dataset, store.fingerprint, kind.sha256, packages)
            measured.append(Measured(name, kind.name, outcome, source.digest, provenance))
    return ProbeReport(tuple(measured), failures, left_out)


def _measure(
    task: str,
    source: Labelled | SegmentPlan,
    vectors: Mapping[str, Float32[np.ndarray, "kind *frame dim"]],
    n_kinds: int,
) -> Iterator[Outcome]:
    """Yield the outcome of a task on vectors for each kind of tokens."""
    for number in range(n_kinds):
        of_kind: Any = {video_id: vectors[video_id][number] for video_id in source.video_ids}
        if isinstance(source, Labelled):
            of_kind = np.stack(list(of_kind.values()))
        yield MEASURES[task](source, of_kind)


def write_probe(folder: Path, report: ProbeReport) -> None:
    """Write rows, answers and the summary into `folder`; the summary comes last and vouches for the rest."""
    scores, answers = [], []
    for item in report.measured:
        names = {"task": item.task, "tokens": item.tokens}
        common = names | asdict(item.provenance) | {"n_classes": item.outcome.n_classes}
        protocol = json.dumps(dict(item.outcome.protocol), sort_keys=True)
        common |= {"protocol_json": protocol, "labels_digest": item.labels_digest}
        scores += [common | asdict(figure) for figure in item.outcome.figures]
        answers += [names | asdict(answer) for answer in item.outcome.answers]
    write_table(folder / SCORES_FILE, make_table(scores, SCORES_SCHEMA))
    write_table(folder / ANSWERS_FILE, make_table(answers, ANSWERS_SCHEMA))
    write_json(folder / SUMMARY_FILE, summary_json(report))


def remove_probe(folder: Path) -> None:
    """Remove what an earlier run wrote, so that its figures cannot pass for those of a run that failed."""
    for name in (SUMMARY_FILE, SCORES_FILE, ANSWERS_FILE):
        (folder / name).unlink(missing_ok=True)


def summary_json(report: ProbeReport) -> dict[str, Any]:
    """Return every figure by task, kind of tokens, case and metric, with protocols and provenance."""
    measured, figures = report.measured, dict[str, Any]()
    for item in measured:
        of_kind = figures.setdefault(item.task, {}).setdefault(item.tokens, {})
        for figure in item.outcome.figures:
            case = of_kind.setdefault("cases", {}).setdefault(figure.case, {}) if figure.case else of_kind
            case[figure.metric] = {"value": figure.value, "std": figure.std, "videos": figure.n_videos}
    provenance, common = measured[0].provenance, ("dataset", "manifest_digest", "backbone", "weights_sha256")
    return {
        "complete": not report.failures,
        "figures": figures,
        "protocols": {item.task: dict(item.outcome.protocol) for item in measured},
        "labels_digest": {item.task: item.labels_digest for item in measured},
        "projections": {item.tokens: item.provenance.projection_sha256 for item in measured},
        "provenance": {name: getattr(provenance, name) for name in common},
        "versions": json.loads(provenance.versions_json),
        "left_out": dict(report.left_out),
        "failures": dict(report.failures),
    }


def probe_tables(report: ProbeReport) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, header and rows of one table per task, in percent, a line per tokens and case."""
    tasks = dict.fromkeys(item.task for item in report.measured)
    return [_table([item for item in report.measured if item.task == task]) for task in tasks]


def _table(measured: Sequence[Measured]) -> tuple[str, list[str], list[list[str]]]:
    first, task = measured[0].outcome, TASKS[measured[0].task]
    figures = [figure for item in measured for figure in item.outcome.figures]
    metrics = list(dict.fromkeys(figure.metric for figure in figures))
    # The mean over cases stands last, as in the tables of papers.
    cases = sorted(dict.fromkeys(figure.case for figure in figures), key=lambda name: not name)
    lines = []
    for case in cases:
        for item in measured:
            cells = {one.metric: _cell(one) for one in item.outcome.figures if one.case == case}
            if cells:
                lines.append([case or "mean", item.tokens, *(cells[metric] for metric in metrics)])
    header = ["case", "tokens", *(task.metrics[name] for name in metrics)]
    counted = f"{first.figures[0].n_videos} {task.counted}"
    title = f"{task.name}: percent, {counted}, {first.n_classes} classes"
    skipped = 0 if any(cases) else 1
    return title, header[skipped:], [line[skipped:] for line in lines]


def _cell(figure: Figure) -> str:
    spread_of_folds = "" if figure.std is None else f" ± {100 * figure.std:.2f}"
    return f"{100 * figure.value:.2f}{spread_of_folds}"
