"""The linear per-frame probe: the baseline that a temporal model has to beat on frame labels.

Frame vectors of videos with frame labels come in; a logistic regression learns from frames of the training
videos, and the segmental metrics of its answers on the test videos go out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int64

from cosettle_cache.analysis.probe.outcome import Figure, Outcome, VideoAnswer
from cosettle_cache.analysis.probe.videos import convergence_warnings, fit_and_ask, missing_videos
from cosettle_cache.core.errors import InputError
from cosettle_cache.core.settings import ProbeSettings, digest
from cosettle_cache.metrics.segments import OVERLAPS, SegmentCounts, count_segments
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frame_labels import FrameLabels, flat_name

#: Labels and frames of a video may differ in number by this share, as Breakfast's do; the rest is left out.
_TOLERATED = 0.1

# Videos differ in length.
Frames = Float32[np.ndarray, "_ dim"]
FrameClasses = Int64[np.ndarray, "_"]


@dataclass(frozen=True, slots=True, eq=False)
class SegmentPlan:
    """Videos to learn from and to be asked about, and their labels; one frame in `every` is stored.

    `missing` are videos of either part that the store has no tokens of.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    truth: Mapping[str, FrameClasses]
    labels: FrameLabels
    every: int
    settings: ProbeSettings
    missing: Mapping[str, str]

    @property
    def video_ids(self) -> tuple[str, ...]:
        """All videos whose frames are needed."""
        return (*self.train, *self.test)

    @property
    def digest(self) -> str:
        """Identifies which videos with which labels took part."""
        truth = {name: classes.tolist() for name, classes in self.truth.items()}
        return digest([self.train, self.test, truth])

    def without(self, failed: Mapping[str, str]) -> SegmentPlan:
        """Return the plan without some videos; raise `InputError` when a part is empty then."""
        train, test = (tuple(name for name in part if name not in failed) for part in (self.train, self.test))
        if not train or not test:
            raise InputError("no readable video is left to learn from, or to be asked about")
        return replace(self, train=train, test=test)


def plan_segments(store: FeatureStore, labels: FrameLabels, settings: ProbeSettings) -> SegmentPlan:
    """Return the videos of both parts of the split with their labels.

    Raises `InputError` for a part without a video in the store and for labels of another frame rate.
    """
    complete = set(store.video_ids)
    present = {video.video_id: video for video in store.manifest if video.video_id in complete}
    parts, listed = [], []
    for part in ("train", "test"):
        wanted = labels.bundle(part, settings.bundle)
        parts.append(tuple(name for name in present if flat_name(name) in wanted))
        listed += [video.video_id for video in store.manifest if flat_name(video.video_id) in wanted]
        if not parts[-1]:
            raise InputError(
                f"{store.path} holds no video of {part}.{settings.bundle}",
                wanted=f"ids as {min(wanted, default='NAME')}",
                found=", ".join(flat_name(name) for name in list(present)[:4]),
            )
    truth = {name: _read(labels, name, present[name].n_frames) for part in parts for name in part}
    every = int(store.fingerprint.plan["every"])
    missing = missing_videos(store, listed)
    return SegmentPlan(parts[0], parts[1], truth, labels, every, settings, missing)


def _read(labels: FrameLabels, video_id: str, n_frames: int) -> FrameClasses:
    """Return the labels of a video, cut to its frames."""
    truth = labels.read(video_id)
    if abs(len(truth) - n_frames) > _TOLERATED * n_frames:
        raise InputError(
            f"{labels.path(video_id)} is of another frame rate than the video",
            wanted=f"about {n_frames} lines",
            found=len(truth),
        )
    return truth[:n_frames]


def segment(plan: SegmentPlan, frames: Mapping[str, Frames]) -> Outcome:
    """Learn from the training frames and score the answers on the test videos at the labels' frame rate.

    An answer stands for all frames up to the next stored one. Accuracy and F1 count all videos together, edit
    is the mean over videos, as published. Of many training frames `max_frames`, evenly spaced, are used.
    """
    vectors, classes = _training(plan, frames)
    if len(np.unique(classes)) < 2:
        raise InputError("all training frames are of one class", wanted="two classes or more")
    asked = np.concatenate([frames[name] for name in plan.test])
    answer = fit_and_ask(vectors, classes, asked, plan.settings.penalties)
    ends = np.cumsum([len(frames[name]) for name in plan.test])
    background = plan.labels.numbers_of(plan.settings.background)
    counts = []
    for name, said in zip(plan.test, np.split(answer.predicted, ends[:-1]), strict=True):
        truth = plan.truth[name]
        counts.append(count_segments(truth, np.repeat(said, plan.every)[: len(truth)], background=background))
    return Outcome(
        _figures(sum(counts[1:], start=counts[0]), foreground=bool(background)),
        len(np.unique(classes)),
        _protocol(plan, len(vectors)),
        tuple(map(_answer, plan.test, counts)),
        convergence_warnings([answer.converged]),
    )


def _training(plan: SegmentPlan, frames: Mapping[str, Frames]) -> tuple[Frames, FrameClasses]:
    vectors, classes = [], []
    for name in plan.train:
        labels = plan.truth[name][:: plan.every]
        vectors.append(frames[name][: len(labels)])
        classes.append(labels[: len(frames[name])])
    joined, labels = np.concatenate(vectors), np.concatenate(classes)
    if len(joined) <= plan.settings.max_frames:
        return joined, labels
    chosen = np.linspace(0, len(joined) - 1, plan.settings.max_frames).astype(np.int64)
    return joined[chosen], labels[chosen]


def _figures(counts: SegmentCounts, *, foreground: bool) -> tuple[Figure, ...]:
    f1 = zip(OVERLAPS, counts.f1, strict=True)
    figure = Figure("foreground_accuracy", counts.foreground_accuracy, counts.n_videos)
    of_foreground = (figure,) if foreground else ()
    return (
        Figure("accuracy", counts.accuracy, counts.n_videos),
        *of_foreground,
        Figure("edit", counts.mean_edit, counts.n_videos),
        *(Figure(f"f1_{100 * overlap:.0f}", value, counts.n_videos) for overlap, value in f1),
    )


def _answer(video_id: str, counts: SegmentCounts) -> VideoAnswer:
    return VideoAnswer(video_id, "", "", counts.accuracy)


def _protocol(plan: SegmentPlan, n_training_frames: int) -> dict[str, object]:
    return {
        "vector": f"mean of {'unit ' if plan.settings.unit else ''}tokens per frame",
        "probe": "standardisation, logistic regression",
        "C": list(plan.settings.penalties),
        "bundle": plan.settings.bundle,
        "every": plan.every,
        "background": list(plan.settings.background),
        "training_videos": len(plan.train),
        "training_frames": n_training_frames,
    }


def frame_counts(store: FeatureStore, video_ids: Sequence[str]) -> dict[str, int]:
    """Return the number of stored frames of each video."""
    return {video_id: store.n_frames(video_id) for video_id in video_ids}
