"""Probes of a store: `plan_probe` says what will be measured without reading a token, `run_probe` measures.

A frames store comes in; every video is read once, whatever the number of tasks and projections, and the
outcome of every task for every kind of tokens goes out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32

from cosettle_cache.analysis.pooling import FramePooler, check_frames_plan, each_video
from cosettle_cache.analysis.probe import TASKS
from cosettle_cache.analysis.probe.files import Measured, ProbeReport
from cosettle_cache.analysis.probe.frames import SegmentPlan, plan_segments
from cosettle_cache.analysis.probe.order import order_frames, spread
from cosettle_cache.analysis.probe.videos import Labelled, select_videos
from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.settings import ProbeSettings, make_provenance
from cosettle_cache.core.types import Manifest
from cosettle_cache.heads.kinds import make_kinds
from cosettle_cache.heads.projection import Projection
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frame_labels import FrameLabels


@dataclass(frozen=True, slots=True)
class ProbePlan:
    """What will be measured: by task the videos that take part, with their classes or labels of frames."""

    store: FeatureStore
    settings: ProbeSettings
    sources: Mapping[str, Labelled | SegmentPlan]

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
        return order_frames(order) if isinstance(order, Labelled) else 0

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

    def without(self, failed: Collection[str]) -> ProbePlan:
        """Return the plan without some videos; raise `InputError` where a task cannot use the others."""
        sources = {name: source.without(failed) for name, source in self.sources.items()}
        for name, source in sources.items():
            if TASKS[name].check:
                TASKS[name].function(TASKS[name].check)(source)
        return replace(self, sources=sources)


def plan_probe(
    store: FeatureStore,
    tasks: Sequence[str],
    settings: ProbeSettings,
    *,
    manifest: Manifest | None = None,
    frame_labels: FrameLabels | None = None,
) -> ProbePlan:
    """Return what `run_probe` will do, after every check that needs no tokens.

    Without `tasks` all are done that need classes, or with `frame_labels` those that need these. `manifest`
    counts for classes and splits in place of the store's. Raises `InputError` for a store of another plan and
    for videos that a task cannot use, `UsageError` for segments without frame labels.
    """
    for name in tasks:
        if name not in TASKS:
            raise UsageError(f"there is no task {name}", wanted=", ".join(TASKS), found=name)
    check_frames_plan(store, "probe")
    with_labels = frame_labels is not None
    chosen = list(tasks) or [name for name, task in TASKS.items() if task.frame_labels == with_labels]
    sources: dict[str, Labelled | SegmentPlan] = {}
    labelled = None
    for name in chosen:
        if TASKS[name].frame_labels:
            if frame_labels is None:
                hint = "--labels FOLDER with groundTruth/, mapping.txt"
                raise UsageError(f"{name} needs frame labels", hint=hint)
            sources[name] = plan_segments(store, frame_labels, settings)
        else:
            labelled = labelled or select_videos(store, settings, manifest)
            sources[name] = labelled
    if labelled and "order" in sources:
        n_stored = {video_id: store.n_frames(video_id) for video_id in labelled.video_ids}
        sources["order"] = replace(labelled, n_stored=n_stored)
    return ProbePlan(store, settings, sources).without(())


def run_probe(
    plan: ProbePlan,
    *,
    projections: Sequence[tuple[str, Projection]] = (),
    device: str = "cpu",
    progress: Progress = SILENT,
) -> ProbeReport:
    """Read every video once and do all tasks for raw tokens and for each projection.

    A video that cannot be read is a named failure and the others are measured; see `plan_probe` for the rest.
    """
    store, failures = plan.store, plan.incomplete
    kinds = make_kinds(projections, store.arrays[0].n_channels, device=device)
    pooler = FramePooler(store, kinds, plan.settings.unit, device)
    vectors = _read(plan, pooler, failures, progress)
    left_out, plan = plan.left_out, plan.without(failures)
    dataset = "; ".join(dict.fromkeys(video.dataset for video in store.manifest if video.dataset))
    packages = ("scikit-learn", "faiss-cpu")
    measured = []
    for name, source in plan.sources.items():
        task = TASKS[name]
        for number, kind in enumerate(kinds):
            of_kind: Any = {video_id: vectors[task.needs][video_id][number] for video_id in source.video_ids}
            if not task.frame_labels:
                of_kind = np.stack(list(of_kind.values()))
            outcome = task.function(task.measure)(source, of_kind)
            provenance = make_provenance("probe", dataset, store.fingerprint, kind.sha256, packages)
            measured.append(Measured(name, kind.name, outcome, source.digest, provenance))
    return ProbeReport(tuple(measured), failures, left_out)


def _read(
    plan: ProbePlan, pooler: FramePooler, failures: dict[str, str], progress: Progress
) -> Mapping[str, dict[str, Float32[np.ndarray, "kind *frame dim"]]]:
    """Return what tasks need of every video (see `ProbeTask.needs`), by id, one layer per kind of tokens."""
    needed: dict[str, set[str]] = {"mean": set(), "order": set(), "frames": set()}
    for name, source in plan.sources.items():
        needed[TASKS[name].needs].update(source.video_ids)
    n_order = plan.order_frames
    kept: dict[str, dict[str, Any]] = {needs: {} for needs in needed}
    for video_id, frames in each_video(plan.video_ids, pooler.pool, failures, progress):
        if video_id in needed["mean"]:
            kept["mean"][video_id] = frames.mean(1)
        if video_id in needed["order"]:
            kept["order"][video_id] = frames[:, spread(frames.shape[1], n_order)]
        if video_id in needed["frames"]:
            kept["frames"][video_id] = frames
    return kept
