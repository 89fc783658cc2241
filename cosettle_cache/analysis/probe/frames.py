"""The linear per-frame probe: the baseline that a temporal model has to beat on frame labels.

Frame vectors of videos with frame labels come in; a logistic regression learns from frames of the training
videos, and the segmental metrics of its answers on the test videos go out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int64

from cosettle_cache.analysis.pooling import missing_videos
from cosettle_cache.analysis.probe import Figure, Outcome, VideoAnswer
from cosettle_cache.analysis.probe.linear import convergence_warnings, fit_and_ask, probe_protocol
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

    def without(self, failed: Collection[str]) -> SegmentPlan:
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
    settings = plan.settings
    vectors, classes = _training(plan, frames)
    n_classes = len(np.unique(classes))
    if n_classes < 2:
        raise InputError("all training frames are of one class", wanted="two classes or more")
    asked = np.concatenate([frames[name] for name in plan.test])
    answer = fit_and_ask(vectors, classes, asked, settings.penalties)
    ends = np.cumsum([len(frames[name]) for name in plan.test])
    background = plan.labels.numbers_of(settings.background)
    counts = []
    for name, said in zip(plan.test, np.split(answer.predicted, ends[:-1]), strict=True):
        truth = plan.truth[name]
        counts.append(count_segments(truth, np.repeat(said, plan.every)[: len(truth)], background=background))
    protocol = {
        "vector": f"mean of {'unit ' if settings.unit else ''}tokens per frame",
        **probe_protocol(settings),
        "bundle": settings.bundle,
        "every": plan.every,
        "background": list(settings.background),
        "training_videos": len(plan.train),
        "training_frames": len(vectors),
    }
    answers = [VideoAnswer(name, "", "", one.accuracy) for name, one in zip(plan.test, counts, strict=True)]
    figures = _figures(sum(counts[1:], start=counts[0]), foreground=bool(background))
    return Outcome(figures, n_classes, protocol, tuple(answers), convergence_warnings([answer]))


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
    values = {"accuracy": counts.accuracy}
    if foreground:
        values["foreground_accuracy"] = counts.foreground_accuracy
    values["edit"] = counts.mean_edit
    values |= {f"f1_{100 * overlap:.0f}": f1 for overlap, f1 in zip(OVERLAPS, counts.f1, strict=True)}
    return tuple(Figure(name, value, counts.n_videos) for name, value in values.items())
