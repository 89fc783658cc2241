"""Linear probes: logistic regression on vectors that stay as they are, by folds of samples and per frame.

Vectors, labels and folds come in; predictions of the held-out vectors go out. Standardisation is learned from
the training part of each fold. The probe of single frames is the baseline that a temporal model has to beat.
The only module that imports scikit-learn.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float32, Int64
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from cosettle_cache.analysis.pooling import missing_videos
from cosettle_cache.analysis.probe import Figure, Outcome, VideoAnswer
from cosettle_cache.core.errors import InputError
from cosettle_cache.core.settings import ProbeSettings, digest
from cosettle_cache.metrics.segments import OVERLAPS, count_segments
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frame_labels import FrameLabels, flat_name

#: Steps of L-BFGS at most; standardised vectors need some dozens.
_MAX_STEPS = 2000
#: Folds inside the training part, by which one of several penalties is chosen.
_INNER_FOLDS = 3
#: Labels and frames of a video may differ in number by this share, as Breakfast's do; the rest is left out.
_TOLERATED = 0.1

Vectors = Float[np.ndarray, "sample dim"]
Labels = Int64[np.ndarray, " sample"]
# Videos differ in length.
Frames = Float32[np.ndarray, "_ dim"]
FrameClasses = Int64[np.ndarray, "_"]


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """Rows to learn from and rows to be asked about; `seed` is that of the shuffle."""

    train: Int64[np.ndarray, " train"]
    test: Int64[np.ndarray, " test"]
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a fold's probe says of its test rows, and whether its fit converged."""

    predicted: Int64[np.ndarray, " row"]
    converged: bool


def stratified_folds(labels: Labels, n_folds: int, n_seeds: int, groups: Labels | None = None) -> list[Fold]:
    """Return `n_folds` folds per seed 0, 1 ... with every class in its share; a group is never split."""
    splitter = StratifiedKFold if groups is None else StratifiedGroupKFold
    return [
        Fold(train, test, seed)
        for seed in range(n_seeds)
        for train, test in splitter(n_folds, shuffle=True, random_state=seed).split(labels, labels, groups)
    ]


def ask_folds(
    vectors: Vectors, labels: Labels, folds: Sequence[Fold], penalties: Sequence[float]
) -> list[Answer]:
    """Return each fold's answer; see `fit_and_ask`."""
    return [
        fit_and_ask(vectors[fold.train], labels[fold.train], vectors[fold.test], penalties, fold.seed)
        for fold in folds
    ]


def fit_and_ask(
    vectors: Vectors,
    labels: Labels,
    asked: Float[np.ndarray, "asked dim"],
    penalties: Sequence[float],
    seed: int = 0,
) -> Answer:
    """Learn from `vectors` and classify `asked`: standardisation, then logistic regression.

    `penalties` are inverse strengths of the L2 penalty (scikit-learn's C); of several the best is chosen by
    three folds inside the training part, or the first where a class is too small for that.
    """
    regression = LogisticRegression(C=penalties[0], max_iter=_MAX_STEPS)
    probe: Pipeline | GridSearchCV = make_pipeline(StandardScaler(), regression)
    if len(penalties) > 1 and np.unique(labels, return_counts=True)[1].min() >= _INNER_FOLDS:
        inner = StratifiedKFold(_INNER_FOLDS, shuffle=True, random_state=seed)
        probe = GridSearchCV(probe, {"logisticregression__C": list(penalties)}, cv=inner)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        probe.fit(vectors.astype(np.float64), labels)
    converged = not any(issubclass(item.category, ConvergenceWarning) for item in caught)
    return Answer(np.asarray(probe.predict(asked.astype(np.float64)), np.int64), converged)


def convergence_warnings(answers: Sequence[Answer]) -> tuple[str, ...]:
    """Return a sentence about fits that did not converge, if there are any."""
    n_bad = sum(not answer.converged for answer in answers)
    return (f"{n_bad} of {len(answers)} logistic regressions did not converge",) if n_bad else ()


def _probe_protocol(settings: ProbeSettings) -> dict[str, object]:
    return {"probe": "standardisation, logistic regression", "C": list(settings.penalties)}


def fold_protocol(settings: ProbeSettings) -> dict[str, object]:
    """Return what decides a cross-validated probe."""
    folds = {"over": "stratified folds", "folds": settings.folds, "seeds": settings.seeds}
    return _probe_protocol(settings) | ({"over": "official split"} if settings.official else folds)


def mean_figure(metric: str, values: Sequence[float], n_videos: int, case: str = "") -> Figure:
    """Return mean and sample standard deviation of several values."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Figure(metric, float(np.mean(values)), n_videos, std, case)


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
    """Return both parts of the split with labels; raise `InputError` for an empty one, another frame rate."""
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
    truth = {name: labels.read(name) for part in parts for name in part}
    for name, lines in truth.items():
        n_frames = present[name].n_frames
        if abs(len(lines) - n_frames) > _TOLERATED * n_frames:
            raise InputError(
                f"{labels.path(name)} is of another frame rate than the video",
                wanted=f"about {n_frames} lines",
                found=len(lines),
            )
        truth[name] = lines[:n_frames]
    every = int(store.fingerprint.plan["every"])
    missing = missing_videos(store, listed)
    return SegmentPlan(parts[0], parts[1], truth, labels, every, settings, missing)


def segment(plan: SegmentPlan, frames: Mapping[str, Frames]) -> Outcome:
    """Learn from the training frames and score the answers on the test videos at the labels' frame rate.

    An answer stands for all frames up to the next stored one. Accuracy and F1 count all videos together, edit
    is the mean over videos, as published. Of many training frames `max_frames`, evenly spaced, are used.
    """
    settings = plan.settings
    parts, labels = [], []
    for name in plan.train:
        of_stored = plan.truth[name][:: plan.every]
        parts.append(frames[name][: len(of_stored)])
        labels.append(of_stored[: len(frames[name])])
    vectors, classes = np.concatenate(parts), np.concatenate(labels)
    if len(vectors) > settings.max_frames:
        chosen = np.linspace(0, len(vectors) - 1, settings.max_frames).astype(np.int64)
        vectors, classes = vectors[chosen], classes[chosen]
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
        **_probe_protocol(settings),
        "bundle": settings.bundle,
        "every": plan.every,
        "background": list(settings.background),
        "training_videos": len(plan.train),
        "training_frames": len(vectors),
    }
    answers = [VideoAnswer(name, "", "", one.accuracy) for name, one in zip(plan.test, counts, strict=True)]
    total, names = sum(counts[1:], start=counts[0]), [f"f1_{100 * overlap:.0f}" for overlap in OVERLAPS]
    values = {"accuracy": total.accuracy}
    if background:
        values["foreground_accuracy"] = total.foreground_accuracy
    values |= {"edit": total.mean_edit, **dict(zip(names, total.f1, strict=True))}
    figures = tuple(Figure(name, value, total.n_videos) for name, value in values.items())
    return Outcome(figures, n_classes, protocol, tuple(answers), convergence_warnings([answer]))
